"""Fields of the page become settings or a sentence; settings go into a PNG and come back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.app.settings import MAX_SEED, DrawSettings, Fields, png_of, read_fields, read_settings
from bitdance_scale.errors import ConfigError

GOOD = Fields(" a red circle ", "32 x 48", 5, 2.5, 7, 2)


def test_fields_become_settings(drawer):
    assert read_fields(GOOD, drawer.facts, 4) == DrawSettings("a red circle", 32, 48, 5, 2.5, 7, 2, {})
    for size in ("32x48", "32X48", " 32 × 48 ", "32*48"):  # noqa: RUF001
        assert read_fields(dataclasses.replace(GOOD, size=size), drawer.facts, 4).size_px == (32, 48)
    # A browser sends whole numbers as they are, and others as fractions.
    assert read_fields(dataclasses.replace(GOOD, steps=5.0), drawer.facts, 4).steps == 5


def test_weights_of_adapters_come_by_name(drawer):
    facts = dataclasses.replace(drawer.facts, adapters={"ink": 1.0, "chalk": 1.0})
    settings = read_fields(dataclasses.replace(GOOD, adapters=[0.5, -1]), facts, 4)
    assert settings.adapters == {"ink": 0.5, "chalk": -1.0}
    with pytest.raises(ConfigError, match="^Weight of chalk is empty: must be a number$"):
        read_fields(dataclasses.replace(GOOD, adapters=[0.5, None]), facts, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "^Prompt is empty: write what the picture should show$"),
        ({"prompt": "  \n"}, "^Prompt is empty"),
        ({"prompt": "a" * 10_001}, "^Prompt has 10,001 characters: must have at most 10,000; shorten it$"),
        ({"prompt": "a \ud83d"}, "^Prompt holds half of a character .*; write it again$"),
        ({"size": ""}, "^Size '': must be height x width in pixels, such as 32 x 32$"),
        ({"size": "large"}, "^Size 'large': must be height x width in pixels"),
        ({"size": "33 x 32"}, "^height = 33, width = 32: both must be multiples of 8 px .* use height 32, width 32$"),
        ({"size": "99999 x 8"}, "^height = 99999, width = 8: .* from 8 to 1024 px"),
        ({"steps": None}, "^Steps is empty: must be a number$"),
        ({"steps": 0}, "^Steps = 0: must be a whole number from 1 to 1000$"),
        ({"steps": 2.5}, "^Steps = 2.5: must be a whole number"),
        ({"guidance": float("nan")}, "^Guidance is empty"),
        ({"seed": -1}, "^Seed = -1: must be a whole number from 0"),
        ({"seed": MAX_SEED}, "^Seed = .*: must be a whole number from 0 to"),
        ({"images": 5}, "^Images = 5: must be a whole number from 1 to 4$"),
        ({"images": 0}, "^Images = 0"),
    ],
)
def test_what_is_wrong_is_said_by_field(drawer, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_fields(dataclasses.replace(GOOD, **changes), drawer.facts, 4)


def test_a_class_is_asked_for_by_that_name(drawer):
    facts = dataclasses.replace(drawer.facts, num_classes=3)
    with pytest.raises(ConfigError, match="^Class is empty: choose a class$"):
        read_fields(dataclasses.replace(GOOD, prompt=""), facts, 4)


def test_a_picture_says_how_it_was_drawn(drawer, tmp_path):
    prompt = 'ein "Kreis", 一个圆 \u0000 \\ {x}'
    settings = DrawSettings(prompt, 32, 48, 5, 2.5, 2**40, 2, {"ink": 0.25})
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    path.write_bytes(png_of(image, settings.record(drawer.facts, 1)))
    found = read_settings(path)
    assert found.pop("version")
    assert (found.pop("model"), found.pop("image"), found.pop("sampler")) == ("fake", 1, "euler_maruyama")
    assert DrawSettings(**found) == settings
    assert (np.asarray(Image.open(path)) == image).all()
    # Any program that knows PNG finds it: a tEXt chunk under the keyword.
    assert b"tEXtbitdance\0{" in path.read_bytes()


def test_a_picture_that_does_not_say_is_refused(tmp_path):
    path = tmp_path / "plain.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ConfigError, match="plain.png: does not say how it was drawn"):
        read_settings(path)
    path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="plain.png: cannot be read as a picture with its settings"):
        read_settings(path)
