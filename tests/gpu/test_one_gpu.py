"""The same code on one GPU over NCCL: training in both dtypes, decoding, and FlexAttention in training."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.distributed.layout_run import train
from tests.distributed.spawn import run_ranks
from tests.distributed.test_decode import _decode
from tests.distributed.toy import toy_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    "engine", [{"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 3}, {"optimizer": "megatron"}], ids=str
)
def test_training_in_bfloat16_follows_float32(engine):
    wide = toy_config(**engine)
    narrow = dataclasses.replace(wide, run=dataclasses.replace(wide.run, dtype="bfloat16"))
    expected = run_ranks(1, train, wide, 2, 3, on_gpu=True)[0]
    found = run_ranks(1, train, narrow, 2, 3, on_gpu=True)[0]
    # bfloat16 carries 8 bits, eps 8e-3; the losses average hundreds of elements.
    for losses, reference in zip(found.losses, expected.losses, strict=True):
        assert losses == pytest.approx(reference, rel=3e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_adds_to_a_float32_sum(dtype):
    """The kernel that stands for Apex's, against float64."""
    from bitdance_scale.parallel.weight_gradients import AccumulatedProduct

    numbers = torch.Generator("cuda").manual_seed(3)
    entered, arrived = (torch.randn(640, size, generator=numbers, device="cuda").to(dtype) for size in (96, 160))
    total = torch.randn(160, 96, generator=numbers, device="cuda")
    expected = total.double() + arrived.double().t() @ entered.double()
    AccumulatedProduct.wgrad_gemm_accum_fp32(entered, arrived, total)
    # Products of bfloat16 are exact in float32, and so are the sums to 24 bits; TF32 keeps 10 bits of factors.
    bound = 1e-5 if dtype is torch.bfloat16 else 1e-2
    assert (total.double() - expected).norm() < bound * expected.norm()
    # A sum that is rounded to bfloat16 on the way would be off by 2^-9.
    assert not torch.equal(total, total.bfloat16().float())


def test_decoding_with_and_without_memory_agrees():
    config = toy_config()
    plain = dataclasses.replace(config, sample=dataclasses.replace(config.sample, use_cache=False))
    cached_bits, cached_hidden, _ = run_ranks(1, _decode, config, on_gpu=True)[0]
    bits, hidden, _ = run_ranks(1, _decode, plain, on_gpu=True)[0]
    # float32 products in other shapes round differently; bits near a tie may flip.
    assert (cached_bits == bits).float().mean() > 0.99
    torch.testing.assert_close(cached_hidden, hidden, rtol=1e-2, atol=1e-2)


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
    # Tensor cores may round float32 factors to TF32, 10 bits.
    for losses, reference in zip(found.losses, expected.losses, strict=True):
        assert losses == pytest.approx(reference, rel=1e-2)
