"""The table of subcommands."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import bitdance_scale
from bitdance_scale.cli.command import Command, run_group
from bitdance_scale.renames import RENAMED_COMMANDS

COMMANDS: Mapping[str, Command] = {
    "train": Command("train a model or a tokenizer on this machine, or on several", "train"),
    "sample": Command("draw images of prompts with a published model or a run", "sample"),
    "caption": Command("describe images with a published model", "caption"),
    "import": Command(
        "make a checkpoint of released weights: of BitDance, or of a Qwen3 to pretrain", "import_release"
    ),
    "export": Command("make the published folder of a checkpoint", "export_release"),
    "app": Command("open a page to draw with a model and to watch a run", "app"),
    "pack": Command("make shards of pictures and captions: folders, tables, Parquet files", "pack_folder"),
    "index": Command("index shards ahead of training and report what is in them", "index_shards"),
    "inspect": Command("show samples of shards as training will see them", "inspect_shards"),
    "encode": Command("encode the images of a run once, for all epochs", "encode_shards"),
    "pack-length": Command("find the length of packs that wastes least", "pack_length"),
    "plan": Command("say which layout a run should have on so many GPUs, and what it will take", "plan"),
    "memory": Command("say what a run needs in memory, rank by rank", "memory"),
    "histogram": Command("draw how the head's predictions of held-out images are distributed", "histogram"),
    "plot": Command("draw the page of a run, or of several", "plot_run"),
    "check": Command("check a configuration against all rules", "check"),
    "config": Command("print a configuration, explain a setting, list what is shipped", "config"),
    "evaluate": Command("draw the images of a benchmark, score and compare them", "evaluate"),
    "tokenizer": Command("train or evaluate a visual tokenizer", "tokenizer"),
    "demo-data": Command("draw the images of the demo", "demo_data"),
}
ABOUT = "Trains BitDance (arXiv 2602.14041), the autoregressive text-to-image model with binary visual tokens."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 2 refused, 75 stopped on request and saved."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"bitdance_scale {bitdance_scale.__version__}")
        return 0
    try:
        return run_group(COMMANDS, arguments, "bitdance", ABOUT, RENAMED_COMMANDS)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has seen enough. Python would complain again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
