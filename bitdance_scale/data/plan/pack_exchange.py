"""Exchanges samples between the packs of a global batch to even out costs and to save padding.

ZeRO-3 gathers parameters in every pack, so the ranks meet after each of their packs and not just after each step. The
packs that run at the same time form a *round*: pack number c of every rank. Four things count:

- no pack is longer than the cap;
- the packs of a round cost the same on all ranks; rounds may differ from each other;
- all packs of a rank together cost the same on all ranks;
- packs end just before a multiple of `pad_multiple`, to which they are padded.

Each is a term of an energy, and samples move only where the sum of the terms falls. Exchanging one sample for one, or
for none, is enough, because the packs of a round are chosen to be alike. Many pairs of packs exchange at a time, as
array operations. All numbers are integers and nothing is drawn at random: the result is the same on every machine.
"""

from __future__ import annotations

import numpy as np

_MIN_ROUGH, _MAX_ROUGH, _MAX_REPAIR, _NUM_FINE, _NUM_LAST = 12, 48, 32, 24, 12
"""How often packs exchange samples: for packs of equal cost (fewer times if some are still longer than the cap), for
little padding too, for ranks of equal cost."""
_SORT_EVERY = 4
_PARTNERS = 7
"""Packs among which one that is far off looks for an exchange."""
_MAX_CANDIDATES = 8
"""Samples of a pack that are considered at a time; the next time it is the turn of others."""
_EVEN_SHARE = 0.007
"""Packs this close to the mean cost of their round are even enough."""
_OUTLIER_SHARE = 0.025
"""Packs that cost so much more or less than the mean have rounds of their own."""
_PADDING_SHARE = 0.006
"""Deviation from the mean cost of a round that is as bad as `pad_multiple` positions of padding."""
_RANK_WEIGHT = 1
"""Weight of the deviations of ranks over those of packs."""
_MAX_COST = 1 << 20
"""Costs of packs are about as large at most, so that the energies of `_NEVER` and less fit 64 bits."""
_NEVER = 1 << 60
"""More than any exchange can gain."""
_SLACK_TOKENS = 10
"""So far before a multiple lie the mean lengths of rounds: packs vary by about as much."""


def exchange(
    packs: list[list[int]],
    lengths: np.ndarray,
    costs: np.ndarray,
    num_ranks: int,
    max_pack_tokens: int,
    pad_multiple: int,
) -> list[list[list[int]]] | None:
    """The packs of every rank, after exchanges.

    Args:
        packs: num_ranks * k lists of places, none empty; they may be longer than the cap.
        lengths: int64 [B], positions that each sample takes in a pack.
        costs: int64 [B], cost of each sample.
        num_ranks: data-parallel ranks.
        max_pack_tokens: positions that a pack may hold.
        pad_multiple: packs are padded to a multiple of this many positions.

    Returns:
        [num_ranks][k] packs; None if a pack is still longer than the cap.
    """
    grid = _Grid(packs, lengths, costs, num_ranks, max_pack_tokens, pad_multiple)
    grid.even_out_packs()
    if grid.is_too_long():
        return None
    grid.deal()
    grid.save_padding()
    grid.even_out_ranks()
    return grid.ranks()


