"""The elementwise parts of the networks, each a formula that can be compiled into one kernel.

Norms, residuals, rotation, SwiGLU, modulation and cross-entropy move bytes and hardly compute. Run operator by operator
they take most of the kernels and half of the memory traffic of a layer. Here each of them is a plain function of
tensors, with a second one for its gradient. `model/fused_autograd.py` puts the two together.

What a gradient needs is computed again from what the forward pass took, so that only inputs are kept. Run as they are,
the formulas round as PyTorch's own operators and their derivatives do. Compiled, they keep intermediate values in
float32.

Every tensor has positions (or tokens) as its first axis, except those that a formula names as whole.

Shape suffixes: R positions (rows), D channels, G key/value heads, N query heads, M heads of one group in the fused
projection (N / G queries, a key and a value), K head size, H hidden channels of a SwiGLU, V entries of the vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from bitdance_scale.model.formula import formula, have_equal_length


def _unit(wide: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 [.., C] divided by its root-mean-square, the reciprocal of that [.., 1])."""
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _root_mean_square_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As Qwen3 computes it: in float32 up to the weight."""
    return weight * _unit(hidden.float(), eps)[0].to(hidden.dtype)


def _root_mean_square_norm_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    d_normed: torch.Tensor,
    eps: float,
    d_stream: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of `hidden` in its dtype, `hidden` divided by its root-mean-square in float32).

    `d_stream` is the gradient of `hidden` itself, where it goes on beside the norm.
    """
    wide = hidden.float()
    unit, inverse = _unit(wide, eps)
    d_unit = (d_normed * weight).float()
    d_inverse = (d_unit * wide).sum(-1, keepdim=True)
    d_mean_square = -0.5 * d_inverse * inverse.pow(3)
    d_wide = d_unit * inverse if d_stream is None else d_stream + d_unit * inverse
    d_wide = d_wide + d_mean_square / hidden.shape[-1] * (2 * wide)
    return d_wide.to(hidden.dtype), unit


def _norm_weight_gradient(
    d_normed: torch.Tensor, unit: torch.Tensor, axes: tuple[int, ...], has_weight_gradient: bool
) -> torch.Tensor:
    """Gradient of the weight of a root-mean-square norm; empty if it is frozen."""
    if not has_weight_gradient:
        return d_normed.new_empty(0)
    return (d_normed * unit.to(d_normed.dtype)).sum(axes)


@formula(whole=("weight",))
def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of [R, D] times the weight [D]."""
    return _root_mean_square_norm(hidden, weight, eps)


@formula(whole=("weight",))
def add_rms_norm(
    stream: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the residual stream [R, D] after an addition, its `rms_norm`)."""
    have_equal_length(stream, added)
    total = stream + added
    return total, _root_mean_square_norm(total, weight, eps)


