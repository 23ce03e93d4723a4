"""The benchmarks that a run draws and scores while it trains, and what each of them needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitdance_scale.config.setting import setting

TEXT_BENCHMARKS = ("geneval", "dpg", "oneig-en", "oneig-zh", "tiif")
"""Those whose prompts are in words and come from a published file."""
SCENES, CLASSES = "demo-scenes", "demo-classes"
RUN_BENCHMARKS = (*TEXT_BENCHMARKS, SCENES, CLASSES)


@dataclass(frozen=True)
class RunMetric:
    """A metric that a run can compute while it trains.

    Attributes:
        benchmarks: those it is of.
        networks: settings that name the networks it computes with.
    """

    benchmarks: tuple[str, ...]
    networks: tuple[str, ...] = ()


RUN_METRICS: Mapping[str, RunMetric] = {
    "scenes": RunMetric((SCENES,)),
    "style": RunMetric((SCENES,)),
    "classes": RunMetric((CLASSES,)),
    "geneval": RunMetric(("geneval",), ("detector", "clip")),
    "clip-score": RunMetric((*TEXT_BENCHMARKS, SCENES), ("clip",)),
}
"""Metrics of single pictures by name. FID and its like are of thousands of images, and a judge answers for minutes."""


@dataclass(frozen=True, kw_only=True)
class RunBenchmark:
    """A benchmark that is drawn and scored while a run trains."""

    benchmark: str = setting(
        doc="demo-scenes, geneval, dpg, oneig-en, oneig-zh or tiif; demo-classes in class-conditional runs."
    )
    metrics: tuple[str, ...] = setting(
        doc="What is computed of the same pictures: scenes or style (demo-scenes), classes (demo-classes), geneval "
        "(geneval) or clip-score (any prompts in words)."
    )
    name: str = setting(
        "", doc="Its name in metrics and files; empty: that of the benchmark. No two have the same one."
    )
    every_steps: int = setting(1000, doc="Steps between two scores; there is one at the end as well.")
    prompts: str = setting(
        "", doc="The benchmark's published file (or folder) of prompts; those of the demo have none."
    )
    num_prompts: int = setting(
        48,
        doc="At most so many of its prompts: the same ones in every run, spread evenly over the categories. 0: all.",
    )
    categories: tuple[str, ...] = setting(
        (), doc="Its categories that are drawn; empty: all.", example='["single_object", "colors"]'
    )
    num_images: int = setting(1, doc="Images of each prompt.")
    batch_size: int = setting(
        8, doc="Images that a replica draws together, whatever the number of replicas; it changes their last bits."
    )
    size_px: tuple[int, int] = setting((0, 0), doc="(height, width) of the images; [0, 0]: `sample.size_px`.")
    num_steps: int = setting(0, doc="Solver steps per block; 0: `sample.num_steps`.")
    guidance: float = setting(0.0, doc="Guidance scale, 1 for none; 0: `sample.guidance`.")
    seed: int = setting(0, doc="Seed of all images, as that of `bitdance evaluate draw`.")
    weights: str = setting("trained", doc="Weights that draw: trained or averaged (`optim.average_decay`).")
    clip: str = setting("", doc="Folder of the CLIP model of geneval and clip-score, in transformers' layout.")
    detector: str = setting("", doc="Mask2Former of geneval: a folder of transformers, or mmdetection's file.")

    @property
    def shown_name(self) -> str:
        """Its name in metrics and files."""
        return self.name or self.benchmark
