"""metrics.jsonl: what is written is read, once per step, whatever happened to the writer."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitdance_scale.errors import DataError
from bitdance_scale.observe import metrics
from bitdance_scale.observe.metrics import (
    EVALUATION_FILE,
    METRICS_FILE,
    Evaluation,
    EvaluationWriter,
    MetricsWriter,
    StepMetrics,
    StepRecord,
    append_evaluation,
    read_evaluations,
    read_metrics,
    read_records,
)

POINT = StepMetrics(
    step=1, images=8, tokens=900, loss=1.5, loss_vision=1.4, loss_text=10.0, grad_norm=2.0, lr=1e-4, step_s=0.5,
    data_wait_s=0.01, tokens_per_s=1800.0, images_per_s=16.0, mfu=None, images_by_resolution={256: 2, 512: 6},
    padding_share=0.05, memory_bytes=2**30,
)  # fmt: skip


def point(step: int, **changes: object) -> StepMetrics:
    return dataclasses.replace(POINT, step=step, images=8 * step, **changes)


def write(folder: Path, steps: range, resumed_step: int) -> None:
    with MetricsWriter(folder, resumed_step, StepMetrics) as writer:
        for step in steps:
            writer.write(point(step))


def test_written_metrics_are_read_back(tmp_path):
    with MetricsWriter(tmp_path, 0, StepMetrics) as writer:
        writer.write(point(1))
        writer.write(point(2, mfu=0.45, skipped_samples=3, skipped_steps=1))
    assert read_metrics(tmp_path / METRICS_FILE) == [point(1), point(2, mfu=0.45, skipped_samples=3, skipped_steps=1)]


def test_a_run_resumes_over_lines_that_lack_newer_fields(tmp_path):
    write(tmp_path, range(1, 2), resumed_step=0)
    path = tmp_path / METRICS_FILE
    later = ("images_by_source", "sample_errors", "steps_ready")
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in later}
    path.write_text(json.dumps(old) + "\n")
    with MetricsWriter(tmp_path, 1, StepMetrics) as writer:
        writer.write(point(2, images_by_source={"open": 12, "own": 4}))
    assert [metrics.images_by_source for metrics in read_metrics(path)] == [{}, {"open": 12, "own": 4}]


def test_lines_are_strict_json_even_when_the_loss_is_not_finite(tmp_path):
    with MetricsWriter(tmp_path, 0, StepMetrics) as writer:
        writer.write(point(1, loss=math.nan, grad_norm=math.inf))

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line, parse_constant=refuse)["loss"] is None
    (back,) = read_metrics(tmp_path / METRICS_FILE)
    assert math.isnan(back.loss) and math.isnan(back.grad_norm) and back.mfu is None


def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path):
    write(tmp_path, range(1, 8), resumed_step=0)
    write(tmp_path, range(5, 10), resumed_step=4)
    assert [metrics.step for metrics in read_metrics(tmp_path / METRICS_FILE)] == list(range(1, 10))
    assert [file.name for file in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_fresh_start_drops_everything(tmp_path):
    write(tmp_path, range(1, 4), resumed_step=0)
    write(tmp_path, range(1, 2), resumed_step=0)
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1


@pytest.mark.parametrize("tail", [b'{"step": 3, "ima', b"\x00\x00\x00", b"\xff\xfe\x0b\x85"])
def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path, tail):
    write(tmp_path, range(1, 3), resumed_step=0)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes() + tail)
    assert [metrics.step for metrics in read_metrics(path)] == [1, 2]
    write(tmp_path, range(3, 5), resumed_step=2)
    assert [metrics.step for metrics in read_metrics(path)] == [1, 2, 3, 4]


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    write(tmp_path, range(1, 3), resumed_step=0)
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text().rstrip("\n"))
    write(tmp_path, range(3, 4), resumed_step=2)
    assert [metrics.step for metrics in read_metrics(path)] == [1, 2, 3]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path):
    write(tmp_path, range(1, 4), resumed_step=0)
    path = tmp_path / METRICS_FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"step": 2}', lines[2], ""]))
    with pytest.raises(DataError, match="metrics.jsonl, line 2: .*Delete the line"):
        read_metrics(path)
    with pytest.raises(DataError, match="line 2"):
        MetricsWriter(tmp_path, 3, StepMetrics)


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from bitdance_scale.observe.metrics import MetricsWriter, StepMetrics
point = StepMetrics.from_json(sys.argv[2])
writer = MetricsWriter(Path(sys.argv[1]), 0, StepMetrics)
while True:
    writer.write(point)
    print("written", flush=True)
"""


