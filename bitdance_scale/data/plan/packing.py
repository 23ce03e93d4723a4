"""Divides a global batch evenly among the packs of all data-parallel ranks.

All ranks compute the same partition from the lengths alone, without communication. Every rank gets the same number of
packs, because the pipeline schedule and ZeRO's collectives run once per pack on all ranks. All ranks get about the same
cost, in the whole step and in each of its packs, because they wait for the slowest one. This module decides how many
packs there are and makes a first division; `pack_exchange.py` evens it out and saves padding.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import ModelSection
from bitdance_scale.data.plan.pack_exchange import exchange
from bitdance_scale.errors import ConfigError


@dataclass(frozen=True)
class CostModel:
    """Time of a sample of L tokens: 16 (L + quadratic * L^2), in sixteenths of the linear layers of one token.

    Attributes:
        quadratic: cost of attention between two tokens over the cost of the linear layers of one token.
    """

    quadratic: float

    @classmethod
    def of_model(cls, model: ModelSection) -> CostModel:
        """The cost model of a transformer, from the multiply-adds of a layer.

        Per token these are the projections and SwiGLU; per pair of tokens the scores and values, half of them masked.
        """
        attention_width = model.num_heads * model.head_dim
        projections = model.hidden_size * (2 * attention_width + 2 * model.num_kv_heads * model.head_dim)
        return cls(quadratic=attention_width / (projections + 3 * model.hidden_size * model.ffn_size))

    def costs(self, lengths: np.ndarray) -> np.ndarray:
        """int64 [n], cost of samples of `lengths` [n] tokens; sums of integers are the same on every machine."""
        lengths = lengths.astype(np.float64)
        return np.rint(16.0 * (lengths + self.quadratic * (lengths * lengths))).astype(np.int64)


def partition_batch(
    lengths: np.ndarray,
    num_ranks: int,
    max_pack_tokens: int,
    cost_model: CostModel,
    packs_multiple: int = 1,
    pad_multiple: int = 1,
) -> list[list[list[int]]]:
    """The packs of every rank, as places in the global batch.

    It takes the fewest packs per rank that fit. It puts the samples, longest first, into the cheapest pack, and then
    exchanges samples between packs. No sample is dropped or repeated.

    Args:
        lengths: int64 [B], positions that each sample takes in a pack.
        num_ranks: data-parallel ranks.
        max_pack_tokens: positions that a pack may hold.
        cost_model: the cost to even out.
        packs_multiple: every rank gets a multiple of this many packs (micro-batches of an interleaved pipeline).
        pad_multiple: packs are padded to a multiple of this many positions (`data.pack_multiple`).

    Returns:
        [num_ranks][k], each a sorted list of places in 0 .. B - 1 with at least one place. Pack number i costs about
        the same on all ranks, which work on it at the same time; the most expensive packs come first.

    Raises:
        ConfigError: a sample is longer than a pack, or there are fewer samples than packs.
    """
    longest = int(lengths.max())
    if longest > max_pack_tokens:
        raise ConfigError(
            f"data.max_pack_tokens={max_pack_tokens}: a sample of the batch has {longest} positions. Raise "
            "data.max_pack_tokens, or lower text.max_caption_tokens or the largest bucket."
        )
    costs = cost_model.costs(lengths)
    fewest = max(1, -(-int(lengths.sum()) // (num_ranks * max_pack_tokens)))
    num_packs = fewest + -fewest % packs_multiple
    while (packs := _fill(lengths, costs, num_packs * num_ranks, max_pack_tokens)) is None:
        num_packs += packs_multiple
    if not all(packs):
        raise ConfigError(
            f"data.global_batch={len(lengths)} (evaluate.images where they are held out): {num_packs} packs on each of "
            f"{num_ranks} data-parallel replicas need at least {num_packs * num_ranks} samples. Raise it or "
            f"data.max_pack_tokens ({max_pack_tokens}), or run on fewer replicas."
        )
    # Without regard to the cap, costs are evenest. If exchanges cannot bring all packs under it, the cap comes first.
    even = _fill_cheapest(_longest_first(lengths), lengths.tolist(), costs.tolist(), len(packs), int(lengths.sum()))
    assert even is not None, "every pack has room"
    ranks = exchange(even, lengths, costs, num_ranks, max_pack_tokens, pad_multiple)
    if ranks is None:
        ranks = exchange(packs, lengths, costs, num_ranks, max_pack_tokens, pad_multiple)
    assert ranks is not None, "exchanges keep packs under the cap"
    return ranks


def fits(lengths: np.ndarray, num_packs: int, max_pack_tokens: int, cost_model: CostModel) -> bool:
    """Whether samples of `lengths` [n] fit into so many packs the way `partition_batch` fills them."""
    return _fill(lengths, cost_model.costs(lengths), num_packs, max_pack_tokens) is not None


def _fill(lengths: np.ndarray, costs: np.ndarray, num_packs: int, capacity: int) -> list[list[int]] | None:
    """Longest first, each into the cheapest pack with room; if a sample is left over, each into the fullest pack."""
    order = _longest_first(lengths)
    packs = _fill_cheapest(order, lengths.tolist(), costs.tolist(), num_packs, capacity)
    if packs is None:
        packs = _fill_fullest(order, lengths.tolist(), num_packs, capacity)
    if packs is not None:
        _open_empty(packs)
    return packs


def _longest_first(lengths: np.ndarray) -> list[int]:
    return np.argsort(-lengths, kind="stable").tolist()


def _fill_cheapest(
    order: list[int], lengths: list[int], costs: list[int], num_packs: int, capacity: int
) -> list[list[int]] | None:
    """Samples in this order, longest first, each into the cheapest pack with room; None if one does not fit."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [capacity] * num_packs
    open_packs = [(0, pack) for pack in range(num_packs)]
    # Packs without room for the present length, roomiest first: a shorter sample may fit them later.
    set_aside: list[tuple[int, int, int]] = []
    for place in order:
        length = lengths[place]
        while set_aside and -set_aside[0][0] >= length:
            _, pack, cost = heapq.heappop(set_aside)
            heapq.heappush(open_packs, (cost, pack))
        while open_packs and room[open_packs[0][1]] < length:
            cost, pack = heapq.heappop(open_packs)
            heapq.heappush(set_aside, (-room[pack], pack, cost))
        if not open_packs:
            return None
        cost, pack = open_packs[0]
        packs[pack].append(place)
        room[pack] -= length
        heapq.heapreplace(open_packs, (cost + costs[place], pack))
    return packs


def _fill_fullest(order: list[int], lengths: Sequence[int], num_packs: int, capacity: int) -> list[list[int]] | None:
    """Samples in this order, each into the fullest pack with room; None if one does not fit."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    by_room = [(capacity, pack) for pack in range(num_packs)]
    for place in order:
        found = bisect.bisect_left(by_room, (lengths[place], 0))
        if found == num_packs:
            return None
        room, pack = by_room.pop(found)
        packs[pack].append(place)
        bisect.insort(by_room, (room - lengths[place], pack))
    return packs


def _open_empty(packs: list[list[int]]) -> None:
    """Gives every empty pack the shortest sample of the pack with most samples, while some pack has two."""
    for pack in packs:
        if not pack:
            donor = max(packs, key=len)
            if len(donor) > 1:
                pack.append(donor.pop())
