"""Trains what a configuration says: a stage of BitDance, or a visual tokenizer.

    bitdance train demo                                         the demo, on every GPU of this machine
    bitdance train demo --nproc 2 run.name=try optim.lr=5e-4    on two processes, with other settings

Without GPUs it trains on the CPU. Several machines without Slurm: the same command on each, with its own --node-rank.

    bitdance train CONFIG --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29500    on node0
    bitdance train CONFIG --nnodes 2 --node-rank 1 --rdzv-endpoint node0:29500    on node1

The configuration is checked before any process starts. A run lives in runs/<run.name>; started again, it goes on from
its newest checkpoint. Ctrl-C, SIGTERM or SIGUSR1 end it after the step, with a checkpoint; a second Ctrl-C kills it.
Exit codes: 0 complete, 2 refused, 75 stopped on request and saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bitdance_scale.cli import stage
from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.cli.launch import add_rank_arguments, check_rank_options, launch, read_ranks
from bitdance_scale.config.kinds import check_any, load_any
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None, prog: str | None = None, *, is_tokenizer: bool = False) -> int:
    """The command line; returns the exit code.

    Args:
        arguments: of the command line; None: the process's own.
        prog: name of the program; None: the process's own.
        is_tokenizer: whether the configuration must be a tokenizer's.
    """
    parser = CommandParser(prog, __doc__)
    parser.add_config()
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as TOML and stop")
    add_rank_arguments(parser)
    return run_command(parser, arguments, lambda options: _run(options, is_tokenizer))


def _run(options: argparse.Namespace, is_tokenizer: bool) -> int:
    config = load_any(options.config, options.overrides)
    if is_tokenizer and not isinstance(config, TokenizerConfig):
        raise ConfigError(f"{options.config}: is no configuration of a tokenizer; start it with `bitdance train`")
    check_any(config, None if options.nproc is None else options.nproc * options.nnodes)
    if options.print_config:
        print(dump_toml(config), end="")
        return EXIT_COMPLETE
    check_rank_options(options)
    stage.check_files(config)
    ranks = read_ranks(options)
    check_any(config, ranks.world_size)
    if ranks.world_size == 1:
        return stage.run_stage(config)
    return launch(ranks, stage.__name__, [options.config, *options.overrides])
