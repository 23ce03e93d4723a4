"""The layouts that so many GPUs allow, and why the others are refused: the run's own rules decide."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.ranges import range_violations
from bitdance_scale.config.rules import RULES
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError

VIRTUAL_STAGES = (1, 2, 4)
ENGINES = (("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("megatron", 1))
"""Optimisers and ZeRO stages."""
RECOMPUTE = ("none", "selective", "full")
_TRIED = (
    *("tensor", "sequence_parallel", "pipeline", "virtual_stages"),
    *("pipeline_split", "optimizer", "zero_stage", "recompute"),
)


@dataclass(frozen=True)
class Dropped:
    """A layout that is not ranked.

    Attributes:
        parallel: the layout.
        kind: `illegal` (a rule is broken), `batch` (the global batch cannot be divided so), or `memory`.
        rule: what it breaks, the same words for all layouts that break it.
        reason: the message: values and a fix.
    """

    parallel: ParallelSection
    kind: str
    rule: str
    reason: str


def with_layout(config: RunConfig, parallel: ParallelSection) -> RunConfig:
    """The run under another layout."""
    return dataclasses.replace(config, parallel=parallel)


def name_of(parallel: ParallelSection) -> str:
    """A layout as the settings that are tried (`candidates`), those at their defaults left out."""
    default = ParallelSection()
    shown = []
    for name in _TRIED:
        value = getattr(parallel, name)
        if value != getattr(default, name):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            shown.append(f"{name}={text}")
    return " ".join(shown) or "data parallel"


def candidates(config: RunConfig, num_gpus: int, gpus_per_node: int) -> list[ParallelSection]:
    """All layouts that are tried; the run's own is among them.

    Tensor-parallel ranks stay within a node and divide it. Pipeline ranks divide the number of GPUs. The split of the
    pipeline is the automatic one.
    """
    tensors = [size for size in range(1, gpus_per_node + 1) if gpus_per_node % size == 0 and size <= num_gpus]
    pipelines = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    found = [
        dataclasses.replace(
            config.parallel,
            tensor=tensor,
            sequence_parallel=is_split,
            pipeline=pipeline,
            virtual_stages=virtual,
            pipeline_split="auto",
            optimizer=optimizer,
            zero_stage=zero,
            recompute=recompute,
        )
        for tensor, is_split, pipeline, virtual, (optimizer, zero), recompute in itertools.product(
            tensors, (False, True), pipelines, VIRTUAL_STAGES, ENGINES, RECOMPUTE
        )
    ]
    return found if config.parallel in found else [config.parallel, *found]


def refusals(config: RunConfig, num_gpus: int) -> Iterator[Dropped]:
    """The rules about layouts that a laid out run breaks."""
    for rule in RULES:
        if rule.reads("parallel"):
            for message in rule.violations(config, num_gpus):
                yield Dropped(config.parallel, "illegal", rule.claim, message)


def check_besides_layout(config: RunConfig) -> None:
    """Refuses a run that no layout can make legal.

    Raises:
        ConfigError: lists every broken rule that does not read `parallel`.
    """
    illegal = range_violations(config)
    faults = list(illegal.values())
    for rule in RULES:
        if rule.is_readable(illegal) and not rule.reads("parallel"):
            faults += rule.violations(config, None)
    if faults:
        lines = [f"the configuration of run {config.run.name!r} cannot be planned:"]
        raise ConfigError("\n".join([*lines, *(f"- {fault}" for fault in faults)]))
