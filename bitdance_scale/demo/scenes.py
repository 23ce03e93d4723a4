"""Captioned scenes drawn by a program: the demo's images, with a machine-readable record of what they show.

A scene belongs to one of seven categories: the six of GenEval (arXiv 2310.11513: single object, two objects, counting,
colors, position, color attribution) and short rendered words. `make_scene` decides what is in the picture and describes
it in a caption; `render` draws it. Scene `index` of `seed` is always the same, whatever else is generated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Mix:
    """What a set of scenes is made of.

    Attributes:
        shares: of the categories; they add up to 1.
        aspects: widths over heights, all equally frequent.
        shaded_share: share of the pictures whose background is shaded.
        named_share: share of the captions that name the background.
    """

    shares: Mapping[str, float]
    aspects: tuple[float, ...]
    shaded_share: float
    named_share: float


COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (248, 209, 47),
    "green": (46, 155, 75),
    "blue": (38, 96, 214),
    "purple": (128, 60, 176),
    "pink": (242, 122, 178),
    "brown": (124, 76, 42),
    "black": (24, 24, 28),
    "white": (250, 250, 250),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 242),
    "gray": (196, 198, 202),
    "cream": (240, 228, 200),
    "sky blue": (182, 216, 240),
    "mint green": (196, 232, 208),
    "navy": (24, 34, 72),
    "black": (26, 26, 30),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring")
WORDS = (
    "CAT",
    "DOG",
    "SUN",
    "SKY",
    "HAT",
    "BUS",
    "CAR",
    "CUP",
    "BOX",
    "MAP",
    "TREE",
    "MOON",
    "STAR",
    "FISH",
    "BIRD",
    "BOOK",
    "HOME",
    "OPEN",
    "STOP",
    "LOVE",
    "YES",
    "NO",
    "GO",
    "HI",
)
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
PLACES: dict[str, tuple[float, float]] = {
    "at the left": (0.24, 0.5),
    "at the right": (0.76, 0.5),
    "at the top": (0.5, 0.24),
    "at the bottom": (0.5, 0.76),
    "in the center": (0.5, 0.5),
    "in the top left corner": (0.24, 0.24),
    "in the top right corner": (0.76, 0.24),
    "in the bottom left corner": (0.24, 0.76),
    "in the bottom right corner": (0.76, 0.76),
}
RELATIONS: dict[str, tuple[float, float]] = {
    "to the left of": (-1.0, 0.0),
    "to the right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}
CATEGORY_SHARES = {
    "single_object": 0.14,
    "two_objects": 0.14,
    "counting": 0.16,
    "colors": 0.18,
    "position": 0.16,
    "color_attribution": 0.14,
    "words": 0.08,
}
ASPECTS = (1.0, 1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 2.0, 1 / 2)
# Nine in ten pictures are square.
OBJECT_ASPECTS = (*(1.0,) * 54, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 2.0, 1 / 2)
OBJECT_SHARES = {
    "single_object": 0.42,
    "two_objects": 0.01,
    "counting": 0.03,
    "colors": 0.5,
    "position": 0.02,
    "color_attribution": 0.01,
    "words": 0.01,
}
COMPOSITION_SHARES = {
    "single_object": 0.08,
    "two_objects": 0.18,
    "counting": 0.2,
    "colors": 0.12,
    "position": 0.22,
    "color_attribution": 0.18,
    "words": 0.02,
}
MIXES: dict[str, Mix] = {
    "scenes": Mix(CATEGORY_SHARES, ASPECTS, shaded_share=0.5, named_share=0.2),
    "objects": Mix(OBJECT_SHARES, OBJECT_ASPECTS, shaded_share=0.1, named_share=0.5),
    "compositions": Mix(COMPOSITION_SHARES, OBJECT_ASPECTS, shaded_share=0.1, named_share=0.5),
}
"""What a set of scenes is made of: everything alike; mostly one large object on a plain square picture; or mostly
several objects on such a picture."""
MIN_CONTRAST = 120.0
# Of class scenes. The two shapes left out are not told apart in the tokenizer's picture of so few pixels.
CLASS_COLORS = ("red", "yellow", "green", "blue")
CLASS_SHAPES = ("circle", "square", "triangle", "heart", "cross", "ring")
CLASS_SIDE_PX = 32
LARGE_PX = 384


@dataclass(frozen=True)
class SceneObject:
    """A shape in a scene.

    Attributes:
        shape: one of `SHAPES`.
        color: one of `COLORS`.
        centre: (x, y) of its bounding box as a share of width and height.
        extent: (width, height) of its bounding box as a share of width and height.
    """

    shape: str
    color: str
    centre: tuple[float, float]
    extent: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """What a picture shows, enough to draw it and to check a picture against it.

    Attributes:
        category: one of `CATEGORY_SHARES`.
        caption: the text a model is trained with.
        size_px: (width, height).
        background: one of `BACKGROUNDS`.
        shading: (horizontal, vertical) change of the background's brightness across the picture, in -1..1.
        objects: the shapes; empty for words.
        text: the rendered word, upper case; None for shapes.
        text_color: colour of the word, one of `COLORS`; None for shapes.
    """

    category: str
    caption: str
    size_px: tuple[int, int]
    background: str
    shading: tuple[float, float]
    objects: tuple[SceneObject, ...] = ()
    text: str | None = None
    text_color: str | None = None

    def record(self) -> dict[str, object]:
        """The scene as JSON values, for the `scene` entry of a sample's json."""
        return dataclasses.asdict(self)


