"""From the command line to a finished run; the entry points in `pipelines/` call this."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.config.load import describe, dump_toml, load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import is_first_process, run_process

logger = logging.getLogger(__name__)


def main(stage: str, arguments: Sequence[str] | None = None) -> int:
    """Runs a stage of training as the command line says.

    Args:
        stage: a name of `config.stages.STAGES`; the configuration must be of it.
        arguments: of the command line; None: the process's own.

    Returns:
        0: finished; 2: refused or failed with an error the user can mend; 75: stopped on request, saved, run it again.
    """
    return run_process(lambda: _main(stage, arguments))


def _main(stage: str, arguments: Sequence[str] | None) -> int:
    options = _parse(stage, arguments)
    config = load_config(options.config, options.overrides)
    _check_stage(stage, config, options.config)
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    if options.print_config:
        if is_first_process():
            print(dump_toml(config), end="")
        return 0
    # Imported late: it takes seconds, and a refused configuration should not wait for it.
    from bitdance_scale.train.text_to_image import run_text_to_image

    return run_text_to_image(config)


def _check_stage(stage: str, config: RunConfig, path: Path) -> None:
    if config.run.stage != stage and config.run.stage in STAGES:
        entry_point = STAGES[config.run.stage].entry_point
        raise ConfigError(
            f"{path}: run.stage = {config.run.stage!r}, but {STAGES[stage].entry_point} runs stage {stage!r}; start it "
            f"with {entry_point}, or set run.stage={stage}"
        )


def _parse(stage: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    title = STAGES[stage].title.capitalize()
    parser = argparse.ArgumentParser(
        description=f"{title} of BitDance on WebDataset shards (stage {stage} of arXiv 2602.14041 Table 4).",
        epilog="settings:\n" + describe(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="TOML file with the run's settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as TOML and exit")
    return parser.parse_args(arguments)
