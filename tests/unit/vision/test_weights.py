"""The digest of the vision tokenizer: of its values and sizes, however they are stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.tokenizer import vision_digest
from bitdance_scale.vision.weights import weights_digest

SIZES = {"num_bits": 16, "channels": 32, "channel_mult": (1, 1, 2), "num_res_blocks": 1}


def section(path: Path) -> VisionSection:
    return VisionSection(weights=str(path), **SIZES)


def saved(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def test_the_same_weights_have_one_digest_in_any_file(tmp_path):
    # Values that bfloat16 holds exactly, so that both files have the same.
    state = {name: tensor.bfloat16() for name, tensor in Autoencoder(**SIZES).state_dict().items()}
    whole = {name: tensor.float() for name, tensor in state.items()}
    one = saved(tmp_path / "one.safetensors", whole)
    two = saved(tmp_path / "two.safetensors", dict(reversed(whole.items())), {"made": "elsewhere"})
    short = saved(tmp_path / "short.safetensors", state)
    assert one.read_bytes() != two.read_bytes()
    assert vision_digest(section(one)) == vision_digest(section(two)) == vision_digest(section(short))


def test_one_changed_value_or_name_changes_the_digest(tmp_path):
    path = saved(tmp_path / "ae.safetensors", Autoencoder(**SIZES).state_dict())
    digest, tensors = vision_digest(section(path)), load_file(path)
    name = min(tensors)
    changed = tensors | {name: tensors[name].clone()}
    changed[name].view(-1)[0] += 1
    assert vision_digest(section(saved(tmp_path / "changed.safetensors", changed))) != digest
    negated = {name: -tensor for name, tensor in tensors.items()}
    assert vision_digest(section(saved(tmp_path / "negated.safetensors", negated))) != digest
    renamed = {f"x.{name}": tensor for name, tensor in tensors.items()}
    assert weights_digest(saved(tmp_path / "renamed.safetensors", renamed)) != weights_digest(path)


def test_the_flips_and_the_block_side_do_not_change_the_bits(tmp_path):
    path = saved(tmp_path / "ae.safetensors", Autoencoder(**SIZES).state_dict())
    changed = dataclasses.replace(section(path), flip_max=0.5, block_side=8)
    assert vision_digest(changed) == vision_digest(section(path))