def make_scene(seed: int, index: int, mix: str = "scenes") -> Scene:
    """Scene `index` of `seed` of one of `MIXES`; scenes of different seeds are independent draws."""
    return _Composer(np.random.default_rng([seed, index]), MIXES[mix]).compose()


def class_names() -> list[str]:
    """The classes of class scenes, in the order of their numbers: a colour and a shape."""
    return [f"{color} {shape}" for color in CLASS_COLORS for shape in CLASS_SHAPES]


def class_scene(seed: int, index: int) -> Scene:
    """Class scene `index` of `seed`, of class `index` modulo the number of classes: one shape on a square picture.

    Background, shading, place and size are drawn.
    """
    rng = np.random.default_rng([seed, index])
    name = class_names()[index % len(class_names())]
    color, shape = name.split()
    grounds = [ground for ground in BACKGROUNDS if color in colors_on(ground)]
    background = grounds[rng.integers(len(grounds))]
    x, y, horizontal, vertical = rng.uniform(-1, 1, 4)
    extent = float(rng.uniform(0.62, 0.8))
    centre = _rounded((0.5 + 0.08 * float(x), 0.5 + 0.08 * float(y)))
    return Scene(
        category="colors",
        caption=_article(name),
        size_px=(CLASS_SIDE_PX, CLASS_SIDE_PX),
        background=background,
        shading=_rounded((float(horizontal), float(vertical))),
        objects=(SceneObject(shape, color, centre, _rounded((extent, extent))),),
    )


def colors_on(background: str) -> tuple[str, ...]:
    """Those of `COLORS` that stand out from one of `BACKGROUNDS`."""
    return tuple(name for name, rgb in COLORS.items() if _contrast(rgb, BACKGROUNDS[background]) > MIN_CONTRAST)


def render(scene: Scene) -> Image.Image:
    """Draws the scene: an RGB image of `scene.size_px`."""
    width, height = scene.size_px
    image = Image.fromarray(_shaded_background(scene))
    for item in scene.objects:
        box = (max(4, round(item.extent[0] * width)), max(4, round(item.extent[1] * height)))
        corner = (round(item.centre[0] * width - box[0] / 2), round(item.centre[1] * height - box[1] / 2))
        image.paste(COLORS[item.color], corner, shape_mask(item.shape, box))
    if scene.text is not None and scene.text_color is not None:
        font = _font(_font_size(scene.text, round(0.82 * width), round(0.6 * height)))
        ImageDraw.Draw(image).text((width / 2, height / 2), scene.text, COLORS[scene.text_color], font, anchor="mm")
    return image


