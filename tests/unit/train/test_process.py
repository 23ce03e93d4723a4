"""A stop is requested once, agreed by all ranks, and a second interrupt kills."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from bitdance_scale.errors import ConfigError
from bitdance_scale.parallel.agreement import any_rank
from bitdance_scale.train import process
from bitdance_scale.train.process import (
    EXIT_RECORD,
    EXIT_REFUSED,
    EXIT_REQUEUE,
    REFUSAL_SUFFIX,
    SAME_SIGINT_S,
    STEP_SUFFIX,
    StopRequest,
    record_step,
    run_process,
)
from tests.distributed.spawn import run_ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_becomes_a_request(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), number)
        assert stop.signal_name == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == number.name, "the first signal is the one named"
    assert signal.getsignal(number) == before


def stop_of_one_rank(rank: int, rank_asked: int) -> None:
    dist.init_process_group("gloo")
    with StopRequest() as stop:
        assert not any_rank(stop.is_requested)
        if rank == rank_asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert any_rank(stop.is_requested)
        assert (stop.signal_name is not None) == (rank == rank_asked)
    dist.destroy_process_group()


def test_a_signal_to_one_rank_stops_all():
    run_ranks(2, stop_of_one_rank, 1, timeout_s=60)


WAIT = """
import time
from bitdance_scale.errors import ConfigError
from bitdance_scale.parallel.agreement import any_rank
from bitdance_scale.train import process
from bitdance_scale.train.process import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        if stop.signal_name is not None:
            print("asked", flush=True)
"""


def test_a_second_sigint_kills():
    with subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        # A launcher's copy of the same interrupt; then, after longer than that takes, a second one.
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        time.sleep(SAME_SIGINT_S + 0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_the_exit_code_is_told_apart_from_success_failure_and_signals():
    # Launch scripts rely on the number.
    assert EXIT_REQUEUE == 75


def test_a_refusal_is_told_to_the_launcher_and_to_torchrun(tmp_path, monkeypatch, capsys):
    record, error_file = tmp_path / "exit_code", tmp_path / "error.json"
    monkeypatch.setenv(EXIT_RECORD, str(record))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    monkeypatch.setattr(process, "FIRST_RANK_AHEAD_S", 0.0)

    def refuse() -> int:
        raise ConfigError("run.steps = 0: must be 1 or more")

    monkeypatch.setenv("RANK", "1")
    assert run_process(refuse) == EXIT_REFUSED
    # Every rank has the same error, and one prints it; torchrun reports the rank that ended first.
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"] and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert run_process(refuse) == EXIT_REFUSED
    message = "ConfigError: run.steps = 0: must be 1 or more"
    assert capsys.readouterr().err == f"\n{message}\n"
    assert record.read_text() == f"{EXIT_REFUSED}\n"
    assert Path(f"{record}{REFUSAL_SUFFIX}").read_text() == f"{message}\n"
    # As torchrun reads it.
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=EXIT_REFUSED, error_file=str(error_file))
    assert failure.message["message"] == message


def test_a_refusal_that_names_a_file_of_another_encoding_is_told_too(tmp_path, monkeypatch, capsys):
    record = tmp_path / "exit_code"
    monkeypatch.setenv(EXIT_RECORD, str(record))

    def refuse() -> int:
        raise ConfigError("caf\udce9.tar: sample caf\udce9 has no label")

    def fill() -> int:
        raise OSError(errno.ENOSPC, "said by the system", "/data/caf\udce9/metrics")

    for action, message in ((refuse, r"caf\xe9.tar: sample caf\xe9 has no label"), (fill, r"/data/caf\xe9/metrics: ")):
        assert run_process(action) == EXIT_REFUSED
        assert message in capsys.readouterr().err
        assert record.read_text() == f"{EXIT_REFUSED}\n"
        assert message in Path(f"{record}{REFUSAL_SUFFIX}").read_text(encoding="utf-8")
        record.unlink()


def test_an_error_of_the_program_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv(EXIT_RECORD, str(tmp_path / "exit_code"))
    with pytest.raises(ZeroDivisionError):
        run_process(lambda: 1 // 0)
    assert list(tmp_path.iterdir()) == []


NO_ROOM = """
import errno, sys
from bitdance_scale.train.process import run_process
def action():
    raise OSError(int(sys.argv[1]), "said by the system", "/data/runs/x/metrics")
sys.exit(run_process(action))
"""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("rank", [0, 1])
def test_no_room_is_a_refusal_of_any_rank(tmp_path, code, rank):
    record = tmp_path / "exit_code"
    environment = os.environ | {EXIT_RECORD: str(record), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-c", NO_ROOM, str(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_REFUSED and "Traceback" not in result.stderr
    assert "/data/runs/x/metrics: cannot be written (said by the system): make room, raise the quota" in result.stderr
    assert record.read_text() == "2\n"
    assert "make room" in Path(f"{record}{REFUSAL_SUFFIX}").read_text()


def test_an_error_of_the_machine_is_no_refusal(tmp_path):
    environment = os.environ | {EXIT_RECORD: str(tmp_path / "exit_code")}
    command = [sys.executable, "-c", NO_ROOM, str(errno.EIO)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" in result.stderr and list(tmp_path.iterdir()) == []


def test_standard_output_on_a_full_disk_does_not_change_the_code():
    program = (
        "import sys; from bitdance_scale.train.process import run_process, tolerant_output\n"
        "def action():\n    with tolerant_output():\n        print('x', flush='flush' in sys.argv)\n    return 75\n"
        "sys.exit(run_process(action))"
    )
    for arguments in ([], ["flush"]):
        command = [sys.executable, "-c", program, *arguments]
        with open("/dev/full", "w", encoding="utf-8") as full:
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
        assert result.returncode == EXIT_REQUEUE, result.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_prompt_is_printed_in_any_locale(encoding):
    program = (
        "import sys; from bitdance_scale.errors import ConfigError\n"
        "from bitdance_scale.train.process import run_process\n"
        "def action():\n    print('\\u732b'); raise ConfigError('\\u732b')\n"
        "sys.exit(run_process(action))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert result.returncode == EXIT_REFUSED
    assert result.stdout == b"\\u732b\n" and b"ConfigError: \\u732b" in result.stderr


def test_the_step_of_a_checkpoint_is_left_beside_the_record(tmp_path, monkeypatch):
    monkeypatch.delenv(EXIT_RECORD, raising=False)
    record_step(3)
    monkeypatch.setenv(EXIT_RECORD, str(tmp_path / "exit_code"))
    record_step(3)
    record_step(7)
    assert (tmp_path / f"exit_code{STEP_SUFFIX}").read_text() == "7\n" and len(list(tmp_path.iterdir())) == 1
