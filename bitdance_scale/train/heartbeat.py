"""The heartbeat of a rank: it says where it is, notices when the job gets no further, and ends the job with a report.

Training is synchronous, so a rank that hangs stops all. Every rank therefore watches itself only. The first one whose
position (`phases.py`) has not changed for longer than the limit declares a hang, unless another rank is in a phase that
may take longer. All ranks then write their stacks into the run folder, the one that declared names the culprit, and all
end with `EXIT_HUNG`, on which a launcher starts the job again.

The ranks talk through the job's key-value store, over a connection of their own. torchrun keeps the store in its agent,
which a hanging rank does not disturb. If the store is silent as well, a rank writes its stacks and ends by itself.

nvidia-resiliency-ext has such a monitor too. It needs its own launcher in torchrun's place and one more process per
rank, and it ends a hanging rank without naming it or taking its stacks (docs/reliability.md compares the two).
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from bitdance_scale.parallel.topology import own_store
from bitdance_scale.phases import LONG_PHASES, POSITION
from bitdance_scale.train.hang_report import (
    HANGS_DIR,
    STACKS_SIGNAL,
    Beat,
    find_culprits,
    own_beat,
    take_stacks,
    write_own_stacks,
)
from bitdance_scale.train.process import EXIT_HUNG, leave_record

logger = logging.getLogger(__name__)

LONGEST_INTERVAL_S = 10.0
BEATS_PER_TIMEOUT = 10
# How long the answers of the other ranks are waited for, in beats and seconds, and how long their report.
GRACE_BEATS = 2
GRACE_S = 3.0
REPORT_WAIT_S = 30.0
CULPRIT_AHEAD_S = 1.0
_HANG, _REPORT = "bitdance/hang", "bitdance/report"


class Heartbeat:
    """Beats and watches in threads of its own while its `with` block runs.

    Args:
        folder: run folder.
        timeout_s: seconds without progress in a step after which the job counts as hung; 0: it never does.
        long_timeout_s: the same of the start, the first step, checkpoints, evaluations, pictures and the end.
        end: ends the process with an exit code; tests replace it.

    Attributes:
        actions: called at every beat, in the thread; an exception ends the job as a hang does.
    """

    def __init__(
        self, folder: Path, timeout_s: float, long_timeout_s: float, end: Callable[[int], None] = os._exit
    ) -> None:
        self.actions: list[Callable[[], None]] = []
        self._folder, self._timeout_s, self._long_timeout_s, self._end = folder, timeout_s, long_timeout_s, end
        self._interval_s = min(LONGEST_INTERVAL_S, timeout_s / BEATS_PER_TIMEOUT) if timeout_s else LONGEST_INTERVAL_S
        self._grace_s = GRACE_BEATS * self._interval_s + GRACE_S
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._first_step, self._count = POSITION.step, 0
        self._ended = threading.Event()
        self._hung = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Heartbeat:
        POSITION.move(POSITION.phase)
        # Anonymous: without a hang nothing is written, and a rank of this machine can read it.
        self._stacks = os.memfd_create("stacks")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        self._store = own_store()
        self._store.set_timeout(datetime.timedelta(seconds=REPORT_WAIT_S))
        self._beat()
        actions = [self._beat_on] + ([self._watch_alone] if self._timeout_s else [])
        self._threads = [
            threading.Thread(target=action, name=f"heartbeat-{number}", daemon=True)
            for number, action in enumerate(actions)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._threads:
            self._threads[0].join(timeout=self._grace_s)
            faulthandler.unregister(STACKS_SIGNAL)
            os.close(self._stacks)
            self._threads = []

    def resumed(self, step: int) -> None:
        """Says which step the run goes on from: the first one may take longer."""
        self._first_step = step
        POSITION.move(POSITION.phase, step)

    def _beat_on(self) -> None:
        last_s = time.monotonic()
        while not self._ended.wait(self._interval_s):
            now_s = time.monotonic()
            if now_s - last_s > self._interval_s + self._grace_s:
                # This process was suspended, perhaps with all others: time that nobody could use.
                POSITION.since_s += now_s - last_s
            last_s = now_s
            try:
                self._run_actions()
                beat = self._beat()
                if self._store.check([_HANG]):
                    self._end_hung(is_first=False)
                elif self._timeout_s and beat.still_s > self._limit_s(beat) and self._is_hang(beat):
                    claim = f"{self._rank} {POSITION.step}"
                    first = self._store.compare_set(_HANG, "", claim)
                    self._end_hung(is_first=first == claim.encode())
            except dist.DistError as error:
                # `_watch_alone` ends this rank if it hangs.
                logger.debug("heartbeat: the store does not answer (%s)", error)

    def _beat(self) -> Beat:
        self._count += 1
        beat = own_beat(self._rank, self._stacks, self._count, self._first_step)
        self._store.set(_beat_key(self._rank), beat.to_json())
        return beat

    def _run_actions(self) -> None:
        for action in self.actions:
            try:
                action()
            except Exception as error:  # noqa: BLE001  # Whatever it is, this rank may not go on.
                logger.error("%s", error)
                leave_record(EXIT_HUNG, f"{type(error).__name__}: {error}", from_any=True)
                self._finish()

    def _limit_s(self, beat: Beat) -> float:
        return self._long_timeout_s if beat.phase in LONG_PHASES or beat.is_first_step else self._timeout_s

    def _is_hang(self, own: Beat) -> bool:
        """Whether no rank is in a phase that may take longer; a rank counts only if it beats."""
        if own.still_s > self._long_timeout_s:
            return True
        earlier = self._beats()
        if self._ended.wait(1.5 * self._interval_s):
            return False
        now = self._beats()
        alive = [beat for rank, beat in now.items() if rank in earlier and beat.count > earlier[rank].count]
        return not any(beat.still_s <= self._limit_s(beat) for beat in alive if beat.rank != self._rank)

    def _beats(self) -> dict[int, Beat]:
        ranks = [rank for rank in range(self._num_ranks) if self._store.check([_beat_key(rank)])]
        values = self._store.multi_get([_beat_key(rank) for rank in ranks]) if ranks else []
        return {rank: Beat.from_json(value.decode()) for rank, value in zip(ranks, values, strict=True)}

    def _end_hung(self, is_first: bool) -> None:
        """Writes the stacks, and names the culprit or hears from the rank that does; then ends this process."""
        with self._hung:
            own = own_beat(self._rank, self._stacks, self._count, self._first_step)
            # One folder for all: a stopped rank that was woken may be a step further by now.
            folder = self._hang_folder(int(self._store.get(_HANG).split()[1]))
            self._try(lambda: write_own_stacks(folder, own))
            self._store.set(f"{_HANG}/{self._rank}", own.to_json())
            report: dict[str, Any] = {
                "message": f"the job hangs, and no rank could say which one. The stacks are in {folder}"
            }
            try:
                if is_first:
                    self._report(folder)
                else:
                    self._store.wait([_REPORT])
                report = json.loads(self._store.get(_REPORT).decode())
                self._take_silent(folder, [Beat(**beat) for beat in report["silent"]])
            except dist.DistError as error:
                # The rank that reports has ended itself, or the store has. This one must end all the same.
                logger.error("%s: %s", report["message"], error)
            leave_record(EXIT_HUNG, f"TrainingError: {report['message']}", from_any=True)
            if self._rank not in report.get("culprits", []):
                # torchrun blames the rank that ends first.
                time.sleep(CULPRIT_AHEAD_S)
            self._finish()

    def _report(self, folder: Path) -> None:
        deadline_s = time.monotonic() + self._grace_s
        keys = [f"{_HANG}/{rank}" for rank in range(self._num_ranks)]
        while time.monotonic() < deadline_s and not all(self._store.check([key]) for key in keys):
            time.sleep(0.1)
        answered = [rank for rank in range(self._num_ranks) if self._store.check([keys[rank]])]
        answers = [Beat.from_json(self._store.get(keys[rank]).decode()) for rank in answered]
        beats = self._beats()
        others = sorted(set(range(self._num_ranks)) - set(answered))
        silent = [beats[rank] for rank in others if rank in beats]
        verdict = find_culprits(answers, silent, [rank for rank in others if rank not in beats], folder)
        logger.error(verdict.message)
        self._try(lambda: (folder / "report.txt").write_text(verdict.message + "\n", encoding="utf-8"))
        report = {
            "message": verdict.message,
            "culprits": [beat.rank for beat in verdict.culprits],
            "silent": [dataclasses.asdict(beat) for beat in silent],
        }
        self._store.set(_REPORT, json.dumps(report))

    def _take_silent(self, folder: Path, silent: list[Beat]) -> None:
        """Takes the stacks of silent ranks on this machine, if this is the first of its ranks that answers."""
        own = own_beat(self._rank, self._stacks, self._count, self._first_step)
        quiet = {beat.rank for beat in silent}
        here = [beat.rank for beat in self._beats().values() if beat.machine == own.machine and beat.rank not in quiet]
        if min(here, default=self._rank) == self._rank:
            for beat in silent:
                if beat.machine == own.machine:
                    self._try(lambda beat=beat: take_stacks(folder, beat))  # type: ignore[misc]
            self._store.set(f"{_REPORT}/{own.machine}", "taken")
        else:
            self._store.wait([f"{_REPORT}/{own.machine}"])

    def _watch_alone(self) -> None:
        """Ends this rank when it hangs and the store does not answer either."""
        last_s = time.monotonic()
        while not self._ended.wait(self._interval_s):
            now_s = time.monotonic()
            was_suspended = now_s - last_s > self._interval_s + self._grace_s
            last_s = now_s
            own = own_beat(self._rank, self._stacks, self._count, self._first_step)
            if was_suspended or own.still_s <= self._long_timeout_s + 2 * self._grace_s + REPORT_WAIT_S:
                continue
            self._try(lambda own=own: write_own_stacks(self._hang_folder(own.step), own))  # type: ignore[misc]
            message = (
                f"{own.name} got no further at {own.place} for {own.still_s:.0f} s, and the job's store does not "
                f"answer: the launcher or the first node is gone. The stacks are in {self._hang_folder(own.step)}"
            )
            logger.error(message)
            leave_record(EXIT_HUNG, f"TrainingError: {message}", from_any=True)
            self._finish()

    def _hang_folder(self, step: int) -> Path:
        return self._folder / HANGS_DIR / f"step_{step:08d}"

    def _finish(self) -> None:
        for handler in logging.getLogger().handlers:
            handler.flush()
        self._ended.set()
        self._end(EXIT_HUNG)

    def _try(self, action: Callable[[], object]) -> None:
        """The report comes even where the disk is full."""
        try:
            action()
        except OSError as error:
            logger.error("%s", error)


def _beat_key(rank: int) -> str:
    return f"bitdance/beat/{rank}"
