"""A trained model that draws for the page: a published folder, with adapters or without, or the checkpoint of a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from bitdance_scale.app.settings import DrawSettings, ModelFacts
from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.checkpoint.start_weights import find_checkpoint
from bitdance_scale.checkpoint.stored_config import stored_config
from bitdance_scale.config.class_map import ClassLabels
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.published_head import HEAD_CONFIG_NAME
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.solving import Solving, drawing_config
from bitdance_scale.generate.block_decode import OnBlock
from bitdance_scale.generate.image_sizes import known_sizes
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.published_model import load_published
from bitdance_scale.generate.sampler import FlowSolver
from bitdance_scale.generate.sampling_file import Sampling, read_sampling
from bitdance_scale.model.adapter_source import WeightedAdapter
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.sampling import BatchDrawer
from bitdance_scale.train.still_run import load_still_run
from bitdance_scale.vision.tokenizer import VisionTokenizer


class Drawer(Protocol):
    """Draws pictures, one call at a time."""

    @property
    def facts(self) -> ModelFacts:
        """Of its model."""
        ...

    @property
    def vision(self) -> VisionTokenizer:
        """Decodes what it draws."""
        ...

    def draw(self, settings: DrawSettings, on_block: OnBlock) -> torch.Tensor | np.ndarray:
        """Draws pictures together.

        Args:
            settings: what and how.
            on_block: sees every block as soon as it is drawn; what it raises ends the drawing.

        Returns:
            The tokens of each, as `vision.decode` takes them.

        Raises:
            ConfigError: the model cannot draw so.
        """
        ...


class PublishedDrawer:
    """A published folder.

    Adapters are merged into the weights, so the folder is loaded again when a drawing wants other weights of them.

    Args:
        folder: as `bitdance export` or the release writes it.
        dtype: of weights and activations; None: bfloat16 on CUDA, float32 elsewhere.
        device: None: CUDA where there is one.
        adapters: by name, with their weights at first.

    Raises:
        BitDanceError: the folder is missing, damaged or no published model, or adapters do not fit it.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str | None = None,
        device: str | None = None,
        adapters: Mapping[str, WeightedAdapter] | None = None,
    ) -> None:
        self._folder, self._adapters = folder, dict(adapters or {})
        self._weights = {name: adapter.weight for name, adapter in self._adapters.items()}
        self._pipeline: BitDancePipeline | None = BitDancePipeline.from_pretrained(
            folder, getattr(torch, dtype) if dtype else None, device, self._weighted(self._weights)
        )
        model = self._pipeline.model
        self._dtype, self._device = model.backbone.dtype, model.backbone.device
        self.vision = model.vision
        section, own = self.vision.section, read_sampling(folder)
        sampling, sizes_px = own or Sampling(), known_sizes(section)
        if own is not None:
            sizes_px = list(dict.fromkeys([own.size_px, *sizes_px]))
        self.facts = ModelFacts(
            folder.resolve().name,
            section,
            sizes_px,
            sampling.num_steps,
            sampling.guidance,
            sampling.sampler,
            adapters=dict(self._weights),
        )

    def draw(self, settings: DrawSettings, on_block: OnBlock) -> np.ndarray:
        """As in `Drawer`."""
        bits: np.ndarray = self._pipeline_with(settings.adapters)(
            [settings.prompt] * settings.images,
            *settings.size_px,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            sampler=self.facts.sampler,
            generator=[torch.Generator().manual_seed(seed) for seed in settings.seeds],
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
        topology: of a job of one rank.

    Raises:
        BitDanceError: the checkpoint does not fit, or has not the weights that are to draw.
    """

    def __init__(self, config: RunConfig, checkpoint: Path, topology: Topology) -> None:
        self._config, self._topology = config, topology
        self._run = load_still_run(config, checkpoint, config.sample.weights, topology)
        self.vision = self._run.vision
        labels = ClassLabels(config.classes).names if not config.model.parts.has_text else ()
        self.facts = ModelFacts(
            f"{config.run.name}, {checkpoint.name}",
            config.vision,
            _sizes_of_run(config),
            config.sample.num_steps,
            config.sample.guidance,
            config.sample.sampler,
            0 if config.model.parts.has_text else config.classes.num_classes,
            labels,
        )

    def draw(self, settings: DrawSettings, on_block: OnBlock) -> torch.Tensor:
        """As in `Drawer`; picture i draws from the stream of noise of its seed, as benchmarks do."""
        sample = self._config.sample
        solving = Solving(settings.size_px, settings.steps, settings.guidance, sample.sampler, sample.guidance_growth)
        config = drawing_config(self._config, solving, sample.weights)
        prompts = [self._run.condition.prompt_ids(settings.prompt)] * settings.images
        drawer = BatchDrawer(self._run.model, config, self._run.condition, self._topology)
        return drawer.draw(prompts, settings.seeds, on_block)


@contextlib.contextmanager
def open_drawer(
    model: Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
    config_name: str | None = None,
    adapters: Sequence[str] = (),
) -> Iterator[Drawer]:
    """A model for as long as the block runs.

    Args:
        model: published folder, run folder, checkpoint or import.
        dtype: of a published folder.
        device: of a published folder.
        overrides: `section.key=value`, of the others.
        config_name: configuration that gives an import the settings of a run.
        adapters: `FOLDER[=WEIGHT]` each, of a published folder.

    Raises:
        BitDanceError: there is no such model, or it cannot be loaded, or adapters do not fit it.
    """
    if not model.exists():
        raise ConfigError(f"MODEL {model}: no such folder; name a published folder, a run or a checkpoint")
    if (model / HEAD_CONFIG_NAME).is_file():
        if overrides or config_name:
            raise ConfigError(
                f"MODEL {model}: is a published folder, which has no settings of a run; leave out "
                f"{(config_name and '--config') or overrides[0]}"
            )
        yield PublishedDrawer(model, dtype, device, named_adapters(adapters))
        return
    if adapters:
        raise ConfigError(
            f"--adapter {adapters[0]}: {model} is no published folder; export it first, with `bitdance export`"
        )
    for option, value in (("--dtype", dtype), ("--device", device)):
        if value is not None:
            fix = f"write run.dtype={value} instead" if option == "--dtype" else "leave it out"
            raise ConfigError(f"{option} {value}: {model} is no published folder; {fix}")
    checkpoint = find_checkpoint(model)
    # One process draws, whatever trained.
    config = dataclasses.replace(stored_config(checkpoint, overrides, config_name), parallel=ParallelSection())
    sample = config.sample
    FlowSolver(sample.num_steps, sample.guidance, sample.sampler)
    with joined_ranks(config.parallel) as topology:
        yield RunDrawer(config, checkpoint, topology)


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
