"""The class-conditional network: every layout against one process, in float32, as `test_layouts.py` has it."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from bitdance_scale.config.schema import RunConfig
from tests.distributed.class_toy import class_config
from tests.distributed.layout_run import RankRecord, assemble, train
from tests.distributed.spawn import run_ranks

# As in `test_layouts.py`: float32 sums in another order, and activations that tensor parallelism rounds differently.
BOUND, ACTIVATION_BOUND = 1e-6, 3e-6
NUM_STEPS = 2
TP, PP, SP = {"tensor": 2}, {"pipeline": 2}, {"sequence_parallel": True}
# (ranks, micro-batches, parallel, p, attention)
LAYOUTS = [
    (1, 2, {"recompute": "full"}, 2, "flex"),
    (2, 2, {}, 1, "dense"),
    (2, 2, {"zero_stage": 2, "recompute": "full"}, 2, "dense"),
    (2, 2, {"zero_stage": 3}, 2, "dense"),
    (2, 4, TP, 1, "dense"),
    (2, 4, TP | SP, 2, "dense"),
    (4, 2, TP | SP | {"zero_stage": 3}, 2, "dense"),
    (4, 2, TP | {"zero_stage": 2}, 1, "dense"),
    (2, 4, PP, 1, "dense"),
    (3, 3, {"pipeline": 3, "virtual_stages": 2}, 2, "dense"),
    (4, 4, TP | PP | SP, 2, "dense"),
    (2, 4, TP | SP | {"recompute": "selective"}, 2, "flex"),
]


def _config(parallel: dict[str, object], block_side: int, attention: str, num_layers: int) -> RunConfig:
    config = class_config(block_side, **parallel)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention=attention, num_layers=num_layers)
    )


@functools.cache
def _reference(block_side: int, num_layers: int) -> RankRecord:
    return run_ranks(1, train, _config({}, block_side, "dense", num_layers), 1, NUM_STEPS)[0]


@pytest.mark.parametrize(
    ("num_ranks", "num_micro", "parallel", "block_side", "attention"),
    LAYOUTS,
    ids=["-".join([f"{layout[0]}x{layout[1]}", *map(str, layout[2].values()), f"p{layout[3]}"]) for layout in LAYOUTS],
)
def test_layout_equals_one_process(num_ranks, num_micro, parallel, block_side, attention):
    num_layers = 6 if "virtual_stages" in parallel else 4
    config = _config(parallel, block_side, attention, num_layers)
    records = run_ranks(num_ranks, train, config, num_micro, NUM_STEPS, timeout_s=240)
    reference = _reference(block_side, num_layers)
    expected, found = assemble([reference], "gradients"), assemble(records, "gradients")
    assert found.keys() == expected.keys()
    bound = ACTIVATION_BOUND if "tensor" in parallel or attention == "flex" else BOUND
    for name, gradient in expected.items():
        assert gradient.any(), f"{name} has no gradient"
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < bound, f"{name}: {error:.1e}"
    for record in records:
        for losses, wanted in zip(record.losses, reference.losses, strict=True):
            assert losses == pytest.approx(wanted, rel=BOUND)
        assert record.grad_norms == pytest.approx(reference.grad_norms, rel=BOUND)


def test_the_parts_of_the_network():
    """Nothing of the text-to-image network is left, and single tokens have no attention in the head."""
    names = {side: _reference(side, 4).shapes for side in (1, 2)}
    assert names[2]["embedding.weight"] == (6 * 3 + 3, 64) and names[1]["embedding.weight"] == (6 * 3, 64)
    assert names[2]["head_positions.weight"] == (16, 64) and names[2]["input_norm.weight"] == (64,)
    assert not [name for name in names[2] if "output" in name or "q_layernorm" in name or "fc1.bias" in name]
    assert "head.net.res_blocks.0.attn.wo.weight" in names[2] and "head.net.res_blocks.0.norm.weight" in names[1]
