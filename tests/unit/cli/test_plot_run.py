"""`bitdance plot`."""

from __future__ import annotations

from PIL import Image

from bitdance_scale.cli.plot_run import main
from tests.unit.observe.test_metrics import point
from tests.unit.observe.test_overview import write_run


def test_a_page_of_two_stages_is_written(tmp_path, capsys):
    folders = [str(write_run(tmp_path / name, [point(1), point(2)])) for name in ("pt", "ct")]
    out = tmp_path / "figures" / "stages.png"
    assert main([*folders, "--one-after-another", "--out", str(out)]) == 0
    assert Image.open(out).size == (2040, 1260)
    assert main([*folders, "--one-after-another", "--out", str(out.with_suffix(".webp"))]) == 0
    small = Image.open(out.with_suffix(".webp"))
    assert (small.format, small.size) == ("WEBP", (2040, 1260))
    assert capsys.readouterr().out.splitlines()[1] == "ct: 2 steps, 16 images, 900 tokens, 0:00:01 of training"


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "page.png")]) == 2
    assert f"{tmp_path}/metrics.jsonl does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
