"""The scorers of single pictures by the names of their metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.distributions.clip_score import clip_cosines
from bitdance_scale.evaluation.geneval.colours import ColourClassifier
from bitdance_scale.evaluation.geneval.scorer import Scorer
from bitdance_scale.evaluation.geneval.summary import image_score
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.picture_scorer import DrawnImage, PictureScorer
from bitdance_scale.evaluation.scenes.scorer import ClassScorer, SceneScorer, StyleScorer

if TYPE_CHECKING:
    from torch import nn

    from bitdance_scale.evaluation.clip import Clip
    from bitdance_scale.evaluation.geneval.detector import Detector

COSINE = "cosine"
"""Part of the metric `clip-score`: the raw cosine."""


class ScorerNetworks:
    """Networks of scorers on the CPU, each of which is read once.

    Its methods raise CheckpointError: the weights cannot be had.
    """

    def __init__(self) -> None:
        self._clips: dict[str, Clip] = {}
        self._detectors: dict[str, Detector] = {}

    def clip(self, source: str) -> Clip:
        """CLIP, of a folder or hub name (`load_clip`)."""
        if source not in self._clips:
            from bitdance_scale.evaluation.clip import load_clip

            self._clips[source] = load_clip(source)
        return self._clips[source]

    def detector(self, source: str) -> Detector:
        """Mask2Former, of a folder, hub name or file of mmdetection (`load_detector`)."""
        if source not in self._detectors:
            from bitdance_scale.evaluation.geneval.detector import load_detector

            self._detectors[source] = load_detector(source)
        return self._detectors[source]


class GenEvalScorer:
    """GenEval's verdicts.

    Args:
        scorer: detector, colours and rules.
        networks: those of the scorer.
    """

    def __init__(self, scorer: Scorer, networks: Sequence[nn.Module]) -> None:
        self._scorer, self.networks = scorer, networks

    def __call__(self, images: Sequence[DrawnImage]) -> list[ImageScore]:
        """Scores of 0 or 1, in order.

        Raises:
            DataError: the record of a prompt is no line of GenEval's.
        """
        verdicts = self._scorer([image.pixels for image in images], [image.prompt.record for image in images])
        return [
            image_score(image.prompt.id, image.k, image.prompt.record, verdict)
            for image, verdict in zip(images, verdicts, strict=True)
        ]


class ClipScorer:
    """100 max(cos, 0) of images and their prompts (`distributions/clip_score.py`).

    Args:
        clip: the network.
    """

    def __init__(self, clip: Clip) -> None:
        self._clip, self.networks = clip, (clip,)

    def num_cut(self, texts: Sequence[str]) -> int:
        """How many texts have more tokens than the network reads."""
        return sum(map(self._clip.is_cut, texts))

    def __call__(self, images: Sequence[DrawnImage]) -> list[ImageScore]:
        """Scores of 0 to 100, in order."""
        cosines = clip_cosines(self._clip, [image.pixels for image in images], [image.prompt.text for image in images])
        scores = []
        for image, cosine in zip(images, cosines.tolist(), strict=True):
            value, category = 100 * max(cosine, 0.0), image.prompt.category
            parts = {OVERALL: (value, 1.0), COSINE: (cosine, 1.0), **({category: (value, 1.0)} if category else {})}
            scores.append(ImageScore(image.prompt.id, image.k, category, value, parts))
        return scores


def load_picture_scorer(metric: str, networks: ScorerNetworks, *, detector: str = "", clip: str = "") -> PictureScorer:
    """The scorer of a metric.

    Args:
        metric: scenes, style, classes, geneval or clip-score.
        networks: read what a scorer computes with.
        detector: of GenEval.
        clip: of GenEval and the CLIP score.

    Raises:
        ConfigError: single pictures have no such metric.
        CheckpointError: weights cannot be had.
    """

    def geneval() -> PictureScorer:
        found, embedder = networks.detector(detector), networks.clip(clip)
        return GenEvalScorer(Scorer(found, ColourClassifier(embedder)), (found.network, embedder))

    loaders: Mapping[str, Callable[[], PictureScorer]] = {
        "scenes": SceneScorer,
        "style": StyleScorer,
        "classes": ClassScorer,
        "geneval": geneval,
        "clip-score": lambda: ClipScorer(networks.clip(clip)),
    }
    if metric not in loaders:
        raise ConfigError(f"metric = {metric!r}: is none of single pictures; must be one of {', '.join(loaders)}")
    return loaders[metric]()
