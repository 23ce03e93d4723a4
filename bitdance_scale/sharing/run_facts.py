"""What the files of a run say of it, as tables of a model card: data, settings, counts, losses, scores.

Settings are read as they were stored with the checkpoint, by name, so that a configuration of an earlier version is
read too. What is missing there is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdance_scale.credentials import hide_credentials
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.evaluation.metrics.catalogue import find_metric
from bitdance_scale.evaluation.metrics.estimate import estimates
from bitdance_scale.evaluation.metrics.score_file import Scores, read_scores
from bitdance_scale.observe.benchmark_scores import OVERALL, BenchmarkScores, read_scores_of_run
from bitdance_scale.observe.metrics import (
    EVALUATION_FILE,
    METRICS_FILE,
    StepRecord,
    read_evaluations,
    read_metrics,
)
from bitdance_scale.observe.sample_grids import samples_path
from bitdance_scale.sharing.card import Row, Table

SCORE_HEADER = ("benchmark", "metric", "value", "95 % interval", "images", "of")
INTERVALS = (
    "Intervals hold 95 of 100 values over other prompts of the same kind (a bootstrap over prompts). They do not cover "
    "other seeds or another scorer."
)
# Data on the hub, by its addresses there.
_HUB_DATA = re.compile(r"(?:hf://datasets/|https?://huggingface\.co/datasets/)([\w.-]+/[\w.-]+)")
_MAX_PROMPTS = 64


@dataclass(frozen=True)
class RunCounts:
    """How far a run was at a checkpoint.

    Attributes:
        step: optimiser steps taken.
        num_steps: of the whole run.
        images: seen.
        tokens: positions seen, padding left out.
        images_by_resolution: images seen by resolution (`side_px`).
        skipped_samples: samples that could not be read.
    """

    step: int
    num_steps: int
    images: int
    tokens: int
    images_by_resolution: Mapping[str, int] = field(default_factory=dict)
    skipped_samples: int = 0


def run_tables(config: Mapping[str, Any], counts: RunCounts, folder: Path | None) -> list[Table]:
    """The tables of a run.

    Args:
        config: its stored configuration, as TOML tables.
        counts: how far it was.
        folder: of the run; None: its files are not at hand.

    Raises:
        DataError: a file of the run is damaged.
    """
    tables = [Table("Training", ("setting", "value"), tuple(_training_rows(config, counts)))]
    if data := config.get("data"):
        tables.insert(0, Table("Data", ("setting", "value"), tuple(_data_rows(data)), _DATA_NOTE))
    losses = [*_loss_rows(folder, counts.step)] if folder is not None else []
    if losses:
        tables.append(Table("Losses", ("loss", "value", "after step"), tuple(losses), _LOSS_NOTE))
    return tables


_DATA_NOTE = "Sources are as the run was configured. Their licences and contents are not known to the program."
_LOSS_NOTE = (
    "The held-out losses are over flow times spread evenly over 0 to 1, those of training over the times that it "
    "draws: compare each with its own kind."
)


def hub_datasets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Ids of the data that the configuration names by an address on Hugging Face."""
    data = config.get("data", {})
    addresses = [
        *data.get("shards", []),
        *(shard for source in data.get("sources", []) for shard in source.get("shards", [])),
    ]
    found = (_HUB_DATA.search(hide_credentials(str(address))) for address in addresses)
    return tuple(dict.fromkeys(match[1] for match in found if match is not None))


def find_samples(config: Mapping[str, Any], folder: Path | None, step: int) -> tuple[Path | None, tuple[str, ...]]:
    """(the pictures that the run drew at this step, their prompts); None and nothing if there are none."""
    path = samples_path(folder, step) if folder is not None else None
    if path is None or not path.is_file():
        return None, ()
    prompts = config.get("sample", {}).get("prompts", [])
    return path, tuple(map(str, prompts[:_MAX_PROMPTS]))