class _Composer:
    """Draws one scene's random choices in a fixed order."""

    def __init__(self, rng: np.random.Generator, mix: Mix) -> None:
        self.rng, self.mix = rng, mix
        self.size_px = self._size_px()
        self.background = self._pick(tuple(BACKGROUNDS))
        self.colors = colors_on(self.background)
        self.shading = (
            (0.0, 0.0) if rng.random() < 1 - mix.shaded_share else tuple(np.round(rng.uniform(-1, 1, 2), 3).tolist())
        )

    def compose(self) -> Scene:
        category = str(self.rng.choice(list(self.mix.shares), p=list(self.mix.shares.values())))
        if category == "words":
            word, color = self._pick(WORDS), self._pick(self.colors)
            template = self._pick(('the word "{}" in {}', 'the word "{}" in {} letters', 'a sign that says "{}" in {}'))
            return self._scene(category, template.format(word, color), (), word, color)
        phrase, objects = getattr(self, f"_{category}")()
        return self._scene(category, phrase, objects)

    def _single_object(self) -> tuple[str, tuple[SceneObject, ...]]:
        shape = self._pick(SHAPES)
        return _article(shape), (self._one(shape, self._pick(self.colors), self._near_centre(), 0.68),)

    def _colors(self) -> tuple[str, tuple[SceneObject, ...]]:
        shape, color = self._pick(SHAPES), self._pick(self.colors)
        return _article(f"{color} {shape}"), (self._one(shape, color, self._near_centre(), 0.68),)

    def _two_objects(self) -> tuple[str, tuple[SceneObject, ...]]:
        first, second = self._two(SHAPES)
        colors = (self._pick(self.colors), self._pick(self.colors))
        return f"{_article(first)} and {_article(second)}", self._pair((first, second), colors, self._direction())

    def _color_attribution(self) -> tuple[str, tuple[SceneObject, ...]]:
        shapes, colors = self._two(SHAPES), self._two(self.colors)
        first, second = (_article(f"{color} {shape}") for color, shape in zip(colors, shapes, strict=True))
        return f"{first} and {second}", self._pair(shapes, colors, self._direction())

    def _counting(self) -> tuple[str, tuple[SceneObject, ...]]:
        number = int(self.rng.choice([2, 3, 4, 5], p=[0.3, 0.3, 0.25, 0.15]))
        shape, color = self._pick(SHAPES), self._pick(self.colors)
        plural = "crosses" if shape == "cross" else f"{shape}s"
        phrase = f"{NUMBERS[number]} {color} {plural}" if self.rng.random() < 0.75 else f"{NUMBERS[number]} {plural}"
        centres, cell = self._spread(number)
        return phrase, tuple(self._one(shape, color, centre, 0.8, cell) for centre in centres)

    def _position(self) -> tuple[str, tuple[SceneObject, ...]]:
        if self.rng.random() < 0.5:
            shape, color, place = self._pick(SHAPES), self._pick(self.colors), self._pick(tuple(PLACES))
            return f"{_article(f'{color} {shape}')} {place}", (self._one(shape, color, PLACES[place], 0.4),)
        relation = self._pick(tuple(RELATIONS))
        shapes, colors = self._two(SHAPES), self._two(self.colors)
        first, second = (_article(f"{color} {shape}") for color, shape in zip(colors, shapes, strict=True))
        return f"{first} {relation} {second}", self._pair(shapes, colors, RELATIONS[relation])

    def _scene(
        self,
        category: str,
        phrase: str,
        objects: tuple[SceneObject, ...],
        text: str | None = None,
        color: str | None = None,
    ) -> Scene:
        if self.rng.random() < self.mix.named_share:
            phrase = f"{phrase} on {_article(f'{self.background} background')}"
        opening = self._pick(("", "", "", "", "a picture of ", "a drawing of ", "an image showing "))
        return Scene(category, opening + phrase, self.size_px, self.background, self.shading, objects, text, color)

    def _size_px(self) -> tuple[int, int]:
        """(width, height): short side 48..224, long side 64..320; two in five are at least 128 px in both."""
        aspect = self.mix.aspects[self.rng.integers(len(self.mix.aspects))]
        low, high = ((48, 64), (64, 128), (128, 225))[self.rng.choice(3, p=[0.12, 0.46, 0.42])]
        long_over_short = max(aspect, 1 / aspect)
        short = min(int(self.rng.integers(low, high)), int(320 / long_over_short))
        long = max(64, round(short * long_over_short))
        return (long, short) if aspect > 1 else (short, long) if aspect < 1 else (long, long)

    def _one(
        self,
        shape: str,
        color: str,
        centre: tuple[float, float],
        size: float,
        cell: tuple[float, float] = (1.0, 1.0),
    ) -> SceneObject:
        """An object about `size` times the shorter side of `cell`, a (width, height) as shares of the picture."""
        width, height = self.size_px
        side_px = min(cell[0] * width, cell[1] * height) * size * self.rng.uniform(0.85, 1.1)
        extent = (side_px / width, side_px / height)
        return SceneObject(shape, color, _rounded(centre), _rounded(extent))

    def _pair(
        self, shapes: tuple[str, str], colors: tuple[str, str], direction: tuple[float, float]
    ) -> tuple[SceneObject, SceneObject]:
        """Two objects; the first lies from the second in `direction`."""
        dx, dy = direction
        cross = self.rng.uniform(-0.08, 0.08)
        gap = 0.24 if dx * dy == 0 else 0.21
        first = (0.5 + gap * dx + cross * (dx == 0), 0.5 + gap * dy + cross * (dy == 0))
        second = (1 - first[0], 1 - first[1])
        cell = (0.5 if dx else 1.0, 0.5 if dy else 1.0)
        # A cell as large as the picture's shorter side would make objects that touch the edge.
        fills_short_side = min(cell[0] * self.size_px[0], cell[1] * self.size_px[1]) >= min(self.size_px)
        size = 0.62 if fills_short_side else 0.8
        return (self._one(shapes[0], colors[0], first, size, cell), self._one(shapes[1], colors[1], second, size, cell))

    def _spread(self, number: int) -> tuple[list[tuple[float, float]], tuple[float, float]]:
        """Centres of `number` objects and the (width, height) of the cell each has to itself, inside a small margin."""
        width, height = self.size_px
        columns = min(number, max(1, round(math.sqrt(number * width / height))))
        rows = math.ceil(number / columns)
        columns = math.ceil(number / rows)
        centres = []
        for row in range(rows):
            in_row = min(columns, number - row * columns)
            for column in range(in_row):
                x = 0.5 + (column - (in_row - 1) / 2) / columns
                y = (row + 0.5) / rows
                centres.append((0.5 + 0.92 * (x - 0.5), 0.5 + 0.92 * (y - 0.5)))
        return centres, (0.92 / columns, 0.92 / rows)

    def _direction(self) -> tuple[float, float]:
        """Along the longer side mostly, so that both objects stay large; sometimes diagonal."""
        width, height = self.size_px
        sign = float(self.rng.choice([-1, 1]))
        if self.rng.random() < 0.2:
            return (sign, float(self.rng.choice([-1, 1])))
        is_horizontal = width > height or (width == height and self.rng.random() < 0.5)
        return (sign, 0.0) if is_horizontal else (0.0, sign)

    def _near_centre(self) -> tuple[float, float]:
        x, y = self.rng.uniform(-0.06, 0.06, 2)
        return (0.5 + float(x), 0.5 + float(y))

    def _pick(self, options: tuple[str, ...]) -> str:
        return options[self.rng.integers(len(options))]

    def _two(self, options: tuple[str, ...]) -> tuple[str, str]:
        first, second = self.rng.choice(len(options), size=2, replace=False)
        return (options[first], options[second])


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _rounded(pair: tuple[float, float]) -> tuple[float, float]:
    return (round(float(pair[0]), 4), round(float(pair[1]), 4))


