"""Says what a run needs in memory, rank by rank, before it is started: no GPU and no data are needed.

    bitdance memory CONFIG [section.key=value ...] --ranks N

One line per pipeline stage (its first rank; the ranks of a stage need the same but for padding). GiB at the fullest
moment of a step, for GPUs: docs/memory.md says what is counted. For the training of a tokenizer it is the fullest rank,
and what the run costs in floating-point operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.kinds import check_any, load_any
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.train.process import EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_config()
    parser.add_argument("--ranks", type=positive, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument(
        "--vocab", type=positive, metavar="N", help="entries of the tokenizer (default: of text.path, else Qwen3's)"
    )
    parser.add_argument("--device-gib", type=float, default=80.0, metavar="GIB", help="memory of a GPU (default: 80)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    config = load_any(options.config, options.overrides)
    check_any(config, options.ranks)
    if isinstance(config, TokenizerConfig):
        return _run_tokenizer(options, config)

    from bitdance_scale.parallel.memory_table import on_gpu, remark, stage_lines, table
    from bitdance_scale.sequence.condition import vocab_size

    lines = stage_lines(on_gpu(config), options.vocab or vocab_size(config), options.ranks)
    print(table(lines, options.device_gib, is_markdown=options.markdown))
    print(f"\n{remark(lines)}")
    return EXIT_COMPLETE


def _run_tokenizer(options: argparse.Namespace, config: TokenizerConfig) -> int:
    from bitdance_scale.train.tokenizer_memory import estimate_tokenizer_memory, remark, table

    memory = estimate_tokenizer_memory(config, options.ranks)
    print(table([memory], options.device_gib, is_markdown=options.markdown))
    print(f"\n{remark(config, memory)}")
    return EXIT_COMPLETE