def score_table(config: Mapping[str, Any], folder: Path | None, step: int, files: Sequence[Path]) -> Table | None:
    """The scores of a run at a step, or at the last one before it that was scored, and those of files.

    Args:
        config: the run's stored configuration, as TOML tables.
        folder: of the run; None: its files are not at hand.
        step: of the checkpoint.
        files: scores/METRIC.json of drawings.

    Raises:
        ConfigError: a file is of a metric that is not known.
        DataError: a file is missing or damaged.
    """
    rows: list[tuple[str, ...]] = []
    drawn_with = {
        section.get("name") or section.get("benchmark"): section.get("weights", "")
        for section in config.get("evaluate", {}).get("benchmarks", [])
    }
    for scores in _last_scores(folder, step):
        weights = drawn_with.get(scores.benchmark, "")
        rows += _rows_of_line(scores, f"this run, step {scores.step:,}" + (f", {weights} weights" if weights else ""))
    for file in files:
        rows += _rows_of_file(file, read_scores(file))
    return Table("Scores", SCORE_HEADER, tuple(rows), INTERVALS) if rows else None


def _data_rows(data: Mapping[str, Any]) -> Iterator[Row]:
    sources = data.get("sources") or [{"name": "", "share": 1, "shards": data.get("shards", [])}]
    total = sum(source.get("share", 1) for source in sources)
    for source in sources:
        name = source.get("name") or "source"
        share = f", {source.get('share', 1)} of {total} parts" if len(sources) > 1 else ""
        yield f"{name}{share}", ", ".join(hide_credentials(str(shard)) for shard in source.get("shards", []))
    if captions := data.get("captions"):
        yield "captions", ", ".join(f"{choice.get('source')} (share {choice.get('share', 1)})" for choice in captions)
    for rule in data.get("filters", []):
        limits = [f"{name} {rule[name]:g}" for name in ("min", "max") if math.isfinite(rule.get(name, math.inf))]
        yield "filter", f"{rule.get('column')}: {', '.join(limits)}"
    for resolution in data.get("resolutions", []):
        sizes = ", ".join(f"{height} x {width}" for height, width in resolution.get("buckets_px", []))
        share = f"share {resolution.get('share')}; {sizes} px (height x width)"
        yield f"resolution {resolution.get('side_px')} px", share
    if "text_drop" in data:
        yield "captions left out", f"{data['text_drop']:g} of the samples (guidance)"
    if data.get("image_to_text_share"):
        yield "trained as captions of images", f"{data['image_to_text_share']:g} of the samples"


def _training_rows(config: Mapping[str, Any], counts: RunCounts) -> Iterator[Row]:
    run, data, optim = (config.get(name, {}) for name in ("run", "data", "optim"))
    yield "stage", run.get("stage", "pt")
    yield "optimiser steps", f"{counts.step:,} of {counts.num_steps:,}"
    yield "images seen", f"{counts.images:,}"
    if by_resolution := counts.images_by_resolution:
        yield "images seen by resolution", ", ".join(f"{side} px {n:,}" for side, n in by_resolution.items())
    yield "positions seen", f"{counts.tokens:,} (text and vision tokens, no padding)"
    yield "samples that could not be read", f"{counts.skipped_samples:,}"
    if "global_batch" in data:
        per_step = f", {counts.tokens / counts.step:,.0f} positions on average" if counts.step else ""
        yield "batch", f"{data['global_batch']:,} images{per_step}"
    yield from _named_rows(
        optim,
        {
            "lr": "learning rate",
            "schedule": "schedule",
            "warmup_steps": "warm-up steps",
            "weight_decay": "weight decay",
            "clip_norm": "gradient norm clipped at",
            "average_decay": "decay of averaged weights",
        },
    )
    lora = config.get("lora", {})
    if lora.get("rank"):
        yield from _named_rows(
            lora,
            {
                "rank": "rank of the adapters",
                "alpha": "alpha of the adapters",
                "dropout": "inputs dropped before the adapters",
                "base_bits": "bits of the frozen linears",
            },
        )
        yield "adapted linears", ", ".join(lora.get("targets", []))
    if {"beta1", "beta2", "eps"} <= optim.keys():
        yield "AdamW", f"betas {optim['beta1']:g} and {optim['beta2']:g}, eps {optim['eps']:g}"
    yield from _named_rows(
        config.get("loss", {}), {"vision_weight": "weight of the flow loss", "text_weight": "weight of cross-entropy"}
    )
    parallel = config.get("parallel", {})
    yield from _named_rows(run, {"dtype": "weights and activations in"})
    yield from _named_rows(
        parallel,
        {
            "reduce_dtype": "gradients reduced in",
            "tensor": "tensor-parallel ranks",
            "pipeline": "pipeline stages",
            "optimizer": "optimiser of",
            "zero_stage": "ZeRO stage",
        },
    )
    yield from _named_rows(run, {"seed": "seed"})


