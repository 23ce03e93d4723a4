"""Deals a global batch out to the packs of all data-parallel ranks, evenly.

All ranks compute the same partition from the lengths alone, without communication. Every rank gets the same number of
packs, since the pipeline schedule and ZeRO's collectives run once per pack on all of them; and packs of equal cost,
since a step is as slow as its slowest rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import ModelSection
from bitdance_scale.errors import ConfigError

_MAX_SWAPS_PER_RANK = 8
_MAX_PARTNERS = 8
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
        per pair of tokens."""
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
    that costs even out; then swaps between the dearest and the cheapest rank. No sample is dropped or repeated.

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


def _fill(lengths: np.ndarray, costs: np.ndarray, num_packs: int, capacity: int) -> list[list[int]] | None:
    """Longest first, each into the cheapest pack with room; should that leave one over, each into the fullest."""
    order = np.lexsort((np.arange(len(lengths)), -lengths)).tolist()
    for prefers_cheapest in (True, False):
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        pack_costs, room = np.zeros(num_packs, dtype=np.int64), np.full(num_packs, capacity, dtype=np.int64)
        for place in order:
            score = pack_costs if prefers_cheapest else room
            pack = int(np.where(room >= lengths[place], score, np.inf).argmin())
            if room[pack] < lengths[place]:
                break
            packs[pack].append(place)
            pack_costs[pack] += costs[place]
            room[pack] -= lengths[place]
        else:
            _open_empty(packs)
            return packs
    return None


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
    """Swaps samples between the dearest rank and one of the cheapest, in place, while that lowers the dearer of the two."""
    rank_costs = np.array([sum(costs[pack].sum() for pack in rank) for rank in ranks])
    for _ in range(_MAX_SWAPS_PER_RANK * len(ranks)):
        dearest, gain = int(rank_costs.argmax()), 0
        for cheap in np.argsort(rank_costs, kind="stable")[:_MAX_PARTNERS].tolist():
            gap = int(rank_costs[dearest] - rank_costs[cheap])
            if gap <= _EVEN_SHARE * rank_costs.mean():
                return
            gain = _swap_best(ranks[dearest], ranks[cheap], lengths, costs, capacity, gap)
            if gain > 0:
                break
        if gain <= 0:
            return
        rank_costs[dearest] -= gain
        rank_costs[cheap] += gain


def _swap_best(
    dear: list[list[int]], cheap: list[list[int]], lengths: np.ndarray, costs: np.ndarray, capacity: int, gap: int
) -> int:
    """Makes the swap of one sample of each side that best halves `gap`; returns the cost moved, 0 if none helps."""
    ours, our_pack, _ = _flatten(dear, lengths, capacity)
    theirs, their_pack, their_room = _flatten(cheap, lengths, capacity)
    longer = lengths[ours][:, None] - lengths[theirs][None, :]
    moved = costs[ours][:, None] - costs[theirs][None, :]
    # The dearer sample is the longer one, so only the cheap side can run out of room.
    is_possible = (longer <= their_room[None, :]) & (moved > 0) & (moved < gap)
    distance = np.where(is_possible, np.abs(moved - gap / 2), np.inf)
    row, column = np.unravel_index(int(distance.argmin()), distance.shape)
    if not is_possible[row, column]:
        return 0
    dear_pack, cheap_pack = dear[our_pack[row]], cheap[their_pack[column]]
    dear_pack[dear_pack.index(ours[row])] = int(theirs[column])
    cheap_pack[cheap_pack.index(theirs[column])] = int(ours[row])
    return int(moved[row, column])


def _flatten(packs: list[list[int]], lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples of a rank, the pack each is in, and the room left in that pack."""
    places = np.concatenate([np.array(pack, dtype=np.int64) for pack in packs])
    number = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
    room = np.array([capacity - int(lengths[pack].sum()) for pack in packs])
    return places, number, room[number]
