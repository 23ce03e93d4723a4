"""What a full, read-only or failing disk does to what a run shows: it is said seldom, and nothing ends or is lost."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.errors import BitDanceError, DataError
from bitdance_scale.observe import metrics, write_faults
from bitdance_scale.observe.metric_sink import EVALUATION_PANELS, STEP_PANELS, SUMMARIES
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE, Evaluation, StepMetrics, read_metrics
from bitdance_scale.observe.write_faults import WARN_EVERY_S, WriteFaults
from bitdance_scale.train import run_sinks
from bitdance_scale.train.run_sinks import RUN_ID_FILE, RecordKinds, RunSinks
from tests.distributed.spawn import run_ranks
from tests.unit.observe.test_metrics import FullDisk, point

KINDS = RecordKinds(StepMetrics, STEP_PANELS, EVALUATION_PANELS, SUMMARIES, Evaluation)


def make_sinks(folder: Path, *, is_active: bool = True, mode: str = "disabled") -> RunSinks:
    config = load_config("demo", [f"observe.wandb_mode={mode}"])
    return RunSinks(
        is_active=is_active,
        section=config.observe,
        config=config,
        run_folder=folder,
        num_steps=9,
        resumed_step=0,
        kinds=KINDS,
    )


def write(sinks: RunSinks, step: int) -> None:
    sinks.write_step(point(step), 1.0, {}, grad_norm=1.0, images_per_s=1.0, step_s=1.0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_run_goes_on_and_writes_its_lines_later(tmp_path, monkeypatch, caplog, code):
    disk = FullDisk(code)
    with make_sinks(tmp_path) as sinks:
        monkeypatch.setattr(metrics, "os", disk)
        for step in range(1, 5):
            write(sinks, step)
        disk.is_full = False
        write(sinks, 5)
    assert [line.step for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4, 5]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith(f"{METRICS_FILE}: cannot be written")


def test_lines_that_found_no_room_until_the_end_are_counted(tmp_path, monkeypatch, caplog):
    with make_sinks(tmp_path) as sinks:
        monkeypatch.setattr(metrics, "os", FullDisk())
        write(sinks, 1)
        write(sinks, 2)
    assert "2 lines of metrics.jsonl are lost" in caplog.text


def test_every_sink_and_picture_is_tolerated(tmp_path, monkeypatch, caplog):
    class Full:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def fail(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "/run/wandb")

        log = log_image = finish = fail

    monkeypatch.setattr(run_sinks, "WandbSink", Full)
    with make_sinks(tmp_path) as sinks:
        write(sinks, 1)
        sinks.write_evaluation(Evaluation(1, 0.5, {64: 0.4}, (0.3,), 9.0), 8)
        sinks.log_picture(1, "overview", tmp_path / "x.png")
    assert caplog.text.count("cannot be written") == 1
    assert (tmp_path / EVALUATION_FILE).read_bytes().count(b"\n") == 1


def test_a_cause_is_said_again_after_some_minutes(monkeypatch, caplog):
    now_s = 0.0
    monkeypatch.setattr(write_faults.time, "monotonic", lambda: now_s)
    faults = WriteFaults()
    for elapsed_s in (0.0, 1.0, WARN_EVERY_S - 1, WARN_EVERY_S + 1):
        now_s = elapsed_s
        with faults.tolerated("x"):
            raise OSError(errno.ENOSPC, "full")
    assert caplog.text.count("x: cannot be written") == 2
    with faults.tolerated("y"):
        raise OSError(errno.EIO, "broken")
    assert caplog.text.count("y: cannot be written") == 1


def test_other_errors_are_not_hidden():
    for error in (OSError(errno.EACCES, "no"), FileNotFoundError(errno.ENOENT, "no"), ValueError("no")):
        with pytest.raises(type(error)), WriteFaults().tolerated("x"):
            raise error


@pytest.mark.parametrize("content", [b"", b"  \n", b"abc\ndef\n", b"\xff\xfe", b"a/b\n", b"x" * 65])
def test_a_damaged_run_id_is_replaced(tmp_path, caplog, content):
    (tmp_path / RUN_ID_FILE).write_bytes(content)
    made = run_sinks._run_id(tmp_path, WriteFaults())
    assert len(made) == 12 and made.isalnum()
    assert (tmp_path / RUN_ID_FILE).read_text() == made + "\n"
    assert "holds no id of a W&B run" in caplog.text
    assert run_sinks._run_id(tmp_path, WriteFaults()) == made


def test_a_sound_run_id_stays(tmp_path, caplog):
    (tmp_path / RUN_ID_FILE).write_text("my-run_7\n")
    assert run_sinks._run_id(tmp_path, WriteFaults()) == "my-run_7"
    assert not caplog.text


def test_an_empty_run_id_lets_an_offline_run_start(tmp_path):
    (tmp_path / RUN_ID_FILE).write_text("")
    with make_sinks(tmp_path, mode="offline") as sinks:
        write(sinks, 1)
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def open_on(rank: int, folder: str) -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        make_sinks(Path(folder), is_active=rank == 0)
    except BitDanceError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.destroy_process_group()
    return "opened"


@pytest.mark.parametrize("name", [METRICS_FILE, EVALUATION_FILE])
def test_all_ranks_hear_of_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_text("damaged\n{}\n")
    first, second = run_ranks(2, open_on, str(tmp_path), timeout_s=60)
    assert first == second and first.startswith(f"{DataError.__name__}: ") and f"{name}, line 1" in first


def test_the_log_file_of_a_full_disk_says_so_once_and_goes_on(tmp_path, capsys):
    from bitdance_scale.observe.console import _LogFile, _Seldom

    handler = _LogFile("/dev/full", encoding="utf-8")
    _Seldom.clock._said_s.clear()
    logger = logging.getLogger("full")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        for _ in range(3):
            logger.warning("a line")
    finally:
        logger.removeHandler(handler)
        handler.close()
    errors = capsys.readouterr().err
    assert errors.count("the log cannot be written") == 1 and "Traceback" not in errors


def test_a_full_disk_under_standard_output_does_not_end_a_log_line(monkeypatch, capsys):
    from bitdance_scale.observe.console import _ConsoleHandler, _Seldom

    _Seldom.clock._said_s.clear()
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        _ConsoleHandler().emit(logging.LogRecord("x", logging.INFO, "", 0, "line", None, None))
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
