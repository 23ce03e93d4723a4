"""The command `bitdance export` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.export_release import main

if __name__ == "__main__":
    sys.exit(main())
