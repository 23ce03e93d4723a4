"""Draws one page of a run, or of several, from what their folders hold: also of a run under way.

    python tools/plot_run.py RUN [RUN ...] --out FILE [--one-after-another]

RUN is a run folder, such as runs/demo. Several are drawn over each other, a colour each; with --one-after-another they
are stages, each beginning where the one before it ended.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.atomic_files import write_bytes
from bitdance_scale.errors import BitDanceError
from bitdance_scale.observe.overview import overview, read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG to write")
    parser.add_argument("--one-after-another", action="store_true", help="the runs are stages, in this order")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in options.runs]
    except FileNotFoundError as error:
        print(f"error: {error.filename} does not exist; name folders of runs, such as runs/demo", file=sys.stderr)
        return 2
    except BitDanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = overview(runs, one_after_another=options.one_after_another)
    write_bytes(options.out, page)
    for run in runs:
        print(f"{run.name}: {run.summary()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
