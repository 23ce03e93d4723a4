"""The demo data set on disk: layout, reproducibility, and what happens when it is there already."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.cli.demo_data import main
from bitdance_scale.demo.scenes import MIXES, make_scene
from bitdance_scale.demo.shards import check_shipped_sets, write_folder, write_shards
from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.scenes.style import corner_shares


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_have_the_layout_of_img2dataset(tmp_path: Path):
    assert write_shards(tmp_path / "a" / "demo", num_images=5, per_shard=2, seed=3)
    folder = tmp_path / "a" / "demo"
    assert sorted(path.name for path in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar", "dataset.json"]
    with tarfile.open(folder / "00001.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(files) == [f"00001000{i}.{extension}" for i in (0, 1) for extension in ("jpg", "json", "txt")]
    scene = make_scene(3, 3)
    record = json.loads(files["000010001.json"])
    assert files["000010001.txt"].decode() == record["caption"] == scene.caption
    assert record["scene"] == json.loads(json.dumps(scene.record()))
    assert record["key"] == "000010001" and record["status"] == "success"
    assert record["sha256"] == hashlib.sha256(files["000010001.jpg"]).hexdigest()
    image = Image.open(io.BytesIO(files["000010001.jpg"]))
    assert image.format == "JPEG"
    assert (
        image.size
        == scene.size_px
        == (record["width"], record["height"])
        == (record["original_width"], record["original_height"])
    )


def test_equal_arguments_give_equal_bytes_and_other_seeds_other_images(tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shards(tmp_path / name, num_images=4, per_shard=3, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["00000.tar"] != contents(tmp_path / "c")["00000.tar"]


def test_a_complete_data_set_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [str(tmp_path / "demo"), "--images", "2", "--seed", "1"]
    assert main(arguments) == 0
    before = (tmp_path / "demo" / "00000.tar").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "complete already" in capsys.readouterr().out
    assert (tmp_path / "demo" / "00000.tar").stat().st_mtime_ns == before


def test_other_arguments_are_refused_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "demo"
    write_shards(out, num_images=2, per_shard=2, seed=1)
    with pytest.raises(DataError, match=r"seed 1 \(wanted 2\); replace it with --force"):
        write_shards(out, num_images=2, per_shard=2, seed=2)
    assert main([str(out), "--images", "2", "--per-shard", "2", "--seed", "2"]) == 2
    assert "replace it with --force" in capsys.readouterr().err
    assert main([str(out), "--images", "2", "--per-shard", "2", "--seed", "2", "--force"]) == 0
    assert json.loads((out / "dataset.json").read_text())["seed"] == 2


def test_a_folder_of_unknown_origin_is_never_replaced(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"exists without dataset\.json.*left alone"):
        write_shards(tmp_path, num_images=1, per_shard=1, seed=0, is_forced=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bitdance_scale.demo import shards

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "demo", num_images=1, per_shard=1, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num_images", "per_shard", "seed"), [(0, 1, 0), (1, 0, 0), (1, 10_001, 0), (1, 1, -1)])
def test_arguments_out_of_range_are_refused(tmp_path: Path, num_images: int, per_shard: int, seed: int):
    with pytest.raises(DataError, match="there must be at least 1 image"):
        write_shards(tmp_path / "demo", num_images, per_shard, seed)


def test_the_loader_reads_the_shards(tmp_path: Path):
    from bitdance_scale.data.held_out import centre_crops
    from bitdance_scale.data.index.build import build_index
    from bitdance_scale.data.storage.shards import expand_shards

    write_shards(tmp_path / "demo", num_images=12, per_shard=5, seed=0)
    index = build_index(expand_shards([str(tmp_path / "demo")]), tmp_path / "index")
    assert len(index) == 12 and not index.errors()
    assert [index.caption(i) for i in range(12)] == [make_scene(0, i).caption for i in range(12)]
    crops = centre_crops(index, (32, 32), num_images=4)
    assert crops.shape == (4, 32, 32, 3) and crops.dtype == np.uint8


def test_a_run_of_the_demo_without_its_images_is_told_how_to_draw_them(tmp_path: Path, monkeypatch, capsys):
    from bitdance_scale.cli.main import main as bitdance

    monkeypatch.chdir(tmp_path)
    assert bitdance(["train", "demo"]) == 2
    assert f"data/demo: no such folder in {tmp_path}" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"bitdance demo-data data/demo data/demo_held_out$"):
        check_shipped_sets(["data/demo", "elsewhere", "data/demo_held_out"])
    assert bitdance(["demo-data", "data/demo_held_out"]) == 0
    assert "200 images written" in capsys.readouterr().out
    assert json.loads((tmp_path / "data/demo_held_out/dataset.json").read_text())["seed"] == 1000
    with pytest.raises(DataError, match=r"bitdance demo-data data/demo$"):
        check_shipped_sets(["data/demo", "data/demo_held_out"])


def test_a_folder_has_pictures_and_captions_of_the_same_scenes(tmp_path: Path):
    assert main([str(tmp_path / "own"), "--folder", "--images", "3", "--seed", "5"]) == 0
    write_shards(tmp_path / "shards", num_images=3, per_shard=3, seed=5)
    files = contents(tmp_path / "own")
    assert sorted(files) == sorted([f"0000{i}.{kind}" for i in range(3) for kind in ("jpg", "txt")] + ["dataset.json"])
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        for number in range(3):
            for kind in ("jpg", "txt"):
                assert tar.extractfile(f"00000000{number}.{kind}").read() == files[f"0000{number}.{kind}"]
    assert not write_folder(tmp_path / "own", 3, 5)


def test_a_style_changes_the_pictures_and_not_the_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_folder(tmp_path / "plain", 2, 5)
    write_folder(tmp_path / "styled", 2, 5, style="corners")
    plain, marked = contents(tmp_path / "plain"), contents(tmp_path / "styled")
    assert plain["00001.txt"] == marked["00001.txt"]
    assert corner_shares(np.asarray(Image.open(io.BytesIO(plain["00001.jpg"])))).max() < 0.1
    assert corner_shares(np.asarray(Image.open(io.BytesIO(marked["00001.jpg"])))).min() > 0.9
    with pytest.raises(DataError, match=r"style 'corners' \(wanted None\)"):
        write_folder(tmp_path / "styled", 2, 5)
    write_shards(tmp_path / "shards", 2, 2, 5, style="corners")
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        assert tar.extractfile("000000001.jpg").read() == marked["00001.jpg"]
        assert json.loads(tar.extractfile("000000001.json").read())["style"] == "corners"
    assert main([str(tmp_path / "classes"), "--folder", "--classes"]) == 2
    assert "--folder" in capsys.readouterr().err


def test_a_mix_is_that_of_the_set_or_the_one_that_is_asked_for(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data/demo", "--folder", "--images", "4"]) == 0
    assert main(["own", "--folder", "--images", "4", "--mix", "objects"]) == 0
    objects = contents(tmp_path / "own")
    assert objects == contents(tmp_path / "data/demo") and json.loads(objects["dataset.json"])["mix"] == "objects"
    assert [objects[f"0000{i}.txt"].decode() for i in range(4)] == [
        make_scene(0, i, "objects").caption for i in range(4)
    ]
    with pytest.raises(DataError, match=r"mix 'objects' \(wanted None\)"):
        write_folder(tmp_path / "own", 4, 0)
    assert main(["classes", "--classes", "--mix", "objects"]) == 2
    assert "--mix objects: class scenes have no mix; leave it out" in capsys.readouterr().err


def test_a_set_of_a_mix_that_has_changed_since_is_another(tmp_path: Path, monkeypatch):
    assert write_folder(tmp_path / "own", 2, 0, mix="objects") and not write_folder(
        tmp_path / "own", 2, 0, mix="objects"
    )
    monkeypatch.setitem(MIXES, "objects", dataclasses.replace(MIXES["objects"], named_share=0.2))
    with pytest.raises(DataError, match="mix_sha256 .* replace it with --force"):
        write_folder(tmp_path / "own", 2, 0, mix="objects")