def test_written_lines_survive_sigkill(tmp_path):
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path), point(1).to_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        for _ in range(50):
            assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert len(read_metrics(tmp_path / METRICS_FILE)) >= 50


def evaluation(step: int, loss: float = 0.5) -> Evaluation:
    return Evaluation(step, loss, {256: 0.4, 512: math.nan}, (0.1, loss), 9.0)


def test_evaluations_are_read_back_and_those_of_lost_work_are_dropped(tmp_path):
    path = tmp_path / EVALUATION_FILE
    for step in (0, 20, 40):
        append_evaluation(tmp_path, evaluation(step))
    path.write_text(path.read_text() + '{"step": 60, "vis')
    assert [line.step for line in read_evaluations(path)] == [0, 20, 40]
    append_evaluation(tmp_path, evaluation(20, loss=math.inf))
    first, last = read_evaluations(path)
    assert first.vision_by_resolution[256] == 0.4 and math.isnan(first.vision_by_resolution[512])
    assert last.step == 20 and math.isnan(last.vision) and math.isnan(last.vision_by_time[1]) and last.text == 9.0
    path.write_text('{"step": 0}\n' + first.to_json())
    with pytest.raises(DataError, match="evaluation.jsonl, line 1: .*held-out losses"):
        read_evaluations(path)


LINE = (
    '{"step": 1, "images": 8, "tokens": 900, "loss": 1.5, "loss_vision": 1.4, "loss_text": 10.0, "grad_norm": null, '
    '"lr": 0.0001, "step_s": 0.5, "data_wait_s": 0.01, "tokens_per_s": 1800.0, "images_per_s": 16.0, "mfu": null, '
    '"images_by_resolution": {"256": 2, "512": 6}, "padding_share": 0.05, "memory_bytes": 1073741824, '
    '"skipped_samples": 3, "sample_errors": {"bad_image": 3}, "steps_ready": 0, "skipped_steps": 1, '
    '"images_by_source": {"open": 8}, "spikes": 0, "slowest_rank": -1, "slowest_excess": 0.0}\n'
)
EVALUATION_LINE = (
    '{"step": 1, "vision": 0.5, "vision_by_resolution": {"256": 0.4, "512": null}, "vision_by_time": [0.1, null], '
    '"text": 9.0}\n'
)


def in_version_0_1(line: str) -> str:
    """The same line under the names of version 0.1, which had no spikes and no stragglers."""
    line = line.replace(', "spikes": 0, "slowest_rank": -1, "slowest_excess": 0.0', "")
    for name, old in [
        ("images_by_resolution", "images_by_class"),
        ("vision_by_resolution", "vision_by_class"),
        ("skipped_samples", "holes"),
        ("sample_errors", "faults"),
    ]:
        line = line.replace(f'"{name}"', f'"{old}"')
    return line


def test_a_line_keeps_its_bytes():
    assert StepMetrics.from_json(LINE).to_json() + "\n" == LINE
    assert Evaluation.from_json(EVALUATION_LINE).to_json() + "\n" == EVALUATION_LINE


