"""Every layout against one process: losses of three steps and every parameter's first gradient, in float32."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from tests.distributed.layout_run import RankRecord, assemble, train
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

# float32 sums in another order: eps is 1.2e-7, and the longest chains (attention, norms over four layers) amplify it
# about tenfold. A missing or doubled reduction shows at 1e-2 and more.
RELATIVE_BOUND = 1e-5

LAYOUTS = [
    (1, 1, 2, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (1, 2, 2, 1),
    (1, 1, 2, 2),
    (1, 1, 2, 3),
    (2, 1, 2, 3),
]
NUM_STEPS = 3
NUM_MICRO = 2


@functools.cache
def reference(dtype: str = "float32") -> RankRecord:
    """One process on the same samples."""
    return run_ranks(1, train, _config(dtype, 1, 1, 1), NUM_MICRO, NUM_STEPS)[0]


def _config(dtype: str, tensor: int, pipeline: int, zero_stage: int):
    config = toy_config(tensor=tensor, pipeline=pipeline, zero_stage=zero_stage)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dtype=dtype))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("tensor", "pipeline", "data", "zero_stage"), LAYOUTS)
def test_layout_equals_one_process(tensor, pipeline, data, zero_stage):
    config = _config("float32", tensor, pipeline, zero_stage)
    records = run_ranks(tensor * pipeline * data, train, config, NUM_MICRO, NUM_STEPS, timeout_s=240)
    expected = assemble([reference()], "gradients")
    found = assemble(records, "gradients")
    assert found.keys() == expected.keys()
    errors = {name: _relative(found[name], expected[name]) for name in expected if expected[name].any()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < RELATIVE_BOUND, f"{worst}: {errors[worst]:.1e}"
    for name in expected.keys() - errors.keys():
        assert not found[name].any(), f"{name}: one process has no gradient here"
    for record in records:
        for step, losses in enumerate(record.losses):
            assert losses == pytest.approx(reference().losses[step], rel=RELATIVE_BOUND), f"step {step}"
        assert record.grad_norms == pytest.approx(reference().grad_norms, rel=RELATIVE_BOUND)


@pytest.mark.parametrize(("tensor", "pipeline", "data", "zero_stage"), [(2, 2, 1, 1), (1, 1, 2, 2), (1, 1, 2, 3)])
def test_bfloat16_layouts_agree(tensor, pipeline, data, zero_stage):
    """Under bfloat16 the layouts agree to its rounding, with gradients accumulated in float32."""
    config = _config("bfloat16", tensor, pipeline, zero_stage)
    records = run_ranks(tensor * pipeline * data, train, config, NUM_MICRO, NUM_STEPS, timeout_s=240)
    # bfloat16 carries 8 bits, eps 8e-3; the losses average hundreds of elements and so are nearer.
    assert records[-1].losses[0] == pytest.approx(reference("bfloat16").losses[0], rel=5e-3)
    assert records[-1].losses[-1] == pytest.approx(reference("bfloat16").losses[-1], rel=3e-2)
    assert records[-1].grad_norms[0] == pytest.approx(reference("bfloat16").grad_norms[0], rel=3e-2)


def test_pipeline_of_unequal_stages_agrees():
    """Five layers on two stages: the remainder goes to the first."""

    def odd(pipeline: int):
        config = _config("float32", 1, pipeline, 1)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=5))

    expected = assemble(run_ranks(1, train, odd(1), NUM_MICRO, 1), "gradients")
    found = assemble(run_ranks(2, train, odd(2), NUM_MICRO, 1), "gradients")
    assert found.keys() == expected.keys()
    assert max(_relative(found[name], expected[name]) for name in expected) < RELATIVE_BOUND


def test_tied_embeddings_agree():
    """The output projection is the embedding: its gradient is the sum of both uses, on every tensor-parallel rank."""

    def tied(tensor: int):
        config = _config("float32", tensor, 1, 1)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, tie_embeddings=True))

    expected = assemble(run_ranks(1, train, tied(1), NUM_MICRO, 1), "gradients")
    found = assemble(run_ranks(2, train, tied(2), NUM_MICRO, 1), "gradients")
    assert "output.weight" not in expected and found.keys() == expected.keys()
    untied = assemble([reference()], "gradients")
    assert _relative(expected["embedding.weight"], untied["embedding.weight"]) > 1e-3
    assert _relative(found["embedding.weight"], expected["embedding.weight"]) < RELATIVE_BOUND


def test_flex_attention_agrees_with_dense():
    """The other form of the mask, on two tensor-parallel ranks."""
    config = _config("float32", 2, 1, 1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="flex"))
    records = run_ranks(2, train, config, NUM_MICRO, NUM_STEPS, timeout_s=240)
    expected, found = assemble([reference()], "gradients"), assemble(records, "gradients")
    errors = {name: _relative(found[name], expected[name]) for name in expected if expected[name].any()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < RELATIVE_BOUND, f"{worst}: {errors[worst]:.1e}"
    for step, losses in enumerate(records[0].losses):
        assert losses == pytest.approx(reference().losses[step], rel=RELATIVE_BOUND), f"step {step}"
    # Nothing is proved if both took the same path: rounding differs between the two.
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_first_steps_change_the_weights():
    """The comparison above would also hold for a trainer that does nothing."""
    first = reference().losses[0]
    assert all(losses != first for losses in reference().losses[1:])
