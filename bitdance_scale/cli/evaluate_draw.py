"""Draws the images of a benchmark with a trained model, as the benchmark's own scorer reads them.

    bitdance evaluate draw geneval FOLDER --prompts evaluation_metadata_long.jsonl --out drawn --nproc 8
    bitdance evaluate draw dpg runs/sft --prompts prompts.json --out drawn parallel.tensor=2 --nproc 8
    bitdance evaluate draw imagenet runs/imagenet_b_4x --out drawn --nproc 8    # 50 images of each class

MODEL is a published folder, or a run, a checkpoint or an import; `imagenet` wants a class-conditional one of these
three. Defaults are the settings of the published scores, and of `imagenet` those of the model's own [sample]. The ranks
share out the images, and a drawing that was stopped, or killed, goes on with the images that are missing and ends with
the same bytes. docs/benchmarks_of_quality.md has the benchmarks.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance_scale.cli.command import CommandParser, add_adapter_argument, positive, run_command
from bitdance_scale.cli.launch import add_rank_arguments, find_replicas, launch, rank_arguments
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.ranges import CONSTRAINTS, Choice
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.shipped_models import model_path
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.catalogue import BENCHMARKS, find_benchmark, read_prompts
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from bitdance_scale.evaluation.benchmarks.solving import Asked, Solving, choose_solving, drawing_config
from bitdance_scale.text_files import is_utf8

if TYPE_CHECKING:
    from bitdance_scale.evaluation.benchmarks.manifest import Drawing

_MAX_SEED = 2**31
_DTYPES = ("bfloat16", "float32")
_OPTIONS = {
    "sample.size_px": "--size",
    "sample.num_steps": "--steps",
    "sample.guidance": "--guidance",
    "sample.guidance_growth": "--guidance-growth",
    "sample.sampler": "--sampler",
    "sample.seed": "--seed",
    "sample.weights": "--weights",
}
"""Setting of a run that an option stands for."""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line, of the command that starts the ranks and of every rank; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("benchmark", metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument(
        "model", type=model_path, metavar="MODEL", help="published folder, run, checkpoint or import; or demo"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings of a run, such as its layout"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="the benchmark's published file of prompts")
    parser.add_argument(
        "--append", metavar="TEXT", help="words behind every prompt, such as a style's, unseen by scorers"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--name", metavar="NAME", help="of the model, in paths (default: MODEL's last part)")
    parser.add_argument("--config", metavar="CONFIG", help="configuration that gives an import the settings of a run")
    parser.add_argument(
        "--images-per-prompt", type=positive, metavar="N", help="or of each class (default: the benchmark's)"
    )
    parser.add_argument("--size", metavar="HxW", help="in pixels (default: the benchmark's)")
    parser.add_argument("--steps", type=positive, help="sampling steps per block (default: the benchmark's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 for none (default: the benchmark's)")
    for name in ("guidance_growth", "sampler", "weights"):
        choice = CONSTRAINTS[f"sample.{name}"]
        assert isinstance(choice, Choice)
        parser.add_argument(f"--{name.replace('_', '-')}", choices=choice.values, help="(default: the benchmark's)")
    parser.add_argument("--seed", type=int, default=0, help="of all images (default: 0)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="drawn together (default: 8; imagenet: 64)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of a published folder: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--images", action="store_true", help="of imagenet: write every image as a PNG, too")
    add_adapter_argument(parser)
    add_rank_arguments(parser)
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    options.name = options.name or options.model.resolve().name
    benchmark = _benchmark(options)
    if options.append and benchmark.condition != "text":
        raise ConfigError(f"--append {options.append!r}: {benchmark.name} has classes, not words; leave it out")
    if options.append and not is_utf8(options.append):
        raise ConfigError(f"--append {options.append!r}: holds what is no character in UTF-8; write it as UTF-8 text")
    # A wrong file of texts is named before the model is looked at; classes are the model's.
    prompts = read_prompts(benchmark, options.prompts) if benchmark.condition == "text" else []
    config = None
    checkpoint = _find(options)
    if checkpoint is not None:
        config = _config(options, checkpoint)
    _check_condition(options.model, benchmark, config)
    if not prompts:
        assert config is not None, "no published folder has classes"
        from bitdance_scale.config.class_map import ClassLabels

        benchmark = benchmark.of_model(config.classes.num_classes, ClassLabels(config.classes).names)
        prompts = read_prompts(benchmark, options.prompts)
    solving = _solving(options, benchmark, config)
    if config is not None:
        options.weights = options.weights or benchmark.settings.weights or config.sample.weights
        config = drawing_config(config, solving, options.weights)
    _, starting = find_replicas(options, ParallelSection() if config is None else config.parallel)
    if starting is not None:
        command = rank_arguments(options, ("benchmark", "model", "overrides"), repeated=("adapter",))
        return launch(starting, "bitdance_scale.cli.evaluate_draw", command)
    return _draw(options, benchmark, prompts, solving, config)


def _benchmark(options: argparse.Namespace) -> Benchmark:
    """The benchmark, with as many images as are asked for."""
    benchmark = find_benchmark(options.benchmark)
    if options.images_per_prompt is not None:
        benchmark = dataclasses.replace(benchmark, num_images=options.images_per_prompt)
    if not 0 <= options.seed < _MAX_SEED:
        raise ConfigError(f"--seed {options.seed}: must be from 0 to 2^31 - 1")
    # A name that cannot be in a path is refused here, and a number of images that does not fit.
    layout = benchmark.layout(options.name)
    if options.images and layout.array is None:
        raise ConfigError(f"--images: {benchmark.name} has its images as files anyway; leave it out")
    for override in options.overrides:
        setting, _, value = override.partition("=")
        if setting.strip() in _OPTIONS:
            raise ConfigError(
                f"{override}: images of a benchmark are drawn as the options say; write "
                f"{_OPTIONS[setting.strip()]} {value.strip()} instead"
            )
    return benchmark


def _find(options: argparse.Namespace) -> Path | None:
    """The checkpoint of a run or an import that is there now; None: the model is a published folder."""
    # Imported late: torch takes seconds, and a refused option should not wait for it.
    from bitdance_scale.checkpoint.start_weights import model_checkpoint, refuse_published_options

    checkpoint = model_checkpoint(options.model)
    if checkpoint is not None:
        refuse_published_options(options.model, options.adapter, options.dtype)
        return checkpoint
    for name, value in (("config", options.config), ("weights", options.weights)):
        if value is not None:
            raise ConfigError(
                f"--{name} {value}: {options.model} is a published folder, which has one of its own; leave it out"
            )
    return None


def _config(options: argparse.Namespace, checkpoint: Path) -> RunConfig:
    """The configuration of a run or an import; the model becomes its checkpoint."""
    from bitdance_scale.checkpoint.stored_config import stored_config

    # Found once: the run may write a newer checkpoint while the ranks start.
    options.model = checkpoint
    return stored_config(checkpoint, options.overrides, options.config)


def _check_condition(model: Path, benchmark: Benchmark, config: RunConfig | None) -> None:
    """Refuses a model that does not draw from what the benchmark has: texts or classes."""
    condition = "text" if config is None else config.model.parts.condition
    if condition == benchmark.condition:
        return
    fitting = [other.name for other in BENCHMARKS if other.condition == condition]
    if condition == "text":
        raise ConfigError(
            f"MODEL {model}: draws from text, and {benchmark.name} has classes; name a class-conditional run, or draw "
            f"{', '.join(fitting)} with this model"
        )
    raise ConfigError(
        f"MODEL {model}: draws from classes (model.family = 'class_conditional'), and {benchmark.name} has prompts in "
        f"words; name a text-to-image model, or draw {', '.join(fitting)} with this one"
    )


def _solving(options: argparse.Namespace, benchmark: Benchmark, config: RunConfig | None) -> Solving:
    size_px = None
    if options.size is not None:
        from bitdance_scale.generate.requests import parse_size

        size_px = parse_size(options.size)
    asked = Asked(size_px, options.steps, options.guidance, options.sampler, options.guidance_growth)
    return choose_solving(asked, benchmark.settings, None if config is None else config.sample)


def _draw(
    options: argparse.Namespace,
    benchmark: Benchmark,
    prompts: list[Prompt],
    solving: Solving,
    config: RunConfig | None,
) -> int:
    # Imported late: torch takes seconds, and a refused option should not wait for it.
    from bitdance_scale.evaluation.benchmarks.manifest import Drawing
    from bitdance_scale.train.draw_prompts import PromptDrawing, run_draw_prompts
    from bitdance_scale.train.prompt_models import published_source, run_source

    model: dict[str, Any] = {"name": options.name}
    if config is None:
        source = published_source(options.model, solving, options.dtype, options.adapter)
    else:
        source = run_source(config, options.model)
        model["weights"] = options.weights
    # It follows from the weights, and tells readers what they compare: Table 10 is of 16 and 64.
    model["block_tokens"] = source.block_tokens
    batch_size = options.batch_size or benchmark.settings.batch_size
    settings = {
        "steps": solving.steps,
        "guidance": solving.guidance,
        "guidance_growth": solving.guidance_growth,
        "sampler": solving.sampler,
        **source.settings,
        # Which images are computed together changes their last bits.
        "batch_size": batch_size,
    }
    if options.append:
        settings["appended"] = options.append

    def describe() -> Drawing:
        return Drawing.of(
            benchmark,
            prompts,
            model=model | {"sha256": source.digest()},
            size_px=solving.size_px,
            settings=settings,
            seed=options.seed,
        )

    drawing = PromptDrawing(
        options.out,
        benchmark,
        prompts,
        options.name,
        describe,
        batch_size,
        has_copies=options.images,
        doubt=benchmark.doubt(prompts, solving.guidance),
        appended=options.append or "",
    )
    return run_draw_prompts(drawing, source.parallel, source.load)


if __name__ == "__main__":
    raise SystemExit(main())
