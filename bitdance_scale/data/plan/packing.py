"""Deals a global batch out to the packs of all data-parallel ranks, evenly.

All ranks compute the same partition from the lengths alone, without communication. Every rank gets the same number of
packs, since the pipeline schedule and ZeRO's collectives run once per pack on all of them; and packs of equal cost,
since a step is as slow as its slowest rank.
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
# Exchanges that are tried for whether they fit the packs.
_MAX_FITS = 8
# Ranks this close to the mean are even: a further swap gains less than the step time varies.
_EVEN_SHARE = 1e-3


@dataclass(frozen=True)
class CostModel:
    """Time of a sample of L tokens, in units of 1/16 of one token's linear layers: 16 (L + quadratic * L^2).

    Attributes:
        quadratic: cost of attention between two tokens over the cost of the linear layers for one.
    """

    quadratic: float

    @classmethod
    def of_model(cls, model: ModelSection) -> CostModel:
        """From the multiply-adds per layer: projections and SwiGLU per token; scores and values, half of them masked,
        per pair of tokens.
        """
        attention_width = model.num_heads * model.head_dim
        projections = model.hidden_size * (2 * attention_width + 2 * model.num_kv_heads * model.head_dim)
        return cls(quadratic=attention_width / (projections + 3 * model.hidden_size * model.ffn_size))

    def costs(self, lengths: np.ndarray) -> np.ndarray:
        """int64 [n], cost of samples of `lengths` [n] tokens; integers, whose sums are the same on every machine."""
        lengths = lengths.astype(np.float64)
        return np.rint(16.0 * (lengths + self.quadratic * (lengths * lengths))).astype(np.int64)


def partition_batch(
    lengths: np.ndarray, num_ranks: int, max_pack_tokens: int, cost_model: CostModel, packs_multiple: int = 1
) -> list[list[list[int]]]:
    """Packs of every rank, as places in the global batch.

    The fewest packs per rank that fit; longest sample first into the cheapest pack that has room; packs to ranks so
    that costs even out; then exchanges between the dearest rank and the cheapest ones. No sample is dropped or repeated.

    Args:
        lengths: int64 [B], positions that each sample takes in a pack.
        num_ranks: data-parallel ranks.
        max_pack_tokens: positions a pack may hold.
        cost_model: what to even out.
        packs_multiple: every rank gets a multiple of this many packs (micro-batches of an interleaved pipeline).

    Returns:
        [num_ranks][k], each a sorted list of places in 0 .. B - 1, at least one; a rank's dearest pack comes first, so
        that the ranks do packs of like cost at the same time.

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
    """Whether samples of `lengths` [n] go into so many packs the way `partition_batch` fills them."""
    return _fill(lengths, cost_model.costs(lengths), num_packs, max_pack_tokens) is not None


def _fill(lengths: np.ndarray, costs: np.ndarray, num_packs: int, capacity: int) -> list[list[int]] | None:
    """Longest first, each into the cheapest pack with room; should that leave one over, each into the fullest."""
    order = np.lexsort((np.arange(len(lengths)), -lengths)).tolist()
    sizes, prices = lengths.tolist(), costs.tolist()
    packs = _fill_cheapest(order, sizes, prices, num_packs, capacity)
    if packs is None:
        packs = _fill_fullest(order, sizes, num_packs, capacity)
    if packs is not None:
        _open_empty(packs)
    return packs


def _fill_cheapest(
    order: list[int], lengths: list[int], costs: list[int], num_packs: int, capacity: int
) -> list[list[int]] | None:
    """Samples in this order, longest first, each into the cheapest pack that has room; None where one has nowhere to go."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [capacity] * num_packs
    # Packs without room for the present length, roomiest first: a shorter one may fit them again.
    open_packs, set_aside = [(0, pack) for pack in range(num_packs)], []
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
    """Samples in this order, each into the fullest pack that has room; None where one has nowhere to go."""
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
    """Gives every empty pack the shortest sample of the pack of most samples, as long as one has two."""
    for pack in packs:
        donor = max(packs, key=len)
        if not pack and len(donor) > 1:
            pack.append(donor.pop())


def _deal(packs: list[list[int]], costs: np.ndarray, num_ranks: int) -> list[list[list[int]]]:
    """Dearest pack first to the cheapest rank that still lacks packs."""
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
    """Exchanges samples between the dearest rank and one of the cheapest, in place, while that lowers the dearer of the two.

    One sample against one is not enough where a large image costs what four small ones do and a rank has a dozen: up to
    two change sides each way.
    """
    rank_costs = np.array([sum(costs[pack].sum() for pack in rank) for rank in ranks])
    for _ in range(_MAX_EXCHANGES_PER_RANK * len(ranks)):
        dear, moved = int(rank_costs.argmax()), 0
        for cheap in np.argsort(rank_costs, kind="stable")[:_MAX_PARTNERS].tolist():
            gap = int(rank_costs[dear] - rank_costs[cheap])
            if gap <= _EVEN_SHARE * rank_costs.mean():
                return
            moved = _exchange(ranks, dear, cheap, lengths, costs, capacity, gap)
            if moved:
                break
        if not moved:
            return
        rank_costs[dear] -= moved
        rank_costs[cheap] += moved


def _exchange(
    ranks: list[list[list[int]]],
    dear: int,
    cheap: int,
    lengths: np.ndarray,
    costs: np.ndarray,
    capacity: int,
    gap: int,
) -> int:
    """Makes the exchange that best halves the gap between two ranks and still fits their packs.

    Returns:
        The cost moved, 0 if no exchange narrows the gap.
    """
    ours, theirs = (np.array(sorted(place for pack in ranks[rank] for place in pack)) for rank in (dear, cheap))
    our_subsets, their_subsets = _small_subsets(len(ours)), _small_subsets(len(theirs))
    our_sums, their_sums = (
        np.append(costs[places], 0)[subsets].sum(axis=1)
        for places, subsets in ((ours, our_subsets), (theirs, their_subsets))
    )
    # For every subset of ours the one of theirs that brings the move nearest to half the gap.
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
            _refill(
                [place for place in kept.tolist() if place not in lost] + gained, lengths, len(ranks[rank]), capacity
            )
            for rank, kept, lost, gained in ((dear, ours, give, take), (cheap, theirs, take, give))
        ]
        if all(fitted):
            ranks[dear], ranks[cheap] = fitted
            return int(moves[choice])
    return 0


@functools.cache
def _small_subsets(count: int) -> np.ndarray:
    """int64 [s, 2], the subsets of at most two of `count` numbers; `count` itself stands for none."""
    singles = [(number, count) for number in range(count)]
    return np.array([(count, count), *singles, *itertools.combinations(range(count), 2)])


def _refill(places: list[int], lengths: np.ndarray, num_packs: int, capacity: int) -> list[list[int]]:
    """Samples into so many packs, longest first into the fullest that has room; empty where they do not fit."""
    sizes = dict(zip(places, lengths[places].tolist(), strict=True))
    packs = _fill_fullest(sorted(places, key=lambda place: (-sizes[place], place)), sizes, num_packs, capacity)
    if packs is None:
        return []
    _open_empty(packs)
    return packs if all(packs) else []
