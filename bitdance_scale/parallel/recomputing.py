"""What the backward pass computes again instead of keeping: whole functions, or results that operations would keep.

`recompute` calls a function twice. `not_kept` is for a cheap function whose result an expensive operation takes: the
operation runs once, and what it would keep of that result is computed again when its gradient needs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitdance_scale.model.low_rank import current_rows, dropout_rows


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose activations are computed again in the backward pass instead of being kept.

    What is dropped depends on the rows that pass through (`model/low_rank.py`), which are the same ones again. Nothing
    else random runs inside a layer, so no generator state is saved. Megatron-core's own checkpointing would not do:
    it takes only tensors, which the mask of a pack is not, and needs CUDA's generators.
    """
    rows = current_rows()

    def with_rows(*args: Any, **kwargs: Any) -> Any:
        with dropout_rows(rows):
            return function(*args, **kwargs)

    # Under ZeRO-3 the weights among the saved tensors are gathered in one pass and empty in the other; a check of their
    # shapes would refuse that.
    return checkpoint(
        with_rows, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **kwargs
    )


class _Results:
    """Tensors that are computed again when the first is asked for, and freed when the last was."""

    def __init__(self, again: Callable[[], Sequence[torch.Tensor]]) -> None:
        self._again = again
        self._num_kept = self._num_left = 0
        self._tensors: Sequence[torch.Tensor] = ()

    def keep(self) -> None:
        """Says that one more operation will ask."""
        self._num_kept += 1

    def take(self, number: int) -> torch.Tensor:
        """Tensor `number`, for one of those that will ask."""
        if not self._num_left:
            with torch.no_grad():
                self._tensors = self._again()
            self._num_left = self._num_kept
        tensor = self._tensors[number]
        self._num_left -= 1
        if not self._num_left:
            self._tensors = ()
        return tensor


def _is_part(tensor: torch.Tensor, parameter: nn.Parameter) -> bool:
    """Whether a tensor is a view of a parameter, which may lie in a storage with others."""
    if tensor.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
        return False
    return 0 <= tensor.storage_offset() - parameter.storage_offset() < parameter.numel()


@contextlib.contextmanager
def not_kept(
    results: Sequence[torch.Tensor], again: Callable[[], Sequence[torch.Tensor]], module: nn.Module
) -> Iterator[None]:
    """Within it, operations that would keep results for their gradients have them computed again in the backward pass.

    Views of them likewise. The results are freed as soon as their caller lets them go.

    Args:
        results: each in a storage of its own.
        again: computes them once more, with the same strides; what it needs is kept. It runs without gradients.
        module: whose operations they are. Of its parameters themselves nothing is held, as ZeRO-3 takes the gathered
            ones away and gathers them again.
    """
    numbers = {result.untyped_storage()._cdata: number for number, result in enumerate(results)}
    held = _Results(again)

    def pack(tensor: torch.Tensor) -> object:
        number = numbers.get(tensor.untyped_storage()._cdata)
        if number is not None:
            held.keep()
            return number, tensor.shape, tensor.stride(), tensor.storage_offset()
        for parameter in module.parameters():
            if _is_part(tensor, parameter):
                offset = tensor.storage_offset() - parameter.storage_offset()
                return parameter, tensor.shape, tensor.stride(), offset
        return tensor

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        source, size, stride, offset = packed
        whole = held.take(source) if isinstance(source, int) else source.detach()
        return whole.as_strided(size, stride, whole.storage_offset() + offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
