"""Draws the images of a benchmark with a trained model, as the benchmark's own scorer reads them.

    bitdance evaluate draw geneval FOLDER --prompts evaluation_metadata_long.jsonl --out drawn --nproc 8
    bitdance evaluate draw dpg runs/sft --prompts prompts.json --out drawn parallel.tensor=2 --nproc 8

MODEL is a published folder, or a run, a checkpoint or an import. Defaults are the settings of the published scores. The
ranks share out the prompts, and a drawing that was stopped, or killed, goes on with the images that are missing and
ends with the same bytes. docs/benchmarks_of_quality.md has the benchmarks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.cli.launch import add_rank_arguments, find_replicas, launch
from bitdance_scale.config.ranges import CONSTRAINTS, Choice
from bitdance_scale.config.schema import ParallelSection, RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.catalogue import BENCHMARKS, find_benchmark, read_prompts
from bitdance_scale.evaluation.benchmarks.prompt import Prompt

if TYPE_CHECKING:
    from bitdance_scale.train.prompt_models import Solving

_MAX_SEED = 2**31
_DTYPES = ("bfloat16", "float32")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line, of the command that starts the ranks and of every rank; returns the exit code."""
    samplers = CONSTRAINTS["sample.sampler"]
    assert isinstance(samplers, Choice)
    parser = CommandParser(prog, __doc__)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("benchmark", metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument("model", type=Path, metavar="MODEL", help="published folder, run, checkpoint or import")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings of a run, such as its layout"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="the benchmark's published file of prompts")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--name", metavar="NAME", help="of the model, in paths (default: MODEL's last part)")
    parser.add_argument("--size", metavar="HxW", help="in pixels (default: the benchmark's)")
    parser.add_argument("--steps", type=positive, help="sampling steps per block (default: the benchmark's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: the benchmark's)")
    parser.add_argument("--sampler", choices=samplers.values, default=samplers.values[0], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of all images (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="drawn together (default: 8)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of a published folder: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--weights", choices=("trained", "averaged"), default="trained", help="of a run")
    add_rank_arguments(parser)
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    benchmark = find_benchmark(options.benchmark)
    if not 0 <= options.seed < _MAX_SEED:
        raise ConfigError(f"--seed {options.seed}: must be from 0 to 2^31 - 1")
    prompts = read_prompts(benchmark, options.prompts)
    name = options.name or options.model.resolve().name
    # A name that cannot be in a path is refused here.
    benchmark.layout(name)
    config = None
    if not _is_published(options.model):
        from bitdance_scale.checkpoint.start_weights import find_checkpoint

        # Found once: the run may write a newer checkpoint while the ranks start.
        options.model, options.name = find_checkpoint(options.model), name
        config = _config(options)
    parallel = ParallelSection() if config is None else config.parallel
    _, starting = find_replicas(options, parallel)
    if starting is not None:
        return launch(starting, "bitdance_scale.cli.evaluate_draw", _command(options))
    return _draw(options, benchmark, prompts, name, config)


def _is_published(model: Path) -> bool:
    from bitdance_scale.config.published_head import HEAD_CONFIG_NAME

    if not model.exists():
        raise ConfigError(f"MODEL {model}: no such folder; name a published folder, a run or a checkpoint")
    return (model / HEAD_CONFIG_NAME).is_file()


def _config(options: argparse.Namespace) -> RunConfig:
    """The configuration of a checkpoint, with the overrides."""
    from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME
    from bitdance_scale.config.load import load_config
    from bitdance_scale.config.rules import check

    config = load_config(options.model / CONFIG_NAME, options.overrides)
    # The rules of the number of ranks are of training: there is no batch to share out.
    check(config, None)
    return config


def _solving(options: argparse.Namespace, benchmark: Benchmark) -> Solving:
    from bitdance_scale.generate.requests import parse_size
    from bitdance_scale.train.prompt_models import Solving

    settings = benchmark.settings
    guidance = settings.guidance if options.guidance is None else options.guidance
    if guidance is None:
        raise ConfigError(f"--guidance: {benchmark.name} has none of its own, as it depends on the model; name it")
    size_px = settings.size_px if options.size is None else parse_size(options.size)
    return Solving(size_px, options.steps or settings.steps, guidance, options.sampler)


def _draw(
    options: argparse.Namespace, benchmark: Benchmark, prompts: list[Prompt], name: str, config: RunConfig | None
) -> int:
    # Imported late: torch takes seconds, and a refused option should not wait for it.
    from bitdance_scale.evaluation.benchmarks.manifest import Drawing
    from bitdance_scale.train.draw_prompts import PromptDrawing, run_draw_prompts
    from bitdance_scale.train.prompt_models import published_source, run_source

    solving = _solving(options, benchmark)
    model: dict[str, Any] = {"name": name}
    if config is None:
        source = published_source(options.model, solving, options.dtype)
    else:
        source = run_source(config, options.model, solving, options.weights)
        model["weights"] = options.weights
    # It follows from the weights, and tells readers what they compare: Table 10 is of 16 and 64.
    model["block_tokens"] = source.block_tokens
    settings = {
        "steps": solving.steps,
        "guidance": solving.guidance,
        "sampler": solving.sampler,
        "dtype": source.dtype,
        # Which images are computed together changes their last bits.
        "batch_size": options.batch_size,
    }

    def describe() -> Drawing:
        return Drawing.of(
            benchmark,
            prompts,
            model=model | {"sha256": source.digest()},
            size_px=solving.size_px,
            settings=settings,
            seed=options.seed,
        )

    found = PromptDrawing(options.out, benchmark, prompts, name, describe, options.batch_size)
    return run_draw_prompts(found, source.parallel, source.load)


def _command(options: argparse.Namespace) -> list[str]:
    """The command line of a rank."""
    command = [options.benchmark, str(options.model), *options.overrides]
    names = ("prompts", "out", "name", "size", "steps", "guidance", "sampler", "seed", "batch_size", "dtype", "weights")
    for name in names:
        value = getattr(options, name)
        if value is not None:
            command.append(f"--{name.replace('_', '-')}={value}")
    return command


if __name__ == "__main__":
    raise SystemExit(main())