def test_a_resumed_run_rewrites_metrics_of_version_0_1_under_the_new_names(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text(in_version_0_1(LINE))
    assert "images_by_class" in path.read_text() and '"holes"' in path.read_text() and '"faults"' in path.read_text()
    (line,) = read_metrics(path)
    assert line.images_by_resolution == {256: 2, 512: 6}
    assert line.skipped_samples == 3 and line.sample_errors == {"bad_image": 3}
    with MetricsWriter(tmp_path, 1, StepMetrics) as writer:
        writer.write(point(2))
    assert path.read_text() == LINE + point(2).to_json() + "\n"


def test_an_evaluation_rewrites_those_of_version_0_1_under_the_new_names(tmp_path):
    path = tmp_path / EVALUATION_FILE
    path.write_text(in_version_0_1(EVALUATION_LINE))
    assert "vision_by_class" in path.read_text()
    (line,) = read_evaluations(path)
    assert line.vision_by_resolution[256] == 0.4
    append_evaluation(tmp_path, evaluation(2))
    assert path.read_text() == EVALUATION_LINE + evaluation(2).to_json() + "\n"


@dataclasses.dataclass(frozen=True)
class TokenizerMetrics(StepRecord):
    l1: float
    psnr_db: dict[str, float] = dataclasses.field(default_factory=dict)


def test_the_lines_of_another_job_are_read_and_resumed_in_their_own_class(tmp_path):
    lines = [TokenizerMetrics(1, 0.5), TokenizerMetrics(2, 0.25, {"256x256": 31.5}), TokenizerMetrics(3, 0.125)]
    with MetricsWriter(tmp_path, 0, TokenizerMetrics) as writer:
        for line in lines:
            writer.write(line)
    path = tmp_path / METRICS_FILE
    assert path.read_text().splitlines()[1] == '{"step": 2, "l1": 0.25, "psnr_db": {"256x256": 31.5}}'
    MetricsWriter(tmp_path, 2, TokenizerMetrics).close()
    assert read_records(path, TokenizerMetrics) == lines[:2]
    append_evaluation(tmp_path, lines[0])
    assert read_records(tmp_path / EVALUATION_FILE, TokenizerMetrics) == lines[:1]
    with pytest.raises(DataError, match="line 1: expected a JSON object with the fields .*'tokens'"):
        read_metrics(path)


def test_a_value_of_another_shape_names_its_line(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text(LINE.replace('{"256": 2, "512": 6}', "8") + LINE)
    with pytest.raises(DataError, match=r"line 1: expected dict\[int, int\], got 8"):
        read_metrics(path)


class FullDisk:
    """Stands in the place of `os`: while it is full, a write takes `room` bytes and then fails."""

    def __init__(self, code: int = errno.ENOSPC) -> None:
        self.code, self.room, self.is_full = code, 0, True

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.is_full:
            if not self.room:
                raise OSError(self.code, os.strerror(self.code))
            content, self.room = content[: self.room], 0
        return os.write(descriptor, content)


@pytest.mark.parametrize("room", [0, 1, 100, 300])
def test_lines_wait_for_room_and_none_is_lost_or_torn(tmp_path, monkeypatch, room):
    disk = FullDisk()
    with MetricsWriter(tmp_path, 0, StepMetrics) as writer:
        writer.write(point(1))
        monkeypatch.setattr(metrics, "os", disk)
        for step in (2, 3):
            disk.room = room
            with pytest.raises(OSError, match="No space left"):
                writer.write(point(step))
        assert len(writer.waiting) == 2
        disk.is_full = False
        writer.write(point(4))
        assert not writer.waiting
    assert read_metrics(tmp_path / METRICS_FILE) == [point(step) for step in range(1, 5)]
    assert (tmp_path / METRICS_FILE).read_bytes().count(b"\n") == 4


def test_lines_that_wait_are_written_at_the_end(tmp_path, monkeypatch):
    disk = FullDisk(errno.EDQUOT)
    writer = MetricsWriter(tmp_path, 0, StepMetrics)
    monkeypatch.setattr(metrics, "os", disk)
    with pytest.raises(OSError, match="quota"):
        writer.write(point(1))
    disk.is_full = False
    writer.close()
    assert read_metrics(tmp_path / METRICS_FILE) == [point(1)]


def test_what_waits_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_WAITING_LINES", 3)
    disk = FullDisk()
    writer = MetricsWriter(tmp_path, 0, StepMetrics)
    monkeypatch.setattr(metrics, "os", disk)
    for step in range(1, 6):
        with pytest.raises(OSError):
            writer.write(point(step))
    disk.is_full = False
    writer.close()
    assert [line.step for line in read_metrics(tmp_path / METRICS_FILE)] == [3, 4, 5]


def test_evaluations_wait_for_room(tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    writer = EvaluationWriter(tmp_path, Evaluation)
    writer.write(evaluation(1))
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "write_text", full)
        with pytest.raises(OSError):
            writer.write(evaluation(2))
    writer.write(evaluation(3))
    assert read_evaluations(tmp_path / EVALUATION_FILE) == [evaluation(step) for step in (1, 2, 3)]
