"""Says which `data.max_pack_tokens` wastes least, from the captions and sizes of the images that a run will train on.

    bitdance pack-length pt_14b --ranks 256
    bitdance pack-length CONFIG data.index_dir=/data/index --ranks 64 --longest 17920

For every number of packs that a replica may make of a step: the shortest cap that holds all of some global batches, and
what is lost with it. Packs of variable length are padded to `data.pack_multiple`; fixed ones (`data.pack_multiple =
data.max_pack_tokens`) to the cap. --longest is what memory allows (`bitdance memory` says); `data.max_pack_tokens` by
default.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

if TYPE_CHECKING:
    import numpy as np

_ROUNDING = 128
"""Caps are multiples of this where `data.pack_multiple` says that packs are fixed."""
_QUANTILES = (0.1, 0.5, 0.9, 1.0)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_config()
    parser.add_argument("--ranks", type=positive, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument(
        "--longest",
        type=positive,
        metavar="TOKENS",
        help="longest pack that memory allows (default: data.max_pack_tokens)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=4,
        metavar="N",
        help="global batches that the caps are chosen for, and as many to measure them on (default: 4)",
    )
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    check(config, options.ranks)

    from bitdance_scale.data.plan.pack_length import pack_lengths, table

    longest, multiple = options.longest or config.data.max_pack_tokens, config.data.pack_multiple
    multiple = _ROUNDING if multiple == config.data.max_pack_tokens else multiple
    num_replicas = options.ranks // (config.parallel.tensor * config.parallel.pipeline)
    lengths, sides_px = _step_lengths(config, 2 * options.steps)
    choices = pack_lengths(config, lengths[: options.steps], lengths[options.steps :], num_replicas, longest, multiple)
    if not choices:
        raise ConfigError(
            f"--longest {longest}: no number of packs holds the {len(lengths[0])} samples of a step on {num_replicas} "
            f"replicas; the longest has {max(map(max, lengths))} positions. Raise --longest or the number of replicas."
        )
    print(f"{len(lengths)} steps of {len(lengths[0]):,} samples on {num_replicas} replicas; positions of a sample:")
    _print_quantiles(lengths, sides_px)
    print(f"\n{table(choices)}")
    print("\n* least. Fixed length: data.pack_multiple = data.max_pack_tokens = the cap.")
    return EXIT_COMPLETE


def _step_lengths(config: RunConfig, num_steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Positions and resolutions, int64 [B] each, of the samples of the first steps."""
    from bitdance_scale.data.plan.plan import Plan
    from bitdance_scale.data.sample_builder import SampleBuilder
    from bitdance_scale.sequence.condition import load_condition
    from bitdance_scale.train.shared_index import training_index

    index = training_index(config.data)
    plan = Plan(config.run.seed, index, config.data)
    builder = SampleBuilder(config, index, load_condition(config))
    batches = [plan.batch(step) for step in range(num_steps)]
    return [builder.lengths(builder.build(batch)) for batch in batches], [batch.side_px for batch in batches]


def _print_quantiles(lengths: Sequence[np.ndarray], sides_px: Sequence[np.ndarray]) -> None:
    import numpy as np

    all_lengths, all_sides_px = np.concatenate(lengths), np.concatenate(sides_px)
    for side_px in np.unique(all_sides_px).tolist():
        found = np.quantile(all_lengths[all_sides_px == side_px], _QUANTILES).astype(int).tolist()
        texts = (f"{share:.0%} up to {length:,}" for share, length in zip(_QUANTILES, found, strict=True))
        print(f"  {side_px} px: {', '.join(texts)}")
