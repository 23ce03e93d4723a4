"""Rules of the optimiser's settings."""

from __future__ import annotations

from collections.abc import Iterator

from bitdance_scale.config.rule import RuleSet
from bitdance_scale.config.schema import RunConfig

RULES = RuleSet()


@RULES.rule("optim.lr", "optim.lr_min")
def _rate_falls(config: RunConfig) -> Iterator[str]:
    """`optim.lr_min` is at most `optim.lr`.

    The rate falls from one to the other.
    """
    optim = config.optim
    if optim.lr_min > optim.lr:
        yield f"optim.lr_min = {optim.lr_min:g}: must be at most optim.lr = {optim.lr:g}; lower it"


@RULES.rule("optim.schedule", "optim.decay_steps")
def _one_fall(config: RunConfig) -> Iterator[str]:
    """`optim.decay_steps` goes with `optim.schedule = "constant"`.

    The other schedules fall over all steps after the warm-up.
    """
    optim = config.optim
    if optim.schedule != "constant" and optim.decay_steps:
        yield (
            f"optim.decay_steps = {optim.decay_steps}: optim.schedule = {optim.schedule!r} falls from the end of the "
            "warm-up on; set optim.decay_steps=0, or optim.schedule=constant"
        )


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


@RULES.rule("optim.average_decay", "evaluate.weights", "sample.weights")
def _averages_exist(config: RunConfig) -> Iterator[str]:
    """`evaluate.weights` and `sample.weights` are averaged only where weights are averaged.

    Without `optim.average_decay` there are no averaged weights.
    """
    if config.optim.average_decay:
        return
    for section, weights in (("evaluate", config.evaluate.weights), ("sample", config.sample.weights)):
        if weights == "averaged":
            yield (
                f"{section}.weights = 'averaged': optim.average_decay = 0, so there are none; set it, such as 0.9999, "
                f"or {section}.weights=trained"
            )
