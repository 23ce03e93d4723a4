"""What a run prints and logs."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import os
import pty
import subprocess
import sys

import pytest

from bitdance_scale.observe import console
from bitdance_scale.observe.console import ConsoleProgress, loss_table, setup_logging
from tests.unit.observe.test_metrics import point


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def restored_logging():
    """Puts the handlers and levels of the test process back."""
    root = logging.getLogger()
    package = logging.getLogger(console.PACKAGE)
    handlers, level, package_level = list(root.handlers), root.level, package.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    package.setLevel(package_level)
    logging.captureWarnings(False)


def test_the_table_has_the_first_step_and_ten_ranges():
    metrics = [point(step, loss_vision=100.0 / step, lr=step * 1e-5) for step in range(1, 102)]
    header, rule, *rows = loss_table(metrics).splitlines()
    assert header.split()[:4] == ["steps", "images", "loss", "vision"]
    assert len(rule) == len(header)
    assert [row.split()[0] for row in rows[:3]] == ["1", "2-11", "12-21"]
    assert rows[0].split()[3] == "100.0000"
    assert rows[1].split()[3] == f"{sum(100 / step for step in range(2, 12)) / 10:.4f}"
    assert rows[-1].split()[:2] == ["92-101", "808"]
    assert len(rows) == 11


def test_the_table_of_a_short_run_has_a_row_per_step():
    assert len(loss_table([point(1)]).splitlines()) == 3
    rows = loss_table([point(step) for step in range(1, 5)]).splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"]


def test_the_table_leaves_losses_that_are_not_finite_out():
    metrics = [point(step, loss=2.0) for step in range(1, 22)]
    metrics[1] = dataclasses.replace(metrics[1], loss=math.nan)
    rows = loss_table(metrics).splitlines()[2:]
    assert rows[1].split()[2] == "2.0000"
    assert loss_table([point(1, loss=math.nan)]).splitlines()[2].split()[2] == "nan"


def show(progress: ConsoleProgress, step: int, step_s: float = 0.5, **parts: float) -> None:
    progress.update(step, 1.5, parts, grad_norm=2.0, images_per_s=16.0, step_s=step_s)


def test_plain_lines_come_at_intervals_and_at_the_end(monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    progress = ConsoleProgress(num_steps=10, resumed_step=0, stream=stream)
    for step in range(1, 11):
        show(progress, step, vision=1.4, text=10.0)
    progress.close()
    lines = stream.getvalue().splitlines()
    # A step every 4 seconds and a line at most every 10.
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[0] == ("step 1/10  loss 1.5000 (vision 1.4000, text 10.0000)  grad norm 2  16 images/s, ETA 0:00:04")
    assert "\r" not in stream.getvalue()


def test_a_loss_without_parts_is_shown_alone():
    stream = io.StringIO()
    show(ConsoleProgress(num_steps=1, resumed_step=0, stream=stream), 1)
    assert stream.getvalue() == "step 1/1  loss 1.5000  grad norm 2  16 images/s, ETA 0:00:00\n"


def test_a_terminal_gets_a_bar_with_loss_speed_and_remaining_time():
    stream = Terminal()
    progress = ConsoleProgress(num_steps=10, resumed_step=4, stream=stream)
    show(progress, 6, step_s=90.0)
    progress.close()
    last = stream.getvalue().rsplit("\r", maxsplit=1)[-1]
    assert "loss 1.5000" in last and "6/10" in last and "16 images/s, ETA 0:06:00" in last


BAR = """
from bitdance_scale.observe.console import ConsoleProgress
progress = ConsoleProgress(num_steps=10, resumed_step=0)
progress.update(7, 1.5, {}, grad_norm=2.0, images_per_s=16.0, step_s=0.5)
progress.close()
"""


def test_a_terminal_that_does_not_tell_its_size_gets_the_bar_too():
    controller, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", BAR], stdout=terminal, check=True)
    os.close(terminal)
    shown = os.read(controller, 65536).decode()
    os.close(controller)
    assert "7/10" in shown and "loss 1.5000" in shown


def test_rank_0_logs_to_the_console_and_to_log_txt(tmp_path, capsys, restored_logging):
    setup_logging(tmp_path, rank=0)
    logging.getLogger("bitdance_scale.train").info("step taken")
    logging.getLogger("bitdance_scale.train").warning("disk is slow")
    logging.getLogger("elsewhere").info("chatter")
    assert capsys.readouterr().out.splitlines() == ["step taken", "warning: disk is slow"]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split("[rank 0] ")[1] for line in lines] == [
        "INFO bitdance_scale.train: step taken",
        "WARNING bitdance_scale.train: disk is slow",
    ]


def test_names_of_another_encoding_are_logged_with_escapes(tmp_path, capsys, restored_logging):
    setup_logging(tmp_path, rank=0)
    logging.getLogger("elsewhere").warning("%s cannot be read", "caf\udce9.tar")
    assert capsys.readouterr().out == "warning: caf\\xe9.tar cannot be read\n"
    assert r"caf\xe9.tar cannot be read" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_another_rank_logs_its_warnings_to_a_file_of_its_own(tmp_path, capsys, restored_logging):
    setup_logging(tmp_path, rank=3)
    file = tmp_path / "logs" / "rank_00003.txt"
    logging.getLogger("bitdance_scale.train").info("step taken")
    assert not file.exists()
    logging.getLogger("elsewhere").warning("disk is slow")
    logging.getLogger("bitdance_scale.train").error("disk is full")
    assert [line.split(" ", 2)[2] for line in file.read_text().splitlines()] == [
        "[rank 3] WARNING elsewhere: disk is slow",
        "[rank 3] ERROR bitdance_scale.train: disk is full",
    ]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[rank 3] disk is full\n"


def test_python_warnings_are_logged(tmp_path):
    program = (
        "import sys, warnings; from pathlib import Path;"
        "from bitdance_scale.observe.console import setup_logging;"
        "setup_logging(Path(sys.argv[1]), 0); warnings.warn('old call', DeprecationWarning)"
    )
    subprocess.run([sys.executable, "-W", "always", "-c", program, str(tmp_path)], check=True, capture_output=True)
    assert "old call" in (tmp_path / "log.txt").read_text()
