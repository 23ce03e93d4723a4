"""Makes the published folder of a checkpoint, which the release's pipeline and `bitdance sample` load.

    bitdance export runs/sft_14b BitDance-mine --license apache-2.0
    bitdance export runs/sft_14b BitDance-mine-diffusers --layout diffusers
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

# The names of `generate.published_layout.LAYOUTS`, which imports torch.
LAYOUTS = ("release", "diffusers")
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
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of the folder (default: release)")
    shared = parser.add_argument_group("for those whom it is shared with")
    shared.add_argument(
        "--license",
        default="",
        metavar="ID",
        help="Hugging Face's id of the licence, such as apache-2.0; `other` with a name and a file "
        "(default: as the imported folder stated)",
    )
    shared.add_argument("--license-name", default="", metavar="NAME", help="name of a licence without an id")
    shared.add_argument("--license-file", type=Path, metavar="FILE", help="its text (not needed for apache-2.0)")
    shared.add_argument("--model-name", default="", metavar="NAME", help="title of the card (default: the run's name)")
    shared.add_argument(
        "--base-model", default="", metavar="ID", help="Hugging Face's id of the model that the weights came from"
    )
    shared.add_argument("--authors", nargs="+", default=(), metavar="NAME", help="who made it")
    shared.add_argument(
        "--scores", type=Path, nargs="+", default=(), metavar="FILE", help="scores/METRIC.json of its pictures"
    )
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bitdance_scale.checkpoint.export_card import ShareOptions
    from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
    from bitdance_scale.generate import published_layout
    from bitdance_scale.model.published_names import Part

    dtypes = {part: name for part in Part if (name := getattr(options, f"{part}_dtype"))}
    export = open_checkpoint(
        options.checkpoint,
        tokenizer=options.tokenizer,
        autoencoder=options.autoencoder,
        dtypes=dtypes,
        weights=options.weights,
        layout=published_layout.LAYOUTS[options.layout],
    )
    said = ShareOptions(
        licence=options.license,
        licence_name=options.license_name,
        licence_file=options.license_file,
        model_name=options.model_name,
        base_model=options.base_model,
        authors=tuple(options.authors),
        scores=tuple(options.scores),
    )
    if export.warning:
        print(f"warning: {export.warning}", file=sys.stderr)
    with tqdm(total=2 * export.num_bytes, unit="B", unit_scale=True, desc="write, read back", mininterval=0.5) as bar:
        facts = export_release(export, options.out, options=said, is_forced=options.force, on_bytes=bar.update)
    size, source = file_size(export.num_bytes), f"step {export.state.step} of {export.path}"
    is_chosen = options.weights or export.weights == "trained" or not export.network.model.parts.has_text
    other = "" if is_chosen else "; --weights trained writes the others"
    print(f"{options.out}: {size}, {export.weights} weights, {source}{other}")
    licence = facts.licence.name or facts.licence.id
    print(
        f"{options.out}/README.md: a generated card, licence {licence}; read and correct it before you share the folder"
    )
    if not facts.licence.is_stated:
        print("note: no licence is stated; say which with --license (docs/sharing.md)", file=sys.stderr)
    if extra := export.beyond_release:
        print(f"note: it has {extra}, {_EXTRA[export.network.model.parts.has_text]}", file=sys.stderr)
    return EXIT_COMPLETE
