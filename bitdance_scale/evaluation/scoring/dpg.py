"""DPG-Bench on a folder: corrected scores by image, those of the published script as figures."""

from __future__ import annotations

import math
from pathlib import Path

from bitdance_scale.evaluation.metrics.catalogue import DPG
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.questions.dpg import (
    DpgQuestions,
    PublishedScores,
    ask_dpg,
    image_scores,
    published_scores,
    read_questions,
)
from bitdance_scale.evaluation.scoring.asking import AskingScoring, note_on_answers

AS_PUBLISHED = "as published"


class DpgScoring(AskingScoring):
    """Yes/no questions that depend on each other."""

    metric = DPG
    published = "dpg_bench.csv of DPG-Bench"
    questions: DpgQuestions

    def read_questions(self, path: Path) -> None:
        """Reads the file of questions, which must be about the prompts that were drawn."""
        self.questions = read_questions(path)
        self.check_ids(self.questions.prompts)

    def score(self) -> Scores:
        """The scores."""
        with self.asking() as (judge, unclear):
            images = ((prompt.id, found) for prompt, found in self.drawn.stream(self.metric.title))
            answers = ask_dpg(self.questions, images, judge, unclear)
        published = published_scores(self.questions, answers)
        sources = {prompt.id: prompt.category for prompt in self.drawn.prompts}
        notes = note_on_answers(unclear)
        if published.left_out:
            notes.append(
                f"{AS_PUBLISHED} leaves out {len(published.left_out)} prompts, as the script skips the first row of "
                f"the file: {', '.join(published.left_out)}"
            )
        scores = image_scores(self.questions, answers, sources)
        return self.found(self.scorer(), scores, _figures(published), notes)


def _figures(published: PublishedScores) -> dict[str, float]:
    """What the published script reports; a score of no prompt is none."""
    categories = {**published.level_1, **published.level_2}
    figures = {AS_PUBLISHED: published.score}
    figures |= {f"{AS_PUBLISHED}: {name}": categories[name] for name in sorted(categories)}
    return {name: value for name, value in figures.items() if not math.isnan(value)}
