"""Makes a checkpoint of released weights: of a published BitDance folder, or of a Qwen3 folder to pretrain from.

    python tools/convert_from_hf.py BitDance-14B-16x imported
    python tools/convert_from_hf.py Qwen3-14B imported --autoencoder BitDance-Tokenizer/ae_d16c32.safetensors

A Qwen3 gets the resolution and query tokens (new embedding rows: the mean of the old ones plus small noise), a diffusion
head and a projector with initial values, and the autoencoder whose weights file is named (`ae_config.json`, or
`NAME_config.json` for NAME.safetensors, beside it). OUT is a run folder at step 0; a run starts from it under any layout:

    torchrun ... pipelines/pretrain.py CONFIG run.start_from=imported text.path=imported/tokenizer \\
        vision.weights=imported/ae.safetensors

Weights are copied part by part: memory does not grow with the model. docs/interchange.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import NewParts, open_source
from bitdance_scale.errors import BitDanceError
from bitdance_scale.wording import file_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = _parse(arguments)
    try:
        source = open_source(options.source, _new_parts(options))
        num_bytes = 2 * source.num_bytes - source.num_drawn_bytes
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="write, read back", mininterval=0.5) as bar:
            import_release(source, options.out, is_forced=options.force, on_bytes=bar.update)
    except BitDanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = file_size(source.num_bytes)
    print(f"{options.out}: {size}; to start a run from it, set run.start_from={options.out}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="published BitDance folder, or Qwen3 folder")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion at OUT")
    qwen3 = parser.add_argument_group("for a Qwen3 folder")
    qwen3.add_argument("--autoencoder", type=Path, help="weights file of the vision tokenizer (required)")
    qwen3.add_argument("--block-side", type=int, help="side p of the blocks (default: 4)")
    qwen3.add_argument("--seed", type=int, help="seed of new embedding rows, head and projector (default: 0)")
    qwen3.add_argument("--head-width", type=int, help="width of the diffusion head (default: the backbone's)")
    qwen3.add_argument("--head-blocks", type=int, help="its transformer blocks (default: 6)")
    qwen3.add_argument("--head-adaln", type=int, help="its adaLN modules (default: 2)")
    return parser.parse_args(arguments)


def _new_parts(options: argparse.Namespace) -> NewParts | None:
    """What the options say of the parts that a Qwen3 lacks; None where they say nothing."""
    names = ("autoencoder", "block_side", "seed", "head_width", "head_blocks", "head_adaln")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return NewParts(**given) if given else None


if __name__ == "__main__":
    sys.exit(main())
