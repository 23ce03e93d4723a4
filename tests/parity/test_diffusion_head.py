"""The head against its formulas, written out on a dict of tensors under the published names."""

from __future__ import annotations

import math

import pytest
import torch

from bitdance_scale.config.schema import HeadSection
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears

SECTION = HeadSection(width=24, num_blocks=4, num_adaln=2, head_dim=8, mlp_ratio=1.5)
COND_SIZE, NUM_BITS, BLOCK_TOKENS, NUM_BLOCKS = 20, 6, 4, 3

# Angles of the time features reach 1000, where float32 steps are 6e-5; that error enters values and gradients, which
# are of order 1. Everything else is sums of at most 72 terms, rounded in different orders.
FLOAT32 = {"rtol": 1e-4, "atol": 2e-4}


def affine(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6) * weight + bias


def silu(x):
    return x / (1 + torch.exp(-x))


def attention(weights, name, x, head_dim):
    width = x.shape[-1]
    qkv = affine(weights, f"{name}.wqkv", x)
    heads = []
    for start in range(0, width, head_dim):
        query, key, value = (qkv[..., part * width + start : part * width + start + head_dim] for part in range(3))
        weight = torch.exp(query @ key.transpose(1, 2) / math.sqrt(head_dim))
        heads.append(weight / weight.sum(-1, keepdim=True) @ value)
    return affine(weights, f"{name}.wo", torch.cat(heads, -1))


def head_by_formula(weights, section, noisy, t, cond):
    """Each line is one sentence of the model's description; t per block, the condition per token."""
    angles = torch.stack([1000 * t * 10000 ** (-i / 128) for i in range(128)], -1)
    time = affine(weights, "net.time_embed.mlp.0", torch.cat([torch.cos(angles), torch.sin(angles)], -1))
    time = affine(weights, "net.time_embed.mlp.2", silu(time))
    y = silu(time[:, None, :] + affine(weights, "net.cond_embed", cond))
    x = affine(weights, "net.input_proj", noisy)
    width, hidden = section.width, int(section.width * section.mlp_ratio)
    for index in range(section.num_blocks):
        adaln = index * section.num_adaln // section.num_blocks
        vectors = affine(weights, f"net.ada_ln_blocks.{adaln}", y)
        scale1, shift1, gate1, scale2, shift2, gate2 = (vectors[..., i * width : (i + 1) * width] for i in range(6))
        name = f"net.res_blocks.{index}"
        h = layer_norm(x, weights[f"{name}.norm1.weight"], weights[f"{name}.norm1.bias"]) * (1 + scale1) + shift1
        x = x + gate1 * attention(weights, f"{name}.attn", h, section.head_dim)
        h = layer_norm(x, weights[f"{name}.norm2.weight"], weights[f"{name}.norm2.bias"]) * (1 + scale2) + shift2
        h = affine(weights, f"{name}.w1", h)
        x = x + gate2 * affine(weights, f"{name}.w2", silu(h[..., :hidden]) * h[..., hidden:])
    vectors = affine(weights, "net.final_layer.ada_ln_modulation", y)
    x = layer_norm(x) * (1 + vectors[..., :width]) + vectors[..., width:]
    return 2 / (1 + torch.exp(-affine(weights, "net.final_layer.linear", x))) - 1


@pytest.fixture(scope="module")
def head() -> DiffusionHead:
    """A head without zero weights, so that every path affects the output."""
    torch.manual_seed(0)
    head = DiffusionHead(SECTION, COND_SIZE, NUM_BITS, BLOCK_TOKENS, PlainLinears())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5))
    return head


def example(num_blocks: int = NUM_BLOCKS):
    numbers = torch.Generator().manual_seed(1)
    noisy = torch.randn(num_blocks, BLOCK_TOKENS, NUM_BITS, generator=numbers)
    cond = torch.randn(num_blocks, BLOCK_TOKENS, COND_SIZE, generator=numbers)
    return noisy, torch.rand(num_blocks, generator=numbers), cond


def test_output_and_gradients(head):
    noisy, t, cond = example()
    noisy.requires_grad_(True)
    cond.requires_grad_(True)
    parameters = dict(head.named_parameters())
    inputs = [noisy, cond, *parameters.values()]
    weighting = torch.randn(NUM_BLOCKS, BLOCK_TOKENS, NUM_BITS, generator=torch.Generator().manual_seed(2))

    found = head(noisy, t, cond)
    expected = head_by_formula(parameters, SECTION, noisy, t, cond)
    torch.testing.assert_close(found, expected, **FLOAT32)
    found_gradients = torch.autograd.grad((found * weighting).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weighting).sum(), inputs)
    for name, one, other in zip(["noisy", "cond", *parameters], found_gradients, expected_gradients, strict=True):
        assert other.abs().max() > 1e-2, f"{name}: the comparison would be empty"
        torch.testing.assert_close(one, other, **FLOAT32, msg=lambda text, name=name: f"{name}: {text}")


def test_blocks_do_not_see_each_other(head):
    noisy, t, cond = example()
    together = head(noisy, t, cond)
    for index in range(NUM_BLOCKS):
        alone = head(noisy[index : index + 1], t[index : index + 1], cond[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, **FLOAT32)


def test_tokens_of_a_block_see_each_other(head):
    noisy, t, cond = example(1)
    changed = noisy.clone()
    changed[0, -1] += 1
    difference = (head(changed, t, cond) - head(noisy, t, cond)).abs().amax(-1)[0]
    assert (difference > 1e-4).all()


def test_bfloat16_head_answers_in_float32(head):
    small = DiffusionHead(SECTION, COND_SIZE, NUM_BITS, BLOCK_TOKENS, PlainLinears()).bfloat16()
    small.load_state_dict(head.state_dict())
    noisy, t, cond = example()
    found = small(noisy, t, cond.bfloat16())
    assert found.dtype is torch.float32
    # bfloat16 keeps 8 bits: 4 blocks of rounding by 2^-9 relative on logits of order 1, and |d tanh| <= 1.
    torch.testing.assert_close(found, head(noisy, t, cond), rtol=0, atol=0.05)
