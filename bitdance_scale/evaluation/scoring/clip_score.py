"""CLIP score of the images of a folder with their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.imagenet import ImageNet
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.metrics.catalogue import CLIP_SCORE
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.scoring.drawn import in_batches
from bitdance_scale.evaluation.scoring.scoring import Scoring

if TYPE_CHECKING:
    import torch

    from bitdance_scale.evaluation.clip import Clip


class ClipScoring(Scoring):
    """How well images fit their prompts, in all and by category."""

    usual_batch = 32
    metric = CLIP_SCORE
    clip: Clip

    def check(self) -> None:
        """Refuses classes, which are no texts."""
        if isinstance(self.drawn.benchmark, ImageNet):
            raise ConfigError(
                f"--metric {self.metric.name}: the prompts of imagenet are numbers of classes, which CLIP cannot "
                "compare with images; score the distribution"
            )

    def load(self, device: torch.device) -> None:
        """Loads CLIP."""
        from bitdance_scale.evaluation.clip import load_clip

        self.clip = load_clip(self.choices.clip).to(device)

    def score(self) -> Scores:
        """The scores, with the mean cosine as a figure."""
        from bitdance_scale.evaluation.distributions.clip_score import clip_score

        places: list[tuple[Prompt, int]] = []

        def batches() -> Iterator[tuple[Sequence[np.ndarray], Sequence[str]]]:
            for batch in in_batches(self.drawn.stream(self.metric.title), self.batch_size):
                places.extend((prompt, k) for prompt, k, _ in batch)
                yield [image for _, _, image in batch], [prompt.text for prompt, _, _ in batch]

        found = clip_score(self.clip, batches())
        images = []
        for (prompt, k), cosine in zip(places, found.cosines, strict=True):
            value = 100 * max(float(cosine), 0.0)
            parts = {OVERALL: (value, 1.0), prompt.category: (value, 1.0)}
            images.append(ImageScore(prompt.id, k, prompt.category, value, parts))
        notes = []
        if found.num_cut:
            notes.append(f"{found.num_cut} of {len(images)} images have prompts that CLIP reads the beginning of only")
        return self.found({"clip": self.choices.clip}, images, {"cosine": found.cosine}, notes)
