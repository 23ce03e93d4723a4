"""Builds the model of a rank: stages, initial weights, engine.

Every parameter is drawn whole, from a generator seeded by the run's seed and the parameter's global name, and each
rank keeps its slice. A model started under any layout is therefore the same model. Where frozen linears are quantised,
each is as soon as it is drawn.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import shutil
from collections.abc import Sequence

import torch

from bitdance_scale.compilers import COMPILERS, find_compiler
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.initial import draw_initial
from bitdance_scale.parallel.adapters import add_adapters
from bitdance_scale.parallel.agreement import all_ranks, from_all_ranks
from bitdance_scale.parallel.engine import TrainingEngine
from bitdance_scale.parallel.parameter_names import name_parameters, owners
from bitdance_scale.parallel.partition import Placement
from bitdance_scale.parallel.pipeline_stages import RankStages
from bitdance_scale.parallel.quantised_linears import quantise_linear, quantised_weights
from bitdance_scale.parallel.topology import Topology


def build_stages(config: RunConfig, vocab_size: int, topology: Topology) -> RankStages:
    """This rank's part of the model in the run's dtype, with initial weights that do not depend on the layout."""
    with topology.device:
        stages = RankStages(config, vocab_size, topology).to(getattr(torch, config.run.dtype))
        if config.lora.is_used:
            add_adapters(stages, config, vocab_size, topology)
            _quantise_linears(stages, config, topology)
    _draw_weights(stages, config, topology)
    return stages


def build_engine(config: RunConfig, vocab_size: int, topology: Topology) -> TrainingEngine:
    """This rank's stages under the run's engine, ready to train; a collective of all ranks.

    Raises:
        ConfigError: on every rank: a pattern of `optim.decay_exempt` names no parameter of the model; or there is no
            compiler for `parallel.compile`; or a rank has nothing to train.
    """
    if config.parallel.compile:
        # Machines may differ.
        with all_ranks():
            check_compiler(topology.device)
    stages = build_stages(config, vocab_size, topology)
    _check_trained(stages, config, topology)
    quantised = [base.name for base in quantised_weights(stages)]
    _check_exemptions([*name_parameters(stages, topology), *quantised], config.optim.decay_exempt)
    return engine_of(stages, config, topology)


def engine_of(
    stages: RankStages, config: RunConfig, topology: Topology, is_fused: bool | None = None
) -> TrainingEngine:
    """The run's engine on these stages; a collective of all ranks.

    Args:
        stages: with their initial weights.
        config: the run.
        topology: the ranks.
        is_fused: whether AdamW is one kernel without temporary tensors; None: only on CUDA.
    """
    # Imported here, so that a run imports one of them.
    if config.parallel.optimizer == "megatron":
        from bitdance_scale.parallel.distributed_optimizer import MegatronEngine

        return MegatronEngine(stages, config, topology, is_fused)
    from bitdance_scale.parallel.zero import ZeroEngine

    return ZeroEngine(stages, config, topology, is_fused)


def check_compiler(device: torch.device) -> None:
    """Refuses to compile for a device where PyTorch would fail at the first step, with pages of its own.

    Raises:
        ConfigError: there is no compiler, or on CUDA no Triton.
    """
    language = "c" if device.type == "cuda" else "c++"
    variable, programs = COMPILERS[language]
    found = find_compiler(language)
    lacking = "" if found and shutil.which(found) else found or f"{programs[0]} (or ${variable})"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        lacking = "Triton"
    if lacking:
        raise ConfigError(
            f"parallel.compile = true: {lacking} is not on this machine; install it, or set parallel.compile=false"
        )


def _check_trained(stages: RankStages, config: RunConfig, topology: Topology) -> None:
    """Refuses adapters that leave a rank of the pipeline without any: an optimiser is of something."""
    with all_ranks():
        if not any(parameter.requires_grad for parameter in stages.parameters()):
            raise ConfigError(
                f"lora.targets = {list(config.lora.targets)}: none of them is on rank {topology.pipeline_rank} of the "
                f"pipeline, which would have nothing to train; add linears of the backbone, or set parallel.pipeline=1"
            )


def _check_exemptions(own_names: list[str], patterns: Sequence[str]) -> None:
    """Looks for the parameters of every pattern on all ranks, as a stage of a pipeline holds only some."""
    if not patterns:
        return
    names = sorted({name for part in from_all_ranks(own_names) for name in part})
    unmatched = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if unmatched:
        near = difflib.get_close_matches(unmatched[0], names, n=3, cutoff=0.3)
        raise ConfigError(
            f"optim.decay_exempt: {', '.join(map(repr, unmatched))}: no parameter has such a name; the nearest are "
            f"{', '.join(near) or ', '.join(names[:3])}. Correct it, or leave it out"
        )


def _quantise_linears(stages: RankStages, config: RunConfig, topology: Topology) -> None:
    """Gives the frozen linears that were made without weights quantised ones."""
    modules = owners(stages.stages)
    for name, (parameter, placement) in name_parameters(stages, topology).items():
        if parameter.is_meta:
            assert not parameter.requires_grad, "a linear with its own gradient"
            quantise_linear(modules[name], name, placement, config, topology.device)


def _draw_weights(stages: RankStages, config: RunConfig, topology: Topology) -> None:
    """Fills every parameter in place; padded vocabulary rows become zero.

    Frozen linears are quantised one by one, unless a start hands their weights over, as that of every run with adapters
    does (`lora_rules.py`).
    """

    def draw(name: str, placement: Placement) -> torch.Tensor:
        whole = draw_initial(name, placement.global_shape, config.run.seed, config.model.init_std, topology.device)
        return placement.local_part(whole)

    with torch.no_grad():
        for name, (parameter, placement) in name_parameters(stages, topology).items():
            parameter.copy_(draw(name, placement))
        if not config.run.start_from:
            for base in quantised_weights(stages):
                base.keep(draw(base.name, base.placement).to(getattr(torch, config.run.dtype)))
