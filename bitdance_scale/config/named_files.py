"""Files that a configuration names and without which no rank can start.

The text tokenizer and the autoencoder are looked for without reading them, a class map and the sizes of a VAE are read,
so that a job is refused before its ranks start.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bitdance_scale.config.family_rules import prompt_faults
from bitdance_scale.config.schema import RunConfig, TextSection, VisionSection
from bitdance_scale.config.vae_files import read_vae_config
from bitdance_scale.errors import ConfigError

# What a Hugging Face tokenizer consists of: one file, or the two that it can be made from.
_FAST, _SLOW = "tokenizer.json", ("vocab.json", "merges.txt")


def check_named_files(config: RunConfig, *, reads_text: bool = True) -> None:
    """Looks for the files that every rank will read.

    Args:
        config: the run.
        reads_text: whether the text tokenizer, or the class map, is among them.

    Raises:
        ConfigError: one is missing, or the class map cannot be used; lists all that are.
    """
    texts = tokenizer_faults(config.text) if config.model.parts.has_text else class_map_faults(config)
    faults = [*(texts if reads_text else ()), *vision_faults(config.vision)]
    if faults:
        raise ConfigError("\n".join(faults))


def tokenizer_faults(section: TextSection) -> Iterator[str]:
    """What is missing where the text tokenizer should be: setting, path, what is expected and how to get it."""
    path, named = section.tokenizer_path, f"text.path = {section.path!r}"
    if section.kind == "sentencepiece":
        if not path.is_file():
            found = "is a folder" if path.is_dir() else f"there is no such file{_from_here(path)}"
            yield f"{named}: {found}; set it to the .model file of a sentencepiece tokenizer"
        return
    way_out = (
        "Nothing is downloaded at the start of a run. Fetch the tokenizer first, such as `hf download Qwen/Qwen3-14B "
        f"{_FAST} tokenizer_config.json {' '.join(_SLOW)} --local-dir FOLDER`, or name tokenizer/ of an import"
    )
    if path.is_file():
        yield f"{named}: is a file; name the folder that holds it, or set text.kind=sentencepiece for a .model file"
    elif not path.is_dir():
        yield f"{named}: there is no such folder{_from_here(path)}; it must hold a Qwen3 tokenizer ({_FAST}). {way_out}"
    elif not (path / _FAST).is_file() and not all((path / name).is_file() for name in _SLOW):
        yield f"{named}: the folder has no {_FAST}, and not both of {' and '.join(_SLOW)}. {way_out}"


def class_map_faults(config: RunConfig) -> Iterator[str]:
    """What is wrong with the class map of a run, and with the prompts that it should name."""
    try:
        yield from prompt_faults(config)
    except ConfigError as error:
        yield str(error)


def vision_faults(section: VisionSection) -> Iterator[str]:
    """What is wrong with the files of the visual tokenizer, of either kind of latents."""
    if section.latents == "bits":
        yield from autoencoder_faults(section.weights_path)
        return
    try:
        read_vae_config(section)
    except ConfigError as error:
        yield str(error)


def autoencoder_faults(weights: Path) -> Iterator[str]:
    """What is missing where the autoencoder's weights should be."""
    if not weights.is_file():
        yield (
            f"vision.weights = {str(weights)!r}: no such file{_from_here(weights)}; set it to the autoencoder's "
            "safetensors file, such as ae.safetensors of a published folder or of an import"
        )


def _from_here(path: Path) -> str:
    """Where a relative path was looked for."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"
