"""The terms of the roofline: seconds of one kind of work, from FLOPs, bytes and messages.

A rate is what the machine reaches, not its peak: bytes/s or FLOP/s. `docs/plan.md` has the same formulas in words.
"""

from __future__ import annotations

from collections.abc import Sequence


def products_s(flops: float, rate: float) -> float:
    """Seconds of matrix products.

    Args:
        flops: two per multiply-add.
        rate: FLOP/s that large products reach.
    """
    return flops / rate


def moved_s(num_bytes: float, rate: float) -> float:
    """Seconds of kernels that the memory limits: bytes read and written over the rate of both together."""
    return num_bytes / rate


def gather_s(num_bytes: float, num_ranks: int, rate: float, message_s: float) -> float:
    """Seconds of an all-gather, or of a reduce-scatter: (n - 1) / n of the whole passes each rank's link.

    Args:
        num_bytes: of the whole tensor.
        num_ranks: n ranks, of which each begins (or ends) with an equal part.
        rate: bytes/s of a rank's link in one direction.
        message_s: fixed time of a collective.
    """
    if num_ranks == 1:
        return 0.0
    return message_s + (num_ranks - 1) / num_ranks * num_bytes / rate


def sum_s(num_bytes: float, num_ranks: int, rate: float, message_s: float) -> float:
    """Seconds of an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather_s(num_bytes, num_ranks, rate, message_s)


def send_s(num_bytes: float, rate: float, message_s: float) -> float:
    """Seconds of a message to a neighbour of the pipeline."""
    return message_s + num_bytes / rate


def bubble_share(pipeline: int, virtual_stages: int, num_micro_batches: int) -> float:
    """Idle time of a pipeline rank over its busy time, (p - 1) / (m v) (Narayanan et al. 2021, Sec. 2.2)."""
    return (pipeline - 1) / (num_micro_batches * virtual_stages)


def bubble_s(rank_times_s: Sequence[float], virtual_stages: int) -> float:
    """Seconds in which the slowest rank of a pipeline waits while it fills and drains.

    That is one micro-batch on every other rank. With equal ranks it is `bubble_share` of the slowest rank's busy time.

    Args:
        rank_times_s: seconds of one micro-batch, forward and backward, on every pipeline rank.
        virtual_stages: stages of a rank.
    """
    return (sum(rank_times_s) - max(rank_times_s)) / virtual_stages


def group_rate(
    num_ranks: int, stride: int, gpus_per_node: int, node_rate: float, network_rate: float
) -> tuple[float, bool]:
    """(bytes/s of a rank's part of a ring through a group of ranks, whether the ring leaves the node).

    Args:
        num_ranks: ranks of the group.
        stride: distance of two neighbours in the numbering of ranks; those of a node follow each other.
        gpus_per_node: ranks of a node.
        node_rate: bytes/s of a GPU to others of its node.
        network_rate: bytes/s of a GPU's network adapter.

    A ring that leaves a node enters and leaves it once. It can use the adapters of all its members there.
    """
    if num_ranks == 1 or (num_ranks - 1) * stride < gpus_per_node:
        return node_rate, False
    members = max(1, min(num_ranks, gpus_per_node // stride))
    return min(node_rate, members * network_rate), True
