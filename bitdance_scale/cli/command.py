"""How a command line is read: subcommands that are imported when they are called, and options in any place.

It is built on argparse, which the standard library has: typer would cost a tenth of a second more at every start, and
would say in its own words what is wrong with an option.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from bitdance_scale.credentials import WAY_OUT, find_credentials
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_REFUSED, run_process

Main = Callable[[Sequence[str] | None, str | None], int]
"""Takes the arguments and the name of the program (None: the process's own); returns the exit code."""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: what it does, in a line of `--help`.
        module: where it is, below this package.
        function: its `Main` there.
    """

    summary: str
    module: str
    function: str = "main"

    def load(self) -> Main:
        """Imports the subcommand."""
        main: Main = getattr(importlib.import_module(f"bitdance_scale.cli.{self.module}"), self.function)
        return main


class CommandParser(argparse.ArgumentParser):
    """A parser whose refusals are errors like all others, and whose options may stand anywhere.

    Args:
        prog: name of the program; None: the process's own.
        text: what `--help` says, its line breaks kept.
    """

    def __init__(self, prog: str | None, text: str | None) -> None:
        super().__init__(prog=prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raises the message as a ConfigError."""
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` shows how it is called")

    def add_config(self) -> None:
        """Adds CONFIG and the overrides."""
        self.add_argument(
            "config", metavar="CONFIG", help="TOML file, or the name of a shipped one: bitdance config list"
        )
        self.add_argument(
            "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
        )

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The options, which may stand before, between and after the positional arguments.

        Raises:
            ConfigError: the arguments are wrong, or one holds credentials, which others on the machine see.
        """
        given = [_in_utf8(text) for text in (sys.argv[1:] if arguments is None else arguments)]
        for argument in given:
            found = find_credentials(argument)
            if found is not None:
                raise ConfigError(f"{self.prog}: argument {argument!r} holds {found}: {WAY_OUT}")
        return self.parse_intermixed_args(given)


def _in_utf8(text: str) -> str:
    """An argument as the UTF-8 that it is, where the locale has taken its bytes for something else."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def positive(text: str) -> int:
    """The type of an option that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`, whose values `checkpoint.named_adapters.parse_adapters` reads."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER[=WEIGHT]",
        help="adapters to add to the weights, WEIGHT times (default: 1): a folder of them, ours or PEFT's, or a run "
        "with adapters; may be given several times",
    )


def run_command(
    parser: CommandParser, arguments: Sequence[str] | None, action: Callable[[argparse.Namespace], int]
) -> int:
    """Parses the arguments and runs the command as a job's process (`train/process.py`); returns the exit code."""
    return run_process(lambda: action(parser.parse(arguments)))


def run_group(
    commands: Mapping[str, Command],
    arguments: Sequence[str],
    prog: str,
    about: str,
    renamed: Mapping[str, str] | None = None,
) -> int:
    """Runs the subcommand that the first argument names; returns the exit code.

    Args:
        commands: name -> subcommand.
        arguments: of the command line.
        prog: how the group is called.
        about: what `--help` says above the list.
        renamed: name that is no subcommand any more -> what is called in its place.
    """
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in commands:
        return commands[name].load()(rest, f"{prog} {name}")
    if name in ("-h", "--help"):
        print(_group_help(commands, prog, about))
        return 0
    if not name:
        print(_group_help(commands, prog, about), file=sys.stderr)
        return EXIT_REFUSED
    return run_process(lambda: _refuse(name, commands, prog, renamed or {}))


def _refuse(name: str, commands: Mapping[str, Command], prog: str, renamed: Mapping[str, str]) -> NoReturn:
    if name in renamed:
        raise ConfigError(f"{prog}: there is no command {name!r} any more; it is `{prog} {renamed[name]}`")
    nearest = difflib.get_close_matches(name, commands, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the commands are {', '.join(commands)}"
    raise ConfigError(f"{prog}: there is no command {name!r}; {hint}")


def _group_help(commands: Mapping[str, Command], prog: str, about: str) -> str:
    width = max(map(len, commands))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in commands.items()]
    return "\n".join([f"usage: {prog} COMMAND ...", "", about, "", *lines, "", f"{prog} COMMAND --help says more."])
