"""Small folders of the kinds that the conversions read: a plain Qwen3 and a published BitDance, with random weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bitdance_scale.checkpoint.integrity import write_manifest
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.config.published_backbone import MODEL_CONFIG_NAME
from bitdance_scale.config.published_head import HEAD_CONFIG_NAME, published_head
from bitdance_scale.config.schema import HeadSection, VisionSection
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.model.projector import Projector
from bitdance_scale.sequence.tokens import MARKUP_TOKENS
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.weights import save_weights
from tests.class_reference import ClassNetwork

# Qwen's splitting of text into words, digits, punctuation and line breaks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HIDDEN_SIZE = 64
HEAD = HeadSection(width=128, num_blocks=2, num_adaln=1)
AUTOENCODER = {"num_bits": 16, "channels": 32, "channel_mult": (1, 1, 2), "num_res_blocks": 1}
CLASS_AUTOENCODER = {"num_bits": 8, "channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1}
# Heads of 64 channels, as nothing in a published file says how many there are.
CLASS_SIZES = {
    "num_layers": 2,
    "width": 128,
    "num_heads": 2,
    "ffn": 256,
    "head_width": 64,
    "head_blocks": 2,
    "num_adaln": 1,
    "num_classes": 3,
    "num_class_tokens": 4,
    "bits": 8,
    "grid": 4,
}
# Rows of a plain model's embedding beyond the tokenizer's entries, as Qwen3 has them.
SPARE_ROWS = 11


def qwen_like() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of Qwen's construction with 300 entries and its markup behind them."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    backend.train_from_iterator(["user", "assistant", "a red circle and two blue squares"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    names = ["<|endoftext|>", *MARKUP_TOKENS]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    # As in Qwen3, added tokens that are not marked special. With them no two ranks share the rows evenly.
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    return tokenizer


def save_as_qwen3(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves a tokenizer in the form in which Qwen3's own folders have it, which no version of the library writes."""
    tokenizer.save_pretrained(folder)
    added = read_json(folder / "tokenizer.json")["added_tokens"]
    model = read_json(folder / "tokenizer.json")["model"]
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in added
        },
        "additional_special_tokens": [entry["content"] for entry in added if entry["special"]],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def write_plain_qwen3(
    folder: Path, *, is_tied: bool = False, dtype: torch.dtype = torch.bfloat16, spare_rows: int = SPARE_ROWS
) -> Path:
    """A Qwen3 folder: weights, configuration and tokenizer; returns `folder`."""
    tokenizer = qwen_like()
    _backbone(len(tokenizer) + spare_rows, is_tied, seed=1).to(dtype).save_pretrained(folder)
    save_as_qwen3(tokenizer, folder)
    return folder


def write_published(
    folder: Path,
    *,
    block_side: int = 4,
    is_tied: bool = False,
    backbone_dtype: torch.dtype = torch.bfloat16,
    head_dtype: torch.dtype = torch.float32,
    head: HeadSection = HEAD,
    autoencoder: Mapping[str, Any] = AUTOENCODER,
) -> Path:
    """A published BitDance folder; returns it.

    All weights are random, so that no tensor equals another and images differ by prompt and by block.
    """
    vision = VisionSection(weights="", block_side=block_side, **autoencoder)
    tokenizer = qwen_like()
    names = [f"<|res_{n}|>" for n in range(1, 257)] + [f"<|query_{n}|>" for n in range(1, block_side**2)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    _backbone(len(tokenizer), is_tied, seed=2).to(backbone_dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    network = DiffusionHead(head, HIDDEN_SIZE, vision.num_bits, vision.block_tokens, PlainLinears())
    projector = Projector(vision.num_bits, HIDDEN_SIZE, PlainLinears())
    for name, module in (("vision_head", network), ("projector", projector)):
        tensors = {
            key: _random_like(key, value).to(head_dtype).contiguous() for key, value in module.state_dict().items()
        }
        save_file(tensors, folder / f"{name}.safetensors")
    content = published_head(dataclasses.replace(head, diff_batch_mul=4), HIDDEN_SIZE, vision, {})
    (folder / HEAD_CONFIG_NAME).write_text(json.dumps(content, indent=2))
    save_weights(folder, Autoencoder(**autoencoder).state_dict(), published_config(**autoencoder))
    return folder


def scale_backbone(folder: Path) -> Path:
    """Changes every weight of the backbone of a published folder, as training does; returns it."""
    tensors = {name: tensor * 1.25 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_autoencoder(folder: Path, autoencoder: Mapping[str, Any] = AUTOENCODER) -> Path:
    """An autoencoder by itself; returns the weights file."""
    torch.manual_seed(4)
    save_weights(folder, Autoencoder(**autoencoder).state_dict(), published_config(**autoencoder))
    return folder / "ae.safetensors"


def class_file_content(
    *, block_side: int = 2, seed: int = 5, autoencoder: Mapping[str, Any] | None = CLASS_AUTOENCODER, **sizes: int
) -> dict[str, torch.Tensor]:
    """What one dictionary of a published class-conditional file holds, from the plain reference; weights are random."""
    torch.manual_seed(seed)
    network = ClassNetwork(p=block_side, **(CLASS_SIZES | sizes))
    tensors = {name: _random_like(name, tensor) for name, tensor in network.state_dict().items()}
    tensors["query_token"] = tensors["query_token"][None]
    if autoencoder is not None:
        torch.manual_seed(4)
        tensors |= {f"vae.{name}": tensor for name, tensor in Autoencoder(**autoencoder).state_dict().items()}
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def edit_config(folder: Path, name: str = MODEL_CONFIG_NAME, **changes: object) -> None:
    """Changes keys of a JSON file of a folder; None removes one."""
    content = read_json(folder / name) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def as_a_run(imported: Path, copy: Path, steps: int) -> Path:
    """An import made to look like the checkpoint at step 0 of a run of so many steps."""
    run = shutil.copytree(imported, copy)
    folder = find_checkpoint(run)
    config = (folder / "config.toml").read_text()
    assert config.count("[run]\n") == 1
    section = f'[run]\nname = "sft_small"\nstage = "sft"\nsteps = {steps}\n'
    (folder / "config.toml").write_text(config.replace("[run]\n", section))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    return run


def _backbone(vocab_size: int, is_tied: bool, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            tie_word_embeddings=is_tied,
            rope_theta=1e6,
            initializer_range=0.1,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def _random_like(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Weights of a trained scale: none is zero, norms are about 1."""
    if tensor.dim() == 1:
        return torch.randn_like(tensor) * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return torch.randn_like(tensor) * tensor.shape[1] ** -0.5
