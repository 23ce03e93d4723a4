"""Configurations and files that come with the package, found by name from any folder.

The configuration `demo` is the package's `config/files/demo.toml`, and the path `asset:demo/ae.safetensors` in a
setting is the package's `assets/demo/ae.safetensors`. A stored configuration keeps the name instead of a path of this
machine.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
CONFIGS = _PACKAGE / "config" / "files"
"""Folder of the configurations that come with the package."""
ASSETS = _PACKAGE / "assets"
ASSET_PREFIX = "asset:"


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.toml"))


def config_path(config: str | Path) -> Path:
    """The file of a configuration: the path itself, or that of a name in `shipped_configs`.

    A file in the working folder comes before the package's of the same name.
    """
    path = Path(config)
    if path.is_file() or path.name != str(config) or path.stem not in shipped_configs():
        return path
    return CONFIGS / f"{path.stem}.toml"


def setting_path(value: str) -> Path:
    """The path that a setting means: relative to the working folder, or of the package after `asset:`."""
    if value.startswith(ASSET_PREFIX):
        return ASSETS / value.removeprefix(ASSET_PREFIX)
    return Path(value)


def summary(name: str) -> str:
    """What a configuration that comes with the package is for: the first line of its file, a comment."""
    first = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
