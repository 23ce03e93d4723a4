"""The tests; also imported before a spawned process looks up what it shall run."""

import sys
from pathlib import Path

from bitdance_scale.torchvision_operators import declare_operators

# `make setup` installs torchvision and what needs it apart: tests/perceptual.txt says why. Where it is found,
# transformers imports it, which some tests do before anything else.
sys.path.append(str(Path(sys.prefix) / "perceptual"))
declare_operators()
