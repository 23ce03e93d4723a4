"""Verdicts on images from prompts of GenEval: detector, colours and rules in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.clip import load_clip
from bitdance_scale.evaluation.geneval.colours import ColourClassifier
from bitdance_scale.evaluation.geneval.detector import Detector, load_detector
from bitdance_scale.evaluation.geneval.preprocessing import Preprocessing
from bitdance_scale.evaluation.geneval.rules import Detection, Verdict, check_record, judge

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
"""Mask2Former of the published scorer's size by its authors; the published scorer's own weights are mmdetection's."""
CLIP = "openai/clip-vit-large-patch14"
"""The published scorer's CLIP, in transformers."""


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
    folder: Path,
    detector: str = DETECTOR,
    clip: str = CLIP,
    device: torch.device | str = "cpu",
    preprocessing: Preprocessing | None = None,
) -> Scorer:
    """The scorer, on a device.

    Args:
        folder: the images, for the message where weights cannot be had.
        detector: see `load_detector`.
        clip: see `load_clip`.
        device: of both networks.
        preprocessing: of images for the detector; the default is that of the published scorer.

    Raises:
        CheckpointError: weights cannot be had; says which, and how the benchmark's own scorer is run on the folder.
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
        raise CheckpointError(f"GenEval cannot be scored here. {'. '.join(missing)}. {own_scorer(folder)}")
    found, embedder = loaded
    found.network.to(device)
    return Scorer(found, ColourClassifier(embedder.to(device)))


def own_scorer(folder: Path) -> str:
    """How the benchmark's own scorer is run on a folder of images in its layout."""
    return (
        f"Name folders or hub names whose weights can be had, or score the images in {folder} with the benchmark's own "
        "scorer (https://github.com/djghosh13/geneval, which needs mmdetection and a GPU), in its folder evaluation: "
        f"python evaluate_images.py {folder.absolute()} --outfile results.jsonl --model-path DETECTOR_FOLDER && "
        "python summary_scores.py results.jsonl"
    )
