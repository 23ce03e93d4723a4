"""All fault drills, one after another, with a table at the end.

    PYTHONPATH=. python -m tests.faults.drills [--only NAME ...] [--kills 200]

Every try trains a small demo on two ranks, lets something happen to it and checks what the run promises: that it is
recovered, with the very bits of a run that nothing happened to, or that the culprit is named in time. What needs no
whole run, or runs of another kind, is in tests, which count as tries.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks
from tests.faults.injection import Fault, fingerprint, train_rank

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2
NUM_STEPS = 8
SAVE_EVERY = 2
KILLS_PER_RUN = 10
# Of a step; named within a minute after it.
TIMEOUT_S = 5.0
NAMED_WITHIN_S = 60.0
EXIT_HUNG, EXIT_REQUEUE, EXIT_REFUSED = 76, 75, 2
SAVE_ACTIONS = ("clean", "create", "write", "manifest", "rename", "latest", "delete_rename", "delete")


@dataclass
class Bench:
    """Where the drills run: a folder with data, and the run that nothing happened to."""

    folder: Path
    overrides: list[str]
    reference: dict[str, object]
    num_kills: int
    num_runs: int = 0

    def new_root(self) -> Path:
        self.num_runs += 1
        root = self.folder / f"run{self.num_runs}"
        root.mkdir()
        return root

    def train(self, root: Path, fault: Fault | None = None, *more: str) -> str:
        """Trains in `root` until the end or the fault; returns what was said about ranks that failed, or ''."""
        return start(root, [*self.overrides, *more], fault)

    def expect_recovery(self, root: Path, *more: str) -> None:
        """Starts the run again, to its end, which must be that of the run that nothing happened to."""
        said = self.train(root, None, *more)
        assert not said, said
        found = fingerprint(root / "demo")
        assert found == self.reference, "the run ends with other bits"
        shutil.rmtree(root)


def start(root: Path, overrides: list[str], fault: Fault | None) -> str:
    try:
        # A rank that is killed takes nothing with it that the other could still write.
        grace_s = 0.3 if fault is not None and fault.what == "kill" else 20.0
        codes = run_ranks(NUM_RANKS, train_rank, str(root), overrides, fault, timeout_s=240, grace_s=grace_s)
    except AssertionError as error:
        return str(error)
    return "" if codes == [0] * NUM_RANKS else f"exit codes {codes}"


def expect(said: str, pattern: str) -> None:
    assert re.search(pattern, said, re.DOTALL), f"expected {pattern!r}, got: {said[-1500:]}"


def hangs(bench: Bench) -> Iterator[None]:
    """A rank hangs in every part of a step, in three ways."""
    cases = [Fault("stop", phase="forward", step=3), Fault("hold the interpreter", phase="backward", step=3)]
    cases += [Fault("sleep", phase=phase, step=3) for phase in ("reading", "encoding", "forward", "optimiser")]
    cases += [Fault("sleep", rank=0, phase="logging", step=4)]
    for fault in cases:
        root = bench.new_root()
        begun_s = time.monotonic()
        said = bench.train(root, fault, f"run.timeout_s={TIMEOUT_S}", "run.long_timeout_s=120")
        assert time.monotonic() - begun_s < NAMED_WITHIN_S + 60.0, "not named in time"
        expect(said, rf"exit code ({EXIT_HUNG}|-9)")
        (folder,) = (root / "demo" / "hangs").iterdir()
        report = (folder / "report.txt").read_text(encoding="utf-8")
        expect(report, rf"rank {fault.rank} \(node \S+, process \d+\) at step \d+, \w+")
        stacks = {path.name for path in folder.glob("rank_*.txt")}
        assert stacks == {f"rank_{rank:05d}.txt" for rank in range(NUM_RANKS)}, stacks
        bench.expect_recovery(root)
        yield


def kills(bench: Bench) -> Iterator[None]:
    """SIGKILL at random moments, every second one inside a save; at most ten to a run. Only kills that came count."""
    numbers = random.Random(0)
    num_killed = 0
    while num_killed < bench.num_kills:
        root = bench.new_root()
        for _ in range(min(KILLS_PER_RUN, bench.num_kills - num_killed)):
            if num_killed % 2:
                action = numbers.choice(SAVE_ACTIONS)
                rank = numbers.randrange(NUM_RANKS) if action == "write" else 0
                fault = Fault("kill", rank, save_action=action, num_save=numbers.choice((1, 1, 2)))
            else:
                fault = Fault("kill", numbers.randrange(NUM_RANKS), after_s=1.5, seed=numbers.randrange(2**32))
            said = bench.train(root, fault)
            if not said:
                # Its moment did not come before the end of the run.
                break
            expect(said, "exit code -9")
            num_killed += 1
            yield
        bench.expect_recovery(root)


def requests(bench: Bench) -> Iterator[None]:
    """SIGTERM on one rank: saved, ended with 75, resumed."""
    for step in range(1, NUM_STEPS, 2):
        root = bench.new_root()
        said = bench.train(root, Fault("ask to stop", rank=step % NUM_RANKS, phase="forward", step=step))
        expect(said, rf"exit codes \[{EXIT_REQUEUE}, {EXIT_REQUEUE}\]")
        bench.expect_recovery(root)
        yield


def faults(bench: Bench) -> Iterator[None]:
    """An exception on all ranks in a step, and on one rank beside it: what is whole is saved."""
    for fault, saved in (
        (Fault("fail", rank=-1, phase="forward", step=3), 3),
        (Fault("fail", rank=-1, phase="backward", step=5), 5),
        (Fault("fail", rank=0, show_step=3), 3),
        (Fault("exit", rank=1, phase="forward", step=3), 2),
    ):
        root = bench.new_root()
        said = bench.train(root, fault)
        expect(said, "an injected fault|exit code 1")
        newest = (root / "demo" / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
        assert newest == f"step_{saved:08d}", newest
        bench.expect_recovery(root)
        yield


def second_starts(bench: Bench) -> Iterator[None]:
    """A second start on the same folder is refused and harms nothing; the lock of a dead holder is taken over."""
    command = [sys.executable, "-m", "bitdance_scale.cli", "train", "demo", "--nproc", "1", *bench.overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = bench.new_root()
    command.append(f"run.root='{root}'")
    with open(root / "first.txt", "w", encoding="utf-8") as output:
        first = subprocess.Popen([*command, "run.steps=40"], stdout=output, stderr=output, env=environment)
    try:
        wait_for((root / "demo" / "checkpoints" / "latest").exists)
        second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
        assert second.returncode == EXIT_REFUSED
        expect(second.stderr, r"another process trains in this run folder: process \d+ on ")
        assert first.wait(240) == 0, (root / "first.txt").read_text(encoding="utf-8")[-2000:]
    finally:
        first.kill()
    from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics

    assert [line.step for line in read_metrics(root / "demo" / METRICS_FILE)] == list(range(1, 41))
    yield


def damages(bench: Bench) -> Iterator[None]:
    """Every kind of file of the newest checkpoint, damaged: an older one is offered by name, and taken if allowed."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    ways: dict[str, Callable[[Path], object]] = {
        "tensors/rank00001_000.safetensors": flip,
        "tensors/rank00000_000.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "tensors/index.json": flip,
        "train_state.json": flip,
        "config.toml": flip,
        "manifest.json": Path.unlink,
    }
    for name, damage in ways.items():
        root = bench.new_root()
        said = bench.train(root, Fault("ask to stop", phase="forward", step=5))
        expect(said, str(EXIT_REQUEUE))
        damage(root / "demo" / "checkpoints" / "step_00000006" / name)
        said = bench.train(root)
        expect(said, rf"exit codes \[{EXIT_REFUSED}, {EXIT_REFUSED}\]")
        bench.expect_recovery(root, "checkpoint.fall_back=true")
        yield


