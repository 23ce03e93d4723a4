"""Text-to-image training from a checked configuration to a finished run."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch.distributed as dist

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.console import setup_logging
from bitdance_scale.parallel.topology import Topology, make_topology, start_process_group
from bitdance_scale.train.process import EXIT_REQUEUE, StopRequest

logger = logging.getLogger(__name__)


def run_text_to_image(config: RunConfig) -> int:
    """Trains a stage of text-to-image in this process; returns the exit code (`process.py`)."""
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
