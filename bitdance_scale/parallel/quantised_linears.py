"""Keeps the frozen linears of a rank in fewer bits (`lora.base_bits`, `model/quantised.py`).

A linear has its weight only while it is called: Megatron-core's layers and PyTorch's compute as before, with a weight
that is made again from its codes. What they would keep of it for the backward pass is made again there too. Tensors of
torchao and bitsandbytes would be smaller changes, but Megatron-core multiplies by a transposed weight, which theirs do
not do.

The weights are loaded whole before. Embedding, projection to the vocabulary, norms, biases, and linears whose inputs
are no multiple of a block stay in the dtype of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bitdance_scale.config.lora_schema import UNQUANTISED_BITS
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.adaptable import linears_of
from bitdance_scale.model.published_names import our_tensors
from bitdance_scale.model.quantised import NF4_LEVELS, can_quantise, from_integers, from_nf4, quantise
from bitdance_scale.parallel.parameter_names import Parameters, owners
from bitdance_scale.parallel.pipeline_stages import Stage


class QuantisedWeight(nn.Module):
    """A weight as codes and scales; buffers, as nothing of it is trained.

    Args:
        weight: [out, in].
        bits: 8 or 4.
        is_compiled: `parallel.compile`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor

    def __init__(self, weight: torch.Tensor, bits: int, is_compiled: bool) -> None:
        super().__init__()
        self._shape, self._bits, self._is_compiled = weight.shape, bits, is_compiled
        codes, scales = quantise(weight, bits)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        if bits == 4:
            self.register_buffer("levels", torch.tensor(NF4_LEVELS, device=weight.device), persistent=False)

    def whole(self) -> torch.Tensor:
        """The weight [out, in] in its dtype, as its codes say."""
        if self._bits == 4:
            blocks = from_nf4(self.codes, self.scales, self.levels, is_compiled=self._is_compiled)
        else:
            blocks = from_integers(self.codes, self.scales, is_compiled=self._is_compiled)
        assert isinstance(blocks, torch.Tensor)
        return blocks.view(self._shape)


def quantise_frozen(stages: Sequence[Stage], parameters: Parameters, config: RunConfig) -> None:
    """Quantises the frozen linears of a rank, one after the other, and takes their weights out of `parameters`.

    Args:
        stages: with the weights that the run begins with.
        parameters: those of the rank, by global name.
        config: the run; `lora.base_bits` = 16 leaves all as it is.
    """
    bits = config.lora.base_bits
    if bits == UNQUANTISED_BITS:
        return
    modules = owners(stages)
    for tensor in our_tensors(config.network, stages[0].vocab_size):
        if tensor.name in parameters and linears_of(tensor) and can_quantise(tensor.shape):
            parameter = parameters.pop(tensor.name).parameter
            assert not parameter.requires_grad, "a linear with its own gradient"
            linear = modules[tensor.name]
            # Not a parameter any more. The engines know it by name, so its memory is given back.
            linear.register_parameter("weight", None)
            linear.base = QuantisedWeight(parameter.data, bits, config.parallel.compile)
            parameter.data = parameter.data.new_empty(0)
            forward = functools.partial(_with_weight, linear, linear.forward)
            linear.forward = forward


def _with_weight(linear: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Calls a linear with its weight in place, of which nothing is kept."""
    base = linear.base
    assert isinstance(base, QuantisedWeight)
    weight = base.whole()
    storage = weight.untyped_storage()._cdata

    def pack(tensor: torch.Tensor) -> object:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else base.whole().as_strided(*packed)

    linear.__dict__["weight"] = weight
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*inputs, **options)
    finally:
        del linear.__dict__["weight"]
