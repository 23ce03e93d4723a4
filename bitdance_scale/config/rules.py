"""Every rule that a run's configuration must keep, checked before any process group exists.

`ranges.py` says what each setting may be by itself. `training_stages.py` and the files that end in `_rules.py` hold the
rules that span settings, one function each.
"""

from __future__ import annotations

from bitdance_scale.config import (
    benchmark_rules,
    data_rules,
    family_rules,
    lora_rules,
    model_rules,
    optim_rules,
    parallel_rules,
    storage_rules,
    training_stages,
)
from bitdance_scale.config.ranges import CONSTRAINTS, range_violations
from bitdance_scale.config.rule import Rule
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError

RULES: tuple[Rule, ...] = (
    *model_rules.RULES,
    *family_rules.RULES,
    *parallel_rules.RULES,
    *data_rules.RULES,
    *storage_rules.RULES,
    *optim_rules.RULES,
    *lora_rules.RULES,
    *benchmark_rules.RULES,
    *training_stages.RULES,
)


def check(config: RunConfig, world_size: int | None) -> None:
    """Refuses a configuration that cannot train as it says.

    Args:
        config: the resolved tree.
        world_size: ranks of the run; None: not known, and the rules that depend on it are left out.

    Raises:
        ConfigError: lists every violation with the setting, its value, the rule and how to fix it.
    """
    illegal = range_violations(config)
    violations = list(illegal.values())
    for rule in RULES:
        if rule.is_readable(illegal):
            violations += rule.violations(config, world_size)
    if violations:
        count = "1 rule is" if len(violations) == 1 else f"{len(violations)} rules are"
        lines = [f"the configuration of run {config.run.name!r} cannot be trained; {count} broken:"]
        raise ConfigError("\n".join([*lines, *(f"- {violation}" for violation in violations)]))


def rules_table() -> str:
    """All rules as Markdown: those over several settings with their reasons, then the legal values of each setting."""
    lines = ["| Rule | Settings | Reason |", "|---|---|---|"]
    for rule in RULES:
        settings = ", ".join(f"`{setting}`" for setting in rule.settings)
        # A pipe ends a cell even inside code.
        reason = rule.reason.replace("|", "\\|")
        lines.append(f"| {rule.claim} | {settings} | {reason} |")
    lines += ["", "| Setting | Must be |", "|---|---|"]
    lines += [f"| `{setting}` | {constraint} |" for setting, constraint in CONSTRAINTS.items()]
    return "\n".join(lines) + "\n"
