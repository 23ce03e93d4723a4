"""GenEval on a folder; also the published scorer's `results.jsonl`, which its `summary_scores.py` reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from bitdance_scale.atomic_files import write_text
from bitdance_scale.evaluation.geneval.rules import check_record
from bitdance_scale.evaluation.geneval.summary import image_score, missing_tags, result_line, shares
from bitdance_scale.evaluation.metrics.catalogue import GENEVAL
from bitdance_scale.evaluation.metrics.score_file import SCORES_DIR, Scores
from bitdance_scale.evaluation.scoring.drawn import in_batches
from bitdance_scale.evaluation.scoring.scoring import Scoring

if TYPE_CHECKING:
    import torch

    from bitdance_scale.evaluation.geneval.scorer import Scorer

RESULTS_NAME = "geneval_results.jsonl"


class GenEvalScoring(Scoring):
    """Objects, colours and places by a detector and CLIP."""

    metric = GENEVAL
    scorer: Scorer

    def check(self) -> None:
        """Refuses records that the rules do not know."""
        for prompt in self.drawn.prompts:
            check_record(prompt.record, f"prompt {prompt.id}")

    def load(self, device: torch.device) -> None:
        """Loads both networks."""
        from bitdance_scale.evaluation.geneval.scorer import load_scorer

        self.scorer = load_scorer(self.choices.detector, self.choices.clip, device)

    def score(self) -> Scores:
        """The scores, with the shares of the published summary as figures."""
        benchmark, root = self.drawn.benchmark, self.drawn.root
        assert benchmark is not None
        layout = benchmark.layout(self.drawn.model)
        images, lines = [], []
        for batch in in_batches(self.drawn.stream(self.metric.title), self.batch_size):
            verdicts = self.scorer([image.pixels for image in batch], [image.prompt.record for image in batch])
            for image, verdict in zip(batch, verdicts, strict=True):
                prompt = image.prompt
                images.append(image_score(prompt.id, image.k, prompt.record, verdict))
                lines.append(result_line(str(root / layout.image(prompt, image.k).path), prompt.record, verdict))
        write_text(root / SCORES_DIR / RESULTS_NAME, "".join(json.dumps(line) + "\n" for line in lines))
        missing = missing_tags(images)
        notes = [f"no prompts of {', '.join(missing)}: the score is not that of published tables"] if missing else []
        figures = shares(images, {prompt.id: prompt.record for prompt in self.drawn.prompts})
        return self.found({"detector": self.choices.detector, "clip": self.choices.clip}, images, figures, notes)
