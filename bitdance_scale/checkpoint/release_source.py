"""What is imported, checked before anything is written; here a folder: a published BitDance or a plain Qwen3.

A BitDance may be laid out as the release or as a pipeline of diffusers (`generate/published_layout.py`). No code of the
folder is run, and nothing in it is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from bitdance_scale.checkpoint.autoencoder_source import AutoencoderSource, open_autoencoder, open_component
from bitdance_scale.checkpoint.pickled_files import PickledTensors
from bitdance_scale.checkpoint.published_files import PublishedTensors
from bitdance_scale.checkpoint.shared_base import BASE, describe_base
from bitdance_scale.config.published_backbone import (
    inert_model_settings,
    read_context,
    read_model,
    unknown_model_keys,
)
from bitdance_scale.config.published_head import inert_head_settings, read_head, time_note
from bitdance_scale.config.schema import HeadSection, NetworkConfig, TextSection, VisionSection
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate.published_layout import (
    RELEASE,
    PublishedLayout,
    check_entries,
    check_projector,
    layout_of,
    read_part,
)
from bitdance_scale.model.published_names import (
    EMBEDDING,
    OUTPUT,
    PUBLISHED_EMBEDDING,
    PUBLISHED_OUTPUT,
    NamedTensor,
    Part,
    our_tensors,
    published_tensors,
)
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.sequence.tokens import TextTokenizer, load_text_tokenizer
from bitdance_scale.weight_files import TensorSpec, find_irregular, read_json
from bitdance_scale.wording import first_few

Tensors: TypeAlias = PublishedTensors | PickledTensors
"""The tensors of one part, of a folder or of a file."""


@dataclass(frozen=True)
class NewParts:
    """The parts of a BitDance model that a plain Qwen3 lacks.

    Attributes:
        autoencoder: weights file, with its configuration beside it.
        block_side: p.
        seed: of the initial values of head, projector and new embedding rows.
        head_width: width of the diffusion head; None: the backbone's.
        head_blocks: transformer blocks of the head.
        head_adaln: adaLN modules of the head.
    """

    autoencoder: Path | None = None
    block_side: int = 4
    seed: int = 0
    head_width: int | None = None
    head_blocks: int = 6
    head_adaln: int = 2

    def head(self, hidden_size: int) -> HeadSection:
        """The diffusion head for a backbone of this width."""
        width = self.head_width or hidden_size
        return HeadSection(width=width, num_blocks=self.head_blocks, num_adaln=self.head_adaln)


@dataclass(frozen=True)
class Source:
    """A folder or file to import, checked: everything in it fits together.

    Attributes:
        path: the folder or file.
        network: the network that it becomes; its paths are those of the source.
        condition: its text tokenizer, with the added tokens; or its classes.
        parts: the tensors that it holds; a plain Qwen3 has no head and no projector.
        autoencoder: its autoencoder.
        new_parts: the parts that a plain Qwen3 is given; None for a release.
        inert: what `TrainState.release` keeps of it beside the dtypes.
        notes: what the user should know of it, a line each.
        averages: the averaged weights, likewise; empty if it has none beside `parts`.
        layout: where its files are.
    """

    path: Path
    network: NetworkConfig
    condition: Condition
    parts: Mapping[Part, Tensors]
    autoencoder: AutoencoderSource
    new_parts: NewParts | None
    inert: dict[str, object]
    notes: tuple[str, ...] = ()
    averages: Mapping[Part, Tensors] = field(default_factory=dict)
    layout: PublishedLayout = RELEASE

    @property
    def kind(self) -> str:
        """What it is: BitDance or Qwen3."""
        return "BitDance" if self.new_parts is None else "Qwen3"

    @property
    def num_new_rows(self) -> int:
        """Rows of the embedding that the source lacks."""
        return self.condition.num_new_entries if isinstance(self.condition, TextTokenizer) else 0

    @property
    def num_old_rows(self) -> int:
        """Rows of the embedding that come from the source."""
        return self.condition.vocab_size - self.num_new_rows

    def tensors(self, parts: Mapping[Part, Tensors]) -> list[tuple[NamedTensor, TensorSpec]]:
        """All of our tensors, with shape and stored dtype: that of the part, or float32 for initial values."""
        return [
            (tensor, TensorSpec(tensor.shape, parts[tensor.part].dtype if tensor.part in parts else torch.float32))
            for tensor in our_tensors(self.network, self.condition.vocab_size)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        groups = [self.parts, *([self.averages] if self.averages else [])]
        return sum(spec.num_bytes for parts in groups for _, spec in self.tensors(parts))

    @property
    def num_drawn_bytes(self) -> int:
        """Bytes of initial values, which the source does not hold: head, projector and new rows of a Qwen3."""
        num_bytes = 0
        for tensor, spec in self.tensors(self.parts):
            if tensor.part not in self.parts:
                num_bytes += spec.num_bytes
            elif self.num_new_rows and tensor.name in (EMBEDDING, OUTPUT):
                num_bytes += spec.num_bytes - TensorSpec((self.num_old_rows, *tensor.shape[1:]), spec.dtype).num_bytes
        return num_bytes


def open_source(folder: Path, new_parts: NewParts | None) -> Source:
    """Checks a folder; the only tensor that is read is a second copy of a tied one.

    Args:
        folder: a published BitDance folder, or a Qwen3 folder.
        new_parts: the parts that a Qwen3 folder is given; None for a release.

    Raises:
        BitDanceError: it is neither, or something in it does not fit; names the file or tensor, what was found and what
            was expected.
    """
    _check_files(folder, folder)
    layout = layout_of(folder)
    for name in layout.folders:
        _check_files(folder / name, folder)
    weights = _autoencoder_of(folder, layout, new_parts)
    config_path = folder / layout.model_config
    config = read_json(config_path)
    model = read_model(config, str(config_path))
    autoencoder = open_component(folder, layout) if new_parts is None else open_autoencoder(weights)
    other_parts = weights.parent if new_parts is not None else None
    inert: dict[str, object] = {"model": inert_model_settings(config), BASE: describe_base(folder, other_parts)}
    notes = []
    if unknown := unknown_model_keys(config):
        notes.append(f"{config_path}: ignored, as transformers' Qwen3 ignores them: {first_few(unknown)}")
    if new_parts is None:
        head_path = folder / layout.head_config
        head_config = read_part(head_path, layout)
        check_projector(folder, layout, autoencoder.sizes["num_bits"], model.hidden_size)
        head, block_side = read_head(head_config, str(head_path), model.hidden_size, autoencoder.sizes["num_bits"])
        inert["head"] = inert_head_settings(head_config)
        notes.append(time_note(head))
    else:
        head, block_side = new_parts.head(model.hidden_size), new_parts.block_side
    network = NetworkConfig(
        model=model,
        head=head,
        vision=VisionSection(
            weights=str(weights),
            block_side=block_side,
            context=read_context(config),
            **autoencoder.sizes,
        ),
        text=TextSection(kind="huggingface", path=str(folder / layout.tokenizer)),
    )
    tokenizer = load_text_tokenizer(network.text, block_side**2)
    parts = {part: PublishedTensors(folder, part, layout) for part in (Part if new_parts is None else (Part.BACKBONE,))}
    if model.tie_embeddings and PUBLISHED_OUTPUT in parts[Part.BACKBONE].found:
        _check_tied(parts[Part.BACKBONE], layout)
    source = Source(folder, network, tokenizer, parts, autoencoder, new_parts, inert, tuple(notes), layout=layout)
    _check(source, tokenizer, config["vocab_size"])
    return source


def _autoencoder_of(folder: Path, layout: PublishedLayout, new_parts: NewParts | None) -> Path:
    """The autoencoder's weights file; raises where the folder and the options do not belong together."""
    if not (folder / layout.model_config).is_file():
        raise CheckpointError(
            f"{folder}: has no {layout.model_config}; name a Qwen3 folder or a published BitDance folder"
        )
    is_release = (folder / layout.head_config).is_file()
    if is_release and new_parts is not None:
        raise CheckpointError(
            f"{folder}: a BitDance folder ({layout.head_config}) has its autoencoder, blocks and head; leave out "
            "--autoencoder and the other options for a Qwen3 folder"
        )
    if is_release:
        return folder / layout.autoencoder
    if new_parts is None or new_parts.autoencoder is None:
        raise CheckpointError(
            f"{folder}: has no {layout.head_config}; a plain Qwen3 folder also needs --autoencoder, the weights file "
            "of the vision tokenizer"
        )
    _check_options(new_parts)
    return new_parts.autoencoder


