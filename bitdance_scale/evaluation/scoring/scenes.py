"""Pictures of the demo's scenes, style and classes, which are read by image analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bitdance_scale.evaluation.metrics.catalogue import CLASSES, SCENES, STYLE
from bitdance_scale.evaluation.metrics.picture_scorer import PictureScorer
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.scenes.scorer import ClassScorer, SceneScorer, StyleScorer
from bitdance_scale.evaluation.scoring.drawn import in_batches
from bitdance_scale.evaluation.scoring.scoring import Scoring

if TYPE_CHECKING:
    import torch


class SceneScoring(Scoring):
    """Whether pictures show what captions of the demo ask for."""

    metric = SCENES
    scorer: ClassVar[type[PictureScorer]] = SceneScorer

    def check(self) -> None:
        """There is nothing that could be missing."""

    def load(self, device: torch.device) -> None:
        """There is no network."""

    def score(self) -> Scores:
        """The scores."""
        scorer = self.scorer()
        batches = in_batches(self.drawn.stream(self.metric.title), self.batch_size)
        return self.found({}, [score for batch in batches for score in scorer(batch)], {}, ())


class StyleScoring(SceneScoring):
    """How far pictures are in the demo's style, which most models have never seen."""

    metric = STYLE
    scorer = StyleScorer
    is_default = False


class ClassScoring(SceneScoring):
    """Whether pictures show the shape and the colour of their class."""

    metric = CLASSES
    scorer = ClassScorer
