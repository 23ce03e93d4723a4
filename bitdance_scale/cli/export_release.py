"""Makes the published folder of a checkpoint, which the release's pipeline and `bitdance sample` load.

    bitdance export runs/sft_14b BitDance-mine
    bitdance export runs/imagenet_b_4x BitDance-B-mine --weights averaged

CHECKPOINT is a run folder (its latest checkpoint), one checkpoint of it (checkpoints/step_...), or an imported release.
Of a run that averages its weights (optim.average_decay) the averages are written, unless --weights says otherwise.
Dtypes are those of the release that the run started from; for weights that started at random, the backbone is written
in bfloat16, head and projector in float32. A class-conditional network is written in float32: the chosen weights as
model.safetensors, all that there are as model.pt (`model`, and `ema` for averages), sizes as model_config.json. Weights
are copied part by part, so memory does not grow with the model. docs/interchange.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.config.schema import WEIGHTS
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.wording import file_size

DTYPES = ("bfloat16", "float16", "float32")
# The names of `model.published_names.Part`, which imports torch.
PARTS = ("backbone", "head", "projector")
_EXTRA = {
    True: "which the release's pipeline does not know and refuses; `bitdance sample` runs it",
    False: "which the release's program does not know; model_config.json says so to `bitdance import`",
}


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run folder, checkpoint, or imported release"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier export at OUT")
    parser.add_argument(
        "--weights", choices=WEIGHTS, help="weights to write (default: averaged if the checkpoint has them)"
    )
    parser.add_argument("--tokenizer", type=Path, help="text tokenizer, where it is not where the run had it")
    parser.add_argument(
        "--autoencoder", type=Path, help="autoencoder's weights file, where it is not where the run had it"
    )
    for part in PARTS:
        parser.add_argument(f"--{part}-dtype", choices=DTYPES, help=f"dtype of the {part}, if another")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
    from bitdance_scale.model.published_names import Part

    dtypes = {part: name for part in Part if (name := getattr(options, f"{part}_dtype"))}
    export = open_checkpoint(
        options.checkpoint,
        tokenizer=options.tokenizer,
        autoencoder=options.autoencoder,
        dtypes=dtypes,
        weights=options.weights,
    )
    if export.warning:
        print(f"warning: {export.warning}", file=sys.stderr)
    with tqdm(total=2 * export.num_bytes, unit="B", unit_scale=True, desc="write, read back", mininterval=0.5) as bar:
        export_release(export, options.out, is_forced=options.force, on_bytes=bar.update)
    size, source = file_size(export.num_bytes), f"step {export.state.step} of {export.path}"
    is_chosen = options.weights or export.weights == "trained" or not export.network.model.parts.has_text
    other = "" if is_chosen else "; --weights trained writes the others"
    print(f"{options.out}: {size}, {export.weights} weights, {source}{other}")
    if extra := export.beyond_release:
        print(f"note: it has {extra}, {_EXTRA[export.network.model.parts.has_text]}", file=sys.stderr)
    return EXIT_COMPLETE
