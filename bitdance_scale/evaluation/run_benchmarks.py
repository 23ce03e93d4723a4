"""The benchmarks that a run draws and scores while it trains: prompts, and whether all that they need is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from bitdance_scale.config.benchmark_rules import run_benchmarks
from bitdance_scale.config.benchmark_schema import CLASSES, RUN_METRICS, RunBenchmark
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.demo.scenes import class_names
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark, read_prompts
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.benchmarks.subset import choose_prompts

_EXAMPLES = {"clip": "openai/clip-vit-large-patch14", "detector": "facebook/mask2former-swin-small-coco-instance"}


def read_run_benchmark(section: RunBenchmark) -> list[Prompt]:
    """The prompts that a run draws of a benchmark, the same ones in every run.

    Raises:
        ConfigError: the file of prompts cannot be read, or is of another benchmark; the benchmark lacks a category.
    """
    benchmark = dataclasses.replace(find_benchmark(section.benchmark), num_images=section.num_images)
    prompts = read_prompts(benchmark, Path(section.prompts) if section.prompts else None)
    if section.categories:
        known = tuple(dict.fromkeys(prompt.category for prompt in prompts))
        if unknown := [name for name in section.categories if name not in known]:
            raise ConfigError(
                f"categories has {', '.join(map(repr, unknown))}: must be of those of {section.benchmark}, which are "
                f"{', '.join(known)}"
            )
        prompts = [prompt for prompt in prompts if prompt.category in section.categories]
    return choose_prompts(prompts, section.num_prompts)


def check_run_benchmarks(config: RunConfig) -> None:
    """Looks at the files that the benchmarks of a run name, whose rules have been checked.

    Raises:
        ConfigError: prompts cannot be read, networks are missing, or classes are not the demo's; lists all faults.
    """
    faults = [fault for where, section in run_benchmarks(config) for fault in _faults(where, section, config)]
    if faults:
        raise ConfigError("\n".join(faults))


def _faults(where: str, section: RunBenchmark, config: RunConfig) -> Iterator[str]:
    for name in dict.fromkeys(name for metric in section.metrics for name in RUN_METRICS[metric].networks):
        path = Path(getattr(section, name))
        if not path.exists():
            place = "" if path.is_absolute() else f" in {Path.cwd()}"
            yield (
                f"{where}.{name} = {str(path)!r}: there is no such file or folder{place}; nothing is downloaded at the "
                f"start of a run, so fetch it first, such as `hf download {_EXAMPLES[name]} --local-dir FOLDER`, and "
                "name its folder"
            )
    try:
        read_run_benchmark(section)
    except ConfigError as error:
        yield f"{where}: {error}"
    num_classes, num_demo_classes = config.classes.num_classes, len(class_names())
    if section.benchmark == CLASSES and num_classes != num_demo_classes:
        yield (
            f"{where}.benchmark = {CLASSES!r}: is of the demo's {num_demo_classes} classes, and this run has "
            f"classes.num_classes = {num_classes}; set evaluate.benchmarks=[]"
        )
