"""The command `bitdance encode` as a script, which torchrun may start as well."""

from __future__ import annotations

import sys

from bitdance_scale.cli.encode_shards import main

if __name__ == "__main__":
    sys.exit(main())
