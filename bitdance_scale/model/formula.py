"""A formula: a function of tensors that runs operator by operator, or compiled into one kernel.

Without memory (`parallel/fake_ranks.py`) a compiled formula is one operator, which makes nothing but its results.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

FORMULAS: dict[str, Formula] = {}
"""All formulas, by name."""
# The compiler makes a program of its own for sizes of 0 and 1.
MIN_COMPILED_POSITIONS = 2


class Formula:
    """A function of tensors that is run operator by operator, or compiled once for all numbers of positions.

    Args:
        function: takes tensors, numbers and truth values; returns tensors that are no views of its arguments.
        whole: names of its tensors whose first axis is not positions.
        rewritten: name of the one tensor that it changes in place; empty: none.

    Attributes:
        name: of the function.
    """

    def __init__(self, function: Callable[..., Any], whole: tuple[str, ...], rewritten: str) -> None:
        functools.update_wrapper(self, function)
        self.name, self.function, self.whole, self._rewritten = function.__name__, function, whole, rewritten
        names = list(inspect.signature(function).parameters)
        assert {*whole, *([rewritten] if rewritten else ())} <= set(names), "names of arguments"
        self._is_of_positions = [name not in whole for name in names]

    def __call__(self, *values: Any, is_compiled: bool) -> Any:
        """The function of values; the one place through which formulas are called."""
        if not is_compiled or len(values[0]) < MIN_COMPILED_POSITIONS:
            return self.function(*values)
        if isinstance(values[0], FakeTensor):
            return self.stand_in(*values)
        return self.compiled(*map(_marked, values, self._is_of_positions))

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        """The function, compiled when it is first called: loading the compiler takes seconds."""
        # Not dynamic: only the marked axes are.
        return torch.compile(self.function, fullgraph=True, dynamic=False)

    @functools.cached_property
    def stand_in(self) -> Callable[..., Any]:
        """The compiled function as tensors without memory see it: one operator, which makes nothing but its results."""
        mutated = {self._rewritten} if self._rewritten else ()
        operator = torch.library.custom_op(f"bitdance::{self.name}", self.function, mutates_args=mutated)
        operator.register_fake(self.function)
        return operator


def _marked(value: Any, is_of_positions: bool) -> Any:
    """An argument as the compiler should see it: without a gradient, and of any number of positions."""
    if not isinstance(value, torch.Tensor):
        return value
    # The compiler would compile again for a tensor that requires a gradient.
    value = value.detach()
    if is_of_positions:
        torch._dynamo.mark_dynamic(value, 0)
    return value


def formula(*, whole: tuple[str, ...] = (), rewritten: str = "") -> Callable[[Callable[..., Any]], Formula]:
    """Makes a function a `Formula` and lists it."""

    def listed(function: Callable[..., Any]) -> Formula:
        made = Formula(function, whole, rewritten)
        FORMULAS[made.name] = made
        return made

    return listed


def have_equal_length(first: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Tells the compiler that tensors have as many positions; it would take them for different numbers."""
    for other in others:
        if other is not None:
            torch._check(other.shape[0] == first.shape[0])
