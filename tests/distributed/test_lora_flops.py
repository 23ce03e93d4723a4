"""FLOPs of a step with adapters, against what PyTorch counts while a step runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bitdance_scale.config.lora_schema import LoraSection
from bitdance_scale.config.schema import RunConfig
from tests.distributed.spawn import run_ranks
from tests.distributed.test_layouts import Layout

ALL = LoraSection(rank=3, targets=("q_proj", "v_proj", "down_proj", "head.*"))
CASES = {
    "all": ALL,
    "with projector": dataclasses.replace(ALL, train_projector=True),
    "last layers": LoraSection(rank=2, targets=("layers.[23].*",)),
}


def _count(rank: int, config: RunConfig) -> tuple[int, int]:
    """(products with weights that PyTorch counts in a step of one pack, what the formula says)."""
    from torch.utils.flop_counter import FlopCounterMode

    from bitdance_scale.observe.cost import PackCounts, count_pack, step_flops
    from bitdance_scale.parallel.step import accumulate_gradients, count_targets
    from tests.distributed.layout_run import make_engine, step_inputs
    from tests.distributed.toy import VOCAB_SIZE, lopsided_packs

    engine, topology = make_engine(config)
    batch = step_inputs(config, topology, 1, 0, True)
    targets = count_targets(batch, topology)
    with FlopCounterMode(display=False) as counter:
        accumulate_gradients(engine, batch, targets, config.loss, topology)
    packs = lopsided_packs(0, 1, 1, config)
    counts = sum((count_pack(pack) for pack in packs), PackCounts())
    # Padding is multiplied too; attention multiplies no weights, and by a kernel that is not counted.
    counts = dataclasses.replace(counts, num_positions=packs[0].num_positions, num_visible_pairs=0)
    counted = counter.get_flop_counts()["Global"]
    weights = sum(flops for operator, flops in counted.items() if operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return weights, step_flops(config, VOCAB_SIZE, counts).training


@pytest.mark.parametrize("name", CASES)
def test_what_pytorch_counts(name: str) -> None:
    config = dataclasses.replace(Layout(1, 1, {}).config(), lora=CASES[name])
    counted, formula = run_ranks(1, _count, config)[0]
    # The formula has the head's attention, gradients of its inputs, and of the inputs of the first adapted layer.
    assert formula == pytest.approx(counted, rel=0.06 if name == "last layers" else 0.03)
    whole = dataclasses.replace(config, lora=LoraSection())
    assert counted < 0.8 * run_ranks(1, _count, whole)[0][0]
