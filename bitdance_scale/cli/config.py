"""What can be set: `bitdance config print`, `explain` and `list`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from bitdance_scale.cli.command import Command, CommandParser, run_command, run_group
from bitdance_scale.config.describe import describe, explain
from bitdance_scale.config.kinds import KINDS, check_any, load_any
from bitdance_scale.config.load import dump_toml
from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.shipped import shipped_configs, summary
from bitdance_scale.train.process import EXIT_COMPLETE

COMMANDS: Mapping[str, Command] = {
    "print": Command("print a configuration with every setting resolved", "config", "main_print"),
    "explain": Command("explain a setting: type, default, meaning, legal values, rules", "config", "main_explain"),
    "list": Command("list the configurations and presets that come with the package", "config", "main_list"),
}


def main(arguments: Sequence[str] | None, prog: str | None) -> int:
    """The group; returns the exit code."""
    return run_group(COMMANDS, arguments or [], prog or "config", "What can be set, and what a configuration says.")


def main_print(arguments: Sequence[str] | None, prog: str | None) -> int:
    """`bitdance config print`; returns the exit code."""
    parser = CommandParser(
        prog, "Prints a configuration as TOML, with its preset, the files that it extends and all defaults filled in."
    )
    parser.add_config()
    return run_command(parser, arguments, _print)


def main_explain(arguments: Sequence[str] | None, prog: str | None) -> int:
    """`bitdance config explain`; returns the exit code."""
    parser = CommandParser(
        prog,
        "Explains a setting, such as data.resolutions, or all settings of a section, such as data: type, default,\n"
        "meaning, legal values, and the rules that read it. Without KEY it prints every setting.",
    )
    parser.add_argument("key", nargs="?", metavar="KEY", help="setting or section")
    return run_command(parser, arguments, _explain)


def main_list(arguments: Sequence[str] | None, prog: str | None) -> int:
    """`bitdance config list`; returns the exit code."""
    parser = CommandParser(prog, "Lists the configurations and the presets (model.preset) that come with the package.")
    return run_command(parser, arguments, _list)


def _print(options: argparse.Namespace) -> int:
    config = load_any(options.config, options.overrides)
    check_any(config, None)
    print(dump_toml(config), end="")
    return EXIT_COMPLETE


def _explain(options: argparse.Namespace) -> int:
    if options.key:
        print(explain(options.key), end="")
    else:
        print("\n".join(f"{kind}:\n{describe(schema)}" for schema, kind in KINDS.items()), end="")
    return EXIT_COMPLETE


def _list(options: argparse.Namespace) -> int:
    names = shipped_configs()
    width = max(map(len, [*names, *PRESETS]))
    print("configurations, by name wherever a CONFIG is asked for:")
    for name in names:
        print(f"  {name.ljust(width)}  {summary(name)}")
    print("\npresets, as model.preset=NAME:")
    for name, sections in PRESETS.items():
        model = sections["model"]
        print(f"  {name.ljust(width)}  {model['num_layers']} layers, width {model['hidden_size']}")
    return EXIT_COMPLETE
