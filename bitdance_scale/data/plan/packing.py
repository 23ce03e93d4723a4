"""Divides a global batch evenly among the packs of all data-parallel ranks.

All ranks compute the same partition from the lengths alone, without communication. Every rank gets the same number of
packs, because the pipeline schedule and ZeRO's collectives run once per pack on all ranks. All ranks get about the same
cost, because a step is as slow as its slowest rank.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import ModelSection
from bitdance_scale.errors import ConfigError

_MAX_EXCHANGES_PER_RANK = 8
_MAX_PARTNERS = 8
# At most this many exchanges between two ranks are tried, the best first, until one fits the packs.
_MAX_FITS = 8
# Ranks this close to the mean count as even: another exchange would gain less than the step time varies.
_EVEN_SHARE = 1e-3


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
    lengths: np.ndarray, num_ranks: int, max_pack_tokens: int, cost_model: CostModel, packs_multiple: int = 1
) -> list[list[list[int]]]:
    """The packs of every rank, as places in the global batch.

    It takes the fewest packs per rank that fit, and puts the samples, longest first, into the cheapest pack that has
    room. It gives the packs to the ranks so that costs even out, and then exchanges samples between the most expensive
    rank and the cheapest ones. No sample is dropped or repeated.

    Args:
        lengths: int64 [B], positions that each sample takes in a pack.
        num_ranks: data-parallel ranks.
        max_pack_tokens: positions that a pack may hold.
        cost_model: the cost to even out.
        packs_multiple: every rank gets a multiple of this many packs (micro-batches of an interleaved pipeline).

    Returns:
        [num_ranks][k], each a sorted list of places in 0 .. B - 1 with at least one place. The most expensive pack of a
        rank comes first, so that the ranks work on packs of similar cost at the same time.

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
            f"data.global_batch={len(lengths)}: {num_packs} packs on each of {num_ranks} data-parallel replicas need "
            f"at least {num_packs * num_ranks} samples. Raise data.global_batch or data.max_pack_tokens "
            f"({max_pack_tokens}), or run on fewer replicas."
        )
    ranks = _deal(packs, costs, num_ranks)
    _even_out(ranks, lengths, costs, max_pack_tokens)
    for rank in ranks:
        for pack in rank:
            pack.sort()
        rank.sort(key=lambda pack: (-costs[pack].sum(), pack))
    return ranks


def fits(lengths: np.ndarray, num_packs: int, max_pack_tokens: int, cost_model: CostModel) -> bool:
    """Whether samples of `lengths` [n] fit into so many packs the way `partition_batch` fills them."""
    return _fill(lengths, cost_model.costs(lengths), num_packs, max_pack_tokens) is not None


def _fill(lengths: np.ndarray, costs: np.ndarray, num_packs: int, capacity: int) -> list[list[int]] | None:
    """Longest first, each into the cheapest pack with room; if a sample is left over, each into the fullest pack."""
    order = np.lexsort((np.arange(len(lengths)), -lengths)).tolist()
    packs = _fill_cheapest(order, lengths.tolist(), costs.tolist(), num_packs, capacity)
    if packs is None:
        packs = _fill_fullest(order, lengths.tolist(), num_packs, capacity)
    if packs is not None:
        _open_empty(packs)
    return packs


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


def _fill_fullest(
    order: list[int], lengths: Sequence[int] | dict[int, int], num_packs: int, capacity: int
) -> list[list[int]] | None:
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
        donor = max(packs, key=len)
        if not pack and len(donor) > 1:
            pack.append(donor.pop())


def _deal(packs: list[list[int]], costs: np.ndarray, num_ranks: int) -> list[list[list[int]]]:
    """Gives out packs, most expensive first, each to the cheapest rank that still lacks packs."""
    pack_costs = np.array([costs[pack].sum() for pack in packs])
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    rank_costs = np.zeros(num_ranks)
    for pack in np.lexsort((np.arange(len(packs)), -pack_costs)).tolist():
        rank = int(rank_costs.argmin())
        ranks[rank].append(packs[pack])
        rank_costs[rank] += pack_costs[pack]
        if len(ranks[rank]) * num_ranks == len(packs):
            rank_costs[rank] = np.inf
    return ranks


