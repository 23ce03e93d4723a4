"""What each single setting may be: the range of a number, the choices of a word.

`rules.py` checks these first; it skips a rule over several settings when one of them is illegal by itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitdance_scale.config.benchmark_schema import RUN_BENCHMARKS, RUN_METRICS
from bitdance_scale.config.families import FAMILIES
from bitdance_scale.config.schema import MIN_SPIKE_WINDOW, SCHEDULES, SPIKE_ACTIONS, WEIGHTS
from bitdance_scale.config.training_stages import NEW_QUERIES, STAGES

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
        low, high: its ends; `high` may be infinite.
        is_low_open, is_high_open: whether that end itself is excluded.
    """

    low: float
    high: float = math.inf
    is_low_open: bool = False
    is_high_open: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        is_above = value > self.low if self.is_low_open else value >= self.low
        return is_above and (value < self.high if self.is_high_open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"greater than {self.low:g}" if self.is_low_open else f"at least {self.low:g}"
        return f"in {'(' if self.is_low_open else '['}{self.low:g}, {self.high:g}{')' if self.is_high_open else ']'}"


@dataclass(frozen=True)
class Choice:
    """A closed set of words or numbers."""

    values: tuple[str | int, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "one of " + ", ".join(str(value) for value in self.values)


@dataclass(frozen=True)
class NonEmpty:
    """A string or list with something in it; a string of blanks is empty."""

    def __contains__(self, value: object) -> bool:
        return bool(value.strip() if isinstance(value, str) else value)

    def __str__(self) -> str:
        return "not empty"


@dataclass(frozen=True)
class FolderName:
    """A plain name on one line: no separators, control characters or blanks around it, and neither `.` nor `..`."""

    def __contains__(self, value: object) -> bool:
        is_name = isinstance(value, str) and value == value.strip() and value not in ("", ".", "..")
        return is_name and not set(str(value)) & set("/\\") and str(value).isprintable()

    def __str__(self) -> str:
        return "a plain folder name, without separators, line breaks or other control characters"


@dataclass(frozen=True)
class Identifier:
    """A short name of ASCII letters, digits and underscores that does not begin with a digit."""

    def __contains__(self, value: object) -> bool:
        is_identifier = isinstance(value, str) and value.isascii() and value.isidentifier()
        return is_identifier and len(str(value)) <= _LONGEST_IDENTIFIER

    def __str__(self) -> str:
        return f"a name of at most {_LONGEST_IDENTIFIER} letters, digits and underscores that begins with no digit"


@dataclass(frozen=True)
class Split:
    """How layers are divided among stages: a word, or a list with the layers of every stage."""

    def __contains__(self, value: object) -> bool:
        return value in ("auto", "even") if isinstance(value, str) else bool(value)

    def __str__(self) -> str:
        return "auto, even or a list with the number of layers of every stage"


Constraint = Range | Choice | NonEmpty | FolderName | Identifier | Split

_LONGEST_IDENTIFIER = 40
_COUNT = Range(1)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, is_low_open=True)
_PROBABILITY = Range(0, 1)
_DECAY = Range(0, 1, is_high_open=True)
# A seed shares a 64-bit key of the counter-based noise with the step (`sequence/noise.py`).
_SEED = Range(0, 2**31, is_high_open=True)
_EPOCH = _SEED

CONSTRAINTS: Mapping[str, Constraint] = {
    "run.name": FolderName(),
    "run.root": NonEmpty(),
    "run.seed": _SEED,
    "run.steps": _COUNT,
    "run.stage": Choice(tuple(STAGES)),
    "run.start_weights": Choice(WEIGHTS),
    "run.new_queries": Choice(NEW_QUERIES),
    "run.timeout_s": _NOT_NEGATIVE,
    "run.long_timeout_s": _POSITIVE,
    "run.dtype": Choice(("float32", "bfloat16")),
    "model.family": Choice(tuple(FAMILIES)),
    "model.num_layers": _COUNT,
    "model.hidden_size": _COUNT,
    "model.num_heads": _COUNT,
    "model.num_kv_heads": _COUNT,
    "model.head_dim": _COUNT,
    "model.ffn_size": _COUNT,
    "model.norm_eps": _POSITIVE,
    "model.rope_base": Range(1, is_low_open=True),
    "model.init_std": _POSITIVE,
    "model.mask": Choice(("block", "causal")),
    "model.attention": Choice(("auto", "flex", "dense")),
    "head.kind": Choice(("diffusion", "bitwise", "token")),
    "head.width": _COUNT,
    "head.num_blocks": _COUNT,
    "head.num_adaln": _COUNT,
    "head.head_dim": _COUNT,
    "head.mlp_ratio": _POSITIVE,
    "head.diff_batch_mul": _COUNT,
    "head.time_schedule": Choice(("logit_normal", "uniform")),
    "head.time_std": _POSITIVE,
    "head.time_shift": _POSITIVE,
    "vision.latents": Choice(("bits", "continuous")),
    "vision.weights": NonEmpty(),
    "vision.num_bits": _COUNT,
    "vision.channels": _COUNT,
    "vision.channel_mult": NonEmpty(),
    "vision.channel_mult[]": _COUNT,
    "vision.num_res_blocks": _COUNT,
    "vision.norm_groups": _COUNT,
    "vision.precision": Choice(("float32", "tf32")),
    "vision.block_side": _COUNT,
    "vision.order": Choice(("block", "raster")),
    "vision.context": Choice(("plain", "queries")),
    "vision.flip_max": _PROBABILITY,
    "text.kind": Choice(("huggingface", "sentencepiece")),
    "text.max_caption_tokens": _COUNT,
    "classes.num_classes": _NOT_NEGATIVE,
    "classes.num_tokens": _COUNT,
    "classes.grid[]": _COUNT,
    "data.shards[]": NonEmpty(),
    "data.sources[].name": Identifier(),
    "data.sources[].shards": NonEmpty(),
    "data.sources[].shards[]": NonEmpty(),
    "data.sources[].share": _NOT_NEGATIVE,
    "data.captions": NonEmpty(),
    "data.captions[].source": NonEmpty(),
    "data.captions[].share": _COUNT,
    "data.mode": Choice(("indexed", "stream")),
    "data.stream_buffer": _COUNT,
    "data.stream_resume": Choice(("restart", "skip")),
    "data.filters[].column": NonEmpty(),
    "data.filters[].missing": Choice(("drop", "keep")),
    "data.global_batch": _COUNT,
    "data.resolutions": NonEmpty(),
    "data.resolutions[].side_px": _COUNT,
    "data.resolutions[].share": _COUNT,
    "data.resolutions[].buckets_px": NonEmpty(),
    "data.resolutions[].buckets_px[]": _COUNT,
    "data.max_upscale": _POSITIVE,
    "data.resize": Choice(("sharp", "fast", "adm")),
    "data.augment.flip": _PROBABILITY,
    "data.augment.crop": _PROBABILITY,
    "data.augment.crop_zoom": Range(1, 4),
    "data.augment.crop_until_epoch": _EPOCH,
    "data.augment.crop_ends_epoch": _EPOCH,
    "data.augment.bits_crops": Range(1, 1000),
    "data.max_pack_tokens": _COUNT,
    "data.pack_multiple": _COUNT,
    "data.text_drop": _PROBABILITY,
    # At 1 no image would be a target and the flow loss would be a mean over nothing.
    "data.image_to_text_share": Range(0, 1, is_high_open=True),
    "data.max_skipped_share": _PROBABILITY,
    "data.read_threads": _COUNT,
    "data.prefetch_steps": _COUNT,
    "data.s3.read_timeout_s": _POSITIVE,
    "data.s3.deadline_s": _POSITIVE,
    "data.s3.cache_gb": _POSITIVE,
    "data.s3.cache_block_mb": _COUNT,
    "parallel.tensor": _COUNT,
    "parallel.pipeline": _COUNT,
    "parallel.virtual_stages": _COUNT,
    "parallel.pipeline_split": Split(),
    "parallel.pipeline_split[]": _COUNT,
    "parallel.optimizer": Choice(("deepspeed", "megatron")),
    "parallel.zero_stage": Choice((1, 2, 3)),
    "parallel.reduce_dtype": Choice(("float32", "bfloat16")),
    "parallel.reduce_bucket_elements": _COUNT,
    "parallel.prefetch_elements": _NOT_NEGATIVE,
    "parallel.live_elements": _NOT_NEGATIVE,
    "parallel.persistent_elements": _NOT_NEGATIVE,
    "parallel.recompute": Choice(("none", "selective", "full")),
    "lora.rank": _NOT_NEGATIVE,
    "lora.alpha": _POSITIVE,
    "lora.dropout": _DECAY,
    "lora.base_bits": Choice((4, 8, 16)),
    "lora.targets": NonEmpty(),
    "lora.targets[]": NonEmpty(),
    "optim.lr": _POSITIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.schedule": Choice(SCHEDULES),
    "optim.lr_min": _NOT_NEGATIVE,
    "optim.decay_steps": _NOT_NEGATIVE,
    "optim.beta1": _DECAY,
    "optim.beta2": _DECAY,
    # AdamW divides in float32, whose smallest normal number this is: a smaller epsilon would count as 0.
    "optim.eps": Range(2.0**-126),
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.decay_exempt[]": NonEmpty(),
    "optim.average_decay": _DECAY,
    "optim.clip_norm": _NOT_NEGATIVE,
    "optim.max_skipped_steps": _COUNT,
    "optim.max_skipped_share": Range(0, 1, is_low_open=True),
    "optim.skipped_window": _COUNT,
    "optim.spike_deviations": _NOT_NEGATIVE,
    "optim.spike_window": Range(MIN_SPIKE_WINDOW),
    "optim.spike_action": Choice(SPIKE_ACTIONS),
    "loss.vision_weight": _POSITIVE,
    "loss.text_weight": _NOT_NEGATIVE,
    "checkpoint.every_steps": _COUNT,
    "checkpoint.keep": _COUNT,
    "checkpoint.keep_every_steps": _NOT_NEGATIVE,
    "checkpoint.upload_keep": _NOT_NEGATIVE,
    "checkpoint.upload_mb_per_s": _NOT_NEGATIVE,
    "evaluate.shards[]": NonEmpty(),
    "evaluate.every_steps": _COUNT,
    "evaluate.images": _COUNT,
    "evaluate.seed": _SEED,
    "evaluate.weights": Choice(WEIGHTS),
    "evaluate.benchmarks[].benchmark": Choice(RUN_BENCHMARKS),
    "evaluate.benchmarks[].metrics": NonEmpty(),
    "evaluate.benchmarks[].metrics[]": Choice(tuple(RUN_METRICS)),
    "evaluate.benchmarks[].every_steps": _COUNT,
    "evaluate.benchmarks[].categories[]": NonEmpty(),
    "evaluate.benchmarks[].num_prompts": _NOT_NEGATIVE,
    "evaluate.benchmarks[].num_images": _COUNT,
    "evaluate.benchmarks[].batch_size": _COUNT,
    "evaluate.benchmarks[].size_px[]": _NOT_NEGATIVE,
    "evaluate.benchmarks[].num_steps": _NOT_NEGATIVE,
    "evaluate.benchmarks[].guidance": _NOT_NEGATIVE,
    "evaluate.benchmarks[].seed": _SEED,
    "evaluate.benchmarks[].weights": Choice(WEIGHTS),
    "sample.every_steps": _NOT_NEGATIVE,
    "sample.prompts[]": NonEmpty(),
    "sample.size_px[]": _COUNT,
    "sample.num_steps": _COUNT,
    "sample.guidance": _NOT_NEGATIVE,
    "sample.guidance_growth": Choice(("constant", "linear")),
    "sample.sampler": Choice(("euler_maruyama", "euler")),
    "sample.seed": _SEED,
    "sample.weights": Choice(WEIGHTS),
    "observe.log_every_steps": _COUNT,
    "observe.wandb_project": NonEmpty(),
    "observe.wandb_mode": Choice(("auto", "online", "offline", "disabled")),
    "observe.profile_steps[]": _COUNT,
    "observe.profile_ranks[]": _NOT_NEGATIVE,
}
"""Setting -> what it may be; `[]` is every item of a list."""


def demand(constraint: Constraint) -> str:
    """What a value must be, as the predicate of a sentence."""
    return "must not be empty" if isinstance(constraint, NonEmpty) else f"must be {constraint}"


def range_violations(config: DataclassInstance, constraints: Mapping[str, Constraint] = CONSTRAINTS) -> dict[str, str]:
    """Setting -> message, for every setting of a tree that is illegal by itself.

    The key names the offending value (`data.resolutions[1].share`), the message states value, rule and fix.
    """
    violations: dict[str, str] = {}
    for path, pattern, value in _values(config, "", ""):
        constraint = constraints.get(pattern)
        if constraint is not None and value not in constraint:
            violations[path] = f"{path} = {value!r}: {demand(constraint)}{_nearest(value, constraint)}"
    return violations


def _values(value: object, path: str, pattern: str) -> Iterator[tuple[str, str, object]]:
    """(path, pattern in CONSTRAINTS, value) of everything in the tree; tuples of tuples share one `[]`."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            dot = "." if path else ""
            yield from _values(getattr(value, field.name), f"{path}{dot}{field.name}", f"{pattern}{dot}{field.name}")
        return
    yield path, pattern, value
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            nested = pattern if pattern.endswith("[]") else f"{pattern}[]"
            if isinstance(item, tuple):
                yield from ((f"{path}[{index}][{inner}]", nested, number) for inner, number in enumerate(item))
            else:
                yield from _values(item, f"{path}[{index}]", nested)


def _nearest(value: object, constraint: Constraint) -> str:
    """What to write instead, where that is clear."""
    if isinstance(constraint, Choice) and isinstance(value, str):
        nearest = difflib.get_close_matches(value.lower(), [str(choice) for choice in constraint.values], n=1)
        return f"; did you mean {nearest[0]!r}?" if nearest else ""
    if isinstance(constraint, Range) and isinstance(value, int | float):
        if constraint.low in constraint and value < constraint.low:
            return f"; the smallest legal value is {constraint.low:g}"
        if constraint.high in constraint and value > constraint.high:
            return f"; the largest legal value is {constraint.high:g}"
    return ""
