"""Predictions on held-out images at fixed flow times: of a known head, and the same under every layout."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from bitdance_scale.observe.prediction_histogram import PredictionHistogram
from tests.distributed.class_toy import class_config, class_packs
from tests.distributed.layout_run import make_engine
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import lopsided_packs, toy_config

TIMES = (0.0, 0.5, 1.0)
NUM_PACKS = 4

# The counts themselves are tested in `tests/unit/observe/test_prediction_histogram.py`.
pytestmark = pytest.mark.large


def _collect(rank: int, config) -> tuple[np.ndarray, np.ndarray]:
    """The counts of the network, and of a head that predicts the noisy bits that it is given."""
    engine, topology = make_engine(config)
    from bitdance_scale.train.evaluation import Evaluator
    from bitdance_scale.train.prediction_histogram import collect_counts

    deal = lopsided_packs if config.model.parts.has_text else class_packs
    packs = deal(topology.data_rank, topology.data_size, NUM_PACKS // topology.data_size, config)
    batch = Evaluator(config, packs, topology).inputs()
    counts = collect_counts(engine, batch, TIMES, topology)
    if engine.stages[-1].is_last:
        engine.stages[-1].head.forward = lambda noisy, _time, _condition: noisy
    return counts, collect_counts(engine, batch, TIMES, topology)


@functools.cache
def _one_process(make_config) -> tuple[np.ndarray, np.ndarray]:
    return run_ranks(1, _collect, make_config())[0]


def test_a_head_that_returns_what_it_is_given():
    _, counts = _one_process(toy_config)
    noise, middle, bits = (PredictionHistogram.of_counts(*pair) for pair in zip(TIMES, counts, strict=True))
    # Every predicted bit once per time; one pack is of images that are only described.
    packs = lopsided_packs(0, 1, NUM_PACKS, toy_config())
    assert [len(pack.predict_positions) for pack in packs].count(0) == 1
    assert noise.total == middle.total == bits.total == 8 * sum(len(pack.predict_positions) for pack in packs)
    # At t = 0 it sees N(0, 1), at t = 1 clean bits, which are in the two bins around -1 and 1.
    assert noise.near_share == pytest.approx(_normal(1.25) - _normal(0.75), abs=0.04)
    assert noise.num_outside / noise.total == pytest.approx(1 - _normal(1.5), abs=0.04)
    assert (bits.near_share, bits.num_outside, np.count_nonzero(bits.counts)) == (1.0, 0, 2)


def _normal(limit: float) -> float:
    """Share of N(0, 1) within -limit and limit."""
    return math.erf(limit / math.sqrt(2))


@pytest.mark.parametrize(
    ("make_config", "parallel"),
    [(toy_config, {"tensor": 2, "sequence_parallel": True}), (class_config, {"pipeline": 2}), (class_config, {})],
    ids=["tensor", "pipeline", "data"],
)
def test_every_layout_counts_the_same(make_config, parallel):
    for found in run_ranks(2, _collect, make_config(**parallel)):
        for counts, wanted in zip(found, _one_process(make_config), strict=True):
            # A prediction at the border of a bin may round into its neighbour.
            assert np.abs(counts - wanted).sum() <= 1e-3 * wanted.sum()
