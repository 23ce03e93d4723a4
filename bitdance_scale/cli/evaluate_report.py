"""Compares drawings by their scores: one HTML page with tables, plots and pictures, and the same as JSON.

    bitdance evaluate report drawn/geneval_sft drawn/geneval_distilled --out report
    bitdance evaluate report sft=drawn/dpg_a distilled=drawn/dpg_b sft=drawn/geneval_a --out report --worst 20

FOLDER is the folder of a drawing that `bitdance evaluate score` has scored. Drawings of the same prompts and seed are
compared prompt by prompt; those of one model that differ in one number, such as the steps, become a plot over it.
docs/benchmarks_of_quality.md says what the page and report.json hold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance_scale.atomic_files import write_text
from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.report.scored_folder import ScoredFolder, parse_folder, read_folders
from bitdance_scale.train.process import EXIT_COMPLETE

if TYPE_CHECKING:
    from bitdance_scale.evaluation.report.comparison import Section
    from bitdance_scale.observe.wandb_sink import WandbSink

NAME = "report"
"""Of the files, which end in .html and .json."""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="[NAME=]FOLDER", help="drawing with scores (default name: its own)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--metric", nargs="+", action="extend", default=[], metavar="NAME", help="those shown (default: all there are)"
    )
    parser.add_argument("--baseline", metavar="NAME", help="what others are compared with (default: the first)")
    parser.add_argument(
        "--worst", type=positive, default=8, metavar="N", help="prompts of a kind on the page (default: %(default)s)"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="also log tables to W&B, offline where no key is configured")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out}: is no folder; name one, which is made if it is missing")
    folders = read_folders([parse_folder(text) for text in options.folders], options.metric)
    names = list(dict.fromkeys(folder.name for folder in folders))
    if options.baseline is not None and options.baseline not in names:
        raise ConfigError(f"--baseline {options.baseline}: must be one of {', '.join(names)}")
    # Imported late: a refused folder should not wait for matplotlib.
    from bitdance_scale.evaluation.report.comparison import compare
    from bitdance_scale.evaluation.report.record import report_record
    from bitdance_scale.evaluation.report.report_page import report_page
    from bitdance_scale.evaluation.report.sweep import find_sweeps
    from bitdance_scale.evaluation.report.thumbnails import Thumbnails

    sections = compare(folders, options.baseline or names[0], options.worst)
    sweeps = find_sweeps(folders)
    record = json.dumps(report_record(folders, sections, sweeps), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(options.out / f"{NAME}.json", record + "\n")
    write_text(options.out / f"{NAME}.html", report_page(folders, sections, sweeps, Thumbnails()))
    print(f"{options.out / NAME}.html: {len(folders)} drawings, {len(sections)} metrics, {len(sweeps)} sweeps")
    if options.wandb is not None:
        _log_tables(options.wandb, options.out, folders, sections)
    return EXIT_COMPLETE


def _log_tables(project: str, out: Path, folders: Sequence[ScoredFolder], sections: Sequence[Section]) -> None:
    """Logs a run of three tables to W&B."""
    import uuid

    from bitdance_scale.config.schema import ObserveSection
    from bitdance_scale.evaluation.report import record
    from bitdance_scale.observe.wandb_sink import WandbSink

    config = {folder.name: {"folder": str(folder.root)} | dict(folder.drawing) for folder in folders}
    section = ObserveSection(wandb_project=project)
    sink: WandbSink = WandbSink(section, out, config, uuid.uuid4().hex[:12], summaries={})
    sink.log_table("report/values", record.VALUE_COLUMNS, record.value_rows(sections))
    sink.log_table("report/differences", record.DIFFERENCE_COLUMNS, record.difference_rows(sections))
    sink.log_table("report/worst", (*record.WORST_COLUMNS, "picture"), _worst_with_pictures(sections))
    sink.finish()
    print(f"W&B ({sink.mode}): project {project}")


def _worst_with_pictures(sections: Sequence[Section]) -> list[list[Any]]:
    from bitdance_scale.evaluation.report.record import worst_rows
    from bitdance_scale.evaluation.report.thumbnails import contact_sheet, read_images

    rows = []
    for result, prompt, row in worst_rows(sections):
        try:
            picture = contact_sheet(read_images(result.folder, result.scores, prompt))
        except ConfigError:
            # The page says why it cannot be shown.
            picture = None
        rows.append([*row, picture])
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
