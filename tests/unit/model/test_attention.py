"""The mask against an O(n^2) reading of the rules on random packs; attention against a loop over heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitdance_scale.model.attention import attend, document_mask, visible
from bitdance_scale.sequence.layout import ImageTokens, pack_samples
from bitdance_scale.sequence.pack import Pack, Sample

BLOCK_TOKENS = 4
TOKENS = ImageTokens(vision_start=1, vision_end=2, resolution=tuple(range(10, 40)), queries=(50, 51, 52))


def random_pack(seed: int) -> tuple[Pack, list[Sample]]:
    numbers = np.random.default_rng(seed)
    samples = []
    for key in range(numbers.integers(1, 4)):
        grid = (int(numbers.integers(1, 4)) * 2, int(numbers.integers(1, 4)) * 2)
        before, after = np.full(numbers.integers(1, 7), 100), np.full(numbers.integers(1, 5), 200)
        is_text_to_image = bool(numbers.random() < 0.7)
        samples.append(Sample(key, grid, before, after, 1, 1, predicts_image=is_text_to_image))
    return pack_samples(samples, TOKENS, pack_multiple=32), samples


def roles(samples: list[Sample], num_positions: int) -> list[tuple[int, str, int]]:
    """(sample, role, number in the role) of every position, read off the sequence, the padding as sample -1."""
    listed: list[tuple[int, str, int]] = []
    for number, sample in enumerate(samples):
        names = ["text"] * len(sample.before_ids) + ["vision_start", "res_h"]
        names += ["query"] * BLOCK_TOKENS + ["vision"] * (sample.grid[0] * sample.grid[1])
        names += ["vision_end"] + ["text"] * len(sample.after_ids)
        counts: dict[str, int] = {}
        for name in names:
            listed.append((number, name, counts.get(name, 0)))
            counts[name] = counts.get(name, 0) + 1
    listed += [(-1, "padding", 0)] * (num_positions - len(listed))
    return listed


def sees(i: int, j: int, listed: list[tuple[int, str, int]]) -> bool:
    """The rules in words: nothing across samples; the past; and the whole of one's own block or query group."""
    sample, role, count = listed[i]
    other_sample, other_role, other_count = listed[j]
    if sample != other_sample:
        return False
    if j <= i:
        return True
    if role == other_role == "query":
        return True
    return role == other_role == "vision" and count // BLOCK_TOKENS == other_count // BLOCK_TOKENS


@pytest.mark.parametrize("seed", range(12))
def test_mask_against_the_rules(seed):
    pack, samples = random_pack(seed)
    listed = roles(samples, pack.num_positions)
    expected = torch.tensor([[sees(i, j, listed) for j in range(len(listed))] for i in range(len(listed))])
    document_ids, block_ids = torch.from_numpy(pack.document_ids), torch.from_numpy(pack.block_ids)
    assert torch.equal(visible(document_ids, block_ids), expected)
    assert torch.equal(visible(document_ids, block_ids, num_queries=5), expected[-5:])
    assert expected.any(1).all()


@pytest.mark.parametrize("num_queries", [4, 24])
def test_attention_against_a_loop(num_queries):
    num_keys, batch, num_heads, num_groups, head_dim = 24, 2, 6, 2, 8
    numbers = torch.Generator().manual_seed(0)
    query = torch.randn(num_queries, batch, num_heads, head_dim, generator=numbers, dtype=torch.float64)
    key = torch.randn(num_keys, batch, num_groups, head_dim, generator=numbers, dtype=torch.float64)
    value = torch.randn(num_keys, batch, num_groups, head_dim, generator=numbers, dtype=torch.float64)
    mask = visible(torch.tensor([0] * 11 + [1] * 13), torch.arange(24) // 4, num_queries=num_queries)

    found = attend(query, key, value, mask)
    assert found.shape == (num_queries, batch, num_heads, head_dim)
    for row in range(batch):
        for head in range(num_heads):
            group = head // (num_heads // num_groups)
            scores = query[:, row, head] @ key[:, row, group].T / math.sqrt(head_dim)
            weights = torch.where(mask, scores.exp(), 0.0)
            expected = weights / weights.sum(-1, keepdim=True) @ value[:, row, group]
            # float64 sums of 24 terms.
            torch.testing.assert_close(found[:, row, head], expected, rtol=1e-10, atol=1e-12)


def test_a_mask_per_batch_row():
    numbers = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 6, 2, 4, 8, generator=numbers)
    masks = torch.stack([torch.ones(6, 6, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool).tril()])
    found = attend(query, key, value, masks[:, None])
    for row in range(2):
        alone = attend(query[:, row : row + 1], key[:, row : row + 1], value[:, row : row + 1], masks[row])
        # Same float32 arithmetic, possibly in another order of summation.
        torch.testing.assert_close(found[:, row : row + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_document_mask_equals_the_dense_mask(seed):
    pack, _ = random_pack(seed)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(pack.num_positions, 2, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    dense = visible(torch.from_numpy(pack.document_ids), torch.from_numpy(pack.block_ids))
    mask = document_mask(pack.document_ids, pack.block_ids, torch.device("cpu"))
    # float64 rounding of sums over at most a hundred keys.
    torch.testing.assert_close(mask.attend(query, key, value), attend(query, key, value, dense), rtol=1e-12, atol=1e-12)
    assert sum(stop - start for start, stop in mask.spans) == pack.num_positions
