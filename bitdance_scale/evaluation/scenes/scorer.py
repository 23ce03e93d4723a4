"""Scores of pictures of the demo's scenes, classes and style, read by image analysis."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from bitdance_scale.errors import DataError
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage
from bitdance_scale.evaluation.scenes.captions import Asked, judge, parse_caption
from bitdance_scale.evaluation.scenes.reading import SeenObject, SeenScene, read_scene
from bitdance_scale.evaluation.scenes.style import MIN_SHARE, corner_shares

EXACT = "exact"
"""Part of the metric `scenes`: what was asked is there, and nothing else is."""
BACKGROUND = "background"
"""Part of the same: the background is the one that was asked for, of the pictures whose caption asks for one."""

ALL_CORNERS = "all_corners"
"""Part of the metric `style`: every corner is one of the style's."""


class SceneScorer:
    """Whether pictures show what captions of the demo ask for."""

    networks = ()

    def __call__(self, images: Sequence[DrawnImage]) -> list[ImageScore]:
        """Scores of 0 or 1, in order.

        Raises:
            ConfigError: a prompt is no caption of the demo's grammar.
        """
        return [self._score(image) for image in images]

    def _score(self, image: DrawnImage) -> ImageScore:
        return score_seen(image.prompt, image.k, read_scene(Image.fromarray(image.pixels)))


def score_seen(prompt: Prompt, k: int, seen: SeenScene) -> ImageScore:
    """The score of a picture that has been read: image k of a prompt.

    Raises:
        ConfigError: the prompt is no caption of the demo's grammar.
    """
    asked = parse_caption(prompt.text)
    verdict = judge(asked, seen)
    parts = {asked.category: (float(verdict.is_correct), 1.0), EXACT: (float(verdict.is_exact), 1.0)}
    if verdict.is_background_right is not None:
        parts[BACKGROUND] = (float(verdict.is_background_right), 1.0)
    return ImageScore(prompt.id, k, asked.category, float(verdict.is_correct), parts, describe(seen))


def shares_by_chance(captions: Sequence[str], pictures: Sequence[SeenScene]) -> dict[str, float]:
    """How often pictures are right for the other captions of their category: what ignoring the captions would score.

    Args:
        captions: of the demo's grammar, one per picture.
        pictures: as they were read.

    Returns:
        Category -> share of its pairs of a caption and a picture of another; no category of a single caption.
    """
    by_category: dict[str, list[tuple[Asked, SeenScene]]] = {}
    for caption, seen in zip(captions, pictures, strict=True):
        asked = parse_caption(caption)
        by_category.setdefault(asked.category, []).append((asked, seen))
    shares = {}
    for category, pairs in by_category.items():
        verdicts = [
            judge(asked, seen).is_correct
            for place, (asked, _) in enumerate(pairs)
            for other, (_, seen) in enumerate(pairs)
            if other != place
        ]
        if verdicts:
            shares[category] = sum(verdicts) / len(verdicts)
    return shares


class ClassScorer:
    """Whether pictures show one shape, that of their class; the record of a prompt has the name of its class."""

    networks = ()

    def __call__(self, images: Sequence[DrawnImage]) -> list[ImageScore]:
        """Scores of 0 or 1, in order.

        Raises:
            DataError: a prompt names no class of the demo.
        """
        return [self._score(image) for image in images]

    def _score(self, image: DrawnImage) -> ImageScore:
        name = image.prompt.record.get("class")
        if not isinstance(name, str) or len(name.split()) != 2:
            raise DataError(f"prompt {image.prompt.id}: names no class of the demo, such as 'red circle'")
        color, shape = name.split()
        seen = read_scene(Image.fromarray(image.pixels))
        value = float(class_of(seen) == name)
        parts = dict.fromkeys((OVERALL, color, shape), (value, 1.0))
        return ImageScore(image.prompt.id, image.k, image.prompt.category, value, parts, describe(seen))


class StyleScorer:
    """How far pictures are in the demo's style `corners`, whatever their prompts ask for."""

    networks = ()

    def __call__(self, images: Sequence[DrawnImage]) -> list[ImageScore]:
        """Scores of 0 to 1, in order: the share of the corners that has the style's colour."""
        return [self._score(image) for image in images]

    def _score(self, image: DrawnImage) -> ImageScore:
        shares = corner_shares(image.pixels)
        value, num_corners = float(shares.mean()), int((shares >= MIN_SHARE).sum())
        parts = {OVERALL: (value, 1.0), ALL_CORNERS: (float(num_corners == len(shares)), 1.0)}
        reason = f"seen: {num_corners} of {len(shares)} photo corners"
        return ImageScore(image.prompt.id, image.k, image.prompt.category, value, parts, reason)


def class_of(seen: SeenScene) -> str:
    """The colour and the shape of the only object of a picture; empty where there is none, or more than one."""
    return _name(seen.objects[0]) if len(seen.objects) == 1 else ""


def describe(seen: SeenScene) -> str:
    """What a picture shows, in words."""
    objects = ", ".join(map(_name, seen.objects)) or "nothing"
    debris = f", {seen.clutter:.0%} clutter" if seen.clutter > 0 else ""
    return f"seen: {objects} on {seen.background}{debris}"


def _name(item: SeenObject) -> str:
    return f"{item.color} {item.shape or 'blob'}"
