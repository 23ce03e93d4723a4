"""GenEval's score from verdicts, and how certain it is.

Source: djghosh13/geneval, evaluation/summary_scores.py. The intervals are ours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitdance_scale.evaluation.geneval.rules import TAGS, Verdict

_LEVEL = 0.95
_NUM_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A share from 0 to 1, and the interval that holds 95 of 100 values of it over other prompts of the same kind."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What GenEval reports.

    Attributes:
        score: mean over the tags of the share of correct images; the score of the paper's tables.
        tags: that share by tag, in the order of `rules.TAGS`; a tag without images is left out, as in the score.
        images: share of all images that are correct.
        prompts: share of prompts of which an image is correct.
        num_images: images by tag.
        num_prompts: prompts that differ.
    """

    score: Estimate
    tags: Mapping[str, Estimate]
    images: Estimate
    prompts: Estimate
    num_images: Mapping[str, int]
    num_prompts: int

    @property
    def missing_tags(self) -> tuple[str, ...]:
        """Tags without images: with any of these the score is not comparable with published ones."""
        return tuple(tag for tag in TAGS if tag not in self.tags)


def summarise(results: Sequence[tuple[Mapping[str, Any], bool]], seed: int = 0) -> Summary:
    """The score of judged images.

    The intervals are those of the bootstrap over prompts within each tag, since images of one prompt are alike.

    Args:
        results: of each image, the record of its prompt and whether it is correct.
        seed: of the resampling.

    Raises:
        ValueError: there are no images.
    """
    if not results:
        raise ValueError("there are no images to summarise")
    # Tag -> record -> (correct images, images). Equal records are one prompt, as in the published script.
    prompts: dict[str, dict[str, np.ndarray]] = {tag: {} for tag in TAGS}
    for record, is_correct in results:
        counts = prompts[record["tag"]].setdefault(json.dumps(record), np.zeros(2, dtype=np.int64))
        counts += (int(is_correct), 1)
    rng = np.random.default_rng(seed)
    # Tag -> [1 + resamples, 3]: correct images, images, prompts with a correct image; the first row is the sample.
    sums = {tag: _resample(np.array([*found.values()]), rng) for tag, found in prompts.items() if found}
    shares = {tag: rows[:, 0] / rows[:, 1] for tag, rows in sums.items()}
    total = sum(sums.values(), np.zeros((), dtype=np.int64))
    num_prompts = sum(map(len, prompts.values()))
    return Summary(
        score=_estimate(np.mean([*shares.values()], axis=0)),
        tags={tag: _estimate(values) for tag, values in shares.items()},
        images=_estimate(total[:, 0] / total[:, 1]),
        prompts=_estimate(total[:, 2] / num_prompts),
        num_images={tag: int(rows[0, 1]) for tag, rows in sums.items()},
        num_prompts=num_prompts,
    )


def result_line(file: str, record: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    """A line of the published scorer's `results.jsonl`, which `summary_scores.py` reads.

    Args:
        file: the image.
        record: of its prompt.
        verdict: on it.
    """
    return {
        "filename": file,
        "tag": record["tag"],
        "prompt": record["prompt"],
        "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons),
        "metadata": json.dumps(record),
        "details": json.dumps(
            {name: [[*one.box, one.confidence] for one in found] for name, found in verdict.objects.items()}
        ),
    }


def _resample(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sums over prompts [1 + resamples, 3] of (correct images, images) [prompts, 2]; the first as they are."""
    rows = np.column_stack([counts, counts[:, 0] > 0]).astype(np.int64)
    drawn = rng.integers(len(rows), size=(_NUM_RESAMPLES, len(rows)))
    return np.concatenate([rows.sum(axis=0)[None], rows[drawn].sum(axis=1)])


def _estimate(values: np.ndarray) -> Estimate:
    """Of the sample's value, which is the first, and those of the resamples."""
    low, high = np.quantile(values[1:], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(values[0]), float(low), float(high))
