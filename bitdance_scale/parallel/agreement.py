"""What one rank finds out and all ranks must act on: an error, a result of the first rank, a flag.

A rank that gives up alone leaves the others waiting in a collective. Every step that may fail on some ranks only
therefore runs inside `all_ranks` or `on_first_rank`, which are collectives themselves and raise the same error on every
rank. Without a process group they are plain calls.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from bitdance_scale.atomic_files import is_disk_full
from bitdance_scale.errors import BitDanceError, DiskFullError

T = TypeVar("T")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def all_ranks(
    group: dist.ProcessGroup | None = None,
    *,
    other: type[BitDanceError] | None = None,
    sums: list[int] | None = None,
) -> Iterator[None]:
    """Runs a block that may fail on some ranks, and raises on every rank when it failed on any.

    One number is summed; the errors themselves travel only when there are any. The block must not communicate in the
    group before it can fail.

    Args:
        group: ranks that take part; None: all.
        other: type that errors which are not ours, such as an OSError, are raised as; None: their own.
        sums: numbers of this rank, as many on every rank, which the block may set; after it they are the sums over the
            ranks. They travel with the number that is summed anyway.

    Raises:
        BitDanceError: of the type of the first failing rank's error; the message names the ranks.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001  # The other ranks must hear of every error.
        error = caught
    num_failed, *totals = summed_numbers([int(error is not None), *(sums or ())], group)
    if num_failed:
        raise _first(from_all_ranks(_portable(error, other), group)) from error
    if sums is not None:
        sums[:] = totals


def on_first_rank(
    action: Callable[[], T], group: dist.ProcessGroup | None = None, *, other: type[BitDanceError] | None = None
) -> T:
    """Runs `action` on the group's first rank and returns its result, which must be picklable, on every rank.

    Raises:
        BitDanceError: on every rank, what the action raised; `other` as in `all_ranks`.
    """
    if not dist.is_initialized():
        with all_ranks(other=other):
            return action()
    message: list[tuple[T | None, Exception | None]] = [(None, None)]
    error: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            message = [(action(), None)]
        except Exception as caught:  # noqa: BLE001  # The other ranks must hear of every error.
            error = caught
            message = [(None, _portable(error, other))]
    dist.broadcast_object_list(message, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    result, failure = message[0]
    if failure is not None:
        raise failure from error
    return result  # type: ignore[return-value]  # None only where T is.


def any_rank(is_true: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether a flag is true on any rank of the group; a collective with one answer for all."""
    return any_rank_each([is_true], group)[0]


def any_rank_each(are_true: Sequence[bool], group: dist.ProcessGroup | None = None) -> list[bool]:
    """`any_rank` of several flags, in one collective."""
    if not dist.is_initialized():
        return list(are_true)
    is_nccl = dist.get_backend(group) == "nccl"
    flags = torch.tensor([int(flag) for flag in are_true], dtype=torch.int32, device="cuda" if is_nccl else "cpu")
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in flags.tolist()]


def summed_numbers(values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """The sums over the ranks of a group of their numbers, as many on each; one collective."""
    if not dist.is_initialized():
        return list(values)
    is_nccl = dist.get_backend(group) == "nccl"
    numbers = torch.tensor(values, dtype=torch.int64, device="cuda" if is_nccl else "cpu")
    dist.all_reduce(numbers, group=group)
    result: list[int] = numbers.tolist()
    return result


def from_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What the ranks of a group have, in their order, on all of them; it travels pickled, in a collective."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
    return values


def largest_number(value: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest of the numbers that the ranks of a group have; a collective."""
    if not dist.is_initialized():
        return value
    is_nccl = dist.get_backend(group) == "nccl"
    number = torch.tensor([value], dtype=torch.int64, device="cuda" if is_nccl else "cpu")
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
    return int(number)


def first_rank_numbers(*values: float) -> list[float]:
    """The first rank's numbers on every rank, where those of the others may differ in the last bit; a collective."""
    if not dist.is_initialized():
        return list(values)
    is_nccl = dist.get_backend() == "nccl"
    numbers = torch.tensor(values, dtype=torch.float64, device="cuda" if is_nccl else "cpu")
    dist.broadcast(numbers, src=0)
    result: list[float] = numbers.tolist()
    return result


def describe_failures(messages: Mapping[int, str], num_ranks: int) -> str:
    """One message of the failing ranks' messages (rank -> message); what all ranks say is said once."""
    if len(set(messages.values())) == 1 and len(messages) == num_ranks:
        return next(iter(messages.values()))
    return "; ".join(f"rank {rank}: {message}" for rank, message in sorted(messages.items()))


def _portable(error: Exception | None, other: type[BitDanceError] | None) -> Exception | None:
    """The error as it travels between ranks."""
    if error is None or isinstance(error, BitDanceError):
        return error
    message = f"{type(error).__name__}: {error}"
    if other is not None:
        logger.debug("a step failed", exc_info=error)
        # A full disk stays one: what to do about it differs.
        kind = DiskFullError if is_disk_full(error) and issubclass(DiskFullError, other) else other
        return kind(message)
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # Anything may go wrong in an exception's own pickling.
        return RuntimeError(message)
    return copy if isinstance(copy, Exception) else RuntimeError(message)


def _first(errors: list[Exception | None]) -> Exception:
    failed = {rank: error for rank, error in enumerate(errors) if error is not None}
    first = next(iter(failed.values()))
    if not isinstance(first, BitDanceError):
        return first
    ours = {rank: str(error) for rank, error in failed.items() if isinstance(error, BitDanceError)}
    return type(first)(describe_failures(ours, len(errors)))
