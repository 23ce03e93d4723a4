"""The command `bitdance sample` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
