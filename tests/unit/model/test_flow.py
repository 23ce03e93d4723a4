"""The loss: any split of a batch gives the same loss and gradient, because it divides sums by global counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from bitdance_scale.config.schema import HeadSection, LossSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.flow import combine_losses, draw_time, flow_loss

SECTION = LossSection(vision_weight=1.0, text_weight=0.01)


def test_uneven_parts_add_up_to_the_mean_over_the_batch():
    numbers = torch.Generator().manual_seed(0)
    pred = torch.randn(6, 4, 8, generator=numbers, requires_grad=True)
    bits, noisy = torch.randn(2, 6, 4, 8, generator=numbers)
    t = torch.rand(6, generator=numbers) * 0.9
    logits = torch.randn(9, 11, generator=numbers, requires_grad=True)
    targets = torch.randint(0, 11, (9,), generator=numbers)

    error = (pred - bits) / (1 - t)[:, None, None]
    whole = error.square().mean() + 0.01 * -logits.log_softmax(-1)[range(9), targets].mean()
    expected = torch.autograd.grad(whole, [pred, logits])

    # The second part holds neither kind of target, the third only vision.
    parts = [(slice(0, 1), slice(0, 9)), (slice(1, 1), slice(9, 9)), (slice(1, 6), slice(9, 9))]
    total, counts = torch.zeros(()), [0, 0]
    for blocks, tokens in parts:
        vision_sum, num_vision = flow_loss(pred[blocks], bits[blocks], noisy[blocks], t[blocks])
        text_sum = cross_entropy(logits[tokens], targets[tokens], reduction="sum")
        total = total + combine_losses(vision_sum, text_sum, 24, 9, SECTION)
        counts = [counts[0] + num_vision, counts[1] + len(targets[tokens])]
    assert counts == [24, 9]
    # float32 sums of 192 terms in another order.
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    for found, gradient in zip(torch.autograd.grad(total, [pred, logits]), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_has_zero_loss_and_gradient():
    pred = torch.zeros(0, 4, 8, requires_grad=True)
    logits = torch.zeros(0, 11, requires_grad=True)
    vision_sum, _ = flow_loss(pred, torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), torch.zeros(0))
    text_sum = cross_entropy(logits, torch.zeros(0, dtype=torch.int64), reduction="sum")
    loss = combine_losses(vision_sum, text_sum, 0, 0, SECTION)
    assert loss.item() == 0.0
    loss.backward()
    assert pred.grad is not None and logits.grad is not None


def test_loss_is_float32_under_bfloat16():
    vision_sum, _ = flow_loss(*torch.ones(3, 1, 4, 8, dtype=torch.bfloat16), torch.zeros(1))
    assert vision_sum.dtype is torch.float32


def test_unknown_time_schedule():
    with pytest.raises(ConfigError, match="head.time_schedule = 'cosine': must be 'logit_normal' or 'uniform'"):
        draw_time(torch.zeros(1), HeadSection(width=128, time_schedule="cosine"))
