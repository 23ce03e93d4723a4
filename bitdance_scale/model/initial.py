"""Initial values of every parameter, drawn whole by its global name.

A rank keeps its slice of what is drawn here (`parallel/build.py`), so that values do not depend on the layout.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch

from bitdance_scale.model.low_rank import ADAPTER, initial_bound


@dataclass(frozen=True)
class Init:
    """A distribution of initial values.

    Attributes:
        kind: zeros, ones, normal (mean 0), xavier_uniform or fan_in_uniform (`low_rank.initial_bound`). Xavier's fans
            are those of the whole published tensor: a weight that stacks several matrices is drawn as one matrix, and a
            rank's slice is never drawn by itself.
        std: standard deviation of the normal; 0 for the others.
    """

    kind: Literal["zeros", "ones", "normal", "xavier_uniform", "fan_in_uniform"]
    std: float = 0.0


# The first pattern that matches decides. With adaLN at zero every block of the head starts as the identity.
_RULES: tuple[tuple[str, Init], ...] = (
    ("net.*.bias", Init("zeros")),
    ("net.ada_ln_blocks.*.weight", Init("zeros")),
    ("net.final_layer.*.weight", Init("zeros")),
    ("net.time_embed.mlp.*.weight", Init("normal", std=0.02)),
    ("net.res_blocks.*.norm[12].weight", Init("ones")),
    ("net.res_blocks.*.norm.weight", Init("ones")),
    ("net.*.weight", Init("xavier_uniform")),
    # The bit-wise head, which no release has: all bits begin as likely as not.
    ("linear.*", Init("zeros")),
    ("fc[12].bias", Init("zeros")),
    ("fc[12].weight", Init("xavier_uniform")),
    ("w[12].bias", Init("zeros")),
    ("w[12].weight", Init("normal", std=0.02)),
)


def initial_distribution(parameter_name: str) -> Init:
    """The initial distribution of a parameter of a head (`net.*`, `linear.*`) or a projector (`fc1`, `w1` and so on).

    Raises:
        KeyError: the name belongs to neither.
    """
    for pattern, init in _RULES:
        if fnmatch.fnmatchcase(parameter_name, pattern):
            return init
    raise KeyError(f"{parameter_name!r} is not a parameter of a head or a projector")


def draw_initial(
    name: str, shape: tuple[int, ...], seed: int, init_std: float, device: torch.device | str
) -> torch.Tensor:
    """The initial values of a whole parameter, float32.

    Args:
        name: its global name.
        shape: its whole shape.
        seed: seed of the run; it seeds the generator together with the name.
        init_std: standard deviation of the backbone's weights.
        device: where the values are drawn; different kinds of device draw different numbers.
    """
    init = _distribution(name, init_std)
    whole = torch.zeros(shape, dtype=torch.float32, device=device)
    if init.kind == "zeros":
        return whole
    if init.kind == "ones":
        return whole.fill_(1.0)
    generator = named_generator(seed, name, device)
    if init.kind == "normal":
        return whole.normal_(0.0, init.std, generator=generator)
    xavier = math.sqrt(6.0 / (whole.shape[0] + whole.shape[1]))
    bound = {"xavier_uniform": xavier, "fan_in_uniform": initial_bound(whole.shape[1])}[init.kind]
    return whole.uniform_(-bound, bound, generator=generator)


def named_generator(seed: int, name: str, device: torch.device | str) -> torch.Generator:
    """A generator that depends only on a seed and a name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _distribution(name: str, init_std: float) -> Init:
    """The initial distribution of a parameter, by its global name."""
    if ADAPTER in name:
        return Init("fan_in_uniform") if name.endswith("_A") else Init("zeros")
    part, _, rest = name.partition(".")
    if part == "query_deltas":
        return Init("zeros")
    if part in ("head", "projector"):
        return initial_distribution(rest)
    if "norm" in name:
        return Init("ones")
    return Init("normal", init_std)
