"""Pictures are whole, legible and invent nothing."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.font_manager import findfont
from PIL import Image, ImageFont

from bitdance_scale.observe.figures import CELL_SIDE_PX, MARGIN_PX, image_grid, wrap_caption


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_small_picture_is_enlarged_pixel_by_pixel(tmp_path):
    image = picture(32, 32)
    image_grid([image], ["a red circle"], tmp_path / "grid.png", columns=4)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    drawn = sheet[MARGIN_PX : MARGIN_PX + CELL_SIDE_PX, MARGIN_PX : MARGIN_PX + CELL_SIDE_PX]
    assert np.array_equal(drawn[::8, ::8], image)
    assert np.array_equal(drawn, image.repeat(8, axis=0).repeat(8, axis=1))


def test_pictures_of_all_sizes_are_whole_on_the_sheet(tmp_path):
    images = [picture(300, 500, 1), picture(64, 32, 2), picture(128, 128, 3)]
    image_grid(images, ["wide", "tall", "square " * 40], tmp_path / "grid.png", columns=2)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape[1] == 2 * (500 + MARGIN_PX) + MARGIN_PX
    for image, factor in zip(images, (1, 4, 2), strict=True):
        large = image.repeat(factor, axis=0).repeat(factor, axis=1)
        windows = np.lib.stride_tricks.sliding_window_view(sheet[:, :, 0], large.shape[1], axis=1)
        assert (windows == large[0, :, 0]).all(-1).any(), "the first row of the picture is not on the sheet"


@pytest.mark.parametrize(
    "caption", ["a blue square to the left of a green triangle", "x" * 90, "红色的圆" * 20, "", "iiii " * 60]
)
def test_wrapped_captions_fit_and_lose_nothing(caption):
    font = ImageFont.truetype(findfont("DejaVu Sans"), size=16)
    lines = wrap_caption(caption, font, 256)
    assert all(font.getlength(line) <= 256 for line in lines)
    assert "".join(lines).replace(" ", "") == caption.replace(" ", "")


def test_wrong_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 images, 0 captions"):
        image_grid([picture(8, 8)], [], tmp_path / "grid.png", columns=1)
    with pytest.raises(ValueError, match=r"float32 \[8, 8, 3\]"):
        image_grid([picture(8, 8).astype(np.float32)], ["a"], tmp_path / "grid.png", columns=1)
