"""The metrics by name."""

from __future__ import annotations

from collections.abc import Sequence

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.demo_scenes import CATEGORIES
from bitdance_scale.evaluation.geneval.rules import TAGS
from bitdance_scale.evaluation.metrics.metric import Metric, as_parts, mean_of
from bitdance_scale.evaluation.questions import tiif

GENEVAL = Metric("geneval", "GenEval", ("geneval",), 1.0, mean_of(TAGS))
DPG = Metric("dpg", "DPG-Bench", ("dpg",), 100.0, as_parts)
TIIF = Metric("tiif", "TIIF-Bench", ("tiif",), 100.0, tiif.combine)
SCENES = Metric("scenes", "Demo scenes", ("demo-scenes",), 1.0, mean_of(CATEGORIES))
STYLE = Metric("style", "Demo style", ("demo-scenes",), 1.0, as_parts)
CLASSES = Metric("classes", "Demo classes", ("demo-classes",), 1.0, as_parts)
TEXT = Metric("text", "Words read in pictures", (), 100.0, as_parts)
CLIP_SCORE = Metric("clip-score", "CLIP score", (), 1.0, as_parts)
DISTRIBUTION = Metric("distribution", "FID, sFID, IS, precision, recall", (), 1.0, as_parts)

METRICS: Sequence[Metric] = (GENEVAL, DPG, TIIF, SCENES, STYLE, CLASSES, TEXT, CLIP_SCORE, DISTRIBUTION)


def find_metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        ConfigError: there is none; names all.
    """
    for metric in METRICS:
        if metric.name == name:
            return metric
    raise ConfigError(f"metric = {name!r}: must be one of {', '.join(known.name for known in METRICS)}")
