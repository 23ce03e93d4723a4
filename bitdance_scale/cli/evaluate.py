"""Benchmarks of trained models: `bitdance evaluate draw`, `score` and `report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bitdance_scale.cli.command import Command, run_group

COMMANDS: Mapping[str, Command] = {
    "draw": Command("draw the images of a benchmark, as its own scorer reads them", "evaluate_draw"),
    "score": Command("score the images of a benchmark, or a set of images", "evaluate_score"),
    "report": Command("compare drawings by their scores, on one page", "evaluate_report"),
}


def main(arguments: Sequence[str] | None, prog: str | None) -> int:
    """The group; returns the exit code."""
    return run_group(COMMANDS, arguments or [], prog or "evaluate", "Benchmarks of trained models.")
