"""What a change of a setting means to a run that goes on from its own checkpoint, for every setting of both trees.

The configuration of a checkpoint is compared with the one that is to go on with it. What is decided by content, not by
the words of a setting, is compared where the content is known, and here only named.
"""

from __future__ import annotations

import dataclasses
import enum
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bitdance_scale.config.coerce import field_types, is_schema, toml_value
from bitdance_scale.config.kinds import AnyConfig
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.renames import EARLIER_VALUES


class Effect(enum.Enum):
    """What another value does to a run that goes on."""

    FREE = "free"
    """Nothing to what is trained: places, logs, layout, speed."""
    TOLD = "told"
    """What is trained changes from here on, as somebody may want: it is said."""
    FIXED = "fixed"
    """The network or the run would be another: refused."""
    BY_CONTENT = "by content"
    """Refused if the content behind it is another: `data/loader_state.py` and the job's own digest compare the data
    set and its order, `checkpoint/run_checkpoint.py` the two tokenizers, `train/class_names.py` the class map."""


_LONGEST_SHOWN = 80
_FREE, _TOLD, _FIXED, _BY_CONTENT = Effect.FREE, Effect.TOLD, Effect.FIXED, Effect.BY_CONTENT

_SHARED: dict[str, Effect] = {
    "run.name": _FREE,
    "run.root": _FREE,
    "run.seed": _BY_CONTENT,
    "run.timeout_s": _FREE,
    "run.long_timeout_s": _FREE,
    "checkpoint.*": _FREE,
    "observe.*": _FREE,
    "optim.*": _TOLD,
    "optim.max_skipped_steps": _FREE,
    # What is measured becomes another number.
    "evaluate.*": _TOLD,
    "evaluate.every_steps": _FREE,
    "data.index_dir": _FREE,
    "data.max_skipped_share": _FREE,
    "data.read_threads": _FREE,
    "data.shards": _BY_CONTENT,
}
"""Settings that both kinds of runs have. `section.*` is every setting of the section that is not named."""

EFFECTS: Mapping[str, Effect] = _SHARED | {
    # Told where the learning rate depends on it.
    "run.steps": _FREE,
    # Of the stored weights; there are masters in one of them only.
    "run.dtype": _FIXED,
    "run.stage": _FIXED,
    # A run that goes on has started.
    "run.start_from": _FREE,
    "run.start_from_any": _FREE,
    "run.start_weights": _FREE,
    "run.new_queries": _FREE,
    # The settings that it fills in are compared themselves.
    "model.preset": _FREE,
    "model.family": _FIXED,
    "model.num_layers": _FIXED,
    "model.hidden_size": _FIXED,
    "model.num_heads": _FIXED,
    "model.num_kv_heads": _FIXED,
    "model.head_dim": _FIXED,
    "model.ffn_size": _FIXED,
    "model.norm_eps": _FIXED,
    "model.rope_base": _FIXED,
    "model.tie_embeddings": _FIXED,
    "model.init_std": _FREE,
    "model.mask": _FIXED,
    "model.attention": _FREE,
    "head.kind": _FIXED,
    "head.width": _FIXED,
    "head.num_blocks": _FIXED,
    "head.num_adaln": _FIXED,
    "head.head_dim": _FIXED,
    "head.mlp_ratio": _FIXED,
    "head.diff_batch_mul": _TOLD,
    "head.time_schedule": _TOLD,
    "head.time_mean": _TOLD,
    "head.time_std": _TOLD,
    "head.time_shift": _TOLD,
    "vision.latents": _FIXED,
    "vision.weights": _BY_CONTENT,
    "vision.num_bits": _FIXED,
    "vision.channels": _FIXED,
    "vision.channel_mult": _FIXED,
    "vision.num_res_blocks": _FIXED,
    "vision.norm_groups": _FIXED,
    "vision.gan_decoder": _FIXED,
    "vision.precision": _TOLD,
    "vision.block_side": _FIXED,
    "vision.order": _FIXED,
    # Free where no image is the context of a caption.
    "vision.context": _FIXED,
    "vision.flip_max": _TOLD,
    "text.kind": _BY_CONTENT,
    "text.path": _BY_CONTENT,
    "text.max_caption_tokens": _TOLD,
    "classes.num_classes": _FIXED,
    "classes.map": _BY_CONTENT,
    "classes.num_tokens": _FIXED,
    "classes.grid": _FIXED,
    "data.sources": _BY_CONTENT,
    "data.has_borders": _BY_CONTENT,
    "data.captions": _BY_CONTENT,
    "data.filters": _BY_CONTENT,
    "data.mode": _BY_CONTENT,
    # Which samples come next changes, not what they are.
    "data.stream_resampled": _TOLD,
    "data.stream_buffer": _TOLD,
    "data.stream_resume": _FREE,
    "data.bits_dir": _FREE,
    "data.global_batch": _BY_CONTENT,
    "data.resolutions": _BY_CONTENT,
    "data.max_upscale": _BY_CONTENT,
    "data.resize": _TOLD,
    "data.augment.*": _TOLD,
    # Losses are sums over the global batch: how its samples are packed does not matter.
    "data.max_pack_tokens": _FREE,
    "data.pack_multiple": _FREE,
    "data.text_drop": _TOLD,
    "data.image_to_text_share": _TOLD,
    "data.prefetch_steps": _FREE,
    "data.s3.*": _FREE,
    "parallel.*": _FREE,
    "parallel.reduce_dtype": _TOLD,
    "lora.*": _FIXED,
    "lora.dropout": _TOLD,
    "lora.base_bits": _TOLD,
    # A run that goes on has started.
    "lora.start_from": _FREE,
    "loss.*": _TOLD,
    # Pictures show the run and do not change it.
    "sample.*": _FREE,
}
"""Setting of text-to-image training -> what another value does to a run that goes on."""

