"""Trained networks that draw prompts: a published folder, whole on every rank, or a checkpoint under any layout.

A prompt is text, or the number of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bitdance_scale.checkpoint.frozen_base import digest_of
from bitdance_scale.checkpoint.integrity import file_digest, text_digest
from bitdance_scale.checkpoint.named_adapters import parse_adapters
from bitdance_scale.config.parallel_schema import ParallelSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.solving import Solving
from bitdance_scale.generate.image_sizes import check_size
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.published_layout import layout_of
from bitdance_scale.generate.published_model import read_sections
from bitdance_scale.generate.sampler import FlowSolver
from bitdance_scale.model.adapter_source import WeightedAdapter
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.train.sampling import BatchDrawer, sample_grid
from bitdance_scale.train.still_run import load_still_run


class PromptModel(Protocol):
    """Draws images of prompts on the ranks of one replica."""

    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray] | None:
        """Images of texts, drawn together; a call of all ranks of the replica.

        Args:
            texts: a prompt for each image.
            seeds: of each image, 0 .. 2^63 - 1.

        Returns:
            uint8 [H, W, 3] each on the first rank of the replica, None on its others.
        """
        ...


class PublishedPrompts:
    """A published folder; every rank has all of it and is a replica of its own.

    Args:
        folder: as `bitdance export` or the release writes it.
        solving: how images are drawn.
        dtype: of weights and activations.
        topology: the ranks.
        adapters: what is merged into its weights, as `parse_adapters` reads it.

    Raises:
        BitDanceError: the folder is missing, damaged or no published model, or adapters do not fit it.
    """

    def __init__(
        self,
        folder: Path,
        solving: Solving,
        dtype: torch.dtype,
        topology: Topology,
        adapters: Sequence[str] = (),
    ) -> None:
        self._solving = solving
        self._pipeline = BitDancePipeline.from_pretrained(folder, dtype, topology.device, parse_adapters(adapters))

    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        """As in `PromptModel`."""
        height, width = self._solving.size_px
        images = self._pipeline(
            list(texts),
            height,
            width,
            num_inference_steps=self._solving.steps,
            guidance_scale=self._solving.guidance,
            sampler=self._solving.sampler,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return [np.asarray(image) for image in images]


class RunPrompts:
    """A checkpoint of a run, or an import, under the layout of its configuration.

    Args:
        config: of the run, checked; its `sample` says how images are drawn.
        checkpoint: where the weights are.
        topology: the ranks.

    Raises:
        BitDanceError: on all ranks: the checkpoint does not fit, or has not the weights that are to draw.
    """

    def __init__(self, config: RunConfig, checkpoint: Path, topology: Topology) -> None:
        self._config, self._topology = config, topology
        self._run = load_still_run(config, checkpoint, config.sample.weights, topology)
        self._drawer = BatchDrawer(self._run.model, config, self._run.condition, topology)

    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray] | None:
        """As in `PromptModel`."""
        prompts = [self._run.condition.prompt_ids(text) for text in texts]
        bits = self._drawer.draw(prompts, seeds)
        if not self._topology.is_reader:
            return None
        return [self._run.vision.decode(rows, sample_grid(self._config)).numpy() for rows in bits]


@dataclass(frozen=True)
class ModelSource:
    """A trained network that is not loaded yet.

    Attributes:
        digest: tells its weights from others; reads all of a published folder, so the first rank alone calls it.
        block_tokens: tokens that it draws at once, p^2.
        settings: what else of it decides an image, as `drawing.json` has it: the dtype in which it draws, for one.
        parallel: layout of a replica.
        load: the network on a rank of it; a collective.
    """

    digest: Callable[[], str]
    block_tokens: int
    settings: Mapping[str, Any]
    parallel: ParallelSection
    load: Callable[[Topology], PromptModel]


def published_source(folder: Path, solving: Solving, dtype: str | None, adapters: Sequence[str] = ()) -> ModelSource:
    """A published folder.

    Args:
        folder: as `bitdance export` or the release writes it.
        solving: how images are drawn.
        dtype: of weights and activations; None: bfloat16 on CUDA, float32 elsewhere.
        adapters: what is merged into its weights, as `parse_adapters` reads it.

    Raises:
        BitDanceError: it is no published model, adapters are none, or images cannot be drawn so.
    """
    opened = parse_adapters(adapters)
    FlowSolver(solving.steps, solving.guidance, solving.sampler)
    if solving.guidance_growth != "constant":
        raise ConfigError(
            f"--guidance-growth {solving.guidance_growth}: a published folder draws with the same guidance at every "
            "block; leave it out"
        )
    vision = read_sections(folder).vision
    check_size(*solving.size_px, vision)
    name = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    return ModelSource(
        lambda: _folder_digest(folder, opened),
        vision.block_tokens,
        {"dtype": name} | ({"adapters": [*adapters]} if adapters else {}),
        ParallelSection(),
        lambda topology: PublishedPrompts(folder, solving, getattr(torch, name), topology, adapters),
    )


def run_source(config: RunConfig, checkpoint: Path) -> ModelSource:
    """A checkpoint of a run, or of an import.

    Args:
        config: from `drawing_config`; `sample` says how images are drawn, `parallel` is the layout of a replica.
        checkpoint: the weights.
    """
    return ModelSource(
        # That of a run with adapters holds the digest of the frozen weights.
        lambda: digest_of(checkpoint),
        config.vision.block_tokens,
        {"dtype": config.run.dtype, "time_shift": config.head.time_shift},
        config.parallel,
        lambda topology: RunPrompts(config, checkpoint, topology),
    )


def _folder_digest(folder: Path, adapters: Sequence[WeightedAdapter] = ()) -> str:
    """SHA-256 over what decides the images of a published folder: configurations, weights, tokenizer, adapters."""
    roots = [folder, *(folder / name for name in layout_of(folder).folders)]
    found = [path for root in roots for path in root.iterdir() if path.is_file() and path.suffix in _DECIDING]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    lines = [f"{name} {file_digest(folder / name)}" for name in names]
    lines += [f"{adapter.weight} {adapter.source.digest()}" for adapter in adapters]
    return text_digest("\n".join(lines))


_DECIDING = frozenset({".safetensors", ".json", ".txt", ".model"})
