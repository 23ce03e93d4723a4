"""A folder to import, checked before anything is written: a BitDance release or a plain Qwen3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bitdance_scale.checkpoint.integrity import find_irregular
from bitdance_scale.checkpoint.published_files import PublishedTensors
from bitdance_scale.checkpoint.published_names import (
    EMBEDDING,
    OUTPUT,
    PUBLISHED_EMBEDDING,
    PUBLISHED_OUTPUT,
    NamedTensor,
    Part,
    our_tensors,
    published_tensors,
)
from bitdance_scale.config.published_backbone import (
    MODEL_CONFIG_NAME,
    inert_model_settings,
    read_model,
    unknown_model_keys,
)
from bitdance_scale.config.published_head import HEAD_CONFIG_NAME, inert_head_settings, read_head, time_note
from bitdance_scale.config.schema import HeadSection, NetworkConfig, TextSection, VisionSection
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.sequence.tokens import TextTokenizer, load_text_tokenizer
from bitdance_scale.vision.autoencoder import Autoencoder, published_sizes
from bitdance_scale.vision.weights import WEIGHTS_NAME as AE_WEIGHTS_NAME
from bitdance_scale.vision.weights import check_weights, config_beside
from bitdance_scale.weight_files import TensorSpec, read_json
from bitdance_scale.wording import first_few


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
    """A folder to import, checked: everything in it fits together.

    Attributes:
        folder: the folder.
        network: the network that it becomes; its paths are those of the source.
        tokenizer: its text tokenizer, with the added tokens.
        parts: the tensors that it holds; a plain Qwen3 has no head and no projector.
        new_parts: the parts that a plain Qwen3 is given; None for a release.
        inert: what `TrainState.release` keeps of its configuration files.
        notes: what the user should know of its configuration files, a line each.
    """

    folder: Path
    network: NetworkConfig
    tokenizer: TextTokenizer
    parts: dict[Part, PublishedTensors]
    new_parts: NewParts | None
    inert: dict[str, object]
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What the folder is: BitDance or Qwen3."""
        return "BitDance" if self.new_parts is None else "Qwen3"

    @property
    def num_old_rows(self) -> int:
        """Rows of the embedding that come from the source."""
        return self.tokenizer.vocab_size - self.tokenizer.num_new_entries

    def spec(self, tensor: NamedTensor) -> TensorSpec:
        """Shape and stored dtype of one of our tensors: the source's dtype, or float32 for initial values."""
        dtype = self.parts[tensor.part].dtype if tensor.part in self.parts else torch.float32
        return TensorSpec(tensor.shape, dtype)

    def tensors(self) -> list[tuple[NamedTensor, TensorSpec]]:
        """All of our tensors, with shape and stored dtype."""
        return [(tensor, self.spec(tensor)) for tensor in our_tensors(self.network, self.tokenizer.vocab_size)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for _, spec in self.tensors())

    @property
    def num_drawn_bytes(self) -> int:
        """Bytes of initial values, which the source does not hold: head, projector and new rows of a Qwen3."""
        num_bytes = 0
        for tensor, spec in self.tensors():
            if tensor.part not in self.parts:
                num_bytes += spec.num_bytes
            elif tensor.name in (EMBEDDING, OUTPUT):
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
    _check_files(folder)
    autoencoder = _autoencoder_of(folder, new_parts)
    config_path = folder / MODEL_CONFIG_NAME
    config = read_json(config_path)
    model = read_model(config, str(config_path))
    ae_config = config_beside(autoencoder)
    sizes = published_sizes(read_json(ae_config), str(ae_config))
    with torch.device("meta"):
        check_weights(autoencoder, Autoencoder(**sizes).state_dict())
    inert: dict[str, object] = {"model": inert_model_settings(config)}
    notes = []
    if unknown := unknown_model_keys(config):
        notes.append(f"{config_path}: ignored, as transformers' Qwen3 ignores them: {first_few(unknown)}")
    if new_parts is None:
        head_path = folder / HEAD_CONFIG_NAME
        head_config = read_json(head_path)
        head, block_side = read_head(head_config, str(head_path), model.hidden_size, sizes["num_bits"])
        inert["head"] = inert_head_settings(head_config)
        notes.append(time_note(head))
    else:
        head, block_side = new_parts.head(model.hidden_size), new_parts.block_side
    network = NetworkConfig(
        model=model,
        head=head,
        vision=VisionSection(weights=str(autoencoder), block_side=block_side, **sizes),
        text=TextSection(kind="huggingface", path=str(folder)),
    )
    tokenizer = load_text_tokenizer(network.text, block_side**2)
    parts = {part: PublishedTensors(folder, part) for part in (Part if new_parts is None else (Part.BACKBONE,))}
    if model.tie_embeddings and PUBLISHED_OUTPUT in parts[Part.BACKBONE].found:
        _check_tied(parts[Part.BACKBONE])
    source = Source(folder, network, tokenizer, parts, new_parts, inert, tuple(notes))
    _check(source, config["vocab_size"])
    return source


