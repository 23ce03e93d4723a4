"""Trains the binary visual tokenizer.

torchrun --standalone --nproc_per_node=2 pipelines/train_tokenizer.py CONFIG [section.key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bitdance_scale.config.load import describe, dump_toml, load_config
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.errors import BitDanceError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Trains the binary visual tokenizer.",
        epilog=f"settings:\n{describe(TokenizerConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides, TokenizerConfig)
        if options.print_config:
            print(dump_toml(config), end="")
            return 0
        # Imported late, so that --help and mistakes in the configuration answer at once.
        from bitdance_scale.train.tokenizer_trainer import train_tokenizer

        train_tokenizer(config)
    except BitDanceError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train_tokenizer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
