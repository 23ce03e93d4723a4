"""Makes the published folder of a checkpoint, which the release's pipeline and tools/sample.py load.

    python tools/convert_to_hf.py runs/sft_14b BitDance-mine

CHECKPOINT is a run folder (its latest checkpoint), one checkpoint of it (checkpoints/step_...), or a converted release.
Dtypes are those of the release that the run started from; for weights that started at random, the backbone is written
in bfloat16, head and projector in float32. Weights are copied part by part: memory does not grow with the model.
docs/interchange.md says more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.published_names import Part
from bitdance_scale.config.published_config import beyond_release
from bitdance_scale.errors import BitDanceError
from bitdance_scale.wording import file_size

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = _parse(arguments)
    dtypes = {part: name for part in Part if (name := getattr(options, f"{part}_dtype"))}
    try:
        export = open_checkpoint(
            options.checkpoint, tokenizer=options.tokenizer, autoencoder=options.autoencoder, dtypes=dtypes
        )
        if export.warning:
            print(f"warning: {export.warning}", file=sys.stderr)
        with tqdm(
            total=2 * export.num_bytes, unit="B", unit_scale=True, desc="write, read back", mininterval=0.5
        ) as bar:
            export_release(export, options.out, is_forced=options.force, on_bytes=bar.update)
    except BitDanceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {file_size(export.num_bytes)}, step {export.state.step} of {export.path}")
    if extra := beyond_release(export.network.head):
        print(
            f"its head has {extra}, which the release's pipeline does not know and refuses; tools/sample.py runs it",
            file=sys.stderr,
        )
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder, checkpoint, or converted release")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion at OUT")
    parser.add_argument("--tokenizer", type=Path, help="text tokenizer, where it is not where the run had it")
    parser.add_argument(
        "--autoencoder", type=Path, help="autoencoder's weights file, where it is not where the run had it"
    )
    for part in Part:
        parser.add_argument(f"--{part}-dtype", choices=DTYPES, help=f"dtype of the {part}, if another")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