def full_disks(bench: Bench) -> Iterator[None]:
    """The disk is full, for once and for good, in a save and at a metrics line."""
    if os.geteuid() != 0:
        print("full disks: left out, as a file system of its own needs root", file=sys.stderr)
        return
    for size_mb in (40, 70):
        root = bench.new_root()
        with mounted(root, size_mb):
            said = bench.train(root)
            expect(said, rf"exit codes \[{EXIT_REFUSED}, {EXIT_REFUSED}\]|^$")
            subprocess.run(["mount", "-o", "remount,size=2g", str(root)], check=True)
            assert not bench.train(root)
            assert fingerprint(root / "demo") == bench.reference
        yield


@contextlib.contextmanager
def mounted(folder: Path, size_mb: int) -> Iterator[None]:
    """A file system of this size at a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def tested(*paths: str) -> Callable[[Bench], Iterator[None]]:
    """A drill that is a set of tests; each counts as a try."""

    def drill(bench: Bench) -> Iterator[None]:
        report = bench.folder / "report.xml"
        command = [sys.executable, "-m", "pytest", "--quiet", "--numprocesses=0", f"--junitxml={report}", *paths]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, timeout=3600, check=False)
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {element.tag for element in case}
            if "skipped" not in kinds:
                assert not kinds & {"failure", "error"}, case.get("name")
                yield

    return drill


def wait_for(is_true: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Returns when it is true."""
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline_s:
            raise OSError(errno.ETIMEDOUT, "it did not come true")
        time.sleep(0.1)


