"""Ranks that differ are found, whatever they differ in."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.fake_cuda.agreement import disagreements, lone_members, standstill
from tests.fake_cuda.recording import Collective

REDUCE = Collective("step", "allreduce_", (0, 1), ((4, 2),), "torch.float32", -1)
SHARE = Collective("step", "broadcast_", (0, 1, 2), ((3,),), "torch.uint8", 0)
SEND = Collective("step", "send", (1, 2), ((8, 1, 4),), "torch.bfloat16", 2)
RECEIVE = Collective("step", "recv_", (1, 2), ((8, 1, 4),), "torch.bfloat16", 1)
CALLS = {0: [REDUCE, SHARE, REDUCE], 1: [REDUCE, SHARE, SEND, REDUCE], 2: [RECEIVE, SHARE]}


def test_equal_orders_agree():
    assert disagreements(CALLS) == []
    # Between groups the order is free, as long as each group has its own.
    assert disagreements({0: [REDUCE, REDUCE, SHARE], 1: [SEND, REDUCE, REDUCE, SHARE], 2: [SHARE, RECEIVE]}) == []


@pytest.mark.parametrize(
    ("rank", "calls", "says"),
    [
        (1, [REDUCE, SHARE, SEND], "group 0, 1: call 1 is allreduce_ .* on rank 0 and missing on rank 1"),
        (0, [dataclasses.replace(REDUCE, shapes=((4, 3),)), SHARE, REDUCE], r"call 0 is allreduce_ of \[4, 3\]"),
        (0, [dataclasses.replace(REDUCE, dtype="torch.bfloat16"), SHARE, REDUCE], "call 0 .*bfloat16 .*float32"),
        (0, [dataclasses.replace(REDUCE, name="allgather_"), SHARE, REDUCE], "call 0 is allgather_"),
        (2, [RECEIVE, dataclasses.replace(SHARE, peer=1)], "broadcast_ from 0 .* broadcast_ from 1"),
        (2, [RECEIVE], "group 0, 1, 2: call 0 is broadcast_ .* and missing on rank 2"),
        (2, [SHARE], "message 0 from rank 1 to rank 2: sent is .* received missing"),
        (2, [dataclasses.replace(RECEIVE, shapes=((9, 1, 4),)), SHARE], r"message 0 .* received \[9, 1, 4\]"),
    ],
)
def test_a_difference_is_named(rank, calls, says):
    (found,) = disagreements(CALLS | {rank: calls})
    assert re.search(says, found), found


def test_equal_orders_come_to_an_end():
    assert standstill(CALLS | {2: [SHARE, RECEIVE]}) == []
    # Sent after all have shared, received before.
    assert len(standstill(CALLS)) == 3
    # What is sent to a rank, or waited for of a rank, that was not walked.
    assert standstill({0: CALLS[0], 1: CALLS[1]}) == []
    assert standstill({2: CALLS[2]}) == []


def test_two_groups_in_opposite_orders_stand():
    pair = dataclasses.replace(REDUCE, ranks=(0, 1), shapes=((7,),))
    whole = dataclasses.replace(REDUCE, ranks=(0, 1, 2))
    calls = {0: [pair, whole], 1: [whole, pair], 2: [whole]}
    assert disagreements(calls) == []
    lines = standstill(calls)
    assert [line.partition(":")[0] for line in lines] == [f"rank {rank} waits in call 0" for rank in range(3)]


def test_messages_that_wait_for_each_other_stand():
    send = dataclasses.replace(SEND, ranks=(1, 2))
    back, return_ = dataclasses.replace(send, peer=1), dataclasses.replace(RECEIVE, peer=2)
    assert standstill({1: [send, return_], 2: [RECEIVE, back]}) == []
    calls = {1: [return_, send], 2: [RECEIVE, back]}
    assert disagreements(calls) == []
    assert len(standstill(calls)) == 2


def test_a_group_with_one_walked_rank_is_named():
    assert lone_members(CALLS) == []
    assert lone_members({0: CALLS[0], 2: []}) == ["group 0, 1: only rank 0 was walked"]
