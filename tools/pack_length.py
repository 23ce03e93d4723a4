"""The command `bitdance pack-length` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.pack_length import main

if __name__ == "__main__":
    sys.exit(main())
