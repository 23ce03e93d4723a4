"""Every element of a checkpoint is written once: jobs of 8 whose ranks are all walked, one of 1,024 by formula."""

from __future__ import annotations

import pytest

from tests.fake_cuda.cases import Case
from tests.fake_cuda.save_plans import held_by, problems, written_boxes
from tests.fake_cuda.walks import walk_of, walks_of

pytestmark = [pytest.mark.fake_cuda, pytest.mark.usefixtures("fake_cuda")]


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
    assert problems(held) == []
    # A rank whose part is lost is missed.
    lost = max(name for name in held[7] if name.startswith("optimizer.master."))
    del held[7][lost]
    with pytest.raises(AssertionError, match="the ranks hold"):
        problems(held)


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
    assert problems(held) == []
    # The work is shared out: no rank writes more than twice the average.
    written = [0] * case.world
    for name, parts in written_boxes(held).items():
        for rank, box in parts:
            written[rank] += box.num_elements * held[rank][name].dtype.itemsize
    assert max(written) < 2 * sum(written) / case.world
