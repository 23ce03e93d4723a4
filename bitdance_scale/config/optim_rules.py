"""Rules of the optimiser's settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bitdance_scale.config.rule import RuleSet
from bitdance_scale.config.schema import RateSection, RunConfig

RULES = RuleSet()


@RULES.rule("optim.lr", "optim.lr_min")
def _rate_falls(config: RunConfig) -> Iterator[str]:
    """`optim.lr_min` is at most `optim.lr`.

    The rate falls from one to the other.
    """
    yield from floor_faults(config.optim)


@RULES.rule("optim.schedule", "optim.decay_steps")
def _one_fall(config: RunConfig) -> Iterator[str]:
    """`optim.decay_steps` goes with `optim.schedule = "constant"`.

    The other schedules fall over all steps after the warm-up.
    """
    yield from fall_faults(config.optim)


@RULES.rule("optim.schedule", "optim.warmup_steps", "run.steps")
def _something_falls(config: RunConfig) -> Iterator[str]:
    """A schedule that falls has steps after the warm-up.

    It starts where the warm-up ends.
    """
    optim, steps = config.optim, config.run.steps
    if optim.schedule != "constant" and optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps = {optim.warmup_steps}: must be less than run.steps = {steps} with optim.schedule = "
            f"{optim.schedule!r}; lower it, or set optim.schedule=constant"
        )


@RULES.rule("optim.average_decay", "evaluate.weights", "evaluate.benchmarks", "sample.weights")
def _averages_exist(config: RunConfig) -> Iterator[str]:
    """The `weights` of evaluations, benchmarks and samples are averaged only where weights are averaged.

    Without `optim.average_decay` there are no averaged weights.
    """
    chosen = {"evaluate.weights": config.evaluate.weights, "sample.weights": config.sample.weights}
    for index, benchmark in enumerate(config.evaluate.benchmarks):
        chosen[f"evaluate.benchmarks[{index}].weights"] = benchmark.weights
    yield from average_faults(config.optim.average_decay, chosen)


def floor_faults(section: RateSection) -> Iterator[str]:
    """One message if the rate would fall upwards."""
    if section.lr_min > section.lr:
        yield f"optim.lr_min = {section.lr_min:g}: must be at most optim.lr = {section.lr:g}; lower it"


def fall_faults(section: RateSection) -> Iterator[str]:
    """One message if the rate would fall in two ways."""
    if section.schedule != "constant" and section.decay_steps:
        yield (
            f"optim.decay_steps = {section.decay_steps}: optim.schedule = {section.schedule!r} falls from the end of "
            "the warm-up on; set optim.decay_steps=0, or optim.schedule=constant"
        )


def average_faults(average_decay: float, chosen: Mapping[str, str]) -> Iterator[str]:
    """One message per setting that chooses averaged weights where there are none; `chosen` is setting -> value."""
    for name, weights in chosen.items():
        if weights == "averaged" and not average_decay:
            yield (
                f"{name} = 'averaged': optim.average_decay = 0, so there are none; set it, such as 0.9999, "
                f"or {name}=trained"
            )
