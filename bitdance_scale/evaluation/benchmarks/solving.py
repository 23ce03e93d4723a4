"""How the images of a drawing are computed: what is asked for, else the benchmark's settings, else the model's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig, SampleSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Settings


@dataclass(frozen=True)
class Solving:
    """How an image is drawn.

    Attributes:
        size_px: (height, width).
        steps: solver steps per block.
        guidance: classifier-free guidance scale; 1 for none.
        sampler: euler_maruyama or euler.
        guidance_growth: constant, or linear over the blocks of an image.
    """

    size_px: tuple[int, int]
    steps: int
    guidance: float
    sampler: str
    guidance_growth: str = "constant"


@dataclass(frozen=True)
class Asked:
    """What of a `Solving` a user asks for; None: nothing."""

    size_px: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    guidance_growth: str | None = None


def choose_solving(asked: Asked, settings: Settings, sample: SampleSection | None) -> Solving:
    """What is asked for, else the settings of the benchmark, else those of the model.

    Args:
        asked: by the user.
        settings: of the benchmark.
        sample: of the model's run; None: a model without one, for a benchmark that needs none.
    """

    def first(given: Any, published: Any, setting: str) -> Any:
        own = None if sample is None else getattr(sample, setting)
        return next(value for value in (given, published, own) if value is not None)

    return Solving(
        first(asked.size_px, settings.size_px, "size_px"),
        first(asked.steps, settings.steps, "num_steps"),
        first(asked.guidance, settings.guidance, "guidance"),
        first(asked.sampler, settings.sampler, "sampler"),
        first(asked.guidance_growth, settings.guidance_growth, "guidance_growth"),
    )


def drawing_config(config: RunConfig, solving: Solving, weights: str) -> RunConfig:
    """The configuration of a run with `[sample]` as images of a benchmark are drawn; their seeds are streams of seed 0.

    Args:
        config: of the run.
        solving: how images are drawn.
        weights: trained or averaged.

    Raises:
        ConfigError: images cannot be drawn so.
    """
    downsample, parts = config.vision.downsample, config.model.parts
    if parts.head_cells == "learned":
        grid = config.classes.grid
        possible = (grid[0] * downsample, grid[1] * downsample)
        if solving.size_px != possible:
            raise ConfigError(
                f"--size {_shown(solving.size_px)}: the head of run {config.run.name!r} has learned positions for "
                f"classes.grid = {list(grid)} cells of {downsample} px, so its images are {_shown(possible)}; leave "
                "--size out"
            )
    sample = dataclasses.replace(
        config.sample,
        prompts=(),
        size_px=solving.size_px,
        num_steps=solving.steps,
        guidance=solving.guidance,
        guidance_growth=solving.guidance_growth,
        sampler=solving.sampler,
        seed=0,
        weights=weights,
    )
    config = dataclasses.replace(config, sample=sample)
    # The rules of the number of ranks are of training: there is no batch to share out.
    check(config, None)
    return config


def _shown(size_px: tuple[int, int]) -> str:
    return "x".join(map(str, size_px))
