"""Checks a configuration against all rules, without starting anything: no GPU and no data are needed.

    bitdance check pt_14b --ranks 64
    bitdance check CONFIG parallel.tensor=8

Without --ranks, the rules that depend on the number of ranks are left out. The rules are in docs/rules.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.kinds import check_any, load_any
from bitdance_scale.config.rules import RULES
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.train.process import EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_config()
    parser.add_argument("--ranks", type=positive, metavar="N", help="ranks of the run: processes in all, one per GPU")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    config = load_any(options.config, options.overrides)
    check_any(config, options.ranks)
    num_ranks: int | None = options.ranks
    if not isinstance(config, RunConfig):
        for_ranks = "" if num_ranks is None else f" for {_ranks(num_ranks)}"
        print(f"{options.config} keeps all rules of a tokenizer's training{for_ranks}")
    elif num_ranks is None:
        num_left_out = sum(rule.needs_ranks for rule in RULES)
        print(
            f"{options.config} keeps all {len(RULES) - num_left_out} rules that do not depend on the number of ranks; "
            f"check the other {num_left_out} with --ranks N"
        )
    else:
        print(f"{options.config} keeps all {len(RULES)} rules for {_ranks(num_ranks)}")
    return EXIT_COMPLETE


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
