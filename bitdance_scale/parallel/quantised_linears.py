"""Keeps the frozen linears of a rank in fewer bits (`lora.base_bits`, `model/quantised.py`).

A linear has its weight only while it is called: Megatron-core's layers and PyTorch's compute as before, with a weight
that is made again from its codes. What they would keep of it for the backward pass is made again there too. Tensors of
torchao and bitsandbytes would be smaller changes, but Megatron-core multiplies by a transposed weight, which theirs do
not do.

The weights are never there all at once: linears are made without them (`without_weights`), and a start hands them over
one after the other (`QuantisedWeight.value`). Embedding, projection to the vocabulary, norms, biases, and linears whose
inputs are no multiple of a block stay in the dtype of the run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bitdance_scale.config.lora_schema import UNQUANTISED_BITS, LoraSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.quantised import NF4_LEVELS, can_quantise, empty_codes, from_integers, from_nf4, quantise
from bitdance_scale.parallel.partition import ConsumedValue, Placement


class QuantisedWeight(nn.Module):
    """A weight as codes and scales; buffers, as nothing of it is trained. They have no values yet.

    Args:
        name: global name of the weight.
        placement: where this rank's part of it lies.
        dtype: of the weight.
        device: where it is.
        bits: 8 or 4.
        is_compiled: `parallel.compile`.

    Attributes:
        name, placement: as above.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor

    def __init__(
        self, name: str, placement: Placement, dtype: torch.dtype, device: torch.device, bits: int, is_compiled: bool
    ) -> None:
        super().__init__()
        self.name, self.placement = name, placement
        self._bits, self._is_compiled = bits, is_compiled
        codes, scales = empty_codes(placement.local_shape, bits, dtype, device)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        if bits == 4:
            # As integers: engines convert floating-point buffers to the dtype of the run, which would round these.
            levels = torch.tensor(NF4_LEVELS, device=device).view(torch.int32)
            self.register_buffer("levels", levels, persistent=False)

    def keep(self, weight: torch.Tensor) -> None:
        """Quantises this rank's part of the weight, [out, in] in its dtype, in place of what was kept before."""
        codes, scales = quantise(weight, self._bits)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def whole(self) -> torch.Tensor:
        """The weight [out, in] in its dtype, as its codes say."""
        if self._bits == 4:
            levels = self.levels.view(torch.float32)
            blocks = from_nf4(self.codes, self.scales, levels, is_compiled=self._is_compiled)
        else:
            blocks = from_integers(self.codes, self.scales, is_compiled=self._is_compiled)
        assert isinstance(blocks, torch.Tensor)
        return blocks.view(self.placement.local_shape)

    @property
    def value(self) -> ConsumedValue:
        """What a start hands the weight over to."""
        return ConsumedValue(self.placement, self.scales.dtype, self.scales.device, self.keep)


@contextlib.contextmanager
def without_weights(section: LoraSection) -> Iterator[None]:
    """Within it linears that `lora.base_bits` quantises are made with a weight on the meta device.

    A weight is replaced as soon as its module has it, so that there is one at a time.
    """
    if section.base_bits == UNQUANTISED_BITS:
        yield
        return

    def replace(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if name != "weight" or parameter is None or not _can_quantise(module):
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"))

    # Its annotation leaves out that a hook may return a parameter.
    handle = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _can_quantise(module: nn.Module) -> bool:
    if isinstance(module, ColumnParallelLinear | RowParallelLinear):
        return can_quantise((module.output_size, module.input_size))
    return isinstance(module, nn.Linear) and can_quantise((module.out_features, module.in_features))


def quantise_linear(
    linear: nn.Module, name: str, placement: Placement, config: RunConfig, device: torch.device
) -> None:
    """Gives a linear that was made without a weight a quantised one, which has no values yet.

    Args:
        linear: the linear.
        name: global name of its weight.
        placement: of its weight.
        config: the run.
        device: where the weight will be.
    """
    dtype = getattr(torch, config.run.dtype)
    linear.register_parameter("weight", None)
    linear.base = QuantisedWeight(name, placement, dtype, device, config.lora.base_bits, config.parallel.compile)
    forward = functools.partial(_with_weight, linear, linear.forward)
    linear.forward = forward


def quantised_weights(module: nn.Module) -> list[QuantisedWeight]:
    """The quantised weights within a module."""
    return [part for part in module.modules() if isinstance(part, QuantisedWeight)]


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
