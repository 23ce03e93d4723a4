"""A published folder as the parts of a pipeline, of one that draws or of one that describes.

Only safetensors and JSON are read; no code of the folder is run. Names and shapes of all tensors are compared with the
configuration files before anything large is loaded: transformers itself would fill missing weights with random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.utils import logging

from bitdance_scale.config.published_backbone import read_context, read_model
from bitdance_scale.config.published_head import read_head
from bitdance_scale.config.schema import HeadSection, ModelSection, NetworkConfig, TextSection, VisionSection
from bitdance_scale.errors import CheckpointError
from bitdance_scale.generate.merged_adapters import check_adapters, merge
from bitdance_scale.generate.published_layout import (
    PublishedLayout,
    check_entries,
    check_projector,
    layout_of,
    read_part,
)
from bitdance_scale.model.adapter_changes import AdapterChanges
from bitdance_scale.model.adapter_source import WeightedAdapter
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.model.projector import Projector
from bitdance_scale.model.published_names import Part
from bitdance_scale.sequence.tokens import TextTokenizer, load_text_tokenizer
from bitdance_scale.vision.autoencoder import published_sizes
from bitdance_scale.vision.tokenizer import VisionTokenizer, make_autoencoder
from bitdance_scale.weight_files import TensorSpec, check_tensors, read_folder_headers, read_json, read_single_header

MAX_PROMPT_TOKENS = 1 << 20
"""Prompts are not cut, unlike the captions of training."""
_FIX = "download or export the folder again"
_OUTPUT_NAME = "lm_head.weight"


@dataclass(frozen=True)
class PublishedModel:
    """The parts of a published model on one device.

    Attributes:
        backbone: Qwen3 without its output projection.
        projector: from bits to hidden states of the backbone.
        head: the diffusion head.
        vision: the autoencoder; its section also has the number of bits, the downsampling and the block side.
        text: the tokenizer with its added tokens.
    """

    backbone: Qwen3Model
    projector: Projector
    head: DiffusionHead
    vision: VisionTokenizer
    text: TextTokenizer


@dataclass(frozen=True)
class PublishedDescriber:
    """The parts of a published model that describe images, on one device.

    Attributes:
        backbone: Qwen3 without its output projection.
        output: [V, D], its output projection; of tied weights the embedding itself.
        projector: from bits to hidden states of the backbone.
        vision: the autoencoder in float32, as in training.
        text: the tokenizer with its added tokens.
    """

    backbone: Qwen3Model
    output: torch.Tensor
    projector: Projector
    vision: VisionTokenizer
    text: TextTokenizer


@dataclass(frozen=True)
class PublishedSections:
    """What the configuration files of a published folder say.

    Attributes:
        model: the backbone.
        vocab_size: rows of its embedding.
        head: the diffusion head.
        vision: the autoencoder, the block side, and how context images are laid.
        layout: where its files are.
    """

    model: ModelSection
    vocab_size: int
    head: HeadSection
    vision: VisionSection
    layout: PublishedLayout


def read_sections(folder: str | Path) -> PublishedSections:
    """Reads the configuration files of a published folder.

    Raises:
        CheckpointError: there is no such folder, or a file is missing, damaged or does not fit the others.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name a published BitDance folder, the one with config.json")
    layout = layout_of(folder)
    config_path, vision_path = folder / layout.model_config, folder / layout.autoencoder_config
    config = read_json(config_path)
    model = read_model(config, str(config_path))
    sizes = published_sizes(read_part(vision_path, layout), str(vision_path))
    head_path = folder / layout.head_config
    head, block_side = read_head(read_part(head_path, layout), str(head_path), model.hidden_size, sizes["num_bits"])
    check_projector(folder, layout, sizes["num_bits"], model.hidden_size)
    vision = VisionSection(
        weights=str(folder / layout.autoencoder), block_side=block_side, context=read_context(config), **sizes
    )
    return PublishedSections(model, config["vocab_size"], head, vision, layout)


def load_published(
    folder: str | Path, dtype: torch.dtype, device: torch.device, adapters: Sequence[WeightedAdapter] = ()
) -> PublishedModel:
    """Loads a published folder.

    Args:
        folder: as `bitdance export` or the release writes it.
        dtype: of weights and activations of all parts.
        device: where they are put.
        adapters: what is merged into the weights, in float32; from `parse_adapters`.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others, or adapters do not fit; names file and
            tensor.
        ConfigError: the folder holds no usable tokenizer.
    """
    opened = _open(Path(folder))
    changes = opened.changes(adapters)
    backbone = _load_backbone(opened, dtype, device)
    _fill(opened.head, opened.folder / opened.layout.head, dtype, device)
    _fill(opened.projector, opened.folder / opened.layout.projector, dtype, device)
    parts = {Part.BACKBONE: backbone, Part.HEAD: opened.head, Part.PROJECTOR: opened.projector}
    merge(changes, opened.folder, opened.layout, parts)
    vision = VisionTokenizer(opened.vision, device, dtype=dtype)
    return PublishedModel(backbone, opened.projector, opened.head, vision, opened.text)


