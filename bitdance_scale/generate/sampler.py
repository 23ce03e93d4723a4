"""Drawing the bits of one block from the diffusion head (arXiv 2602.14041 Eq. 4; published release).

All times and all noise of a block are known before its first step: the head prepares its modulations for them
(`generate/head_steps.py`), and on CUDA the whole solution is one graph.

Shape suffixes: B blocks (one per image), P tokens per block, C bits, K draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.model.flow import MIN_REMAINING_TIME

# (x [B, P, C] float32, number of the step) -> predicted clean bits [B, P, C] at the time of that step; the head with
# its condition bound. Asked in the order of the steps.
Predict = Callable[[torch.Tensor, int], torch.Tensor]

# Time left when the stochastic steps end; one plain Euler step covers it.
LAST_STEP = 0.05

SAMPLERS = ("euler_maruyama", "euler")


@dataclass(frozen=True)
class FlowSolver:
    """How the flow is solved.

    `euler_maruyama` (published release): `num_steps` uniform stochastic steps from t = 0 to 0.95, then one Euler step
    of 0.05. `euler` (Eq. 4): `num_steps` uniform Euler steps from 0 to 1.

    Attributes:
        num_steps: solver steps, at least 1; `euler_maruyama` evaluates the head once more.
        guidance: scale s of the guided velocity v_u + s (v_c - v_u); 1 switches guidance off.
        sampler: `euler_maruyama` or `euler`.

    Raises:
        ConfigError: an unknown sampler, no step, or a guidance that is not finite.
    """

    num_steps: int
    guidance: float = 1.0
    sampler: str = "euler_maruyama"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler = {self.sampler!r}: must be one of {', '.join(SAMPLERS)}")
        if self.num_steps < 1:
            raise ConfigError(f"number of sampling steps = {self.num_steps}: must be at least 1")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance scale = {self.guidance}: must be a finite number; 1 is no guidance")

    @property
    def is_guided(self) -> bool:
        """Whether unconditional sequences are needed."""
        return self.guidance != 1.0

    @property
    def num_draws(self) -> int:
        """Normal tensors per block: the start and one per stochastic step."""
        return 1 if self.sampler == "euler" else self.num_steps + 1

    @functools.cached_property
    def times(self) -> tuple[float, ...]:
        """The flow time of every evaluation of the head."""
        if self.sampler == "euler":
            return tuple(step / self.num_steps for step in range(self.num_steps))
        dt = (1 - LAST_STEP) / self.num_steps
        return (*(step * dt for step in range(self.num_steps)), 1 - LAST_STEP)

    def weights(self, step: int) -> tuple[float, float, float]:
        """(a, b, c): the step takes the state x to a x + b f + c e, f the guided clean bits and e N(0, 1).

        With r = max(1 - t, 0.05) the velocity is v = (f - x) / r; guiding velocities is guiding clean bits, because both
        halves share x. An Euler step is x + v dt. A stochastic step is x + (v + (1 - t) s) dt + sqrt(2 (1 - t) dt) e
        with the score s = (t v - x) / ((1 - t)^2 + t (1 - t)), whose denominator is 1 - t: the drift is (1 + t) v - x.
        """
        t = self.times[step]
        remaining = max(1 - t, MIN_REMAINING_TIME)
        if self.sampler == "euler":
            return 1 - 1 / (self.num_steps * remaining), 1 / (self.num_steps * remaining), 0.0
        if step == self.num_steps:
            return 1 - LAST_STEP / remaining, LAST_STEP / remaining, 0.0
        dt = (1 - LAST_STEP) / self.num_steps
        pull = (1 + t) * dt / remaining
        return 1 - dt - pull, pull, (2 * (1 - t) * dt) ** 0.5


@torch.no_grad()
def sample_block(predict: Predict, noise_KBPC: torch.Tensor, solver: FlowSolver) -> torch.Tensor:
    """Draws the bits of one block of each image: the sign of `solve_flow`, whose arguments it shares.

    Returns:
        float32 [B, P, C] of -1 and 1.
    """
    x_BPC = solve_flow(predict, noise_KBPC, solver)
    # `torch.where` of two numbers copies them to the device, which a CUDA graph cannot record.
    return (x_BPC > 0).float() * 2 - 1


def solve_flow(predict: Predict, noise_KBPC: torch.Tensor, solver: FlowSolver) -> torch.Tensor:
    """Solves the flow from noise to (nearly) bits.

    Args:
        predict: the head. Under guidance it is called with 2 B blocks, the same state twice, and must apply the
            captions' conditions to the first B and the unconditional ones to the last B.
        noise_KBPC: N(0, 1), float32, `solver.num_draws` tensors: the start, then that of each stochastic step.
        solver: steps, guidance and kind.

    Returns:
        float32 [B, P, C], the state at t = 1.
    """
    x_BPC = noise_KBPC[0]
    for step in range(len(solver.times)):
        keep, pull, kick = solver.weights(step)
        clean_BPC = _guided(predict, x_BPC, step, solver)
        x_BPC = torch.add(keep * x_BPC, clean_BPC, alpha=pull)
        if kick:
            x_BPC = torch.add(x_BPC, noise_KBPC[step + 1], alpha=kick)
    return x_BPC


def _guided(predict: Predict, x_BPC: torch.Tensor, step: int, solver: FlowSolver) -> torch.Tensor:
    """Clean bits u + s (c - u) whose velocity is the guided one; they may lie beyond -1 and 1."""
    if not solver.is_guided:
        return predict(x_BPC, step).float()
    conditional, unconditional = predict(torch.cat([x_BPC, x_BPC]), step).float().chunk(2)
    return torch.lerp(unconditional, conditional, solver.guidance)
