"""Weight gradients of split linears, added straight into the float32 buffer of an optimiser.

Megatron-core's linears can add their weight gradient to `weight.main_grad` instead of returning it. A product of
bfloat16 matrices then reads and writes the float32 sum once. Otherwise the product is written in bfloat16, read again
and added. Megatron-core takes the kernel from Apex, and expects the saved weight to be the parameter itself. Here the
kernel is PyTorch's, and the weight is the parameter under torch's recomputation too, which saves copies.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers


def adds_in_float32(device: torch.device) -> bool:
    """Whether a device has the kernel that multiplies in one dtype and adds in another."""
    return device.type == "cuda"


class AccumulatedProduct:
    """What Megatron-core calls of Apex's `fused_weight_gradient_mlp_cuda`."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        """Adds `grad_output.T @ total_input` to `main_grad`, in place.

        Args:
            total_input: [tokens, in], in training dtype.
            grad_output: [tokens, out], in training dtype.
            main_grad: float32 [out, in].
        """
        if total_input.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), total_input)
        elif adds_in_float32(main_grad.device):
            torch.addmm(main_grad, grad_output.t(), total_input, out_dtype=main_grad.dtype, out=main_grad)
        else:
            main_grad.add_(grad_output.t().matmul(total_input))


class _WithParameter:
    """The context of a linear's backward pass, whose saved weight is the parameter itself."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        saved = self._context.saved_tensors
        return saved[0], self._context.parameter


class _Linear(layers.LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron-core's linear; its backward pass marks the parameter, of which recomputation saves a detached view."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, *options: Any) -> torch.Tensor:
        ctx.parameter = weight
        return _MEGATRON.forward(ctx, input, weight, *options)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return _MEGATRON.backward(_WithParameter(ctx), *grad_outputs)


_MEGATRON = layers.LinearWithGradAccumulationAndAsyncCommunication


def provide_accumulation() -> None:
    """Lets Megatron-core's linears be made with `gradient_accumulation_fusion`; without Apex they refuse it."""
    layers.fused_weight_gradient_mlp_cuda = AccumulatedProduct
    layers._grad_accum_fusion_available = True
    layers.LinearWithGradAccumulationAndAsyncCommunication = _Linear
