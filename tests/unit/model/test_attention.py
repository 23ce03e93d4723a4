"""The mask against the rule written out for every pair, on random packs; attention against a loop over heads.

FlexAttention is compared with dense attention, uncompiled with gradients and compiled with tiles.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from bitdance_scale.config.schema import ModelSection
from bitdance_scale.model.attention import (
    DocumentMask,
    FlexMask,
    _block_mask,
    attend,
    attend_grouped,
    document_mask,
    flex_mask,
    pack_mask,
    uses_flex,
)
from bitdance_scale.sequence.layout import ImageTokens, pack_samples
from bitdance_scale.sequence.pack import Pack, Sample
from bitdance_scale.sequence.visibility import visible

BLOCK_TOKENS = 4
TOKENS = ImageTokens(vision_start=1, vision_end=2, resolution=tuple(range(10, 40)), queries=(50, 51, 52))


CPU = torch.device("cpu")


def random_pack(seed: int, pack_multiple: int = 32) -> tuple[Pack, list[Sample]]:
    numbers = np.random.default_rng(seed)
    samples = []
    for key in range(numbers.integers(1, 4)):
        grid = (int(numbers.integers(1, 4)) * 2, int(numbers.integers(1, 4)) * 2)
        before, after = np.full(numbers.integers(1, 7), 100), np.full(numbers.integers(1, 5), 200)
        is_text_to_image = bool(numbers.random() < 0.7)
        samples.append(Sample(key, grid, before, after, 1, 1, predicts_image=is_text_to_image))
    return pack_samples(samples, TOKENS, pack_multiple), samples


def roles(samples: list[Sample], num_positions: int) -> list[tuple[int, str, int]]:
    """(sample, role, number in the role) of every position, from the sequence; padding is sample -1."""
    listed: list[tuple[int, str, int]] = []
    for number, sample in enumerate(samples):
        names = ["text"] * len(sample.before_ids) + ["vision_start", "res_h"]
        num_vision = sample.grid[0] * sample.grid[1]
        if sample.predicts_image:
            names += ["query"] * BLOCK_TOKENS + ["vision"] * num_vision
        else:
            # An image that is only context has no queries, and its positions see the past alone.
            names += ["res_w"] + ["context"] * num_vision
        names += ["vision_end"] + ["text"] * len(sample.after_ids)
        counts: dict[str, int] = {}
        for name in names:
            listed.append((number, name, counts.get(name, 0)))
            counts[name] = counts.get(name, 0) + 1
    listed += [(-1, "padding", 0)] * (num_positions - len(listed))
    return listed


def sees(i: int, j: int, listed: list[tuple[int, str, int]]) -> bool:
    """A position sees nothing of other samples, the past, and all of its own block or query group."""
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
    mask = document_mask(pack.document_ids, pack.block_ids, CPU)
    # float64 rounding of sums over at most a hundred keys.
    torch.testing.assert_close(mask.attend(query, key, value), attend(query, key, value, dense), rtol=1e-12, atol=1e-12)
    assert sum(stop - start for start, stop in mask.spans) == pack.num_positions


def random_heads(pack: Pack, seed: int) -> list[torch.Tensor]:
    """Queries of 4 heads, keys and values of 2, float32 [S, 1, heads, 16]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(pack.num_positions, 1, heads, 16, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("pack_multiple", [1, 32])
@pytest.mark.parametrize("seed", range(4))
def test_flex_equals_dense_with_its_gradients(seed, pack_multiple):
    pack, _ = random_pack(seed, pack_multiple)
    heads = [tensor.requires_grad_() for tensor in random_heads(pack, seed)]
    results = []
    for make in (flex_mask, document_mask):
        mixed = make(pack.document_ids, pack.block_ids, CPU).attend(*heads)
        weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(9))
        results.append([mixed, *torch.autograd.grad((mixed * weights).sum(), heads)])
    for found, expected in zip(*results, strict=True):
        # float32 sums over at most 150 keys or queries, in another order.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("seed", "tile"), [(0, 16), (1, 32), (2, 16)])
def test_tiles_reach_the_block_mask_in_order(seed, tile):
    pack, _ = random_pack(seed, pack_multiple=1)
    mask = flex_mask(pack.document_ids, pack.block_ids, CPU, tile)
    size = pack.num_positions
    found = _block_mask(size, mask.first_key, mask.stop_key, mask.tiles, tile)
    expected = create_block_mask(found.mask_mod, None, None, size, size, device="cpu", BLOCK_SIZE=tile)
    assert found.shape == expected.shape and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for num, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        counts = getattr(expected, num)
        assert torch.equal(getattr(found, num), counts), num
        is_tile = torch.arange(counts.shape[-1]) < counts[..., None]
        assert torch.equal(getattr(found, indices)[is_tile], getattr(expected, indices)[is_tile]), indices


