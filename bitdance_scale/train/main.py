"""From the command line to a finished run; the entry points in `pipelines/` call this."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.load import describe, dump_toml, load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.console import setup_logging
from bitdance_scale.parallel.topology import Topology, make_topology, start_process_group
from bitdance_scale.train.process import EXIT_REQUEUE, StopRequest, is_first_process, run_process

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


def run_text_to_image(config: RunConfig) -> int:
    if "RANK" not in os.environ:
        # Started without torchrun: a job of one process.
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    run_folder = Path(config.run.root) / config.run.name
    try:
        setup_logging(run_folder, int(os.environ["RANK"]))
    except OSError as error:
        raise ConfigError(
            f"run.root = {config.run.root!r}: the run folder {run_folder} cannot be written ({error}); name a writable folder"
        ) from error
    start_process_group()
    try:
        topology = make_topology(config.parallel)
        with StopRequest() as stop:
            return _train(config, topology, run_folder, stop)
    finally:
        dist.destroy_process_group()


def _train(config: RunConfig, topology: Topology, run_folder: Path, stop: StopRequest) -> int:
    # Imported late: it takes seconds, and a refused configuration should not wait for it.
    from bitdance_scale.train.completion import complete
    from bitdance_scale.train.run_observer import show_result
    from bitdance_scale.train.trainer import Trainer

    trainer = Trainer(config, topology, run_folder)
    if trainer.is_complete:
        complete(trainer, topology)
        logger.info(
            "the run %s is complete at step %d; extend it with run.steps=%d, or start another with run.name=NAME",
            run_folder,
            trainer.progress.step,
            2 * config.run.steps,
        )
        return 0
    if topology.rank == 0:
        write_text(run_folder / "config.toml", dump_toml(config))
    if not trainer.train(stop):
        logger.warning("stopped on request after step %d and saved; run again to go on", trainer.progress.step)
        # All leave together: torchrun kills the others soon after the first that ends with a code, and the first rank
        # may take longer over closing its W&B run.
        dist.barrier()
        return EXIT_REQUEUE
    if topology.rank == 0:
        print("\n" + show_result(run_folder), flush=True)
    return 0