def _contrast(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """Euclidean distance of two colours with green counted most, as the eye does; black to white is 441."""
    weights = (0.9, 1.4, 0.7)
    return math.sqrt(sum(w * (a - b) ** 2 for w, a, b in zip(weights, first, second, strict=True)))


def _shaded_background(scene: Scene) -> np.ndarray:
    """uint8 [height, width, 3], the background colour under a linear shade of at most 26 levels across the picture."""
    width, height = scene.size_px
    x, y = np.linspace(-13, 13, width)[None, :, None], np.linspace(-13, 13, height)[:, None, None]
    shade = scene.shading[0] * x + scene.shading[1] * y
    return (np.array(BACKGROUNDS[scene.background]) + shade).clip(0, 255).astype(np.uint8)


def shape_mask(shape: str, box_px: tuple[int, int]) -> Image.Image:
    """Coverage of the shape in a box of (width, height) pixels, mode L, anti-aliased."""
    return _drawn_large(shape).resize(box_px, Image.Resampling.BILINEAR)


@cache
def _drawn_large(shape: str) -> Image.Image:
    """The shape filling a square of `LARGE_PX`, mode L; every size is scaled from it."""
    mask = Image.new("L", (LARGE_PX, LARGE_PX), 0)
    draw = ImageDraw.Draw(mask)
    size = LARGE_PX - 1
    if shape == "circle":
        draw.ellipse((0, 0, size, size), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, size, size), fill=255)
        draw.ellipse((size * 0.25, size * 0.25, size * 0.75, size * 0.75), fill=0)
    elif shape == "square":
        draw.rectangle((size * 0.05, size * 0.05, size * 0.95, size * 0.95), fill=255)
    else:
        draw.polygon([(x * size, y * size) for x, y in _outline(shape)], fill=255)
    return mask


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of the polygon in the unit square."""
    if shape == "triangle":
        return [(0.5, 0.04), (1.0, 0.94), (0.0, 0.94)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.92, 0.5), (0.5, 1.0), (0.08, 0.5)]
    if shape == "cross":
        a, b = 0.34, 0.66
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    if shape == "star":
        radii = [0.52 if i % 2 == 0 else 0.23 for i in range(10)]
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return [(0.5 + r * math.cos(t), 0.54 + r * math.sin(t)) for r, t in zip(radii, angles, strict=True)]
    assert shape == "heart", shape
    turns = np.linspace(0, 2 * math.pi, 80)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(0.5 + float(a) / 33, 0.46 - float(b) / 33) for a, b in zip(x, y, strict=True)]


@cache
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold, which matplotlib ships, so that words look alike on every machine."""
    # Only words need it, and it takes half a second.
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), size_px)


def _font_size(text: str, width_px: int, height_px: int) -> int:
    """Largest size at which the text fits the box, from its measure at 100 px."""
    left, top, right, bottom = _font(100).getbbox(text)
    return max(8, int(100 * min(width_px / (right - left), height_px / (bottom - top))))
