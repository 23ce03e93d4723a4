"""Pretrains BitDance: `torchrun pipelines/pretrain.py CONFIG [section.key=value ...]`."""

from __future__ import annotations

import sys

from bitdance_scale.train.main import main

if __name__ == "__main__":
    sys.exit(main("Pretrain BitDance on WebDataset shards (stage PT of arXiv 2602.14041 Table 4)."))
