"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.demo_classes import DemoClasses
from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoScenes
from bitdance_scale.evaluation.benchmarks.dpg import Dpg
from bitdance_scale.evaluation.benchmarks.geneval import GenEval
from bitdance_scale.evaluation.benchmarks.imagenet import ImageNet
from bitdance_scale.evaluation.benchmarks.oneig import OneIG
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.benchmarks.tiif import Tiif

BENCHMARKS: Sequence[Benchmark] = (
    GenEval(),
    Dpg(),
    OneIG(language="en"),
    OneIG(language="zh"),
    Tiif(),
    ImageNet(),
    DemoScenes(),
    DemoClasses(),
)
_OF_FILES = BENCHMARKS[:5]


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        ConfigError: there is none; names all.
    """
    for benchmark in BENCHMARKS:
        if benchmark.name == name:
            return benchmark
    raise ConfigError(f"benchmark = {name!r}: must be one of {', '.join(known.name for known in BENCHMARKS)}")


def read_prompts(benchmark: Benchmark, path: Path | None) -> list[Prompt]:
    """The prompts of a benchmark; of another one's file the message says whose it is.

    Raises:
        ConfigError: as `Benchmark.read`.
    """
    try:
        return benchmark.read(path)
    except ConfigError as error:
        owner = None if path is None else _owner(path)
        if owner is None or owner.name == benchmark.name:
            raise
        raise ConfigError(
            f"{path}: holds the prompts of {owner.name}, not of {benchmark.name}; name "
            f"{benchmark.prompt_file or 'no file'}, or draw {owner.name}"
        ) from error


def _owner(path: Path) -> Benchmark | None:
    for benchmark in _OF_FILES:
        try:
            benchmark.read(path)
        except ConfigError:
            continue
        return benchmark
    return None
