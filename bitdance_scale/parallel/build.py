"""Builds the model of a rank: stages, initial weights, engine.

Every parameter is drawn whole, from a generator seeded by the run's seed and the parameter's global name, and each
rank keeps its slice. A model started under any layout is therefore the same model.
"""

from __future__ import annotations

import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.initial import draw_initial
from bitdance_scale.parallel.parameter_names import Parameters, name_parameters
from bitdance_scale.parallel.pipeline_stages import RankStages
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.parallel.zero import ZeroEngine


def build_stages(config: RunConfig, vocab_size: int, topology: Topology) -> RankStages:
    """This rank's part of the model in the run's dtype, with initial weights that do not depend on the layout."""
    with topology.device:
        stages = RankStages(config, vocab_size, topology).to(getattr(torch, config.run.dtype))
    _draw_weights(name_parameters(stages, topology), config, topology.device)
    return stages


def build_engine(config: RunConfig, vocab_size: int, topology: Topology) -> ZeroEngine:
    """This rank's stages under ZeRO, ready to train."""
    return ZeroEngine(build_stages(config, vocab_size, topology), config, topology)


def _draw_weights(parameters: Parameters, config: RunConfig, device: torch.device) -> None:
    """Fills every parameter in place; padded vocabulary rows become zero."""
    seed, init_std = config.run.seed, config.model.init_std
    with torch.no_grad():
        for name, (parameter, placement) in parameters.items():
            whole = draw_initial(name, placement.global_shape, seed, init_std, device)
            parameter.copy_(placement.local_part(whole))
