"""Every element of a checkpoint is written once: jobs of 8 whose ranks are all walked, one of 1,024 by formula."""

from __future__ import annotations

import pytest

from bitdance_scale.checkpoint.sharded import DEFAULT_MAX_FILE_BYTES
from tests.fake_cuda.cases import Case
from tests.fake_cuda.save_plans import held_by, problems, written_boxes
from tests.fake_cuda.walks import walk_of, walks_of

pytestmark = [pytest.mark.fake_cuda, pytest.mark.usefixtures("fake_cuda"), pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    "case",
    [
        Case("pt_14b", 8),
        Case("pt_14b", 8, "ZeRO-3"),
        Case("pt_14b", 8, "averages"),
        Case("pt_0p6b", 8, "pipeline 2"),
        Case("pt_0p6b", 8, "Megatron, pipeline 2"),
    ],
    ids=str,
)
def test_every_rank_of_8(case):
    walks = walks_of(case.request(rank, parts=("save",)) for rank in range(case.world))
    held = {rank: found.saved for rank, found in walks.items()}
    written = written_boxes(held)
    assert problems(held, written) == []
    # What two write, and what nobody writes, is found.
    name, (first, *_) = next(iter(written.items()))
    assert any("written by two" in line for line in problems(held, written | {name: [*written[name], first]}))
    assert any("elements are written" in line for line in problems(held, written | {name: written[name][1:]}))


def test_1024_ranks_by_formula():
    case = Case("pt_14b", 1024)
    tensor_size, data_size = case.run.parallel.tensor, case.world // case.run.parallel.tensor
    first = walks_of(case.request(rank, parts=("save",)) for rank in range(tensor_size))
    held = {
        case.rank_at(tensor, data, 0): held_by(data, data_size, first[tensor])
        for data in range(data_size)
        for tensor in range(tensor_size)
    }
    # The formula is right where it can be compared: with the first, middle and last replica.
    for rank in (0, 1, 2, 3, case.rank_at(1, data_size // 2, 0), case.rank_at(3, data_size - 1, 0)):
        walked = walk_of(case.request(rank, parts=("save",))).saved
        assert {name: saved.boxes for name, saved in walked.items() if saved.boxes} == {
            name: saved.boxes for name, saved in held[rank].items() if saved.boxes
        }
    written = written_boxes(held)
    assert problems(held, written) == []
    # The work is shared out, in parts of at most a file.
    num_bytes = [0] * case.world
    for name, parts in written.items():
        for rank, box in parts:
            num_bytes[rank] += box.num_elements * held[rank][name].dtype.itemsize
    assert max(num_bytes) <= sum(num_bytes) / case.world + DEFAULT_MAX_FILE_BYTES