DRILLS: dict[str, Callable[[Bench], Iterator[None]]] = {
    "a rank hangs": hangs,
    "killed": kills,
    "asked to stop": requests,
    "an exception": faults,
    "a second start": second_starts,
    "a damaged checkpoint": damages,
    "a full disk": full_disks,
    "a lock": tested("tests/unit/train/test_run_lock.py"),
    "metrics, logs and pictures without room": tested("tests/unit/train/test_run_sinks.py"),
    "a bad number": tested("tests/distributed/test_step_guard.py", "tests/distributed/test_bad_steps.py"),
    "a slow rank": tested("tests/distributed/test_straggler.py"),
    "S3 breaks": tested("tests/unit/checkpoint/test_remote_copies.py", "tests/distributed/test_remote_checkpoints.py"),
    "another setting or file on resume": tested(
        "tests/distributed/test_resume_changes.py",
        "tests/unit/checkpoint/test_refusals.py",
        "tests/unit/checkpoint/test_foreign_files.py",
    ),
    "credentials in a URL": tested("tests/unit/test_credentials.py"),
}


def run_drills(folder: Path, names: list[str], num_kills: int) -> list[tuple[str, int, int, float]]:
    """(drill, tries, tries that went as promised, seconds of all) of each."""
    overrides = small_demo(folder, num_steps=NUM_STEPS, save_every=SAVE_EVERY)
    bench = Bench(folder, overrides, {}, num_kills)
    root = bench.new_root()
    said = bench.train(root)
    assert not said, said
    bench.reference = fingerprint(root / "demo")
    rows = []
    for name in names:
        num_tries = num_good = 0
        begun_s = time.monotonic()
        tries = DRILLS[name](bench)
        while True:
            try:
                next(tries)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001  # The next drill runs.
                # A generator that has raised cannot go on.
                print(f"{name}, try {num_tries + 1}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                num_tries += 1
                break
            num_tries, num_good = num_tries + 1, num_good + 1
        rows.append((name, num_tries, num_good, time.monotonic() - begun_s))
        print(f"{name}: {num_good} of {num_tries}, {rows[-1][3]:.0f} s", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """The command line; returns 0 if every try went as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DRILLS, default=list(DRILLS), help="these drills")
    parser.add_argument("--kills", type=int, default=200, help="how often a rank is killed (default: 200)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run_drills(Path(folder), options.only, options.kills)
    print("| drill | tries | as promised | seconds a try |\n|---|---|---|---|")
    for name, num_tries, num_good, seconds in rows:
        print(f"| {name} | {num_tries} | {num_good} | {seconds / max(1, num_tries):.1f} |")
    tried, good = sum(row[1] for row in rows), sum(row[2] for row in rows)
    print(f"| all | {tried} | {good} | |")
    return 0 if tried == good else 1


if __name__ == "__main__":
    sys.exit(main())
