"""Histograms of the head's predictions: what is counted where, and the picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_scale.observe.prediction_histogram import (
    NUM_BINS,
    NUM_COUNTS,
    PredictionHistogram,
    bin_edges,
    count_predictions,
    draw_histograms,
)


def _histogram(values: torch.Tensor, time: float = 0.5) -> PredictionHistogram:
    return PredictionHistogram.of_counts(time, count_predictions(values).numpy())


def test_bits_are_in_the_two_bins_around_them():
    values = torch.tensor([[-1.0, 1.0, 1.0], [1.0, 0.99, -0.98]])
    found = _histogram(values)
    middles = (bin_edges()[:-1] + bin_edges()[1:]) / 2
    full = np.flatnonzero(found.counts)
    np.testing.assert_allclose(middles[full], [-1, 1], atol=1e-12)
    assert found.counts[full].tolist() == [2, 4]
    assert (found.total, found.num_outside, found.near_share) == (6, 0, 1.0)


def test_what_is_near_a_bit_and_what_is_outside():
    values = torch.tensor([0.0, 0.74, 0.75, -1.25, 1.26, 1.5, -1.5, 1.51, 7.0, -9.0, float("nan"), float("inf")])
    found = _histogram(values)
    assert (found.total, found.num_outside, found.num_near) == (12, 5, 2)
    # The ends of the range belong to it.
    assert (found.counts[0], found.counts[-1], found.counts[NUM_BINS // 2]) == (1, 1, 1)
    record = found.to_dict()
    assert (record["time"], record["predictions"]) == (0.5, 12)
    assert record["near_share"] == pytest.approx(2 / 12) and record["outside_share"] == pytest.approx(5 / 12)
    assert sum(record["shares"]) == pytest.approx(7 / 12)


def test_bins_are_those_of_numpy():
    values = torch.from_numpy(np.random.default_rng(0).normal(0, 0.7, (40, 4, 8)).astype(np.float32))
    counts = count_predictions(values)
    assert counts.shape == (NUM_COUNTS,) and counts.dtype == torch.int64
    wanted, _ = np.histogram(values.numpy(), bin_edges())
    np.testing.assert_array_equal(counts[:NUM_BINS].numpy(), wanted)
    assert _histogram(torch.zeros(0)).near_share == 0.0


def test_the_picture_has_a_panel_per_time():
    bits = torch.tensor([-1.0, 1.0])
    sizes = {}
    for number in (1, 2, 6):
        picture = Image.open(
            io.BytesIO(draw_histograms([_histogram(bits, time / 10) for time in range(number)], "toy"))
        )
        sizes[number] = picture.size
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
        # Bars, drawn in blue.
        assert ((pixels[..., 2] - pixels[..., 0]) > 80).sum() > 100 * number
    assert sizes[2][0] == 2 * sizes[1][0] and sizes[2][1] == sizes[1][1] < sizes[6][1]
