"""Adapters under every kind of layout against one process, and one process against the gradients of whole weights.

Of two of the stacked linears in a layer only some parts have adapters. Dropout, averages, the projector and the query
tokens take part.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import RunConfig
from tests.distributed.layout_run import RankRecord, assemble, train
from tests.distributed.spawn import run_ranks
from tests.distributed.test_layouts import BOUND, MEGATRON, NUM_STEPS, SP, Layout, params
from tests.distributed.toy import VOCAB_SIZE

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "head.*")
# Gradients of adapters are products of two small matrices, and a projector's bias sums over all cells: both round more
# than those of whole weights. Up to 3.4e-6 was measured, the most on processors with AVX-512.
ADAPTER_BOUND = 8e-6
LORA = LoraSection(
    rank=3, alpha=6.0, dropout=0.25, targets=TARGETS, train_projector=True, train_queries=True, rank_stabilized=True
)


def lora_config(layout: Layout, lora: LoraSection = LORA, dtype: str = "float32") -> RunConfig:
    config = layout.config(dtype)
    return dataclasses.replace(config, lora=lora, optim=dataclasses.replace(config.optim, average_decay=0.5))


@functools.cache
def reference(is_tied: bool = False, num_kv_heads: int = 2) -> RankRecord:
    """One process, one pack of all samples."""
    return _run(Layout(1, 1, {}, is_tied, num_kv_heads))[0]


def _run(layout: Layout, lora: LoraSection = LORA, dtype: str = "float32") -> list[RankRecord]:
    config = lora_config(layout, lora, dtype)
    return run_ranks(layout.num_ranks, train, config, layout.num_micro, NUM_STEPS, True, timeout_s=240)


LAYOUTS = [
    Layout(1, 4, {"recompute": "full"}),
    Layout(1, 2, {"recompute": "selective"}, is_large=True),
    Layout(2, 2, {"zero_stage": 1}, is_large=True),
    Layout(2, 4, {"zero_stage": 2}),
    Layout(2, 2, {"zero_stage": 3}),
    Layout(2, 4, {"tensor": 2}),
    Layout(2, 2, {"tensor": 2, "recompute": "full"} | SP, is_large=True),
    Layout(4, 2, {"tensor": 2, "zero_stage": 2, "recompute": "selective"} | SP, is_large=True),
    Layout(4, 2, {"tensor": 2, "zero_stage": 3} | SP),
    Layout(4, 4, {"tensor": 4} | SP, num_kv_heads=4, is_large=True),
    Layout(2, 4, {"pipeline": 2}, is_tied=True),
    Layout(2, 4, {"pipeline": 2, "virtual_stages": 2, "recompute": "full"}),
    Layout(4, 4, {"pipeline": 2, "tensor": 2, "recompute": "selective"} | SP),
    Layout(2, 2, MEGATRON, is_large=True),
    Layout(4, 2, {"tensor": 2} | SP | MEGATRON, is_large=True),
    Layout(4, 4, {"pipeline": 2, "tensor": 2} | SP | MEGATRON, is_tied=True),
]


@pytest.mark.parametrize("layout", params(LAYOUTS))
def test_layout_equals_one_process(layout: Layout) -> None:
    """Losses, norms and averages of three steps, and every first gradient."""
    records, expected = _run(layout), reference(layout.is_tied, layout.num_kv_heads)
    for field in ("gradients", "averages"):
        found, wanted = assemble(records, field), assemble([expected], field)
        assert found.keys() == wanted.keys()
        for name in wanted:
            error = float((found[name] - wanted[name]).norm() / wanted[name].norm())
            assert error < ADAPTER_BOUND, f"{field} of {name}: {error:.1e}"
    for record in records:
        for step, losses in enumerate(record.losses):
            assert losses == pytest.approx(expected.losses[step], rel=BOUND), f"step {step}"
        assert record.grad_norms == pytest.approx(expected.grad_norms, rel=BOUND)


@pytest.mark.parametrize("engine", [{}, MEGATRON], ids=["deepspeed", "megatron"])
def test_stages_without_adapters(engine: dict[str, object]) -> None:
    """The first two of four stages have none, and pass no gradient; every rank has two stages."""
    lora = dataclasses.replace(LORA, targets=("layers.[23].*",), train_projector=False, train_queries=False)
    expected = _run(Layout(1, 1, {}), lora)[0]
    records = _run(Layout(2, 4, {"pipeline": 2, "virtual_stages": 2} | engine), lora)
    found, wanted = assemble(records, "gradients"), assemble([expected], "gradients")
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-8), name
    assert records[1].losses == [pytest.approx(losses, rel=BOUND) for losses in expected.losses]


def test_what_is_trained() -> None:
    names = set(reference().shapes)
    layer = "decoder.layers.2."
    assert {name for name in names if name.startswith(layer)} == {
        f"{layer}{linear}.adapter.{part}_lora_{matrix}"
        for linear, parts in {
            "self_attention.linear_qkv": ("q_proj", "v_proj"),
            "self_attention.linear_proj": ("o_proj",),
            "mlp.linear_fc1": ("gate_proj",),
            "mlp.linear_fc2": ("down_proj",),
        }.items()
        for part in parts
        for matrix in "AB"
    }
    assert {"projector.fc1.weight", "projector.fc2.bias", "query_deltas.weight"} <= names
    assert {name for name in names if name.startswith("head.") and "time_embed" in name} == {
        f"head.net.time_embed.mlp.{number}.adapter.{number}_lora_{matrix}" for number in (0, 2) for matrix in "AB"
    }
    assert not any(name.startswith(("embedding.", "output.")) or name.endswith("norm.weight") for name in names)
    assert reference().shapes[f"{layer}self_attention.linear_qkv.adapter.v_proj_lora_B"] == (32, 3)


def test_dropout_is_at_work() -> None:
    without = _run(Layout(1, 1, {}), dataclasses.replace(LORA, dropout=0.0))[0]
    assert without.losses[0] != reference().losses[0]


def test_gradients_are_those_of_the_whole_weights() -> None:
    """In one process: dA = scale B^T dW and dB = scale dW A^T, of a run that trains W + scale B A itself."""
    lora = dataclasses.replace(LORA, dropout=0.0, train_queries=False, targets=(*TARGETS, "k_proj", "up_proj"))
    config = lora_config(Layout(1, 1, {}), lora)
    record, whole = run_ranks(1, train, config, 1, 1, True)[0], run_ranks(1, _train_merged, config)[0]
    assert record.losses[0] == pytest.approx(whole.losses[0], rel=BOUND)
    found, expected = (assemble([item], "gradients") for item in (record, whole))
    checked = 0
    for name, gradient in found.items():
        if ".adapter." not in name:
            assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-7), name
            continue
        error = float((gradient - expected[name]).norm() / expected[name].norm())
        assert error < ADAPTER_BOUND, f"{name}: {error:.1e}"
        checked += 1
    assert checked == 2 * (4 * 7 + 4 * 2 + 1 + 4 + 2)


def _train_merged(rank: int, config: RunConfig) -> RankRecord:
    """What a step on the merged weights says the gradients of the adapters are."""
    from bitdance_scale.model.adaptable import linears_of
    from bitdance_scale.model.low_rank import matrix_names, merged
    from bitdance_scale.model.published_names import our_tensors
    from bitdance_scale.parallel.build import build_stages, engine_of
    from bitdance_scale.parallel.parameter_names import name_parameters
    from bitdance_scale.parallel.step import accumulate_gradients, count_targets
    from tests.distributed.layout_run import make_engine, step_inputs

    engine, topology = make_engine(config)
    with_adapters = {name: located.parameter for name, located in engine.parameters.items()}
    plain = dataclasses.replace(config, lora=LoraSection())
    stages = build_stages(plain, VOCAB_SIZE, topology)
    weights = {name: located.parameter for name, located in name_parameters(stages, topology).items()}
    parts = []
    for tensor in our_tensors(config.network, VOCAB_SIZE):
        weight = weights[tensor.name].data
        weight.copy_(with_adapters[tensor.name].data)
        for linear in linears_of(tensor):
            prefix = f"{tensor.name.removesuffix('weight')}adapter."
            names = [prefix + name for name in matrix_names(linear.key)]
            rows = [
                row
                for shared in sorted(tensor.rows, key=lambda item: item.published_start)
                if shared.published == linear.published
                for row in range(shared.start, shared.start + shared.num_rows)
            ]
            a, b = (with_adapters[name].data for name in names)
            weight[rows] = merged(weight[rows], a, b, config.lora.scale)
            parts.append((tensor.name, rows, *names))
    engine = engine_of(stages, plain, topology)
    batch = step_inputs(plain, topology, 1, 0, True)
    losses = accumulate_gradients(engine, batch, count_targets(batch, topology), config.loss, topology)
    whole = RankRecord([(losses.total, losses.vision, losses.text)], [], {}, {}, {})
    for name in engine.parameters:
        gradient = engine.gradient(name)
        whole.gradients[name], whole.shapes[name] = [((0,) * gradient.ndim, gradient)], tuple(gradient.shape)
    for name, rows, name_a, name_b in parts:
        gradient = engine.gradient(name)[rows]
        a, b = (with_adapters[name].data for name in (name_a, name_b))
        for matrix, value in ((name_a, b.t() @ gradient), (name_b, gradient @ a.t())):
            whole.gradients[matrix] = [((0, 0), config.lora.scale * value)]
            whole.shapes[matrix] = tuple(value.shape)
    return whole
