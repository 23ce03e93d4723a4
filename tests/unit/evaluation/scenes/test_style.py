"""The style of demo scenes: it is found where it is, and only there, and scenes are read through it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_scale.config.load import load_config
from bitdance_scale.demo.scenes import BACKGROUNDS, Scene, SceneObject, colors_on, make_scene, render
from bitdance_scale.demo.styles import CORNER_RGB, corner_masks, styled
from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoScenes, choose_scenes
from bitdance_scale.evaluation.metrics.catalogue import SCENES, STYLE
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage, PictureScorer
from bitdance_scale.evaluation.scenes.reading import read_scene
from bitdance_scale.evaluation.scenes.scorer import ALL_CORNERS, BACKGROUND, SceneScorer, StyleScorer
from bitdance_scale.evaluation.scenes.style import corner_shares, style_mask
from bitdance_scale.vision.tokenizer import VisionTokenizer

SIDE_PX = 64
PER_CATEGORY = 8


@pytest.fixture(scope="module")
def through_tokenizer() -> tuple[list[Image.Image], list[Image.Image]]:
    """(plain, styled) pictures of the benchmark's scenes as the demo's tokenizer gives them back at `SIDE_PX`."""
    vision = VisionTokenizer(load_config("demo").vision, torch.device("cpu"))

    def seen(image: Image.Image) -> Image.Image:
        square = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        (bits,) = vision.encode([torch.from_numpy(np.array(square))])
        return Image.fromarray(vision.decode(bits, (SIDE_PX // 8, SIDE_PX // 8)).numpy())

    pictures = [render(scene) for scene in choose_scenes(PER_CATEGORY) if scene.size_px[0] == scene.size_px[1]]
    return [seen(image) for image in pictures], [seen(styled(image, "corners")) for image in pictures]


def scored(pictures: list[Image.Image], scorer: PictureScorer, scenes: list[Scene] | None = None) -> list[ImageScore]:
    prompts = DemoScenes(per_category=PER_CATEGORY).read(None)
    if scenes is None:
        prompts = [prompt for prompt in prompts if prompt.record["size_px"][0] == prompt.record["size_px"][1]]
    images = [DrawnImage(prompt, 0, np.asarray(image)) for prompt, image in zip(prompts, pictures, strict=True)]
    return scorer(images)


def test_corners_are_triangles_of_the_shorter_side() -> None:
    masks = corner_masks((80, 40))
    assert masks.shape == (4, 40, 80)
    assert masks[:, 20, 40].sum() == 0 and not (masks.sum(axis=0) > 1).any()
    for mask, (row, column) in zip(masks, ((0, 0), (0, -1), (-1, 0), (-1, -1)), strict=True):
        # Of pixels whose centres are within legs of 10 px: 9 + 8 + .. + 1.
        assert mask[row, column] and mask.sum() == 45


def test_a_styled_picture_differs_in_its_corners_only() -> None:
    image = render(make_scene(0, 3))
    before, after = np.asarray(image), np.asarray(styled(image, "corners"))
    is_corner = corner_masks(image.size).any(axis=0)
    assert (after[is_corner] == CORNER_RGB).all() and (after[~is_corner] == before[~is_corner]).all()


def test_the_style_is_found_in_styled_scenes_and_not_in_plain_ones() -> None:
    pictures = [render(scene) for scene in choose_scenes(PER_CATEGORY)]
    plain = estimates(scored(pictures, StyleScorer(), []), STYLE.combine)
    found = estimates(scored([styled(image, "corners") for image in pictures], StyleScorer(), []), STYLE.combine)
    assert found[OVERALL].value > 0.999 and found[ALL_CORNERS].value == 1
    assert plain[OVERALL].value < 0.01 and plain[ALL_CORNERS].value == 0
    assert found.keys() == {OVERALL, ALL_CORNERS}


def test_it_is_found_in_what_the_tokenizer_gives_back(through_tokenizer) -> None:
    plain, marked = (estimates(scored(pictures, StyleScorer()), STYLE.combine) for pictures in through_tokenizer)
    assert marked[OVERALL].value > 0.95 and marked[OVERALL].low > 0.9 and marked[ALL_CORNERS].value > 0.9, marked
    assert plain[OVERALL].value < 0.02 and plain[ALL_CORNERS].value == 0, plain


def test_scenes_are_read_through_the_style(through_tokenizer) -> None:
    """A styled scene is judged as the plain one, but for small shapes that a corner or the tokenizer blunts."""
    pictures = [render(scene) for scene in choose_scenes(PER_CATEGORY)]
    drawn = estimates(scored([styled(image, "corners") for image in pictures], SceneScorer(), []), SCENES.combine)
    assert drawn[OVERALL].value > 0.95 and drawn[BACKGROUND].value > 0.9, drawn
    plain, marked = (estimates(scored(pictures, SceneScorer()), SCENES.combine) for pictures in through_tokenizer)
    assert marked[OVERALL].value > plain[OVERALL].value - 0.1, (plain, marked)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_no_plain_scene_has_a_corner_of_the_style(background: str) -> None:
    """The nearest is a red square in a corner, which takes less of it than counts; others only by their edges."""
    for color in colors_on(background):
        item = SceneObject("square", color, (0.24, 0.24), (0.44, 0.44))
        image = np.asarray(render(Scene("position", "", (64, 64), background, (1.0, -1.0), (item,))))
        assert not style_mask(image).any(), color
        assert color == "red" or corner_shares(image).max() < 0.25, color


def test_a_picture_of_the_corners_alone_shows_nothing() -> None:
    image = styled(Image.new("RGB", (64, 96), BACKGROUNDS["navy"]), "corners")
    seen = read_scene(image)
    assert seen.background == "navy" and seen.objects == () and seen.clutter == 0


def test_one_corner_is_a_quarter_of_the_style() -> None:
    image = np.asarray(Image.new("RGB", (64, 64), BACKGROUNDS["cream"])).copy()
    image[corner_masks((64, 64))[2]] = CORNER_RGB
    prompt = DemoScenes(per_category=1).read(None)[0]
    (score,) = StyleScorer()([DrawnImage(prompt, 0, image)])
    assert score.value == 0.25 and score.parts[ALL_CORNERS] == (0.0, 1.0)
    assert score.reason == "seen: 1 of 4 photo corners"
