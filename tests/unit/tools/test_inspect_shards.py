"""The report and the picture of inspect_shards."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

from bitdance_scale.config.shipped import CONFIGS
from tests.unit.data.small_data import sample_members, write_tar

SCRIPT = Path(__file__).parents[3] / "tools" / "inspect_shards.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location("inspect_shards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", *arguments])
    module.main()


def test_reports_and_draws(tmp_path: Path, monkeypatch, capsys) -> None:
    broken = sample_members(600, 300, "costs $5 and $6", 1)
    broken["jpg"] = broken["jpg"][:-300]
    samples = {"0": sample_members(256, 300, "a cat", 0), "1": broken, "2": sample_members(20, 20, None, 2)}
    samples["3"] = {"txt": b"without image"}
    write_tar(tmp_path / "00000.tar", samples)
    run(monkeypatch, str(tmp_path), "--count", "10", "--out", str(tmp_path / "grid.png"))
    printed = capsys.readouterr().out
    assert "3 samples in 1 shards" in printed
    assert "captions caption: usable 2, empty 0, missing 1, invalid 0" in printed
    assert "missing_image: 1 in 1 shards" in printed
    assert "class 256 px: 2 samples (height x width: 256x256 2)" in printed
    assert "class 512 px: 0 samples (height x width: none)" in printed
    assert Image.open(tmp_path / "grid.png").size[0] == 1440


def test_without_a_data_set_the_sources_of_the_configuration_are_counted(tmp_path: Path, monkeypatch, capsys) -> None:
    write_tar(tmp_path / "open" / "0.tar", {str(n): sample_members(64, 64, "a cat", n) for n in range(3)})
    write_tar(tmp_path / "own" / "0.tar", {"0": sample_members(40, 40, "a dog", 9)})
    sources = "".join(
        f'[[data.sources]]\nname = "{name}"\nshare = {share}\nshards = ["{tmp_path / name}"]\n'
        for name, share in (("open", 3), ("own", 1))
    )
    config = tmp_path / "mixed.toml"
    demo = CONFIGS / "demo.toml"
    config.write_text(f'extends = "{demo}"\n[data]\nshards = []\nindex_dir = "{tmp_path / "index"}"\n{sources}')
    run(monkeypatch, "--config", str(config), "--count", "4", "--out", str(tmp_path / "grid.png"))
    printed = capsys.readouterr().out
    assert "4 samples in 2 shards" in printed and (tmp_path / "grid.png").is_file()
    first, second = printed.split("source open: share 3, 3 samples\n")[1].split("source own: share 1, 1 samples\n")
    assert "  class 64 px: 3 samples (height x width: 64x64 3)" in first
    assert "  class 32 px: 1 samples" in second and "  class 64 px: 0 samples" in second
    config.write_text(f'extends = "{demo}"\n{sources}')
    with pytest.raises(SystemExit, match="only one of the two may name the data"):
        run(monkeypatch, "--config", str(config))
    with pytest.raises(SystemExit):
        run(monkeypatch)
    assert "name a DATASET or a --config" in capsys.readouterr().err


def test_a_missing_data_set_ends_in_one_line(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit, match="error: data.shards: shard .*none' .* does not exist"):
        run(monkeypatch, str(tmp_path / "none"))
