"""What a rule over several settings is, and the arithmetic of its fixes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from bitdance_scale.config.schema import RunConfig

CheckRule = Callable[[RunConfig, int], Iterator[str]]
"""Takes the tree and the number of ranks; yields one message per violation: where, value, rule, fix."""


@dataclass(frozen=True)
class Rule:
    """A rule and the settings (or whole sections) it reads."""

    settings: tuple[str, ...]
    violations: CheckRule

    def is_readable(self, illegal: Collection[str]) -> bool:
        """Whether every setting it reads is legal by itself; a rule over an illegal one would only confuse."""
        return not any(path.startswith(setting) for path in illegal for setting in self.settings)

    @property
    def claim(self) -> str:
        """The rule in one sentence."""
        return self._doc()[0]

    @property
    def reason(self) -> str:
        """Why it must hold."""
        return self._doc()[1]

    def _doc(self) -> tuple[str, str]:
        claim, _, reason = inspect.getdoc(self.violations).partition("\n\n")
        return " ".join(claim.split()), " ".join(reason.split())


class RuleSet(list[Rule]):
    """The rules of one module, in the order in which they are written."""

    def rule(self, *settings: str) -> Callable[[CheckRule], CheckRule]:
        """Decorator that adds a function as the rule over these settings."""

        def register(function: CheckRule) -> CheckRule:
            self.append(Rule(settings, function))
            return function

        return register


def multiples_around(value: int, unit: int) -> list[int]:
    """The positive multiples of a unit next to a value, one or two."""
    below = value // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple > 0]


def nearest_multiples(value: int, unit: int) -> str:
    """The positive multiples next to a value, for a message."""
    return " or ".join(str(multiple) for multiple in multiples_around(value, unit))


def divisors(value: int) -> str:
    """All divisors of a positive number, for a message."""
    return ", ".join(str(divisor) for divisor in range(1, value + 1) if value % divisor == 0)
