"""`python -m bitdance_scale.cli` is `bitdance`."""

from __future__ import annotations

import sys

from bitdance_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
