"""Starts the ranks of a job on this machine with torchrun, and says how the job ended.

torchrun kills its workers 30 seconds after a SIGTERM or a Ctrl-C, which may be too soon for the checkpoint of a large
model. So torchrun and what it starts ignore the signals that ask a job to stop, until the trainer installs its own
handlers. This process hears the signals and sends SIGUSR1 to the ranks until they have ended, because the first may
come while they still import.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bitdance_scale import errors
from bitdance_scale.cli.command import CommandParser, positive
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.train.process import (
    EXIT_HUNG,
    EXIT_RECORD,
    EXIT_REQUEUE,
    REFUSAL_SUFFIX,
    SAME_SIGINT_S,
    STOP_SIGNALS,
)

POLL_S = 0.2
REPEAT_S = 5.0
_COUNT_GPUS = "import sys, torch; print(torch.cuda.device_count(), file=open(sys.argv[1], 'w'))"


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job, and this machine's among them.

    Attributes:
        num_processes: ranks on each machine.
        num_nodes: machines.
        node_rank: number of this one, from 0.
        rendezvous: HOST:PORT of the first machine; empty for a job of one machine.
    """

    num_processes: int
    num_nodes: int = 1
    node_rank: int = 0
    rendezvous: str = ""

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.num_processes * self.num_nodes


_RANK_OPTIONS = ("nproc", "nnodes", "node_rank", "rdzv_endpoint")


def add_rank_arguments(parser: CommandParser) -> None:
    """Adds the options that say where the ranks run."""
    group = parser.add_argument_group("ranks")
    group.add_argument(
        "--nproc",
        type=_processes,
        metavar="N",
        help="processes on this machine; auto, the default: one per GPU, or one where there is none",
    )
    group.add_argument("--nnodes", type=positive, default=1, metavar="N", help="machines of the job (default: 1)")
    group.add_argument("--node-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    group.add_argument("--rdzv-endpoint", default="", metavar="HOST:PORT", help="a free port of machine 0")


def check_rank_options(options: argparse.Namespace) -> None:
    """Refuses options of ranks that do not fit together.

    Raises:
        ConfigError: names the option, its value and what to write.
    """
    if "RANK" in os.environ:
        raise ConfigError(
            "torchrun has started this command, which starts the ranks itself: call it without torchrun, or let "
            "torchrun start a script of pipelines/"
        )
    if not 0 <= options.node_rank < options.nnodes:
        raise ConfigError(
            f"--node-rank {options.node_rank}: must be from 0 to {options.nnodes - 1} with --nnodes {options.nnodes}"
        )
    _, colon, port = options.rdzv_endpoint.rpartition(":")
    if options.rdzv_endpoint and not (colon and port.isdigit()):
        raise ConfigError(f"--rdzv-endpoint {options.rdzv_endpoint}: must be HOST:PORT, such as node0:29500")
    if options.nnodes > 1 and not options.rdzv_endpoint:
        raise ConfigError(
            f"--nnodes {options.nnodes}: name the first machine and a free port of it with --rdzv-endpoint HOST:PORT, "
            "the same on every machine"
        )


def read_ranks(options: argparse.Namespace) -> Ranks:
    """The ranks that checked options ask for; GPUs are counted where they do not say how many processes."""
    num_processes = options.nproc or _count_gpus() or 1
    return Ranks(num_processes, options.nnodes, options.node_rank, options.rdzv_endpoint)


def find_replicas(options: argparse.Namespace, section: ParallelSection) -> tuple[int, Ranks | None]:
    """The ranks of a command that uses a trained network, which may be any number of whole replicas.

    Args:
        options: of the command.
        section: layout of a replica.

    Returns:
        (ranks of the job, those that this process is to start); the second is None in a rank, and where this process is
        the only one.

    Raises:
        ConfigError: the options do not fit together, or the ranks are no whole replicas.
    """
    if "RANK" in os.environ:
        num_ranks, starting = int(os.environ["WORLD_SIZE"]), None
    else:
        check_rank_options(options)
        ranks = read_ranks(options)
        num_ranks, starting = ranks.world_size, ranks if ranks.world_size > 1 else None
    size = section.tensor * section.pipeline
    if num_ranks % size:
        raise ConfigError(
            f"{num_ranks} ranks: must be a multiple of parallel.tensor x parallel.pipeline = {size}; start {size} or a "
            "multiple, or set parallel.tensor=1 parallel.pipeline=1"
        )
    return num_ranks, starting


def rank_arguments(options: argparse.Namespace, positional: Sequence[str], repeated: Sequence[str] = ()) -> list[str]:
    """The command line of a rank: what this process was asked for, but for where the ranks run.

    Args:
        options: of the command; each is called as its flag is.
        positional: names of its positional arguments, in order.
        repeated: names of options that are given once for each of their values.
    """
    arguments: list[str] = []
    for name in positional:
        arguments += _texts(getattr(options, name))
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if name in (*positional, *_RANK_OPTIONS) or value is None or value is False:
            continue
        if value is True:
            arguments.append(flag)
        elif name in repeated:
            arguments += [f"{flag}={text}" for text in _texts(value)]
        elif isinstance(value, list):
            arguments += [flag, *_texts(value)]
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _count_gpus() -> int:
    """GPUs of this machine, counted in a process of its own: this one stays small for as long as the job runs."""
    with tempfile.TemporaryDirectory(prefix="bitdance-") as folder:
        # Not from its standard output, where a library may print as it is imported.
        count = Path(folder) / "count"
        done = subprocess.run([sys.executable, "-c", _COUNT_GPUS, str(count)], capture_output=True, check=False)
        return int(count.read_text(encoding="utf-8")) if done.returncode == 0 else 0


def launch(ranks: Ranks, module: str, arguments: Sequence[str]) -> int:
    """Runs a module as every rank of a job on this machine, with the terminal attached, and waits for its end.

    Args:
        ranks: how many, and where.
        module: what each rank runs, as with `python -m`; it ends through `train.process.run_process`.
        arguments: of every rank.

    Returns:
        The exit code of the trainer; for a fault, which leaves none, that of torchrun.

    Raises:
        BitDanceError: the refusal of the ranks, once more: torchrun's report of it came after their own words.
    """
    with tempfile.TemporaryDirectory(prefix="bitdance-") as folder:
        record = Path(folder) / "exit_code"
        environment = os.environ | {EXIT_RECORD: str(record)}
        if ranks.num_processes > 1:
            # torchrun's own choice, about which it would warn.
            environment.setdefault("OMP_NUM_THREADS", "1")
        command = [*_torchrun(ranks), "-m", module, *arguments]
        with Relay() as relay:
            code = relay.run(command, environment)
        refusal = Path(f"{record}{REFUSAL_SUFFIX}")
        if record.is_file():
            code = int(record.read_text(encoding="utf-8"))
        if refusal.is_file():
            error = _as_error(refusal.read_text(encoding="utf-8").strip())
            if code != EXIT_HUNG:
                raise error
            print(f"\n{error}", file=sys.stderr, flush=True)
    if code == EXIT_REQUEUE:
        print("\nstopped on request and saved; the same command goes on from there", file=sys.stderr, flush=True)
    # A process that a signal ended has the code that a shell gives it.
    return code if code >= 0 else 128 - code


def _torchrun(ranks: Ranks) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks.num_processes}",
        "--max-restarts=0",
        # The signals that ask to stop are this process's to pass on, and one that closes the terminal reaches all.
        "--signals-to-handle=SIGQUIT",
    ]
    if ranks.num_nodes == 1:
        return [*command, "--standalone"]
    return [
        *command,
        f"--nnodes={ranks.num_nodes}",
        f"--node-rank={ranks.node_rank}",
        # Gives the ranks in the order of the machines.
        "--rdzv-backend=static",
        f"--rdzv-endpoint={ranks.rendezvous}",
    ]


