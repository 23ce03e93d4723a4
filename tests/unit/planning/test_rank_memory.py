"""The memory formula against `bitdance memory`, which lets the engines run; full width, few layers."""

from __future__ import annotations

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.parallel.memory_estimate import estimate_memory
from bitdance_scale.parallel.memory_table import on_gpu
from bitdance_scale.parallel.stage_split import stage_split
from bitdance_scale.planning.parameters import rank_stages
from bitdance_scale.planning.rank_memory import fullest_pack, rank_memory
from bitdance_scale.sequence.condition import vocab_size
from bitdance_scale.vision.tokenizer import num_elements

NUM_RANKS = 8
SMALL = ("data.global_batch=160", "model.num_layers=2")
WHOLE = ("parallel.tensor=1", "parallel.sequence_parallel=false")
# With two layers the terms that the formula simplifies weigh more than with forty.
CLOSE, LOOSE = 0.01, 0.05
LAYOUTS = [
    ((), 0, CLOSE),
    pytest.param((*WHOLE, "parallel.recompute=none"), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(("parallel.recompute=full",), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(("parallel.tensor=2", "parallel.sequence_parallel=false"), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(("parallel.tensor=2", "parallel.pipeline=2"), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(("parallel.tensor=2", "parallel.pipeline=2"), 1, CLOSE, marks=pytest.mark.large),
    pytest.param(("parallel.tensor=2", "parallel.zero_stage=2"), 0, CLOSE, marks=pytest.mark.large),
    pytest.param((*WHOLE, "parallel.zero_stage=3"), 0, CLOSE, marks=pytest.mark.large),
    pytest.param((*WHOLE, "parallel.zero_stage=3", "parallel.recompute=full"), 0, LOOSE, marks=pytest.mark.large),
    pytest.param(("run.dtype=float32",), 0, LOOSE, marks=pytest.mark.large),
    (("parallel.optimizer=megatron",), 0, CLOSE),
    pytest.param((*WHOLE, "parallel.optimizer=megatron", "parallel.recompute=full"), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(
        ("parallel.tensor=2", "parallel.pipeline=2", "parallel.optimizer=megatron"), 1, CLOSE, marks=pytest.mark.large
    ),
    pytest.param(
        ("model.num_layers=8", "parallel.tensor=2", "parallel.pipeline=4", "parallel.virtual_stages=2"),
        0,
        LOOSE,
        marks=pytest.mark.large,
    ),
]


SPLIT = ("parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.recompute=selective")
ADAPTERS = [
    pytest.param((), 0, CLOSE, marks=pytest.mark.large),
    (("lora.base_bits=4",), 0, CLOSE),
    pytest.param(("parallel.recompute=selective",), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(("parallel.recompute=none",), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(SPLIT, 0, LOOSE, marks=pytest.mark.large),
    pytest.param(("parallel.zero_stage=2",), 0, CLOSE, marks=pytest.mark.large),
    # With two layers both tables of the vocabulary are gathered at once.
    pytest.param(("parallel.zero_stage=3",), 0, LOOSE, marks=pytest.mark.large),
    pytest.param(("parallel.optimizer=megatron",), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(("parallel.pipeline=2",), 1, CLOSE, marks=pytest.mark.large),
    pytest.param(("lora.targets=['q_proj', 'v_proj']", "parallel.recompute=none"), 0, CLOSE, marks=pytest.mark.large),
    pytest.param(
        ("lora.base_bits=8", "lora.train_projector=true", "parallel.recompute=selective"),
        0,
        CLOSE,
        marks=pytest.mark.large,
    ),
]


@pytest.mark.parametrize(("settings", "pipeline_rank", "bound"), LAYOUTS)
def test_the_formula_is_what_the_engines_hold(settings, pipeline_rank, bound):
    _compare("pt_14b", settings, pipeline_rank, bound)


@pytest.mark.parametrize(("settings", "pipeline_rank", "bound"), ADAPTERS)
def test_the_formula_is_what_a_run_with_adapters_holds(settings, pipeline_rank, bound):
    _compare("finetune_14b_lora", settings, pipeline_rank, bound)


def _compare(name, settings, pipeline_rank, bound):
    config = on_gpu(load_config(name, [*SMALL, *settings]))
    entries, parallel = vocab_size(config), config.parallel
    num_replicas = NUM_RANKS // (parallel.tensor * parallel.pipeline)
    stages = rank_stages(stage_split(config, entries), parallel.pipeline)[pipeline_rank]
    pack = fullest_pack(config, num_replicas)
    tokenizer_bytes = num_elements(config.vision) * 4
    found = rank_memory(config, entries, pack, num_replicas, stages, tokenizer_bytes)
    rank = pipeline_rank * NUM_RANKS // parallel.pipeline
    exact = estimate_memory(config, entries, NUM_RANKS, rank)
    assert pack.num_micro_batches == exact.num_micro_batches
    # ZeRO-3 keeps small weights gathered, of which adapters are many.
    is_divided = parallel.zero_stage == 3 and config.lora.is_used
    for role in ("weights", "masters", "moments", "tokenizer"):
        close = 1e-2 if is_divided and role == "weights" else 2e-3
        assert getattr(found.peak, role) == pytest.approx(getattr(exact.peak, role), rel=close), role
    assert found.peak.total == pytest.approx(exact.peak.total, rel=bound)
    assert found.building_peak == pytest.approx(exact.building_peak, rel=CLOSE)


def test_more_tensor_ranks_hold_less_each():
    needed = []
    for tensor in (1, 2, 4, 8):
        config = load_config(
            "pt_14b", [f"parallel.tensor={tensor}", f"parallel.sequence_parallel={str(tensor > 1).lower()}"]
        )
        stages = rank_stages((40,), 1)[0]
        needed.append(rank_memory(config, 151940, fullest_pack(config, 8), 8, stages, 0).needed)
    assert needed == sorted(needed, reverse=True)


def test_the_fullest_pack_is_the_first_of_the_typical_ones():
    from bitdance_scale.data.plan.synthetic_packs import typical_packs

    config = load_config("pt_14b")
    for num_replicas in (5, 16):
        packs = typical_packs(config, num_replicas)
        found = fullest_pack(config, num_replicas)
        assert found.num_text_targets == len(packs[0].text_targets)
        assert found.num_positions == packs[0].num_positions
        assert found.num_micro_batches == len(packs)
