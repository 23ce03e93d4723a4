"""The command `bitdance histogram` as a script, which torchrun may start as well."""

from __future__ import annotations

import sys

from bitdance_scale.cli.histogram import main

if __name__ == "__main__":
    sys.exit(main())
