"""Which `data.max_pack_tokens` wastes least, for a number of replicas, from the lengths of real batches.

Every replica gets the same number k of packs. Packs of a fixed length therefore hold ranks x k x length positions,
however many the batch has. A cap just above (positions of a batch) / (ranks x k) wastes little; a cap just below it
costs every replica one more pack. The latter holds for packs of variable length too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.plan.packing import CostModel, fits, partition_batch

_MAX_TRIES = 64
"""Caps to try for a number of packs, starting at the shortest that is possible."""


@dataclass(frozen=True)
class PackLength:
    """A cap, and what batches cost with it.

    Attributes:
        num_packs: packs of every replica.
        max_pack_tokens: the shortest cap with which this number of packs holds each of the batches.
        padding_variable: share of padding among all positions if packs are padded to the next multiple.
        padding_fixed: the same if all packs are padded to the cap.
        slowest: cost of the most expensive replica over the mean.
        more_packs: share of all batches that need more packs and therefore a longer step.
    """

    num_packs: int
    max_pack_tokens: int
    padding_variable: float
    padding_fixed: float
    slowest: float
    more_packs: float


def pack_lengths(
    config: RunConfig,
    batches: Sequence[np.ndarray],
    further: Sequence[np.ndarray],
    num_ranks: int,
    max_pack_tokens: int,
    multiple: int,
) -> list[PackLength]:
    """The best cap for every possible number of packs, fewest packs first.

    Args:
        config: the run; model and pipeline are read.
        batches: int64 [B] each, positions of the samples of global batches; the caps are chosen for these.
        further: more batches; the caps are measured on both.
        num_ranks: data-parallel replicas.
        max_pack_tokens: the longest pack that memory allows.
        multiple: caps are multiples of it, and packs of variable length are padded to a multiple of it.

    Returns:
        An empty list if even the longest packs cannot hold every sample.
    """
    longest, most = max(int(batch.max()) for batch in batches), max(int(batch.sum()) for batch in batches)
    step, highest = config.parallel.packs_multiple, max_pack_tokens // multiple * multiple
    found: list[PackLength] = []
    for num_packs in range(step, min(map(len, batches)) // num_ranks + 1, step):
        needed = max(longest, -(-most // (num_ranks * num_packs)))
        lowest = needed + -needed % multiple
        for cap in range(lowest, min(highest, lowest + _MAX_TRIES * multiple) + 1, multiple):
            if all(fits(batch, num_ranks * num_packs, cap, CostModel.of_model(config.model)) for batch in batches):
                found.append(_measured(config, [*batches, *further], num_ranks, num_packs, cap, multiple))
                break
        # No cap can be shorter than the longest sample, so more packs bring nothing.
        if found and found[-1].max_pack_tokens == longest + -longest % multiple:
            break
    return found


def _measured(
    config: RunConfig, batches: Sequence[np.ndarray], num_ranks: int, num_packs: int, cap: int, multiple: int
) -> PackLength:
    cost_model = CostModel.of_model(config.model)
    used = variable = fixed = num_more = 0
    slowest = []
    for lengths in batches:
        ranks = partition_batch(lengths, num_ranks, cap, cost_model, config.parallel.packs_multiple, multiple)
        costs = cost_model.costs(lengths)
        by_rank = [sum(int(costs[pack].sum()) for pack in packs) for packs in ranks]
        slowest.append(max(by_rank) / np.mean(by_rank))
        used += int(lengths.sum())
        variable += sum(-(-int(lengths[pack].sum()) // multiple) * multiple for packs in ranks for pack in packs)
        fixed += num_ranks * len(ranks[0]) * cap
        num_more += len(ranks[0]) > num_packs
    return PackLength(
        num_packs, cap, 1 - used / variable, 1 - used / fixed, float(np.mean(slowest)), num_more / len(batches)
    )


def table(choices: Sequence[PackLength]) -> str:
    """Markdown; the least padding of either kind is marked."""
    least = [min(getattr(choice, name) for choice in choices) for name in ("padding_variable", "padding_fixed")]
    lines = [
        "| packs of a replica | cap | padding | padding, fixed length | slowest over mean | steps with more packs |",
        "|---|---|---|---|---|---|",
    ]
    for choice in choices:
        shares = [
            f"{share:.2%}{' *' if share == best else ''}"
            for share, best in zip((choice.padding_variable, choice.padding_fixed), least, strict=True)
        ]
        lines.append(
            f"| {choice.num_packs} | {choice.max_pack_tokens:,} | {' | '.join(shares)} | {choice.slowest:.4f} | "
            f"{choice.more_packs:.0%} |"
        )
    return "\n".join(lines)
