"""How ranks are started and what is made of their end, with small programs as ranks."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitdance_scale.cli import launch
from bitdance_scale.cli.command import CommandParser
from bitdance_scale.cli.launch import Ranks
from bitdance_scale.errors import BitDanceError, DataError

ROOT = Path(__file__).parents[3]
# In the place of torchrun: starts one rank, a program that writes the record and ends as told, and waits for it.
AGENT = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
sys.exit(1 if process.wait() else 0)
"""
RECORD = "import os; write = lambda end, text: open(os.environ['BITDANCE_EXIT_RECORD'] + end, 'w').write(text);"


def run(program: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(launch, "_torchrun", lambda ranks: [sys.executable, "-c", AGENT, program])
    return launch.launch(Ranks(1), "unused", [])


@pytest.mark.parametrize(("recorded", "status", "code"), [("0", 0, 0), ("75", 75, 75), ("2", 2, 2), (None, 5, 1)])
def test_the_exit_code_is_the_trainers(recorded, status, code, monkeypatch):
    write = "" if recorded is None else f"write('', '{recorded}\\n');"
    assert run(f"{RECORD} {write} raise SystemExit({status})", monkeypatch) == code


@pytest.mark.parametrize(
    ("refusal", "kind", "message"),
    [
        ("DataError: no such\n- shard", DataError, "no such\n- shard"),
        ("SomethingElse: oh", BitDanceError, "SomethingElse: oh"),
    ],
)
def test_a_refusal_is_raised_again(refusal, kind, message, monkeypatch):
    with pytest.raises(kind) as error:
        run(f"{RECORD} write('.refusal', {refusal!r}); write('', '2'); raise SystemExit(2)", monkeypatch)
    assert str(error.value) == message


def test_a_rank_killed_by_a_signal_has_the_code_of_a_shell(monkeypatch):
    monkeypatch.setattr(launch, "_torchrun", lambda ranks: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert launch.launch(Ranks(1), "unused", []) == 128 + signal.SIGKILL


@pytest.mark.parametrize(("then", "count"), [("", 3), ("raise OSError", 0)])
def test_gpus_are_counted_whatever_a_library_prints(then, count, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(
        f"print('hello from a plugin')\nclass cuda:\n    device_count = lambda: 3\n{then}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch._count_gpus() == count


# A rank that takes its time before it listens, ends with 75 when it is asked to, and shows that it lives.
LISTENER = (
    RECORD
    + """
import signal, sys, time
def stop(number, frame):
    write('', '75'); sys.exit(75)
time.sleep(0.5)
signal.signal(signal.SIGUSR1, stop)
write('.lives', '')
time.sleep(60)
"""
)
STARTER = """
import sys
from bitdance_scale.cli import launch
launch._torchrun = lambda ranks: [sys.executable, "-c", sys.argv[1], sys.argv[2]]
launch.REPEAT_S = 0.3
sys.exit(launch.launch(launch.Ranks(1), "unused", []))
"""


def start(rank: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STARTER, AGENT, rank]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def rank_of(process: subprocess.Popen[str]) -> int:
    """The process that the agent of a starter has started."""
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        for agent in launch.children(process.pid):
            for rank in launch.children(agent):
                return rank
        time.sleep(0.05)
    raise AssertionError("no rank was started")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_reaches_a_rank_that_does_not_listen_yet(number):
    process = start(LISTENER)
    try:
        rank_of(process)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 75 and "the same command goes on from there" in printed


def test_a_second_interrupt_kills(tmp_path):
    process = start("import time; time.sleep(60)")
    try:
        rank = rank_of(process)
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and not Path(f"/proc/{rank}").exists()


def test_a_rank_is_told_what_the_command_was_told():
    def parse(arguments: list[str]) -> argparse.Namespace:
        parser = CommandParser("command", None)
        parser.add_argument("folder", type=Path)
        parser.add_argument("shards", nargs="+")
        parser.add_argument("--sizes", nargs="+", type=int, default=[256])
        parser.add_argument("--num-images", type=int)
        parser.add_argument("--is-quick", action="store_true")
        parser.add_argument("--is-slow", action="store_true")
        launch.add_rank_arguments(parser)
        return parser.parse(arguments)

    ranks = ["--nproc=2", "--nnodes=3", "--node-rank=1", "--rdzv-endpoint=node0:29500"]
    given = ["a", "b", "c", "--sizes", "32", "64", "--num-images=-3", "--is-quick"]
    command = launch.rank_arguments(parse([*given, *ranks]), ("folder", "shards"))
    assert command == given
    assert vars(parse(command)) == vars(parse(given))


def test_ranks_are_given_an_option_once_for_each_value() -> None:
    options = argparse.Namespace(folder="a", adapter=["one=0.5", "two"])
    assert launch.rank_arguments(options, ("folder",), repeated=("adapter",)) == [
        "a",
        "--adapter=one=0.5",
        "--adapter=two",
    ]


def test_under_torchrun_the_command_is_refused(monkeypatch, capsys):
    from bitdance_scale.cli.main import main

    monkeypatch.setenv("RANK", "0")
    assert main(["train", "demo"]) == 2
    assert "call it without torchrun" in capsys.readouterr().err
