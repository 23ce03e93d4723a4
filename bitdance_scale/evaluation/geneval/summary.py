"""GenEval's results: scores of images for the common form, further shares, and the published scorer's lines.

Source: djghosh13/geneval, evaluation/evaluate_images.py (the lines) and evaluation/summary_scores.py (the shares). The
score is the mean over the tags of the share of correct images; the metric `geneval` computes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bitdance_scale.evaluation.geneval.rules import TAGS, Verdict
from bitdance_scale.evaluation.metrics.image_score import ImageScore


def image_score(prompt_id: str, k: int, record: Mapping[str, Any], verdict: Verdict) -> ImageScore:
    """The score of image k of a prompt: 1 or 0, a part of its tag."""
    value = float(verdict.correct)
    tag = record["tag"]
    return ImageScore(prompt_id, k, tag, value, {tag: (value, 1.0)}, "; ".join(verdict.reasons))


def shares(images: Sequence[ImageScore], records: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the published script reports beside the score.

    Args:
        images: scores of all images, at least one.
        records: of their prompts, by id. Equal records are one prompt, as in the published script.

    Returns:
        `images`: share of all images that are correct; `prompts`: share of prompts of which an image is correct.
    """
    best: dict[str, float] = {}
    for image in images:
        key = json.dumps(records[image.prompt_id])
        best[key] = max(image.value, best.get(key, 0.0))
    return {"images": fmean(image.value for image in images), "prompts": fmean(best.values())}


def missing_tags(images: Sequence[ImageScore]) -> list[str]:
    """Tags without images: with any of these the score is not comparable with published ones."""
    found = {image.category for image in images}
    return [tag for tag in TAGS if tag not in found]


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
