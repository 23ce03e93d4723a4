"""A plan: every layout is ranked or dropped with a reason, and the best comes first."""

from __future__ import annotations

import json

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.errors import ConfigError
from bitdance_scale.planning.advice import changes, limit
from bitdance_scale.planning.layouts import candidates, with_layout
from bitdance_scale.planning.machine import load_machine
from bitdance_scale.planning.plan import NOTHING_TO_TRAIN, StagePlan, make_plan
from bitdance_scale.planning.report import recipe_text, stage_document, stage_text

NUM_GPUS = 64
H100 = load_machine("h100-80")


@pytest.fixture(scope="module")
def plan() -> StagePlan:
    return make_plan(load_config("pt_14b"), NUM_GPUS, H100)


def test_every_layout_is_ranked_or_dropped_with_a_reason(plan):
    tried = candidates(plan.config, NUM_GPUS, H100.gpus_per_node)
    found = [item.parallel for item in [*plan.ranked, *plan.dropped]]
    assert len(found) == len(tried) == len(set(tried))
    assert set(found) == set(tried)
    assert all(item.reason and item.rule for item in plan.dropped)


def test_reasons_are_those_of_the_rules(plan):
    illegal = [item for item in plan.dropped if item.kind == "illegal"]
    # One of every rule: all layouts would take long.
    for item in {item.rule: item for item in illegal}.values():
        with pytest.raises(ConfigError) as refusal:
            check(with_layout(plan.config, item.parallel), NUM_GPUS)
        assert item.reason in str(refusal.value)


def test_what_is_ranked_is_legal_and_fits(plan):
    times = [item.time.total for item in plan.ranked]
    assert times == sorted(times)
    for item in plan.ranked[:5]:
        check(with_layout(plan.config, item.parallel), NUM_GPUS)
    assert all(item.memory.needed <= H100.usable_bytes for item in plan.ranked)
    assert all(item.memory.needed > H100.usable_bytes for item in plan.too_large)
    assert "GiB" in next(item.reason for item in plan.dropped if item.kind == "memory")


def test_the_shipped_layout_is_near_the_best(plan):
    assert plan.configured is not None
    # Fused layers keep so little that layouts with less tensor parallelism fit, and are faster by prediction. None has
    # been seen on a GPU.
    assert plan.configured.time.total < 1.25 * plan.ranked[0].time.total
    # What `bitdance memory pt_14b --ranks 64` prints, within the bound of the formula.
    assert plan.configured.memory.peak.total / 2**30 == pytest.approx(41.97, rel=0.01)


def test_numbers_of_a_stage_agree(plan):
    best = plan.ranked[0]
    assert best.images_per_s * best.time.total == pytest.approx(plan.config.data.global_batch)
    assert best.days * 86_400 == pytest.approx(best.time.total * plan.config.run.steps)
    assert best.gpu_hours == pytest.approx(best.days * 24 * NUM_GPUS)
    assert 0.2 < best.mfu < 0.5


def test_text_and_document_say_the_same(plan):
    text, document = stage_text(plan, 3), json.loads(json.dumps(stage_document(plan)))
    best = plan.ranked[0]
    assert f"{len(plan.ranked):,} fit" in text and "not measured" in text
    assert limit(best) in text and all(line in text for line in changes(best, plan))
    assert document["ranked"][0]["step_s"] == best.time.total
    assert sum(document["ranked"][0]["step_parts_s"].values()) == pytest.approx(best.time.total)
    assert len(document["dropped"]) == len(plan.dropped)
    assert all(item["reason"] for item in document["dropped"])


def test_a_recipe_is_the_sum_of_its_stages(plan):
    best = plan.ranked[0]
    text = recipe_text([plan, plan], [best, best])
    assert f"{2 * best.gpu_hours:,.0f}" in text.splitlines()[-1]


def test_a_model_that_fits_nowhere_is_refused_with_what_comes_closest():
    from bitdance_scale.planning.plan import fastest

    plan = make_plan(load_config("pt_14b", ["data.global_batch=60"]), 2, H100)
    assert plan.ranked == [] and plan.too_large
    with pytest.raises(ConfigError, match="no layout of 2 x H100 80 GB is legal and fits; closest: pipeline rank"):
        fastest([plan])


def test_what_no_layout_mends_is_refused():
    config = load_config("pt_14b", ["head.num_blocks=5"])
    with pytest.raises(ConfigError, match="cannot be planned:\n- .*head.num_blocks = 5"):
        make_plan(config, NUM_GPUS, H100)


def test_a_batch_that_does_not_fill_the_replicas_is_a_reason():
    plan = make_plan(load_config("demo", ["data.global_batch=10"]), 16, H100)
    kinds = {item.kind for item in plan.dropped}
    assert kinds >= {"illegal"}
    reasons = [item.reason for item in plan.dropped if item.parallel.tensor == item.parallel.pipeline == 1]
    assert any("data.global_batch = 10: must be at least the 16" in reason for reason in reasons)


@pytest.fixture(scope="module")
def adapters() -> StagePlan:
    # All adapters are in the last layers: a pipeline leaves ranks without any.
    return make_plan(load_config("finetune_14b_lora", ["lora.targets=['layers.3[0-9].*']"]), 8, H100)


def test_a_run_with_adapters_has_no_rank_without_one(adapters):
    dropped = [item for item in adapters.dropped if item.rule == NOTHING_TO_TRAIN]
    assert dropped and all(item.parallel.pipeline > 1 for item in dropped)
    assert "none of them is on rank 0 of the pipeline" in dropped[0].reason
    # With virtual stages every rank has some of the last layers.
    assert all(item.parallel.pipeline == 1 or item.parallel.virtual_stages > 1 for item in adapters.ranked)
    assert len({item.parallel for item in [*adapters.ranked, *adapters.dropped]}) == len(
        candidates(adapters.config, 8, H100.gpus_per_node)
    )


def test_frozen_weights_in_few_bits_go_with_no_partition_of_them():
    plan = make_plan(load_config("finetune_14b_lora", ["lora.base_bits=4"]), 1, H100)
    assert plan.ranked and all(item.parallel.zero_stage < 3 for item in plan.ranked)
    assert any("divides the frozen weights" in item.reason for item in plan.dropped)
    # What `bitdance memory finetune_14b_lora lora.base_bits=4 --ranks 1` prints, within the bound of the formula.
    assert plan.configured is not None
    assert plan.configured.memory.peak.total / 2**30 == pytest.approx(18.55, rel=0.01)
    assert plan.configured.memory.building_peak / 2**30 == pytest.approx(18.0, rel=0.01)
