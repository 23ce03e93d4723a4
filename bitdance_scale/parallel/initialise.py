"""Initial weights that do not depend on the layout.

Every parameter is drawn whole, from a generator seeded by the run's seed and the parameter's global name, and each
rank keeps its slice. A model started under any layout is therefore the same model.
"""

from __future__ import annotations

import hashlib
import math

import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.initial import Init, initial_distribution
from bitdance_scale.parallel.names import Parameters
from bitdance_scale.parallel.partition import Placement


def initialise(parameters: Parameters, config: RunConfig, device: torch.device) -> None:
    """Fills every parameter of a stage in place; padded vocabulary rows become zero."""
    with torch.no_grad():
        for name, (parameter, placement) in parameters.items():
            parameter.copy_(placement.local_part(_draw(name, placement, config, device)))


def _draw(name: str, placement: Placement, config: RunConfig, device: torch.device) -> torch.Tensor:
    init = _distribution(name, config)
    whole = torch.zeros(placement.global_shape, dtype=torch.float32, device=device)
    if init.kind == "zeros":
        return whole
    if init.kind == "ones":
        return whole.fill_(1.0)
    digest = hashlib.blake2b(f"{config.run.seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
    if init.kind == "normal":
        return whole.normal_(0.0, init.std, generator=generator)
    assert init.kind == "xavier_uniform"
    bound = math.sqrt(6.0 / (whole.shape[0] + whole.shape[1]))
    return whole.uniform_(-bound, bound, generator=generator)


def _distribution(name: str, config: RunConfig) -> Init:
    """Which distribution a parameter starts from, by its global name."""
    part, _, rest = name.partition(".")
    if part in ("head", "projector"):
        return initial_distribution(rest)
    if "norm" in name:
        return Init("ones")
    return Init("normal", config.model.init_std)
