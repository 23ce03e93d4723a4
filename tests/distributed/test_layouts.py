"""Every layout against one process: losses of three steps and every parameter's first gradient, in float32.

`python -m tests.distributed.test_layouts` prints the table of docs/engines.md.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from bitdance_scale.config import parallel_rules
from bitdance_scale.config.schema import RunConfig
from tests.distributed.layout_run import RankRecord, assemble, train
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import lopsided_packs, toy_config

# float32 sums in another order: eps is 1.2e-7, and chains of sums amplify it a few times. A missing or doubled
# reduction shows at 1e-2 and more.
BOUND = 1e-6
# Tensor parallelism sums the products of split linears by ranks, and FlexAttention sums over all keys at once: not only
# gradients but the activations of every layer round differently, which four layers amplify to 1.7e-6 (measured).
ACTIVATION_BOUND = 3e-6
# The gradient of a query or key norm is one short vector summed over all positions and heads, whose terms cancel to a
# 17th of their size (measured on layer 2 of the toy). Tensor parallelism adds it up by heads and ZeRO-3 by
# micro-batches of each rank, instead of in one sweep; 17 eps is 2e-6.
HEAD_NORM_BOUND = 4e-6
HEAD_NORM = re.compile(r"\.[qk]_layernorm\.weight$")
NUM_STEPS = 3


@dataclass(frozen=True)
class Layout:
    """A layout of the toy model; all of them train on the same sixteen samples.

    Attributes:
        num_ranks: processes.
        num_micro: micro-batches per replica (gradient accumulation).
        parallel: settings of `parallel`.
        is_tied, num_kv_heads, num_layers: of the model; tensor parallelism over four ranks needs four key/value heads.
        attention: form of the mask; one process always computes with the dense one.
        is_large: in `make test-large`; every part of it is in other layouts, too.
    """

    num_ranks: int
    num_micro: int
    parallel: dict[str, object]
    is_tied: bool = False
    num_kv_heads: int = 2
    num_layers: int = 4
    attention: str = "dense"
    is_large: bool = False

    def config(self, dtype: str = "float32") -> RunConfig:
        config = toy_config(**self.parallel)
        model = dataclasses.replace(
            config.model,
            tie_embeddings=self.is_tied,
            num_kv_heads=self.num_kv_heads,
            num_layers=self.num_layers,
            attention=self.attention,
        )
        return dataclasses.replace(config, model=model, run=dataclasses.replace(config.run, dtype=dtype))

    @property
    def num_replicas(self) -> int:
        return self.num_ranks // (self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1))

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.parallel.items()]
        words += ["tied"] if self.is_tied else []
        words += ["flex"] if self.attention == "flex" else []
        return " ".join([f"ranks={self.num_ranks} data={self.num_replicas} micro={self.num_micro}", *words])


def _tp(**more: object) -> dict[str, object]:
    return {"tensor": 2} | more


def _pp(**more: object) -> dict[str, object]:
    return {"pipeline": 2} | more


SP = {"sequence_parallel": True}
# Weights come and go all the time.
FEW_LIVE = {"prefetch_elements": 8000, "live_elements": 20000, "persistent_elements": 100}
MEGATRON = {"optimizer": "megatron"}
LAYOUTS = [
    Layout(1, 8, {}),
    Layout(1, 2, {"recompute": "selective"}),
    Layout(1, 4, {"recompute": "full"}),
    Layout(2, 2, {}),
    Layout(4, 2, {}),
    Layout(2, 4, {"zero_stage": 2}),
    Layout(4, 1, {"zero_stage": 2, "recompute": "full"}),
    # Many buckets, and weights that are larger than one.
    Layout(2, 4, {"zero_stage": 2, "reduce_bucket_elements": 5000}),
    Layout(2, 2, {"zero_stage": 3}),
    Layout(2, 2, {"zero_stage": 3, "reduce_bucket_elements": 5000} | FEW_LIVE),
    Layout(4, 2, {"zero_stage": 3, "recompute": "full"}, is_large=True),
    Layout(2, 4, _tp()),
    Layout(2, 4, _tp(**SP)),
    Layout(2, 2, _tp(**SP, recompute="selective")),
    Layout(2, 2, _tp(**SP, recompute="full")),
    Layout(4, 4, {"tensor": 4} | SP, num_kv_heads=4),
    Layout(4, 2, _tp(), is_large=True),
    Layout(4, 2, _tp(**SP)),
    Layout(4, 2, _tp(**SP, zero_stage=2, recompute="selective")),
    Layout(4, 2, _tp(**SP, zero_stage=3)),
    Layout(4, 2, _tp(zero_stage=3, recompute="full"), is_large=True),
    Layout(2, 4, _pp(pipeline_split="even")),
    Layout(2, 4, _pp(pipeline_split=(1, 3))),
    Layout(4, 2, _pp(pipeline_split=(3, 1), recompute="full")),
    Layout(3, 4, {"pipeline": 3}),
    Layout(4, 4, {"pipeline": 4, "recompute": "selective"}),
    Layout(2, 4, {"pipeline": 2, "virtual_stages": 2}),
    Layout(2, 6, {"pipeline": 2, "virtual_stages": 3}, num_layers=6, is_large=True),
    Layout(3, 3, {"pipeline": 3, "virtual_stages": 2}, num_layers=6),
    Layout(4, 8, {"pipeline": 4, "virtual_stages": 2, "recompute": "full"}, num_layers=8),
    Layout(4, 4, _pp(**_tp(**SP))),
    Layout(4, 2, _pp(**_tp(**SP, pipeline_split=(1, 3), recompute="selective"))),
    Layout(4, 4, _pp(**_tp(**SP, recompute="full"))),
    Layout(4, 4, _pp(**_tp(**SP, virtual_stages=2))),
    Layout(2, 4, _tp(**SP), is_tied=True),
    Layout(2, 4, _pp(), is_tied=True),
    Layout(
        3, 6, {"pipeline": 3, "virtual_stages": 2, "pipeline_split": (1, 1, 2, 1, 1, 1)}, is_tied=True, num_layers=7
    ),
    Layout(4, 4, _pp(**_tp(**SP)), is_tied=True),
    Layout(2, 2, {"zero_stage": 3}, is_tied=True),
    Layout(1, 2, {"recompute": "full"}, attention="flex"),
    Layout(2, 4, _tp(**SP, recompute="selective"), attention="flex"),
    Layout(2, 4, _pp(), attention="flex"),
    Layout(1, 2, MEGATRON, is_large=True),
    Layout(2, 2, MEGATRON, is_large=True),
    Layout(4, 2, MEGATRON | {"recompute": "full"}, is_large=True),
    Layout(2, 4, _tp(**MEGATRON), is_large=True),
    Layout(4, 2, _tp(**SP, **MEGATRON)),
    Layout(2, 4, _pp(**MEGATRON), is_large=True),
    Layout(4, 4, _pp(**_tp(**SP, **MEGATRON)), is_large=True),
    Layout(3, 3, {"pipeline": 3, "virtual_stages": 2} | MEGATRON, num_layers=6),
    Layout(2, 2, MEGATRON | {"recompute": "selective"}, is_tied=True, is_large=True),
    Layout(4, 2, _pp(**MEGATRON, recompute="full"), is_tied=True),
    Layout(
        3,
        6,
        {"pipeline": 3, "virtual_stages": 2, "pipeline_split": (1, 1, 2, 1, 1, 1)} | MEGATRON,
        is_tied=True,
        num_layers=7,
        is_large=True,
    ),
    Layout(2, 2, {"zero_stage": 3, "recompute": "selective"}, attention="flex"),
    Layout(2, 2, _tp(**SP, compile=True), is_large=True),
    Layout(4, 2, _tp(**SP, compile=True, zero_stage=3, recompute="selective"), attention="flex", is_large=True),
]


@functools.cache
def reference(is_tied: bool = False, num_kv_heads: int = 2, num_layers: int = 4, dtype: str = "float32") -> RankRecord:
    """One process, one pack of all samples."""
    layout = Layout(1, 1, {}, is_tied, num_kv_heads, num_layers)
    return run_ranks(1, train, layout.config(dtype), 1, NUM_STEPS, True)[0]


def _reference_of(layout: Layout) -> RankRecord:
    return reference(layout.is_tied, layout.num_kv_heads, layout.num_layers)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _gradient_errors(layout: Layout, records: list[RankRecord]) -> dict[str, float]:
    """Relative error of every parameter's first gradient; where one process has a zero gradient, it must be zero."""
    expected = assemble([_reference_of(layout)], "gradients")
    found = assemble(records, "gradients")
    assert found.keys() == expected.keys()
    without = [name for name in expected if not expected[name].any()]
    assert not any(found[name].any() for name in without), "one process has no gradient there"
    return {name: _relative(found[name], expected[name]) for name in expected.keys() - set(without)}


