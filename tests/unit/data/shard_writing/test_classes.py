"""A folder per class, and a tar of a tar per class, become shards with labels."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from bitdance_scale.cli.main import main
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.shard_writing.pack import PackOptions, pack_source
from bitdance_scale.errors import BitDanceError, ConfigError, DataError
from tests.unit.data.shard_writing.small_sources import noise, records_of, samples_of, skipped_of, tree_digest, write
from tests.unit.data.small_data import encode_image

SMALL = PackOptions(samples_per_shard=4)
# The order of these names is not that of their first pictures.
CLASSES = {"n02": 5, "n01": 3, "n10": 4}


def pictures() -> dict[str, bytes]:
    """Name -> content, such as `n01/n01_0.JPEG`."""
    numbered = enumerate(f"{name}/{name}_{number}.JPEG" for name, count in CLASSES.items() for number in range(count))
    return {name: encode_image(20, 24, seed) for seed, name in numbered}


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def inner_tars(found: dict[str, bytes]) -> dict[str, bytes]:
    """`n01.tar` -> its bytes, with the file names alone, as ImageNet has them."""
    by_class: dict[str, dict[str, bytes]] = {}
    for name, content in found.items():
        class_name, _, base = name.partition("/")
        by_class.setdefault(class_name, {})[base] = content
    return {f"{class_name}.tar": tar_of(members) for class_name, members in by_class.items()}


def make_folder(folder: Path, found: dict[str, bytes]) -> Path:
    for name, content in found.items():
        write(folder / name, content)
    return folder


def labels_of(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Original name -> (picture, label)."""
    found = {}
    for members in samples_of(folder).values():
        (picture,) = (members[extension] for extension in ("jpg", "png") if extension in members)
        found[json.loads(members["json"])["original_name"]] = picture, members["cls"].decode()
    return found


def test_a_folder_and_a_tar_of_tars_give_the_same_shards(tmp_path):
    found = pictures()
    write(tmp_path / "train.tar", tar_of(inner_tars(found)))
    report = pack_source(tmp_path / "train.tar", tmp_path / "of_tar", SMALL, num_workers=2)
    pack_source(make_folder(tmp_path / "train", found), tmp_path / "of_folder", SMALL, has_classes=True)
    ranks = {"n01": "0", "n02": "1", "n10": "2"}
    assert labels_of(tmp_path / "of_tar") == {name: (found[name], ranks[name[:3]]) for name in found}
    digests = [tree_digest(tmp_path / name) for name in ("of_tar", "of_folder")]
    assert {name for name in digests[0] if digests[0][name] != digests[1][name]} == {"pack.json"}
    assert (tmp_path / "of_tar" / "classes.txt").read_text() == "n01\nn02\nn10\n"
    assert (report["num_classes"], report["num_empty_classes"], report["captions"]) == (3, 0, {})
    # The pictures of a class are not neighbours.
    order = [json.loads(members["json"])["original_name"] for members in samples_of(tmp_path / "of_tar").values()]
    assert order != sorted(order) and len({name[:3] for name in order[:6]}) > 1


