"""FlexAttention's kernels on CUDA against dense attention: outputs, gradients, and one compilation for all packs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from bitdance_scale.model.attention import PackMask, document_mask, flex_mask
from bitdance_scale.sequence.layout import ImageTokens, pack_samples
from bitdance_scale.sequence.pack import Pack, Sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64


def _pack(seed: int, side: int) -> Pack:
    """A few samples of random size, some image-to-text; padded to whole tiles, or every other one left ragged."""
    numbers = np.random.default_rng(seed)
    tokens = ImageTokens(1, 2, resolution=tuple(range(10, 110)), queries=tuple(range(200, 199 + side**2)))
    samples = []
    for key in range(int(numbers.integers(1, 5))):
        grid = tuple(int(size) * side for size in numbers.integers(1, 32 // side, size=2))
        before = np.full(int(numbers.integers(1, 90)), 5)
        samples.append(Sample(key, grid, before, np.full(3, 6), 1, 1, predicts_image=bool(numbers.integers(2))))
    return pack_samples(samples, tokens, pack_multiple=1 if seed % 2 else 128)


def _run(mask: PackMask, heads: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values, float32."""
    leaves = [head.to(dtype).requires_grad_() for head in heads]
    output = mask.attend(*leaves)
    output.backward(heads[0].to(dtype))
    return [output.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def _masks_and_heads(seed: int, side: int) -> tuple[PackMask, PackMask, list[torch.Tensor]]:
    pack, device = _pack(seed, side), torch.device("cuda")
    draw = torch.Generator().manual_seed(seed)
    sizes = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    heads = [torch.randn(pack.num_positions, 1, size, HEAD_DIM, generator=draw).to(device) for size in sizes]
    make = (pack.document_ids, pack.block_ids, device)
    return flex_mask(*make), document_mask(*make), heads


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Against dense float32 attention. FlexAttention may multiply float32 in TF32 (10 bits); bfloat16 carries 8 bits.
    [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("side", [4, 8])
def test_flex_equals_dense(side, dtype, bound):
    for seed in range(6):
        flex, dense, heads = _masks_and_heads(seed, side)
        for found, expected in zip(_run(flex, heads, dtype), _run(dense, heads, torch.float32), strict=True):
            assert float((found - expected).norm() / expected.norm()) < bound


def test_packs_of_any_length_share_one_compilation():
    before = counters["stats"]["unique_graphs"]
    lengths = set()
    for seed in range(40):
        flex, _, heads = _masks_and_heads(seed, 4)
        lengths.add(len(heads[0]))
        _run(flex, heads, torch.bfloat16)
    assert len(lengths) > 10
    # One graph for packs that fill their last tile, one for ragged ones.
    assert counters["stats"]["unique_graphs"] - before <= 2
