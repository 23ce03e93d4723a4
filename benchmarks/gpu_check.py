r"""All that one GPU can tell about this project, in a quarter of an hour: `make gpu-check`.

    python benchmarks/gpu_check.py --out DIR [--minutes 13] [--only NAME ...]
    python benchmarks/gpu_check.py --out DIR --device cpu       small sizes: shows that the checks run

The checks run one after another, the most telling ones first, each in a process of its own with a limit. DIR gets what
is known as soon as it is: `results.jsonl` with a line per check, `log.txt` with all output, `summary.md` with a table,
and a trace of one step. A check that fails, hangs or crashes costs its own limit and no other check; one that the time
left does not allow is left out and said so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A check that has less time than this share of its limit is not started.
LEAST_SHARE = 0.3
_TAIL_LINES = 12
_ERROR_LINES = 4
_ERROR = re.compile(r"(E  |[\w.]+(Error|Exception|Interrupt)\b)")


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: on the command line and in the results.
        asks: what it answers.
        command: arguments of Python.
        limit_s: seconds after which it is killed.
    """

    name: str
    asks: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        name: of the check.
        state: passed, failed, killed at its limit, or left out.
        seconds: how long it ran.
        exit_code: of its process; None if it did not run to its end.
        said: JSON objects that it printed, each on a line of its own.
        tail: its last lines.
    """

    name: str
    state: str
    seconds: float
    exit_code: int | None
    said: tuple[dict[str, object], ...]
    tail: tuple[str, ...]


def torchrun(script: str, *arguments: str) -> tuple[str, ...]:
    """Arguments of Python that start a benchmark on one rank."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", f"benchmarks/{script}", *arguments)


def checks_on_gpu(out: Path) -> list[Check]:
    """The checks, in order of what is to be known first."""
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu")
    # Full width, as many layers as fit one GPU with head and optimiser.
    part = (
        *("pt_14b", "parallel.tensor=1", "parallel.sequence_parallel=false", "model.num_layers=8"),
        *("--vocab", "32000", "--packs", "2", "--steps", "4"),
    )
    looks = ("--trace", str(out / "trace.json.gz"), "--count-syncs", "--estimate")
    megatron = ("parallel.optimizer=megatron",)
    small = ("pt_0p6b", "parallel.tensor=1", "parallel.sequence_parallel=false", "--vocab", "32000", "--packs", "2")
    saves = ("--steps", "2", "--save", str(out / "checkpoints"))
    calibrate = ("--calibrate", str(out / "machine.toml"), "--gpu", "h200-141")
    drawing = ("--model", "qwen3-14b", "--height", "512", "--width", "512", "--block-side", "4", "--images", "2")
    return [
        Check("environment", "device, driver, compilers, versions", ("benchmarks/gpu_environment.py",), 60),
        Check(
            "attention-tests", "FlexAttention's values, one compilation", (*tests, "tests/gpu/test_attention.py"), 90
        ),
        Check("attention", "FlexAttention's speed over causal flash", ("benchmarks/attention.py",), 90),
        Check("training-tests", "bfloat16 under ZeRO 1 to 3, decoding", (*tests, "tests/gpu/test_one_gpu.py"), 150),
        Check("slice", "MFU at the 14B's width, syncs, memory, trace", torchrun("workload.py", *part, *looks), 150),
        Check("slice-compiled", "the same, layers compiled", torchrun("workload.py", *part, "--compile"), 150),
        Check(
            "slice-megatron", "the same under Megatron-core's optimiser", torchrun("workload.py", *part, *megatron), 120
        ),
        Check("encoding", "bits under TF32, images/s", ("benchmarks/encoding.py",), 60),
        Check("calibration", "constants of `bitdance plan`", ("-m", "bitdance_scale.cli", "plan", *calibrate), 60),
        Check("generation-tests", "CUDA graphs draw plain calls' bits", (*tests, "tests/gpu/test_generation.py"), 90),
        Check("generation", "latency of the 14B", ("benchmarks/generation.py", "--device", "cuda", *drawing), 120),
        Check("save", "how long a checkpoint stalls a step", torchrun("workload.py", *small, *saves), 120),
        Check("profiler-tests", "traces have kernels", (*tests, "tests/gpu/test_profiler.py"), 40),
    ]


