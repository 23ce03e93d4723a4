"""Says which layout a run should have on so many GPUs, and what it will take: memory, time, GPU-hours.

    bitdance plan pt_14b --gpus 64 --gpu h100-80
    bitdance plan pt_14b --gpus 64 --stage all
    bitdance plan CONFIG data.max_pack_tokens=16384 --gpus 256 --gpu h200-141 --plot plan.png --json plan.json
    bitdance plan --calibrate mine.toml --gpu h100-80

Every layout is checked against the rules and against memory; the others are ranked by their predicted step time. No GPU
and no data are needed. docs/plan.md has the formulas, the constants and their sources. --calibrate measures the
constants on the GPU of this machine, or on a core of its processor, and writes them to a file for --gpu.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.kinds import load_any
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

if TYPE_CHECKING:
    from bitdance_scale.planning.plan import StagePlan

_DEFAULT_GPU = "h100-80"


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="TOML file, or the name of a shipped one")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )
    parser.add_argument("--gpus", type=positive, metavar="N", help="GPUs of the job")
    parser.add_argument(
        "--gpu", default=_DEFAULT_GPU, metavar="NAME", help=f"kind of GPU, or a file of --calibrate ({_DEFAULT_GPU})"
    )
    parser.add_argument("--stage", choices=["all"], metavar="all", help="all stages of the recipe, and their sum")
    parser.add_argument("--show", type=positive, default=10, metavar="N", help="layouts in the table (default: 10)")
    parser.add_argument("--exact", action="store_true", help="also run `bitdance memory` for the first (minutes)")
    parser.add_argument("--vocab", type=positive, metavar="N", help="entries of the tokenizer (default: the run's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all layouts and reasons there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory against time there, as PNG")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine and write its constants")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from bitdance_scale.planning.machine import load_machine

    if options.calibrate is not None:
        return _calibrate(options)
    if options.config is None or options.gpus is None:
        raise ConfigError("bitdance plan: needs CONFIG and --gpus N, or --calibrate FILE; --help shows examples")
    machine = load_machine(options.gpu)
    names = [options.config]
    if options.stage == "all":
        from bitdance_scale.planning.recipe import recipe_configs

        names = recipe_configs(options.config)
    configs = [_load(name, options.overrides) for name in names]

    from bitdance_scale.planning.plan import fastest, make_plan
    from bitdance_scale.planning.report import recipe_text, stage_document, stage_text

    plans = [make_plan(config, options.gpus, machine, options.vocab) for config in configs]
    if options.json is not None:
        from bitdance_scale.atomic_files import write_text

        write_text(options.json, json.dumps([stage_document(plan) for plan in plans], indent=1) + "\n")
    chosen = fastest(plans)
    if len(plans) == 1:
        print(stage_text(plans[0], options.show))
    else:
        print(recipe_text(plans, chosen))
    if options.plot is not None:
        from bitdance_scale.planning.picture import draw_plan

        draw_plan(plans[0], options.plot)
    if options.exact:
        print(f"\n{_exact(plans[0], options.vocab)}")
    return EXIT_COMPLETE


def _load(name: str, overrides: Sequence[str]) -> RunConfig:
    config = load_any(name, overrides)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{name}: trains a tokenizer, which has no layouts to choose from; `bitdance memory` says what it needs. "
            f"Plan a configuration with run.stage = {', '.join(STAGES)}."
        )
    return config


def _exact(plan: StagePlan, num_entries: int | None) -> str:
    """The memory of the first layout by `bitdance memory`, beside the formula's."""
    from bitdance_scale.parallel.memory_table import on_gpu, stage_lines
    from bitdance_scale.planning.layouts import with_layout
    from bitdance_scale.planning.plan import GIB
    from bitdance_scale.sequence.condition import vocab_size

    best = plan.ranked[0]
    entries = num_entries or vocab_size(plan.config)
    lines = stage_lines(on_gpu(with_layout(plan.config, best.parallel)), entries, plan.num_gpus)
    needed = max(max(line.estimate.peak.total, line.estimate.building_peak) for line in lines)
    ratio = best.memory.needed / needed
    return f"`bitdance memory` of the first: {needed / GIB:.2f} GiB; the formula gave {ratio:.4f} times as much."


def _calibrate(options: argparse.Namespace) -> int:
    from bitdance_scale.planning.calibration import calibrate
    from bitdance_scale.planning.machine import load_machine

    print(calibrate(load_machine(options.gpu), options.calibrate))
    return EXIT_COMPLETE
