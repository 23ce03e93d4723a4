"""Packs pictures and captions into shards that training reads.

    bitdance pack pictures shards                        a folder of pictures with .txt captions beside them
    bitdance pack pictures shards --held-out 0.01        and one in a hundred to shards/held_out
    bitdance pack dataset shards --caption re_caption    metadata.jsonl, .csv or .parquet, or Parquet files
    bitdance pack train shards --classes                 a folder per class: each sample has its number as .cls
    bitdance pack ILSVRC2012_img_train.tar shards        the same of a tar with a tar per class, read in place

The pictures keep their bytes. Damaged ones are left out and listed in OUT/skipped.jsonl; OUT/report.json has the
counts, and OUT/classes.txt the names of classes. The same command goes on after a stop, and its result is the same as
without one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.train.process import EXIT_COMPLETE

_NUM_SHOWN = 3


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder, a Parquet file, a .jsonl or .csv table, or a tar of tars"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the shards, new or of the same command")
    parser.add_argument("--caption", default="", metavar="COLUMN", help="captions (default: text or caption)")
    parser.add_argument("--image", default="", metavar="COLUMN", help="pictures, or their file names (default: found)")
    parser.add_argument("--classes", action="store_true", help="the folders in SOURCE are classes, in order of name")
    parser.add_argument(
        "--class-map", type=Path, metavar="FILE", help="classes by this file: a name per line, or JSON names: numbers"
    )
    parser.add_argument(
        "--missing-caption",
        choices=("keep", "skip", "error"),
        default="keep",
        help="a picture without a caption is packed without one, left out, or refused (default: keep)",
    )
    parser.add_argument(
        "--held-out",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share for OUT/held_out, such as 0.01 (default: 0)",
    )
    parser.add_argument(
        "--samples-per-shard", type=_samples, default=5000, metavar="N", help="pictures of a shard (default: 5000)"
    )
    parser.add_argument(
        "--max-shard-mb", type=positive, default=1000, metavar="MB", help="their size at most (default: 1000)"
    )
    parser.add_argument("--no-check", action="store_true", help="read the headers of pictures only, do not decode them")
    parser.add_argument("--workers", type=positive, metavar="N", help="threads (default: one for each core)")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bitdance_scale.data.shard_writing.pack import PackOptions, pack_source

    pack_options = PackOptions(
        samples_per_shard=options.samples_per_shard,
        max_shard_bytes=options.max_shard_mb * 1_000_000,
        held_out=options.held_out,
        missing_caption=options.missing_caption,
        check=not options.no_check,
        caption=options.caption,
        image=options.image,
    )
    with tqdm(unit="picture", disable=None) as bar:

        def progress(num_done: int, num_pictures: int) -> None:
            bar.total = num_pictures
            bar.update(num_done - bar.n)

        workers = options.workers or len(os.sched_getaffinity(0))
        report = pack_source(
            options.source,
            options.out,
            pack_options,
            has_classes=options.classes,
            class_map=options.class_map,
            num_workers=workers,
            progress=progress,
        )
    print("\n".join(_summary(options.out, report, options.held_out)))
    return EXIT_COMPLETE


def _summary(out: Path, report: dict[str, Any], share: float) -> list[str]:
    """What was done, what was not, and what comes next."""
    from bitdance_scale.config.class_map import CLASSES_FILE
    from bitdance_scale.data.shard_writing.output_folder import HELD_OUT, SKIPPED
    from bitdance_scale.wording import file_size

    packed, held_out = report["num_packed"], report["num_held_out"]
    size = file_size(report["num_bytes"])
    lines = [f"{out}: {packed} of {report['num_pictures']} pictures in {len(report['shards'])} shards, {size}"]
    if num_classes := report.get("num_classes"):
        empty = f", {report['num_empty_classes']} of them without pictures" if report["num_empty_classes"] else ""
        lines.append(f"classes: {num_classes}{empty}, named in {out / CLASSES_FILE}")
    if held_out:
        lines.append(f"held out: {held_out} pictures in {out / HELD_OUT}")
    elif share:
        lines.append(
            f"held out: none; each picture is with the chance {share:g}, by its bytes: raise --held-out, and pack into "
            "another folder"
        )
    if report["skipped"]:
        lines.append(f"skipped: {_counts(report['skipped'])}, listed in {out / SKIPPED}")
        lines += [f"  {line.rstrip()}" for line in _first_lines(out / SKIPPED)]
    if report["captions"]:
        first = ", ".join(report.get("without_caption", []))
        lines += [
            f"packed without a caption: {_counts(report['captions'])}, first {first}",
            "  they are trained without words; --missing-caption skip leaves them out, error refuses them",
        ]
    names = {"converted": "converted to PNG", "left_out": "not pictures"}
    lines += [f"{text}: {_counts(report[name])}" for name, text in names.items() if report[name]]
    folders = {"data.shards": out} | ({"evaluate.shards": out / HELD_OUT} if held_out else {})
    settings = [f"{name}=[{json.dumps(str(folder), ensure_ascii=False)}]" for name, folder in folders.items()]
    if num_classes:
        named = json.dumps(str(out / CLASSES_FILE), ensure_ascii=False)
        settings += ['data.captions=[{source="cls"}]', f"classes.num_classes={num_classes}", f"classes.map={named}"]
    return [
        *lines,
        "next:",
        f"  bitdance index {shlex.quote(str(out))}",
        f"  bitdance inspect {shlex.quote(str(out))} --config CONFIG    which of them CONFIG trains on",
        f"  bitdance train CONFIG {shlex.join(settings)}",
    ]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _first_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [line for line, _ in zip(file, range(_NUM_SHOWN), strict=False)]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a share of at least 0 and below 1, such as 0.01")
    return share


def _samples(text: str) -> int:
    number = positive(text)
    if number > 100_000:
        raise argparse.ArgumentTypeError(f"{text}: must be 1..100000 pictures")
    return number