def _refusals(layout: Layout) -> Iterator[str]:
    """What the rules about layouts object to; the other rules do not apply to the toy's data."""
    config = layout.config()
    for rule in parallel_rules.RULES:
        yield from rule.violations(config, layout.num_ranks)


def _run(layout: Layout) -> list[RankRecord]:
    return run_ranks(layout.num_ranks, train, layout.config(), layout.num_micro, NUM_STEPS, True, timeout_s=240)


def params(layouts: list[Layout]) -> list[object]:
    """Layouts as parameters of a test; large ones are marked."""
    return [pytest.param(item, id=str(item), marks=[pytest.mark.large] if item.is_large else []) for item in layouts]


@pytest.mark.parametrize("layout", params(LAYOUTS))
def test_layout_equals_one_process(layout: Layout) -> None:
    assert not list(_refusals(layout))
    records = _run(layout)
    for name, error in _gradient_errors(layout, records).items():
        rounds_otherwise = layout.parallel.get("tensor", 1) > 1 or layout.attention == "flex"
        bound = ACTIVATION_BOUND if rounds_otherwise else BOUND
        bound = HEAD_NORM_BOUND if HEAD_NORM.search(name) else bound
        assert error < bound, f"{name}: {error:.1e}"
    expected = _reference_of(layout)
    for record in records:
        for step, losses in enumerate(record.losses):
            assert losses == pytest.approx(expected.losses[step], rel=BOUND), f"step {step}"
        assert record.grad_norms == pytest.approx(expected.grad_norms, rel=BOUND)


