"""Losses on held-out images: the same under every layout, and equal to the training loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitdance_scale.config.data_schema import Resolution
from tests.distributed.layout_run import make_engine
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import lopsided_packs, toy_config

# Two resolutions of the toy's grids: 2 x 2, 2 x 4 and 4 x 2 cells, and 4 x 4 and 2 x 6.
RESOLUTIONS = (
    Resolution(side_px=4, share=1, buckets_px=((4, 4),)),
    Resolution(side_px=8, share=1, buckets_px=((8, 8),)),
)
LAYOUTS = [
    (2, {}),
    (2, {"zero_stage": 3}),
    (2, {"tensor": 2, "sequence_parallel": True}),
    (2, {"pipeline": 2, "virtual_stages": 2}),
    (3, {"pipeline": 3, "virtual_stages": 1}),
]
NUM_PACKS = 6


def _config(parallel):
    config = toy_config(**parallel)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, resolutions=RESOLUTIONS))


def _evaluate(rank: int, parallel: dict[str, object], trains: bool):
    """(evaluation, what it is computed from on the last stage)."""
    config = _config(parallel)
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.step import train_step
    from bitdance_scale.train.evaluation import Evaluator
    from tests.distributed.layout_run import step_inputs

    num_micro = NUM_PACKS // topology.data_size
    packs = lopsided_packs(topology.data_rank, topology.data_size, num_micro, config)
    evaluator = Evaluator(config, packs, topology)
    before = evaluator.evaluate(engine, 3)
    if trains:
        batch = step_inputs(config, topology, num_micro, 0, is_lopsided=True)
        train_step(engine, batch, config.loss, 1e-3, topology)
        return before, evaluator.evaluate(engine, 4)
    return before, before


def _numbers(evaluation) -> torch.Tensor:
    by_class = evaluation.vision_by_resolution.values()
    return torch.tensor([evaluation.vision, evaluation.text, *by_class, *evaluation.vision_by_time])


@pytest.fixture(scope="module")
def one_process():
    return run_ranks(1, _evaluate, {}, True)[0]


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_every_layout_gives_the_same_losses(one_process, world_size, parallel):
    for found in run_ranks(world_size, _evaluate, parallel, True):
        for evaluation, wanted in zip(found, one_process, strict=True):
            assert evaluation.step == wanted.step
            # float32 sums in another order; after a step of AdamW a little more.
            torch.testing.assert_close(_numbers(evaluation), _numbers(wanted), rtol=1e-5, atol=1e-6)


def _by_hand(rank: int):
    """Means of the loss sums that training would report for the same inputs, and the evaluation."""
    config = _config({})
    engine, topology = make_engine(config)
    from bitdance_scale.model.flow import draw_time
    from bitdance_scale.model.inputs import make_inputs
    from bitdance_scale.sequence.noise import Purpose, pack_noise
    from bitdance_scale.train.evaluation import Evaluator

    uniform = dataclasses.replace(config, head=dataclasses.replace(config.head, time_schedule="uniform"))
    packs = lopsided_packs(0, 1, NUM_PACKS, config)
    vision, text, blocks = torch.zeros(2), torch.zeros(2), 0
    times = []
    with torch.no_grad():
        for pack in packs:
            noise = pack_noise(pack, config.vision.num_bits, config.evaluate.seed, 0, Purpose.EVALUATE)
            inputs = make_inputs(pack, noise, uniform, topology.device)
            sums = engine.stages[0](inputs)
            vision += torch.tensor([float(sums[0]), inputs.num_vision_targets])
            text += torch.tensor([float(sums[1]), inputs.num_text_targets])
            times.append(draw_time(torch.from_numpy(noise.time_normal), uniform.head))
            blocks += len(noise.time_normal)
    times = torch.cat(times)
    return vision, text, times, Evaluator(config, packs, topology).evaluate(engine, 0)


def test_the_means_are_those_of_training():
    vision, text, times, found = run_ranks(1, _by_hand)[0]
    assert found.vision == pytest.approx(float(vision[0] / vision[1]), rel=1e-5)
    assert found.text == pytest.approx(float(text[0] / text[1]), rel=1e-5)
    # The parts, weighted by their blocks, add up to the whole.
    counts = torch.histc(times, bins=5, min=0, max=1)
    parts = torch.tensor(found.vision_by_time)
    assert float((parts.nan_to_num() * counts).sum() / counts.sum()) == pytest.approx(found.vision, rel=1e-5)


def test_nothing_of_the_model_changes(one_process):
    first, second = run_ranks(1, _evaluate, {}, False)[0]
    assert _numbers(first).tolist() == _numbers(second).tolist() == _numbers(one_process[0]).tolist()