def _named_rows(section: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[Row]:
    for key, name in names.items():
        if key in section:
            value = section[key]
            yield name, f"{value:g}" if isinstance(value, float) else str(value)


def _loss_rows(folder: Path, step: int) -> Iterator[tuple[str, str, str]]:
    metrics, evaluations = folder / METRICS_FILE, folder / EVALUATION_FILE
    if metrics.is_file() and (line := _last_until(read_metrics(metrics), step)):
        yield "training, flow", f"{line.loss_vision:.4f}", f"{line.step:,}"
        yield "training, text (nats)", f"{line.loss_text:.4f}", f"{line.step:,}"
    if evaluations.is_file() and (held_out := _last_until(read_evaluations(evaluations), step)):
        yield "held out, flow", f"{held_out.vision:.4f}", f"{held_out.step:,}"
        yield "held out, text (nats)", f"{held_out.text:.4f}", f"{held_out.step:,}"


def _last_until(records: Iterable[Any], step: int) -> Any:
    """The last record up to a step; None if there is none."""
    return max((record for record in records if record.step <= step), key=_step_of, default=None)


def _step_of(record: StepRecord) -> int:
    return record.step


def _last_scores(folder: Path | None, step: int) -> list[BenchmarkScores]:
    """The last line up to a step of every benchmark and metric."""
    if folder is None:
        return []
    lines = [line for line in read_scores_of_run(folder) if line.step <= step]
    return [*{line.series: line for line in sorted(lines, key=_step_of)}.values()]


def _rows_of_line(scores: BenchmarkScores, of: str) -> Iterator[tuple[str, ...]]:
    scale = find_metric(scores.metric).scale
    for name, value in scores.values.items():
        interval = f"{_number(scores.low[name] * scale)} to {_number(scores.high[name] * scale)}"
        label = scores.metric if name == OVERALL else f"{scores.metric}, {name}"
        yield scores.benchmark, label, _number(value * scale), interval, str(scores.num_images), of


def _rows_of_file(file: Path, scores: Scores) -> Iterator[tuple[str, ...]]:
    try:
        metric = find_metric(scores.metric)
    except ConfigError as error:
        raise ConfigError(f"--scores {file}: {error}") from error
    benchmark, of = scores.benchmark or "own prompts", f"model {scores.model} ({file.name})"
    if not scores.images and not scores.figures:
        raise DataError(f"--scores {file}: holds no value; score the drawing again")
    found = estimates(scores.images, metric.combine) if scores.images else {}
    for name, estimate in found.items():
        value, low, high = (_number(x * metric.scale) for x in (estimate.value, estimate.low, estimate.high))
        label = metric.name if name == OVERALL else f"{metric.name}, {name}"
        yield benchmark, label, value, f"{low} to {high}", str(len(scores.images)), of
    for name, figure in scores.figures.items():
        yield benchmark, f"{metric.name}, {name}", _number(figure * metric.scale), "not known", "", of


def _number(value: float) -> str:
    """Two digits after the point of large values, four of those up to 1."""
    return f"{value:.2f}" if abs(value) > 1 else f"{value:.4f}"
