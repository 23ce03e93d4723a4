"""Words that prompts put in quotes, read in the images."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.metrics.catalogue import TEXT
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.questions.ocr import TextReader, check_packages
from bitdance_scale.evaluation.questions.words import compare, quoted_texts, words_of
from bitdance_scale.evaluation.scoring.scoring import Scoring

if TYPE_CHECKING:
    import torch

CATEGORIES = {"oneig-en": "Text_Rendering", "oneig-zh": "Text_Rendering", "tiif": "text"}
"""The category of prompts that test text, of benchmarks with one; elsewhere all prompts with quotes count."""
_SHOWN_CHARACTERS = 200


class TextScoring(Scoring):
    """The share of the words in quotes that are read, each word counting alike."""

    metric = TEXT
    wanted: dict[str, Sequence[str]]
    reader: TextReader

    def check(self) -> None:
        """Refuses prompts without a text in quotes, and a missing package."""
        benchmark = self.drawn.benchmark
        assert benchmark is not None
        category = CATEGORIES.get(benchmark.name)
        chosen = [prompt for prompt in self.drawn.prompts if category in (None, prompt.category)]
        texts = {prompt.id: quoted_texts(prompt.text) for prompt in chosen}
        self.wanted = {name: found for name, found in texts.items() if any(map(words_of, found))}
        self.num_left_out = len(chosen) - len(self.wanted)
        self.num_chosen = len(chosen)
        if not self.wanted:
            raise ConfigError(
                f"--metric {self.metric.name}: none of the {len(self.drawn.prompts)} prompts of {benchmark.name} asks "
                "for a text in quotes; score another metric"
            )
        check_packages()

    def load(self, device: torch.device) -> None:
        """Loads the reader, which runs on the CPU."""
        import torch

        self.reader = TextReader(torch.get_num_threads())

    def score(self) -> Scores:
        """The scores, with the share of images that show exactly the wanted text as a figure."""
        scores, exact, distances = [], [], []
        prompts = [prompt for prompt in self.drawn.prompts if prompt.id in self.wanted]
        for prompt, images in self.drawn.stream(self.metric.title, prompts):
            wanted = self.wanted[prompt.id]
            for k, image in enumerate(images):
                lines = self.reader.read(image)
                found = compare(wanted, lines)
                added = float(found.words_read), float(found.words)
                parts = {OVERALL: added, prompt.category: added}
                reason = f"wanted: {_shown(wanted)}; read: {_shown(lines) or 'nothing'}"
                scores.append(ImageScore(prompt.id, k, prompt.category, found.word_accuracy, parts, reason))
                exact.append(found.is_exact)
                distances.append(found.edit_distance)
        notes = []
        if self.num_left_out:
            notes.append(
                f"{self.num_left_out} of {self.num_chosen} prompts have no text in quotes; their images are left out"
            )
        figures = {"images with exactly the text": fmean(exact), "mean edit distance": fmean(distances)}
        return self.found({"reader": "rapidocr, its own networks"}, scores, figures, notes)


def _shown(lines: Sequence[str]) -> str:
    text = " / ".join(lines)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
