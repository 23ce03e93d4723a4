"""A rank that hangs is named, all ranks leave their stacks, and the job ends; a rank in a long phase is left alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.spawn import run_ranks

TIMEOUT_S = 4.0
LONG_TIMEOUT_S = 40.0
NUM_RANKS = 2
HANG_STEP = 3


def _steps(rank: int, folder: str, how: str) -> int:
    """Five steps of one collective each; rank 1 hangs in the forward pass of the third."""
    import torch
    import torch.distributed as dist

    from bitdance_scale.parallel.topology import end_process_group, start_process_group
    from bitdance_scale.phases import POSITION, Phase, phase
    from bitdance_scale.train.heartbeat import Heartbeat

    start_process_group(60.0)
    with Heartbeat(Path(folder), TIMEOUT_S, LONG_TIMEOUT_S) as heartbeat:
        heartbeat.resumed(0)
        for step in range(5):
            POSITION.move(Phase.READING, step)
            is_moment = rank == 1 and step == HANG_STEP
            if is_moment and how == "evaluating":
                with phase(Phase.EVALUATING):
                    time.sleep(3 * TIMEOUT_S)
            with phase(Phase.FORWARD):
                if is_moment and how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if is_moment and how == "asleep":
                    time.sleep(3600)
            with phase(Phase.BACKWARD):
                dist.all_reduce(torch.ones(1))
    end_process_group()
    return step


@pytest.mark.parametrize("how", ["stopped", "asleep"])
def test_a_hanging_rank_is_named_and_the_job_ends(tmp_path, how):
    begun_s = time.monotonic()
    with pytest.raises(AssertionError, match="exit code (76|-9)"):
        run_ranks(NUM_RANKS, _steps, str(tmp_path), how)
    assert time.monotonic() - begun_s < 60.0, "named within a minute"
    (folder,) = (tmp_path / "hangs").iterdir()
    report = (folder / "report.txt").read_text()
    what = "does not answer" if how == "stopped" else "does not get on"
    # The last beat of a stopped process may be one step old.
    assert f"rank 1 (node {os.uname().nodename}, process " in report and f": {what}." in report
    if how == "asleep":
        assert (
            f"at step {HANG_STEP + 1}, forward: {what}. 1 other rank waits at step {HANG_STEP + 1}, backward" in report
        )
    stacks = [(folder / f"rank_{rank:05d}.txt").read_text() for rank in range(NUM_RANKS)]
    assert "all_reduce" in stacks[0] and all("_steps" in text for text in stacks)
    if how == "stopped":
        assert "State:\tT (stopped)" in stacks[1]


def test_a_rank_in_a_long_phase_does_not_hang(tmp_path):
    assert run_ranks(NUM_RANKS, _steps, str(tmp_path), "evaluating") == [4, 4]
    assert not (tmp_path / "hangs").exists()


def _unreported(rank: int, folder: str) -> list[int]:
    """A hang was declared by a rank that is gone; returns the exit codes of this one."""
    from bitdance_scale.parallel.topology import end_process_group, own_store, start_process_group
    from bitdance_scale.train import heartbeat

    start_process_group(60.0)
    heartbeat.REPORT_WAIT_S = 1.0
    codes: list[int] = []
    with heartbeat.Heartbeat(Path(folder), TIMEOUT_S, LONG_TIMEOUT_S, end=codes.append):
        own_store().set("bitdance/hang", "7 0")
        deadline_s = time.monotonic() + 30.0
        while not codes and time.monotonic() < deadline_s:
            time.sleep(0.1)
    end_process_group()
    return codes


def test_a_hang_that_nobody_reports_ends_the_job_all_the_same(tmp_path):
    assert run_ranks(1, _unreported, str(tmp_path)) == [[76]]
    (folder,) = (tmp_path / "hangs").iterdir()
    assert "_unreported" in (folder / "rank_00000.txt").read_text()
