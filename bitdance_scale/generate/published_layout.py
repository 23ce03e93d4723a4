"""Where the parts of a published model are in its folder: as the release has them, or as diffusers' pipelines do.

    release      config.json, model*.safetensors, tokenizer files, vision_head*, projector*, ae*
    diffusers    model_index.json, and a folder for each component:
                 text_encoder/, tokenizer/, diffusion_head/, projector/, autoencoder/

The tensors have the same names in both, and the configurations the same keys. In diffusers' layout, those of head,
projector and autoencoder also say which class of the pipeline's code they are for. That code is never run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdance_scale.config.published_backbone import MODEL_CONFIG_NAME
from bitdance_scale.config.published_head import HEAD_CONFIG_NAME
from bitdance_scale.errors import CheckpointError
from bitdance_scale.sequence.tokens import TextTokenizer
from bitdance_scale.vision.weights import CONFIG_NAME as AE_CONFIG_NAME
from bitdance_scale.vision.weights import WEIGHTS_NAME as AE_WEIGHTS_NAME
from bitdance_scale.weight_files import BACKBONE_WEIGHTS_NAME, HEAD_WEIGHTS_NAME, PROJECTOR_WEIGHTS_NAME, read_json

INDEX_NAME = "model_index.json"
"""A folder with this file is in diffusers' layout."""
PROJECTOR_ACTIVATION = "gelu_pytorch_tanh"
_COMPONENT_WEIGHTS, _COMPONENT_CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
# Keys of a component's configuration that say who wrote it and for which class; `_name_or_path` where from.
_OWN_PREFIX = "_"


@dataclass(frozen=True)
class PublishedLayout:
    """Paths in a published folder.

    Attributes:
        name: release or diffusers.
        model_config, head_config, autoencoder_config: the configuration files.
        projector_config: likewise; empty where the projector has none.
        backbone, head, projector, autoencoder: the files of weights. Large ones may be in several, with an index.
        tokenizer: the folder of the text tokenizer.
        has_split_parts: whether head and projector may be in several files too.
    """

    name: str
    model_config: str
    head_config: str
    autoencoder_config: str
    projector_config: str
    backbone: str
    head: str
    projector: str
    autoencoder: str
    tokenizer: str
    has_split_parts: bool

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that hold files of the model, beside the folder itself."""
        files = (self.model_config, self.head_config, self.autoencoder_config, self.projector_config)
        found = dict.fromkeys(Path(file).parent.as_posix() for file in files if file)
        return tuple(name for name in (*found, self.tokenizer) if name not in ("", "."))


RELEASE = PublishedLayout(
    name="release",
    model_config=MODEL_CONFIG_NAME,
    head_config=HEAD_CONFIG_NAME,
    autoencoder_config=AE_CONFIG_NAME,
    projector_config="",
    backbone=BACKBONE_WEIGHTS_NAME,
    head=HEAD_WEIGHTS_NAME,
    projector=PROJECTOR_WEIGHTS_NAME,
    autoencoder=AE_WEIGHTS_NAME,
    tokenizer="",
    has_split_parts=False,
)
DIFFUSERS = PublishedLayout(
    name="diffusers",
    model_config=f"text_encoder/{MODEL_CONFIG_NAME}",
    head_config=f"diffusion_head/{_COMPONENT_CONFIG}",
    autoencoder_config=f"autoencoder/{_COMPONENT_CONFIG}",
    projector_config=f"projector/{_COMPONENT_CONFIG}",
    backbone=f"text_encoder/{BACKBONE_WEIGHTS_NAME}",
    head=f"diffusion_head/{_COMPONENT_WEIGHTS}",
    projector=f"projector/{_COMPONENT_WEIGHTS}",
    autoencoder=f"autoencoder/{_COMPONENT_WEIGHTS}",
    tokenizer="tokenizer",
    has_split_parts=True,
)
LAYOUTS: Mapping[str, PublishedLayout] = {layout.name: layout for layout in (RELEASE, DIFFUSERS)}


def is_published(folder: Path) -> bool:
    """Whether a path is a published text-to-image folder of either layout, by one file of it."""
    return any((folder / name).is_file() for name in (RELEASE.head_config, INDEX_NAME))


def layout_of(folder: Path) -> PublishedLayout:
    """The layout of a published folder, by whether it has a `model_index.json`.

    Raises:
        CheckpointError: it has one that lacks a component, or names another language model.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        return RELEASE
    index = read_json(path)
    missing = [name for name in DIFFUSERS.folders if not _is_component(index.get(name)) or not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{path}: {', '.join(missing)}: no such component, or no folder for it; a BitDance in diffusers' layout "
            f"has {', '.join(DIFFUSERS.folders)}. Fetch the whole folder, or name a BitDance"
        )
    kind = index["text_encoder"][1]
    if not kind.startswith("Qwen3"):
        raise CheckpointError(f"{path}: text_encoder is {kind!r}, expected a Qwen3ForCausalLM; name a BitDance folder")
    return DIFFUSERS


