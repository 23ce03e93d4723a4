"""What the memory of a rank is divided into, and what decides it; imports no engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bitdance_scale.config.parallel_schema import ParallelSection


@dataclass(frozen=True)
class Bytes:
    """Bytes by purpose.

    Attributes:
        weights: parameters in training dtype, flat and padded; under ZeRO-3 this rank's partition.
        gradients: of the weights, in the dtypes and partitions in which the engine accumulates them.
        masters: float32 weights of the optimiser's partition.
        moments: AdamW's two, float32.
        averages: averaged weights of the optimiser's partition, float32.
        buffers: DeepSpeed's for reducing and gathering, and temporary tensors of the optimiser.
        inputs: packs of the step: tokens, noise, masks.
        activations: everything that the model makes in the forward and backward passes.
        tokenizer: the frozen autoencoder, float32. It encodes between steps, when there are no activations.
    """

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    averages: int = 0
    buffers: int = 0
    inputs: int = 0
    activations: int = 0
    tokenizer: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


def num_in_flight(section: ParallelSection, pipeline_rank: int) -> int:
    """Forward passes whose activations a rank keeps at once, if the step has enough micro-batches.

    Under 1F1B there is one per later stage and one for the rank's own. With virtual stages a pass goes through one of
    the rank's stages; there are two per later rank and a round of all ranks for every further stage (Narayanan et al.
    2021, Sec. 2.2).
    """
    later = section.pipeline - 1 - pipeline_rank
    if section.virtual_stages == 1:
        return later + 1
    return 2 * later + (section.virtual_stages - 1) * section.pipeline + 1
