"""The command `bitdance import` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.import_release import main

if __name__ == "__main__":
    sys.exit(main())
