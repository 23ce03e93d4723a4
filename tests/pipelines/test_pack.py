"""`bitdance pack` as a process: killed and started again, then indexed and trained on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.small_demo import small_demo
from tests.unit.data.shard_writing.small_sources import noise, samples_of, tree_digest, write

ROOT = Path(__file__).parents[2]
BITDANCE = [sys.executable, "-m", "bitdance_scale.cli"]
TIMEOUT_S = 200


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*BITDANCE, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        printed = process.communicate(timeout=TIMEOUT_S)[0]
    finally:
        process.kill()
    assert process.returncode == 0, printed[-4000:]
    return printed


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pictures that take some time to decode; one in fifty is damaged."""
    folder = tmp_path_factory.mktemp("source")
    contents = [noise(800, 1200, seed) for seed in range(10)]
    for number in range(90):
        # A comment makes every picture another one, so that they are held out one by one.
        content = contents[number % 10] + str(number).encode()
        write(folder / f"{number:03d}.jpg", content[: 200_000 if number % 50 == 7 else None])
        write(folder / f"{number:03d}.txt", f"caption {number}")
    return folder


def test_a_killed_run_goes_on_to_the_same_bytes(source, tmp_path):
    options = ["--samples-per-shard", "6", "--held-out", "0.2", "--workers", "2"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    printed = finish(start("pack", source, whole, *options))
    assert f"{whole}: " in printed and "skipped: bad_image 2" in printed and f"bitdance index {whole}" in printed
    num_shards = len(list(whole.glob("*.tar")))
    assert num_shards == 15
    seen = []
    for wanted in (1, 7):
        process = start("pack", source, out, *options)
        deadline_s = time.monotonic() + TIMEOUT_S
        while len(list(out.glob("*.tar"))) < wanted:
            assert process.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(len(list(out.glob("*.tar"))))
        assert not (out / "report.json").exists()
        for path in out.glob("*.tar"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
    assert seen == sorted(seen) and seen[-1] < num_shards, "the kills came in the middle"
    finish(start("pack", source, out, *options))
    assert tree_digest(out) == tree_digest(whole)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"held_out"}


@pytest.mark.large
@pytest.mark.timeout(540)
def test_training_on_what_was_packed(tmp_path):
    overrides = small_demo(tmp_path, num_steps=2, save_every=100)
    folder = tmp_path / "pictures"
    for key, members in samples_of(tmp_path / "shards").items():
        for extension in ("jpg", "txt"):
            write(folder / f"{key}.{extension}", members[extension])
    out = tmp_path / "packed"
    printed = finish(start("pack", folder, out, "--held-out", "0.2", "--samples-per-shard", "20"))
    finish(start("index", out))
    settings = printed[printed.rindex("bitdance train CONFIG ") :].split()[3:]
    assert settings == [f"""'data.shards=["{out}"]'""", f"""'evaluate.shards=["{out}/held_out"]'"""]
    given = [override for override in overrides if not override.startswith(("data.shards", "evaluate.shards"))]
    given += [f"run.root={tmp_path / 'runs'}", "evaluate.every_steps=2"]
    finish(start("train", "demo", *given, *(setting.strip("'") for setting in settings)))
    metrics = read_metrics(tmp_path / "runs" / "demo" / METRICS_FILE)
    assert [point.step for point in metrics] == [1, 2]
    assert (tmp_path / "runs" / "demo" / "evaluation.jsonl").read_text(encoding="utf-8").strip()
