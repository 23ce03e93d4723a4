"""The metrics that can be scored, and those that a folder is scored by unless others are named."""

from __future__ import annotations

from collections.abc import Sequence

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.oneig import OneIG
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.metric import Metric
from bitdance_scale.evaluation.scoring.clip_score import ClipScoring
from bitdance_scale.evaluation.scoring.distribution import DistributionScoring
from bitdance_scale.evaluation.scoring.dpg import DpgScoring
from bitdance_scale.evaluation.scoring.drawn import Drawn
from bitdance_scale.evaluation.scoring.geneval import GenEvalScoring
from bitdance_scale.evaluation.scoring.own_scorers import own_scorer
from bitdance_scale.evaluation.scoring.scenes import ClassScoring, SceneScoring, StyleScoring
from bitdance_scale.evaluation.scoring.scoring import Scoring
from bitdance_scale.evaluation.scoring.text import TextScoring
from bitdance_scale.evaluation.scoring.tiif import TiifScoring

SCORINGS: Sequence[type[Scoring]] = (
    GenEvalScoring,
    DpgScoring,
    TiifScoring,
    TextScoring,
    ClipScoring,
    DistributionScoring,
    SceneScoring,
    StyleScoring,
    ClassScoring,
)


def choose_scorings(drawn: Drawn, names: Sequence[str]) -> list[type[Scoring]]:
    """What a folder is scored by.

    Args:
        drawn: the folder.
        names: of metrics; none: that of its benchmark, or the distribution of images of no benchmark.

    Raises:
        ConfigError: there is no such metric, it is of another benchmark, needs prompts where there are none, or the
            benchmark has none here.
    """
    if names:
        return [_of_name(drawn, name) for name in dict.fromkeys(names)]
    benchmark = drawn.benchmark
    if benchmark is None:
        return [DistributionScoring]
    found = [one for one in SCORINGS if one.is_default and benchmark.name in (*one.metric.benchmarks, *one.default_of)]
    if found:
        return found
    usable = [one.metric.name for one in SCORINGS if not one.metric.benchmarks]
    if isinstance(benchmark, OneIG):
        own = own_scorer(benchmark, drawn.root, drawn.model, drawn.size_px)
        raise ConfigError(
            f"--metric: the scorer of {benchmark.name} is not reproduced here. {own}. What is scored here is --metric "
            "text, the words of the category Text_Rendering, and --metric clip-score"
        )
    raise ConfigError(f"--metric: {benchmark.name} has none of its own here; name one of {', '.join(usable)}")


def _of_name(drawn: Drawn, name: str) -> type[Scoring]:
    metric = find_metric(name)
    found = [one for one in SCORINGS if one.metric is metric]
    if not found:
        raise ConfigError(f"--metric {name}: is not scored by this command")
    _check_fits(drawn, metric)
    return found[0]


def _check_fits(drawn: Drawn, metric: Metric) -> None:
    if drawn.benchmark is None:
        if metric.name != DistributionScoring.metric.name:
            raise ConfigError(
                f"--metric {metric.name}: {drawn.root} is of no benchmark (it has no drawing.json), and the metric "
                "needs prompts; name --benchmark, --name and --prompts for a folder that another program has drawn"
            )
    elif metric.benchmarks and drawn.benchmark.name not in metric.benchmarks:
        raise ConfigError(
            f"--metric {metric.name}: is of {', '.join(metric.benchmarks)}, and {drawn.root} is of "
            f"{drawn.benchmark.name}; leave the option out for the benchmark's own"
        )
