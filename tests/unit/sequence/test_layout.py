"""The layout of a pack against the sequence of BitDance read token by token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bitdance_scale.config.schema import ClassesSection
from bitdance_scale.model.projector import flip_bits
from bitdance_scale.sequence.condition import ClassCondition
from bitdance_scale.sequence.layout import ClassTokens, ImageTokens, block_raster_cells, num_positions, pack_samples
from bitdance_scale.sequence.noise import Purpose, pack_noise
from bitdance_scale.sequence.pack import Sample

TOKENS = ImageTokens(vision_start=1, vision_end=2, resolution=tuple(range(10, 40)), queries=(50, 51, 52))


def text_to_image(key: int, grid: tuple[int, int], num_text: int) -> Sample:
    before = np.arange(100, 100 + num_text, dtype=np.int64)
    return Sample(key, grid, before, np.array([7], dtype=np.int64), 1, 1)


def image_to_text(key: int, grid: tuple[int, int]) -> Sample:
    after = np.array([7, 200, 201, 7], dtype=np.int64)
    return Sample(key, grid, np.array([100], dtype=np.int64), after, 1, 1, predicts_image=False)


def test_sequence_of_a_text_to_image_sample():
    pack = pack_samples([text_to_image(5, (2, 4), num_text=3)], TOKENS, pack_multiple=1)
    assert pack.token_ids.tolist() == [100, 101, 102, 1, 11, 13, 50, 51, 52, *[0] * 8, 2, 7]
    assert pack.num_positions == num_positions(text_to_image(5, (2, 4), 3), TOKENS)
    assert pack.vision_positions.tolist() == list(range(9, 17))
    # `<|res_w|>` and the queries predict the first block, which predicts the second.
    assert pack.predict_positions.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert pack.predict_tokens.tolist() == list(range(8))
    assert pack.text_positions.tolist() == [0, 1]
    assert pack.text_targets.tolist() == [101, 102]


def test_blocks_see_themselves_unless_the_mask_is_causal():
    sample = text_to_image(5, (2, 4), num_text=3)
    block = pack_samples([sample], TOKENS, pack_multiple=1)
    causal = pack_samples([sample], dataclasses.replace(TOKENS, is_causal=True), pack_multiple=1)
    assert block.block_ids.tolist() == [0, 1, 2, 3, 4, *[5] * 4, *[6] * 4, *[7] * 4, 8, 9]
    assert causal.block_ids.tolist() == list(range(19))
    for name in ("token_ids", "position_ids", "predict_positions", "predict_tokens", "text_positions"):
        np.testing.assert_array_equal(getattr(causal, name), getattr(block, name))


def test_raster_order_goes_row_by_row_and_keeps_the_rest():
    sample = text_to_image(5, (2, 4), num_text=3)
    block = pack_samples([sample], TOKENS, pack_multiple=1)
    raster = pack_samples([sample], dataclasses.replace(TOKENS, is_raster=True), pack_multiple=1)
    assert raster.vision_cells.tolist() == [[row, column] for row in range(2) for column in range(4)]
    assert block.vision_cells.tolist()[:4] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for name in ("token_ids", "position_ids", "block_ids", "predict_positions", "predict_tokens"):
        np.testing.assert_array_equal(getattr(raster, name), getattr(block, name))
    with pytest.raises(ValueError, match="divisible by the block side 2"):
        pack_samples([text_to_image(5, (1, 4), num_text=3)], dataclasses.replace(TOKENS, is_raster=True), 1)


def test_image_to_text_predicts_its_caption_only():
    pack = pack_samples([image_to_text(5, (2, 2))], TOKENS, pack_multiple=1)
    assert len(pack.predict_positions) == 0
    assert pack.text_targets.tolist() == [200, 201, 7]
    assert pack.token_ids[pack.text_positions].tolist() == [7, 200, 201]


def test_a_context_image_has_no_queries_and_is_read_causally():
    sample = image_to_text(5, (2, 4))
    pack = pack_samples([sample], TOKENS, pack_multiple=1)
    assert pack.token_ids.tolist() == [100, 1, 11, 13, *[0] * 8, 2, 7, 200, 201, 7]
    assert pack.block_ids.tolist() == pack.position_ids.tolist() == list(range(17))
    assert pack.vision_positions.tolist() == list(range(4, 12))
    assert pack.num_positions == num_positions(sample, TOKENS)


def test_a_context_image_with_queries_is_laid_as_one_to_draw():
    tokens = dataclasses.replace(TOKENS, has_context_queries=True)
    context = image_to_text(5, (2, 4))
    pack = pack_samples([context], tokens, pack_multiple=1)
    drawn = pack_samples([dataclasses.replace(context, predicts_image=True)], tokens, pack_multiple=1)
    assert pack.token_ids.tolist() == [100, 1, 11, 13, 50, 51, 52, *[0] * 8, 2, 7, 200, 201, 7]
    for name in ("token_ids", "position_ids", "block_ids", "vision_positions", "vision_cells", "text_positions"):
        np.testing.assert_array_equal(getattr(pack, name), getattr(drawn, name))
    assert pack.num_positions == num_positions(context, tokens)
    # An image to draw is the same with either.
    sample = text_to_image(5, (2, 4), num_text=3)
    for name in ("token_ids", "block_ids"):
        np.testing.assert_array_equal(
            getattr(pack_samples([sample], tokens, 1), name), getattr(pack_samples([sample], TOKENS, 1), name)
        )


def test_second_sample_is_the_first_shifted():
    alone = pack_samples([text_to_image(5, (2, 4), num_text=3)], TOKENS, pack_multiple=1)
    both = pack_samples([image_to_text(4, (4, 2)), text_to_image(5, (2, 4), num_text=3)], TOKENS, pack_multiple=32)
    start, num_vision = num_positions(image_to_text(4, (4, 2)), TOKENS), 8
    stop = start + alone.num_positions
    for name in ("token_ids", "position_ids", "block_ids"):
        np.testing.assert_array_equal(getattr(both, name)[start:stop], getattr(alone, name))
    np.testing.assert_array_equal(both.predict_positions, alone.predict_positions + start)
    np.testing.assert_array_equal(both.predict_tokens, alone.predict_tokens + num_vision)
    assert both.document_ids.tolist() == [0] * start + [1] * alone.num_positions + [-1] * both.num_padding
    assert both.num_positions % 32 == 0


def test_block_raster_order_written_out():
    cells = [
        (block_row * 2 + row, block_column * 2 + column)
        for block_row in range(2)
        for block_column in range(3)
        for row in range(2)
        for column in range(2)
    ]
    assert [tuple(cell) for cell in block_raster_cells((4, 6), 2)] == cells


def test_indivisible_grid_is_refused():
    with pytest.raises(ValueError, match="divisible by the block side 2"):
        block_raster_cells((3, 4), 2)


def test_resolution_without_token_is_refused():
    with pytest.raises(ValueError, match=r"within 1\.\.30"):
        pack_samples([text_to_image(0, (2, 32), 2)], TOKENS, 1)


def test_noise_depends_on_sample_and_step_only():
    first, second = text_to_image(5, (2, 4), 3), text_to_image(6, (2, 2), 2)
    together = pack_noise(pack_samples([first, image_to_text(9, (2, 2)), second], TOKENS, 32), 16, seed=1, step=7)
    alone = pack_noise(pack_samples([second], TOKENS, 1), 16, seed=1, step=7)
    np.testing.assert_array_equal(together.noise[8:], alone.noise)
    np.testing.assert_array_equal(together.time_normal[2:], alone.time_normal)
    np.testing.assert_array_equal(together.flip_draw[12:], alone.flip_draw)
    pack = pack_samples([second], TOKENS, 1)
    others = [
        pack_noise(pack, 16, seed=1, step=8),
        pack_noise(pack, 16, seed=2, step=7),
        pack_noise(pack, 16, seed=1, step=7, purpose=Purpose.EVALUATE),
    ]
    assert all(not np.array_equal(other.noise, alone.noise) for other in others)


def test_largest_legal_seed_draws():
    pack = pack_samples([text_to_image(2**63 - 1, (2, 2), 2)], TOKENS, 1)
    assert pack_noise(pack, 16, seed=2**31 - 1, step=2**31 - 1).noise.shape == (4, 16)


def test_only_images_to_draw_are_flipped():
    first, second, context = text_to_image(5, (2, 4), 3), text_to_image(6, (2, 2), 2), image_to_text(9, (2, 2))
    pack = pack_samples([first, context, second], TOKENS, 32)
    noise = pack_noise(pack, 16, seed=1, step=7)
    bits = torch.ones(16, 16)
    flipped = flip_bits(bits, torch.from_numpy(noise.flip_level), torch.from_numpy(noise.flip_draw), flip_max=1.0) < 0
    # Each of 128 and 64 elements flips with a probability of one half.
    assert 0.3 < flipped[:8].float().mean() < 0.7 and 0.3 < flipped[12:].float().mean() < 0.7
    assert not flipped[8:12].any()
    # The images to draw have the numbers that they have without the context beside them.
    without = pack_noise(pack_samples([first, second], TOKENS, 32), 16, seed=1, step=7)
    for name in ("flip_level", "flip_draw"):
        kept = np.delete(getattr(noise, name), range(8, 12), axis=0)
        np.testing.assert_array_equal(kept, getattr(without, name))
    np.testing.assert_array_equal(noise.noise, without.noise)
    np.testing.assert_array_equal(noise.time_normal, without.time_normal)


def test_more_draws_begin_with_the_first():
    pack = pack_samples(
        [text_to_image(7, (2, 4), 3), image_to_text(9, (2, 2)), text_to_image(8, (4, 4), 5)], TOKENS, 32
    )
    one, three = pack_noise(pack, 16, seed=1, step=7), pack_noise(pack, 16, seed=1, step=7, num_draws=3)
    for name in ("flip_level", "flip_draw"):
        np.testing.assert_array_equal(getattr(three, name), getattr(one, name))
    times, ends = three.time_normal.reshape(3, 6), three.noise.reshape(3, 24, 16)
    np.testing.assert_array_equal(times[0], one.time_normal)
    np.testing.assert_array_equal(ends[0], one.noise)
    assert len(np.unique(times)) == times.size and len(np.unique(ends)) == ends.size


def test_sequence_of_a_class_conditional_sample():
    tokens = ClassTokens(num_classes=10, num_tokens=3, block_tokens=4)
    condition = ClassCondition(ClassesSection(num_classes=10, num_tokens=3, grid=(2, 4)), 4, is_causal=False)
    samples = [condition.drawing_sample(5, "2", (2, 4), False), condition.drawing_sample(6, "2", (2, 4), True)]
    pack = pack_samples(samples, tokens, pack_multiple=4)
    # Tokens of class 2, then of "no class"; queries; the first of two blocks. The last block is not read.
    assert pack.token_ids.tolist() == [6, 7, 8, 33, 34, 35, *[0] * 4, 30, 31, 32, 33, 34, 35, *[0] * 4]
    assert pack.num_positions == 2 * num_positions(samples[0], tokens) == 2 * (3 + 3 + 8 - 4)
    assert pack.predict_positions.tolist() == [*range(2, 10), *range(12, 20)]
    assert pack.predict_tokens.tolist() == list(range(16)) and len(pack.vision_cells) == 16
    assert pack.vision_positions.tolist() == [*range(6, 10), *range(16, 20)]
    assert pack.vision_inputs.tolist() == [*range(4), *range(8, 12)]
    assert pack.block_ids.tolist() == 2 * [0, 1, *[2] * 4, *[3] * 4]
    assert len(pack.text_targets) == 0 and tokens.vocab_size == 36
