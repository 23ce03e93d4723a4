"""The CUDA branches of a 14B stage, walked as ranks of a large job: devices, dtypes, waits, orders of collectives."""

from __future__ import annotations

import pytest

from tests.fake_cuda.agreement import disagreements
from tests.fake_cuda.walks import walk, walk_ranks

pytestmark = [pytest.mark.fake_cuda, pytest.mark.usefixtures("fake_cuda")]

SHALLOW = ("model.num_layers=2",)


def test_a_step_of_64_gpus_waits_for_the_device_at_its_ends_alone():
    walks = walk_ranks("pt_14b", 64, (0, 1), SHALLOW)
    for found in walks.values():
        assert found.device == "cuda:0"
        # The counts of targets before, the losses after all micro-batches; none within one.
        assert {place.split()[-1] for _, place in found.waits("micro-batches")} == {"count_targets", "_reduce_losses"}
        # Positions are looked up: computed for every pack, they were 24 kernels in float64, 2.9 GB a micro-batch.
        kernels = [kernel for kernel in found.record.kernels if kernel.phase == "micro-batches"]
        assert not any("torch.float64" in kernel.dtypes for kernel in kernels)
        assert {place.split()[-1] for _, place in found.waits("optimiser")} == {
            "step",
            "is_invalid_grad_norm",
            "mask_nan_or_inf_with_val_inplace",
            "clip_tensors_by_global_norm",
        }
    assert disagreements({rank: found.record.collectives for rank, found in walks.items()}) == []


@pytest.mark.parametrize(
    ("plant", "says"),
    [("device", "found at least two devices"), ("dtype", "operands of torch.bfloat16, torch.float32")],
)
def test_a_wrong_tensor_is_found(plant, says):
    with pytest.raises(RuntimeError, match=says):
        walk("pt_14b", 64, 0, SHALLOW, plant)


def test_a_wait_is_found():
    before, after = walk("pt_14b", 64, 0, SHALLOW), walk("pt_14b", 64, 0, SHALLOW, "wait")
    more = after.waits("micro-batches") - before.waits("micro-batches")
    # The loss is combined once a micro-batch, and once of the global batch.
    by_function = {place.split()[-1]: number for (_, place), number in more.items()}
    assert by_function == {"_loss": before.num_micro_batches, "_reduce_losses": 1}


def test_a_collective_of_one_rank_is_found():
    calls = {rank: walk("pt_14b", 64, rank, SHALLOW, "collective").record.collectives for rank in (0, 1)}
    assert any("call" in line for line in disagreements(calls))