def _autoencoder_of(folder: Path, new_parts: NewParts | None) -> Path:
    """The autoencoder's weights file; raises where the folder and the options do not belong together."""
    if not (folder / MODEL_CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{folder}: has no {MODEL_CONFIG_NAME}; name a Qwen3 folder or a published BitDance folder"
        )
    is_release = (folder / HEAD_CONFIG_NAME).is_file()
    if is_release and new_parts is not None:
        raise CheckpointError(
            f"{folder}: a BitDance folder ({HEAD_CONFIG_NAME}) has its autoencoder, blocks and head; leave out "
            "--autoencoder and the other options for a Qwen3 folder"
        )
    if is_release:
        return folder / AE_WEIGHTS_NAME
    if new_parts is None or new_parts.autoencoder is None:
        raise CheckpointError(
            f"{folder}: has no {HEAD_CONFIG_NAME}; a plain Qwen3 folder also needs --autoencoder, the weights file of "
            "the vision tokenizer"
        )
    _check_options(new_parts)
    return new_parts.autoencoder


def _check_files(folder: Path) -> None:
    """Refuses what is no regular file: a folder that comes from someone else could name any file of this machine.

    The cache of Hugging Face keeps the files of `snapshots/REVISION` as links into `blobs` beside it; these are
    followed.
    """
    blobs = folder.resolve().parent.parent / "blobs"
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


def _check_tied(backbone: PublishedTensors) -> None:
    """Leaves out the output projection of a tied model, which some folders store beside the embedding it equals.

    Where the two differ, versions of transformers compute different models: 4.57 ties them, 5 does not.
    """
    if PUBLISHED_EMBEDDING in backbone.found:
        fix = (
            f"tie_word_embeddings = true in {MODEL_CONFIG_NAME} says that they are one. Set it to false if the model "
            f"was trained with both, or remove {PUBLISHED_OUTPUT}"
        )
        backbone.drop_copy(PUBLISHED_OUTPUT, PUBLISHED_EMBEDDING, fix)


def _check(source: Source, num_rows: int) -> None:
    """Compares the tokenizer, the embedding and every tensor with the network."""
    tokenizer, block_tokens, folder = source.tokenizer, source.network.vision.block_tokens, source.folder
    if source.new_parts is None:
        found, wanted = tokenizer.num_query_entries - tokenizer.num_new_entries, block_tokens - 1
        if found != wanted:
            raise CheckpointError(
                f"{folder}: its tokenizer has {max(found, 0)} query tokens, blocks of parallel_num = {block_tokens} "
                f"tokens ({HEAD_CONFIG_NAME}) need {wanted}; take both files from one release"
            )
        if num_rows != tokenizer.vocab_size:
            raise CheckpointError(
                f"{folder}: vocab_size = {num_rows} in {MODEL_CONFIG_NAME}, its tokenizer has {tokenizer.vocab_size} "
                "entries; they must be equal. Take both files from one release"
            )
    elif tokenizer.num_new_entries != len(tokenizer.added_entries):
        raise CheckpointError(
            f"{folder}: its tokenizer has resolution or query tokens already, but there is no {HEAD_CONFIG_NAME}; name "
            "a plain Qwen3 folder or a complete BitDance folder"
        )
    if num_rows < source.num_old_rows:
        raise CheckpointError(
            f"{folder}: vocab_size = {num_rows} in {MODEL_CONFIG_NAME}, its tokenizer has {source.num_old_rows} "
            "entries; the embedding must have a row for each. Take both files from one folder"
        )
    wanted_tensors = published_tensors(source.network, num_rows)
    for part, tensors in source.parts.items():
        tensors.check({tensor.name: tensor for tensor in wanted_tensors if tensor.part is part})