def load_describer(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    context: str | None = None,
    adapters: Sequence[WeightedAdapter] = (),
) -> PublishedDescriber:
    """Loads what describes images of a published folder: all but its diffusion head.

    Args:
        folder: as `bitdance export` or the release writes it.
        dtype: of weights and activations of backbone and projector.
        device: where they are put.
        context: how context images are laid (`vision.context`); None: as the folder says.
        adapters: as for `load_published`.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others, or adapters do not fit; names file and
            tensor.
        ConfigError: the folder holds no usable tokenizer.
    """
    opened = _open(Path(folder), context)
    changes = opened.changes(adapters)
    backbone = _load_backbone(opened, dtype, device)
    if opened.config.tie_word_embeddings:
        output = backbone.embed_tokens.weight
    else:
        output = _read_tensor(opened.folder / opened.layout.backbone, _OUTPUT_NAME).to(device=device, dtype=dtype)
    _fill(opened.projector, opened.folder / opened.layout.projector, dtype, device)
    merge(changes, opened.folder, opened.layout, {Part.BACKBONE: backbone, Part.PROJECTOR: opened.projector})
    return PublishedDescriber(backbone, output, opened.projector, VisionTokenizer(opened.vision, device), opened.text)


@dataclass(frozen=True)
class _Opened:
    """A folder of which all headers fit its configuration; head and projector are on the meta device."""

    folder: Path
    layout: PublishedLayout
    config: Qwen3Config
    vision: VisionSection
    head: DiffusionHead
    projector: Projector
    text: TextTokenizer
    network: NetworkConfig

    def changes(self, adapters: Sequence[WeightedAdapter]) -> AdapterChanges | None:
        """What adapters change, checked against the weights; None: nothing."""
        if not adapters:
            return None
        changes = AdapterChanges(adapters, self.network, self.text.vocab_size, str(self.folder))
        check_adapters(adapters, self.folder, self.layout, self.network, self.text.vocab_size)
        return changes


def _open(folder: Path, context: str | None = None) -> _Opened:
    """Compares all files with each other, by names, shapes and entries, before anything large is loaded."""
    sections = read_sections(folder)
    vision = dataclasses.replace(sections.vision, context=context or sections.vision.context)
    layout = sections.layout
    section = TextSection(path=str(folder / layout.tokenizer), max_caption_tokens=MAX_PROMPT_TOKENS)
    text = load_text_tokenizer(section, vision.block_tokens, has_context_queries=vision.context == "queries")
    check_entries(folder, layout, text, sections.vocab_size)
    with torch.device("meta"):
        num_bits, hidden_size = vision.num_bits, sections.model.hidden_size
        head = DiffusionHead(sections.head, hidden_size, num_bits, vision.block_tokens, PlainLinears())
        projector = Projector(num_bits, hidden_size, PlainLinears())
        autoencoder = make_autoencoder(vision)
    config = qwen3_config(sections.model, sections.vocab_size)
    _check_backbone(folder / layout.backbone, config)
    for name, module in ((layout.head, head), (layout.projector, projector), (layout.autoencoder, autoencoder)):
        _check(folder / name, read_single_header(folder / name), module.state_dict())
    network = NetworkConfig(model=sections.model, head=sections.head, vision=vision, text=section)
    return _Opened(folder, layout, config, vision, head, projector, text, network)


def qwen3_config(section: ModelSection, vocab_size: int) -> Qwen3Config:
    """The configuration of a backbone for transformers.

    It is made from checked sizes and not from `config.json`, because transformers takes a default where it does not
    know the name of a key.
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


def _check_backbone(path: Path, config: Qwen3Config) -> None:
    with torch.device("meta"):
        wanted = Qwen3ForCausalLM(config).state_dict()
    headers = read_folder_headers(path.parent, path.name)
    found = {name: spec for header in headers.values() for name, spec in header.items()}
    if config.tie_word_embeddings and _OUTPUT_NAME not in found:
        # A tied projection is stored once, as the embedding; some versions of the library store it twice.
        del wanted[_OUTPUT_NAME]
    _check(path, found, wanted)


def _check(path: Path, found: Mapping[str, TensorSpec], wanted: Mapping[str, torch.Tensor]) -> None:
    fix = f"The weights must fit the configuration files beside them; {_FIX}"
    check_tensors(path, found, {name: tensor.shape for name, tensor in wanted.items()}, fix)


def _load_backbone(opened: _Opened, dtype: torch.dtype, device: torch.device) -> Qwen3Model:
    with _errors_only():
        backbone = Qwen3Model.from_pretrained(
            (opened.folder / opened.layout.backbone).parent,
            config=opened.config,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
        )
    # Only the device: a dtype here would also round the rotary frequencies.
    return backbone.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Keeps transformers from reporting that the output projection is in the files and not in the model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read_tensor(path: Path, name: str) -> torch.Tensor:
    """A tensor of the backbone's checked files."""
    headers = read_folder_headers(path.parent, path.name)
    path = next(path for path, header in headers.items() if name in header)
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _fill(module: nn.Module, path: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a module on the meta device the tensors of a checked file, and freezes it."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(device=device, dtype=dtype) for name in module.state_dict()}
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)
