"""Makes the published folder of a checkpoint, which the release's pipeline and `bitdance sample` load.

    bitdance export runs/sft_14b BitDance-mine --license apache-2.0
    bitdance export runs/sft_14b BitDance-mine-diffusers --layout diffusers
    bitdance export runs/imagenet_b_4x BitDance-B-mine --weights averaged
    bitdance export runs/my_style my_style                                    # of a run with adapters: the adapters
    bitdance export runs/my_style BitDance-my-style --merge                   # with them in the weights
    bitdance export BitDance-14B-16x mixed --merge --adapter my_style=0.8 --adapter other=0.5

CHECKPOINT is a run folder (its latest checkpoint), one checkpoint of it (checkpoints/step_...), or an imported release.
Of a run that averages its weights (optim.average_decay) the averages are written, unless --weights says otherwise.
Dtypes are those of the release that the run started from; for weights that started at random, the backbone is written
in bfloat16, head and projector in float32. A class-conditional network is written in float32: the chosen weights as
model.safetensors, all that there are as model.pt (`model`, and `ema` for averages), sizes as model_config.json. Weights
are copied part by part, so memory does not grow with the model.

Of a run with adapters (lora.rank) the adapters alone are written: a folder that PEFT loads, with what it does not know
beside it, in float32. --merge writes the whole model, with the adapters of the run, and of every --adapter, in its
weights; then CHECKPOINT may also be a published folder. docs/interchange.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, add_adapter_argument, run_command
from bitdance_scale.config.schema import WEIGHTS
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.wording import file_size

if TYPE_CHECKING:
    from bitdance_scale.checkpoint.export_card import ShareOptions
    from bitdance_scale.checkpoint.export_release import Export
    from bitdance_scale.checkpoint.run_adapters import RunAdapters
    from bitdance_scale.model.published_names import Part
    from bitdance_scale.sharing.card import CardFacts

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
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="run folder, checkpoint, or imported release; with --merge also a published folder",
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
    parser.add_argument("--layout", choices=LAYOUTS, help="of the folder (default: release)")
    parser.add_argument("--merge", action="store_true", help="write the model with its adapters in the weights")
    parser.add_argument("--base", type=Path, help="frozen weights of the adapters, where the run had them elsewhere")
    add_adapter_argument(parser)
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
    from bitdance_scale.checkpoint.run_adapters import has_adapters
    from bitdance_scale.checkpoint.start_weights import find_checkpoint

    if options.adapter and not options.merge:
        raise ConfigError(
            f"--adapter {options.adapter[0]}: is written into the weights alone, with --merge; add it, or leave the "
            "adapter out"
        )
    if options.merge and _is_published(options.checkpoint):
        return _merge_folder(options)
    options.checkpoint = find_checkpoint(options.checkpoint)
    is_adapted = has_adapters(options.checkpoint)
    if options.merge and not (is_adapted or options.adapter):
        raise ConfigError(f"--merge: {options.checkpoint} has no adapters, and no --adapter names any; leave it out")
    if options.base is not None and not is_adapted:
        raise ConfigError(f"--base {options.base}: {options.checkpoint} has no adapters; leave it out")
    if is_adapted and not options.merge:
        return _export_adapter(options)
    return _export(options, _opened(options, is_adapted))


def _is_published(folder: Path) -> bool:
    from bitdance_scale.generate.published_layout import layout_of

    return folder.is_dir() and (folder / layout_of(folder).head_config).is_file()


def _dtypes(options: argparse.Namespace) -> dict[Part, str]:
    from bitdance_scale.model.published_names import Part

    return {part: name for part in Part if (name := getattr(options, f"{part}_dtype"))}


def _opened(options: argparse.Namespace, is_adapted: bool) -> Export:
    """What is exported, with the adapters that are merged into it."""
    from bitdance_scale.checkpoint.export_merged import merged_release, merged_run
    from bitdance_scale.checkpoint.export_release import open_checkpoint
    from bitdance_scale.checkpoint.named_adapters import parse_adapters
    from bitdance_scale.generate import published_layout

    adapters = parse_adapters(options.adapter)
    layout = published_layout.LAYOUTS[options.layout or LAYOUTS[0]]
    if is_adapted:
        return merged_run(_open_adapters(options), adapters, dtypes=_dtypes(options), layout=layout)
    export = open_checkpoint(
        options.checkpoint,
        tokenizer=options.tokenizer,
        autoencoder=options.autoencoder,
        dtypes=_dtypes(options),
        weights=options.weights,
        layout=layout,
    )
    return merged_release(export, adapters) if adapters else export


def _open_adapters(options: argparse.Namespace) -> RunAdapters:
    from bitdance_scale.checkpoint.run_adapters import open_run_adapters

    return open_run_adapters(
        options.checkpoint,
        weights=options.weights,
        base=options.base,
        tokenizer=options.tokenizer,
        autoencoder=options.autoencoder,
    )


def _export_adapter(options: argparse.Namespace) -> int:
    """Writes the adapters of a run."""
    from bitdance_scale.checkpoint.export_adapter import export_adapter

    _refuse_unused(options, ("layout",), "a folder of adapters has none; leave it out, or add --merge")
    adapters = _open_adapters(options)
    run, facts = export_adapter(
        adapters, options.out, dtypes=_dtypes(options), options=_shared(options), is_forced=options.force
    )
    if not run.is_finished:
        print(f"warning: {adapters.path} is at {run}: the run has not finished", file=sys.stderr)
    print(
        f"{options.out}: adapters of {len(adapters.source.matrices)} linears, rank {adapters.section.rank}, "
        f"{adapters.weights} weights, step {adapters.state.step} of {adapters.path}; --merge writes the whole model"
    )
    _tell_licence(options.out, facts)
    return EXIT_COMPLETE


def _merge_folder(options: argparse.Namespace) -> int:
    """Copies a published folder with adapters in its weights."""
    from tqdm import tqdm

    from bitdance_scale.checkpoint.export_merged import merge_folder
    from bitdance_scale.checkpoint.named_adapters import parse_adapters

    if not options.adapter:
        raise ConfigError(f"--merge: {options.checkpoint} is a published folder; name adapters with --adapter")
    unused = ("weights", "tokenizer", "autoencoder", "base", "layout", *(f"{part}_dtype" for part in PARTS))
    _refuse_unused(
        options, unused, f"{options.checkpoint} is a published folder, which keeps what it has; leave it out"
    )
    with tqdm(unit="B", unit_scale=True, desc="write, read back", mininterval=0.5) as bar:
        num_bytes, facts = merge_folder(
            options.checkpoint,
            parse_adapters(options.adapter),
            options.out,
            options=_shared(options),
            is_forced=options.force,
            on_bytes=bar.update,
        )
    print(f"{options.out}: {file_size(num_bytes)}, {options.checkpoint} with {', '.join(options.adapter)}")
    _tell_licence(options.out, facts)
    return EXIT_COMPLETE


def _refuse_unused(options: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Refuses options that would change nothing."""
    for name in names:
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')}: {reason}")


