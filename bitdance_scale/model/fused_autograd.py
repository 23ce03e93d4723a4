"""The formulas of `model/fused.py` with their gradients: what the modules of the networks call.

Each operation keeps its inputs for the backward pass and nothing else, compiled or not. Where a value goes on beside
the result of an operation, as the residual stream does beside its norm, the operation hands it on: the two gradients
are then added in the same kernel.

Every function takes `is_compiled`: whether its formulas are compiled. Tensors may have any number of axes before the
last one.

Shape suffixes: D channels, S positions, B batch, G key/value heads, N query heads, K head size, H hidden channels of a
SwiGLU.
"""

from __future__ import annotations

from typing import Any

import torch

from bitdance_scale.model import fused


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float, is_compiled: bool) -> torch.Tensor:
    """Root-mean-square norm of the last axis of [.., D] times the weight [D]; same shape and dtype."""
    normed: torch.Tensor = _Norm.apply(_rows(hidden), weight, eps, is_compiled)
    return normed.view(hidden.shape)


def stream_rms_norm(
    stream: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float, is_compiled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the residual stream [.., D] after an addition, its `rms_norm`)."""
    if added is None:
        total, normed = _StreamNorm.apply(_rows(stream), weight, eps, is_compiled)
    else:
        total, normed = _AddNorm.apply(_rows(stream), _rows(added), weight, eps, is_compiled)
    return total.view(stream.shape), normed.view(stream.shape)


def turn_heads(
    stacked: torch.Tensor,
    table: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    num_groups: int,
    is_interleaved: bool,
    is_compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of the fused projection, queries and keys normalised and turned.

    Args:
        stacked: [S, B, C], Megatron-core's fused projection: of every group its queries, its key and its value.
        table: [S, B or 1, K], of `positions.rotary_table`.
        weights: [K] each, of the norms of queries and of keys; None: they are not normalised.
        eps: of the norms.
        num_groups: G.
        is_interleaved: whether neighbouring channels turn together.
        is_compiled: see above.

    Returns:
        ([S, B, N, K], [S, B, G, K], [S, B, G, K]); the values are a view of the projection.
    """
    num_positions, batch, _ = stacked.shape
    table = table.expand(num_positions, batch, -1).flatten(0, 1)
    rows = stacked.flatten(0, 1).unflatten(-1, (num_groups, -1))
    if weights is None:
        heads = _Turn.apply(rows, table, is_interleaved, is_compiled)
    else:
        heads = _NormTurn.apply(rows, table, *weights, eps, is_interleaved, is_compiled)
    query, key, value = (part.unflatten(0, (num_positions, batch)) for part in heads)
    return query, key, value


def swiglu(stacked: torch.Tensor, is_compiled: bool) -> torch.Tensor:
    """silu(gate) * up of the two halves of the last axis, [.., 2 H] -> [.., H]."""
    product: torch.Tensor = _SwiGLU.apply(_rows(stacked), is_compiled)
    return product.unflatten(0, stacked.shape[:-1])


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(0, -2)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float, is_compiled: bool) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.settings = eps, is_compiled
        return fused.rms_norm(hidden, weight, eps, is_compiled=is_compiled)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        eps, is_compiled = ctx.settings
        hidden, weight = ctx.saved_tensors
        d_hidden, d_weight = fused.rms_norm_gradient(
            hidden, weight, *gradients, eps, ctx.needs_input_grad[1], is_compiled=is_compiled
        )
        return d_hidden, _unless_empty(d_weight), None, None


def _unless_empty(gradient: torch.Tensor) -> torch.Tensor | None:
    """A gradient, of which a formula makes an empty tensor where it is not needed."""
    return gradient if gradient.numel() else None