def test_the_samples_are_lopsided() -> None:
    """The comparison is over packs without text targets and packs without vision targets."""
    packs = [pack for rank in range(4) for pack in lopsided_packs(rank, 4, 1, toy_config())]
    assert [len(pack.text_targets) > 0 for pack in packs] == [False, True, True, True]
    assert [len(pack.predict_positions) > 0 for pack in packs] == [True, False, True, True]
    assert len({len(pack.text_targets) for pack in packs}) == 4
    assert len({len(pack.predict_positions) for pack in packs}) > 2 and len({pack.num_positions for pack in packs}) > 2


def test_tied_embeddings_train_one_weight() -> None:
    """The gradient of a tied weight is the sum of both uses, and no second weight exists."""
    tied, untied = (assemble([reference(is_tied)], "gradients") for is_tied in (True, False))
    assert "output.weight" not in tied and "output.weight" in untied
    assert _relative(tied["embedding.weight"], untied["embedding.weight"]) > 1e-3


@pytest.mark.parametrize(
    "layout",
    params(
        [
            Layout(4, 4, _pp(**_tp(**SP, recompute="full")), is_tied=True),
            Layout(4, 2, _pp(), is_large=True),
            Layout(2, 2, {"zero_stage": 2}),
            Layout(4, 2, _tp(**SP, zero_stage=3), is_large=True),
            Layout(4, 2, _tp(**SP, recompute="full", **MEGATRON), is_large=True),
            Layout(4, 4, _pp(**_tp(**SP, **MEGATRON)), is_tied=True, is_large=True),
        ]
    ),
)
def test_bfloat16_layouts_agree(layout: Layout) -> None:
    """Under bfloat16 the layouts agree to its rounding, with gradients accumulated in float32."""
    config = layout.config("bfloat16")
    records = run_ranks(layout.num_ranks, train, config, layout.num_micro, NUM_STEPS, True, timeout_s=240)
    expected = reference(layout.is_tied, dtype="bfloat16")
    # bfloat16 carries 8 bits, eps 8e-3; the losses average hundreds of elements and so are nearer.
    assert records[-1].losses[0] == pytest.approx(expected.losses[0], rel=5e-3)
    assert records[-1].losses[-1] == pytest.approx(expected.losses[-1], rel=3e-2)
    assert records[-1].grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=3e-2)


def test_flex_attention_is_another_path() -> None:
    """The layouts above would also agree if both masks ran the same kernels; rounding shows that they do not."""
    dense, flex = (Layout(1, 1, {}, attention=attention) for attention in ("dense", "flex"))
    expected, found = (assemble(_run(layout), "gradients") for layout in (dense, flex))
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_first_steps_change_the_weights() -> None:
    """The comparison above would also hold for a trainer that changes nothing."""
    first = reference().losses[0]
    assert all(losses != first for losses in reference().losses[1:])


def _table() -> str:
    lines = ["| layout | worst gradient | worst loss |", "|---|---|---|"]
    for layout in LAYOUTS:
        records, expected = _run(layout), _reference_of(layout)
        errors = _gradient_errors(layout, records)
        worst = max(errors, key=errors.get)
        drift = max(
            abs(found - wanted) / abs(wanted)
            for record in records
            for step in range(NUM_STEPS)
            for found, wanted in zip(record.losses[step], expected.losses[step], strict=True)
        )
        lines.append(f"| {layout} | {errors[worst]:.1e} `{worst}` | {drift:.1e} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    print(_table())
