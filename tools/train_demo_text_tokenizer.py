"""Trains the demo's sentencepiece model on captions of demo scenes.

The model is lossless (no normalisation) and covers any text through byte pieces. It is trained on captions as they
follow the chat markup, so the first word of a caption has a piece of its own without the space before it.
The same arguments give the same file.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from bitdance_scale.atomic_files import write_bytes
from bitdance_scale.config.shipped import ASSETS
from bitdance_scale.demo.scenes import make_scene

DEFAULT_OUT = ASSETS / "demo" / "tokenizer.model"
VOCAB_SIZE = 480
MARKUP = ("user\n", "assistant\n")


def train(num_captions: int, seed: int) -> bytes:
    """The serialised model, trained on the captions of scenes 0 .. num_captions - 1 of `seed`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_texts(num_captions, seed),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        # Elsewhere sentencepiece takes a line break for white space and drops it.
        user_defined_symbols=["\n"],
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def _texts(num_captions: int, seed: int) -> Iterator[str]:
    for index in range(num_captions):
        yield MARKUP[index % len(MARKUP)] + make_scene(seed, index).caption


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="file to write (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=8000, help="captions to train on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the scenes (default: %(default)s)")
    options = parser.parse_args(arguments)
    write_bytes(options.out, train(options.captions, options.seed))
    print(f"{options.out}: {options.out.stat().st_size} bytes, {VOCAB_SIZE} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
