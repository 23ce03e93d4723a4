"""A published folder as the parts of a pipeline: backbone, projector, head, autoencoder and tokenizer.

Only safetensors and JSON are read, no code of the folder is run. Names and shapes of all tensors are checked against the
configuration files before anything large is loaded: transformers itself fills what it misses with random numbers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.utils import logging

from bitdance_scale.config.published import HEAD_CONFIG_NAME, MODEL_CONFIG_NAME, read_head, read_model
from bitdance_scale.config.schema import HeadSection, ModelSection, TextSection, VisionSection
from bitdance_scale.errors import CheckpointError, ConfigError, DataError
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.model.projector import Projector
from bitdance_scale.sequence.tokens import TextTokenizer, load_text_tokenizer
from bitdance_scale.vision.autoencoder import published_sizes
from bitdance_scale.vision.tokenizer import VisionTokenizer
from bitdance_scale.vision.weights import CONFIG_NAME as VISION_CONFIG_NAME
from bitdance_scale.vision.weights import WEIGHTS_NAME as VISION_WEIGHTS_NAME

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
HEAD_WEIGHTS_NAME = "vision_head.safetensors"
PROJECTOR_WEIGHTS_NAME = "projector.safetensors"
# Prompts are used as they are given, unlike the captions of training.
MAX_PROMPT_TOKENS = 1 << 20
_REMEDY = "download or export the folder again"


@dataclass(frozen=True)
class PublishedModel:
    """The parts of a published model on one device.

    Attributes:
        backbone: Qwen3 without its output projection.
        projector: bits to the backbone.
        head: the diffusion head.
        vision: the autoencoder; its section also tells bits, downsampling and block side.
        text: the tokenizer with its added tokens.
    """

    backbone: Qwen3Model
    projector: Projector
    head: DiffusionHead
    vision: VisionTokenizer
    text: TextTokenizer


@dataclass(frozen=True)
class PublishedSections:
    """What the configuration files of a published folder say.

    Attributes:
        model: the backbone.
        vocab_size: rows of its embedding.
        head: the diffusion head.
        vision: the autoencoder and the block side.
    """

    model: ModelSection
    vocab_size: int
    head: HeadSection
    vision: VisionSection


def read_sections(folder: str | Path) -> PublishedSections:
    """Reads the configuration files of a published folder.

    Raises:
        CheckpointError: there is no such folder, or a file is missing, damaged or does not fit the others.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name a published BitDance folder, the one with config.json")
    config = _read_json(folder / MODEL_CONFIG_NAME)
    model = read_model(config, str(folder / MODEL_CONFIG_NAME))
    sizes = _vision_sizes(folder / VISION_CONFIG_NAME)
    head_config, where = _read_json(folder / HEAD_CONFIG_NAME), str(folder / HEAD_CONFIG_NAME)
    head, block_side = read_head(head_config, where, model.hidden_size, sizes["num_bits"])
    vision = VisionSection(weights=str(folder / VISION_WEIGHTS_NAME), block_side=block_side, **sizes)
    return PublishedSections(model, config["vocab_size"], head, vision)


def load_published(folder: str | Path, dtype: torch.dtype, device: torch.device) -> PublishedModel:
    """Loads a published folder.

    Args:
        folder: as `tools/convert_to_hf.py` or the release writes it.
        dtype: of weights and activations of all parts.
        device: where they are put.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others; names file and tensor.
        ConfigError: the folder holds no usable tokenizer.
    """
    folder, sections = Path(folder), read_sections(folder)
    block_tokens = sections.vision.block_tokens
    text = load_text_tokenizer(TextSection(path=str(folder), max_caption_tokens=MAX_PROMPT_TOKENS), block_tokens)
    if text.vocab_size > sections.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer with its resolution and {block_tokens - 1} query tokens has {text.vocab_size} "
            f"entries, {MODEL_CONFIG_NAME} gives the embedding {sections.vocab_size} rows; {_REMEDY}"
        )
    with torch.device("meta"):
        num_bits, hidden_size = sections.vision.num_bits, sections.model.hidden_size
        head = DiffusionHead(sections.head, hidden_size, num_bits, block_tokens, PlainLinears())
        projector = Projector(num_bits, hidden_size, PlainLinears())
    backbone = _load_backbone(folder, sections.model, sections.vocab_size, dtype, device)
    _fill(head, folder / HEAD_WEIGHTS_NAME, dtype, device)
    _fill(projector, folder / PROJECTOR_WEIGHTS_NAME, dtype, device)
    try:
        vision = VisionTokenizer(sections.vision, device, dtype=dtype)
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return PublishedModel(backbone, projector, head, vision, text)


