"""What diffusers' layout has beside the weights: the index, a class for each component, and the pipeline's code.

`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` reads the index, takes each component's class from
the one file of code in its folder, and the pipeline's from the file beside the index. The code is in
`diffusers_pipeline/` and is copied as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CODE_DIR = Path(__file__).parent / "diffusers_pipeline"
DIFFUSERS_VERSION = "0.42.1"
"""The version that the code was tested with, which the files name as the one that wrote them."""
PIPELINE = ("bitdance_pipeline", "BitDanceDiffusionPipeline")
COMPONENTS: Mapping[str, tuple[str, str]] = {
    "autoencoder": ("bitdance_autoencoder", "BitDanceAutoencoder"),
    "diffusion_head": ("bitdance_diffusion_head", "BitDanceDiffusionHead"),
    "projector": ("bitdance_projector", "BitDanceProjector"),
    "text_encoder": ("transformers", "Qwen3ForCausalLM"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
}
"""Component -> (file of code in its folder, or library; class)."""


def component_config(file: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration file of a component, with the class that it is for; that of the language model is unchanged.

    Args:
        file: its path in the folder, which begins with the component's name.
        content: the published keys.
    """
    library, name = COMPONENTS[Path(file).parts[0]]
    if library == "transformers":
        return dict(content)
    return {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION} | dict(content)


def pipeline_index() -> dict[str, Any]:
    """The content of `model_index.json`."""
    index = {"_class_name": list(PIPELINE), "_diffusers_version": DIFFUSERS_VERSION}
    return index | {name: list(entry) for name, entry in COMPONENTS.items()}


def copy_pipeline(folder: Path) -> None:
    """Copies the code into a folder that has a folder for each component."""
    shutil.copyfile(CODE_DIR / f"{PIPELINE[0]}.py", folder / f"{PIPELINE[0]}.py")
    for name, (library, _) in COMPONENTS.items():
        if library != "transformers":
            shutil.copyfile(CODE_DIR / f"{library}.py", folder / name / f"{library}.py")
