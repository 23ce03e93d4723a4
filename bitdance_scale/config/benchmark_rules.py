"""Rules of the benchmarks that are drawn and scored while a run trains."""

from __future__ import annotations

from collections.abc import Iterator

from bitdance_scale.config.benchmark_schema import CLASSES, RUN_METRICS, TEXT_BENCHMARKS, RunBenchmark
from bitdance_scale.config.rule import RuleSet
from bitdance_scale.config.schema import RunConfig

RULES = RuleSet()
_NETWORKS = ("detector", "clip")


def drawn_sizes(config: RunConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """(setting, (height, width)) of everything that a run draws; a benchmark without a size of its own is left out."""
    yield "sample.size_px", config.sample.size_px
    for where, benchmark in run_benchmarks(config):
        if all(benchmark.size_px):
            yield f"{where}.size_px", benchmark.size_px


def run_benchmarks(config: RunConfig) -> Iterator[tuple[str, RunBenchmark]]:
    """(setting, benchmark) of every one of `evaluate.benchmarks`."""
    for index, benchmark in enumerate(config.evaluate.benchmarks):
        yield f"evaluate.benchmarks[{index}]", benchmark


@RULES.rule("evaluate.benchmarks")
def _names_differ(config: RunConfig) -> Iterator[str]:
    """No two of `evaluate.benchmarks` have the same name, and a name is letters, digits, '_' and '-'.

    Their metrics, and the folders of their pictures, are told apart by it.
    """
    seen: set[str] = set()
    for where, benchmark in run_benchmarks(config):
        # W&B takes '-' for '_' here.
        name = benchmark.shown_name.replace("-", "_")
        if not (name.isascii() and name.isidentifier()):
            yield f"{where}.name = {benchmark.name!r}: must be letters, digits, '_' and '-', and not begin with a digit"
        elif name in seen:
            yield f"{where}: has the name {benchmark.shown_name!r} as one before it; set {where}.name to another"
        seen.add(name)


@RULES.rule("evaluate.benchmarks")
def _metrics_are_of_their_benchmark(config: RunConfig) -> Iterator[str]:
    """`evaluate.benchmarks[].metrics` are metrics of the benchmark, each once.

    A metric's rules are those of its benchmark's prompts.
    """
    for where, benchmark in run_benchmarks(config):
        possible = [name for name, metric in RUN_METRICS.items() if benchmark.benchmark in metric.benchmarks]
        for index, name in enumerate(benchmark.metrics):
            if name not in possible:
                yield (
                    f"{where}.metrics[{index}] = {name!r}: is no metric of {benchmark.benchmark}; must be one of "
                    f"{', '.join(possible)}"
                )
            elif name in benchmark.metrics[:index]:
                yield f"{where}.metrics[{index}] = {name!r}: is there already; remove it"


@RULES.rule("evaluate.benchmarks", "model.family")
def _benchmarks_are_for_their_family(config: RunConfig) -> Iterator[str]:
    """A class-conditional run has no benchmark but demo-classes, and no other run has that.

    A class-conditional network draws classes and no prompts; whether a picture shows its class can be read for the
    demo's classes alone. FID and its like are of thousands of images: draw those with `bitdance evaluate draw`.
    """
    for where, benchmark in run_benchmarks(config):
        has_text, is_of_classes = config.model.parts.has_text, benchmark.benchmark == CLASSES
        if has_text and is_of_classes:
            yield (
                f"{where}.benchmark = {CLASSES!r}: model.family = {config.model.family!r} draws prompts in words; name "
                "another benchmark, such as demo-scenes"
            )
        if not has_text and not is_of_classes:
            yield (
                f"{where}.benchmark = {benchmark.benchmark!r}: model.family = {config.model.family!r} draws classes, "
                f"not prompts; name {CLASSES}, which is for the demo's classes, or set evaluate.benchmarks=[]"
            )


@RULES.rule("evaluate.benchmarks")
def _files_are_named_where_they_are_read(config: RunConfig) -> Iterator[str]:
    """A benchmark names `prompts` if it has a published file of them, and `clip` and `detector` if a metric needs them.

    Nothing is downloaded at the start of a run.
    """
    for where, benchmark in run_benchmarks(config):
        is_of_file = benchmark.benchmark in TEXT_BENCHMARKS
        if is_of_file and not benchmark.prompts:
            yield f"{where}.prompts = '': {benchmark.benchmark} has a published file of prompts; set it to that file"
        if not is_of_file and benchmark.prompts:
            yield f"{where}.prompts = {benchmark.prompts!r}: {benchmark.benchmark} reads no file; leave it out"
        metrics = [name for name in benchmark.metrics if name in RUN_METRICS]
        for network in _NETWORKS:
            users = [name for name in metrics if network in RUN_METRICS[name].networks]
            value = getattr(benchmark, network)
            if users and not value:
                yield f"{where}.{network} = '': the metric {users[0]} computes with it; set it to the model's folder"
            if value and not users:
                yield (
                    f"{where}.{network} = {value!r}: none of {where}.metrics = {list(benchmark.metrics)} computes with "
                    "it; leave it out, or add the metric"
                )


@RULES.rule("evaluate.benchmarks")
def _sizes_have_two_sides(config: RunConfig) -> Iterator[str]:
    """`evaluate.benchmarks[].size_px` has two sides, or none.

    [0, 0] stands for `sample.size_px` as a whole.
    """
    for where, benchmark in run_benchmarks(config):
        if any(benchmark.size_px) and not all(benchmark.size_px):
            yield (
                f"{where}.size_px = {list(benchmark.size_px)}: must be two sides in pixels, or [0, 0] for "
                "sample.size_px"
            )