def qwen3_config(section: ModelSection, vocab_size: int) -> Qwen3Config:
    """The configuration of a backbone for transformers.

    Made from checked sizes, not from `config.json`: transformers takes a default where it does not know a key's name.
    """
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=section.hidden_size,
        intermediate_size=section.ffn_size,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_heads,
        num_key_value_heads=section.num_kv_heads,
        head_dim=section.head_dim,
        rms_norm_eps=section.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_base},
        tie_word_embeddings=section.tie_embeddings,
        initializer_range=section.init_std,
    )


def _load_backbone(
    folder: Path, section: ModelSection, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Qwen3Model:
    config = qwen3_config(section, vocab_size)
    with torch.device("meta"):
        wanted = Qwen3ForCausalLM(config).state_dict()
    if section.tie_embeddings:
        # Stored once, as the embedding.
        del wanted["lm_head.weight"]
    _check_shards(folder, wanted, "lm_head.weight" if section.tie_embeddings else None)
    with _errors_only():
        backbone = Qwen3Model.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
    # Only the device: a dtype here would also round the rotary frequencies.
    return backbone.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Keeps transformers from reporting the output projection, which is in the files and not wanted."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_shards(folder: Path, wanted: Mapping[str, torch.Tensor], allowed: str | None) -> None:
    """Holds the backbone's files to their index and to the configuration."""
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        found = _shapes(folder / WEIGHTS_NAME)
        _compare(folder / WEIGHTS_NAME, found, wanted, allowed)
        return
    files = _read_json(index_path).get("weight_map")
    if not isinstance(files, dict):
        raise CheckpointError(f"{index_path}: has no weight_map, which names the file of every tensor; {_REMEDY}")
    found = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index_path}: names the file {name!r}, which is not in the folder itself")
        shapes = _shapes(folder / name)
        absent = [tensor for tensor, file in files.items() if file == name and tensor not in shapes]
        if absent:
            raise CheckpointError(f"{folder / name}: {absent[0]} is missing, {INDEX_NAME} places it here; {_REMEDY}")
        found |= {tensor: shape for tensor, shape in shapes.items() if files.get(tensor) == name}
    _compare(index_path, found, wanted, allowed)


def _fill(module: nn.Module, path: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a module on the meta device the tensors of a file, and freezes it."""
    found = _shapes(path)
    _compare(path, found, module.state_dict(), None)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(device=device, dtype=dtype) for name in found}
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; only safetensors are read; {_REMEDY}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); {_REMEDY}") from error


def _compare(
    path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, torch.Tensor], allowed: str | None
) -> None:
    """Raises CheckpointError where names or shapes differ; the tensor `allowed` may be there or not."""
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is not part of the model" for name in found if name not in wanted and name != allowed]
    faults += [
        f"{name} has shape {found[name]}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    if faults:
        rest = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"{path}: {'; '.join(faults[:3])}{rest}. The weights must fit the configuration files beside them; {_REMEDY}"
        )


def _vision_sizes(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    try:
        return published_sizes(config)
    except DataError as error:
        raise CheckpointError(f"{path.parent}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {_REMEDY}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a JSON object; {_REMEDY}")
    return content