def test_the_index_reads_labels_and_the_summary_names_the_settings(tmp_path, capsys):
    source, out = make_folder(tmp_path / "train", pictures()), tmp_path / "out"
    assert main(["pack", str(source), str(out), "--classes", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    settings = (
        """'data.captions=[{source="cls"}]'""",
        "classes.num_classes=3",
        f"""'classes.map="{out}/classes.txt"'""",
    )
    for text in (f"classes: 3, named in {out}/classes.txt", *settings):
        assert text in printed, text
    assert "missing_caption" not in printed
    index = build_index([str(out / "00000.tar")], tmp_path / "index", captions=["cls"])
    labels = [label for (label,) in index.texts("cls", np.arange(len(index)))]
    assert sorted(labels) == ["0"] * 3 + ["1"] * 5 + ["2"] * 4


def test_a_map_numbers_the_classes(tmp_path):
    source = make_folder(tmp_path / "train", pictures())
    (source / "n03").mkdir()
    class_map = write(tmp_path / "map.json", json.dumps({"n10": 0, "n01": 3, "n02": 1, "n05": 2}))
    report = pack_source(source, tmp_path / "out", SMALL, class_map=class_map)
    assert {name[:3]: label for name, (_, label) in labels_of(tmp_path / "out").items()} == {
        "n01": "3",
        "n02": "1",
        "n10": "0",
    }
    assert (tmp_path / "out" / "classes.txt").read_text() == "n10\nn02\nn05\nn01\n"
    assert (report["num_classes"], report["num_empty_classes"]) == (4, 1)
    class_map.write_text("n01\nn02\nn05\nn10\n")
    with pytest.raises(DataError, match="was packed from another source or by other settings"):
        pack_source(source, tmp_path / "out", SMALL, class_map=class_map)
    class_map.write_text("n01\nn05\n")
    with pytest.raises(DataError, match=r"map.json: lacks 2 of the 3 classes of .*train \(n02; n10\); add them"):
        pack_source(source, tmp_path / "other", SMALL, class_map=class_map)
    with pytest.raises(ConfigError, match="gone: cannot be read"):
        pack_source(source, tmp_path / "other", SMALL, class_map=tmp_path / "gone")


def test_a_tar_that_was_stopped_goes_on_and_damaged_pictures_are_left_out(tmp_path, monkeypatch):
    found = pictures() | {"n01/cut.JPEG": noise(64, 64)[:2000], "n02/notes.md": b"x", "n02/._a.JPEG": b"x"}
    source = write(tmp_path / "train.tar", tar_of(inner_tars(found)))
    report = pack_source(source, tmp_path / "whole", SMALL)
    assert skipped_of(tmp_path / "whole") == {"n01/cut.JPEG": "bad_image"} and report["num_packed"] == 12
    assert report["left_out"] == {".md": 1, "hidden": 1}

    def stopping(num_done: int, num_pictures: int) -> None:
        if num_done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_source(source, tmp_path / "out", SMALL, progress=stopping)
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert 0 < len(left) < 4 and (tmp_path / "out" / "classes.txt").is_file()
    pack_source(source, tmp_path / "out", SMALL)
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in left} == left


def test_pictures_deeper_in_a_class_and_captions_beside_them(tmp_path):
    picture = encode_image(20, 24)
    source = make_folder(tmp_path / "train", {"a/images/0.jpg": picture, "b/1.png": encode_image(9, 9, kind="PNG")})
    write(source / "b" / "1.txt", "a square")
    pack_source(source, tmp_path / "out", SMALL, has_classes=True)
    assert {name: label for name, (_, label) in labels_of(tmp_path / "out").items()} == {
        "a/images/0.jpg": "0",
        "b/1.png": "1",
    }
    assert records_of(tmp_path / "out")["b/1.png"]["caption"] == "a square"
    inner = {"a.tar": tar_of({"a/images/0.jpg": picture}), "b.tar": tar_of({"./b/1.jpg": picture})}
    pack_source(write(tmp_path / "train.tar", tar_of(inner)), tmp_path / "of_tar", SMALL)
    assert labels_of(tmp_path / "of_tar") == {"a/images/0.jpg": (picture, "0"), "b/1.jpg": (picture, "1")}


JPG = encode_image(8, 8)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a/0.jpg": JPG, "0.jpg": JPG}, r"1 pictures lie beside the folders of classes.*\(0.jpg\); move them"),
        ({"a/0.jpg": JPG, "b/read.me": b"x"}, r"1 classes hold no pictures \(b\).*--class-map FILE"),
        ({"a/read.me": b"x"}, "holds no pictures"),
        ({f"{n}/0.jpg": JPG for n in range(11)}, "class 2 has the name '10', which is the number of class 10"),
        ({" a/0.jpg": JPG}, "class 0 has the name ' a'"),
        ({"caf\udce9/0.jpg": JPG}, r"class 0 has the name 'caf\\udce9'"),
    ],
    ids=["beside", "empty", "nothing", "numbers", "blank", "latin1"],
)
def test_folders_of_classes_that_are_none(tmp_path, members, message):
    with pytest.raises(DataError, match=message) as caught:
        pack_source(make_folder(tmp_path / "train", members), tmp_path / "out", SMALL, has_classes=True)
    assert str(tmp_path / "train") in str(caught.value) and not (tmp_path / "out").exists()


