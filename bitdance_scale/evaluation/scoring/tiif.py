"""TIIF-Bench on a folder: questions with known answers, on short and on long prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bitdance_scale.evaluation.metrics.catalogue import TIIF
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.questions.tiif import (
    SYSTEM,
    TiifItem,
    ask_tiif,
    image_scores,
    items_by_prompt,
    missing_dimensions,
    read_questions,
)
from bitdance_scale.evaluation.scoring.asking import AskingScoring, note_on_answers


class TiifScoring(AskingScoring):
    """All questions on an image in one request; each on its own where the answer has another number of lines."""

    metric = TIIF
    published = "the folder data/testmini_eval_prompts of TIIF-Bench"
    system = SYSTEM
    items: Mapping[str, TiifItem]

    def read_questions(self, path: Path) -> None:
        """Reads the files of questions, which must be about the prompts that were drawn."""
        self.items = items_by_prompt(read_questions(path))
        self.check_ids(self.items)

    def score(self) -> Scores:
        """The scores."""
        by_id = {prompt.id: prompt for prompt in self.drawn.prompts}

        def images(ids: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
            for prompt, found in self.drawn.stream(self.metric.title, [by_id[one] for one in ids]):
                yield prompt.id, found[0]

        with self.asking() as (judge, unclear):
            said = ask_tiif(self.items, images, judge, unclear)
        notes = note_on_answers(unclear)
        if said.asked_singly:
            notes.append(
                f"the questions on {said.asked_singly} of {len(self.items)} images were asked one by one, as the "
                "answer to all had another number of lines"
            )
        missing = missing_dimensions(self.items)
        if missing:
            notes.append(f"no prompts of {', '.join(missing)}: the scores are not those of published tables")
        return self.found(self.scorer(), image_scores(self.items, said.answers), {}, notes)
