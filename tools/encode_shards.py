"""Encodes image shards into bit shards: `torchrun tools/encode_shards.py CONFIG --out FOLDER [section.key=value ...]`.

The run of CONFIG then trains with `data.bits_dir=FOLDER` and reads no image any more. Ranks share out the shards; a job that
was stopped goes on where it was; some samples of every shard are read back and encoded once more.
"""

from __future__ import annotations

import sys

from bitdance_scale.train.encode_bits import main

if __name__ == "__main__":
    sys.exit(main())
