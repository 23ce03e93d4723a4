"""The W&B sink: offline without a prompt or the network, and whatever ends or falls silent, one folder to be synced."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2
from wandb.proto.wandb_internal_pb2 import HistoryItem, SummaryItem

from bitdance_scale.config.schema import ObserveSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.observe import wandb_sink
from bitdance_scale.observe.benchmark_scores import BenchmarkScores, benchmark_panels
from bitdance_scale.observe.metric_sink import (
    EVALUATION_PANELS,
    IMAGES,
    STEP,
    STEP_PANELS,
    SUMMARIES,
    panel_values,
)
from bitdance_scale.observe.metrics import Evaluation, StepMetrics, StepRecord
from bitdance_scale.observe.wandb_sink import WandbSink
from tests.unit.observe.test_metrics import POINT

ROOT = Path(__file__).parents[3]
PROGRAM = """
import dataclasses
import sys
from pathlib import Path
import numpy as np
from bitdance_scale.config.schema import ObserveSection
from bitdance_scale.observe.benchmark_scores import BenchmarkScores, benchmark_panels
from bitdance_scale.observe.figures import image_grid
from bitdance_scale.observe.metrics import Evaluation, StepMetrics
from bitdance_scale.observe.metric_sink import EVALUATION_PANELS, STEP_PANELS
from bitdance_scale.observe.wandb_sink import WandbSink

folder = Path(sys.argv[1])
sink = WandbSink(ObserveSection(), folder, {"run": {"steps": 2}}, run_id="abc123")
point = StepMetrics(
    step=1, images=8, tokens=900, loss=1.5, loss_vision=1.4, loss_text=10.0, grad_norm=2.0, lr=1e-4, step_s=0.5,
    data_wait_s=0.01, tokens_per_s=1800.0, images_per_s=16.0, mfu=None, images_by_resolution={256: 2, 512: 6},
    padding_share=0.05, memory_bytes=2**30,
)
sink.log(point, STEP_PANELS)
image_grid([np.zeros((8, 8, 3), dtype=np.uint8)], ["black"], folder / "grid.png", columns=1)
sink.log(Evaluation(1, 0.5, {256: 0.4, 512: 0.6}, (0.3, 0.7), 9.0), EVALUATION_PANELS, images=8)
sink.log_image(1, "samples", folder / "grid.png", "black")
sink.log(dataclasses.replace(point, step=2, loss_vision=1.6, mfu=0.25), STEP_PANELS)
sink.log(Evaluation(3, 0.8, {256: 0.7, 512: 0.9}, (0.6, 1.0), 9.0), EVALUATION_PANELS, images=24)
low, high = {"overall": 20.0}, {"overall": 28.0}
scores = BenchmarkScores(3, "demo-scenes", "clip-score", {"overall": 24.0}, low, high, 8, 1.5)
sink.log(scores, benchmark_panels(scores), images=24)
sink.finish()
print(sink.mode)
"""


def bare_environment(home: Path, **extra: str) -> dict[str, str]:
    """The environment without any W&B setting or credential."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    return kept | {"HOME": str(home), "XDG_CONFIG_HOME": str(home)} | extra


@pytest.mark.timeout(120)
def test_without_a_key_the_run_is_offline_silent_and_off_the_network(tmp_path):
    # Every connection to a web server would go through this proxy, and so be noticed.
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = bare_environment(tmp_path, HTTP_PROXY=address, HTTPS_PROXY=address)
        # A terminal as standard input: wandb asks for a key only where somebody could answer.
        controller, terminal = pty.openpty()
        run_folder = tmp_path / "runs" / "demo"
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(run_folder)],
            env=environment, stdin=terminal, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        os.close(controller)
        os.close(terminal)
        assert result.returncode == 0, result.stderr
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert result.stdout == "offline\n"
    assert result.stderr == ""
    (folder,) = (run_folder / "wandb").glob("offline-run-*-abc123")
    assert (folder / "run-abc123.wandb").stat().st_size > 0
    assert list(folder.glob("files/media/images/samples_1_*.png"))
    check_points(folder / "run-abc123.wandb")


