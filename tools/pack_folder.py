"""The command `bitdance pack` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.pack_folder import main

if __name__ == "__main__":
    sys.exit(main())