@formula(whole=("weight",))
def rms_norm_gradient(
    hidden: torch.Tensor, weight: torch.Tensor, d_normed: torch.Tensor, eps: float, has_weight_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `rms_norm`: of `hidden` [R, D] and of the weight [D], which is empty unless it is asked for."""
    have_equal_length(hidden, d_normed)
    d_hidden, unit = _root_mean_square_norm_gradient(hidden, weight, d_normed, eps)
    return d_hidden, _norm_weight_gradient(d_normed, unit, (0,), has_weight_gradient)


@formula(whole=("weight",))
def carried_rms_norm_gradient(
    stream: torch.Tensor,
    weight: torch.Tensor,
    d_normed: torch.Tensor,
    d_stream: torch.Tensor,
    eps: float,
    has_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm_gradient` where the residual stream [R, D] goes on beside the norm and has a gradient of its own."""
    have_equal_length(stream, d_normed, d_stream)
    d_hidden, unit = _root_mean_square_norm_gradient(stream, weight, d_normed, eps, d_stream)
    return d_hidden, _norm_weight_gradient(d_normed, unit, (0,), has_weight_gradient)


def _split_heads(stacked: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fused projection [R, G, M K] as queries [R, G, M - 2, K], keys [R, G, K] and values [R, G, K]."""
    heads = stacked.unflatten(-1, (-1, head_dim))
    return heads[:, :, :-2], heads[:, :, -2], heads[:, :, -1]


def _pairs(heads: torch.Tensor, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that turn together: neighbours, or those of the two halves."""
    if is_interleaved:
        return heads[..., ::2], heads[..., 1::2]
    first, second = heads.chunk(2, dim=-1)
    return first, second


def _join(first: torch.Tensor, second: torch.Tensor, is_interleaved: bool) -> torch.Tensor:
    """The inverse of `_pairs`."""
    if is_interleaved:
        return torch.stack([first, second], dim=-1).flatten(-2)
    return torch.cat([first, second], dim=-1)


def _turn(heads: torch.Tensor, table: torch.Tensor, is_interleaved: bool, is_back: bool = False) -> torch.Tensor:
    """Turns every pair of channels of [R, .., K] by the angles of `table` [R, K], or back."""
    table = table.view(-1, *([1] * (heads.dim() - 2)), table.shape[-1])
    cosine, sine = table.chunk(2, dim=-1)
    first, second = _pairs(heads, is_interleaved)
    if is_back:
        return _join(first * cosine + second * sine, second * cosine - first * sine, is_interleaved)
    return _join(first * cosine - second * sine, second * cosine + first * sine, is_interleaved)


@formula()
def turn_heads(stacked: torch.Tensor, table: torch.Tensor, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions of queries and keys.

    Args:
        stacked: [R, G, M K], the fused projection: of every group its queries, its key and its value.
        table: [R, K], of `positions.rotary_table`.
        is_interleaved: whether neighbouring channels turn together, rather than those of the two halves.

    Returns:
        (queries [R, N, K], keys [R, G, K]).
    """
    have_equal_length(stacked, table)
    query, key, _ = _split_heads(stacked, table.shape[-1])
    return _turn(query, table, is_interleaved).flatten(1, 2), _turn(key, table, is_interleaved)


@formula(whole=("query_weight", "key_weight"))
def norm_turn_heads(
    stacked: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    eps: float,
    is_interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`turn_heads` after a root-mean-square norm of every query and key, with weights [K]."""
    have_equal_length(stacked, table)
    query, key, _ = _split_heads(stacked, table.shape[-1])
    query = _root_mean_square_norm(query, query_weight, eps)
    key = _root_mean_square_norm(key, key_weight, eps)
    return _turn(query, table, is_interleaved).flatten(1, 2), _turn(key, table, is_interleaved)


def _stack_heads(d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor) -> torch.Tensor:
    """The inverse of `_split_heads`."""
    return torch.cat([d_query, d_key[:, :, None], d_value[:, :, None]], dim=2).flatten(2)


@formula()
def turn_heads_gradient(
    table: torch.Tensor, d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor, is_interleaved: bool
) -> torch.Tensor:
    """Gradient [R, G, M K] of the fused projection, of those of queries [R, N, K], keys and values [R, G, K]."""
    have_equal_length(table, d_query, d_key, d_value)
    d_query = _turn(d_query.unflatten(1, (d_key.shape[1], -1)), table, is_interleaved, is_back=True)
    return _stack_heads(d_query, _turn(d_key, table, is_interleaved, is_back=True), d_value)


@formula(whole=("query_weight", "key_weight"))
def norm_turn_heads_gradient(
    stacked: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    d_query: torch.Tensor,
    d_key: torch.Tensor,
    d_value: torch.Tensor,
    eps: float,
    is_interleaved: bool,
    has_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `norm_turn_heads` and of the values: of the fused projection and of the two weights [K].

    The latter are empty unless they are asked for.
    """
    have_equal_length(stacked, table, d_query, d_key, d_value)
    query, key, _ = _split_heads(stacked, table.shape[-1])
    d_query = _turn(d_query.unflatten(1, (d_key.shape[1], -1)), table, is_interleaved, is_back=True)
    d_key = _turn(d_key, table, is_interleaved, is_back=True)
    d_unturned_query, query_unit = _root_mean_square_norm_gradient(query, query_weight, d_query, eps)
    d_unturned_key, key_unit = _root_mean_square_norm_gradient(key, key_weight, d_key, eps)
    return (
        _stack_heads(d_unturned_query, d_unturned_key, d_value),
        _norm_weight_gradient(d_query, query_unit, (0, 1, 2), has_weight_gradient),
        _norm_weight_gradient(d_key, key_unit, (0, 1), has_weight_gradient),
    )


@formula()
def swiglu(stacked: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the two halves of the last axis, [R, 2 H] -> [R, H]."""
    gate, up = stacked.chunk(2, dim=-1)
    return functional.silu(gate) * up


@formula()
def swiglu_gradient(stacked: torch.Tensor, d_product: torch.Tensor) -> torch.Tensor:
    """Gradient of `swiglu`, [R, 2 H]."""
    have_equal_length(stacked, d_product)
    gate, up = stacked.chunk(2, dim=-1)
    d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
    return torch.cat([d_gate, d_product * functional.silu(gate)], dim=-1)


def _layer_norm(
    hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(normalised, mean, reciprocal of the deviation)."""
    return torch.native_layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)


@formula(whole=("weight", "bias"))
def modulated_norm(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Layer norm of [R, D], with weight and bias [D] or without, times 1 + scale [R, D], plus shift [R, D]."""
    have_equal_length(hidden, scale, shift)
    return _layer_norm(hidden, weight, bias, eps)[0] * (1 + scale) + shift


@formula(whole=("weight", "bias"))
def modulated_norm_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    d_modulated: torch.Tensor,
    d_stream: torch.Tensor | None,
    eps: float,
    has_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `modulated_norm`: of hidden and scale [R, D], weight and bias [D]; that of shift is `d_modulated`.

    `d_stream` [R, D] is the gradient of what goes on beside the norm. Those of weight and bias are empty unless they
    are asked for.
    """
    have_equal_length(hidden, scale, d_modulated, d_stream)
    return _modulated_norm_gradient(hidden, weight, bias, scale, d_modulated, d_stream, eps, has_weight_gradient)


def _modulated_norm_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    d_modulated: torch.Tensor,
    d_stream: torch.Tensor | None,
    eps: float,
    has_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    normed, mean, inverse = _layer_norm(hidden, weight, bias, eps)
    d_hidden, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_modulated * (1 + scale),
        hidden,
        hidden.shape[-1:],
        mean,
        inverse,
        weight,
        bias,
        [True, has_weight_gradient, has_weight_gradient],
    )
    if d_stream is not None:
        d_hidden = d_stream + d_hidden
    if not has_weight_gradient:
        d_weight, d_bias = hidden.new_empty(0), hidden.new_empty(0)
    return d_hidden, d_modulated * normed, d_weight, d_bias


@formula()
def gated_add(stream: torch.Tensor, gate: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """The residual stream plus what is added times its gate; all [R, D]."""
    have_equal_length(stream, gate, added)
    return stream + gate * added


@formula()
def gated_add_gradient(
    gate: torch.Tensor, added: torch.Tensor, d_total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and addend in `gated_add`; that of the stream is `d_total`."""
    have_equal_length(gate, added, d_total)
    return d_total * added, d_total * gate


@formula(whole=("weight", "bias"))
def gated_add_norm(
    stream: torch.Tensor,
    gate: torch.Tensor,
    added: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`gated_add`, its `modulated_norm`)."""
    have_equal_length(stream, gate, added, scale, shift)
    total = stream + gate * added
    return total, _layer_norm(total, weight, bias, eps)[0] * (1 + scale) + shift


@formula(whole=("weight", "bias"))
def gated_add_norm_gradient(
    total: torch.Tensor,
    gate: torch.Tensor,
    added: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    d_modulated: torch.Tensor,
    d_stream: torch.Tensor,
    eps: float,
    has_weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `gated_add_norm`: of stream, gate, addend and scale [R, D], weight and bias [D].

    Those of weight and bias are empty unless they are asked for.
    """
    have_equal_length(total, gate, added, scale, d_modulated, d_stream)
    d_total, d_scale, d_weight, d_bias = _modulated_norm_gradient(
        total, weight, bias, scale, d_modulated, d_stream, eps, has_weight_gradient
    )
    return d_total, d_total * added, d_total * gate, d_scale, d_weight, d_bias


def _masked_logits(logits: torch.Tensor, num_entries: int) -> torch.Tensor:
    """A copy of logits [R, V] in float32, those of padding rows of the table minus infinity."""
    is_entry = torch.arange(logits.shape[-1], device=logits.device) < num_entries
    return logits.to(torch.float32, copy=True).masked_fill_(~is_entry, float("-inf"))


@formula()
def largest_logit(logits: torch.Tensor, num_entries: int) -> torch.Tensor:
    """The largest of the first `num_entries` of the logits [R, V] of a rank; float32 [R]."""
    return _masked_logits(logits, num_entries).amax(-1)


@formula()
def exponential_sums(
    logits: torch.Tensor, targets: torch.Tensor, largest: torch.Tensor, first_entry: int, num_entries: int
) -> torch.Tensor:
    """A rank's terms of the cross-entropy.

    Args:
        logits: [R, V], of the entries that the rank has.
        targets: int64 [R], of all entries.
        largest: float32 [R], the largest logit on any rank.
        first_entry: the first entry of the rank.
        num_entries: how many of its rows are entries; the others are padding.

    Returns:
        float32 [R, 2]: the sum of exp(logit - largest), and the target's logit - largest, 0 where the target is on
        another rank.
    """
    have_equal_length(logits, targets, largest)
    shifted = _masked_logits(logits, num_entries).sub_(largest[:, None])
    local = targets - first_entry
    is_here = (local >= 0) & (local < logits.shape[-1])
    at_target = shifted.gather(1, torch.where(is_here, local, 0)[:, None])[:, 0]
    return torch.stack([shifted.exp_().sum(-1), torch.where(is_here, at_target, 0.0)], dim=-1)


@formula(rewritten="logits")
def cross_entropy_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    d_loss: torch.Tensor,
    first_entry: int,
    num_entries: int,
) -> None:
    """Writes the gradient of the cross-entropy in place of the logits [R, V].

    Args:
        logits: as in `exponential_sums`.
        targets: likewise.
        largest: likewise.
        total: float32 [R], the sum of the exponentials of all ranks.
        d_loss: float32 [R], gradient of each target's loss.
        first_entry: as in `exponential_sums`.
        num_entries: likewise.
    """
    have_equal_length(logits, targets, largest, total, d_loss)
    # Changed in place: uncompiled, every copy of the logits would count.
    shares = _masked_logits(logits, num_entries).sub_(largest[:, None]).exp_().div_(total[:, None])
    is_target = torch.arange(logits.shape[-1], device=logits.device) == (targets - first_entry)[:, None]
    logits.copy_(shares.sub_(is_target.float()).mul_(d_loss[:, None]))
