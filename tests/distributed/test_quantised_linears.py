"""Frozen linears in few bits: one process against the weights that the codes mean, and layouts against one process."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.adaptable import linears_of
from bitdance_scale.model.published_names import our_tensors
from bitdance_scale.model.quantised import can_quantise
from tests.distributed.layout_run import RankRecord, assemble, make_engine, train
from tests.distributed.spawn import run_ranks
from tests.distributed.test_layouts import BOUND, MEGATRON, SP, Layout
from tests.distributed.test_lora_layouts import ADAPTER_BOUND
from tests.distributed.toy import VOCAB_SIZE

NUM_STEPS = 2
NUM_QUANTISED = 2 * 4 + 2 * 4 + 1 + 2 + 2 + 1
"""Linears of two layers and of two blocks of the head, its modulation, final layer, time and condition.

Left out is what takes the eight bits."""


def quantised_config(layout: Layout, bits: int, dtype: str = "float32") -> RunConfig:
    """Two layers whose linears are made of whole blocks on two tensor-parallel ranks."""
    config = layout.config(dtype)
    model = dataclasses.replace(config.model, num_layers=2, hidden_size=128, num_heads=4, head_dim=32, ffn_size=128)
    head = dataclasses.replace(config.head, width=128, head_dim=32, mlp_ratio=1.0)
    lora = LoraSection(rank=3, targets=("q_proj", "down_proj", "head.*.w1"), base_bits=bits, train_queries=True)
    return dataclasses.replace(config, model=model, head=head, lora=lora)


def _run(layout: Layout, bits: int, dtype: str = "float32") -> list[RankRecord]:
    config = quantised_config(layout, bits, dtype)
    return run_ranks(layout.num_ranks, train, config, layout.num_micro, NUM_STEPS, True, timeout_s=240)


@functools.cache
def reference() -> RankRecord:
    return _run(Layout(1, 1, {}), 4)[0]


@pytest.mark.parametrize(("bits", "recompute", "dtype"), [(4, "none", "float32"), (8, "selective", "bfloat16")])
def test_products_are_those_of_the_weights_that_the_codes_mean(bits, recompute, dtype):
    """Bit for bit: losses, and the gradients that have passed through the quantised linears."""
    found = _run(Layout(1, 2, {"recompute": recompute}), bits, dtype)[0]
    plain = quantised_config(Layout(1, 2, {"recompute": recompute}), 16, dtype)
    expected = run_ranks(1, _train_rounded, plain, bits, timeout_s=240)[0]
    assert found.losses == expected.losses
    assert found.gradients.keys() == expected.gradients.keys()
    for name, wanted in assemble([expected], "gradients").items():
        assert torch.equal(assemble([found], "gradients")[name], wanted), name
    exact = run_ranks(1, train, plain, 2, 1, True, timeout_s=240)[0]
    assert exact.losses[0] != found.losses[0], "nothing was quantised"


def _train_rounded(rank: int, config: RunConfig, bits: int) -> RankRecord:
    """`train` on weights of the run's dtype that are what the codes mean."""
    from unittest import mock

    from bitdance_scale.parallel.quantised_linears import QuantisedWeight
    from tests.distributed import layout_run

    def rounded(config: RunConfig) -> tuple[object, object]:
        engine, topology = make_engine(config)
        num_rounded = 0
        for name, (parameter, placement) in engine.parameters.items():
            is_frozen = name not in engine.trained and (".linear_" in name or name.startswith("head."))
            if is_frozen and can_quantise(placement.global_shape):
                base = QuantisedWeight(name, placement, parameter.dtype, parameter.device, bits, False)
                base.keep(parameter.data)
                parameter.data.copy_(base.whole())
                num_rounded += 1
        assert num_rounded == NUM_QUANTISED
        return engine, topology

    with mock.patch.object(layout_run, "make_engine", rounded):
        return train(rank, config, 2, NUM_STEPS, True)


LAYOUTS = [
    Layout(1, 2, {"recompute": "full"}),
    Layout(2, 2, {"zero_stage": 2, "recompute": "selective"}),
    Layout(2, 2, {"tensor": 2, "recompute": "full"} | SP),
    Layout(2, 4, {"pipeline": 2}),
    Layout(2, 2, {"tensor": 2} | SP | MEGATRON),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_equals_one_process(layout: Layout) -> None:
    records, expected = _run(layout, 4), reference()
    found, wanted = assemble(records, "gradients"), assemble([expected], "gradients")
    assert found.keys() == wanted.keys()
    for name in wanted:
        error = float((found[name] - wanted[name]).norm() / wanted[name].norm())
        assert error < ADAPTER_BOUND, f"{name}: {error:.1e}"
    for record in records:
        assert [pytest.approx(losses, rel=BOUND) for losses in expected.losses] == record.losses


def test_what_is_held() -> None:
    """Half a byte per weight and two bytes for 64; of a weight nothing else is kept, of the input neither."""
    held = run_ranks(1, _held, quantised_config(Layout(1, 1, {}), 4, "bfloat16"))[0]
    assert held["quantised"] == held["elements"] // 2 + 2 * held["elements"] // 64 + NUM_QUANTISED * 16 * 4
    assert held["kept"] == 0


def _held(rank: int, config: RunConfig) -> dict[str, int]:
    from bitdance_scale.parallel.quantised_linears import quantised_weights

    engine, _ = make_engine(config)
    bases = quantised_weights(engine.stages[0])
    linears = [tensor for tensor in our_tensors(config.network, VOCAB_SIZE) if linears_of(tensor)]
    quantised = {tensor.name: tensor.shape for tensor in linears if can_quantise(tensor.shape)}
    assert {base.name: base.placement.global_shape for base in bases} == quantised
    assert not quantised.keys() & engine.parameters.keys()
    linear = engine.stages[0].decoder.layers[0].mlp.linear_fc1
    kept: list[torch.Tensor] = []
    hidden = torch.randn(3, 1, 128, dtype=torch.bfloat16, requires_grad=True)
    # Hooks within those of the linear would hide these.
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda item: item):
        output = linear(hidden)[0]
    output.sum().backward()
    expected = torch.ones(3, 1, 256, dtype=torch.bfloat16) @ linear.base.whole()
    assert torch.equal(hidden.grad, expected), "the weight is there again in the backward pass"
    assert linear.weight is None
    return {
        "elements": sum(map(math.prod, quantised.values())),
        "quantised": sum(buffer.nbytes for base in bases for buffer in base.buffers()),
        "kept": len(kept),
    }
