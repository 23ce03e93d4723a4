"""Verdicts on images from prompts of GenEval: detector, colours and rules in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.clip import load_clip
from bitdance_scale.evaluation.geneval.colours import ColourClassifier
from bitdance_scale.evaluation.geneval.detector import Detector, load_detector
from bitdance_scale.evaluation.geneval.preprocessing import Preprocessing
from bitdance_scale.evaluation.geneval.rules import Detection, Verdict, check_record, judge


class Scorer:
    """Judges images.

    Args:
        detector: finds objects.
        colours: names their colours.
    """

    def __init__(self, detector: Detector, colours: ColourClassifier) -> None:
        self.detector = detector
        self.colours = colours

    def __call__(self, images: Sequence[np.ndarray], records: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """A verdict per image.

        Args:
            images: uint8 [H, W, 3] each; those of one size go through the detector together.
            records: of each image, the line of its prompt in `evaluation_metadata.jsonl`.

        Raises:
            DataError: a record is nothing that the rules know.
        """
        for index, record in enumerate(records):
            check_record(record, f"record {index}")
        places: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            places.setdefault(image.shape, []).append(index)
        verdicts: dict[int, Verdict] = {}
        for same in places.values():
            found = self.detector(np.stack([images[index] for index in same]))
            for index, objects in zip(same, found, strict=True):
                verdicts[index] = self._judge(images[index], records[index], objects)
        return [verdicts[index] for index in range(len(records))]

    def _judge(self, image: np.ndarray, record: Mapping[str, Any], objects: Mapping[str, list[Detection]]) -> Verdict:
        return judge(record, objects, lambda name, found: self.colours(image, name, found))


def load_scorer(
    detector: str,
    clip: str,
    device: torch.device | str = "cpu",
    preprocessing: Preprocessing | None = None,
) -> Scorer:
    """The scorer, on a device.

    Args:
        detector: see `load_detector`.
        clip: see `load_clip`.
        device: of both networks.
        preprocessing: of images for the detector; the default is that of the published scorer.

    Raises:
        CheckpointError: weights cannot be had; says which.
    """
    missing = []
    loaded: list[Any] = []
    for what, load in (
        ("the detector", lambda: load_detector(detector, preprocessing)),
        ("CLIP", lambda: load_clip(clip)),
    ):
        try:
            loaded.append(load())
        except CheckpointError as error:
            missing.append(f"{what}: {error}")
    if missing:
        raise CheckpointError(". ".join(missing))
    found, embedder = loaded
    found.network.to(device)
    return Scorer(found, ColourClassifier(embedder.to(device)))
