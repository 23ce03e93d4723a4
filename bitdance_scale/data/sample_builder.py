"""From a planned batch to samples with tokenised captions and grids; their images are read later."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.plan.plan import PlannedBatch
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.sequence.layout import num_positions
from bitdance_scale.sequence.pack import Sample


class CaptionTexts(Protocol):
    """Where captions are found, such as an `Index`."""

    def texts(self, source: str, samples: np.ndarray) -> list[list[str]]:
        """All alternatives of a caption of each sample."""
        ...


class SampleBuilder:
    """Makes the samples of planned batches.

    Args:
        config: the run; captions and downsampling are read.
        index: the data set, or whatever has its captions.
        condition: what images are drawn from.
    """

    def __init__(self, config: RunConfig, index: CaptionTexts, condition: Condition) -> None:
        self._config, self._index, self._condition = config, index, condition

    def build(self, batch: PlannedBatch) -> list[Sample]:
        """One sample per place of the batch, without its image."""
        captions = self._captions(batch)
        return [self._sample(batch, place, captions[place]) for place in range(len(batch))]

    def lengths(self, samples: list[Sample]) -> np.ndarray:
        """int64 [n], positions that each sample takes in a pack."""
        tokens = self._condition.image_tokens
        return np.array([num_positions(sample, tokens) for sample in samples], dtype=np.int64)

    def _sample(self, batch: PlannedBatch, place: int, caption: str) -> Sample:
        key = int(batch.samples[place])
        height, width = batch.bucket_px[place].tolist()
        grid = (height // self._config.vision.downsample, width // self._config.vision.downsample)
        if batch.is_image_to_text[place]:
            return self._condition.describing_sample(key, caption, grid)
        return self._condition.drawing_sample(
            key, caption, grid, is_caption_dropped=bool(batch.is_caption_dropped[place])
        )

    def _captions(self, batch: PlannedBatch) -> list[str]:
        """The caption that was drawn for every place; empty where the sample has none."""
        found = [""] * len(batch)
        for number, choice in enumerate(self._config.data.captions):
            places = np.flatnonzero(batch.caption == number)
            texts = self._index.texts(choice.source, batch.samples[places])
            for place, alternatives in zip(places.tolist(), texts, strict=True):
                found[place] = alternatives[int(batch.alternative[place] * len(alternatives))]
        return found
