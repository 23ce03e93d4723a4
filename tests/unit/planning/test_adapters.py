"""Adapters and frozen weights on a rank, against the counts of the whole model and of the layouts' own parts."""

from __future__ import annotations

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.observe.adapter_cost import trained_elements
from bitdance_scale.observe.cost import count_parameters
from bitdance_scale.planning.adapters import RankParameters, num_backward_layers, rank_linears, rank_parameters
from bitdance_scale.planning.parameters import layer_elements, rank_stages
from bitdance_scale.sequence.condition import vocab_size

SPLIT = "parallel.sequence_parallel=true"


def lora_config(*settings: str) -> RunConfig:
    return load_config("finetune_14b_lora", settings)


def on_one_rank(config: RunConfig) -> RankParameters:
    return rank_parameters(config, vocab_size(config), rank_stages((config.model.num_layers,), 1)[0])


@pytest.mark.parametrize("more", [[], ["lora.train_projector=true", "lora.train_queries=true"], ["lora.rank=0"]])
def test_one_rank_holds_the_network_and_what_is_trained(more):
    config = lora_config(*more)
    whole = count_parameters(config, vocab_size(config))
    found = on_one_rank(config)
    if not config.lora.is_used:
        assert found == RankParameters(whole["total"], whole["total"])
        return
    assert found.trained == trained_elements(config, vocab_size(config), whole["projector"])
    added = found.trained - (whole["projector"] if config.lora.train_projector else 0)
    assert found.elements == whole["total"] + added
    # Where 7,168 and 34,816 rows of stacked linears lie.
    assert (found.saved_bytes, found.table_bytes) == (0, 8 * 40 * (7168 + 34816))


def test_tensor_parallel_ranks_divide_one_matrix_of_an_adapter():
    one, two = (on_one_rank(lora_config(f"parallel.tensor={n}", SPLIT, "lora.targets=['q_proj']")) for n in (1, 2))
    # A of [16, 5120] on every rank, B of [5120, 16] in halves.
    assert (one.trained, two.trained) == (40 * 16 * 2 * 5120, 40 * 16 * (5120 + 2560))
    one, two = (on_one_rank(lora_config(f"parallel.tensor={n}", SPLIT, "lora.targets=['down_proj']")) for n in (1, 2))
    assert (one.trained, two.trained) == (40 * 16 * (17408 + 5120), 40 * 16 * (8704 + 5120))
    one, two = (on_one_rank(lora_config(f"parallel.tensor={n}", SPLIT, "lora.targets=['cond_embed']")) for n in (1, 2))
    assert one.trained == two.trained == 16 * 2 * 5120


def test_few_bits_save_what_codes_and_scales_leave():
    whole, eight, four = (on_one_rank(lora_config(f"lora.base_bits={bits}")) for bits in (16, 8, 4))
    assert whole.saved_bytes == 0
    # The weights of the table of docs/memory.md.
    for found, gib in ((eight, 17.47), (four, 10.50)):
        weights = 2 * found.elements - found.saved_bytes + found.table_bytes
        assert weights / 2**30 == pytest.approx(gib, abs=0.005)
    config = lora_config("lora.base_bits=4")
    linears = rank_linears(config, vocab_size(config), rank_stages((40,), 1)[0])
    of_layer = [linear for linear in linears if linear.layer == 3]
    norms = 2 * 5120 + 2 * 128
    assert sum(linear.elements(1) for linear in of_layer) == layer_elements(config) - norms


def test_pipeline_ranks_hold_the_adapters_of_their_layers():
    config = lora_config("lora.targets=['layers.[0-9].*', 'head.*.w1']", "parallel.pipeline=2")
    ranks = [rank_parameters(config, vocab_size(config), stages) for stages in rank_stages((12, 28), 2)]
    whole = trained_elements(config, vocab_size(config), 0)
    of_head = 6 * 16 * (5120 + 15360)
    assert [found.trained for found in ranks] == [whole - of_head, of_head]


@pytest.mark.parametrize(
    ("lora", "split", "expected"),
    [
        ([], (40,), [40]),
        (["lora.targets=['layers.3[0-9].*']"], (40,), [10]),
        (["lora.targets=['head.*']"], (40,), [0]),
        (["lora.targets=['head.*']", "lora.train_queries=true"], (40,), [40]),
        # A later stage returns a gradient to the one before it.
        (["lora.targets=['layers.8.*', 'layers.30.*']"], (12, 28), [4, 28]),
        (["lora.rank=0"], (40,), [40]),
    ],
)
def test_layers_that_a_backward_pass_goes_through(lora, split, expected):
    config = lora_config(*lora)
    ranks = rank_stages(split, len(split))
    assert [num_backward_layers(config, vocab_size(config), stages) for stages in ranks] == expected