def _export(options: argparse.Namespace, export: Export) -> int:
    from tqdm import tqdm

    from bitdance_scale.checkpoint.export_release import export_release

    if export.warning:
        print(f"warning: {export.warning}", file=sys.stderr)
    with tqdm(total=2 * export.num_bytes, unit="B", unit_scale=True, desc="write, read back", mininterval=0.5) as bar:
        facts = export_release(
            export, options.out, options=_shared(options), is_forced=options.force, on_bytes=bar.update
        )
    size, source = file_size(export.num_bytes), f"step {export.state.step} of {export.path}"
    is_chosen = options.weights or export.stated_weights == "trained" or not export.network.model.parts.has_text
    other = "" if is_chosen else "; --weights trained writes the others"
    print(f"{options.out}: {size}, {export.stated_weights} weights, {source}{other}")
    _tell_licence(options.out, facts)
    if extra := export.beyond_release:
        print(f"note: it has {extra}, {_EXTRA[export.network.model.parts.has_text]}", file=sys.stderr)
    return EXIT_COMPLETE


def _shared(options: argparse.Namespace) -> ShareOptions:
    """What the user says of an export to those with whom it is shared."""
    from bitdance_scale.checkpoint.export_card import ShareOptions

    return ShareOptions(
        licence=options.license,
        licence_name=options.license_name,
        licence_file=options.license_file,
        model_name=options.model_name,
        base_model=options.base_model,
        authors=tuple(options.authors),
        scores=tuple(options.scores),
    )


def _tell_licence(out: Path, facts: CardFacts) -> None:
    licence = facts.licence.name or facts.licence.id
    print(f"{out}/README.md: a generated card, licence {licence}; read and correct it before you share the folder")
    if not facts.licence.is_stated:
        print("note: no licence is stated; say which with --license (docs/sharing.md)", file=sys.stderr)
