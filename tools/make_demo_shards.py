"""The command `bitdance demo-data` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.demo_data import main

if __name__ == "__main__":
    sys.exit(main())
