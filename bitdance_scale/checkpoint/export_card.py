"""The card and the licence of an export, out of the checkpoint, the files of its run and what the user says."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdance_scale.checkpoint.remote_folder import is_remote
from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, TrainState, read_run_section, read_state
from bitdance_scale.checkpoint.shared_base import BASE, SharedBase, describe_base, read_base
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.step_names import CHECKPOINTS_DIR
from bitdance_scale.config.published_class import PICKLE_NAME
from bitdance_scale.config.published_head import beyond_release
from bitdance_scale.config.schema import NetworkConfig
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.generate.published_layout import DIFFUSERS, PublishedLayout
from bitdance_scale.generate.sampling_file import read_sampling
from bitdance_scale.model.adapter_folder import is_adapter_folder
from bitdance_scale.model.adapter_source import WeightedAdapter
from bitdance_scale.sharing.card import CardFacts, Table, code
from bitdance_scale.sharing.licences import Licence, stated_licence
from bitdance_scale.sharing.run_facts import RunCounts, find_samples, hub_datasets, run_tables, score_table

if TYPE_CHECKING:
    from bitdance_scale.checkpoint.export_release import Export, ExportedRun
    from bitdance_scale.checkpoint.release_source import Source
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
    adapters = () if export.changes is None else export.changes.adapters
    merged = [_merged(adapter) for adapter in adapters]
    # Those of its own run are under what is said of the run.
    others = [item for item in merged if item.adapter.source.where != str(export.path)]
    known = _known(export.path, export.state, export.run, options, others)
    network = export.network
    has_text = network.model.parts.has_text
    size_px = _own_size_px(known.config) if export.run is not None else None
    relation = "finetune" if export.run is not None else "merge" if merged else ""
    return dataclasses.replace(
        known.facts,
        summary=_summary(export, base, others),
        library=_library(export.layout),
        pipeline_tag="text-to-image" if has_text else "",
        tags=_tags("text-to-image" if has_text else "class-conditional", export.run),
        usage=_usage(network, export.layout, size_px or _release_size_px(network)),
        base_relation=relation,
        tables=(*([_adapter_table(merged)] if merged else []), *known.facts.tables),
        limitations=(
            *_limitations(export.run, known.has_scores, export.beyond_release),
            *_limitations_of_merge(merged, others),
        ),
    )


def merged_facts(source: Source, adapters: Sequence[WeightedAdapter], options: ShareOptions) -> CardFacts:
    """All that the card of a published folder says into whose weights adapters were merged.

    Args:
        source: the folder, checked.
        adapters: what is merged.
        options: what the user says.

    Raises:
        ConfigError, DataError: as `export_facts`.
    """
    base = read_base({"kind": source.kind, BASE: describe_base(source.path, None)})
    assert base is not None, "a folder has a name"
    merged = [_merged(adapter) for adapter in adapters]
    scores = score_table({}, None, 0, options.scores)
    num_elements = sum(math.prod(spec.shape) for _, spec in source.tensors(source.parts))
    sampling = read_sampling(source.path)
    size_px = sampling.size_px if sampling is not None else _release_size_px(source.network)
    return CardFacts(
        title=options.model_name or f"{base.name} with {_listed(merged)}",
        summary=f"{_description(source.network, num_elements)} {_merged_weights(base, merged)}",
        library=_library(source.layout),
        pipeline_tag="text-to-image",
        tags=_tags("text-to-image", None),
        licence=_licence(options, base, merged),
        usage=_usage(source.network, source.layout, size_px),
        authors=options.authors,
        base_models=_base_ids(options, base, merged),
        base_relation="merge",
        origin=(*_starts_of_merge(merged), _base_line(base)),
        tables=(_adapter_table(merged), *([scores] if scores is not None else [])),
        limitations=(
            *_limitations(None, scores is not None, beyond_release(source.network.head)),
            *_limitations_of_merge(merged, merged),
        ),
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
        # Beside weights that a run has trained, the adapters are of no use to whoever has the release alone.
        base_models=_base_ids(options, read_base(adapters.state.release) if adapters.base.is_import else None, ()),
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


@dataclass(frozen=True)
class _Merged:
    """Adapters in the weights of an export.

    Attributes:
        adapter: the adapters and their weight.
        name: of their folder, or of their run.
        hub_id: Hugging Face's id of their folder; empty: not known.
        licence: what their folder says, or the import that their run started from; None: nothing.
    """

    adapter: WeightedAdapter
    name: str
    hub_id: str
    licence: Licence | None


def _merged(adapter: WeightedAdapter) -> _Merged:
    where = Path(adapter.source.where)
    if is_adapter_folder(where):
        content = describe_base(where, None)
        found = read_base({"kind": "adapters", BASE: content})
        assert found is not None, "a folder has a name"
        return _Merged(adapter, found.name, found.hub_id, found.licence)
    base = read_base(read_state(where).release)
    return _Merged(adapter, _start_name(str(where.absolute())), "", base.licence if base is not None else None)


def _known(
    path: Path, state: TrainState, run: ExportedRun | None, options: ShareOptions, merged: Sequence[_Merged] = ()
) -> _Known:
    """What the files of a checkpoint, of its run and the user say; otherwise as `export_facts`.

    `merged` are adapters of others in its weights.
    """
    base = read_base(state.release)
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
        licence=_licence(options, base, merged),
        usage="",
        authors=options.authors,
        base_models=_base_ids(options, base, merged),
        datasets=hub_datasets(config),
        origin=(*_starts_of_merge(merged), *starts_of(path, base)),
        tables=(*tables, *([scores] if scores is not None else [])),
        prompts=prompts,
        samples=samples,
    )
    return _Known(facts, config, scores is not None)


def _licence(options: ShareOptions, base: SharedBase | None, merged: Sequence[_Merged]) -> Licence:
    """What the user says, or what the base says and all adapters of others with it."""
    found = base.licence if base is not None else None
    if found is not None and any(item.licence is None or not found.is_same(item.licence) for item in merged):
        found = None
    return stated_licence(options.licence, options.licence_name, options.licence_file, found)


def _base_ids(options: ShareOptions, base: SharedBase | None, merged: Sequence[_Merged]) -> tuple[str, ...]:
    """Hugging Face's ids of what the weights came from: the user's, or those that are known."""
    if options.base_model and not _HUB_ID.fullmatch(options.base_model):
        raise ConfigError(
            f"--base-model {options.base_model!r}: must be an id of Hugging Face's, such as Qwen/Qwen3-14B"
        )
    found = [options.base_model or (base.hub_id if base is not None else ""), *(item.hub_id for item in merged)]
    return tuple(dict.fromkeys(filter(None, found)))


def _starts_of_merge(merged: Sequence[_Merged]) -> Iterator[str]:
    """The adapters that were merged last, a line each."""
    for item in merged:
        known = f" ({item.hub_id})" if item.hub_id else ""
        yield f"adapters {item.name}{known}, with weight {item.adapter.weight:g}, merged into the weights"


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
    yield _base_line(base)


def _base_line(base: SharedBase) -> str:
    known = f" ({base.hub_id})" if base.hub_id else ""
    what = "a plain language model, to which head and projector were added" if base.kind == "Qwen3" else base.kind
    return f"{base.name}{known}: {what}"


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


def _summary(export: Export, base: SharedBase | None, others: Sequence[_Merged]) -> str:
    if export.run is not None:
        how = _trained_weights(export.stated_weights, export.run)
        if others:
            how += f" Beside those of the run, {_merged_into(others)}; nothing was trained after that."
    elif others:
        how = _merged_weights(base, others)
    else:
        how = f"These are the weights of {code(base.name)}, converted and not trained any further." if base else ""
    num_elements = sum(math.prod(spec.shape) for _, spec in export.tensors(export.weights))
    return f"{_description(export.network, num_elements)} {how}".rstrip()


def _description(network: NetworkConfig, num_elements: int) -> str:
    model, vision = network.model, network.vision
    kind = "a text-to-image model" if model.parts.has_text else "a class-conditional image model"
    return (
        f"This is {kind} of the {_PAPER} family. It draws images token by token, {vision.block_tokens} tokens of "
        f"{vision.num_bits} bits at a time, each token for {vision.downsample} x {vision.downsample} pixels. Its "
        f"backbone has {model.num_layers} layers of width {model.hidden_size}; with head and projector it has "
        f"{num_elements / 1e6:,.1f} M parameters."
    )


def _merged_weights(base: SharedBase | None, merged: Sequence[_Merged]) -> str:
    whose = f"the weights of {code(base.name)}" if base is not None else "weights"
    return f"These are {whose}, into which {_merged_into(merged)}; nothing was trained after that."


def _merged_into(merged: Sequence[_Merged]) -> str:
    were = "adapters were" if len(merged) > 1 else "an adapter was"
    return f"{were} merged: {', '.join(f'{code(item.name)} times {item.adapter.weight:g}' for item in merged)}"


def _listed(merged: Sequence[_Merged]) -> str:
    return " and ".join(item.name for item in merged)


def _adapter_table(merged: Sequence[_Merged]) -> Table:
    """The adapters in the weights: how much of each, and its settings."""
    return Table(
        "Adapters in the weights",
        ("adapter", "weight", "linears", "rank", "scale", "with them"),
        tuple(_adapter_row(item) for item in merged),
        "A linear is its weights and the sum of weight x scale x (B A) over its adapters.",
    )


def _adapter_row(item: _Merged) -> tuple[str, ...]:
    source = item.adapter.source
    ranks = sorted({found.rank for found in source.matrices.values()})
    scales = sorted({found.scale for found in source.matrices.values()})
    beside = ["the projector of the bits"] if source.projector else []
    beside += [f"{source.num_queries} query tokens"] if source.num_queries else []
    rank, scale = (
        " to ".join(f"{end:g}" for end in dict.fromkeys([*ends[:1], *ends[-1:]])) for ends in (ranks, scales)
    )
    return item.name, f"{item.adapter.weight:g}", str(len(source.matrices)), rank, scale, " and ".join(beside)


def _limitations_of_merge(merged: Sequence[_Merged], others: Sequence[_Merged]) -> Iterator[str]:
    """Of adapters in the weights; `others` are those that are not of the exported run."""
    if len(merged) > 1 or any(item.adapter.weight != 1 for item in merged):
        yield "Adapters act together here, or with other weights than in training: no training has seen this mixture."
    for item in others:
        if item.adapter.source.base is None:
            yield f"{code(item.name)} does not say beside which weights it was trained: only sizes were compared."


def _trained_weights(kind: str, run: ExportedRun) -> str:
    stage = STAGES[run.stage].title
    after = f"after {run.step:,} of {run.num_steps:,} steps"
    return f"The weights are the {kind} ones of run {code(run.name)} ({stage}) {after}."


def _library(layout: PublishedLayout) -> str:
    return "diffusers" if layout is DIFFUSERS else "bitdance_scale"


def _tags(kind: str, run: ExportedRun | None) -> tuple[str, ...]:
    stage = (run.stage,) if run is not None else ()
    return ("bitdance", "autoregressive", "binary-tokens", kind, *stage, "arxiv:2602.14041")


def _usage(network: NetworkConfig, layout: PublishedLayout, size_px: tuple[int, int]) -> str:
    """How the folder is used, in Markdown; `size_px` is height and width of the picture to draw."""
    if not network.model.parts.has_text:
        return (
            f"```\nbitdance import {PICKLE_NAME} imported\n"
            "bitdance evaluate draw imagenet imported --out drawn\n```\n\n`bitdance` is the command of bitdance_scale."
        )
    height, width = size_px
    ours = f'```\nbitdance sample FOLDER --prompt "a red circle" --size {height}x{width} --out pictures\n```'
    if layout is DIFFUSERS:
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


def _own_size_px(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of a run's own pictures; None: it does not say."""
    size = config.get("sample", {}).get("size_px", [])
    return (int(size[0]), int(size[1])) if len(size) == 2 else None


def _release_size_px(network: NetworkConfig) -> tuple[int, int]:
    """(height, width) of 64 cells a side, as the release draws."""
    side = network.vision.block_side
    side_px = max(1, 64 // side) * side * network.vision.downsample
    return side_px, side_px


def _limitations(run: ExportedRun | None, has_scores: bool, beyond_release: Mapping[str, Any]) -> Iterator[str]:
    if run is not None and not run.is_finished:
        yield f"The run had not finished: the weights are at {code(str(run))}."
    if not has_scores:
        where = "with the run" if run is not None else "at hand"
        yield f"No score of a benchmark was {where}, so how good its pictures are is not stated here."
    if beyond_release:
        names = ", ".join(code(name) for name in beyond_release)
        yield f"Sizes that the published BitDance code does not know ({names}): that code refuses this folder."
    yield "Nothing filters prompts or pictures. What the training data showed, wrongly or harmfully, can come back."
    yield "Words in pictures, numbers of things and positions are where such models are known to fail."
