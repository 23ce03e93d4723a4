"""Steps that succeed on all ranks or fail on all ranks.

A rank that meets a full disk must not leave the others waiting in a collective: every step that touches the file system
runs through one of these two functions, which are collectives themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from bitdance_scale.errors import BitDanceError, CheckpointError

T = TypeVar("T")

logger = logging.getLogger(__name__)


def on_all_ranks(group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """Runs `action` on every rank and returns this rank's result once all have succeeded.

    Args:
        group: ranks that take part; None: the default group, or this process alone where there is none. An action
            must not communicate in it before it can fail.
        action: this rank's part.

    Raises:
        CheckpointError: on every rank, when any rank's action raised; it names the ranks and their errors.
    """
    result, error, problem = _attempt(action)
    if dist.is_initialized():
        problems: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
    else:
        problems = [problem]
    _raise_agreed(problems, error)
    return result


def on_first_rank(group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """Runs `action` on the group's first rank and returns its result on every rank.

    Raises:
        CheckpointError: on every rank, when the action raised.
    """
    if not dist.is_initialized():
        return on_all_ranks(group, action)
    message: list[tuple[T | None, str | None]] = [(None, None)]
    error = None
    if dist.get_rank(group) == 0:
        result, error, problem = _attempt(action)
        message = [(result, problem)]
    dist.broadcast_object_list(message, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    result, problem = message[0]
    _raise_agreed([problem], error)
    return result


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None, str | None]:
    """(result, error, its message); every kind of error, since the other ranks must hear of each."""
    try:
        return action(), None, None
    except BitDanceError as error:
        return None, error, str(error)
    except Exception as error:
        logger.debug("a checkpoint step failed", exc_info=True)
        return None, error, f"{type(error).__name__}: {error}"


def describe_failures(problems: dict[int, str], num_ranks: int) -> str:
    """One message of the failing ranks' messages (rank -> message); what all ranks say is said once."""
    if len(set(problems.values())) == 1 and len(problems) == num_ranks:
        return next(iter(problems.values()))
    return "; ".join(f"rank {rank}: {problem}" for rank, problem in sorted(problems.items()))


def _raise_agreed(problems: list[str | None], error: Exception | None) -> None:
    failed = {rank: problem for rank, problem in enumerate(problems) if problem is not None}
    if failed:
        raise CheckpointError(describe_failures(failed, len(problems))) from error
