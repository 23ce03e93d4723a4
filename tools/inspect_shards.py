"""The command `bitdance inspect` as a script."""

from __future__ import annotations

import sys

from bitdance_scale.cli.inspect_shards import main

if __name__ == "__main__":
    sys.exit(main())
