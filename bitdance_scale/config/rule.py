"""What a rule over several settings is, and the arithmetic of its fixes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from bitdance_scale.config.schema import RunConfig

RunRule = Callable[[RunConfig], Iterator[str]]
"""Takes the tree; yields one message per violation: where, value, rule, fix."""
RankRule = Callable[[RunConfig, int], Iterator[str]]
"""The same with the number of ranks of the job."""


@dataclass(frozen=True)
class Rule:
    """A rule over settings.

    Attributes:
        settings: those it reads, or whole sections.
        claim: the rule in one sentence.
        reason: why it must hold.
        function: what yields the violations.
        needs_ranks: whether it can only be checked where the number of ranks is known.
    """

    settings: tuple[str, ...]
    claim: str
    reason: str
    function: RankRule
    needs_ranks: bool

    def violations(self, config: RunConfig, world_size: int | None) -> Iterator[str]:
        """One message per violation; none where the rule needs a number of ranks and `world_size` is None."""
        if world_size is not None:
            return self.function(config, world_size)
        # A rule that needs no ranks does not look at the number.
        return iter(()) if self.needs_ranks else self.function(config, 0)

    def is_readable(self, illegal: Collection[str]) -> bool:
        """Whether every setting it reads is legal by itself; a rule over an illegal one would only confuse."""
        return not any(path.startswith(setting) for path in illegal for setting in self.settings)

    def reads(self, path: str) -> bool:
        """Whether the rule is about a setting, the section it is in, or something inside it."""
        return any(
            f"{path}.".startswith(f"{setting}.") or f"{setting}.".startswith(f"{path}.") for setting in self.settings
        )


class RuleSet(list[Rule]):
    """The rules of one module, in the order in which they are written.

    The first paragraph of a function's docstring is the rule, the second its reason.
    """

    def rule(self, *settings: str) -> Callable[[RunRule], RunRule]:
        """Decorator that adds a function as the rule over these settings."""

        def register(function: RunRule) -> RunRule:
            self._add(settings, function, lambda config, world_size: function(config), needs_ranks=False)
            return function

        return register

    def rank_rule(self, *settings: str) -> Callable[[RankRule], RankRule]:
        """Decorator that adds a function as the rule over these settings and the number of ranks."""

        def register(function: RankRule) -> RankRule:
            self._add(settings, function, function, needs_ranks=True)
            return function

        return register

    def _add(
        self, settings: tuple[str, ...], documented: RunRule | RankRule, function: RankRule, *, needs_ranks: bool
    ) -> None:
        claim, _, reason = (inspect.getdoc(documented) or "").partition("\n\n")
        self.append(Rule(settings, " ".join(claim.split()), " ".join(reason.split()), function, needs_ranks))


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