def check_points(path: Path) -> None:
    """What PROGRAM logged is in the run, under sections over the optimiser step, with the summaries meant."""
    records = list(read_run(path))
    points = [values(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [point["progress/step"] for point in points] == [1, 2, 3] == [point["_step"] for point in points]
    # The last has no metrics of its own step: images are an x-axis all the same.
    assert [point["progress/images"] for point in points] == [8, 8, 24]
    assert points[0]["loss/flow"] == 1.4 and points[0]["data/images_512_px"] == 6
    assert points[0]["speed/memory_gib"] == 1.0 and points[0]["data/wait_share"] == 0.02
    assert points[0]["evaluate/flow_512_px"] == 0.6 and points[0]["evaluate/flow_time_2_of_2"] == 0.7
    assert "speed/mfu" not in points[0] and points[1]["speed/mfu"] == 0.25

    summary = {}
    for record in records:
        summary |= values(record.summary.update)
    named = {name: value for name, value in summary.items() if name.partition("/")[0] in SUMMARIES}
    assert len(named) == 34 and named.pop("progress/step") == 3
    # What no definition covers would be a bare number.
    for name, value in named.items():
        assert list(value) == [SUMMARIES[name.partition("/")[0]]], name
    assert summary["loss/flow"] == {"last": 1.6} and summary["evaluate/flow"] == {"min": 0.5}

    assert summary["benchmark/demo_scenes/clip_score/overall"] == {"max": 24.0}
    assert summary["benchmark/demo_scenes/clip_score/overall_low"] == {"max": 20.0}

    definitions = {record.metric.glob_name: record.metric.step_metric for record in records if record.metric.glob_name}
    assert definitions == {f"{section}/*": "progress/step" for section in SUMMARIES}


def read_run(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format."""
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        # 1: whole, 4: the last part.
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def values(items: Iterable[HistoryItem | SummaryItem]) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


@pytest.mark.parametrize(("kind", "panels"), [(StepMetrics, STEP_PANELS), (Evaluation, EVALUATION_PANELS)])
def test_every_field_has_a_panel(kind, panels):
    assert {field.name for field in dataclasses.fields(kind)} | {"wait_share"} >= panels.keys()
    assert {field.name for field in dataclasses.fields(kind)} <= panels.keys()


def test_every_section_has_a_summary():
    scores = BenchmarkScores(1, "demo-scenes", "clip-score", {}, {}, {}, 1, 1.0)
    names = [*STEP_PANELS.values(), *EVALUATION_PANELS.values(), *filter(None, benchmark_panels(scores).values())]
    assert {name.partition("/")[0] for name in names} == SUMMARIES.keys()


def test_a_field_without_a_name_is_refused():
    lacking = {name: panel for name, panel in STEP_PANELS.items() if name != "lr"}
    with pytest.raises(ValueError, match=r"no name in W&B for \['lr'\] of StepMetrics"):
        panel_values(POINT, lacking)


@dataclasses.dataclass(frozen=True)
class TokenizerMetrics(StepRecord):
    l1: float
    entropy: dict[str, float]


def test_a_record_of_another_job_is_logged_by_a_table_of_its_own():
    panels = {"step": STEP, "l1": "loss/l1", "entropy": "loss/entropy_{}"}
    logged = panel_values(TokenizerMetrics(5, 0.25, {"token": 0.5, "codebook": 3.0}), panels)
    assert logged == {STEP: 5, "loss/l1": 0.25, "loss/entropy_token": 0.5, "loss/entropy_codebook": 3.0}


def test_every_value_is_logged_once():
    point = dataclasses.replace(
        POINT, mfu=0.4, images_by_source={"open": 5, "own": 3, "drawn": 0}, sample_errors={"bad_image": 2}
    )
    logged = panel_values(point, STEP_PANELS)
    parts = (point.images_by_resolution, point.images_by_source, point.sample_errors)
    # `wait_share` is no field.
    assert len(logged) == len(dataclasses.fields(StepMetrics)) + 1 - len(parts) + sum(map(len, parts))
    assert logged["data/wait_share"] == point.data_wait_s / point.step_s
    assert logged["data/images_of_own"] == 3 and logged["data/sample_errors_bad_image"] == 2
    assert logged["loss/flow"] == point.loss_vision and logged["data/images_256_px"] == 2
    evaluation = Evaluation(1, 0.5, {256: 0.4, 512: 0.6}, (0.1, 0.2, 0.3), 9.0)
    assert list(panel_values(evaluation, EVALUATION_PANELS).values()) == [1, 0.5, 0.4, 0.6, 0.1, 0.2, 0.3, 9.0]
    # W&B takes a dot for a path, and does not find its definition.
    assert not any("." in name for name in [*logged, *panel_values(evaluation, EVALUATION_PANELS), IMAGES])


UNREACHABLE = """
import logging, sys
from pathlib import Path
from bitdance_scale.config.schema import ObserveSection
from bitdance_scale.observe import wandb_sink

logging.basicConfig(format="%(message)s")
wandb_sink.INIT_TIMEOUT_S = 2.0
sink = wandb_sink.WandbSink(ObserveSection(wandb_mode=sys.argv[2]), Path(sys.argv[1]), {}, run_id="abc123")
sink.finish()
print(sink.mode)
"""


def start_without_a_server(tmp_path: Path, mode: str) -> subprocess.CompletedProcess[str]:
    """Starts a run with a key, but a server address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    environment = bare_environment(tmp_path, WANDB_API_KEY="k" * 40, WANDB_BASE_URL=address)
    command = [sys.executable, "-c", UNREACHABLE, str(tmp_path / "demo"), mode]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.timeout(120)
def test_auto_goes_offline_with_a_warning_when_the_server_does_not_answer(tmp_path):
    result = start_without_a_server(tmp_path, "auto")
    assert result.stdout == "offline\n", result.stderr
    assert "W&B could not go online" in result.stderr
    assert list((tmp_path / "demo" / "wandb").glob("offline-run-*-abc123"))


@pytest.mark.timeout(120)
def test_online_is_refused_when_the_server_does_not_answer(tmp_path):
    result = start_without_a_server(tmp_path, "online")
    assert result.returncode == 1
    assert "ConfigError: observe.wandb_mode = online: W&B refused the run" in result.stderr


LOST_SERVICE = """
import dataclasses, logging, os, signal, sys, time
from pathlib import Path
from bitdance_scale.cli.launch import children
from bitdance_scale.config.schema import ObserveSection
from bitdance_scale.observe.metric_sink import STEP_PANELS
from bitdance_scale.observe.wandb_sink import WandbSink
from tests.unit.observe.test_metrics import POINT

logging.basicConfig(format="%(message)s")
sink = WandbSink(ObserveSection(), Path(sys.argv[1]), {}, run_id="abc123")
sink.log(POINT, STEP_PANELS)
(service,) = (pid for pid in children(os.getpid()) if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes())
os.kill(service, signal.SIGKILL)
os.waitid(os.P_PID, service, os.WEXITED | os.WNOWAIT)
# wandb notices it a moment later.
for step in range(2, 2 + int(sys.argv[2])):
    sink.log(dataclasses.replace(POINT, step=step), STEP_PANELS)
    time.sleep(0.1)
sink.finish()
sink.log_image(9, "samples", Path("absent.png"), "nothing")
print("went on")
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_logged", [10, 0])
def test_a_run_goes_on_without_the_service_of_wandb(tmp_path, num_logged):
    # The system ends the largest processes where memory is short.
    result = subprocess.run(
        [sys.executable, "-c", LOST_SERVICE, str(tmp_path / "demo"), str(num_logged)],
        cwd=ROOT, env=bare_environment(tmp_path), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout == "went on\n", result.stderr
    assert result.stderr.count("W&B's service has ended") == 1, result.stderr
    (folder,) = (tmp_path / "demo" / "wandb").glob("offline-run-*-abc123")
    assert f"`wandb sync {folder}`" in result.stderr


class SilentServer(ThreadingHTTPServer):
    """A W&B server that accepts a run and then answers nothing any more."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.is_over = threading.Event()
        self.queries: list[str] = []


class _Answers(BaseHTTPRequestHandler):
    server: SilentServer

    def do_POST(self) -> None:
        """Answers the queries of a start; everything else waits until the test is over."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        query = json.loads(body).get("query", "").strip() if self.path == "/graphql" else self.path
        self.server.queries.append(query)
        project = {"name": "bitdance_scale", "entity": {"name": "tester"}}
        run = {"id": "UnVuOjE=", "name": "abc123", "displayName": "demo", "historyLineCount": 0, "project": project}
        answers = {
            "query Viewer": {"viewer": {"id": "VXNlcjox", "entity": "tester", "flags": "{}"}},
            "query ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "query RunResumeStatus": {"model": {"id": "1", "name": "bitdance_scale", "entity": {}, "bucket": None}},
            "mutation UpsertBucket": {"upsertBucket": {"bucket": run, "inserted": True}},
        }
        for start, data in answers.items():
            if query.startswith(start):
                self._send({"data": data})
                return
        self.server.is_over.wait(100)

    def _send(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""


OUTAGE = """
import logging, sys, time
from pathlib import Path
from bitdance_scale.config.schema import ObserveSection
from bitdance_scale.observe import wandb_sink
from bitdance_scale.observe.metric_sink import STEP_PANELS
from tests.unit.observe.test_metrics import POINT

logging.basicConfig(format="%(message)s")
wandb_sink.FINISH_TIMEOUT_S = 2.0
sink = wandb_sink.WandbSink(ObserveSection(wandb_mode="online"), Path(sys.argv[1]), {}, run_id="abc123")
sink.log(POINT, STEP_PANELS)
begun_s = time.monotonic()
sink.finish()
print(sink.mode, time.monotonic() - begun_s < 30)
"""


@pytest.mark.timeout(120)
def test_the_end_does_not_wait_for_a_server_that_answers_no_more(tmp_path):
    with SilentServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            result = subprocess.run(
                [sys.executable, "-c", OUTAGE, str(tmp_path / "demo")],
                cwd=ROOT, env=bare_environment(tmp_path, WANDB_API_KEY="k" * 40, WANDB_BASE_URL=address),
                capture_output=True, text=True, timeout=90, check=False,
            )  # fmt: skip
        finally:
            server.is_over.set()
            server.shutdown()
    assert result.returncode == 0 and result.stdout == "online True\n", (result.stderr, server.queries)
    (folder,) = (tmp_path / "demo" / "wandb").glob("run-*-abc123")
    assert f"W&B has not taken all data within 2 s; they are on the disk, and `wandb sync {folder}`" in result.stderr


def test_the_end_of_a_run_has_a_limit(tmp_path, monkeypatch):
    given = {}
    run = SimpleNamespace(define_metric=lambda *args, **options: None)
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or run)
    sink = WandbSink(ObserveSection(wandb_mode="disabled"), tmp_path, {}, "x")
    sink.mode = "online"
    assert sink._start(ObserveSection(), tmp_path, {}, "x") is run
    assert given["settings"].finish_timeout == wandb_sink.FINISH_TIMEOUT_S > 0
    assert given["settings"].finish_timeout_raises


def test_disabled_never_imports_wandb(tmp_path):
    program = (
        "import sys; from pathlib import Path; from bitdance_scale.config.schema import ObserveSection;"
        "from bitdance_scale.observe.wandb_sink import WandbSink;"
        "sink = WandbSink(ObserveSection(wandb_mode='disabled'), Path(sys.argv[1]), {}, 'x');"
        "sink.finish(); print(sink.mode, 'wandb' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout == "disabled False\n"
    assert not (tmp_path / "wandb").exists()


def choose(monkeypatch, tmp_path: Path, setting: str, *, mode: str = "online", **environment: str) -> str:
    """The mode chosen in an environment that holds nothing else; `mode` is wandb's own setting."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "NETRC"))]:
        monkeypatch.delenv(name)
    for name, value in (environment | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    settings = SimpleNamespace(mode=mode, api_key=None, base_url="https://wandb.example.org")
    return wandb_sink.choose_mode(setting, settings)


def test_auto_is_online_only_with_a_key(monkeypatch, tmp_path):
    assert choose(monkeypatch, tmp_path, "auto") == "offline"
    assert choose(monkeypatch, tmp_path, "auto", WANDB_API_KEY="k" * 40) == "online"


@pytest.mark.parametrize(
    ("host", "expected"), [("wandb.example.org", "online"), ("api.wandb.ai", "online"), ("github.example", "offline")]
)
def test_a_key_in_netrc_counts(monkeypatch, tmp_path, host, expected):
    (tmp_path / ".netrc").write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert choose(monkeypatch, tmp_path, "auto") == expected


def test_a_key_for_another_server_does_not_count(monkeypatch, tmp_path):
    (tmp_path / "keys").write_text(f"machine api.wandb.ai\n  login user\n  password {'k' * 40}\n")
    environment = {"NETRC": str(tmp_path / "keys"), "WANDB_BASE_URL": "https://wandb.example.org"}
    assert choose(monkeypatch, tmp_path, "auto", **environment) == "offline"


def test_the_environment_can_switch_auto_off_but_not_a_stated_mode(monkeypatch, tmp_path):
    key = {"WANDB_API_KEY": "k" * 40}
    assert choose(monkeypatch, tmp_path, "auto", mode="offline", **key) == "offline"
    assert choose(monkeypatch, tmp_path, "auto", mode="disabled", **key) == "disabled"
    assert choose(monkeypatch, tmp_path, "online", mode="offline", **key) == "online"
    assert choose(monkeypatch, tmp_path, "offline", **key) == "offline"


def test_online_without_a_key_is_refused_instead_of_asking(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="observe.wandb_mode = online: no W&B API key .*WANDB_API_KEY"):
        choose(monkeypatch, tmp_path, "online")


@pytest.mark.timeout(60)
def test_a_disabled_sink_takes_everything(tmp_path):
    sink = WandbSink(ObserveSection(wandb_mode="disabled"), tmp_path, {}, "x")
    sink.log(POINT, STEP_PANELS)
    sink.log_image(1, "samples", tmp_path / "absent.png", "nothing")
    sink.finish()
