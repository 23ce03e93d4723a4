"""Which view of a picture is trained in which epoch: mirrored or not, a random crop or the centre.

The choice is a function of (seed, epoch, sample) alone: not of the rank, the thread, the step or a resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitdance_scale.config.data_schema import AugmentSection
from bitdance_scale.data.images.views import CENTRE, Crop, View
from bitdance_scale.sequence.noise import Purpose, generator

_STORED_SEED = 0
"""Runs of any seed can draw from the same stored views."""


@dataclass(frozen=True)
class _Draw:
    """The random numbers of a sample in an epoch, U[0, 1); as many whatever the settings are."""

    flip: float
    is_crop: float
    zoom: float
    top: float
    left: float

    @classmethod
    def of(cls, seed: int, epoch: int, sample: int) -> _Draw:
        return cls(*generator(seed, Purpose.AUGMENT, epoch, sample).random(5).tolist())

    def crop(self, section: AugmentSection) -> View:
        return View(self.flip < section.flip, Crop(section.crop_zoom, self.zoom, self.top, self.left))


class Augmentation:
    """The views of a run.

    Args:
        section: the settings.
        seed: seed of the run.
    """

    def __init__(self, section: AugmentSection, seed: int) -> None:
        self._section, self._seed = section, seed

    def view(self, epoch: int, sample: int) -> View:
        """The view of a sample in an epoch of it.

        Args:
            epoch: from 0, as the plan counts the epochs of the sample's stream; a run on streams, which have none,
                takes the step.
            sample: its key.
        """
        if not self._section.is_active:
            return CENTRE
        draw = _Draw.of(self._seed, epoch, sample)
        if draw.is_crop < crop_share(self._section, epoch):
            return draw.crop(self._section)
        return View(draw.flip < self._section.flip)

    def stored_view(self, epoch: int, sample: int) -> int:
        """The same choice among the `stored_views` of a sample: the number of one of them."""
        if not self._section.is_active:
            return 0
        draw = _Draw.of(self._seed, epoch, sample)
        if draw.is_crop < crop_share(self._section, epoch):
            return _num_centres(self._section) + int(draw.zoom * self._section.bits_crops)
        return int(draw.flip < self._section.flip)


def crop_share(section: AugmentSection, epoch: int) -> float:
    """Probability of a random crop in an epoch."""
    until, ends = section.crop_until_epoch, section.crop_ends_epoch
    if ends == 0 or epoch < until:
        return section.crop
    return section.crop * (ends - epoch) / (ends - until) if epoch < ends else 0.0


def stored_views(section: AugmentSection, sample: int) -> list[View]:
    """The views of a sample that its bit shard holds: the centre, the same mirrored if a run may ask for it, crops."""
    crops = [_Draw.of(_STORED_SEED, number, sample).crop(section) for number in range(_num_crops(section))]
    return [CENTRE, View(is_flipped=True)][: _num_centres(section)] + crops


def num_stored_views(section: AugmentSection) -> int:
    """How many these are; 1 without augmentation."""
    return _num_centres(section) + _num_crops(section)


def stored_recipe(section: AugmentSection) -> dict[str, Any]:
    """What decides them, as JSON values; empty without augmentation."""
    if not section.is_active:
        return {}
    crops = {"flip": section.flip, "zoom": section.crop_zoom} if section.crop else {}
    return {"views": num_stored_views(section), "mirrored": section.flip > 0, **crops}


def _num_centres(section: AugmentSection) -> int:
    return 2 if section.flip > 0 else 1


def _num_crops(section: AugmentSection) -> int:
    return section.bits_crops if section.crop > 0 else 0
