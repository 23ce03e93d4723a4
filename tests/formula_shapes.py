"""Arguments of the fused formulas (`bitdance_scale/model/fused.py`) as the 14B networks call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def argument_dtype(name: str, argument: str) -> torch.dtype:
    """The dtype of a tensor among the arguments of a formula."""
    if argument == "codes_RX":
        return torch.int8 if name == "from_integers" else torch.uint8
    return {"targets": torch.int64, "levels_L": torch.float32}.get(argument, torch.bfloat16)


def example_shapes(num_positions: int) -> Mapping[str, dict[str, Any]]:
    """Arguments of every formula as the 14B networks call it at 4 tensor-parallel ranks.

    Args:
        num_positions: R, of a pack; norms between the split linears have a quarter of them.

    Returns:
        by name of the formula: its arguments by name, a shape for a tensor and the value itself for anything else.
    """
    rows, part = num_positions, num_positions // 4
    stream, heads, ffn = (part, 5120), (rows, 2, 7 * 128), (rows, 4352)
    query, key, token = (rows, 10, 128), (rows, 2, 128), (rows, 5120)
    eps, vocabulary = 1e-6, (rows, 37985)
    norm = {"weight": (5120,), "eps": eps}
    trained = {"has_weight_gradient": True}
    turn = {"table": (rows, 128), "is_interleaved": False}
    weights = {"query_weight": (128,), "key_weight": (128,), "eps": eps}
    d_heads = {"d_query": query, "d_key": key, "d_value": key}
    modulation = {"weight": (5120,), "bias": (5120,), "scale": token, "eps": eps}
    logits = {"logits": vocabulary, "num_entries": 37985}
    targets = {"targets": (rows,), "largest": (rows,), "first_entry": 0}
    return {
        "rms_norm": {"hidden": stream, **norm},
        "add_rms_norm": {"stream": stream, "added": stream, **norm},
        "rms_norm_gradient": {"hidden": stream, "d_normed": stream, **norm, **trained},
        "carried_rms_norm_gradient": {"stream": stream, "d_normed": stream, "d_stream": stream, **norm, **trained},
        "turn_heads": {"stacked": heads, **turn},
        "norm_turn_heads": {"stacked": heads, **turn, **weights},
        "turn_heads_gradient": {**turn, **d_heads},
        "norm_turn_heads_gradient": {"stacked": heads, **turn, **weights, **d_heads, **trained},
        "swiglu": {"stacked": (rows, 2 * 4352)},
        "swiglu_gradient": {"stacked": (rows, 2 * 4352), "d_product": ffn},
        "modulated_norm": {"hidden": token, "shift": token, **modulation},
        "modulated_norm_gradient": {
            "hidden": token,
            "d_modulated": token,
            "d_stream": token,
            **modulation,
            **trained,
        },
        "gated_add": {"stream": token, "gate": token, "added": token},
        "gated_add_gradient": {"gate": token, "added": token, "d_total": token},
        "gated_add_norm": {"stream": token, "gate": token, "added": token, "shift": token, **modulation},
        "gated_add_norm_gradient": {
            "total": token,
            "gate": token,
            "added": token,
            "d_modulated": token,
            "d_stream": token,
            **modulation,
            **trained,
        },
        "largest_logit": logits,
        "exponential_sums": {**logits, **targets},
        # A block of 64 inputs of a frozen linear is a row.
        "from_integers": {"codes_RX": (rows, 64), "scales_R": (rows,)},
        "from_nf4": {"codes_RX": (rows, 32), "scales_R": (rows,), "levels_L": (16,)},
        "cross_entropy_gradient": {**logits, **targets, "total": (rows,), "d_loss": (rows,)},
    }
