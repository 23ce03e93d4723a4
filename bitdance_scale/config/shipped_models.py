"""Published models that come with the package, found by name from any folder.

The model `demo` is the folder `assets/demo` of the package: the demo's tokenizers, and beside them what a published
folder has besides. `tools/ship_demo_model.py` puts it there, and its provenance.json says how it was trained.
"""

from __future__ import annotations

from pathlib import Path

from bitdance_scale.config.published_head import HEAD_CONFIG_NAME
from bitdance_scale.config.shipped import ASSETS


def shipped_models() -> list[str]:
    """Names of the published models that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{HEAD_CONFIG_NAME}"))


def model_path(model: str | Path) -> Path:
    """The folder of a model that a command is given: the path itself, or that of a name in `shipped_models`.

    What has that name in the working folder comes before the package's model.
    """
    path = Path(model)
    if path.exists() or path.name != str(model) or path.name not in shipped_models():
        return path
    return ASSETS / path.name
