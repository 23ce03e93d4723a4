"""Parameters per rank against the counts of the whole model."""

from __future__ import annotations

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.observe.cost import count_parameters
from bitdance_scale.planning.parameters import RankStages, rank_elements, rank_stages, table_elements

WHOLE = ("parallel.tensor=1", "parallel.sequence_parallel=false")


@pytest.mark.parametrize("name", ["pt_14b", "pt_0p6b", "demo", "imagenet_h_1x", "imagenet_b_4x", "class_demo"])
def test_one_rank_holds_the_whole_model(name):
    config = load_config(name, WHOLE)
    whole = RankStages(0, (config.model.num_layers,), is_first=True, is_last=True, layers=())
    assert rank_elements(config, 1001, whole) == count_parameters(config, 1001)["total"]


def test_pipeline_ranks_hold_the_model_together():
    config = load_config("pt_14b", [*WHOLE, "parallel.pipeline=4", "parallel.virtual_stages=2"])
    ranks = rank_stages((6, 6, 5, 5, 5, 5, 5, 3), 4)
    assert [stages.num_layers for stages in ranks] == [(6, 5), (6, 5), (5, 5), (5, 3)]
    assert [stages.layers[-1] for stages in ranks] == [26, 31, 36, 39]
    assert ranks[1].layers[:7] == (6, 7, 8, 9, 10, 11, 27)
    assert [(stages.is_first, stages.is_last) for stages in ranks] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]
    total = sum(rank_elements(config, 151940, stages) for stages in ranks)
    assert total == count_parameters(config, 151940)["total"]


def test_tables_are_padded_to_the_tensor_ranks():
    config = load_config("pt_14b", ["parallel.tensor=8"])
    assert table_elements(config, 151940) == 151944 // 8 * config.model.hidden_size
