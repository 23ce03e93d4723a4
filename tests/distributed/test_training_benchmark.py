"""Benchmarks of a run: the same scores and pictures under every layout, and training goes on as if there were none."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from bitdance_scale.config.benchmark_schema import RunBenchmark
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage
from tests.distributed.layout_run import make_engine, step_inputs
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import TOKENS, toy_config
from tests.unit.evaluation.geneval.small_networks import save_clip

# Seven images in batches of 3: an odd number of batches, the last of which is short.
PROMPTS = [Prompt(f"p{number}", f"text {number}", "ab"[number % 2], 1 + number % 2, {}) for number in range(5)]
SECTION = RunBenchmark(
    benchmark="demo-scenes", metrics=("classes", "clip-score"), batch_size=3, size_px=(4, 8), num_steps=2
)
LAYOUTS = [
    (2, {"zero_stage": 3}),
    (2, {"tensor": 2, "sequence_parallel": True}),
    (2, {"pipeline": 2}),
    (4, {"tensor": 2, "zero_stage": 3}),
]


class Words:
    """In the condition's place: ids of their own for every text, of uneven length."""

    image_tokens = TOKENS

    def prompt_ids(self, caption: str) -> np.ndarray:
        draw = np.random.default_rng(zlib.crc32(caption.encode()))
        return draw.integers(0, 61, size=int(draw.integers(1, 6)))

    def unconditional_ids(self) -> np.ndarray:
        return np.array([9])


