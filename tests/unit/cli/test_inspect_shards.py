"""`bitdance inspect`: its report and its picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from bitdance_scale.cli.inspect_shards import main
from bitdance_scale.config.shipped import CONFIGS
from tests.unit.data.small_data import sample_members, write_tar


def test_reports_and_draws(tmp_path: Path, capsys) -> None:
    broken = sample_members(600, 300, "costs $5 and $6", 1)
    broken["jpg"] = broken["jpg"][:-300]
    samples = {"0": sample_members(256, 300, "a cat", 0), "1": broken, "2": sample_members(20, 20, None, 2)}
    samples["3"] = {"txt": b"without image"}
    write_tar(tmp_path / "00000.tar", samples)
    assert main([str(tmp_path), "--count", "10", "--out", str(tmp_path / "grid.png")]) == 0
    printed = capsys.readouterr().out
    assert "3 samples in 1 shards" in printed
    assert "captions caption: usable 2, empty 0, missing 1, invalid 0" in printed
    assert "missing_image: 1 in 1 shards" in printed
    assert "resolution 256 px: 2 samples (height x width: 256x256 2)" in printed
    assert "resolution 512 px: 0 samples (height x width: none)" in printed
    assert Image.open(tmp_path / "grid.png").size[0] == 1440


def test_without_a_data_set_the_sources_of_the_configuration_are_counted(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "open" / "0.tar", {str(n): sample_members(64, 64, "a cat", n) for n in range(3)})
    write_tar(tmp_path / "own" / "0.tar", {"0": sample_members(40, 40, "a dog", 9)})
    sources = "".join(
        f'[[data.sources]]\nname = "{name}"\nshare = {share}\nshards = ["{tmp_path / name}"]\n'
        for name, share in (("open", 3), ("own", 1))
    )
    config = tmp_path / "mixed.toml"
    demo = CONFIGS / "demo.toml"
    config.write_text(f'extends = "{demo}"\n[data]\nshards = []\nindex_dir = "{tmp_path / "index"}"\n{sources}')
    assert main(["--config", str(config), "--count", "4", "--out", str(tmp_path / "grid.png")]) == 0
    printed = capsys.readouterr().out
    assert "4 samples in 2 shards" in printed and (tmp_path / "grid.png").is_file()
    first, second = printed.split("source open: share 3, 3 samples\n")[1].split("source own: share 1, 1 samples\n")
    assert "  resolution 64 px: 3 samples (height x width: 64x64 3)" in first
    assert "  resolution 32 px: 1 samples" in second and "  resolution 64 px: 0 samples" in second
    config.write_text(f'extends = "{demo}"\n{sources}')
    assert main(["--config", str(config)]) == 2
    assert "only one of the two may name the data" in capsys.readouterr().err
    assert main([]) == 2
    assert "name a DATASET or a --config" in capsys.readouterr().err


def test_what_a_small_data_set_lacks_is_said_for_a_configuration(tmp_path: Path, capsys) -> None:
    samples = {str(n): sample_members(160, 160, "a cat", n) for n in range(11)} | {"s": sample_members(20, 20, "a", 11)}
    write_tar(tmp_path / "0.tar", samples)
    out = ["--out", str(tmp_path / "grid.png"), "--count", "1"]
    assert main([str(tmp_path), "--config", "demo", *out]) == 0
    printed = capsys.readouterr().out
    assert "1 of 12 images are smaller than any bucket and are not trained: s (20 x 20)" in printed
    assert "11 images are fewer than a step takes" in printed
    assert main([str(tmp_path), *out]) == 0
    assert "smaller than any bucket" not in capsys.readouterr().out


def test_a_missing_data_set_ends_in_one_line(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("DataError: DATASET: ") and "none' " in line and "does not exist" in line
