"""The memory of keys and values: written in place, seen as if they had been put one after the other."""

from __future__ import annotations

import torch

from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.schema import ModelSection
from bitdance_scale.model.key_values import CAPACITY_MULTIPLE, KeyValueMemory, key_value_bytes

SECTION = ModelSection(num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96)
CPU = torch.device("cpu")


def memory_for(num_sequences: int, num_positions: int) -> KeyValueMemory:
    section = SECTION
    return KeyValueMemory(
        section.num_layers,
        num_sequences,
        num_positions,
        section.num_kv_heads,
        section.head_dim,
        torch.float32,
        CPU,
    )


def test_reads_one_after_the_other_are_views_of_one_allocation():
    memory = memory_for(2, 60)
    pieces: list[list[torch.Tensor]] = [[] for _ in range(3)]
    places: list[set[int]] = [set() for _ in range(3)]
    start = 0
    for number, size in enumerate((40, 8, 8, 4)):
        stop = start + size
        memory.place(torch.arange(start, stop), stop)
        for layer in range(3):
            numbers = torch.Generator().manual_seed(10 * number + layer)
            keys, values = torch.randn(2, 2, 2, size, 16, generator=numbers)
            pieces[layer].append(torch.stack([keys, values]))
            seen = memory.update(layer, keys, values)
            for found, expected in zip(seen, torch.cat(pieces[layer], dim=3), strict=True):
                assert torch.equal(found, expected)
                # A view of slots of every sequence and head: nothing was copied.
                assert found.stride(1) == CAPACITY_MULTIPLE * 16
                places[layer].add(found.data_ptr())
        start = stop
    # Per layer one place for its keys and one for its values, from the first read to the last; none is shared.
    assert [len(found) for found in places] == [2, 2, 2] and len(set.union(*places)) == 6


def test_batches_of_similar_length_have_one_shape():
    memory = memory_for(4, 257)
    assert memory.shape == (4, 512)
    assert memory.fits(4, 300) and memory.fits(4, 512)
    assert not memory.fits(4, 256) and not memory.fits(4, 513) and not memory.fits(2, 300)


def test_its_bytes_are_known_before_it_is_made():
    assert memory_for(4, 257).num_bytes == key_value_bytes(SECTION, 4, 257, torch.float32)


def test_the_14b_model_at_1024_px():
    """The number in docs/generation.md: eight images under guidance, 64 x 64 cells in blocks of 64."""
    section = ModelSection(**PRESETS["qwen3-14b"]["model"])
    # A prompt of 128 tokens; vision start, two sizes, 63 queries and all blocks but the last.
    num_positions = 128 + 3 + 63 + 64 * 64 - 64
    num_bytes = key_value_bytes(section, 16, num_positions, torch.bfloat16)
    assert num_bytes == 2 * 40 * 8 * 128 * 2 * 16 * 4352 == 11_408_506_880
