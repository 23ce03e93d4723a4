"""The scenes: what the caption says is what the picture shows."""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import pytest

from bitdance_scale.demo.scenes import (
    BACKGROUNDS,
    CATEGORY_SHARES,
    COLORS,
    MIXES,
    NUMBERS,
    SHAPES,
    WORDS,
    SceneObject,
    make_scene,
    render,
)
from bitdance_scale.demo.shards import MIX_NAMES

SCENES = [make_scene(5, index) for index in range(600)]


def test_a_scene_depends_on_seed_and_index_alone():
    assert make_scene(5, 17) == SCENES[17]
    assert np.array_equal(np.asarray(render(make_scene(5, 17))), np.asarray(render(SCENES[17])))
    assert make_scene(6, 17) != SCENES[17]


# Of the compositions, those of one object in the middle are 20 %, and half of the positions have one object too.
@pytest.mark.parametrize(("mix", "alone", "several"), [("objects", 0.92, 0.06), ("compositions", 0.2, 0.67)])
def test_other_mixes_have_their_numbers_of_objects_on_a_plain_square(mix, alone, several):
    scenes = [make_scene(5, index, mix) for index in range(600)]
    counts = Counter(scene.category for scene in scenes)
    assert set(counts) == set(CATEGORY_SHARES)
    # Three standard deviations of 600 draws are 4 to 6 %.
    assert (counts["single_object"] + counts["colors"]) / len(scenes) == pytest.approx(alone, abs=0.05)
    assert np.mean([len(scene.objects) > 1 for scene in scenes]) == pytest.approx(several, abs=0.06)
    assert 0.86 < np.mean([scene.size_px[0] == scene.size_px[1] for scene in scenes]) < 0.94
    assert 0.05 < np.mean([scene.shading != (0.0, 0.0) for scene in scenes]) < 0.15
    assert 0.44 < np.mean([scene.caption.endswith("background") for scene in scenes]) < 0.56
    assert all(sum(mix.shares.values()) == pytest.approx(1) for mix in MIXES.values())
    assert tuple(MIXES) == MIX_NAMES


def test_every_category_size_and_aspect_occurs():
    counts = Counter(scene.category for scene in SCENES)
    assert set(counts) == set(CATEGORY_SHARES)
    # 600 draws: the rarest category, 8%, is expected 48 times.
    assert min(counts.values()) > 25
    short = np.array([min(scene.size_px) for scene in SCENES])
    long = np.array([max(scene.size_px) for scene in SCENES])
    assert short.min() >= 32 and long.min() >= 64 and long.max() <= 320
    # About two in five images serve a 128 px class, most a 64 px one; three standard deviations of 600 draws are 6%.
    assert 0.3 < (short >= 128).mean() < 0.52 and (short >= 64).mean() > 0.8
    assert len({round(scene.size_px[0] / scene.size_px[1], 1) for scene in SCENES}) >= 5


def test_objects_lie_inside_the_picture_apart_from_each_other():
    for scene in SCENES:
        boxes = []
        for item in scene.objects:
            left, right = item.centre[0] - item.extent[0] / 2, item.centre[0] + item.extent[0] / 2
            top, bottom = item.centre[1] - item.extent[1] / 2, item.centre[1] + item.extent[1] / 2
            # Extents are rounded to four digits.
            assert min(left, top) > -1e-3 and max(right, bottom) < 1.001, scene
            assert all(
                box[2] < left + 0.01 or right < box[0] + 0.01 or box[3] < top + 0.01 or bottom < box[1] + 0.01
                for box in boxes
            ), scene
            boxes.append((left, top, right, bottom))


def test_captions_agree_with_the_scene():
    for scene in SCENES:
        text = scene.caption.split(f" on a {scene.background} background")[0]
        if scene.category == "words":
            assert f'"{scene.text}" in {scene.text_color}' in text and scene.text in WORDS
        elif scene.category == "counting":
            number = next(n for n, word in NUMBERS.items() if re.search(rf"\b{word}\b", text))
            assert len(scene.objects) == number and len({item.shape for item in scene.objects}) == 1
        else:
            named = re.findall("|".join(SHAPES), text)
            assert named == [item.shape for item in scene.objects], scene
        if scene.category in ("colors", "position", "color_attribution"):
            expected = [f"{item.color} {item.shape}" for item in scene.objects]
            assert re.findall(rf"(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})", text) == expected, scene
        assert re.search(r"\ba [aeiou]|\ban [^aeiou]", scene.caption.replace("an image showing ", "")) is None


@pytest.mark.parametrize(
    ("relation", "axis", "sign"),
    [("to the left of", 0, -1), ("to the right of", 0, 1), ("above", 1, -1), ("below", 1, 1)],
)
def test_relations_hold(relation: str, axis: int, sign: int):
    scenes = [scene for scene in SCENES if f" {relation} a" in scene.caption]
    assert scenes
    for scene in scenes:
        first, second = scene.objects
        assert sign * (first.centre[axis] - second.centre[axis]) > (first.extent[axis] + second.extent[axis]) / 2 - 0.01


def test_places_hold():
    scenes = [scene for scene in SCENES if scene.category == "position" and len(scene.objects) == 1]
    for scene in scenes:
        x, y = scene.objects[0].centre
        for word, holds in {"left": x < 0.35, "right": x > 0.65, "top": y < 0.35, "bottom": y > 0.65}.items():
            assert (f" {word}" in scene.caption) == holds, scene
        assert ("in the center" in scene.caption) == (x == y == 0.5)


def test_the_picture_has_the_colours_of_the_scene():
    for scene in SCENES[:100]:
        pixels = np.asarray(render(scene)).astype(int)
        assert pixels.shape == (scene.size_px[1], scene.size_px[0], 3)
        # A linear shade of at most 26 levels lies on the background.
        assert np.abs(pixels[0, 0] - BACKGROUNDS[scene.background]).max() <= 26
        for item in scene.objects:
            # A star fills the least of its box, 28%; anti-aliased borders take a third of that at 20 px.
            assert _coverage(_box(pixels, item), item.color) > 0.15, scene
        if scene.text_color:
            assert _coverage(pixels, scene.text_color) > 0.01, scene


def test_objects_and_words_stand_out_from_the_background():
    for scene in SCENES:
        colors = [item.color for item in scene.objects] + ([scene.text_color] if scene.text_color else [])
        for color in colors:
            # Summed over channels; the smallest distance the palette lets through is that of pink on gray.
            assert np.abs(np.subtract(COLORS[color], BACKGROUNDS[scene.background])).sum() > 120, scene


def test_the_record_is_json():
    record = json.loads(json.dumps(SCENES[0].record()))
    assert record["category"] == SCENES[0].category and len(record["objects"]) == len(SCENES[0].objects)


def _box(pixels: np.ndarray, item: SceneObject) -> np.ndarray:
    """The part of the picture in the object's bounding box."""
    height, width = pixels.shape[:2]
    left, right = ((item.centre[0] + side * item.extent[0] / 2) * width for side in (-1, 1))
    top, bottom = ((item.centre[1] + side * item.extent[1] / 2) * height for side in (-1, 1))
    return pixels[round(top) : round(bottom), round(left) : round(right)]


def _coverage(pixels: np.ndarray, color: str) -> float:
    """Share of the pixels that have exactly the colour; flat fills are exact, anti-aliased borders are not."""
    return float((pixels == COLORS[color]).all(axis=-1).mean())
