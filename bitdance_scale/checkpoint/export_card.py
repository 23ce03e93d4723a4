"""The card and the licence of an export, out of the checkpoint, the files of its run and what the user says."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance_scale.checkpoint.remote_folder import is_remote
from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, TrainState, read_run_section, read_state
from bitdance_scale.checkpoint.shared_base import SharedBase, read_base
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.step_names import CHECKPOINTS_DIR
from bitdance_scale.config.published_class import PICKLE_NAME
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate.published_layout import DIFFUSERS
from bitdance_scale.sharing.card import CardFacts, Table, code
from bitdance_scale.sharing.licences import stated_licence
from bitdance_scale.sharing.run_facts import RunCounts, find_samples, hub_datasets, run_tables, score_table

if TYPE_CHECKING:
    from bitdance_scale.checkpoint.export_release import Export, ExportedRun
    from bitdance_scale.checkpoint.run_adapters import RunAdapters

MAX_STARTS = 16
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PAPER = "[BitDance](https://arxiv.org/abs/2602.14041)"


@dataclass(frozen=True)
class ShareOptions:
    """What the user says of an export; everything is empty where nothing is said.

    Attributes:
        licence: Hugging Face's id of the licence.
        licence_name: its name, where the id is `other`.
        licence_file: its text.
        model_name: the title of the card.
        base_model: Hugging Face's id of the model that the weights came from.
        authors: whoever made the model.
        scores: files of scores (scores/METRIC.json) of pictures of these weights.
    """

    licence: str = ""
    licence_name: str = ""
    licence_file: Path | None = None
    model_name: str = ""
    base_model: str = ""
    authors: tuple[str, ...] = ()
    scores: tuple[Path, ...] = ()


def export_facts(export: Export, options: ShareOptions) -> CardFacts:
    """All that the card of an export says.

    Args:
        export: the checkpoint, checked.
        options: what the user says.

    Raises:
        ConfigError: an option is not possible.
        DataError: a file of the run, or one of scores, is damaged.
    """
    base = read_base(export.state.release)
    known = _known(export.path, export.state, export.run, options)
    has_text = export.network.model.parts.has_text
    return dataclasses.replace(
        known.facts,
        summary=_summary(export, base),
        library="diffusers" if export.layout is DIFFUSERS else "bitdance_scale",
        pipeline_tag="text-to-image" if has_text else "",
        tags=_tags("text-to-image" if has_text else "class-conditional", export.run),
        usage=_usage(export, _size_px(export, known.config)),
        base_relation="finetune" if export.run is not None else "",
        limitations=tuple(_limitations(export.run, known.has_scores, export.beyond_release)),
    )


def adapter_facts(adapters: RunAdapters, run: ExportedRun, options: ShareOptions) -> CardFacts:
    """All that the card of a folder of adapters says; otherwise as `export_facts`."""
    known = _known(adapters.path, adapters.state, run, options)
    source = adapters.source
    others = ["the whole projector of the bits"] if source.projector else []
    others += [f"changes of {source.num_queries} query tokens"] if source.num_queries else []
    beside = f" With them come {' and '.join(others)}." if others else ""
    height, width = known.config["sample"]["size_px"]
    command = f'bitdance sample BASE --adapter FOLDER --prompt "a red circle" --size {height}x{width} --out pictures'
    return dataclasses.replace(
        known.facts,
        summary=f"These are adapters for {code(adapters.base.name)}, a model of the {_PAPER} family: low-rank changes "
        f"(LoRA, rank {adapters.section.rank}) of {len(source.matrices)} of its linears.{beside} Without that model "
        f"they are of no use. {_trained_weights(adapters.weights, run)}",
        library="peft",
        pipeline_tag="text-to-image",
        tags=("lora", *_tags("text-to-image", run)),
        usage=f"```\n{command}\n```\n\n`bitdance` is the command of bitdance_scale; BASE is the folder of the model. "
        "PEFT loads what is of the language model; head, projector and query tokens are in files of their own.",
        base_relation="adapter",
        limitations=tuple(_limitations(run, known.has_scores, {})),
    )


@dataclass(frozen=True)
class _Known:
    """What cards of all kinds of exports say.

    Attributes:
        facts: without what is particular to a kind.
        config: of the checkpoint.
        has_scores: whether there are scores among the tables.
    """

    facts: CardFacts
    config: Mapping[str, Any]
    has_scores: bool


def _known(path: Path, state: TrainState, run: ExportedRun | None, options: ShareOptions) -> _Known:
    """What the files of a checkpoint, of its run and the user say; otherwise as `export_facts`."""
    base = read_base(state.release)
    if options.base_model and not _HUB_ID.fullmatch(options.base_model):
        raise ConfigError(
            f"--base-model {options.base_model!r}: must be an id of Hugging Face's, such as Qwen/Qwen3-14B"
        )
    base_id = options.base_model or (base.hub_id if base is not None else "")
    config = tomllib.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    # What is beside an import is not of a run.
    folder = path.parents[1] if run is not None and path.parent.name == CHECKPOINTS_DIR else None
    tables: list[Table] = [] if run is None else [*run_tables(config, _counts(state, run), folder)]
    samples, prompts = find_samples(config, folder, state.step)
    scores = score_table(config, folder, state.step, options.scores)
    facts = CardFacts(
        title=options.model_name or (run.name if run is not None else base.name if base else "BitDance"),
        summary="",
        library="",
        pipeline_tag="",
        tags=(),
        licence=stated_licence(
            options.licence, options.licence_name, options.licence_file, base.licence if base is not None else None
        ),
        usage="",
        authors=options.authors,
        base_models=(base_id,) if base_id else (),
        datasets=hub_datasets(config),
        origin=tuple(starts_of(path, base)),
        tables=(*tables, *([scores] if scores is not None else [])),
        prompts=prompts,
        samples=samples,
    )
    return _Known(facts, config, scores is not None)


def starts_of(checkpoint: Path, base: SharedBase | None) -> Iterator[str]:
    """What a checkpoint's training began from, and what that began from, as far as the folders are still there.

    Args:
        checkpoint: committed.
        base: the folder that all of them came from; None: the first began with random weights.
    """
    path = checkpoint
    for _ in range(MAX_STARTS):
        section = read_run_section(path)
        start = section.get("start_from", "") if "steps" in section else ""
        found = _found_start(path, start) if start else None
        if start and found is None:
            yield f"{_start_name(start)}: the run or import of this name, which is not at hand any more"
        if found is None or found == path:
            break
        path, earlier = found, read_run_section(found)
        if "steps" in earlier:
            stage = STAGES[earlier.get("stage", "pt")].title
            yield f"run {earlier['name']}, {stage}, which is at step {read_state(found).step:,} of {earlier['steps']:,}"
    if base is None:
        yield "random initial weights"
        return
    known = f" ({base.hub_id})" if base.hub_id else ""
    what = "a plain language model, to which head and projector were added" if base.kind == "Qwen3" else base.kind
    yield f"{base.name}{known}: {what}"


def _found_start(path: Path, start: str) -> Path | None:
    """The checkpoint that a run started from, if it is still where the run had it, or beside the run."""
    if is_remote(start):
        return None
    for where in (Path(start), *(root / _start_name(start) for root in path.absolute().parents[2:3])):
        try:
            return find_checkpoint(where)
        except CheckpointError:
            continue
    return None


def _start_name(start: str) -> str:
    """The name of the run or import of a path; the path may be that of one of its checkpoints."""
    parts = [part for part in start.split("/") if part]
    return parts[-3] if len(parts) > 2 and parts[-2] == CHECKPOINTS_DIR else parts[-1]


def _counts(state: TrainState, run: ExportedRun) -> RunCounts:
    return RunCounts(
        state.step, run.num_steps, state.images, state.tokens, state.images_by_resolution, state.skipped_samples
    )


def _summary(export: Export, base: SharedBase | None) -> str:
    model, vision = export.network.model, export.network.vision
    kind = "a text-to-image model" if model.parts.has_text else "a class-conditional image model"
    drawn = (
        f"It draws images token by token, {vision.block_tokens} tokens of {vision.num_bits} bits at a time, each token "
        f"for {vision.downsample} x {vision.downsample} pixels. Its backbone has {model.num_layers} layers of width "
        f"{model.hidden_size}; with head and projector it has {_num_elements(export) / 1e6:,.1f} M parameters."
    )
    if export.run is None:
        how = f"These are the weights of {code(base.name)}, converted and not trained any further." if base else ""
    else:
        how = _trained_weights(export.stated_weights, export.run)
    return f"This is {kind} of the {_PAPER} family. {drawn} {how}".rstrip()


def _trained_weights(kind: str, run: ExportedRun) -> str:
    stage = STAGES[run.stage].title
    after = f"after {run.step:,} of {run.num_steps:,} steps"
    return f"The weights are the {kind} ones of run {code(run.name)} ({stage}) {after}."


def _num_elements(export: Export) -> int:
    return sum(math.prod(spec.shape) for _, spec in export.tensors(export.weights))


def _tags(kind: str, run: ExportedRun | None) -> tuple[str, ...]:
    stage = (run.stage,) if run is not None else ()
    return ("bitdance", "autoregressive", "binary-tokens", kind, *stage, "arxiv:2602.14041")


def _usage(export: Export, size_px: tuple[int, int]) -> str:
    """How the folder is used, in Markdown; `size_px` is height and width of the picture to draw."""
    if not export.network.model.parts.has_text:
        return (
            f"```\nbitdance import {PICKLE_NAME} imported\n"
            "bitdance evaluate draw imagenet imported --out drawn\n```\n\n`bitdance` is the command of bitdance_scale."
        )
    height, width = size_px
    ours = f'```\nbitdance sample FOLDER --prompt "a red circle" --size {height}x{width} --out pictures\n```'
    if export.layout is DIFFUSERS:
        return (
            f"{_diffusers_usage(height, width)}\n\n`trust_remote_code=True` runs the code in this folder "
            "(`bitdance_*.py`): read it first. bitdance_scale draws from the folder too, and runs none of its code:"
            f"\n\n{ours}"
        )
    return (
        f"{ours}\n\n`bitdance` is the command of bitdance_scale. `bitdance import FOLDER OUT` makes a start for "
        "training of it."
    )


def _diffusers_usage(height: int, width: int) -> str:
    return f"""```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True, torch_dtype=torch.bfloat16).to("cuda")
pipeline("a red circle", height={height}, width={width}).images[0].save("picture.png")
```"""


def _size_px(export: Export, config: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the run's own pictures; of an import, 64 cells a side, as the release draws."""
    if export.run is not None and len(size := config.get("sample", {}).get("size_px", [])) == 2:
        return int(size[0]), int(size[1])
    side = export.network.vision.block_side
    side_px = max(1, 64 // side) * side * export.network.vision.downsample
    return side_px, side_px


def _limitations(run: ExportedRun | None, has_scores: bool, beyond_release: Mapping[str, Any]) -> Iterator[str]:
    if run is not None and not run.is_finished:
        yield f"The run had not finished: the weights are at {code(str(run))}."
    if not has_scores:
        yield "No score of a benchmark was with the run, so how good its pictures are is not stated here."
    if beyond_release:
        names = ", ".join(code(name) for name in beyond_release)
        yield f"Sizes that the published BitDance code does not know ({names}): that code refuses this folder."
    yield "Nothing filters prompts or pictures. What the training data showed, wrongly or harmfully, can come back."
    yield "Words in pictures, numbers of things and positions are where such models are known to fail."
