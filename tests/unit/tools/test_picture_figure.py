"""The figure of a model's pictures over seeds."""

from __future__ import annotations

import numpy as np
import picture_figure
import pytest
from PIL import Image

from bitdance_scale.generate.sampling_file import write_sampling
from tests.released import write_published


def test_pictures_stand_in_order_below_their_prompts():
    shades = [[10, 60], [110, 160], [210, 250]]
    pictures = [[Image.new("RGB", (32, 16), (shade,) * 3) for shade in row] for row in shades]
    sheet = picture_figure.figure_of(["a", "b " * 60, "c"], pictures, 2)
    assert sheet.width == picture_figure.WIDTH_PX
    grey = np.asarray(sheet.convert("L"))
    centres = []
    for shade in (shade for row in shades for shade in row):
        rows, columns = np.nonzero(grey == shade)
        # A picture is twice as wide as high, as it was drawn, and a fifth of the page wide.
        centres.append((round(rows.mean()), round(columns.mean())))
    (top, left), (_, right), (beside, _), _, (below, again), _ = centres
    assert (
        top == beside < below
        and left == again < right
        and [x for _, x in centres[:4]] == sorted(x for _, x in centres[:4])
    )


def test_the_tool_draws_with_the_settings_of_the_folder(tmp_path, capsys):
    folder = write_published(tmp_path / "published")
    out = tmp_path / "figure.webp"
    assert picture_figure.main([str(folder), "--out", str(out)]) == 2
    assert "has no prompts of its own" in capsys.readouterr().err
    prompts = ["a red circle", "two blue squares"]
    write_sampling(folder, {"size_px": [32, 32], "num_steps": 1, "guidance": 1.0, "prompts": prompts})
    assert picture_figure.main([str(folder), "--out", str(out), "--per-prompt", "2"]) == 0
    assert "2 prompts, seeds 0 to 1 of each" in capsys.readouterr().out
    drawn = np.asarray(Image.open(out).convert("RGB"))
    assert drawn.shape[1] == picture_figure.WIDTH_PX and drawn.std() > 5


@pytest.mark.parametrize("name", ["figure.gif", "figure"])
def test_other_kinds_of_files_are_refused(tmp_path, capsys, name):
    assert picture_figure.main([str(tmp_path), "--out", str(tmp_path / name)]) == 2
    assert "name a .webp or a .png file" in capsys.readouterr().err
