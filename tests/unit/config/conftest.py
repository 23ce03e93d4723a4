"""A complete, legal configuration that the tests of this folder break in one place each."""

from __future__ import annotations

from pathlib import Path

import pytest

LEGAL_TOML = """
[run]
name = "toy"
steps = 100

[model]
preset = "demo"

[vision]
weights = "ae.safetensors"
num_bits = 16
channels = 32
channel_mult = [1, 1, 2]

[text]
kind = "sentencepiece"
path = "tokenizer.model"
max_caption_tokens = 32

[data]
shards = ["data/{00000..00003}.tar"]
global_batch = 20
max_pack_tokens = 2048

[[data.resolutions]]
side_px = 32
share = 2
buckets_px = [[32, 32], [16, 64]]

[[data.resolutions]]
side_px = 64
share = 7
buckets_px = [[64, 64], [48, 80]]

[[data.resolutions]]
side_px = 128
share = 1
buckets_px = [[128, 128]]

[sample]
size_px = [64, 64]
prompts = ['a red "circle"', "two\\nlines"]
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "legal.toml"
    path.write_text(LEGAL_TOML)
    return path
