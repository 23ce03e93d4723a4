"""`bitdance pack`: options and what is printed; the packing itself is tested in tests/unit/data/shard_writing/."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitdance_scale.cli.main import main
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REFUSED
from tests.unit.data.shard_writing.small_sources import make_folder, write


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held-out", "1"], "1: must be a share of at least 0 and below 1"),
        (["--held-out", "nan"], "nan: must be a share"),
        (["--samples-per-shard", "0"], "0: must be a whole number"),
        (["--samples-per-shard", "1000000"], "must be 1..100000 pictures"),
        (["--missing-caption", "drop"], "invalid choice: 'drop'"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, capsys, options: list[str], message: str) -> None:
    assert main(["pack", str(tmp_path), str(tmp_path / "out"), *options]) == EXIT_REFUSED
    assert message in capsys.readouterr().err


def test_the_summary_says_what_was_left_out_and_what_comes_next(tmp_path: Path, capsys) -> None:
    source = make_folder(tmp_path / "my pictures", 40)
    write(source / "cut.jpg", b"\xff\xd8\xff\xe0 cut")
    write(source / "notes.md", "x")
    out = tmp_path / "my shards"
    assert main(["pack", str(source), str(out), "--held-out", "0.3", "--workers", "1"]) == EXIT_COMPLETE
    printed = capsys.readouterr().out
    for text in (
        f"{out}: ",
        " of 41 pictures in 1 shards",
        "held out: ",
        f"skipped: bad_image 1, listed in {out}/skipped.jsonl",
        '"name": "cut.jpg"',
        "not pictures: .md 1",
        f"bitdance index '{out}'",
        f"""'data.shards=["{out}"]' 'evaluate.shards=["{out}/held_out"]'""",
    ):
        assert text in printed, text


def test_missing_captions_are_named_and_an_empty_held_out_part_is_explained(tmp_path: Path, capsys) -> None:
    source = make_folder(tmp_path / "pictures", 12)
    stems = sorted(path.stem for path in source.rglob("*.txt"))[:7]
    for text in source.rglob("*.txt"):
        if text.stem in stems:
            text.unlink()
    num_missing = 12 - len(list(source.rglob("*.txt")))
    out = tmp_path / "shards"
    assert main(["pack", str(source), str(out), "--held-out", "1e-9", "--workers", "1"]) == EXIT_COMPLETE
    printed = capsys.readouterr().out
    assert f"packed without a caption: missing_caption {num_missing}, first " in printed
    first = next(line for line in printed.splitlines() if line.startswith("packed without")).split("first ")[1]
    assert len(first.split(", ")) == 5 and all((source / name).is_file() for name in first.split(", "))
    assert "held out: none; each picture is with the chance 1e-09" in printed
    assert f"bitdance inspect {out} --config CONFIG" in printed

    refused = tmp_path / "refused"
    assert main(["pack", str(source), str(refused), "--missing-caption", "error"]) == EXIT_REFUSED
    error = capsys.readouterr().err
    assert f"no caption for {num_missing} of 12 pictures, " in error and f"and {num_missing - 5} more" in error
    assert not list(refused.glob("*.tar"))
