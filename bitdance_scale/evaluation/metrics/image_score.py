"""The score of an image, and what it adds to the parts of a metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ImageScore:
    """The score of an image.

    Attributes:
        prompt_id: of its prompt.
        k: its number among the images of the prompt.
        category: of the prompt; resampling keeps the number of prompts of each.
        value: of this image alone, for lists of the worst; higher is better.
        parts: by name, (sum, weight) that the image adds to a part of the metric, such as (right answers, questions).
            A part is the sum over images divided by their weight.
        reason: why the value is what it is, for readers; may be empty.
        unit: prompts with the same one are no independent observations, and are resampled as one, such as two wordings
            with the same questions; empty: the prompt is one by itself.
    """

    prompt_id: str
    k: int
    category: str
    value: float
    parts: Mapping[str, tuple[float, float]] = field(repr=False)
    reason: str = ""
    unit: str = ""
