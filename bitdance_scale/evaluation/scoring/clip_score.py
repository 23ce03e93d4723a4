"""CLIP score of the images of a folder with their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.metrics.catalogue import CLIP_SCORE
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.scoring.drawn import in_batches
from bitdance_scale.evaluation.scoring.scoring import Scoring

if TYPE_CHECKING:
    import torch

    from bitdance_scale.evaluation.picture_scorers import ClipScorer


class ClipScoring(Scoring):
    """How well images fit their prompts, in all and by category; the cosine is a part of its own."""

    usual_batch = 32
    metric = CLIP_SCORE
    scorer: ClipScorer

    def check(self) -> None:
        """Refuses classes, which are no texts."""
        benchmark = self.drawn.benchmark
        if benchmark is not None and benchmark.condition != "text":
            raise ConfigError(
                f"--metric {self.metric.name}: the prompts of {benchmark.name} are numbers of classes, which CLIP "
                "cannot compare with images; leave the option out for the metric that classes have"
            )

    def load(self, device: torch.device) -> None:
        """Loads CLIP."""
        from bitdance_scale.evaluation.clip import load_clip
        from bitdance_scale.evaluation.picture_scorers import ClipScorer

        self.scorer = ClipScorer(load_clip(self.choices.clip).to(device))

    def score(self) -> Scores:
        """The scores, with the number of prompts that CLIP reads the beginning of only."""
        batches = in_batches(self.drawn.stream(self.metric.title), self.batch_size)
        images = [score for batch in batches for score in self.scorer(batch)]
        num_cut = self.scorer.num_cut([prompt.text for prompt in self.drawn.prompts])
        notes = [f"{num_cut} of {len(self.drawn.prompts)} prompts are longer than CLIP reads"] if num_cut else []
        return self.found({"clip": self.choices.clip}, images, {}, notes)
