"""The 14B configuration, built as a real stage on the meta device."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

# Qwen3's tokenizer with 256 resolution and 15 query tokens.
VOCAB_SIZE = 151940


def _count(rank: int, config) -> dict[str, int]:
    from bitdance_scale.parallel.topology import make_topology, start_process_group

    start_process_group(timeout_s=60)
    topology = make_topology(config.parallel)
    from bitdance_scale.parallel.pipeline_stages import Stage

    with torch.device("meta"):
        stage = Stage(config, VOCAB_SIZE, topology, 0)
    counts: dict[str, int] = {}
    for name, parameter in stage.named_parameters():
        assert parameter.is_meta
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def test_parameters_of_the_14b_preset():
    from bitdance_scale.config.load import load_config

    demo = load_config("demo", ["model.preset=qwen3-14b"])
    # The demo file names the tokenizer's sizes; the published one has 32 bits.
    config = dataclasses.replace(toy_config(), model=demo.model, head=demo.head)
    vision = dataclasses.replace(config.vision, num_bits=32, block_side=4)
    counts = run_ranks(1, _count, dataclasses.replace(config, vision=vision))[0]
    backbone = counts["decoder"] + counts["embedding"] + counts["output"]
    # Three decimals of a billion, as published.
    assert backbone / 1e9 == pytest.approx(14.768, abs=5e-4)
    assert counts["head"] / 1e9 == pytest.approx(1.758, abs=5e-4)
