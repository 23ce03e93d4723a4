"""A class-conditional run from shards to pictures: two tensor-parallel ranks learn which class has which colour."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from bitdance_scale.train.shared_index import labelled_index

ROOT = Path(__file__).parents[2]
COLOURS = ((220, 40, 40), (40, 180, 60), (50, 80, 220))
CONFIG = """
extends = "demo"
[run]
name = "colours"
steps = 40
[model]
preset = ""
family = "class_conditional"
num_layers = 2
hidden_size = 64
num_heads = 4
num_kv_heads = 4
head_dim = 16
ffn_size = 128
[head]
width = 64
num_blocks = 2
num_adaln = 1
head_dim = 16
[classes]
num_classes = 3
num_tokens = 4
grid = [8, 8]
[data]
captions = [{source = "cls"}]
global_batch = 12
max_pack_tokens = 512
pack_multiple = 16
image_to_text_share = 0.0
resolutions = [{side_px = 32, share = 1, buckets_px = [[32, 32]]}]
[optim]
lr = 4e-3
warmup_steps = 5
decay_steps = 0
[sample]
every_steps = 40
prompts = ["2", "0", "1"]
size_px = [32, 32]
num_steps = 16
guidance = 2.0
[evaluate]
shards = []
"""


def _write_shard(path: Path, labels: list[str | None]) -> None:
    numbers = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index, label in enumerate(labels):
            colour = np.clip(numbers.normal(COLOURS[index % 3], 6), 0, 255).astype(np.uint8)
            image = io.BytesIO()
            Image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(image, "PNG")
            members = {"png": image.getvalue()} | ({} if label is None else {"cls": label.encode()})
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{index:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "colours.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_classes_are_drawn_in_their_colours(config_file: Path, tmp_path: Path) -> None:
    names = ("red", "green", "blue")
    _write_shard(tmp_path / "0.tar", [names[index % 3] for index in range(48)])
    (tmp_path / "names").write_text("red\ngreen\nblue\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = [f"data.shards=['{tmp_path}/0.tar']", f"run.root={tmp_path}/runs", "parallel.tensor=2"]
    # A prompt is a name or a number.
    settings += [f"classes.map={tmp_path}/names", "sample.prompts=['blue', '0', 'green']"]
    result = subprocess.run(
        [*command, str(ROOT / "pipelines/pretrain.py"), str(config_file), *settings],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "runs/colours"
    assert (run / "classes.txt").read_text() == "red\ngreen\nblue\n"
    losses = [metrics.loss_vision for metrics in read_metrics(run / METRICS_FILE)]
    assert losses[-1] < 0.5 * losses[0]
    # Three pictures side by side; the largest channel of each is that of its class.
    grid = np.asarray(Image.open(run / "samples/step_000040.png").convert("RGB"), dtype=float)
    thirds = np.array_split(grid[40:200], 3, axis=1)
    assert [int(part[:, 80:-80].mean(axis=(0, 1)).argmax()) for part in thirds] == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["0", "1", "3"], "000002 of .*: '3'"),
        (["0", None, "2"], "000001 of .*: missing"),
        (["0", "cat", "2"], "000001 of .*: 'cat'"),
        (["-1", "1", ""], "000000 of .*: '-1'; 000002 of .*: empty"),
        (["0", "01", "2"], "000001 of .*: '01'"),
        (["0", "9" * 5000, "2"], "000001 of .*: '9{40}'"),
        (["a", "b", "c", "d"], "000000 of .*: 'a'; 000001 of .*: 'b'; 000002 of .*: 'c'; and 1 more"),
    ],
    ids=["above", "missing", "word", "two", "zero", "long", "many"],
)
def test_wrong_labels_are_refused_before_training(config_file, tmp_path, labels, found):
    _write_shard(tmp_path / "0.tar", labels)
    config = load_config(config_file, [f"data.shards=['{tmp_path}/0.tar']"])
    with pytest.raises(DataError, match=rf"of {len(labels)} samples have no usable label in 'cls': {found}.*0 to 2"):
        labelled_index(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("classes.num_classes=0", r"classes\.num_classes = 0: .*draws from classes"),
        ("classes.grid=[4, 8]", r"buckets_px\[0\] = \[32, 32\]: must be \[16, 32\]"),
        ("sample.prompts=['cat']", r"sample\.prompts\[0\] = 'cat': must be the number of a class, 0 to 2"),
        ("data.image_to_text_share=0.1", "classes have no words"),
        ("data.max_pack_tokens=64", r"must be at least 67 = 64 cells .* - 1 \+ classes\.num_tokens = 4; use 80"),
        ("vision.block_side=3", "must be multiples of 12 px"),
        ("data.mode=stream", "labels are checked in an index"),
        ("model.head_dim=18", r"model\.head_dim = 18: must be a multiple of 4; use 16 or 20"),
        ("model.tie_embeddings=true", "there is no projection to tie"),
        ("model.family=text_to_image", r"classes\.num_classes = 3: .*has no classes"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_wrong_settings_are_refused(config_file, override, message):
    with pytest.raises(ConfigError, match=message):
        check(load_config(config_file, [override]), 1)


def test_the_documented_configuration_is_legal(tmp_path):
    page = (ROOT / "docs/class_conditional.md").read_text(encoding="utf-8")
    path = tmp_path / "documented.toml"
    path.write_text(page.partition("```toml\n")[2].partition("```")[0], encoding="utf-8")
    config = load_config(path)
    check(config, 16)
    # The recipe of the published release, Tables 2 and 3.
    assert (config.model.hidden_size, config.model.num_layers, config.model.ffn_size) == (768, 24, 2048)
    assert (config.head.diff_batch_mul, config.optim.average_decay, config.sample.guidance) == (4, 0.9999, 3.9)
