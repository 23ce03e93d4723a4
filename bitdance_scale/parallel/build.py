"""Builds the model of a rank: stage, initial weights, engine."""

from __future__ import annotations

import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.parallel.initialise import initialise
from bitdance_scale.parallel.parameter_names import name_parameters
from bitdance_scale.parallel.pipeline_stages import RankStages
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.parallel.zero import ZeroEngine


def build_stages(config: RunConfig, vocab_size: int, topology: Topology) -> RankStages:
    """This rank's part of the model in the run's dtype, with initial weights that do not depend on the layout."""
    with topology.device:
        stages = RankStages(config, vocab_size, topology).to(getattr(torch, config.run.dtype))
    initialise(name_parameters(stages, topology), config, topology.device)
    return stages


def build_engine(config: RunConfig, vocab_size: int, topology: Topology) -> ZeroEngine:
    """This rank's stages under ZeRO, ready to train."""
    return ZeroEngine(build_stages(config, vocab_size, topology), config, topology)
