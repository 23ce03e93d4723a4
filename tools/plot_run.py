"""The command `bitdance plot` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
