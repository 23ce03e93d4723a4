"""Whether ranks call the same collectives in the same order: what shows on two cores where a large job would hang."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from tests.fake_cuda.recording import Collective

_MESSAGES = frozenset(("send", "recv_"))


def disagreements(calls: Mapping[int, Sequence[Collective]]) -> list[str]:
    """What ranks do differently, as sentences; none where all agree.

    In every group, all of its ranks that were walked must call the same operations on tensors of the same shapes and
    dtype in the same order. What one rank sends to another, that one must receive, in the same order.

    Args:
        calls: of every rank that was walked, in order.
    """
    found = []
    for ranks, by_rank in sorted(_by_group(calls).items()):
        first, *others = sorted(by_rank)
        for other in others:
            place, mine, theirs = _first_difference(by_rank[first], by_rank[other])
            if place is not None:
                found.append(
                    f"group {_shown(ranks)}: call {place} is {mine} on rank {first} and {theirs} on rank {other}"
                )
    for (source, target), (sent, received) in sorted(_messages(calls).items()):
        place, mine, theirs = _first_difference(sent, received)
        if place is not None:
            found.append(f"message {place} from rank {source} to rank {target}: sent is {mine}, received {theirs}")
    return found


def standstill(calls: Mapping[int, Sequence[Collective]]) -> list[str]:
    """Where ranks wait for each other for ever, as sentences; none where all come to their end.

    Each rank makes its calls one after the other. A collective ends when all of its ranks that were walked are in it,
    and a message is received once it was sent. Ranks that call the same things in every group can still stand: one is
    in a group in which the other comes later.

    Args:
        calls: of every rank that was walked, in order.
    """
    place = dict.fromkeys(calls, 0)
    num_sent: Counter[tuple[int, int]] = Counter()

    def call_of(rank: int) -> Collective | None:
        return calls[rank][place[rank]] if place[rank] < len(calls[rank]) else None

    def may_go_on(rank: int, call: Collective) -> bool:
        if call.name in _MESSAGES:
            return call.name == "send" or call.peer not in calls or num_sent[call.peer, rank] > 0
        members = [call_of(other) for other in call.ranks if other in calls]
        return all(other is not None and other.ranks == call.ranks and other.name not in _MESSAGES for other in members)

    moved = True
    while moved:
        moved = False
        for rank in calls:
            while (call := call_of(rank)) is not None and may_go_on(rank, call):
                moved = True
                if call.name in _MESSAGES:
                    num_sent[(rank, call.peer) if call.name == "send" else (call.peer, rank)] += (
                        1 if call.name == "send" else -1
                    )
                for member in [rank] if call.name in _MESSAGES else call.ranks:
                    if member in place:
                        place[member] += 1
    return [
        f"rank {rank} waits in call {place[rank]}: {_described(call)} in group {_shown(call.ranks)}"
        for rank in calls
        if (call := call_of(rank)) is not None
    ]


def lone_members(calls: Mapping[int, Sequence[Collective]]) -> list[str]:
    """Groups of several ranks in which only one of those that were walked is, as sentences; none where all have two."""
    return [
        f"group {_shown(ranks)}: only rank {next(iter(by_rank))} was walked"
        for ranks, by_rank in sorted(_by_group(calls).items())
        if len(ranks) > 1 and len(by_rank) == 1
    ]


def _by_group(calls: Mapping[int, Sequence[Collective]]) -> dict[tuple[int, ...], dict[int, list[str]]]:
    """Group -> rank -> its calls there; of ranks that were walked, those without a call have an empty list."""
    groups: dict[tuple[int, ...], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for rank, made in calls.items():
        for call in made:
            if call.name not in _MESSAGES:
                groups[call.ranks][rank].append(_described(call))
    for ranks, by_rank in groups.items():
        for rank in calls:
            if rank in ranks:
                by_rank[rank] += []
    return groups


def _messages(calls: Mapping[int, Sequence[Collective]]) -> dict[tuple[int, int], tuple[list[str], list[str]]]:
    """(sender, receiver) -> what the one sends and the other receives, where both were walked."""
    found: dict[tuple[int, int], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for rank, made in calls.items():
        for call in made:
            if call.name in _MESSAGES and call.peer in calls:
                ends = (rank, call.peer) if call.name == "send" else (call.peer, rank)
                found[ends][call.name != "send"].append(f"{_shapes(call)} {call.dtype}")
    return found


def _first_difference(first: Sequence[str], second: Sequence[str]) -> tuple[int | None, str, str]:
    for place in range(max(len(first), len(second))):
        mine, theirs = (calls[place] if place < len(calls) else "missing" for calls in (first, second))
        if mine != theirs:
            return place, mine, theirs
    return None, "", ""


def _described(call: Collective) -> str:
    source = f" from {call.peer}" if call.peer >= 0 else ""
    return f"{call.name}{source} of {_shapes(call)} {call.dtype} ({call.phase})"


def _shapes(call: Collective) -> str:
    return ", ".join(str(list(shape)) for shape in call.shapes)


def _shown(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
