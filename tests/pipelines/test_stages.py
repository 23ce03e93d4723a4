"""The four stages one after the other, as their user runs them, to images of the distilled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bitdance_scale.cli.stage import main
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from bitdance_scale.train.process import EXIT_REFUSED
from tests.distributed.small_demo import small_demo

ROOT = Path(__file__).parents[2]
CONFIGS = {"pt": "demo", "ct": "ct_demo", "sft": "sft_demo", "distill": "distill_demo"}


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


# Four stages, an export and a picture; slow cores need more than the usual limit.
@pytest.mark.timeout(600)
def test_pretraining_to_the_pictures_of_the_distilled_model(tmp_path):
    settings = [
        setting
        for setting in small_demo(tmp_path, num_steps=2, save_every=2)
        if not setting.startswith("data.global_batch")
    ]
    settings.append("data.sources=[]")
    before = None
    for stage, config in CONFIGS.items():
        start = [f"run.start_from='{tmp_path / before}'"] if before else []
        done = _run(STAGES[stage].entry_point, f"{config}.toml", f"run.root='{tmp_path}'", *start, *settings)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("started from the weights of" in done.stdout) is (before is not None)
        metrics = read_metrics(tmp_path / config / METRICS_FILE)
        # Counters are the stage's own.
        assert [point.step for point in metrics] == [1, 2] and metrics[0].images == metrics[1].images / 2
        before = config
    published = tmp_path / "published"
    done = _run("tools/convert_to_hf.py", tmp_path / before, published)
    assert done.returncode == 0, done.stderr
    assert json.loads((published / "vision_head_config.json").read_text())["parallel_num"] == 64
    # The size is that of the run's own pictures.
    arguments = ("--prompt", "a red circle", "--steps", "3", "--out", tmp_path / "pictures")
    done = _run("tools/sample.py", published, *arguments)
    assert done.returncode == 0, done.stderr
    size_px = json.loads((published / "sampling.json").read_text())["size_px"]
    assert Image.open(tmp_path / "pictures" / "00000.png").size == (size_px[1], size_px[0])


@pytest.mark.parametrize("stage", ["ct", "sft", "distill"])
def test_a_stage_is_run_by_its_own_script(stage, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main("pt", [f"{CONFIGS[stage]}.toml"]) == EXIT_REFUSED
    assert f"start it with {STAGES[stage].entry_point}" in capsys.readouterr().err
