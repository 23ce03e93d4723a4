"""The same code on one GPU over NCCL: training in both dtypes, decoding, and the kernels of FlexAttention."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from bitdance_scale.model.attention import document_mask, flex_mask
from tests.distributed.layout_run import train
from tests.distributed.spawn import run_ranks
from tests.distributed.test_decode import _decode
from tests.distributed.toy import toy_config
from tests.unit.sequence.test_visibility import random_pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_training_in_bfloat16_follows_float32(zero_stage):
    wide = toy_config(zero_stage=zero_stage)
    narrow = dataclasses.replace(wide, run=dataclasses.replace(wide.run, dtype="bfloat16"))
    expected = run_ranks(1, train, wide, 2, 3, on_gpu=True)[0]
    found = run_ranks(1, train, narrow, 2, 3, on_gpu=True)[0]
    # bfloat16 carries 8 bits, eps 8e-3; the losses average hundreds of elements.
    for losses, reference in zip(found.losses, expected.losses, strict=True):
        assert losses == pytest.approx(reference, rel=3e-2)


def test_decoding_with_and_without_memory_agrees():
    config = toy_config()
    plain = dataclasses.replace(config, sample=dataclasses.replace(config.sample, use_cache=False))
    cached_bits, cached_hidden, _ = run_ranks(1, _decode, config, on_gpu=True)[0]
    bits, hidden, _ = run_ranks(1, _decode, plain, on_gpu=True)[0]
    # float32 products in other shapes round differently; bits near a tie may turn.
    assert (cached_bits == bits).float().mean() > 0.99
    torch.testing.assert_close(cached_hidden, hidden, rtol=1e-2, atol=1e-2)


def test_flex_kernels_equal_dense_attention():
    """Forward and backward on packs of many lengths, ragged ones among them, with at most two compilations."""
    device, numbers = torch.device("cuda"), np.random.default_rng(0)
    generator = torch.Generator(device).manual_seed(0)
    before = counters["stats"]["unique_graphs"]
    for index in range(40):
        pack = random_pack(numbers, side=(4, 8)[index % 2], tile=128)
        heads = [
            torch.randn(pack.num_positions, 1, count, 64, device=device, generator=generator).requires_grad_()
            for count in (5, 1, 1)
        ]
        results = []
        for make in (flex_mask, document_mask):
            mixed = make(pack.document_ids, pack.block_ids, device).attend(*heads)
            results.append([mixed, *torch.autograd.grad(mixed.square().sum(), heads)])
        for found, expected in zip(*results, strict=True):
            # Tensor cores may round float32 factors to TF32, 10 bits, in either; sums have up to a thousand terms.
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert counters["stats"]["unique_graphs"] - before <= 2


def test_flex_training_follows_dense():
    found, expected = (
        run_ranks(
            1,
            train,
            dataclasses.replace(toy_config(), model=dataclasses.replace(toy_config().model, attention=attention)),
            2,
            3,
            on_gpu=True,
        )[0]
        for attention in ("flex", "dense")
    )
    # As above, float32 with factors that may be rounded to TF32.
    for losses, reference in zip(found.losses, expected.losses, strict=True):
        assert losses == pytest.approx(reference, rel=1e-2)
