"""What the optimiser engines move once per step, traced as a rank of 64 GPUs.

`python -m tests.fake_cuda.test_engines` prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest

from bitdance_scale.config.load import load_config
from bitdance_scale.planning.moved_bytes import accumulated_bytes, optimiser_bytes
from bitdance_scale.planning.parameters import rank_elements, rank_stages, table_elements
from tests.fake_cuda.agreement import disagreements
from tests.fake_cuda.recording import Collective, Kernel
from tests.fake_cuda.walks import Walk, walk, walk_ranks

pytestmark = [pytest.mark.fake_cuda, pytest.mark.usefixtures("fake_cuda")]

WORLD, DATA_SIZE = 64, 16
SHALLOW = ("model.num_layers=2",)
MEGATRON = (*SHALLOW, "parallel.optimizer=megatron")
# The vocabulary of the walk (`walk.py`).
ENTRIES = 151940
ENGINE_FILES = (
    "deepspeed/",
    "megatron/core/distributed/",
    "bitdance_scale/parallel/distributed_optimizer.py",
    "torch/optim",
)
PRODUCT = "wgrad_gemm_accum_fp32"


def _once(record_of: Walk) -> Iterator[Collective]:
    """Collectives over data-parallel ranks of more than a few numbers, of one step."""
    for call in record_of.record.collectives:
        is_large = call.num_bytes > 1000
        if call.phase in ("micro-batches", "optimiser") and len(call.ranks) == DATA_SIZE and is_large:
            yield call


def _engine_kernels(found: Walk, phase: str) -> list[Kernel]:
    kernels = [kernel for kernel in found.record.kernels if kernel.phase == phase]
    return [kernel for kernel in kernels if phase == "optimiser" or kernel.place.startswith(ENGINE_FILES)]


def _elements(found: tuple[str, ...]) -> tuple[int, int]:
    """(parameters of rank 0, those of its embedding table)."""
    config = load_config("pt_14b", list(found))
    return int(rank_elements(config, ENTRIES, rank_stages((2,), 1)[0])), int(table_elements(config, ENTRIES))


def test_gradients_are_reduced_in_float32_and_weights_gathered() -> None:
    found = walk("pt_14b", WORLD, 0, MEGATRON)
    num_elements, _ = _elements(MEGATRON)
    sent = defaultdict(int)
    for call in _once(found):
        sent[call.phase, call.name, call.dtype] += call.num_bytes
    # The recorder counts what a rank keeps of a reduction. Padding is below a thousandth.
    assert sent == {
        ("micro-batches", "reduce_scatter_tensor_coalesced_", "torch.float32"): pytest.approx(
            4 * num_elements / DATA_SIZE, rel=1e-3
        ),
        ("optimiser", "allgather_into_tensor_coalesced_", "torch.bfloat16"): pytest.approx(2 * num_elements, rel=1e-3),
    }


def test_products_add_to_the_float32_gradients_themselves() -> None:
    found = walk("pt_14b", WORLD, 0, MEGATRON)
    num_elements, num_table = _elements(MEGATRON)
    products = [kernel for kernel in found.record.kernels if kernel.place.endswith(PRODUCT)]
    assert {kernel.name for kernel in products} == {"addmm"}
    assert {kernel.dtypes for kernel in products} == {("torch.bfloat16", "torch.float32")}
    # Two multiply-adds per element and position at least, in both passes of the step: all split linears are here.
    hooks = [kernel for kernel in _engine_kernels(found, "micro-batches") if kernel.name == "add_"]
    # What is not a split linear: the table, norms, biases. 2 + 4 + 4 bytes, the result counted once more.
    num_added = sum(kernel.num_bytes for kernel in hooks) / 10 / found.num_micro_batches
    assert num_table < num_added < num_table + 0.03 * num_elements


def test_the_formulas_of_the_plan_are_the_kernels_of_the_step() -> None:
    config = load_config("pt_14b", list(MEGATRON))
    num_elements, _ = _elements(MEGATRON)
    found = walk("pt_14b", WORLD, 0, MEGATRON)
    # The recorder counts what is overwritten in place twice, also where it is not read: what is cleared, and moments.
    traced = {kernel.name: 0 for kernel in _engine_kernels(found, "optimiser")}
    for kernel in _engine_kernels(found, "optimiser"):
        traced[kernel.name] += kernel.num_bytes
    part = num_elements / DATA_SIZE
    expected = {
        "zero_": 8 * num_elements,
        "_foreach_norm": 4 * part,
        "_foreach_mul_": 4 * part,
        "_fused_adamw_": 16 * part,
        "copy_": 8 * part,
    }
    for name, num_bytes in expected.items():
        assert traced[name] == pytest.approx(num_bytes, rel=2e-3), name
    assert sum(traced.values()) == pytest.approx(sum(expected.values()), rel=1e-3)
    # Written once where it is cleared; multi-tensor kernels, of which the recorder sees the arguments, write them too.
    moved = 4 * num_elements + (4 + 8 + 28 + 4 + 2) * part
    assert optimiser_bytes(config, num_elements, DATA_SIZE) == pytest.approx(moved)
    assert accumulated_bytes(config, num_elements) == 8 * num_elements


def test_the_host_waits_once_per_step_for_the_norm() -> None:
    found = walk("pt_14b", WORLD, 0, MEGATRON)
    assert {place.split()[-1]: number for (_, place), number in found.waits("optimiser").items()} == {
        "_gradient_norm": 1
    }
    assert {place.split()[-1] for _, place in found.waits("micro-batches")} == {"count_targets", "_reduce_losses"}


def test_neighbours_on_both_axes_call_the_same_collectives() -> None:
    walks = walk_ranks("pt_14b", WORLD, (0, 1, 4), MEGATRON)
    assert disagreements({rank: found.record.collectives for rank, found in walks.items()}) == []


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        (("parallel.pipeline=4", "parallel.virtual_stages=2", "model.num_layers=16"), 48),
        (("parallel.pipeline=2", "model.num_layers=4", "model.tie_embeddings=true", "parallel.recompute=full"), 32),
    ],
)
def test_a_pipeline_reduces_each_stage_once_per_step(layout: tuple[str, ...], rank: int) -> None:
    settings = (*MEGATRON, *layout)
    config = load_config("pt_14b", list(settings))
    found = walk("pt_14b", WORLD, rank, settings)
    assert found.device == "cuda:0"
    size = DATA_SIZE // config.parallel.pipeline
    calls = [call for call in found.record.collectives if call.name == "reduce_scatter_tensor_coalesced_"]
    # The last rank of a pipeline has one bucket per stage; the walk takes two steps.
    assert [(len(call.ranks), call.dtype) for call in calls] == [
        (size, "torch.float32")
    ] * config.parallel.virtual_stages * 2


def _table() -> str:
    lines = []
    for name in ("deepspeed", "megatron"):
        found = walk("pt_14b", WORLD, 0, (*SHALLOW, f"parallel.optimizer={name}"))
        rows: dict[str, list[float]] = defaultdict(lambda: [0, 0])
        for call in _once(found):
            rows[f"{call.phase}, {call.name} {call.dtype.removeprefix('torch.')}"][0] += 1
            rows[f"{call.phase}, {call.name} {call.dtype.removeprefix('torch.')}"][1] += call.num_bytes / 1e9
        for phase in ("micro-batches", "optimiser"):
            kernels = _engine_kernels(found, phase)
            rows[f"{phase}, kernels of the engine"] = [len(kernels), sum(kernel.num_bytes for kernel in kernels) / 1e9]
        waits = sum(found.waits("optimiser").values())
        lines += [f"{name}: {what}: {number} calls, {size:.2f} GB" for what, (number, size) in rows.items()]
        lines.append(f"{name}: {waits} waits in the optimiser")
    return "\n".join(lines)


if __name__ == "__main__":
    print(_table())
