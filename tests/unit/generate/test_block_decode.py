"""The masks of a batch's reads against the rule written out for every pair."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bitdance_scale.generate.block_decode import SeenKeys, lay_out
from bitdance_scale.sequence.layout import ImageTokens

BLOCK = 4
TOKENS = ImageTokens(vision_start=1, vision_end=2, resolution=tuple(range(10, 40)), queries=(50, 51, 52))
# Of different length, so that two sequences are padded.
PROMPTS = [np.full(length, 100) for length in (5, 1, 3)]
GRID = (4, 6)
CAPACITY = 64


@pytest.mark.parametrize("is_causal", [False, True], ids=["block", "causal"])
def test_masks_follow_the_rule(is_causal):
    layout = lay_out(PROMPTS, GRID, dataclasses.replace(TOKENS, is_causal=is_causal), torch.device("cpu"))
    padding, length = [5 - len(prompt) for prompt in PROMPTS], layout.prefix_length
    # The queries of the first block, then every block, are one group.
    first_group = length - BLOCK

    def sees(sequence: int, query: int, key: int) -> bool:
        if (query < padding[sequence]) != (key < padding[sequence]):
            return False
        if is_causal or min(query, key) < first_group:
            return key <= query
        return (key - first_group) // BLOCK <= (query - first_group) // BLOCK

    seen = SeenKeys(layout, CAPACITY, torch.float32)
    reads = [(0, length), *((start, start + BLOCK) for start in range(length, layout.num_read, BLOCK))]
    assert len(reads) == 1 + 24 // BLOCK - 1
    places = set()
    for start, stop in reads:
        mask = seen.block(start, stop, stop) if start else seen.prefix()
        expected = [[[sees(b, i, j) for j in range(stop)] for i in range(start, stop)] for b in range(len(PROMPTS))]
        found = mask.expand(-1, -1, stop - start, -1)[:, 0]
        assert torch.equal(found == 0, torch.tensor(expected)) and (found[found != 0] == -torch.inf).all()
        assert torch.equal(layout.mask(start, stop)[:, 0], torch.tensor(expected))
        places.add(mask.data_ptr())
    # The masks of blocks are views of one row.
    assert is_causal or len(places) == 2


def test_slots_that_are_not_written_are_not_seen():
    layout = lay_out(PROMPTS, GRID, TOKENS, torch.device("cpu"))
    seen, start = SeenKeys(layout, CAPACITY, torch.bfloat16), layout.prefix_length
    mask = seen.block(start, start + BLOCK, 48)
    assert mask.shape == (3, 1, 1, 48) and mask.dtype is torch.bfloat16
    assert (mask[..., start + BLOCK :] == -torch.inf).all() and (mask[..., start : start + BLOCK] == 0).all()
