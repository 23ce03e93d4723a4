"""Pictures of the page are small, in a bound, and missing ones are named."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.report.comparison import compare
from bitdance_scale.evaluation.report.scored_folder import parse_folder, read_folders
from bitdance_scale.evaluation.report.thumbnails import (
    MAX_SIDE_PX,
    PageFullError,
    Thumbnails,
    contact_sheet,
    encode,
    read_images,
    shrink,
)
from tests.unit.evaluation.report.scored_drawings import picture, score, score_clip, write_drawing


def first_prompt(root):
    (folder,) = read_folders([parse_folder(str(root))], ["scenes"])
    (section,) = compare([folder], folder.name, 18)
    result = section.results[folder.name]
    prompt = next(one for one in result.worst if one.prompt_id == "00000")
    return folder, result.scores, prompt


def test_images_are_those_of_the_prompt(tmp_path):
    folder, scores, prompt = first_prompt(score(write_drawing(tmp_path / "a")))
    images = read_images(folder, scores, prompt)
    assert [image.tolist() for image in images] == [picture(0).tolist(), picture(1).tolist()]
    (small, _) = Thumbnails().for_page(folder, scores, prompt, 2)
    # Pictures as small as these are shown as they are.
    assert small.media_type == "image/png"
    assert np.asarray(Image.open(io.BytesIO(small.content))).tolist() == picture(0).tolist()
    assert len(Thumbnails().for_page(folder, scores, prompt, 1)) == 1
    assert contact_sheet(images).size == (64, 32)


def test_large_pictures_are_shrunk_and_noisy_ones_are_jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (1024, 512, 3), dtype=np.uint8)
    small = shrink(noise)
    assert small.size == (MAX_SIDE_PX // 2, MAX_SIDE_PX)
    content, media_type = encode(small)
    assert media_type == "image/jpeg" and Image.open(io.BytesIO(content)).size == small.size
    # Under the bound of a page there is room for some hundreds even of noise.
    assert len(content) < 32_000
    assert shrink(noise[:50, :60]).size == (60, 50)


def test_the_bound_holds_and_what_is_left_out_is_counted(tmp_path):
    folder, scores, prompt = first_prompt(score(write_drawing(tmp_path / "a")))
    size = sum(len(one.content) for one in Thumbnails().for_page(folder, scores, prompt, 2))
    thumbnails = Thumbnails(max_bytes=2 * size + 1)
    for _ in range(2):
        thumbnails.for_page(folder, scores, prompt, 2)
    for left_out in (2, 4):
        with pytest.raises(PageFullError):
            thumbnails.for_page(folder, scores, prompt, 2)
        assert thumbnails.num_left_out == left_out


def test_missing_and_damaged_pictures_are_named(tmp_path):
    root = score(write_drawing(tmp_path / "a"))
    folder, scores, prompt = first_prompt(root)
    (root / "00000_1.png").write_bytes((root / "00000_1.png").read_bytes()[:60])
    with pytest.raises(ConfigError, match="00000_1.png: cannot be read as a picture"):
        read_images(folder, scores, prompt)
    (root / "00000_1.png").unlink()
    with pytest.raises(ConfigError, match="00000_1.png: cannot be read as a picture"):
        read_images(folder, scores, prompt)
    shutil.rmtree(root)
    with pytest.raises(ConfigError, match="00000_0.png: cannot be read as a picture"):
        read_images(folder, scores, prompt)


def test_images_of_no_benchmark_or_too_few_are_named(tmp_path):
    root = score_clip(write_drawing(tmp_path / "a"), 28.0)
    score(root, benchmark="")
    folder, scores, prompt = first_prompt(root)
    with pytest.raises(ConfigError, match="holds images of no benchmark"):
        read_images(folder, scores, prompt)
