"""The command `bitdance tokenizer evaluate` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.evaluate_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
