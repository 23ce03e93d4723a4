"""Adapters merged into the weights that they change: of a run's checkpoint, of a release, of a published folder.

A merged linear is W + scale * (B A), computed in float32 by `model/low_rank.py` and rounded once to the dtype of W.
What no adapter changes keeps its bytes. All is written some rows at a time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

import bitdance_scale
from bitdance_scale.checkpoint.conversion_folder import (
    REPORT_NAME,
    OnBytes,
    check_destination,
    conversion_folder,
    write_conversion_report,
)
from bitdance_scale.checkpoint.export_card import ShareOptions, merged_facts
from bitdance_scale.checkpoint.export_release import Export, checked_condition, open_checkpoint, run_of
from bitdance_scale.checkpoint.export_text import read_back
from bitdance_scale.checkpoint.frozen_base import FrozenBase, base_network, facts_of
from bitdance_scale.checkpoint.integrity import file_digest, text_digest
from bitdance_scale.checkpoint.published_files import PublishedTensors, TensorFileWriter, row_chunks
from bitdance_scale.checkpoint.release_source import Source, open_source
from bitdance_scale.checkpoint.run_adapters import RunAdapters
from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, TENSORS_DIR, check_vision, read_run_section
from bitdance_scale.checkpoint.start_weights import NewQueries, start_prefix
from bitdance_scale.checkpoint.tensor_storage import StoredTensors
from bitdance_scale.config.load import load_network
from bitdance_scale.generate.published_layout import RELEASE, PublishedLayout
from bitdance_scale.model.adapter_changes import AdapterChanges
from bitdance_scale.model.adapter_source import WeightedAdapter, check_base, fingerprint
from bitdance_scale.model.published_names import EMBEDDING, OUTPUT, PUBLISHED_EMBEDDING, PUBLISHED_OUTPUT, Part
from bitdance_scale.sharing.card import SAMPLES_NAME, CardFacts, write_card
from bitdance_scale.sharing.licences import CARD_NAME, LICENCE_FILES
from bitdance_scale.vision.tokenizer import vision_digest
from bitdance_scale.weight_files import TensorSpec


def merged_run(
    adapters: RunAdapters,
    others: Sequence[WeightedAdapter] = (),
    *,
    dtypes: Mapping[Part, str] | None = None,
    layout: PublishedLayout = RELEASE,
) -> Export:
    """A checkpoint of a run with adapters, to be exported with them merged.

    Args:
        adapters: from `open_run_adapters`.
        others: adapters that are merged too.
        dtypes: of parts, in place of those of the release that the frozen weights came from.
        layout: of the folder to make.

    Raises:
        BitDanceError: something is damaged or does not fit.
    """
    network, state, frozen = adapters.network, adapters.state, adapters.base
    # An import has the tokenizer of a run in another form; their digests are compared.
    is_same_form = load_network(frozen.path / CONFIG_NAME).text.kind == network.text.kind
    base = open_checkpoint(
        frozen.path,
        tokenizer=network.text.tokenizer_path if network.model.parts.has_text and is_same_form else None,
        autoencoder=network.vision.weights_path,
        dtypes=dtypes,
        weights=frozen.weights,
        layout=layout,
    )
    condition = checked_condition(adapters.path, network, state)
    check_vision(adapters.path, state, vision_digest(network.vision))
    adapters.stored.check_files(adapters.tensor_files())
    # Its base may have fewer query tokens, and is the one that was found.
    own = WeightedAdapter(dataclasses.replace(adapters.source, base=None))
    changes = AdapterChanges([own, *others], network, condition.vocab_size, str(adapters.path))
    _check_bases(others, frozen, base)
    stored = base.stored
    if adapters.num_new_queries:
        stored = _GrownTensors(frozen, _new_queries(adapters))
    return dataclasses.replace(
        base,
        path=adapters.path,
        run=run_of(adapters.path, state),
        state=state,
        config_sha256=text_digest((adapters.path / CONFIG_NAME).read_text(encoding="utf-8")),
        network=network,
        condition=condition,
        stored=stored,
        dtypes={frozen.weights: base.dtypes[frozen.weights]},
        changes=changes,
        adapter_weights=adapters.weights,
    )


def merged_release(export: Export, adapters: Sequence[WeightedAdapter]) -> Export:
    """A run or an import without adapters of its own, to be exported with some merged.

    Args:
        export: from `open_checkpoint`.
        adapters: what is merged.

    Raises:
        CheckpointError: they are of another network or other weights.
    """
    changes = AdapterChanges(adapters, export.network, export.condition.vocab_size, str(export.path))
    _check_bases(adapters, FrozenBase(export.path, export.weights, str(export.path)), export)
    return dataclasses.replace(export, dtypes={export.weights: export.dtypes[export.weights]}, changes=changes)


def merge_folder(
    folder: Path,
    adapters: Sequence[WeightedAdapter],
    out: Path,
    *,
    options: ShareOptions | None = None,
    is_forced: bool = False,
    on_bytes: OnBytes = lambda _: None,
) -> tuple[int, CardFacts]:
    """Copies a published text-to-image folder with adapters merged into its weights, and reads it back.

    Args:
        folder: the published folder.
        adapters: what is merged.
        out: the folder to make.
        options: what the user says of it to those with whom it is shared; None: nothing.
        is_forced: whether an earlier conversion there is replaced.
        on_bytes: called as bytes are written and read back.

    Returns:
        (bytes of the weights but for the autoencoder's; what its card says).

    Raises:
        BitDanceError: a file is damaged, adapters do not fit, or the folder cannot be written.
    """
    source = open_source(folder, None)
    changes = AdapterChanges(adapters, source.network, source.condition.vocab_size, str(folder))
    found = fingerprint(
        source.network,
        source.condition.vocab_size,
        lambda part, name, num_rows: source.parts[part].read_rows(name, 0, num_rows),
    )
    for adapter in adapters:
        check_base(adapter.source, found, str(folder))
    check_destination(out, is_forced=is_forced, num_bytes=source.num_bytes + source.autoencoder.num_bytes)
    facts = merged_facts(source, adapters, options or ShareOptions())
    with conversion_folder(out) as writing:
        for name in source.layout.folders:
            (writing / name).mkdir()
        digests = {part: _write_part(source, part, changes, writing, on_bytes) for part in Part}
        for path in _beside_weights(folder, source.layout):
            if not (writing / path).exists():
                shutil.copyfile(folder / path, writing / path)
        for part in Part:
            read_back(writing, part, source.layout, digests[part], on_bytes)
        write_card(writing, facts)
        write_conversion_report(
            writing,
            {
                "source": str(folder),
                "adapters": changes.described(),
                "layout": source.layout.name,
                "autoencoder_sha256": file_digest(writing / source.layout.autoencoder),
                "version": bitdance_scale.__version__,
                "reloaded": "every tensor, by the SHA-256 of what was written",
                "tensor_sha256": {part.value: names for part, names in digests.items()},
            },
        )
    return source.num_bytes, facts


def _write_part(source: Source, part: Part, changes: AdapterChanges, out: Path, on_bytes: OnBytes) -> dict[str, str]:
    """Writes the files of a part under their names; returns name -> SHA-256 of each tensor."""
    tensors = source.parts[part]
    assert isinstance(tensors, PublishedTensors), "a folder has no pickles"
    files: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in tensors.stored.items():
        files.setdefault(str(tensors.file(name).relative_to(source.path)), {})[name] = spec
    digests: dict[str, str] = {}
    for file, specs in files.items():
        with TensorFileWriter(out / file, specs) as writer:
            for name, spec in specs.items():
                # The copy of a tied table.
                is_copy = source.network.model.tie_embeddings and name == PUBLISHED_OUTPUT
                changed = PUBLISHED_EMBEDDING if is_copy else name
                read = tensors.rows_of(name)
                if changes.touches(part, changed):
                    chunks = changes.blocks(part, changed, read)
                else:
                    row_bytes = spec.num_bytes // max(1, spec.shape[0])
                    chunks = (read(start, stop) for start, stop in row_chunks(spec.shape[0], row_bytes))
                for values in chunks:
                    writer.write(name, values)
                    on_bytes(values.nbytes)
        digests |= writer.digests
    return digests


def _beside_weights(folder: Path, layout: PublishedLayout) -> Iterator[Path]:
    """The other files of a published folder: configurations, tokenizer. Card and licence are those of what is made."""
    for place in ("", *layout.folders):
        for path in sorted((folder / place).iterdir()):
            if path.is_file() and path.name not in (REPORT_NAME, CARD_NAME, SAMPLES_NAME, *LICENCE_FILES):
                yield path.relative_to(folder)


def _check_bases(adapters: Sequence[WeightedAdapter], base: FrozenBase, export: Export) -> None:
    """Whether adapters were trained beside the weights of a checkpoint."""
    if not adapters:
        return
    found = facts_of(base, *base_network(base, export.network)).fingerprint
    for adapter in adapters:
        check_base(adapter.source, found, str(base.path))


def _new_queries(adapters: RunAdapters) -> NewQueries:
    """Query tokens of a run that its base lacks, as the run began with them."""
    run, network = read_run_section(adapters.path), adapters.network
    old, num_old_rows = base_network(adapters.base, network)
    return NewQueries(
        num_old_rows=num_old_rows,
        num_trained=old.vision.block_tokens - 1,
        num_new=adapters.num_new_queries,
        rule=run["new_queries"],
        seed=run["seed"],
        init_std=network.model.init_std,
    )


class _GrownTensors(StoredTensors):
    """Frozen weights with rows of query tokens that they lack.

    Args:
        base: the weights.
        new_queries: the rows.
    """

    def __init__(self, base: FrozenBase, new_queries: NewQueries) -> None:
        super().__init__(base.path / TENSORS_DIR)
        self._new = new_queries
        self._prefix = start_prefix(base.path, self.index, base.weights)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As of stored tensors, and the rows that follow them."""
        table = next((table for table in (EMBEDDING, OUTPUT) if name.endswith("." + table)), None)
        first_new = self._new.num_old_rows
        if table is None or stop <= first_new:
            return super().read_rows(name, start, stop)
        parts = [super().read_rows(name, start, first_new)] if start < first_new else []
        trained = super().read_rows(self._prefix + table, first_new - self._new.num_trained, first_new)
        rows = self._new.rows(table, trained)[max(start - first_new, 0) : stop - first_new]
        return torch.cat([*parts, rows.to(self.dtype(name))])
