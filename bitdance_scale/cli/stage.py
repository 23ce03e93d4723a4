"""One rank of a training job, from its arguments to its exit code.

The scripts in `pipelines/` call this, and so does every rank that `bitdance train` starts:
`python -m bitdance_scale.cli.stage CONFIG [section.key=value ...]`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.config.families import FAMILIES
from bitdance_scale.config.kinds import AnyConfig, check_any, load_any, shards_of
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.named_files import check_named_files
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.demo.shards import check_shipped_sets
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE, is_first_process

TOKENIZER = "tokenizer"
"""The training of the visual tokenizer, among the names of `STAGES`."""
CLASSES = "imagenet"
"""The training of class-conditional networks, which have one stage."""
ENTRY_POINTS: Mapping[str, str] = {
    **{name: stage.entry_point for name, stage in STAGES.items()},
    TOKENIZER: "pipelines/train_tokenizer.py",
    CLASSES: "pipelines/imagenet.py",
}


def main(stage: str | None, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs a stage of training in this process, one rank of a torchrun job or a job of one process.

    Args:
        stage: a name of `ENTRY_POINTS`, which the configuration must be for; None: any.
        arguments: of the command line; None: the process's own.
        prog: name of the program; None: the process's own.

    Returns:
        0: finished; 2: refused, or ended by an error that the user can fix; 75: stopped on request and saved, run it
        again to go on.
    """
    title = (
        "Runs one rank of a training job." if stage is None else f"{_title(stage)} of BitDance on WebDataset shards."
    )
    parser = CommandParser(
        prog,
        f"{title}\n\nStart it with torchrun, one process per GPU. `bitdance train CONFIG` does that for you;\n"
        "`bitdance config explain KEY` says what a setting means.",
    )
    parser.add_config()
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as TOML and stop")

    return run_command(parser, arguments, lambda options: _run(stage, options))


def _run(stage: str | None, options: argparse.Namespace) -> int:
    config = load_any(options.config, options.overrides)
    if stage is not None:
        _check_stage(stage, config, options.config)
    # Without torchrun this is a job of one process, unless it only prints.
    world_size = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None if options.print_config else 1
    check_any(config, world_size)
    if options.print_config:
        if is_first_process():
            print(dump_toml(config), end="")
        return EXIT_COMPLETE
    check_files(config)
    return run_stage(config)


def check_files(config: AnyConfig) -> None:
    """Looks at the files that every rank will read and that a configuration names.

    Raises:
        BitDanceError: one is missing, or is not what the configuration needs.
    """
    check_shipped_sets(shards_of(config))
    if isinstance(config, RunConfig):
        check_named_files(config)
        if config.evaluate.benchmarks:
            # Imported late: numpy, Pillow and scipy take a second, and most runs have no benchmark.
            from bitdance_scale.evaluation.run_benchmarks import check_run_benchmarks

            check_run_benchmarks(config)
    elif is_first_process():
        # Half a gigabyte of VGG's weights is not read by every rank, which will find the same.
        from bitdance_scale.train.tokenizer_start import check_start_files

        check_start_files(config)


def run_stage(config: AnyConfig) -> int:
    """Trains what a configuration says, in this process; the configuration has been checked.

    Returns:
        The exit code.

    Raises:
        BitDanceError: on all ranks, what the user can fix.
    """
    # Imported late: torch and Megatron take seconds, and a refused configuration should not wait for them.
    if isinstance(config, RunConfig):
        from bitdance_scale.train.text_to_image import run_text_to_image

        return run_text_to_image(config)
    from bitdance_scale.train.tokenizer import run_tokenizer

    return run_tokenizer(config)


def _stage_of(config: AnyConfig) -> str:
    """The name in `ENTRY_POINTS` of what a configuration trains."""
    if not isinstance(config, RunConfig):
        return TOKENIZER
    # What is wrong with a family of no such name, the rules say.
    is_known = config.model.family in FAMILIES
    return CLASSES if is_known and not config.model.parts.has_text else config.run.stage


def _title(stage: str) -> str:
    others = {TOKENIZER: "Training of the visual tokenizer", CLASSES: "Class-conditional training"}
    return others[stage] if stage in others else STAGES[stage].title.capitalize()


def _check_stage(stage: str, config: AnyConfig, path: str) -> None:
    found = _stage_of(config)
    if found == stage or found not in ENTRY_POINTS:
        # An unknown stage is the rules' to refuse.
        return
    what = {
        TOKENIZER: "its sections are those of a tokenizer",
        CLASSES: "its network is class-conditional (model.family)",
    }.get(found, f"run.stage = {found!r}")
    other = "" if {TOKENIZER, CLASSES} & {found, stage} else f", or set run.stage={stage}"
    raise ConfigError(
        f"{path}: {what}, but {ENTRY_POINTS[stage]} runs stage {stage!r}; start it with {ENTRY_POINTS[found]} or with "
        f"`bitdance train`{other}"
    )


if __name__ == "__main__":
    sys.exit(main(None, prog="python -m bitdance_scale.cli.stage"))
