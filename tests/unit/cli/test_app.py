"""`bitdance app`: what is refused before anything is loaded, and what stands in the fields at first."""

from __future__ import annotations

import builtins
import contextlib
from pathlib import Path
from typing import Any

import pytest

from bitdance_scale.app import server
from bitdance_scale.app.desk import Desk
from bitdance_scale.app.run_watch import RunWatch
from bitdance_scale.app.settings import Fields
from bitdance_scale.cli.app import main
from bitdance_scale.generate.sampling_file import Sampling
from bitdance_scale.train import drawer
from tests.unit.app.fake_drawer import FakeDrawer

Served = tuple[str, Desk | None, Fields | None, RunWatch | None]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Served]:
    """What would be served, by a model that is there at once."""
    found: list[Served] = []

    def serve(bound: Any, host: str, folder: Any, *page: Any) -> None:
        assert bound.getsockname()[0] == host and folder.path.is_dir()
        found.append((host, *page))

    def find_model(model: Path, **options: object) -> drawer.FoundModel:
        fake = FakeDrawer(tmp_path / "ae")
        return drawer.FoundModel(fake.facts, Sampling(), {}, print, lambda: contextlib.nullcontext(fake))

    monkeypatch.setattr(server, "check_gradio", lambda: None)
    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr(drawer, "find_model", find_model)
    return found


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--port=0"])


def test_the_model_or_the_options_say_what_is_in_the_fields(seen, tmp_path):
    assert run(tmp_path) == 0
    host, desk, fields, watch = seen.pop()
    assert host == "127.0.0.1" and fields == Fields("", "32 x 32", 4, 2.0, 0, 1, []) and watch is None
    assert desk.max_images == 8
    assert run(tmp_path, "--size=48x64", "--steps=9", "--guidance=1", "--max-images=2", "--host=127.0.0.1") == 0
    _, desk, fields, _ = seen.pop()
    assert fields == Fields("", "48 x 64", 9, 1.0, 0, 1, []) and desk.max_images == 2


def test_a_run_folder_is_watched_too(seen, tmp_path):
    folder = tmp_path / "runs/demo"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text("")
    assert run(folder) == 0
    assert seen[0][1] is not None and seen[0][3].folder == folder
    other = tmp_path / "runs/other"
    other.mkdir()
    assert run(folder, "--run", other) == 0 and run("--run", other) == 0
    assert seen[1][1] is not None and seen[1][3].folder == other
    assert seen[2][1:3] == (None, None) and seen[2][3].folder == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL is missing: name a published folder, a run or a checkpoint, or a run to watch with --run"),
        (["--run", "absent"], "--run absent: no such folder; name a run folder, such as runs/demo"),
        (["model", "--size=31x32"], "height = 31, width = 32: both must be multiples of 8 px"),
        (["model", "--size=big"], "Size 'big': must be height x width in pixels, such as 32 x 32"),
        (["model", "--max-images=0"], "--max-images: 0: must be a whole number, at least 1"),
        (["model", "--host=192.0.2.1"], "--host 192.0.2.1 --port 0: cannot be listened on"),
    ],
)
def test_what_cannot_be_is_refused(seen, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err and seen == []


def test_without_gradio_the_extra_is_named(monkeypatch, capsys, tmp_path):
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    # What it sets for gradio is none of the other tests' matter.
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    assert run(tmp_path) == 2
    assert "the page needs gradio (No module named 'gradio'); install it with `pip install 'bitdance_scale[app]'`" in (
        capsys.readouterr().err
    )