GOOD = tar_of({"0.jpg": JPG})
NO_MARK = 512 + -(-len(JPG) // 512) * 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of({"a.tar": GOOD, "0.jpg": JPG}), r"1 pictures lie beside the tars of classes, .*\(0.jpg\)"),
        (tar_of({"0.jpg": JPG}), "so it is a shard already: bitdance index"),
        (tar_of({"a.tar": GOOD, "x/a.tar": GOOD}), "a.tar and x/a.tar are of the same class"),
        (tar_of({"a.tar": gzip.compress(GOOD)}), "a.tar: byte 0: no tar: the file is gzip-compressed; unpack it"),
        (tar_of({"a.tar": GOOD, "b.tar.gz": b"x"}), "b.tar.gz is compressed"),
        (tar_of({"a.tar": GOOD, "b.tar": GOOD[:700]}), r"train.tar: b.tar: byte 0: .*'0.jpg' .*it was cut"),
        (tar_of({"a.tar": GOOD, "b.tar": GOOD[:NO_MARK]}), "b.tar: byte .*: the tar ends without an end-of-archive"),
        (tar_of({"a.tar": GOOD, "b.tar": b"x" * 1024}), "train.tar: b.tar: byte 0: the tar header fails its checksum"),
        (tar_of({"a.tar": GOOD, "b.tar": GOOD})[:3000], "train.tar: byte .*'a.tar' .*it was cut; fetch it again"),
        (tar_of({"a.tar": GOOD, "b.tar": tar_of({})}), r"1 classes hold no pictures \(b\)"),
        (gzip.compress(tar_of({"a.tar": GOOD})), "train.tar: byte 0: no tar: the file is gzip-compressed"),
        (tar_of({"read.me": b"x"}), "holds no pictures"),
        (b"", "train.tar: byte 0: the tar ends without"),
    ],
    ids=[
        "beside",
        "shard",
        "twice",
        "gzip",
        "tar.gz",
        "cut",
        "end_mark",
        "garbage",
        "outer",
        "empty",
        "outer_gzip",
        "nothing",
        "zero",
    ],
)
def test_tars_of_classes_that_are_none(tmp_path, content, message):
    source = write(tmp_path / "train.tar", content)
    with pytest.raises(DataError, match=message):
        pack_source(source, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_classes_of_what_has_none_are_refused(tmp_path):
    source = make_folder(tmp_path / "train", {"a/0.jpg": JPG})
    table = write(tmp_path / "table.csv", "file_name,text\na/0.jpg,x\n")
    for path, options, message in (
        (table, SMALL, "--classes needs a folder with a folder per class"),
        (tmp_path / "gone", SMALL, "there is no such file or folder"),
        (source, PackOptions(caption="text"), "--caption names a column"),
        (write(tmp_path / "train.tar", tar_of({"a.tar": GOOD})), PackOptions(image="image"), "--image names a column"),
    ):
        with pytest.raises(BitDanceError, match=message):
            pack_source(path, tmp_path / "out", options, has_classes=True)
    write(source / "metadata.csv", "file_name,text\na/0.jpg,x\n")
    with pytest.raises(DataError, match=r"holds metadata.csv, which says what the pictures are.*without --classes"):
        pack_source(source, tmp_path / "out", SMALL, has_classes=True)
