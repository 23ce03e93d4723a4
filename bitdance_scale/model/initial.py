"""Initial values of the head and the projector, as data: what to draw, not the drawing.

`parallel/` fills parameters from these rules so that the values do not depend on the layout.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Init:
    """A distribution of initial values.

    Attributes:
        kind: zeros, ones, normal (mean 0) or xavier_uniform. Xavier's fans are those of the whole tensor of the
            published name: a weight that stacks several matrices is drawn as one, and never a rank's slice.
        std: standard deviation of the normal; 0 for the others.
    """

    kind: Literal["zeros", "ones", "normal", "xavier_uniform"]
    std: float = 0.0


# The first pattern that fits decides. adaLN at zero makes every block of the head start as the identity.
_RULES: tuple[tuple[str, Init], ...] = (
    ("net.*.bias", Init("zeros")),
    ("net.ada_ln_blocks.*.weight", Init("zeros")),
    ("net.final_layer.*.weight", Init("zeros")),
    ("net.time_embed.mlp.*.weight", Init("normal", std=0.02)),
    ("net.res_blocks.*.norm[12].weight", Init("ones")),
    ("net.*.weight", Init("xavier_uniform")),
    ("fc[12].bias", Init("zeros")),
    ("fc[12].weight", Init("xavier_uniform")),
)


def initial_distribution(parameter_name: str) -> Init:
    """How a parameter of the head (`net.`..) or of the projector (`fc1`, `fc2`) starts (published release).

    Raises:
        KeyError: a name of neither.
    """
    for pattern, init in _RULES:
        if fnmatch.fnmatchcase(parameter_name, pattern):
            return init
    raise KeyError(f"{parameter_name!r} is no parameter of the diffusion head or the projector")