TOKENIZER_EFFECTS: Mapping[str, Effect] = _SHARED | {
    "run.output": _FREE,
    "run.output_weights": _FREE,
    "run.output_dtype": _FREE,
    # Of the computation; the weights are float32.
    "run.dtype": _TOLD,
    # Told where the learning rate depends on it.
    "run.steps": _FREE,
    # A run that goes on has started.
    "run.start_from": _FREE,
    "run.trains": _FIXED,
    "autoencoder.*": _FIXED,
    "quantiser.*": _TOLD,
    "reconstruction.*": _TOLD,
    "adversarial.*": _TOLD,
    "adversarial.channels": _FIXED,
    "adversarial.num_layers": _FIXED,
    "parallel.*": _FREE,
    "data.sizes_px": _BY_CONTENT,
    "data.images_px": _BY_CONTENT,
    "data.max_zoom": _BY_CONTENT,
}
"""The same of the training of the visual tokenizer."""

_LOSS_SECTIONS = frozenset(
    {"loss", "head", "vision", "text", "data", "lora", "reconstruction", "quantiser", "adversarial"}
)
"""Sections of what the loss is, and of what it is a loss on. The others say how steps are taken and measured."""


@dataclass(frozen=True)
class Change:
    """A setting that has another value than in the run's checkpoint.

    Attributes:
        setting: `section.key`.
        old: its value in the checkpoint, as TOML gives it.
        new: its value now, likewise.
        effect: what that does.
    """

    setting: str
    old: Any
    new: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.setting} {_shown(self.old)} -> {_shown(self.new)}"


def effect_of(setting: str, effects: Mapping[str, Effect]) -> Effect:
    """What another value of a setting does; a table of `EFFECTS`' form has every setting.

    Raises:
        KeyError: it has not.
    """
    return effects[setting] if setting in effects else effects[f"{setting.rpartition('.')[0]}.*"]


def changes(old_text: str, config: AnyConfig) -> list[Change]:
    """Settings whose values differ between a checkpoint's configuration and the one that is to go on with it.

    A setting that the checkpoint's version did not have, or did not write, had the value of today's default, or of
    `EARLIER_VALUES`; so had one of a row. A section that it lacks as a whole says nothing: an imported release has no
    run.

    Args:
        old_text: configuration of the checkpoint, as TOML.
        config: the resolved tree of today.

    Raises:
        ValueError: the text is no TOML.
    """
    effects = EFFECTS if isinstance(config, RunConfig) else TOKENIZER_EFFECTS
    tables = tomllib.loads(old_text)
    if "steps" not in tables.get("run", {}):
        tables.pop("run", None)
    old, rows = dict(_leaves(tables)), dict(_row_schemas(type(config)))
    found = []
    for setting, value, default in settings(config):
        before = old.get(setting, EARLIER_VALUES.get(setting, default))
        if setting in rows and isinstance(before, list):
            before = [_defaults(rows[setting]) | row if isinstance(row, dict) else row for row in before]
        if setting.partition(".")[0] not in tables or before is dataclasses.MISSING or before == value:
            continue
        effect = effect_of(setting, effects)
        if setting == "run.steps" and _rate_depends_on_steps(tables, config):
            effect = Effect.TOLD
        if setting == "vision.context" and not _describes_images(tables):
            effect = Effect.FREE
        found.append(Change(setting, before, value, effect))
    return found


def changes_losses(found: Iterable[Change]) -> bool:
    """Whether losses and gradients after these changes may be of another scale than those before."""
    return any(change.effect is Effect.TOLD and change.setting.partition(".")[0] in _LOSS_SECTIONS for change in found)


def settings(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(`section.key`, value, default) of every setting of a tree, as TOML would give them.

    Tuples are lists, and rows of a list of tables are dictionaries. A setting without a default has
    `dataclasses.MISSING`.
    """
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", _plain(value), _plain(field.default)


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _row_schemas(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    """(`section.key`, schema of a row) of every setting that is a list of tables."""
    for name, hint in field_types(schema).items():
        if is_schema(hint):
            yield from _row_schemas(hint, f"{prefix}{name}.")
        for item in typing.get_args(hint):
            if is_schema(item):
                yield f"{prefix}{name}", item


def _defaults(schema: type[Any]) -> dict[str, Any]:
    fields = dataclasses.fields(schema)
    return {field.name: _plain(field.default) for field in fields if field.default is not dataclasses.MISSING}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _shown(value: Any) -> str:
    """A plain value as TOML on one line, cut where it is long."""
    if isinstance(value, dict):
        text = "{ " + ", ".join(f"{key} = {_shown(item)}" for key, item in value.items()) + " }"
    elif isinstance(value, list):
        text = "[" + ", ".join(map(_shown, value)) + "]"
    else:
        text = toml_value(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def _describes_images(old: Mapping[str, Any]) -> bool:
    """Whether images have been the context of captions so far."""
    return bool(old.get("data", {}).get("image_to_text_share", 0))


def _rate_depends_on_steps(old: Mapping[str, Any], config: AnyConfig) -> bool:
    """Whether the learning rate of a step depends on `run.steps`, before or now."""
    before = old.get("optim", {})
    schedules = (config.optim.schedule, before.get("schedule", type(config.optim).schedule))
    falls = any(schedule != "constant" for schedule in schedules)
    return bool(falls or config.optim.decay_steps or before.get("decay_steps"))