class Bits:
    """In the tokenizer's place: a picture is its bits."""

    def __init__(self, fails: bool = False) -> None:
        self._fails = fails

    def decode(self, bits: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if self._fails:
            raise RuntimeError("out of memory")
        assert bits.shape[0] == grid[0] * grid[1]
        return ((bits.cpu().reshape(*grid, -1)[..., :3] > 0) * 255).to(torch.uint8)


class Counting:
    """Scores by the share of bits; its network says where it is."""

    def __init__(self, fails: bool = False) -> None:
        self.networks, self.devices, self._fails = (torch.nn.Linear(1, 1),), [], fails

    def __call__(self, images: Sequence[DrawnImage]) -> list[ImageScore]:
        self.devices.append(next(self.networks[0].parameters()).device.type)
        if self._fails:
            raise ValueError("cannot score")
        assert len(images) <= SECTION.batch_size
        found = [(image, float(image.pixels.mean() / 255)) for image in images]
        return [
            ImageScore(image.prompt.id, image.k, image.prompt.category, value, {"overall": (value, 1.0)})
            for image, value in found
        ]


def _run(rank: int, parallel: dict[str, object], num_micro: int, scores: bool, fails_on: int = -1, part: str = ""):
    """(result, losses of the steps before and after, what the scorers saw, has an error) of this rank.

    On one rank a part fails: the scorer or the decoder.
    """
    config = toy_config(**parallel)
    engine, topology = make_engine(config)
    from bitdance_scale.parallel.step import train_step
    from bitdance_scale.train.last_save import LocalErrors
    from bitdance_scale.train.training_benchmark import TrainingBenchmark

    failing = part if rank == fails_on else ""
    scorers = {name: Counting(failing == "scorer") for name in SECTION.metrics} if topology.is_reader else {}
    benchmark = TrainingBenchmark(SECTION, config, PROMPTS, scorers, Words(), Bits(failing == "decoder"), topology)
    errors, losses, results = LocalErrors(), [], []
    for step in range(4):
        batch = step_inputs(config, topology, num_micro, step)
        found, outcome = train_step(engine, batch, config.loss, 1e-3, topology)
        losses.append((found.total, found.vision, found.text, outcome.grad_norm))
        if scores and step % 2 == 0:
            state = torch.random.get_rng_state()
            results.append(benchmark.run(engine, step + 1, errors.kept))
            assert torch.equal(state, torch.random.get_rng_state()), "training may draw from it"
    calls = [call for scorer in scorers.values() for call in scorer.devices]
    return results, losses, calls, errors.has_any


def _num_micro(num_ranks: int, parallel: dict[str, object]) -> int:
    """So that all layouts train on the same packs: two of a step."""
    return 2 * int(parallel.get("tensor", 1)) * int(parallel.get("pipeline", 1)) // num_ranks


@pytest.fixture(scope="module")
def one_process():
    ((results, losses, calls, _),) = run_ranks(1, _run, {}, 2, True)
    # Three batches, two metrics, two steps.
    assert len(calls) == 3 * 2 * 2 and set(calls) == {"cpu"}
    return results, losses


def test_every_image_is_scored_and_some_are_shown(one_process):
    first, second = one_process[0]
    assert [(line.metric, line.step, line.num_images) for line in first.scores] == [
        ("classes", 1, 7), ("clip-score", 1, 7),
    ]  # fmt: skip
    assert 0 < first.scores[0].values["overall"] < 1 and first.scores[0].values == first.scores[1].values
    assert first.scores[0].low["overall"] < first.scores[0].values["overall"] < first.scores[0].high["overall"]
    # Image 0 of each prompt.
    assert [image.caption.split(": ")[-1] for image in first.shown] == [f"text {number}" for number in range(5)]
    assert all(image.pixels.shape == (2, 4, 3) for image in first.shown)
    assert {image.pixels.tobytes() for image in first.shown} != {image.pixels.tobytes() for image in second.shown}
    assert len({image.pixels.tobytes() for image in first.shown}) == 5, "a seed for every image"


def test_training_goes_on_as_without_benchmarks_bit_by_bit(one_process):
    ((_, losses, _, _),) = run_ranks(1, _run, {}, 2, False)
    assert losses == one_process[1]


@pytest.mark.large
def test_training_goes_on_bit_by_bit_under_zero_3():
    with_scores, without = (run_ranks(2, _run, {"zero_stage": 3}, 1, scores) for scores in (True, False))
    assert [losses for _, losses, *_ in with_scores] == [losses for _, losses, *_ in without]


@pytest.mark.parametrize(("num_ranks", "parallel"), LAYOUTS, ids=str)
def test_every_layout_gives_the_same_scores_and_pictures(one_process, num_ranks, parallel):
    found = run_ranks(num_ranks, _run, parallel, _num_micro(num_ranks, parallel), True)
    for rank, (results, losses, _, has_error) in enumerate(found):
        assert not has_error
        for step_losses, expected in zip(losses, one_process[1], strict=True):
            # float32 sums in another order, over four steps.
            assert step_losses == pytest.approx(expected, rel=1e-4)
        if rank > 0:
            assert results == [None, None]
            continue
        for result, expected in zip(results, one_process[0], strict=True):
            assert [dataclasses.replace(line, drawn_s=0) for line in result.scores] == [
                dataclasses.replace(line, drawn_s=0) for line in expected.scores
            ]
            for image, other in zip(result.shown, expected.shown, strict=True):
                assert image.caption == other.caption and np.array_equal(image.pixels, other.pixels)


@pytest.mark.parametrize("part", ["scorer", "decoder"])
def test_what_fails_on_one_replica_leaves_no_rank_waiting(part):
    found = run_ranks(2, _run, {"zero_stage": 3}, 1, True, 1, part)
    assert [results for results, *_ in found] == [[None, None], [None, None]]
    assert [has_error for *_, has_error in found] == [False, True]


def _load(rank: int, clip: str) -> tuple[list[str], str]:
    """(metrics that this rank scores, the error) of a benchmark that is read as a run does."""
    from bitdance_scale.errors import CheckpointError
    from bitdance_scale.evaluation.picture_scorers import ScorerNetworks
    from bitdance_scale.parallel.topology import make_topology, start_process_group
    from bitdance_scale.train.training_benchmark import TrainingBenchmark

    start_process_group(timeout_s=100)
    config = toy_config(tensor=2)
    topology = make_topology(config.parallel)
    section = dataclasses.replace(SECTION, metrics=("scenes", "clip-score"), num_prompts=6, clip=clip)
    state = torch.random.get_rng_state()
    try:
        found = TrainingBenchmark.load(section, config, ScorerNetworks(), Words(), Bits(), topology)
    except CheckpointError as error:
        return [], str(error)
    assert torch.equal(state, torch.random.get_rng_state())
    return list(found._scorers), ""


def test_the_first_rank_of_a_replica_reads_the_networks_and_all_hear_of_a_fault(tmp_path):
    save_clip(tmp_path / "clip")
    assert run_ranks(2, _load, str(tmp_path / "clip")) == [(["scenes", "clip-score"], ""), ([], "")]
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"cut short")
    first, second = run_ranks(2, _load, str(tmp_path / "clip"))
    assert first == second and first[0] == [] and str(tmp_path / "clip") in first[1]