def checks_on_cpu(out: Path) -> list[Check]:
    """The same scripts at sizes of seconds; the tests on a GPU skip themselves and are left out."""
    small = ("demo", "data.global_batch=30", "--packs", "2", "--steps", "2")
    looks = ("--trace", str(out / "trace.json.gz"), "--count-syncs", "--estimate")
    return [
        Check("environment", "device, driver, compilers, versions", ("benchmarks/gpu_environment.py",), 60),
        Check("attention", "the script runs", ("benchmarks/attention.py", "--device", "cpu"), 120),
        Check("slice", "the script runs", torchrun("workload.py", *small, *looks), 120),
        Check("save", "the script runs", torchrun("workload.py", *small, "--save", str(out / "checkpoints")), 120),
        Check(
            "calibration",
            "the script runs",
            ("-m", "bitdance_scale.cli", "plan", "--calibrate", str(out / "machine.toml"), "--gpu", "cpu-core"),
            120,
        ),
        Check("encoding", "the script runs", ("benchmarks/encoding.py", "--device", "cpu"), 120),
        Check("generation", "the script runs", ("benchmarks/generation.py", "--model", "demo"), 180),
    ]


def run_check(check: Check, limit_s: float, log: Path) -> Outcome:
    """Runs a check for at most so many seconds; its output goes to the end of the log."""
    begun_s = time.monotonic()
    where = log.stat().st_size if log.exists() else 0
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{_python_path()}"}
    with log.open("ab") as output:
        output.write(f"\n===== {check.name}: python {' '.join(check.command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [sys.executable, *check.command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            exit_code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            # Ranks that it started, too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_bytes()[where:].decode("utf-8", "replace")
    state = "killed at its limit" if exit_code is None else "passed" if exit_code == 0 else "failed"
    lines = [line for line in text.splitlines()[2:] if line.strip()]
    # Launchers end with a page of their own, under which the error lies.
    reasons = [line for line in lines if _ERROR.match(line)][:_ERROR_LINES] if exit_code else []
    tail = (*reasons, *lines[-_TAIL_LINES:])
    return Outcome(check.name, state, time.monotonic() - begun_s, exit_code, tuple(_objects(lines)), tail)


def run_all(checks: Sequence[Check], out: Path, minutes: float, show: Callable[[str], None] = print) -> list[Outcome]:
    """Runs checks until the time is up; writes what each gave as soon as it is there.

    Args:
        checks: in order.
        out: the folder.
        minutes: for all of them.
        show: called with a line per check.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for check in checks:
        left_s = ends_s - time.monotonic()
        if left_s < LEAST_SHARE * check.limit_s:
            outcome = Outcome(check.name, "left out", 0.0, None, (), (f"{left_s:.0f} s were left",))
        else:
            outcome = run_check(check, min(check.limit_s, left_s), out / "log.txt")
        outcomes.append(outcome)
        with (out / "results.jsonl").open("a", encoding="utf-8") as results:
            results.write(json.dumps({"asks": check.asks, **asdict(outcome)}) + "\n")
        (out / "summary.md").write_text(summary(checks, outcomes), encoding="utf-8")
        show(f"{check.name}: {outcome.state}, {outcome.seconds:.0f} s")
    return outcomes


def summary(checks: Sequence[Check], outcomes: Sequence[Outcome]) -> str:
    """A Markdown table of the checks that are done, with their last lines below."""
    lines = ["| check | asks | state | s |", "|---|---|---|---|"]
    for check, outcome in zip(checks, outcomes, strict=False):
        lines.append(f"| {check.name} | {check.asks} | {outcome.state} | {outcome.seconds:.0f} |")
    for check, outcome in zip(checks, outcomes, strict=False):
        lines += ["", f"## {check.name}", "", f"    python {' '.join(check.command)}", "", "```"]
        lines += [json.dumps(found) for found in outcome.said] or list(outcome.tail)
        lines.append("```")
    return "\n".join(lines) + "\n"


def _objects(lines: Sequence[str]) -> list[dict[str, object]]:
    found = []
    for line in lines:
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def _python_path() -> str:
    return os.environ.get("PYTHONPATH", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a check failed or was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=13.0, help="for all checks (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    options = parser.parse_args(arguments)
    out = options.out.absolute()
    checks = checks_on_gpu(out) if options.device == "cuda" else checks_on_cpu(out)
    names = [check.name for check in checks]
    unknown = [name for name in options.only or () if name not in names]
    if unknown:
        parser.error(f"--only {unknown[0]}: must be one of {', '.join(names)}")
    chosen = [check for check in checks if check.name in (options.only or names)]
    outcomes = run_all(chosen, out, options.minutes)
    return int(any(outcome.state not in ("passed", "left out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