class _Grid:
    """Packs as rows of arrays; row c * num_ranks + r is pack c of rank r.

    Attributes:
        slots: int64 [N, W], the places in each pack, then the number of samples as a filler.
        counts: int64 [N], samples of each pack.
        tokens: int64 [N], length of each pack.
        costs: int64 [N], cost of each pack.
        targets: int64 [N], the cost that each pack should have, equal within a round.
        rank_costs: int64 [num_ranks].
    """

    def __init__(
        self,
        packs: list[list[int]],
        lengths: np.ndarray,
        costs: np.ndarray,
        num_ranks: int,
        max_pack_tokens: int,
        pad_multiple: int,
    ) -> None:
        self._filler = len(lengths)
        self._num_ranks, self._num_rounds = num_ranks, len(packs) // num_ranks
        self._cap, self._multiple = max_pack_tokens, pad_multiple
        # A filler has no length and no cost, so that it stands for "nothing" in an exchange.
        self._lengths = np.append(lengths, 0).astype(np.int64)
        # In units so large that no square of a cost overflows.
        self._cost_unit = 1 + max(int(costs.sum()) // len(packs), int(costs.max())) // _MAX_COST
        self._costs = np.append(costs, 0).astype(np.int64) // self._cost_unit
        self.counts = np.array([len(pack) for pack in packs])
        # The last slot is always a filler; the ones before it let a pack grow.
        self.slots = np.full((len(packs), int(self.counts.max()) + 3), self._filler)
        for row, pack in enumerate(packs):
            self.slots[row, : len(pack)] = pack
        self.tokens = self._lengths[self.slots].sum(axis=1)
        self.costs = self._costs[self.slots].sum(axis=1)
        self.targets = self.rank_costs = np.zeros(0, dtype=np.int64)
        self._must_fit, self._too_long, self._padding = self._energies()
        self._turn = 0

    def _energies(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [T], the energies of a pack of 0 .. T - 1 tokens: for being longer than the cap, and for padding."""
        tokens = np.arange(max(self._cap, int(self.tokens.max())) + int(self._lengths.max()) + 1)
        mean_cost = int(self.costs.sum()) // len(self.costs)
        excess = np.maximum(tokens - self._cap, 0)
        too_long = (excess > 0) * (mean_cost * mean_cost // 20) + excess * (mean_cost * mean_cost // 2000)
        unit = 2 * max(1, int(mean_cost * _PADDING_SHARE)) ** 2
        padding, multiple = -tokens % self._multiple, self._multiple
        # Concave, so that of two packs one gives its padding to the other until a whole multiple can be saved.
        energy = padding * (2 * multiple - padding) * unit // (multiple * multiple)
        return (excess > 0) * _NEVER, too_long, np.where((excess > 0) | (multiple >= self._cap), 0, energy)

    def is_too_long(self) -> bool:
        """Whether a pack is longer than the cap."""
        return bool((self.tokens > self._cap).any())

    def ranks(self) -> list[list[list[int]]]:
        """[num_ranks][k] packs, each sorted; the most expensive round comes first."""
        rows = [sorted(row[:count]) for row, count in zip(self.slots.tolist(), self.counts.tolist(), strict=True)]
        rounds = np.argsort(-self.costs.reshape(self._num_rounds, -1).sum(axis=1), kind="stable").tolist()
        return [[rows[number * self._num_ranks + rank] for number in rounds] for rank in range(self._num_ranks)]

    def even_out_packs(self) -> None:
        """Brings packs under the cap and to the same cost within their round; ranks do not matter yet."""
        rows = np.arange(len(self.costs))
        even_cost = int(int(self.costs.sum()) // len(self.costs) * _EVEN_SHARE)
        for number in range(_MAX_ROUGH):
            if number % _SORT_EVERY == 0:
                is_even = number >= _MIN_ROUGH and np.abs(self.costs - self.targets).max() <= even_cost
                if number >= _MAX_REPAIR if self.is_too_long() else is_even:
                    break
                self._sort()
                self._aim_at_multiples()
            deviations = self.costs - self.targets
            if self.is_too_long():
                key, energy = self.tokens, self._too_long
            else:
                key, energy = np.abs(deviations) if number % 4 else deviations, self._must_fit
            self._exchange(rows, key, deviations, energy, _PARTNERS if number % 2 else 1, 0)

    def deal(self) -> None:
        """Gives the packs of each round to the ranks, the most expensive to the rank that is cheapest so far."""
        rank_costs = np.zeros(self._num_ranks, dtype=np.int64)
        order = []
        for rows in np.arange(len(self.costs)).reshape(self._num_rounds, -1):
            most_expensive_first = rows[np.argsort(-self.costs[rows], kind="stable")]
            dealt = np.empty_like(rows)
            dealt[np.argsort(rank_costs, kind="stable")] = most_expensive_first
            rank_costs += self.costs[dealt]
            order.append(dealt)
        self._reorder(np.concatenate(order))
        self.rank_costs = rank_costs

    def save_padding(self) -> None:
        """Moves the ends of packs to just before multiples while costs stay even."""
        rows = np.arange(len(self.costs))
        energy = self._must_fit + self._padding
        for number in range(_NUM_FINE):
            deviations = self.costs - self.targets
            key = np.abs(deviations) if number % 4 < 2 else -self.tokens % self._multiple
            self._exchange(rows, key, deviations, energy, _PARTNERS if number % 2 else 1, _RANK_WEIGHT)

    def even_out_ranks(self) -> None:
        """Exchanges samples between ranks, within one round at a time so that a rank exchanges only once."""
        energy = self._must_fit + self._padding
        rounds = np.arange(len(self.costs)).reshape(self._num_rounds, -1)
        for number in range(_NUM_LAST):
            key = np.abs(self.rank_costs - int(self.rank_costs.sum()) // self._num_ranks)
            num_partners = _PARTNERS if number // self._num_rounds % 2 else 1
            deviations = self.costs - self.targets
            self._exchange(rounds[number % self._num_rounds], key, deviations, energy, num_partners, 4 * _RANK_WEIGHT)

    def _sort(self) -> None:
        """Puts packs that are alike into the same round, and makes the mean cost of each round its target."""
        num_ranks, mean = self._num_ranks, int(self.costs.sum()) // len(self.costs)
        order = np.argsort(-self.costs, kind="stable")
        margin = int(mean * _OUTLIER_SHARE)
        high = -(-int((self.costs > mean + margin).sum()) // num_ranks) * num_ranks
        low = len(order) + -int((self.costs < mean - margin).sum()) // num_ranks * num_ranks
        if high < low:
            # Packs with as much attention have as many large images, so that exchanging small ones evens them out.
            others = order[high:low]
            attention = self.costs * self._cost_unit - 16 * self.tokens
            order[high:low] = others[np.argsort(-attention[others], kind="stable")]
        self._reorder(order)
        self.targets = np.repeat(self.costs.reshape(self._num_rounds, -1).sum(axis=1) // num_ranks, num_ranks)

    def _aim_at_multiples(self) -> None:
        """Shifts the targets so that packs of the mean length of their round have little padding.

        What one round gains others lose. So all but one come to lie before a multiple.
        """
        if self._multiple >= self._cap:
            return
        means = self.tokens.reshape(self._num_rounds, -1).sum(axis=1) // self._num_ranks
        beyond = (means + _SLACK_TOKENS) % self._multiple
        shifts = -beyond
        order = np.argsort(-beyond, kind="stable")
        num_up = int(beyond.sum()) // self._multiple
        shifts[order[:num_up]] += self._multiple
        shifts[order[min(num_up, len(order) - 1)]] -= shifts.sum()
        self.targets += np.repeat(shifts * self.costs.sum() // self.tokens.sum(), self._num_ranks)

    def _reorder(self, order: np.ndarray) -> None:
        self.slots, self.counts = self.slots[order], self.counts[order]
        self.tokens, self.costs = self.tokens[order], self.costs[order]

    def _exchange(
        self,
        rows: np.ndarray,
        key: np.ndarray,
        deviations: np.ndarray,
        energy: np.ndarray,
        num_partners: int,
        rank_weight: int,
    ) -> None:
        """Makes the best exchange of each pack of high key with one of its partners, if it lowers the energy.

        Args:
            rows: int64 [n], the packs that may take part.
            key: int64 [n], packs with high keys choose.
            deviations: int64 [N], cost of each pack minus its target.
            energy: int64 [T], energy of a pack by its tokens.
            num_partners: partners of each pack that chooses, of no other pack.
            rank_weight: weight of the squared deviations of ranks, over those of packs.
        """
        num_partners = min(num_partners, len(rows) - 1)
        num_choosers = len(rows) // (num_partners + 1) if num_partners else 0
        if not num_choosers:
            return
        self._turn += 1
        order = rows[np.argsort(-key, kind="stable")]
        others = np.roll(order[num_choosers:], 5 * self._turn)[: num_choosers * num_partners]
        ours = np.repeat(order[:num_choosers], num_partners)
        theirs = others.reshape(num_partners, num_choosers).T.ravel()
        our_slots, their_slots = self._candidates(ours), self._candidates(theirs)
        give, take = self.slots[ours[:, None], our_slots], self.slots[theirs[:, None], their_slots]
        more_tokens = self._lengths[take][:, None, :] - self._lengths[give][:, :, None]
        more_cost = self._costs[take][:, None, :] - self._costs[give][:, :, None]
        slope, curve = 2 * (deviations[ours] - deviations[theirs]), np.full(len(ours), 2)
        if rank_weight:
            our_ranks, their_ranks = ours % self._num_ranks, theirs % self._num_ranks
            slope += 2 * rank_weight * (self.rank_costs[our_ranks] - self.rank_costs[their_ranks])
            curve += 2 * rank_weight * (our_ranks != their_ranks)
        # (x + d)^2 + (y - d)^2 - x^2 - y^2 = d (2 d + 2 (x - y)), for packs and likewise for ranks.
        change = more_cost * (curve[:, None, None] * more_cost + slope[:, None, None])
        change += energy.take(self.tokens[ours][:, None, None] + more_tokens, mode="clip")
        change += energy.take(self.tokens[theirs][:, None, None] - more_tokens, mode="clip")
        change = change.reshape(len(ours), -1)
        best = change.argmin(axis=1)
        gains = change[np.arange(len(ours)), best]
        gains -= energy.take(self.tokens[ours], mode="clip") + energy.take(self.tokens[theirs], mode="clip")
        chosen = np.arange(num_choosers) * num_partners + gains.reshape(-1, num_partners).argmin(axis=1)
        chosen = chosen[gains[chosen] < 0]
        our_choice, their_choice = np.divmod(best[chosen], their_slots.shape[1])
        self._apply(ours[chosen], our_slots[chosen, our_choice], theirs[chosen], their_slots[chosen, their_choice])

    def _candidates(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n, c], slots of each pack to exchange, in turn if there are many; the last is the first filler."""
        counts = self.counts[rows][:, None]
        width = min(_MAX_CANDIDATES, self.slots.shape[1]) - 1
        slots = np.arange(width)[None, :]
        slots = np.where(counts > width, (slots + self._turn * width) % counts, slots)
        return np.concatenate([slots, counts], axis=1)

    def _apply(self, ours: np.ndarray, our_slots: np.ndarray, theirs: np.ndarray, their_slots: np.ndarray) -> None:
        """Exchanges what is in these slots of these packs; leaves out what would empty or overfill a pack."""
        give, take = self.slots[ours, our_slots], self.slots[theirs, their_slots]
        grows = (take != self._filler).astype(np.int64) - (give != self._filler)
        our_counts, their_counts = self.counts[ours] + grows, self.counts[theirs] - grows
        most = self.slots.shape[1] - 1
        is_possible = (np.minimum(our_counts, their_counts) >= 1) & (np.maximum(our_counts, their_counts) <= most)
        ours, our_slots, theirs, their_slots, give, take, grows = (
            values[is_possible] for values in (ours, our_slots, theirs, their_slots, give, take, grows)
        )
        more_tokens, more_cost = self._lengths[take] - self._lengths[give], self._costs[take] - self._costs[give]
        if len(self.rank_costs):
            np.add.at(self.rank_costs, ours % self._num_ranks, more_cost)
            np.subtract.at(self.rank_costs, theirs % self._num_ranks, more_cost)
        for rows, slots, sign, new in ((ours, our_slots, 1, take), (theirs, their_slots, -1, give)):
            self.slots[rows, slots] = new
            self.tokens[rows] += sign * more_tokens
            self.costs[rows] += sign * more_cost
            self.counts[rows] += sign * grows
            # Fillers stay behind the samples.
            shrunk = sign * grows < 0
            holes, last = rows[shrunk], self.counts[rows[shrunk]]
            self.slots[holes, slots[shrunk]] = self.slots[holes, last]
            self.slots[holes, last] = self._filler
