r"""Scores a folder of a drawing: a table, and `scores/METRIC.json` in the folder, image by image.

    bitdance evaluate score drawn --prompts evaluation_metadata_long.jsonl --detector MMDET.pth
    bitdance evaluate score drawn --prompts prompts.json --questions dpg_bench.csv --judge FOLDER
    bitdance evaluate score drawn --reference VIRTUAL_imagenet256_labeled.npz --inception FILE
    bitdance evaluate score FOLDER --benchmark tiif --name MODEL --prompts testmini_prompts \\
        --questions testmini_eval_prompts --endpoint URL --judge-model NAME --key-variable VARIABLE

DRAWN is what `bitdance evaluate draw` has drawn, with drawing.json; a folder in a benchmark's layout that another
program has drawn, with --benchmark and --name; or, for the distribution alone, a folder of images or an .npz. The
metric is the benchmark's own unless --metric names others:

    geneval       GenEval: a detector and CLIP by the published rules
    dpg           DPG-Bench: a judge's answers, corrected and as published
    tiif          TIIF-Bench: a judge's answers on short and long prompts
    text          words that prompts put in quotes, read in the images (extra ocr)
    clip-score    how well images fit their prompts
    scenes        the demo's scenes, read by image analysis
    style         how far pictures are in the demo's style that fine-tuning learns, in the same way
    classes       the demo's classes, in the same way
    distribution  FID, sFID, Inception Score, precision and recall against a reference

What is missing is said before an image is scored. Answers of a judge are kept, so that a scoring that was stopped goes
on where it was. docs/benchmarks_of_quality.md says more.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.catalogue import BENCHMARKS
from bitdance_scale.evaluation.metrics.score_file import write_scores
from bitdance_scale.evaluation.metrics.table import format_scores
from bitdance_scale.evaluation.scoring.catalogue import SCORINGS, choose_scorings
from bitdance_scale.evaluation.scoring.drawn import Drawn, ScoringStopped, open_drawn
from bitdance_scale.evaluation.scoring.scoring import ScoringChoices, load_networks
from bitdance_scale.train.process import EXIT_COMPLETE, EXIT_REQUEUE, StopRequest

_USUAL = ScoringChoices()


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    _add_folder(parser)
    _add_networks(parser)
    return run_command(parser, arguments, _run)


def _add_folder(parser: CommandParser) -> None:
    """What is scored, by which metrics."""
    names = ", ".join(scoring.metric.name for scoring in SCORINGS)
    parser.add_argument("drawn", type=Path, metavar="DRAWN", help="folder of a drawing; or images: a folder, an .npz")
    parser.add_argument("--metric", nargs="+", default=[], metavar="NAME", help=f"{names} (default: the benchmark's)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="the benchmark's published file of prompts")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images, or questions of --judge, at a time")
    group = parser.add_argument_group("a folder that another program has drawn")
    group.add_argument("--benchmark", metavar="NAME", help=", ".join(benchmark.name for benchmark in BENCHMARKS))
    group.add_argument("--name", metavar="MODEL", help="of the model, as in the folder's paths")


def _add_networks(parser: CommandParser) -> None:
    """What the metrics need."""
    group = parser.add_argument_group("geneval, clip-score")
    group.add_argument(
        "--detector",
        default=_USUAL.detector,
        metavar="NAME",
        help="Mask2Former: folder, hub name, or mmdetection's file, whose weights published scores use "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--clip", default=_USUAL.clip, metavar="NAME", help="CLIP: folder or hub name (default: %(default)s)"
    )
    group = parser.add_argument_group("dpg, tiif")
    group.add_argument(
        "--questions", type=Path, metavar="PATH", help="published questions: dpg_bench.csv; testmini_eval_prompts"
    )
    group.add_argument("--judge", metavar="NAME", help="model that is asked: folder or hub name")
    group.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible endpoint that is asked instead")
    group.add_argument("--judge-model", metavar="NAME", help="of the endpoint's model")
    group.add_argument("--key-variable", metavar="VARIABLE", help="environment variable with the endpoint's key")
    group.add_argument(
        "--max-unclear",
        type=float,
        default=_USUAL.max_unclear,
        metavar="SHARE",
        help="of answers that may be neither yes nor no (default: %(default)s)",
    )
    group.add_argument(
        "--answers", type=Path, metavar="FILE", help="where answers are kept (default: DRAWN/scores/answers.jsonl)"
    )
    group = parser.add_argument_group("distribution")
    group.add_argument("--inception", type=Path, metavar="FILE", help="torch_fidelity's weights of Inception")
    group.add_argument("--reference", type=Path, metavar="PATH", help="ADM's .npz; folder or .npz of real images")
    group.add_argument("--save-reference", type=Path, metavar="FILE", help="keep what was computed of real images")


def _run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with StopRequest() as stop:
        drawn = open_drawn(options.drawn, options.prompts, options.benchmark, options.name, lambda: stop.is_requested)
        try:
            _score(options, drawn)
        except ScoringStopped as stopped:
            print(f"\n{drawn.root}: {stopped}", file=sys.stderr, flush=True)
            return EXIT_REQUEUE
    return EXIT_COMPLETE


def _score(options: argparse.Namespace, drawn: Drawn) -> None:
    kinds = choose_scorings(drawn, options.metric)
    _check_writable(drawn.root)
    names = [name for name in ScoringChoices.__dataclass_fields__ if hasattr(options, name)]
    choices = ScoringChoices(**{name: getattr(options, name) for name in names})
    scorings = [kind(drawn, choices) for kind in kinds]
    # Imported late: torch takes seconds, and a refused option should not wait for it.
    import torch

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {options.device}: cannot be used ({str(error).splitlines()[0]})") from error
    load_networks(scorings, device)
    for scoring in scorings:
        drawn.refuse_if_stopped()
        scores = scoring.score()
        path = write_scores(drawn.root, scores)
        print(f"{format_scores(scores)}\n\n{path}", flush=True)


def _check_writable(root: Path) -> None:
    """Refuses a folder that scores cannot be written into; one that does not exist yet is made."""
    existing = root if root.exists() else root.parent
    if not os.access(existing, os.W_OK):
        raise ConfigError(
            f"{existing}: cannot be written, and scores go into {root}; copy or link the images elsewhere"
        )


if __name__ == "__main__":
    raise SystemExit(main())
