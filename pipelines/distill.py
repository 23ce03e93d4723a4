"""Distils BitDance from 16 to 64 tokens per step: `torchrun pipelines/distill.py CONFIG [section.key=value ...]`."""

from __future__ import annotations

import sys

from bitdance_scale.cli.stage import main

if __name__ == "__main__":
    sys.exit(main("distill"))
