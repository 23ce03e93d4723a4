"""Says which `data.max_pack_tokens` wastes least, from the captions and sizes of the images that a run will train on.

    python tools/pack_length.py pt_14b --ranks 256
    python tools/pack_length.py CONFIG data.index_dir=/data/index --ranks 64 --longest 17920

For every number of packs that a replica may make of a step: the shortest cap that holds all of some global batches, and what
is lost with it. Packs of variable length are padded to `data.pack_multiple`; fixed ones (`data.pack_multiple =
data.max_pack_tokens`) to the cap. --longest is what memory allows (tools/memory.py says), `data.max_pack_tokens` by default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.plan.pack_length import PackLength, pack_lengths
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.data.sample_builder import SampleBuilder
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.sequence.tokens import load_text_tokenizer
from bitdance_scale.train.shared_index import training_index

_ROUNDING = 128
"""Caps are multiples of this where `data.pack_multiple` says that packs are fixed."""
_QUANTILES = (0.1, 0.5, 0.9, 1.0)


def step_lengths(config: RunConfig, num_steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Positions and resolutions, int64 [B] each, of the samples of the first steps.

    Raises:
        DataError: shards or tokenizer cannot be read.
    """
    index = training_index(config.data)
    tokenizer = load_text_tokenizer(config.text, config.vision.block_tokens, is_causal=config.model.mask == "causal")
    plan, builder = Plan(config.run.seed, index, config.data), SampleBuilder(config, index, tokenizer)
    batches = [plan.batch(step) for step in range(num_steps)]
    return [builder.lengths(builder.build(batch)) for batch in batches], [batch.side_px for batch in batches]


def table(choices: Sequence[PackLength]) -> str:
    """Markdown; the least padding of either kind is marked."""
    least = [min(getattr(choice, name) for choice in choices) for name in ("padding_variable", "padding_fixed")]
    lines = [
        "| packs of a replica | cap | padding | padding, fixed length | slowest over mean | steps with more packs |",
        "|---|---|---|---|---|---|",
    ]
    for choice in choices:
        shares = [
            f"{share:.2%}{' *' if share == best else ''}"
            for share, best in zip((choice.padding_variable, choice.padding_fixed), least, strict=True)
        ]
        lines.append(
            f"| {choice.num_packs} | {choice.max_pack_tokens:,} | {' | '.join(shares)} | {choice.slowest:.4f} | "
            f"{choice.more_packs:.0%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file with the run's settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--ranks", type=int, required=True, help="GPUs of the run")
    parser.add_argument("--longest", type=int, help="longest pack that memory allows; default: data.max_pack_tokens")
    parser.add_argument(
        "--steps", type=int, default=4, help="global batches the caps are chosen for, and again measured on"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        check(config, options.ranks)
        longest, multiple = options.longest or config.data.max_pack_tokens, config.data.pack_multiple
        multiple = _ROUNDING if multiple == config.data.max_pack_tokens else multiple
        num_replicas = options.ranks // (config.parallel.tensor * config.parallel.pipeline)
        lengths, sides = step_lengths(config, 2 * options.steps)
        choices = pack_lengths(
            config, lengths[: options.steps], lengths[options.steps :], num_replicas, longest, multiple
        )
        if not choices:
            raise ConfigError(
                f"--longest {longest}: no number of packs holds the {len(lengths[0])} samples of a step on {num_replicas} "
                f"replicas; the longest has {max(map(max, lengths))} positions. Raise --longest or the number of replicas."
            )
    except BitDanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(lengths)} steps of {len(lengths[0]):,} samples on {num_replicas} replicas; positions of a sample:")
    all_lengths, all_sides = np.concatenate(lengths), np.concatenate(sides)
    for side in np.unique(all_sides).tolist():
        found = np.quantile(all_lengths[all_sides == side], _QUANTILES).astype(int).tolist()
        print(
            f"  {side} px: "
            + ", ".join(f"{share:.0%} up to {length:,}" for share, length in zip(_QUANTILES, found, strict=True))
        )
    print("\n" + table(choices))
    print("\n* least. Fixed length: data.pack_multiple = data.max_pack_tokens = the cap.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
