"""The stages of a rank without an optimiser: for drawing with a model that is not trained any more.

It holds the weights once, in the dtype of the run. Every replica holds all of them, whatever the run's ZeRO stage.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.parallel.build import build_stages
from bitdance_scale.parallel.parameter_names import name_parameters
from bitdance_scale.parallel.partition import ConsumedValue, ShardedValue, whole_pieces
from bitdance_scale.parallel.pipeline_stages import Stage
from bitdance_scale.parallel.quantised_linears import quantised_weights
from bitdance_scale.parallel.tied import TiedEmbedding
from bitdance_scale.parallel.topology import Topology


class StageHolder(Protocol):
    """What images can be drawn with.

    Attributes:
        stages: those of this rank.
        tied: moves a tied embedding between the ends of the pipeline; None if embeddings are not tied.
    """

    stages: list[Stage]
    tied: TiedEmbedding | None


class StillModel:
    """The stages of a pipeline rank, not trained.

    Args:
        config: the run.
        vocab_size: rows of the embedding table, before padding.
        topology: the ranks.

    Attributes:
        stages, tied: as in `StageHolder`.
    """

    def __init__(self, config: RunConfig, vocab_size: int, topology: Topology) -> None:
        # Compiling would take longer than what it saves here, and need a compiler.
        plain = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, compile=False))
        module = build_stages(plain, vocab_size, topology).requires_grad_(False)
        self.stages: list[Stage] = list(module.stages)
        self._parameters = name_parameters(module, topology)
        self.tied = TiedEmbedding(self.stages, topology) if config.model.tie_embeddings else None

    def start_values(self) -> dict[str, ShardedValue | ConsumedValue]:
        """The weights, to load into: views, and what quantises linears in `lora.base_bits` as they are read."""
        views = {
            name: whole_pieces(parameter.data, placement) for name, (parameter, placement) in self._parameters.items()
        }
        return views | {base.name: base.value for stage in self.stages for base in quantised_weights(stage)}