def _check_files(folder: Path, root: Path) -> None:
    """Refuses what is no regular file: a folder that comes from someone else could name any file of this machine.

    The cache of Hugging Face keeps the files of `snapshots/REVISION`, which is the root, as links into `blobs` beside
    it; these are followed.
    """
    if folder.is_symlink() and folder != root:
        raise CheckpointError(f"{find_irregular(folder)}. Fetch the folder again, with folders in it instead of links")
    blobs = root.resolve().parent.parent / "blobs"
    for path in sorted(folder.glob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        is_blob = path.is_symlink() and path.is_file() and path.resolve().parent == blobs
        problem = None if is_blob else find_irregular(path)
        if problem is not None:
            raise CheckpointError(f"{problem}. Fetch the folder again, with files in it instead of links")


def _check_options(new_parts: NewParts) -> None:
    for name in ("block_side", "head_width", "head_blocks", "head_adaln"):
        value = getattr(new_parts, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 <= new_parts.seed < 2**31:
        raise ConfigError(f"--seed {new_parts.seed}: must be from 0 to 2^31 - 1")


def _check_tied(backbone: PublishedTensors, layout: PublishedLayout) -> None:
    """Leaves out the output projection of a tied model, which some folders store beside the embedding it equals.

    Where the two differ, versions of transformers compute different models: 4.57 ties them, 5 does not.
    """
    if PUBLISHED_EMBEDDING in backbone.found:
        fix = (
            f"tie_word_embeddings = true in {layout.model_config} says that they are one. Set it to false if the model "
            f"was trained with both, or remove {PUBLISHED_OUTPUT}"
        )
        backbone.drop_copy(PUBLISHED_OUTPUT, PUBLISHED_EMBEDDING, fix)


def _check(source: Source, tokenizer: TextTokenizer, num_rows: int) -> None:
    """Compares the tokenizer, the embedding and every tensor with the network."""
    folder, layout = source.path, source.layout
    if source.new_parts is None:
        check_entries(folder, layout, tokenizer, num_rows)
    elif tokenizer.num_new_entries != len(tokenizer.added_entries):
        raise CheckpointError(
            f"{folder}: its tokenizer has resolution or query tokens already, but there is no {layout.head_config}; "
            "name a plain Qwen3 folder or a complete BitDance folder"
        )
    if num_rows < source.num_old_rows:
        raise CheckpointError(
            f"{folder}: vocab_size = {num_rows} in {layout.model_config}, its tokenizer has {source.num_old_rows} "
            "entries; the embedding must have a row for each. Take both files from one folder"
        )
    wanted_tensors = published_tensors(source.network, num_rows)
    for part, tensors in source.parts.items():
        tensors.check({tensor.name: tensor for tensor in wanted_tensors if tensor.part is part})