class Relay:
    """Passes requests to stop, which come as signals to this process, on to the ranks; a second Ctrl-C kills them."""

    def __init__(self) -> None:
        self._is_asked = self._is_killed = False
        self._first_sigint_s: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Relay:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def forwarded(self, num_ranks: int) -> None:
        """Called when the request was first passed on, to so many ranks."""

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Runs torchrun to its end and returns its exit code; without an environment it has that of this process."""
        # In UTF-8 whatever the locale, as the ranks read them.
        encoded = [part.encode("utf-8", "surrogateescape") for part in command]
        # An ignored signal stays ignored in the programs that a process starts. This process has one thread.
        process = subprocess.Popen(encoded, env=environment, preexec_fn=_ignore_stop_signals)  # noqa: PLW1509
        next_s = 0.0
        while process.poll() is None:
            if self._is_killed:
                self._kill(process)
            elif self._is_asked and time.monotonic() >= next_s:
                ranks = children(process.pid)
                for rank in ranks:
                    _send(rank, signal.SIGUSR1)
                if next_s == 0.0:
                    self.forwarded(len(ranks))
                next_s = time.monotonic() + REPEAT_S
            time.sleep(POLL_S)
        return process.returncode

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        ranks = children(process.pid)
        for rank in ranks:
            _send(rank, signal.SIGKILL)
        if not ranks:
            # It has not started them yet.
            process.kill()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        if number == signal.SIGINT:
            now_s = time.monotonic()
            if self._first_sigint_s is None:
                self._first_sigint_s = now_s
            elif now_s - self._first_sigint_s > SAME_SIGINT_S:
                self._is_killed = True


def children(pid: int) -> list[int]:
    """The processes that `pid` has started itself; for a torchrun, its ranks."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text(encoding="utf-8").split())
        except OSError:
            # The thread has ended.
            continue
    return found


def _ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        # It has ended since it was listed.
        return


def _as_error(refusal: str) -> BitDanceError:
    """The error that a rank has written down as `NAME: MESSAGE`."""
    name, _, message = refusal.partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, BitDanceError):
        return kind(message)
    return BitDanceError(refusal)


def _processes(text: str) -> int | None:
    return None if text == "auto" else positive(text)
