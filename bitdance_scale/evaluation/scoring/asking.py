"""Scorings that ask a judge: which judge, its answers kept in a file, and what is to be known of them."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.evaluation.metrics.score_file import SCORES_DIR
from bitdance_scale.evaluation.questions.endpoint import EndpointJudge
from bitdance_scale.evaluation.questions.judge import Judge, KeptAnswers, Unclear, check_answers
from bitdance_scale.evaluation.scoring.scoring import MissingChoiceError, Scoring
from bitdance_scale.wording import first_few

if TYPE_CHECKING:
    import torch

ANSWERS_NAME = "answers.jsonl"


class AskingScoring(Scoring):
    """A metric of a judge's answers; what was answered is kept whatever ends the scoring."""

    system: str | None = None
    """What an endpoint is told before the question."""
    judge: Judge | None = None

    def check(self) -> None:
        """Refuses a missing judge, an unset key, and questions that do not fit the prompts."""
        choices = self.choices
        if not 0 <= choices.max_unclear <= 1:
            raise ConfigError(f"--max-unclear {choices.max_unclear}: must be a share from 0 to 1")
        if choices.questions is None:
            raise MissingChoiceError(
                f"--questions: {self.metric.title} is scored by its published questions; name {self.published}"
            )
        if not choices.questions.exists():
            raise DataError(f"--questions {choices.questions}: does not exist; name {self.published}")
        self.read_questions(choices.questions)
        check_answers(self._answers)
        self._choose_judge()

    @property
    def _answers(self) -> Path:
        """Where answers are kept."""
        return self.choices.answers or self.drawn.root / SCORES_DIR / ANSWERS_NAME

    @property
    @abstractmethod
    def published(self) -> str:
        """The published questions, for messages."""

    @abstractmethod
    def read_questions(self, path: Path) -> None:
        """Reads the questions and refuses those that do not fit the prompts."""

    def load(self, device: torch.device) -> None:
        """Loads a local judge, on CUDA in bfloat16, as judges are published."""
        if self.judge is None:
            import torch

            from bitdance_scale.evaluation.questions.local_judge import load_judge

            assert self.choices.judge is not None
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            self.judge = load_judge(self.choices.judge, device, dtype, self.batch_size)

    @contextlib.contextmanager
    def asking(self) -> Iterator[tuple[Judge, Unclear]]:
        """The judge, whose answers are kept, and the count of its answers."""
        assert self.judge is not None
        with KeptAnswers(self.judge, self._answers) as judge:
            yield judge, Unclear(judge.model, self.choices.max_unclear)

    def scorer(self) -> dict[str, Any]:
        """Who was asked, and how."""
        assert self.judge is not None
        return {"judge": self.judge.model, "protocol": self.judge.protocol}

    def check_ids(self, ids: Collection[str]) -> None:
        """Refuses questions of other prompts than those of the drawing.

        Args:
            ids: of the prompts that have questions.

        Raises:
            DataError: a prompt has no questions, or questions no prompt.
        """
        drawn = {prompt.id for prompt in self.drawn.prompts}
        lacking = [f"prompt {name}" for name in drawn if name not in ids]
        unknown = [f"questions about {name}" for name in ids if name not in drawn]
        if lacking or unknown:
            listed = sorted(lacking) + sorted(unknown)
            raise DataError(
                f"{self.choices.questions}: has questions about {len(set(ids) & drawn)} of the {len(drawn)} prompts of "
                f"{self.drawn.root} and about {len(unknown)} others ({first_few(listed)}); name the questions of the "
                "prompts that were drawn"
            )

    def _choose_judge(self) -> None:
        choices = self.choices
        if choices.judge is not None and choices.endpoint is not None:
            raise ConfigError("--judge and --endpoint: both are named, and one is asked; leave one out")
        if choices.endpoint is None:
            for option, value in (("--judge-model", choices.judge_model), ("--key-variable", choices.key_variable)):
                if value is not None:
                    raise ConfigError(f"{option} {value}: is of an endpoint; name it with --endpoint URL")
        if choices.endpoint is not None:
            if choices.judge_model is None:
                raise ConfigError(f"--judge-model: is missing; name the model that {choices.endpoint} is asked for")
            self.judge = EndpointJudge(choices.endpoint, choices.judge_model, choices.key_variable, system=self.system)
        elif choices.judge is None:
            raise MissingChoiceError(
                f"--judge or --endpoint: {self.metric.title} asks a model about the images; name a folder or hub name "
                "with --judge, or --endpoint URL --judge-model NAME"
            )


def note_on_answers(unclear: Unclear) -> list[str]:
    """What is to be known of answers that were neither yes nor no."""
    if not unclear.number:
        return []
    return [
        (
            f"{unclear.number} of {unclear.asked} answers ({unclear.share:.1%}) were neither yes nor no and count as "
            f"wrong, such as {first_few(unclear.examples)}"
        )
    ]
