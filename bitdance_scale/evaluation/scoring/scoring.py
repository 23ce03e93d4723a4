"""What is chosen for a scoring, and what every scoring is: it checks, it loads its networks, it scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import Metric
from bitdance_scale.evaluation.metrics.score_file import Scores
from bitdance_scale.evaluation.questions.judge import MAX_UNCLEAR_SHARE, JudgeError
from bitdance_scale.evaluation.scoring.drawn import Drawn
from bitdance_scale.evaluation.scoring.own_scorers import own_scorer

if TYPE_CHECKING:
    import torch

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
"""Mask2Former of the published GenEval scorer's size by its authors; that scorer's own weights are mmdetection's."""
CLIP = "openai/clip-vit-large-patch14"
"""The published GenEval scorer's CLIP, in transformers."""


@dataclass(frozen=True)
class ScoringChoices:
    """What the user chooses; what a metric does not need is not looked at.

    Attributes:
        detector: folder, hub name or file of GenEval's Mask2Former.
        clip: folder or hub name of CLIP.
        judge: folder or hub name of a model that answers questions about images.
        endpoint: address of an OpenAI-compatible endpoint that answers them instead.
        judge_model: the model's name there.
        key_variable: environment variable with the endpoint's key; None: it wants none.
        questions: the benchmark's published questions, a file or a folder.
        max_unclear: share of answers that may be neither yes nor no.
        answers: file in which a judge's answers are kept; None: `scores/answers.jsonl` in the folder.
        inception: weights of Inception.
        reference: what a set of images is compared with.
        save_reference: where the reference is saved for the next time; None: nowhere.
        batch_size: images, or questions of a local judge, at a time; None: what is usual for the metric.
    """

    detector: str = DETECTOR
    clip: str = CLIP
    judge: str | None = None
    endpoint: str | None = None
    judge_model: str | None = None
    key_variable: str | None = None
    questions: Path | None = None
    max_unclear: float = MAX_UNCLEAR_SHARE
    answers: Path | None = None
    inception: Path | None = None
    reference: Path | None = None
    save_reference: Path | None = None
    batch_size: int | None = None


class Scoring(ABC):
    """A metric on a folder.

    Args:
        drawn: the folder.
        choices: what the user chose.

    Attributes:
        metric: which it is.
        usual_batch: images at a time unless another number is chosen.
        default_of: further names of benchmarks, beside those that the metric is of, that it is scored for unless
            another one is named.
        is_default: whether it is scored for its own benchmarks when no metric is named.

    Raises:
        BitDanceError: as `check`.
    """

    metric: ClassVar[Metric]
    usual_batch: ClassVar[int] = 8
    default_of: ClassVar[tuple[str, ...]] = ()
    is_default: ClassVar[bool] = True

    def __init__(self, drawn: Drawn, choices: ScoringChoices) -> None:
        self.drawn, self.choices = drawn, choices
        with_way_out(self.check, self.way_out)

    @abstractmethod
    def check(self) -> None:
        """Refuses all that can be refused without a network.

        Raises:
            BitDanceError: a file, a package, a key or an option is missing, or does not fit the folder.
        """

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Loads the networks.

        Raises:
            CheckpointError: weights cannot be had.
            JudgeError: the judge cannot.
        """

    @abstractmethod
    def score(self) -> Scores:
        """Scores all images, which are read as they are needed.

        Raises:
            ScoringStopped: a stop was asked for.
            BitDanceError: an image cannot be read, or a judge cannot be asked.
        """

    @property
    def batch_size(self) -> int:
        """Images at a time."""
        return self.choices.batch_size or self.usual_batch

    def way_out(self) -> str:
        """What else can be done where this metric cannot be scored here; empty for nothing."""
        benchmark = self.drawn.benchmark
        if benchmark is None or benchmark.name not in (*self.metric.benchmarks, *self.default_of):
            return ""
        return own_scorer(benchmark, self.drawn.root, self.drawn.model, self.drawn.size_px)

    def found(
        self,
        scorer: Mapping[str, Any],
        images: Iterable[ImageScore],
        figures: Mapping[str, float],
        notes: Sequence[str],
    ) -> Scores:
        """The scores of this folder; the arguments are attributes of `Scores`."""
        drawn = self.drawn
        prompts = {prompt.id: prompt.text for prompt in drawn.prompts}
        benchmark = "" if drawn.benchmark is None else drawn.benchmark.name
        return Scores(
            self.metric.name,
            benchmark,
            drawn.model,
            drawn.record,
            scorer,
            prompts,
            tuple(images),
            figures,
            tuple(notes),
        )


def with_way_out(action: Callable[[], None], way_out: Callable[[], str]) -> None:
    """Does something whose failure for want of weights, a judge or an option is said with what else can be done."""
    try:
        action()
    except (CheckpointError, JudgeError, MissingChoiceError) as error:
        extra = way_out()
        kind = ConfigError if isinstance(error, MissingChoiceError) else type(error)
        raise kind(f"{error}. {extra}" if extra else str(error)) from error


class MissingChoiceError(ConfigError):
    """An option without which a metric cannot be scored."""


def load_networks(scorings: Sequence[Scoring], device: torch.device) -> None:
    """Loads the networks of all metrics, so that none of them lacks its own after an hour of another.

    Raises:
        BitDanceError: as `Scoring.load`, with the command of the benchmark's own scorer.
    """
    for scoring in scorings:
        with_way_out(partial(scoring.load, device), scoring.way_out)
