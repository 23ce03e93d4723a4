"""The commands of docs/finetune.md, as they stand there: at a tiny size, and all of it with `-m guide`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.evaluation.metrics.score_file import read_scores, scores_path
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE, read_evaluations, read_metrics
from bitdance_scale.observe.sample_grids import GRID_COLUMNS, newest_samples

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "finetune.md"
TINY = (
    " run.steps=2 data.global_batch=10 observe.wandb_mode=disabled 'evaluate.benchmarks=[]' "
    'evaluate.images=10 sample.num_steps=1 \'sample.prompts=["a red circle", "a blue square"]\''
)
CHANGES = {
    "--images 100 ": "--images 30 ",
    "train finetune_demo --nproc 2": "train finetune_demo --nproc 1" + TINY,
    "--steps 10 --batch-size 25": "--steps 1 --batch-size 60",
}
# All commands in one process: most of the time of so small ones is their start.
RUN_ALL = """
import json, sys
from bitdance_scale.cli.main import main
for arguments in json.load(sys.stdin):
    print("::", *arguments, flush=True)
    code = main(arguments)
    if code:
        sys.exit(code)
"""


def guide_commands(changes: dict[str, str]) -> list[list[str]]:
    """The arguments of every `bitdance` of the blocks that are marked `bash`, in order, with `changes`."""
    text = "".join(re.findall(r"^```bash\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    for old, new in changes.items():
        assert old in text, f"the page no longer says {old}"
        text = text.replace(old, new)
    commands = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    assert commands and all(command[0] == "bitdance" for command in commands)
    return [command[1:] for command in commands]


def walk(folder: Path, changes: dict[str, str], timeout_s: float) -> str:
    """Runs the page in `folder`; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(guide_commands(changes)),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.timeout(300)
def test_the_commands_work(tmp_path: Path) -> None:
    assert " of 30 pictures in 1 shards" in walk(tmp_path, CHANGES, 280)
    run = tmp_path / "runs" / "finetune_demo"
    assert [point.step for point in read_metrics(run / METRICS_FILE)] == [1, 2]
    assert [line.step for line in read_evaluations(run / EVALUATION_FILE)] == [0, 2]
    drawn = json.loads((run / "samples" / "start" / "drawn.json").read_text(encoding="utf-8"))
    assert drawn["prompts"] == ["a red circle", "a blue square"]
    before = np.asarray(Image.open(run / "samples" / "start" / "00000.png"))
    assert before.shape == (64, 64, 3)
    grid = newest_samples(run)
    assert grid is not None and grid.name == "step_000002.png"
    assert len(drawn["prompts"]) * 2 == GRID_COLUMNS, "each beside that of the start: one row"
    shown = np.asarray(Image.open(grid))
    # The first of the row is the start's, each pixel a square.
    assert (before.repeat(4, axis=0).repeat(4, axis=1) == shown[12 : 12 + 256, 12 : 12 + 256]).all()
    assert (tmp_path / "corners" / "adapter_config.json").is_file()
    for pictures in ("tried", "samples"):
        assert (tmp_path / pictures / "00000.png").is_file()
    for metric in ("style", "scenes"):
        scores = read_scores(scores_path(tmp_path / "drawn", metric))
        assert scores.model == "finetune_demo" and len(scores.images) == 300


@pytest.mark.guide
@pytest.mark.timeout(7200)
def test_the_style_is_learned(tmp_path: Path) -> None:
    walk(tmp_path, {}, 7000)
    style = read_scores(scores_path(tmp_path / "drawn", "style"))
    assert np.mean([image.value for image in style.images]) > 0.5