def test_a_pack_of_one_tile_has_a_second_empty_row():
    pack, _ = random_pack(0)
    mask = flex_mask(pack.document_ids, pack.block_ids, CPU, tile=256)
    partial_num, partial_indices, full_num, _ = mask.tiles[:4]
    assert partial_num.tolist() == [[[1, 0]]] and full_num.tolist() == [[[0, 0]]]
    assert partial_indices.shape == (1, 1, 2, 2) and partial_indices[0, 0, 0, 0] == 0


def test_compiled_flex_equals_dense_and_is_compiled_once():
    """Packs of any length and mask: one kernel for those that fill their last tile, one for those that do not."""
    tile = 32
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    num_packs = 0
    for seed in range(300):
        pack, _ = random_pack(seed, pack_multiple=1 if seed % 2 else tile)
        # The CPU kernels of torch 2.11 to 2.13 are wrong for less than one tile, with PyTorch's own mask as well.
        if pack.num_positions < tile:
            continue
        heads = random_heads(pack, seed)
        with torch.no_grad():
            found = flex_mask(pack.document_ids, pack.block_ids, CPU, tile, is_compiled=True).attend(*heads)
            expected = document_mask(pack.document_ids, pack.block_ids, CPU).attend(*heads)
        # float32 sums over at most 150 keys, in another order.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        num_packs += 1
    assert num_packs > 250
    assert counters["stats"]["unique_graphs"] - before <= 2, "attention was compiled again"


def test_compiled_flex_reads_the_tiles():
    """Without this, the comparison above would also hold for a kernel that looks at all pairs."""
    sample = Sample(0, (8, 8), np.full(10, 100), np.full(3, 200), 1, 1)
    pack = pack_samples([sample], TOKENS, pack_multiple=32)
    mask = flex_mask(pack.document_ids, pack.block_ids, CPU, 32, is_compiled=True)
    heads = random_heads(pack, 3)
    for damaged in (0, 2):
        tiles = list(mask.tiles)
        assert tiles[damaged].any(), "the pack has such tiles"
        tiles[damaged] = torch.zeros_like(tiles[damaged])
        torch._dynamo.mark_dynamic(tiles[damaged], 2)
        with torch.no_grad():
            found = dataclasses.replace(mask, tiles=tuple(tiles)).attend(*heads)
            expected = mask.attend(*heads)
        assert not torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("attention", "head_dim", "device", "expected"),
    [
        ("auto", 128, "cuda", True),
        ("auto", 8, "cuda", False),
        ("auto", 128, "cpu", False),
        ("flex", 16, "cpu", True),
        ("dense", 128, "cuda", False),
    ],
)
def test_form_of_the_mask(attention, head_dim, device, expected):
    section = ModelSection(
        num_layers=1, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_size=64, head_dim=head_dim, attention=attention
    )
    assert uses_flex(section, torch.device(device)) == expected
    pack, _ = random_pack(0)
    if device == "cpu":
        mask = pack_mask(pack.document_ids, pack.block_ids, section, CPU)
        assert isinstance(mask, FlexMask if expected else DocumentMask)


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("has_one_row", [True, False], ids=["row", "dense"])
def test_stacked_query_heads_attend_as_repeated_key_heads(num_groups, has_one_row):
    numbers = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 5, 8, generator=numbers)
    keys, values = torch.randn(2, 3, num_groups, 12, 8, generator=numbers)
    is_seen = torch.rand(3, 1, 1 if has_one_row else 5, 12, generator=numbers) < 0.6
    is_seen[..., -1] = True
    additive = torch.zeros(is_seen.shape).masked_fill(~is_seen, -torch.inf)
    found = attend_grouped(query, keys, values, additive)
    expected = attend(*(heads.permute(2, 0, 1, 3) for heads in (query, keys, values)), is_seen)
    # float32 rounding.
    torch.testing.assert_close(found.permute(2, 0, 1, 3), expected, rtol=1e-6, atol=1e-6)
    half = attend_grouped(query, keys, values, additive, scale=0.5 * 8**-0.5)
    torch.testing.assert_close(attend_grouped(query / 2, keys, values, additive), half, rtol=1e-6, atol=1e-6)
