"""The published sizes, and what is refused."""

from __future__ import annotations

import pytest

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.image_sizes import PUBLISHED_SIZES, beyond_published, check_size, known_sizes

PUBLISHED = VisionSection(weights="", block_side=4)
DISTILLED = VisionSection(weights="", block_side=8)
SMALL = VisionSection(weights="", block_side=2, channel_mult=(1, 1))


def test_published_sizes():
    assert len(PUBLISHED_SIZES) == len(set(PUBLISHED_SIZES)) == 18
    assert {(width, height) for height, width in PUBLISHED_SIZES} == set(PUBLISHED_SIZES)
    assert {(2048, 512), (512, 1920), (1536, 640), (1024, 1024), (256, 896), (640, 384), (512, 512)} <= {
        *PUBLISHED_SIZES
    }


@pytest.mark.parametrize("vision", [PUBLISHED, DISTILLED])
def test_every_published_size_is_possible(vision):
    for height, width in PUBLISHED_SIZES:
        assert check_size(height, width, vision) == (height // 16, width // 16)
        assert beyond_published(height, width, vision) == ""


@pytest.mark.parametrize(
    ("size", "vision", "message"),
    [
        ((1000, 1024), PUBLISHED, "height = 1000, .*multiples of 64 px .*to 4096 px; use 1024 x 1024 or 896 x 1152"),
        ((500, 260), DISTILLED, "multiples of 128 px"),
        ((0, 512), PUBLISHED, "use "),
        ((-64, 512), PUBLISHED, "use "),
        ((512.0, 512), PUBLISHED, "height = 512.0"),
        ((64, 4160), PUBLISHED, "width = 4160.*to 4096 px"),
        ((6, 9), SMALL, "multiples of 4 px .*use height 8, width 8"),
        ((516, 4), SMALL, "to 512 px; use height 512, width 4"),
    ],
)
def test_refusals_name_a_size_that_is_possible(size, vision, message):
    with pytest.raises(ConfigError, match=message):
        check_size(*size, vision)


def test_other_sizes_are_possible_and_said_to_be_untrained():
    assert check_size(256, 256, PUBLISHED) == (16, 16)
    assert "256 x 256 px is not among" in beyond_published(256, 256, PUBLISHED)
    # The published sizes say nothing about a tokenizer of another downsampling.
    assert beyond_published(8, 8, SMALL) == ""


@pytest.mark.parametrize(
    ("channel_mult", "block_side", "expected"),
    [((1, 1, 1, 1), 2, [(64, 64), (128, 128), (256, 256)]), ((1, 1), 16, [(32, 32), (64, 64)]), ((1,), 64, [(64, 64)])],
)
def test_sizes_of_other_tokenizers_are_squares_of_a_few_cells(channel_mult, block_side, expected):
    vision = VisionSection(weights="", channel_mult=channel_mult, block_side=block_side)
    assert known_sizes(vision) == expected
    assert [check_size(*size, vision) for size in expected]


def test_sizes_of_the_published_tokenizer_are_those_of_the_release_the_largest_first():
    found = known_sizes(VisionSection(weights="", block_side=8))
    assert (
        sorted(found) == sorted(PUBLISHED_SIZES) and found[0] == (1024, 1024) and found[-1] in ((256, 896), (896, 256))
    )
