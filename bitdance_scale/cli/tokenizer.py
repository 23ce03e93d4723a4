"""The visual tokenizer: `bitdance tokenizer train` and `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitdance_scale.cli import train
from bitdance_scale.cli.command import Command, run_group

COMMANDS: Mapping[str, Command] = {
    "train": Command("train a tokenizer; `bitdance train` does the same", "tokenizer", "main_train"),
    "evaluate": Command("measure a tokenizer on held-out images", "evaluate_tokenizer"),
}


def main(arguments: Sequence[str] | None, prog: str | None) -> int:
    """The group; returns the exit code."""
    return run_group(COMMANDS, arguments or [], prog or "tokenizer", "The binary visual tokenizer.")


def main_train(arguments: Sequence[str] | None, prog: str | None) -> int:
    """`bitdance tokenizer train`; returns the exit code."""
    return train.main(arguments, prog, is_tokenizer=True)
