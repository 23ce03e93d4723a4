"""What is walked: configurations, layouts, worlds and ranks. A layout is added by a line of `LAYOUTS`."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from tests.fake_cuda.walks import Request

# Depth only repeats: layers and blocks of the head are of the real widths.
_HEAD_BLOCKS = {"imagenet": 3}
_EVEN = "parallel.pipeline_split=even"

LAYOUTS: dict[str, tuple[str, ...]] = {
    "as shipped": (),
    "tensor 8": ("parallel.tensor=8",),
    "whole sequences": ("parallel.sequence_parallel=false",),
    "no recomputation": ("parallel.recompute=none",),
    "full recomputation": ("parallel.recompute=full",),
    "float32": ("run.dtype=float32",),
    "averages": ("optim.average_decay=0.9999", "evaluate.weights=averaged"),
    "ZeRO-2": ("parallel.zero_stage=2",),
    "ZeRO-3": ("parallel.zero_stage=3", "parallel.tensor=2"),
    "ZeRO-3, one tensor rank": (
        "parallel.zero_stage=3",
        "parallel.tensor=1",
        "parallel.sequence_parallel=false",
        "parallel.recompute=full",
    ),
    "pipeline 2": ("parallel.pipeline=2", _EVEN),
    "pipeline 4": ("parallel.tensor=2", "parallel.pipeline=4", _EVEN),
    "pipeline 2, full recomputation": ("parallel.pipeline=2", "parallel.recompute=full", _EVEN),
    "uncompiled": ("parallel.compile=false",),
    "Megatron": ("parallel.optimizer=megatron",),
    "Megatron, pipeline 2": ("parallel.optimizer=megatron", "parallel.pipeline=2", _EVEN),
    "interleaved": ("parallel.tensor=2", "parallel.pipeline=4", "parallel.virtual_stages=2", _EVEN),
}
"""Settings of `parallel` and others, on top of a shipped configuration; those of BitDance-14B are tensor 4 with
sequence parallelism, ZeRO-1, and attention that is recomputed."""


@dataclass(frozen=True)
class Case:
    """A job whose ranks are walked.

    Attributes:
        config: name of a shipped configuration.
        world: ranks of the job.
        layout: of `LAYOUTS`.
        layers_per_stage: layers of every stage; 0: the whole model, with its own split.
    """

    config: str
    world: int
    layout: str = "as shipped"
    layers_per_stage: int = 1

    def __str__(self) -> str:
        depth = "" if self.layers_per_stage else ", whole"
        return f"{self.config} on {self.world}, {self.layout}{depth}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """Settings on top of the shipped configuration."""
        layout = LAYOUTS[self.layout]
        if not self.layers_per_stage:
            return tuple(setting for setting in layout if setting != _EVEN)
        num_stages = _loaded(self.config, layout).parallel.num_stages
        num_blocks = _HEAD_BLOCKS.get(self.config.partition("_")[0], 2)
        return (*layout, f"model.num_layers={num_stages * self.layers_per_stage}", f"head.num_blocks={num_blocks}")

    @property
    def run(self) -> RunConfig:
        """The configuration that is walked."""
        return _loaded(self.config, self.overrides)

    def request(self, rank: int, **options: Any) -> Request:
        """The walk of a rank; options are the last fields of `Request`."""
        return Request(self.config, self.world, rank, self.overrides, **options)

    def rank_at(self, tensor: int, data: int, stage: int) -> int:
        """The rank with these coordinates; tensor-parallel ranks are neighbours, then data, then pipeline."""
        parallel = self.run.parallel
        num_replicas = self.world // (parallel.tensor * parallel.pipeline)
        return tensor + parallel.tensor * (data + num_replicas * stage)

    def chosen_ranks(self) -> list[int]:
        """First and last of every axis, in large worlds the middle too, and of a pipeline every stage.

        They are all combinations of these, so that whoever has a group with one of them has it with another.
        """
        parallel = self.run.parallel
        tensor = _ends(parallel.tensor, has_middle=self.world >= 256)
        data = _ends(self.world // (parallel.tensor * parallel.pipeline), has_middle=self.world >= 256)
        return sorted(self.rank_at(*place) for place in itertools.product(tensor, data, range(parallel.pipeline)))

    def first_ranks(self) -> list[int]:
        """The first rank of every stage."""
        return [self.rank_at(0, 0, stage) for stage in range(self.run.parallel.pipeline)]


@functools.cache
def _loaded(config: str, overrides: tuple[str, ...]) -> RunConfig:
    return load_config(config, list(overrides))


def _ends(size: int, *, has_middle: bool) -> list[int]:
    return sorted({0, size - 1, *([size // 2] if has_middle else [])})


ALL_CONFIGS = [
    Case("pt_14b", 8),
    Case("pt_14b", 64),
    Case("pt_14b", 256),
    Case("pt_14b", 1024),
    Case("ct_14b", 64),
    Case("sft_14b", 64),
    Case("distill_14b", 64),
    Case("pt_0p6b", 8),
    Case("distill_0p6b", 64),
    Case("imagenet_h_1x", 64),
    Case("imagenet_h_4x", 64),
    Case("imagenet_h_16x", 8),
]
"""Every stage of the recipe, as it is shipped."""

ALL_LAYOUTS = [
    Case("pt_14b", 64, "tensor 8"),
    Case("pt_14b", 8, "whole sequences"),
    Case("pt_14b", 8, "no recomputation"),
    Case("pt_14b", 8, "full recomputation"),
    Case("pt_14b", 8, "float32"),
    Case("pt_14b", 8, "averages"),
    Case("pt_14b", 64, "ZeRO-2"),
    # DeepSpeed makes a slice of every weight and gradient per replica, in Python (docs/engines.md, item 18): on 1,024 a
    # walk takes minutes.
    Case("pt_14b", 8, "ZeRO-3"),
    Case("pt_14b", 64, "ZeRO-3, one tensor rank"),
    Case("pt_0p6b", 8, "pipeline 2"),
    Case("pt_14b", 64, "pipeline 2"),
    Case("pt_14b", 256, "pipeline 4"),
    Case("pt_14b", 64, "pipeline 2, full recomputation"),
    Case("pt_14b", 1024, "interleaved"),
    Case("pt_14b", 64, "uncompiled"),
    Case("pt_14b", 64, "Megatron"),
    Case("pt_0p6b", 8, "Megatron, pipeline 2"),
]
"""Every layout, on worlds of all sizes; the embeddings of 0.6B are tied."""
