"""Global names and placements of the parameters of a stage.

A parameter is identified by the name it has in the whole model (layers counted over all stages) and by where this
rank's slice lies in the whole tensor. Initial values, checkpoints and parity tests use only these terms, so that none
of them depends on the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from bitdance_scale.parallel.adapter import Adapter
from bitdance_scale.parallel.partition import Placement
from bitdance_scale.parallel.pipeline_stages import RankStages, Stage
from bitdance_scale.parallel.tensor_linears import ColumnLinear
from bitdance_scale.parallel.topology import Topology


class Located(NamedTuple):
    """A local parameter and where it lies in the whole one."""

    parameter: nn.Parameter
    placement: Placement


Parameters = dict[str, Located]


def name_parameters(module: RankStages, topology: Topology) -> Parameters:
    """Global name -> parameter and placement, in the order of the module; a tied weight appears once, as the embedding.

    Also marks split parameters `tensor_model_parallel`. DeepSpeed counts marked parameters in the gradient norm on
    every tensor-parallel rank, and the others on the first rank only.
    """
    named: Parameters = {}
    for stage in module.stages:
        modules = dict(stage.named_modules())
        for name, parameter in stage.named_parameters():
            if stage.has_copied_output and name == "output.weight":
                continue
            module_name, _, leaf = name.rpartition(".")
            placement = _placement(module_name, modules[module_name], leaf, parameter, stage, topology)
            if placement.dim is not None:
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed's own mark
            named[_global_name(name, stage)] = Located(parameter, placement)
    return named


def owners(stages: Iterable[Stage]) -> dict[str, nn.Module]:
    """Global name -> the module that has the parameter; otherwise as `name_parameters`."""
    return {
        _global_name(f"{name}.{leaf}", stage): part
        for stage in stages
        for name, part in stage.named_modules()
        for leaf, _ in part.named_parameters(recurse=False)
    }


def _global_name(name: str, stage: Stage) -> str:
    return re.sub(r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{stage.layers[int(m[1])]}.", name)


def _placement(
    module_name: str, module: nn.Module, leaf: str, parameter: torch.Tensor, stage: Stage, topology: Topology
) -> Placement:
    """Where the local parameter lies in the whole one, by the kind of module that owns it."""
    shape, rank, size = tuple(parameter.shape), topology.tensor_rank, topology.tensor_size
    if isinstance(module, Adapter):
        return module.placements[leaf]
    if isinstance(module, RowParallelLinear) and leaf == "weight":
        return Placement.split(shape, dim=1, rank=rank, size=size)
    if isinstance(module, VocabParallelEmbedding) or module_name == "output":
        return Placement.split(shape, dim=0, rank=rank, size=size, valid_length=stage.vocab_size)
    if isinstance(module, ColumnParallelLinear):
        # Megatron-core's own SwiGLU input stacks gate and up; our linears say how many matrices they stack.
        num_chunks = module.num_chunks if isinstance(module, ColumnLinear) else 1
        num_chunks = 2 if module_name.endswith("mlp.linear_fc1") else num_chunks
        return Placement.split(shape, dim=0, rank=rank, size=size, num_chunks=num_chunks)
    return Placement.replicated(shape)