def read_part(path: Path, layout: PublishedLayout) -> dict[str, Any]:
    """The configuration of head, projector or autoencoder, without what diffusers adds to it.

    Raises:
        CheckpointError: as `read_json`.
    """
    config = read_json(path)
    if layout is RELEASE:
        return config
    return {key: value for key, value in config.items() if not key.startswith(_OWN_PREFIX)}


def check_projector(folder: Path, layout: PublishedLayout, num_bits: int, hidden_size: int) -> None:
    """Compares the projector's configuration, where it has one, with the other parts.

    Raises:
        CheckpointError: another size or activation.
    """
    if not layout.projector_config:
        return
    path = folder / layout.projector_config
    config = {"hidden_act": PROJECTOR_ACTIVATION, **read_part(path, layout)}
    for key, wanted in projector_config(num_bits, hidden_size).items():
        if config.get(key) != wanted:
            raise CheckpointError(
                f"{path}: {key} = {config.get(key)!r}, expected {wanted!r} for this autoencoder and language model; "
                "take all components from one folder"
            )


def check_entries(folder: Path, layout: PublishedLayout, tokenizer: TextTokenizer, num_rows: int) -> None:
    """Compares the entries of a folder's text tokenizer with the blocks of its head and the rows of its embedding.

    The release adds the query tokens of its blocks to the tokenizer and resizes the embedding to that (published
    release). Where another head or tokenizer was put into a folder, all tensors can still fit.

    Args:
        folder: the folder.
        layout: where its files are.
        tokenizer: loaded from it for blocks of `parallel_num` tokens.
        num_rows: `vocab_size` of the backbone's configuration.

    Raises:
        CheckpointError: there are other query tokens than the blocks have, or other rows than entries.
    """
    block_tokens = tokenizer.image_tokens.block_tokens
    found, wanted = tokenizer.num_query_entries - tokenizer.num_new_entries, block_tokens - 1
    if found != wanted:
        raise CheckpointError(
            f"{folder}: its tokenizer has {max(found, 0)} query tokens, blocks of parallel_num = {block_tokens} "
            f"tokens ({layout.head_config}) need {wanted}; take both files from one release"
        )
    if num_rows != tokenizer.vocab_size:
        raise CheckpointError(
            f"{folder}: vocab_size = {num_rows} in {layout.model_config}, its tokenizer has {tokenizer.vocab_size} "
            "entries; they must be equal. Take both files from one release"
        )


def projector_config(num_bits: int, hidden_size: int) -> dict[str, Any]:
    """The configuration of a projector in diffusers' layout."""
    return {"in_dim": num_bits, "out_dim": hidden_size, "hidden_act": PROJECTOR_ACTIVATION}


def _is_component(entry: object) -> bool:
    """Whether an entry of the index is a library and a class; that of a component that was left out has nulls."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