def _stream_gradients(
    ctx: Any, d_total: torch.Tensor | None, d_normed: torch.Tensor, is_trained: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gradient of the stream, of the weight if it is trained) of a stream that goes on beside its norm."""
    eps, is_compiled = ctx.settings
    total, weight = ctx.saved_tensors
    if d_total is None:
        d_stream, d_weight = fused.rms_norm_gradient(total, weight, d_normed, eps, is_trained, is_compiled=is_compiled)
    else:
        d_stream, d_weight = fused.carried_rms_norm_gradient(
            total, weight, d_normed, d_total, eps, is_trained, is_compiled=is_compiled
        )
    return d_stream, _unless_empty(d_weight)


class _StreamNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: torch.Tensor, weight: torch.Tensor, eps: float, is_compiled: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(stream, weight)
        ctx.settings = eps, is_compiled
        return stream.view_as(stream), fused.rms_norm(stream, weight, eps, is_compiled=is_compiled)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_total, d_normed = gradients
        return *_stream_gradients(ctx, d_total, d_normed, ctx.needs_input_grad[1]), None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float, is_compiled: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        total, normed = fused.add_rms_norm(stream, added, weight, eps, is_compiled=is_compiled)
        ctx.save_for_backward(total, weight)
        ctx.settings = eps, is_compiled
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_total, d_normed = gradients
        d_total, d_weight = _stream_gradients(ctx, d_total, d_normed, ctx.needs_input_grad[2])
        return d_total, d_total, d_weight, None, None


def _value_of(stacked: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The values [R, G, K] in the fused projection [R, G, M K]."""
    return stacked[..., -head_dim:]


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stacked: torch.Tensor, table: torch.Tensor, is_interleaved: bool, is_compiled: bool
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(table)
        ctx.settings = is_interleaved, is_compiled
        heads = fused.turn_heads(stacked, table, is_interleaved, is_compiled=is_compiled)
        return *heads, _value_of(stacked, table.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        is_interleaved, is_compiled = ctx.settings
        d_stacked = fused.turn_heads_gradient(*ctx.saved_tensors, *gradients, is_interleaved, is_compiled=is_compiled)
        return d_stacked, None, None, None


class _NormTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stacked: torch.Tensor,
        table: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        eps: float,
        is_interleaved: bool,
        is_compiled: bool,
    ) -> tuple[torch.Tensor, ...]:
        inputs = stacked, table, query_weight, key_weight
        ctx.save_for_backward(*inputs)
        ctx.settings = eps, is_interleaved, is_compiled
        heads = fused.norm_turn_heads(*inputs, eps, is_interleaved, is_compiled=is_compiled)
        return *heads, _value_of(stacked, table.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        eps, is_interleaved, is_compiled = ctx.settings
        d_stacked, *d_weights = fused.norm_turn_heads_gradient(
            *ctx.saved_tensors, *gradients, eps, is_interleaved, ctx.needs_input_grad[2], is_compiled=is_compiled
        )
        return d_stacked, None, *map(_unless_empty, d_weights), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stacked: torch.Tensor, is_compiled: bool) -> torch.Tensor:
        ctx.save_for_backward(stacked)
        ctx.is_compiled = is_compiled
        return fused.swiglu(stacked, is_compiled=is_compiled)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return fused.swiglu_gradient(*ctx.saved_tensors, *gradients, is_compiled=ctx.is_compiled), None


def modulated_norm(
    stream: torch.Tensor,
    affine: tuple[torch.Tensor | None, torch.Tensor | None],
    modulation: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    is_compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the residual stream [.., D] as it is, its layer norm times 1 + scale, plus shift).

    Args:
        stream: [.., D].
        affine: weight and bias [D] of the norm; None each: it has none.
        modulation: scale and shift, [.., D].
        eps: of the norm.
        is_compiled: see above.
    """
    scale, shift = map(_rows, modulation)
    total, modulated = _ModulatedNorm.apply(_rows(stream), *affine, scale, shift, eps, is_compiled)
    return total.view(stream.shape), modulated.view(stream.shape)


def gated_add_norm(
    stream: torch.Tensor,
    gate: torch.Tensor,
    added: torch.Tensor,
    affine: tuple[torch.Tensor | None, torch.Tensor | None],
    modulation: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    is_compiled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`gated_add`, its `modulated_norm`)."""
    rows = map(_rows, (stream, gate, added))
    total, modulated = _GatedAddNorm.apply(*rows, *affine, *map(_rows, modulation), eps, is_compiled)
    return total.view(stream.shape), modulated.view(stream.shape)


def gated_add(stream: torch.Tensor, gate: torch.Tensor, added: torch.Tensor, is_compiled: bool) -> torch.Tensor:
    """The residual stream plus what is added times its gate; all [.., D]."""
    total: torch.Tensor = _GatedAdd.apply(*map(_rows, (stream, gate, added)), is_compiled)
    return total.view(stream.shape)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
        is_compiled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(stream, weight, bias, scale)
        ctx.settings = eps, is_compiled
        modulated = fused.modulated_norm(stream, weight, bias, scale, shift, eps, is_compiled=is_compiled)
        return stream.view_as(stream), modulated

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        eps, is_compiled = ctx.settings
        d_total, d_modulated = gradients
        # Once: under recomputation they are gone after they were asked for.
        stream, weight, bias, scale = ctx.saved_tensors
        d_stream, d_scale, *d_affine = fused.modulated_norm_gradient(
            stream, weight, bias, scale, d_modulated, d_total, eps, ctx.needs_input_grad[1], is_compiled=is_compiled
        )
        return d_stream, *map(_unless_empty, d_affine), d_scale, d_modulated, None, None


class _GatedAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: torch.Tensor,
        gate: torch.Tensor,
        added: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
        is_compiled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, modulated = fused.gated_add_norm(
            stream, gate, added, weight, bias, scale, shift, eps, is_compiled=is_compiled
        )
        ctx.save_for_backward(total, gate, added, weight, bias, scale)
        ctx.settings = eps, is_compiled
        return total, modulated

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        eps, is_compiled = ctx.settings
        d_total, d_modulated = gradients
        d_stream, d_gate, d_added, d_scale, *d_affine = fused.gated_add_norm_gradient(
            *ctx.saved_tensors, d_modulated, d_total, eps, ctx.needs_input_grad[3], is_compiled=is_compiled
        )
        return d_stream, d_gate, d_added, *map(_unless_empty, d_affine), d_scale, d_modulated, None, None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: torch.Tensor, gate: torch.Tensor, added: torch.Tensor, is_compiled: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, added)
        ctx.is_compiled = is_compiled
        return fused.gated_add(stream, gate, added, is_compiled=is_compiled)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_factors = fused.gated_add_gradient(*ctx.saved_tensors, *gradients, is_compiled=ctx.is_compiled)
        return *gradients, *d_factors, None
