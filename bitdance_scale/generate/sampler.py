"""Drawing the bits of one block from the diffusion head (arXiv 2602.14041 Eq. 4; published release).

Shape suffixes: B blocks (one per image), P tokens per block, C bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.model.flow import velocity

# (x [B, P, C] float32, t [B] float32) -> predicted clean bits [B, P, C]; the head with its condition bound.
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# 0 -> the start noise, k -> the noise of step k; N(0, 1), float32 [B, P, C].
Draw = Callable[[int], torch.Tensor]

# Time left when the stochastic steps end; one plain Euler step covers it.
LAST_STEP = 0.05

SAMPLERS = ("euler_maruyama", "euler")


@torch.no_grad()
def sample_block(
    predict: Predict, draw: Draw, *, num_steps: int, guidance: float = 1.0, sampler: str = "euler_maruyama"
) -> torch.Tensor:
    """Draws the bits of one block of each image: the sign of `solve_flow`, whose arguments and errors it shares.

    Returns:
        float32 [B, P, C] of -1 and 1.
    """
    x_BPC = solve_flow(predict, draw, num_steps=num_steps, guidance=guidance, sampler=sampler)
    return torch.where(x_BPC > 0, 1.0, -1.0)


def solve_flow(predict: Predict, draw: Draw, *, num_steps: int, guidance: float, sampler: str) -> torch.Tensor:
    """Solves the flow from noise to (nearly) bits.

    `euler_maruyama` (published release): `num_steps` uniform stochastic steps from t = 0 to 0.95, then one Euler step
    of 0.05. `euler` (Eq. 4): `num_steps` uniform Euler steps from 0 to 1.

    Args:
        predict: the head. Under guidance (any scale but 1) it is called with 2 B blocks, the same state twice, and
            must apply the captions' conditions to the first B and the unconditional ones to the last B.
        draw: noise by number, asked for 0, 1, .. `num_steps` in this order (`euler`: 0 only).
        num_steps: solver steps, at least 1; `euler_maruyama` evaluates the head once more.
        guidance: scale s of the guided velocity v_u + s (v_c - v_u).
        sampler: `euler_maruyama` or `euler`.

    Returns:
        float32 [B, P, C], the state at t = 1.

    Raises:
        ConfigError: an unknown sampler or no step.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sample.sampler = {sampler!r}: must be one of {', '.join(SAMPLERS)}")
    if num_steps < 1:
        raise ConfigError(f"sample.num_steps = {num_steps}: must be at least 1")
    x_BPC = draw(0)
    if sampler == "euler":
        for step in range(num_steps):
            x_BPC = x_BPC + guided_velocity(predict, x_BPC, step / num_steps, guidance) / num_steps
        return x_BPC
    dt = (1 - LAST_STEP) / num_steps
    for step in range(num_steps):
        t = step * dt
        v_BPC = guided_velocity(predict, x_BPC, t, guidance)
        drift_BPC = v_BPC + (1 - t) * score(v_BPC, x_BPC, t)
        x_BPC = x_BPC + drift_BPC * dt + (2 * (1 - t) * dt) ** 0.5 * draw(step + 1)
    return x_BPC + guided_velocity(predict, x_BPC, 1 - LAST_STEP, guidance) * LAST_STEP


def guided_velocity(predict: Predict, x_BPC: torch.Tensor, t: float, guidance: float) -> torch.Tensor:
    """The velocity at time t, float32 [B, P, C], with classifier-free guidance unless its scale is 1."""
    state = x_BPC if guidance == 1.0 else torch.cat([x_BPC, x_BPC])
    times = torch.full((len(state),), t, dtype=torch.float32, device=x_BPC.device)
    v_BPC = velocity(predict(state, times), state, times)
    if guidance == 1.0:
        return v_BPC
    conditional, unconditional = v_BPC.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def score(v_BPC: torch.Tensor, x_BPC: torch.Tensor, t: float) -> torch.Tensor:
    """The gradient of the log density at time t of the flow from N(0, 1) noise, from its velocity."""
    return (t * v_BPC - x_BPC) / ((1 - t) ** 2 + t * (1 - t))
