"""The loop of every job: what is done after which step, and what a stop or a fault leaves."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.schema import CheckpointSection, OptimSection
from bitdance_scale.config.tokenizer_schema import TokenizerRunSection
from bitdance_scale.errors import ConfigError, DataError, TrainingError
from bitdance_scale.train import run
from bitdance_scale.train.job import Job, Schedule
from bitdance_scale.train.last_save import LocalErrors
from bitdance_scale.train.process import StopRequest
from bitdance_scale.train.run import joined_ranks, opened_run, train
from bitdance_scale.train.step_guards import StepGuards

SECTION = TokenizerRunSection(name="a", output="", steps=6)


class RecordedJob(Job):
    """Does nothing and writes down what it is asked for."""

    def __init__(self, *, step: int = 0, skipped: tuple[int, ...] = (), broken: int = -1) -> None:
        self.events: list[str] = []
        self._step, self._skipped, self._broken = step, skipped, broken
        self._saved_step = step
        self.local_errors = LocalErrors()
        self.guards = StepGuards(OptimSection(max_skipped_steps=1))

    step = property(lambda self: self._step)
    benchmarks: tuple[int, ...] = ()
    draw_every, draws_start = 0, False
    schedule = property(
        lambda self: Schedule(6, 2, 4, 3, self.draw_every, benchmarks=self.benchmarks, draws_start=self.draws_start)
    )

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        self.events.append("open")
        yield
        self.events.append("close")

    def read(self) -> None:
        if self._step == self._broken:
            raise DataError("unreadable")

    def take_step(self) -> bool:
        self._step += 1
        return self._step in self._skipped

    def save(self) -> None:
        if self._saved_step != self._step:
            self.events.append(f"save {self._step}")
        self._saved_step = self._step

    has_failed_save = False

    def settle(self) -> None:
        self.events.append("settle")

    def log(self) -> None:
        self.events.append(f"log {self._step}")

    def evaluate(self) -> None:
        self.events.append(f"evaluate {self._step}")

    def draw(self) -> None:
        self.events.append(f"draw {self._step}")

    def draw_start(self) -> None:
        self.events.append("draw start")

    def score(self, number: int) -> None:
        self.events.append(f"score {number} {self._step}")

    def pause(self) -> None:
        pass

    prepare_saves = state = model_values = optimizer_values = finish = complete = pause


def asked_to_stop_after(job: RecordedJob, step: int) -> StopRequest:
    class Request(StopRequest):
        is_requested = property(lambda self: job.step == step)

    return Request()


def test_everything_is_done_when_it_is_due_and_after_the_last_step() -> None:
    job = RecordedJob()
    assert train(job, StopRequest())
    assert job.events == [
        "open", "evaluate 0", "log 2", "evaluate 3", "log 4", "save 4", "log 6", "save 6", "evaluate 6",
        "settle", "close",
    ]  # fmt: skip


@pytest.mark.parametrize(("step", "before"), [(0, ["draw start", "evaluate 0"]), (2, [])])
def test_the_start_is_drawn_before_the_first_step_and_pictures_before_the_page(step: int, before: list[str]) -> None:
    job = RecordedJob(step=step)
    job.draw_every, job.draws_start = 3, True
    assert train(job, StopRequest())
    shown = [event for event in job.events if event.startswith(("draw", "evaluate"))]
    assert shown == [*before, "draw 3", "evaluate 3", "draw 6", "evaluate 6"]


def test_each_benchmark_is_scored_when_it_is_due_and_after_the_last_step() -> None:
    job = RecordedJob(step=1)
    job.benchmarks = (2, 4, 9)
    assert train(job, StopRequest())
    assert [event for event in job.events if event.startswith(("score", "evaluate"))] == [
        "score 0 2", "evaluate 3", "score 0 4", "score 1 4", "evaluate 6", "score 0 6", "score 1 6", "score 2 6",
    ]  # fmt: skip


def test_a_resumed_run_first_makes_the_scores_that_it_ended_before() -> None:
    job = RecordedJob(step=4)
    job.benchmarks, job.lacking_scores = (9, 4), lambda: [1]
    assert train(job, StopRequest())
    assert job.events[:2] == ["open", "score 1 4"] and job.events.count("score 1 6") == 1


def test_a_resumed_run_does_not_evaluate_first() -> None:
    job = RecordedJob(step=4)
    assert train(job, StopRequest())
    assert job.events == ["open", "log 6", "save 6", "evaluate 6", "settle", "close"]


def test_a_stop_saves_the_step_that_was_trained() -> None:
    job = RecordedJob()
    assert not train(job, asked_to_stop_after(job, 3))
    assert job.events[-4:-1] == ["save 3", "settle", "settle"] and "evaluate 3" not in job.events


def test_unreadable_data_saves_the_steps_before_it() -> None:
    job = RecordedJob(broken=3)
    with pytest.raises(DataError, match="unreadable"):
        train(job, StopRequest())
    assert job.events[-3:] == ["save 3", "settle", "settle"]


def test_steps_may_be_skipped_but_not_in_a_row() -> None:
    assert train(RecordedJob(skipped=(1, 3, 5)), StopRequest())
    job = RecordedJob(skipped=(2, 3))
    with pytest.raises(TrainingError, match=r"step 3: 2 consecutive steps .* \(optim.max_skipped_steps = 1\)"):
        train(job, StopRequest())
    assert job.events[-1] == "settle", "a checkpoint under way needs the process groups"
    assert "save 3" not in job.events, "the weights are those of step 1; the last checkpoint is taken up again"


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(ConfigError, match="cannot be written"),
        opened_run(SECTION, ParallelSection(), tmp_path / "runs" / "a"),
    ):
        raise AssertionError("joined")


def test_a_job_of_one_process_leaves_no_trace_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        with joined_ranks(ParallelSection()) as topology:
            assert (topology.rank, topology.world_size, os.environ["RANK"]) == (0, 1, "0")
        assert "RANK" not in os.environ


def test_a_complete_run_only_makes_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = RecordedJob(step=6)
    job.complete = lambda: job.events.append("complete")
    config = SimpleNamespace(
        run=TokenizerRunSection(name="a", root=str(tmp_path), output="", steps=6), checkpoint=CheckpointSection()
    )
    monkeypatch.setattr(run, "setup_logging", lambda folder, rank: None)
    caplog.set_level("INFO")
    assert run.run_job(config, ParallelSection(), lambda topology, folder: job) == 0
    assert job.events == ["complete"] and "is complete at step 6; extend it with run.steps=12" in caplog.text
    assert not (tmp_path / "a" / "config.toml").exists()


def test_a_kept_error_does_not_hold_what_was_in_memory_when_it_came() -> None:
    class Tensor:
        pass

    tensors = []

    def decode() -> None:
        tensor = Tensor()
        tensors.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    errors = LocalErrors()
    with errors.kept():
        decode()
    assert errors.has_any and tensors[0]() is None
    with pytest.raises(RuntimeError, match="out of memory"):
        errors.raise_on_all_ranks()
