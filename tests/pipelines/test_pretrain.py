"""The main job as its user runs it: started, stopped, started again, asked for the impossible."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_scale.cli.stage import main
from bitdance_scale.config.shipped import ASSETS
from bitdance_scale.generate.published_model import load_published
from bitdance_scale.generate.sampling_file import read_sampling
from bitdance_scale.observe.benchmark_scores import BENCHMARKS_FILE, read_scores_of_run
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE, read_metrics
from bitdance_scale.train.process import EXIT_REFUSED, EXIT_REQUEUE

ROOT = Path(__file__).parents[2]
DEMO = "demo"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TIMEOUT_S = 280
SCORED = (
    '[{{benchmark="demo-scenes", metrics=["scenes"], num_prompts=6, num_steps=2, size_px=[32, 32], every_steps={}}}]'
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    from bitdance_scale.demo.shards import write_shards

    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, num_images=400, per_shard=100, seed=0)
    return folder


def _command(launcher: list[str], shards: Path, root: Path, **settings: object) -> list[str]:
    settings = {"evaluate__shards": "[]", "evaluate__benchmarks": "[]"} | settings
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    return [*launcher, "pipelines/pretrain.py", DEMO, f"data.shards=['{shards}']", f"run.root='{root}'", *overrides]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": ""}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    from bitdance_scale.demo.shards import write_shards

    folder = tmp_path_factory.mktemp("held_out")
    write_shards(folder, num_images=60, per_shard=60, seed=1000)
    return folder


@pytest.fixture(scope="module")
def finished(shards, held_out, tmp_path_factory) -> tuple[Path, list[str], str]:
    """A short demo run on two processes: (run folder, its command, what it printed)."""
    root = tmp_path_factory.mktemp("runs")
    command = _command(
        TORCHRUN,
        shards,
        root,
        run__steps=20,
        data__global_batch=10,
        optim__warmup_steps=5,
        sample__num_steps=5,
        checkpoint__every_steps=10,
        evaluate__shards=f"['{held_out}']",
        evaluate__every_steps=10,
        evaluate__benchmarks=SCORED.format(10),
    )
    result = _run(command)
    assert result.returncode == 0, result.stderr[-4000:]
    return root / "demo", command, result.stdout


def test_run_learns(finished):
    losses = [point.loss_vision for point in read_metrics(finished[0] / METRICS_FILE)]
    assert len(losses) == 20
    # A step's loss scatters by some 10 % with the flow times it draws, a mean over ten steps by 3 %. An untrained head
    # predicts 0 for every bit; learning only which bits are mostly set brings about a quarter.
    assert statistics.mean(losses[-10:]) < 0.85 * statistics.mean(losses[:3])


def test_held_out_losses_fall(finished):
    lines = [json.loads(line) for line in (finished[0] / EVALUATION_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 10, 20]
    # The untrained head predicts 0 for every bit: the loss of a block is then known but for its clamp near t = 1.
    assert lines[0]["vision"] > lines[1]["vision"] > lines[2]["vision"] and lines[0]["text"] > lines[2]["text"]
    assert {*lines[0]["vision_by_resolution"]} == {"32", "64", "128"} and len(lines[0]["vision_by_time"]) == 5
    # The last part of the flow is the hardest to see from the first loss on: its velocities are the largest.
    assert max(lines[0]["vision_by_time"]) == lines[0]["vision_by_time"][-1]


def test_pictures_are_scored_while_the_run_trains(finished):
    folder, _, printed = finished
    lines = read_scores_of_run(folder)
    assert [(line.step, line.series, line.num_images) for line in lines] == [
        (10, "demo-scenes/scenes", 6), (20, "demo-scenes/scenes", 6),
    ]  # fmt: skip
    assert all(0 <= line.values["overall"] <= 1 and line.values.keys() == line.low.keys() for line in lines)
    grids = [folder / "benchmarks" / "demo-scenes" / f"step_{step:06d}.png" for step in (10, 20)]
    assert all(np.asarray(Image.open(grid).convert("RGB")).std() > 5 for grid in grids)
    assert "demo-scenes after step 20: scenes" in printed


def test_run_leaves_everything(finished):
    folder, _, printed = finished
    assert "overview" in printed and "images/s" in printed
    for name in ("overview.png", "samples/step_000020.png"):
        assert np.asarray(Image.open(folder / name).convert("RGB")).std() > 5, f"{name} is blank"
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00000020"
    assert list((folder / "wandb").glob("offline-run-*"))
    assert (folder / "config.toml").exists() and (folder / "log.txt").exists()
    last = read_metrics(folder / METRICS_FILE)[-1]
    # 2:7:1 of 20 batches of ten, exactly.
    assert last.images_by_resolution == {32: 40, 64: 140, 128: 20} and last.images == 200
    assert last.skipped_samples == 0 and last.tokens > 0 and 0 <= last.padding_share < 1


def test_complete_run_says_so_and_makes_what_is_missing(finished):
    grid, evaluations = finished[0] / "samples" / "step_000020.png", finished[0] / EVALUATION_FILE
    drawn, evaluated = np.asarray(Image.open(grid)), evaluations.read_text()
    scores = finished[0] / BENCHMARKS_FILE
    scored = read_scores_of_run(finished[0])
    # As if killed between the last checkpoint and what follows it.
    grid.unlink()
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:-1]))
    evaluations.write_text("".join(evaluated.splitlines(keepends=True)[:-1]))
    result = _run(finished[1])
    assert result.returncode == 0
    np.testing.assert_array_equal(np.asarray(Image.open(grid)), drawn)
    assert evaluations.read_text() == evaluated
    again = read_scores_of_run(finished[0])
    assert [dataclasses.replace(line, drawn_s=0) for line in again] == [
        dataclasses.replace(line, drawn_s=0) for line in scored
    ]
    assert "is complete at step 20" in result.stdout and "run.steps=40" in result.stdout


def test_its_model_goes_into_the_package(finished, tmp_path):
    shipped = shutil.copytree(ASSETS / "demo", tmp_path / "shipped")
    done = _run([sys.executable, "tools/ship_demo_model.py", finished[0], "--assets", shipped, "--per-category", "1"])
    assert done.returncode == 0, done.stderr[-4000:]
    assert "the model of step 20 of 20 of run demo, stage pt" in done.stdout
    files = {path.name for path in shipped.iterdir()}
    assert {"model.safetensors", "vision_head_config.json", "sampling.json", "tokenizer.model"} < files
    assert not files & {"README.md", "LICENSE", "samples.png", "conversion_report.json"}
    assert filecmp.cmp(shipped / "ae.safetensors", ASSETS / "demo" / "ae.safetensors", shallow=False)
    model = load_published(shipped, torch.float32, torch.device("cpu"))
    assert model.vision.section.num_bits == 32 and read_sampling(shipped).size_px == (64, 64)
    provenance = json.loads((shipped / "provenance.json").read_text())
    assert (provenance["run"], provenance["steps"], provenance["images"]) == ("demo", 20, 200)
    assert provenance["scene_score"]["num_pictures"] == 6
    # A run with another autoencoder would need a second one in the package.
    others = shutil.copytree(ASSETS / "demo_4x", tmp_path / "others")
    done = _run([sys.executable, "tools/ship_demo_model.py", finished[0], "--assets", others])
    assert done.returncode == EXIT_REFUSED and "is not that of" in done.stderr
    assert {path.name for path in others.iterdir()} == {path.name for path in (ASSETS / "demo_4x").iterdir()}


def test_stopped_run_saves_and_goes_on(shards, tmp_path):
    command = _command(
        [sys.executable],
        shards,
        tmp_path,
        run__steps=6,
        data__global_batch=10,
        sample__every_steps=0,
        observe__wandb_mode="disabled",
        evaluate__benchmarks=SCORED.format(1),
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "demo" / METRICS_FILE
    deadline_s = time.monotonic() + TIMEOUT_S
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        printed = process.communicate(timeout=TIMEOUT_S)[0]
    finally:
        process.kill()
    assert process.returncode == EXIT_REQUEUE, printed
    assert "saved; run again to go on" in printed
    again = _run(command)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "resumed from" in again.stdout
    assert [point.step for point in read_metrics(metrics)] == [1, 2, 3, 4, 5, 6]
    # That of the step after which it stopped is made when it goes on.
    assert [line.step for line in read_scores_of_run(tmp_path / "demo")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("model.num_layers=3", "ConfigError", "was trained with 4; set model.num_layers=4"),
        ("model.mask=causal", "ConfigError", "was trained with 'block'; set model.mask=block"),
    ],
)
def test_checkpoint_of_another_model_is_refused(finished, override, kind, message):
    result = _run([sys.executable, *finished[1][len(TORCHRUN) :], override])
    assert result.returncode != 0
    assert kind in result.stderr and message in result.stderr
    assert (finished[0] / "checkpoints" / "latest").read_text().strip() == "step_00000020"


def test_a_run_starts_from_the_published_weights_of_another(finished, shards, tmp_path):
    """Through the published folder and back it is the run that it would be from the checkpoint itself."""
    for name, *options in (
        ("convert_to_hf.py", finished[0], tmp_path / "published", "--backbone-dtype", "float32"),
        ("convert_from_hf.py", tmp_path / "published", tmp_path / "imported"),
    ):
        done = _run([sys.executable, f"tools/{name}", *map(str, options)])
        assert done.returncode == 0, done.stderr
    settings = {"run__steps": 2, "data__global_batch": 10, "sample__every_steps": 0, "observe__wandb_mode": "disabled"}
    imported = {
        "run__start_from": tmp_path / "imported",
        "text__kind": "huggingface",
        "text__path": tmp_path / "imported" / "tokenizer",
        "vision__weights": tmp_path / "imported" / "ae.safetensors",
    }
    losses = []
    for number, start in enumerate(({"run__start_from": finished[0]}, imported)):
        result = _run(_command([sys.executable], shards, tmp_path / str(number), **settings, **start))
        assert result.returncode == 0, result.stderr[-4000:]
        assert "started from the weights of" in result.stdout
        losses.append([point.loss for point in read_metrics(tmp_path / str(number) / "demo" / METRICS_FILE)])
    assert losses[0] == losses[1]
    from_scratch = read_metrics(finished[0] / METRICS_FILE)[0].loss
    assert losses[0][0] < 0.85 * from_scratch, "the weights are not those of the run before"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.start_from='no/such/run'", "no/such/run: no checkpoint is there"),
        ("model.num_layers=3", "decoder.layers.3.input_layernorm.weight is no tensor of this network"),
    ],
)
def test_a_start_that_is_not_possible_is_refused(finished, shards, tmp_path, override, message):
    start = "" if "start_from" in override else f"run.start_from='{finished[0]}'"
    result = _run([*_command([sys.executable], shards, tmp_path), *filter(None, [start, override])])
    assert result.returncode == EXIT_REFUSED and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", "num_layers"),
        ("parallel.tensor=3", "model.num_heads"),
        ("vision.block_side=5", "bucket"),
        ("data.shards=['no/such/folder']", "no/such/folder"),
        ("run.root='/proc/no'", "run.root = '/proc/no'"),
    ],
)
def test_refusals_name_the_fault(override, message, shards, held_out, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "3" if "tensor" in override else "1")
    data = [f"data.shards=['{shards}']", f"evaluate.shards=['{held_out}']"]
    arguments = [DEMO, f"run.root='{tmp_path}'", *data, override]
    if "shards" in override or "root" in override:
        # Files are looked for, and made, by the job itself.
        result = _run([sys.executable, "pipelines/pretrain.py", *arguments])
        assert result.returncode == EXIT_REFUSED and message in result.stderr
        assert "Traceback" not in result.stderr
        return
    assert main("pt", arguments) == EXIT_REFUSED
    assert message in capsys.readouterr().err


def test_printed_config_loads_back(capsys, monkeypatch, tmp_path):
    from bitdance_scale.config.load import load_config

    monkeypatch.chdir(ROOT)
    assert main("pt", [DEMO, "optim.lr=5e-4", "--print-config"]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(DEMO, ["optim.lr=5e-4"])
