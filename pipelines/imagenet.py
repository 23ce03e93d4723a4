"""Trains class-conditional BitDance: `torchrun pipelines/imagenet.py CONFIG [section.key=value ...]`."""

from __future__ import annotations

import sys

from bitdance_scale.cli.stage import main

if __name__ == "__main__":
    sys.exit(main("imagenet"))
