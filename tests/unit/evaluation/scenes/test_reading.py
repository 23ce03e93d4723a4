"""The scene scorer: it reads drawn scenes right, and pictures of other scenes wrong."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.demo.scenes import SHAPES, Scene, SceneObject, class_scene, colors_on, make_scene, render
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.evaluation.benchmarks.demo_classes import DemoClasses
from bitdance_scale.evaluation.benchmarks.demo_scenes import CATEGORIES, DemoScenes, choose_scenes
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.catalogue import CLASSES, SCENES
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage
from bitdance_scale.evaluation.scenes.captions import Asked, Wanted, judge, parse_caption
from bitdance_scale.evaluation.scenes.reading import SeenObject, SeenScene, read_scene
from bitdance_scale.evaluation.scenes.scorer import BACKGROUND, EXACT, ClassScorer, SceneScorer, shares_by_chance


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return Image.open(buffer)


def one(shape: str, color: str, background: str, side_px: int = 64, size: float = 0.5) -> Scene:
    item = SceneObject(shape, color, (0.5, 0.5), (size, size))
    return Scene("colors", "", (side_px, side_px), background, (0.4, -0.7), (item,))


def seen(*objects: tuple[str, str, tuple[float, float]]) -> SeenScene:
    found = tuple(SeenObject(shape, color, centre, (0.2, 0.2), 0.9) for shape, color, centre in objects)
    return SeenScene("white", found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("background", ["cream", "navy"])
def test_every_shape_and_colour_is_read_back(shape: str, background: str) -> None:
    for color in colors_on(background):
        scene = one(shape, color, background)
        found = read_scene(as_jpeg(render(scene)))
        assert [(item.shape, item.color) for item in found.objects] == [(shape, color)], color
        assert found.background == background
        assert np.allclose(found.objects[0].centre, (0.5, 0.5), atol=0.03)
        assert np.allclose(found.objects[0].extent, (0.5, 0.5), atol=0.12)


def scored(prompts: Sequence[Prompt], pictures: Sequence[Image.Image], scorer=None) -> list[ImageScore]:
    drawn = [DrawnImage(prompt, 0, np.asarray(image)) for prompt, image in zip(prompts, pictures, strict=True)]
    return (scorer or SceneScorer())(drawn)


def test_drawn_scenes_score_at_least_97_percent() -> None:
    scenes = choose_scenes(12)
    scores = scored(DemoScenes(per_category=12).read(None), [as_jpeg(render(scene)) for scene in scenes])
    found = estimates(scores, SCENES.combine)
    assert found[OVERALL].value >= 0.97 and found[EXACT].value >= 0.95, found
    assert found[OVERALL].value == pytest.approx(np.mean([found[category].value for category in CATEGORIES]))
    assert found.keys() == {OVERALL, EXACT, BACKGROUND, *CATEGORIES} and found[BACKGROUND].value > 0.9
    assert [score.category for score in scores] == [scene.category for scene in scenes]


def test_pictures_of_other_scenes_score_low() -> None:
    """Every picture against the caption of another scene of its category."""
    scenes = choose_scenes(8)
    others = scenes[6:] + scenes[:6]
    scores = scored(DemoScenes(per_category=8).read(None), [render(scene) for scene in others])
    assert estimates(scores, SCENES.combine)[OVERALL].value < 0.15
    assert all(score.reason.startswith("seen: ") for score in scores)


def test_pictures_are_read_as_their_classes() -> None:
    prompts = DemoClasses().read(None)
    pictures = [render(class_scene(7, number)) for number in range(len(prompts))]
    found = estimates(scored(prompts, pictures, ClassScorer()), CLASSES.combine)
    assert {name: one.value for name, one in found.items()} == dict.fromkeys(found, 1.0)
    assert {OVERALL, "red", "heart"} < found.keys() and len(found) == 1 + 4 + 6
    # The neighbour's picture: another shape.
    wrong = scored(prompts, pictures[1:] + pictures[:1], ClassScorer())
    assert [score.value for score in wrong] == [0.0] * len(prompts)
    assert wrong[0].reason.startswith("seen: red square on ") and prompts[0].record == {"class": "red circle"}
    with pytest.raises(DataError, match="prompt 00000: names no class of the demo"):
        scored(DemoScenes(per_category=1).read(None)[:1], pictures[:1], ClassScorer())


@pytest.mark.parametrize("color", [(128, 128, 128), (20, 20, 30)])
def test_a_picture_without_objects_shows_none(color: tuple[int, int, int]) -> None:
    noise = np.random.default_rng(0).normal(0, 3, (64, 96, 3))
    image = Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8))
    assert read_scene(image).objects == ()


def test_a_blob_has_no_shape() -> None:
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    # A crescent: none of the eight.
    is_blob = (np.hypot(x, y) < 0.7) & (np.hypot(x - 0.35, y) > 0.55)
    pixels = np.where(is_blob[..., None], (214, 40, 40), (244, 244, 242)).astype(np.uint8)
    (found,) = read_scene(Image.fromarray(pixels)).objects
    assert found.shape is None and found.color == "red"


def test_touching_objects_of_two_colours_are_two() -> None:
    objects = (
        SceneObject("square", "red", (0.3, 0.5), (0.42, 0.42)),
        SceneObject("square", "blue", (0.68, 0.5), (0.42, 0.42)),
    )
    scene = dataclasses.replace(one("square", "red", "white", side_px=128), objects=objects)
    found = read_scene(render(scene)).objects
    assert {(item.shape, item.color) for item in found} == {("square", "red"), ("square", "blue")}


@pytest.mark.parametrize("seed", range(3))
def test_captions_say_what_their_scene_has(seed: int) -> None:
    for index in range(300):
        scene = make_scene(seed, index)
        if scene.category == "words":
            with pytest.raises(ConfigError, match="must be of the demo's grammar"):
                parse_caption(scene.caption)
            continue
        asked = parse_caption(scene.caption)
        assert asked.category == scene.category
        assert asked.count + len(asked.objects) - 1 == len(scene.objects)
        for wanted, item in zip(asked.objects, scene.objects, strict=False):
            assert wanted.shape == item.shape and wanted.color in (None, item.color)
        assert asked.background in (None, scene.background)
        truth = SeenScene(
            scene.background,
            tuple(SeenObject(item.shape, item.color, item.centre, item.extent, 1.0) for item in scene.objects),
        )
        verdict = judge(asked, truth)
        assert verdict.is_correct and verdict.is_exact and verdict.is_background_right in (None, True)


def test_verdicts_follow_geneval() -> None:
    circle, star = ("circle", "red", (0.2, 0.5)), ("star", "blue", (0.8, 0.5))
    ring = ("ring", "green", (0.5, 0.1))
    both = seen(circle, star)
    assert judge(Asked("single_object", (Wanted("star", None),)), both).is_correct
    assert not judge(Asked("single_object", (Wanted("star", None),)), both).is_exact
    assert not judge(Asked("colors", (Wanted("star", "red"),)), both).is_correct
    left = Asked("position", (Wanted("circle", "red"), Wanted("star", "blue")), relation="to the left of")
    assert judge(left, both).is_exact and not judge(left, seen(circle, star, ring)).is_exact
    assert not judge(dataclasses.replace(left, relation="to the right of"), both).is_correct
    assert not judge(dataclasses.replace(left, relation="above"), both).is_correct
    assert judge(Asked("position", (Wanted("circle", "red"),), place="at the left"), both).is_correct
    assert not judge(Asked("position", (Wanted("circle", "red"),), place="in the center"), both).is_correct
    two = Asked("counting", (Wanted("circle", None),), 2)
    assert not judge(two, both).is_correct and judge(two, seen(circle, circle, star)).is_correct
    assert not judge(two, seen(circle, circle, circle)).is_correct
    # One object cannot be both of two.
    twice = Asked("two_objects", (Wanted("star", None), Wanted("star", None)))
    assert not judge(twice, both).is_correct


def test_chance_is_what_pictures_score_for_the_other_captions_of_their_category() -> None:
    ball, box = ("circle", "red", (0.3, 0.5)), ("square", "blue", (0.7, 0.5))
    red, blue, both = seen(ball), seen(box), seen(ball, box)
    captions = ["a circle", "a square", "a red circle", "a blue square", "a red circle", "two red circles"]
    # Of six pairs of colours, only the red picture is wrong, for the blue caption.
    found = shares_by_chance(captions, [red, blue, both, both, red, both])
    assert found == {"single_object": 0.0, "colors": 5 / 6}


def test_a_circle_among_debris_is_not_right() -> None:
    scene = one("circle", "red", "white", side_px=128, size=0.3)
    pixels = np.asarray(render(scene)).copy()
    assert judge(parse_caption("a red circle"), read_scene(Image.fromarray(pixels))).is_correct
    for column in range(0, 128, 16):
        pixels[2:34, column : column + 3] = pixels[96:126, column : column + 3].repeat(2, axis=0)[:32] // 4
        pixels[94:126, column : column + 3] = (38, 96, 214)
    found = read_scene(Image.fromarray(pixels))
    assert any(item.shape == "circle" and item.color == "red" for item in found.objects) and found.clutter > 0.5
    assert not judge(parse_caption("a red circle"), found).is_correct


@pytest.mark.parametrize("caption", ["", "a red house", "a circle next to a square", "six red circles", "a circle and"])
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ConfigError, match="must be of the demo's grammar"):
        parse_caption(caption)