def _even_out(ranks: list[list[list[int]]], lengths: np.ndarray, costs: np.ndarray, capacity: int) -> None:
    """Exchanges samples, in place, between the most expensive rank and one of the cheapest while that evens them out.

    Exchanging one sample for one is not enough if a large image costs as much as four small ones and a rank has only a
    dozen samples. So up to two samples move each way.
    """
    rank_costs = np.array([sum(costs[pack].sum() for pack in rank) for rank in ranks])
    for _ in range(_MAX_EXCHANGES_PER_RANK * len(ranks)):
        most, moved = int(rank_costs.argmax()), 0
        for least in np.argsort(rank_costs, kind="stable")[:_MAX_PARTNERS].tolist():
            gap = int(rank_costs[most] - rank_costs[least])
            if gap <= _EVEN_SHARE * rank_costs.mean():
                return
            moved = _exchange(ranks, most, least, lengths, costs, capacity, gap)
            if moved:
                break
        if not moved:
            return
        rank_costs[most] -= moved
        rank_costs[least] += moved


def _exchange(
    ranks: list[list[list[int]]],
    most: int,
    least: int,
    lengths: np.ndarray,
    costs: np.ndarray,
    capacity: int,
    gap: int,
) -> int:
    """Makes the exchange that brings two ranks closest together and still fits their packs.

    Args:
        ranks: the packs of every rank; changed in place.
        most: the more expensive of the two ranks.
        least: the cheaper one.
        lengths: int64 [B].
        costs: int64 [B].
        capacity: positions that a pack may hold.
        gap: cost of `most` minus cost of `least`.

    Returns:
        The cost that moved; 0 if no exchange narrows the gap.
    """
    ours, theirs = (np.array(sorted(place for pack in ranks[rank] for place in pack)) for rank in (most, least))
    our_subsets, their_subsets = _small_subsets(len(ours)), _small_subsets(len(theirs))
    our_sums, their_sums = (
        np.append(costs[places], 0)[subsets].sum(axis=1)
        for places, subsets in ((ours, our_subsets), (theirs, their_subsets))
    )
    # For every subset of ours, the two of theirs that bring the move nearest to half the gap.
    order = np.argsort(their_sums, kind="stable")
    wanted = our_sums - gap // 2
    right = np.searchsorted(their_sums[order], wanted)
    pairs = np.concatenate(
        [np.stack([np.arange(len(our_sums)), order[np.clip(right - side, 0, len(order) - 1)]]) for side in (0, 1)],
        axis=1,
    )
    moves = our_sums[pairs[0]] - their_sums[pairs[1]]
    is_useful = (moves > 0) & (moves < gap)
    pairs, moves = pairs[:, is_useful], moves[is_useful]
    for choice in np.argsort(np.abs(2 * moves - gap), kind="stable")[:_MAX_FITS].tolist():
        give, take = our_subsets[pairs[0, choice]], their_subsets[pairs[1, choice]]
        give, take = ours[give[give < len(ours)]].tolist(), theirs[take[take < len(theirs)]].tolist()
        fitted = [
            _refill([place for place in own.tolist() if place not in out] + into, lengths, len(ranks[rank]), capacity)
            for rank, own, out, into in ((most, ours, give, take), (least, theirs, take, give))
        ]
        if all(fitted):
            ranks[most], ranks[least] = fitted
            return int(moves[choice])
    return 0


@functools.cache
def _small_subsets(count: int) -> np.ndarray:
    """int64 [s, 2], the subsets of at most two of 0 .. count - 1; `count` marks an empty place."""
    singles = [(number, count) for number in range(count)]
    return np.array([(count, count), *singles, *itertools.combinations(range(count), 2)])


def _refill(places: list[int], lengths: np.ndarray, num_packs: int, capacity: int) -> list[list[int]]:
    """Samples in so many packs, longest first, each in the fullest with room; an empty list if they do not fit."""
    sizes = dict(zip(places, lengths[places].tolist(), strict=True))
    packs = _fill_fullest(sorted(places, key=lambda place: (-sizes[place], place)), sizes, num_packs, capacity)
    if packs is None:
        return []
    _open_empty(packs)
    return packs if all(packs) else []
