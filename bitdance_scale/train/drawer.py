"""Models that draw, found by their path: a published folder, with adapters or without, or the checkpoint of a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.checkpoint.run_checkpoint import TENSORS_DIR, has_averages
from bitdance_scale.checkpoint.start_weights import (
    WHERE_AVERAGES_ARE,
    model_checkpoint,
    refuse_published_options,
)
from bitdance_scale.checkpoint.stored_config import stored_config
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.config.class_map import ClassLabels
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.solving import Solving, drawing_config
from bitdance_scale.generate.block_decode import OnBlock
from bitdance_scale.generate.drawer import Batch, Drawer, ModelFacts
from bitdance_scale.generate.image_sizes import check_size, known_sizes
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.published_model import load_published, read_sections
from bitdance_scale.generate.sampler import FlowSolver
from bitdance_scale.generate.sampling_file import Sampling, read_sampling
from bitdance_scale.model.adapter_source import WeightedAdapter
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.condition import Condition, load_condition
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.sampling import BatchDrawer
from bitdance_scale.train.still_run import load_still_run


@dataclass(frozen=True)
class FoundModel:
    """A model that draws, which is not loaded yet.

    Attributes:
        facts: of it.
        sampling: with what it draws unless told.
        record: what its pictures say of where they come from.
        check: refuses a batch that it cannot draw, with a ConfigError, as far as can be seen without its weights.
        load: the model for as long as the block runs; BitDanceError: it is damaged, or its parts do not fit.
    """

    facts: ModelFacts
    sampling: Sampling
    record: Mapping[str, object]
    check: Callable[[Batch], None]
    load: Callable[[], AbstractContextManager[Drawer]]


class PublishedDrawer:
    """A published folder.

    Adapters are merged into the weights, so the folder is loaded again when a drawing wants other weights of them.

    Args:
        folder: as `bitdance export` or the release writes it.
        facts: of it, with the weights of its adapters at first.
        adapters: by name.
        dtype: of weights and activations; None: bfloat16 on CUDA, float32 elsewhere.
        device: None: CUDA where there is one.

    Raises:
        BitDanceError: the folder is missing, damaged or no published model, or adapters do not fit it.
    """

    def __init__(
        self,
        folder: Path,
        facts: ModelFacts,
        adapters: Mapping[str, WeightedAdapter],
        dtype: str | None,
        device: str | None,
    ) -> None:
        self.facts = facts
        self._folder, self._adapters, self._weights = folder, adapters, dict(facts.adapters)
        self._pipeline: BitDancePipeline | None = BitDancePipeline.from_pretrained(
            folder, getattr(torch, dtype) if dtype else None, device, self._weighted(self._weights)
        )
        model = self._pipeline.model
        self._dtype, self._device = model.backbone.dtype, model.backbone.device
        self.vision = model.vision

    def draw(self, batch: Batch, on_block: OnBlock) -> np.ndarray:
        """As in `Drawer`."""
        bits: np.ndarray = self._pipeline_with(batch.adapters)(
            batch.prompts,
            *batch.size_px,
            num_inference_steps=batch.steps,
            guidance_scale=batch.guidance,
            sampler=batch.sampler,
            generator=[torch.Generator().manual_seed(seed) for seed in batch.seeds],
            output_type="bits",
            on_block=on_block,
        ).images
        return bits

    def _pipeline_with(self, weights: Mapping[str, float]) -> BitDancePipeline:
        """The model with these weights of its adapters."""
        if self._pipeline is None or weights != self._weights:
            # The old weights are freed before the new ones are loaded.
            self._pipeline = None
            model = load_published(self._folder, self._dtype, self._device, self._weighted(weights))
            self._pipeline = BitDancePipeline(dataclasses.replace(model, vision=self.vision))
            self._weights = dict(weights)
        return self._pipeline

    def _weighted(self, weights: Mapping[str, float]) -> list[WeightedAdapter]:
        """The adapters that act."""
        return [
            dataclasses.replace(self._adapters[name], weight=weight) for name, weight in weights.items() if weight != 0
        ]


class RunDrawer:
    """A checkpoint of a run, or an import, on one rank.

    Args:
        config: of the run; its `sample` says which weights draw, and with which solver.
        checkpoint: where the weights are.
        facts: of it.
        topology: of a job of one rank.

    Raises:
        BitDanceError: the checkpoint does not fit, or has not the weights that are to draw.
    """

    def __init__(self, config: RunConfig, checkpoint: Path, facts: ModelFacts, topology: Topology) -> None:
        self.facts = facts
        self._config, self._topology = config, topology
        self._run = load_still_run(config, checkpoint, config.sample.weights, topology)
        self.vision = self._run.vision

    def draw(self, batch: Batch, on_block: OnBlock) -> torch.Tensor:
        """As in `Drawer`; a picture draws from the stream of noise of its seed, as benchmarks do."""
        config = _batch_config(self._config, batch)
        prompts = [self._run.condition.prompt_ids(prompt) for prompt in batch.prompts]
        drawer = BatchDrawer(self._run.model, config, self._run.condition, self._topology)
        return drawer.draw(prompts, batch.seeds, on_block)


def find_model(
    model: Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    adapters: Sequence[str] = (),
) -> FoundModel:
    """A model that draws, with all refused that can be before its weights are read.

    Args:
        model: published folder, run folder, checkpoint or import.
        dtype: of a published folder.
        device: of a published folder.
        overrides: `section.key=value`, of the others.
        config_name: configuration that gives an import the settings of a run.
        adapters: `FOLDER[=WEIGHT]` each, of a published folder.

    Raises:
        BitDanceError: there is no such model, it has no such options, or its configuration cannot be used.
    """
    checkpoint = model_checkpoint(model)
    if checkpoint is None:
        if overrides or config_name:
            raise ConfigError(
                f"MODEL {model}: is a published folder, which has no settings of a run; leave out "
                f"{(config_name and '--config') or overrides[0]}"
            )
        return _find_published(model, dtype, device, adapters)
    refuse_published_options(model, adapters, dtype, device)
    for override in overrides:
        if override.strip().startswith("parallel."):
            raise ConfigError(
                f"{override}: one process draws, whatever trained; leave it out, or draw under a layout with "
                "`bitdance evaluate draw`"
            )
    return _find_run(checkpoint, overrides, config_name)


def _find_published(folder: Path, dtype: str | None, device: str | None, adapters: Sequence[str]) -> FoundModel:
    section, own, opened = read_sections(folder).vision, read_sampling(folder), named_adapters(adapters)
    sampling, sizes_px = own or Sampling(), known_sizes(section)
    if own is not None:
        sizes_px = list(dict.fromkeys([own.size_px, *sizes_px]))
    facts = ModelFacts(
        folder.resolve().name,
        section,
        sizes_px,
        sampling.num_steps,
        sampling.guidance,
        sampling.sampler,
        adapters={name: adapter.weight for name, adapter in opened.items()},
    )

    def check(batch: Batch) -> None:
        FlowSolver(batch.steps, batch.guidance, batch.sampler)
        check_size(*batch.size_px, section)

    @contextlib.contextmanager
    def load() -> Iterator[Drawer]:
        yield PublishedDrawer(folder, facts, opened, dtype, device)

    record: dict[str, object] = {"folder": str(folder)}
    if adapters:
        record["adapters"] = [*adapters]
    return FoundModel(facts, sampling, record, check, load)


def _find_run(checkpoint: Path, overrides: Sequence[str], config_name: str | None) -> FoundModel:
    # One process draws, whatever trained.
    config = dataclasses.replace(stored_config(checkpoint, overrides, config_name), parallel=ParallelSection())
    has_text, sample = config.model.parts.has_text, config.sample
    FlowSolver(sample.num_steps, sample.guidance, sample.sampler)
    if sample.weights == "averaged" and not has_averages(read_index(checkpoint / TENSORS_DIR)):
        raise ConfigError(
            f"sample.weights = 'averaged': {checkpoint} has no averaged weights. {WHERE_AVERAGES_ARE}; set "
            "sample.weights=trained"
        )
    facts = ModelFacts(
        f"{config.run.name}, {checkpoint.name}",
        config.vision,
        _sizes_of_run(config),
        sample.num_steps,
        sample.guidance,
        sample.sampler,
        0 if has_text else config.classes.num_classes,
        () if has_text else ClassLabels(config.classes).names,
    )
    sampling = Sampling(facts.sizes_px[0], sample.num_steps, sample.guidance, sample.sampler, sample.prompts)

    def check(batch: Batch) -> None:
        FlowSolver(batch.steps, batch.guidance, batch.sampler)
        check_size(*batch.size_px, config.vision)
        _batch_config(config, batch)
        if not has_text:
            _check_classes(load_condition(config), batch.prompts, checkpoint)

    @contextlib.contextmanager
    def load() -> Iterator[Drawer]:
        with joined_ranks(config.parallel) as topology:
            yield RunDrawer(config, checkpoint, facts, topology)

    record: dict[str, object] = {
        "checkpoint": str(checkpoint),
        "weights": sample.weights,
        "guidance_growth": sample.guidance_growth,
    }
    if config_name is not None:
        record["config"] = config_name
    if overrides:
        record["overrides"] = [*overrides]
    return FoundModel(facts, sampling, record, check, load)


def _batch_config(config: RunConfig, batch: Batch) -> RunConfig:
    """The configuration of a run with which it draws a batch."""
    growth = config.sample.guidance_growth
    solving = Solving(batch.size_px, batch.steps, batch.guidance, batch.sampler, growth)
    return drawing_config(config, solving, config.sample.weights)


def _check_classes(condition: Condition, prompts: Sequence[str], checkpoint: Path) -> None:
    """Refuses prompts that are no classes of the model."""
    for prompt in dict.fromkeys(prompts):
        try:
            condition.prompt_ids(prompt)
        except ConfigError as error:
            raise ConfigError(f"MODEL {checkpoint}: draws classes, not prompts in words; {error}") from error


def named_adapters(texts: Sequence[str]) -> dict[str, WeightedAdapter]:
    """Adapters by the names of their folders; of several with one name, the later ones have a number behind it.

    Args:
        texts: `FOLDER[=WEIGHT]` each.

    Raises:
        BitDanceError: a weight is no number, or there are no adapters in a folder.
    """
    found: dict[str, WeightedAdapter] = {}
    for text, adapter in zip(texts, parse_adapters(texts), strict=True):
        path = Path(text) if Path(text).exists() else Path(text.rpartition("=")[0])
        name = path.resolve().name
        same = sum(other == name or other.startswith(f"{name} (") for other in found)
        found[name if not same else f"{name} ({same + 1})"] = adapter
    return found


def _sizes_of_run(config: RunConfig) -> list[tuple[int, int]]:
    """The sizes that a run trains at, in the order of their shares; first that of its samples."""
    if config.model.parts.head_cells == "learned":
        side = config.vision.downsample
        return [(config.classes.grid[0] * side, config.classes.grid[1] * side)]
    by_share = sorted(config.data.resolutions, key=lambda resolution: -resolution.share)
    buckets = [bucket for resolution in by_share for bucket in resolution.buckets_px]
    transposed = [size for height, width in buckets for size in ((height, width), (width, height))]
    return list(dict.fromkeys([config.sample.size_px, *transposed]))
