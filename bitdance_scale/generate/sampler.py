"""Drawing the bits of one block from the diffusion head (arXiv 2602.14041 Eq. 4; published release).

All times and all noise of a block are known before its first step. The head therefore prepares its modulations for many
steps at once (`HeadSteps`), and on CUDA the whole solution is one graph.

The noise of one block, in the order of the published release: a start tensor, then one tensor per stochastic step. All
of it is drawn before the first step.

Shape suffixes: I images (one block each), B blocks (2 I under guidance), R blocks that are drawn (I, or B where nothing
is guided), P tokens per block, C bits, K draws per block, D head width, Z condition size, T flow times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import ConfigError
from bitdance_scale.model.bit_head import BitHead
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.flow import MIN_REMAINING_TIME
from bitdance_scale.model.heads import Head
from bitdance_scale.sequence.noise import Purpose, generator

Predict = Callable[[torch.Tensor, int], torch.Tensor]
"""(x [B, P, C] float32, number of the step) -> predicted clean bits [B, P, C] at the time of that step: the head under
a condition. It is called in the order of the steps."""

LAST_STEP = 0.05
"""Time left when the stochastic steps end; one plain Euler step covers it."""
MAX_MODULATION_BYTES = 256 << 20
"""Most modulations that are held at a time. The 14B head needs 18 MB a step for an image with blocks of 64 tokens."""

SAMPLERS = ("euler_maruyama", "euler")


@dataclass(frozen=True)
class FlowSolver:
    """How the flow is solved.

    `euler_maruyama` (published release): `num_steps` uniform stochastic steps from t = 0 to 0.95, then one Euler step
    of 0.05. `euler` (Eq. 4): `num_steps` uniform Euler steps from 0 to 1.

    A time shift s moves the ends of these steps to t / (t + s (1 - t)). The last step of `euler_maruyama` stays that of
    0.05 from 0.95, wherever the shifted ones end (published release).

    Attributes:
        num_steps: solver steps, at least 1; `euler_maruyama` evaluates the head once more.
        guidance: scale s of the guided velocity v_u + s (v_c - v_u); 1 switches guidance off.
        sampler: `euler_maruyama` or `euler`.
        time_shift: s, of the head (`head.time_shift`); 1 leaves the steps uniform.
        guidance_growth: the scale over the M blocks of an image: constant, or linear, 1 + (s - 1) m / M at block m,
            counted from 0 (class-conditional release). A scale of 1 guides nothing, so that at block 0 each of the two
            sequences of an image draws a block of its own, and reads it for all that follow.

    Raises:
        ConfigError: an unknown sampler, no step, a guidance that is not finite, or a shift that is not above 0.
    """

    num_steps: int
    guidance: float = 1.0
    sampler: str = "euler_maruyama"
    time_shift: float = 1.0
    guidance_growth: str = "constant"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"sampler = {self.sampler!r}: must be one of {', '.join(SAMPLERS)}")
        if self.num_steps < 1:
            raise ConfigError(f"number of sampling steps = {self.num_steps}: must be at least 1")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance scale = {self.guidance}: must be a finite number; 1 is no guidance")
        if not 0 < self.time_shift < math.inf:
            raise ConfigError(f"head.time_shift = {self.time_shift}: must be a finite number above 0; 1 is no shift")

    @property
    def is_guided(self) -> bool:
        """Whether unconditional sequences are decoded too."""
        return self.guidance != 1.0

    def guidance_at(self, block: int, num_blocks: int) -> float:
        """The scale at a block, 0 .. num_blocks - 1, of an image."""
        if self.guidance_growth == "constant":
            return self.guidance
        return 1 + (self.guidance - 1) * block / num_blocks

    def guides(self, block: int, num_blocks: int) -> bool:
        """Whether the two sequences of an image draw a block together; else each sequence draws its own."""
        return self.guidance_at(block, num_blocks) != 1.0

    @property
    def num_draws(self) -> int:
        """K: the start tensor and one per stochastic step."""
        return 1 if self.sampler == "euler" else self.num_steps + 1

    @functools.cached_property
    def times(self) -> tuple[float, ...]:
        """The flow time of every evaluation of the head."""
        times = tuple(self._end(step) for step in range(self.num_steps))
        return times if self.sampler == "euler" else (*times, 1 - LAST_STEP)

    def weights(self, step: int) -> tuple[float, float, float]:
        """(a, b, c): the step takes the state x to a x + b f + c e; f are the guided clean bits and e is N(0, 1).

        With r = max(1 - t, 0.05) the velocity is v = (f - x) / r. Guiding velocities equals guiding clean bits, because
        both halves share x. An Euler step is x + v dt. A stochastic step is
        x + (v + (1 - t) s) dt + sqrt(2 (1 - t) dt) e
        with the score s = (t v - x) / ((1 - t)^2 + t (1 - t)), whose denominator is 1 - t: the drift is (1 + t) v - x.
        """
        t = self.times[step]
        remaining = max(1 - t, MIN_REMAINING_TIME)
        if self.sampler == "euler":
            # The reciprocal of the size of the step, which is exact where the steps are uniform.
            rate = self.num_steps if self.time_shift == 1 else 1 / (self._end(step + 1) - t)
            return 1 - 1 / (rate * remaining), 1 / (rate * remaining), 0.0
        if step == self.num_steps:
            return 1 - LAST_STEP / remaining, LAST_STEP / remaining, 0.0
        dt = (1 - LAST_STEP) / self.num_steps if self.time_shift == 1 else self._end(step + 1) - t
        pull = (1 + t) * dt / remaining
        return 1 - dt - pull, pull, (2 * (1 - t) * dt) ** 0.5

    def _end(self, step: int) -> float:
        """The flow time at which a step begins and the one before it ends; 0 <= step <= num_steps."""
        t = step / self.num_steps if self.sampler == "euler" else step * ((1 - LAST_STEP) / self.num_steps)
        return t if self.time_shift == 1 else t / (t + self.time_shift * (1 - t))


def configured_solver(config: RunConfig) -> FlowSolver:
    """The solver of the pictures of a run."""
    section = config.sample
    return FlowSolver(
        section.num_steps, section.guidance, section.sampler, config.head.time_shift, section.guidance_growth
    )


def num_draws(config: RunConfig) -> int:
    """K, noise tensors per block that the pictures of a run take."""
    return BitSampler.num_draws if config.head.kind == "bitwise" else configured_solver(config).num_draws


@torch.no_grad()
def sample_block(
    predict: Predict, noise_KRPC: torch.Tensor, solver: FlowSolver, guidance: float | None = None
) -> torch.Tensor:
    """Draws the bits of blocks: the signs of `solve_flow`, which has the same arguments.

    Returns:
        float32 [R, P, C] of -1 and 1.
    """
    x_RPC = solve_flow(predict, noise_KRPC, solver, guidance)
    return _signs(x_RPC > 0)


def solve_flow(
    predict: Predict, noise_KRPC: torch.Tensor, solver: FlowSolver, guidance: float | None = None
) -> torch.Tensor:
    """Solves the flow from noise to (nearly) bits, or to continuous latents.

    Args:
        predict: the head. With a scale other than 1 it is called with 2 R blocks, the same states twice, and must
            apply the captions' conditions to the first R and the unconditional condition to the last R.
        noise_KRPC: N(0, 1), float32, `solver.num_draws` tensors: the start, then one for each stochastic step.
        solver: steps, guidance and kind.
        guidance: the scale of these blocks, where it is another than the solver's.

    Returns:
        float32 [R, P, C], the state at t = 1.
    """
    scale = solver.guidance if guidance is None else guidance
    x_RPC = noise_KRPC[0]
    for step in range(len(solver.times)):
        keep, pull, kick = solver.weights(step)
        clean_RPC = _guided(predict(x_RPC if scale == 1.0 else torch.cat([x_RPC, x_RPC]), step), scale)
        x_RPC = torch.add(keep * x_RPC, clean_RPC, alpha=pull)
        if kick:
            x_RPC = torch.add(x_RPC, noise_KRPC[step + 1], alpha=kick)
    return x_RPC


def _guided(predicted_BPC: torch.Tensor, scale: float) -> torch.Tensor:
    """Guided predictions u + s (c - u), float32 [R, P, C]; c are the first half of the batch, u the second.

    Of clean bits, it is what has the guided velocity, and may be beyond -1 and 1. A scale of 1 changes nothing.
    """
    if scale == 1.0:
        return predicted_BPC.float()
    conditional, unconditional = predicted_BPC.float().chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def _signs(is_one_RPC: torch.Tensor) -> torch.Tensor:
    # `torch.where` of two numbers copies them to the device, which a CUDA graph cannot record.
    return is_one_RPC.float() * 2 - 1


class BlockSampler(Protocol):
    """Draws blocks from a head; begun for every batch of images."""

    def draw(self, cond_BPZ: torch.Tensor, noise_KRPC: torch.Tensor, guidance: float) -> torch.Tensor:
        """Bits of blocks, float32 [R, P, C] of -1 and 1, or their continuous latents.

        Args:
            cond_BPZ: the head's condition: of 2 R blocks, those of the captions first; with a scale of 1 of R.
            noise_KRPC: N(0, 1), float32, `num_draws` tensors.
            guidance: the scale of these blocks.
        """
        ...


def block_sampler(head: Head, solver: FlowSolver, device: torch.device, latents: str = "bits") -> BlockSampler:
    """The sampler of a head; its weights must not change.

    Args:
        head: of either kind.
        solver: how the flow is solved; a bit-wise head has none.
        device: of the head.
        latents: what is drawn, `vision.latents`; a bit-wise head draws bits only.
    """
    if isinstance(head, BitHead):
        return BitSampler(head)
    return FlowSampler(head, solver, device, latents)


class FlowSampler:
    """Draws blocks from a diffusion head: the signs of the flow's final state, or continuous latents, the state."""

    def __init__(self, head: DiffusionHead, solver: FlowSolver, device: torch.device, latents: str = "bits") -> None:
        self._steps, self._solver = HeadSteps(head, solver, device), solver
        self._draw = sample_block if latents == "bits" else solve_flow

    def draw(self, cond_BPZ: torch.Tensor, noise_KRPC: torch.Tensor, guidance: float) -> torch.Tensor:
        """As in `BlockSampler`."""
        return self._draw(self._steps.bind(cond_BPZ), noise_KRPC, self._solver, guidance)


class BitSampler:
    """Draws every bit by itself from a bit-wise head; guidance is of its log odds."""

    num_draws = 1

    def __init__(self, head: BitHead) -> None:
        self._head = head

    @torch.no_grad()
    def draw(self, cond_BPZ: torch.Tensor, noise_KRPC: torch.Tensor, guidance: float) -> torch.Tensor:
        """As in `BlockSampler`."""
        odds_RPC = _guided(self._head(cond_BPZ), guidance)
        # The distribution function of the normal makes uniform numbers of the noise.
        return _signs(torch.special.ndtr(noise_KRPC[0]) < torch.sigmoid(odds_RPC))


class HeadSteps:
    """A head prepared for the times of a solver: what does not depend on the noisy bits is computed in batches.

    The linears of the modulations are a fifth of the head's weights. Their weights are read once per group of steps
    and not once per step. The embedding of the times is the same for all blocks of an image, that of the condition for
    all steps of a block.

    Args:
        head: the head; its weights must not change.
        solver: its times are prepared.
        device: of the head.
        max_bytes: most bytes of modulations that are computed together; at least those of one step are.
    """

    def __init__(
        self, head: DiffusionHead, solver: FlowSolver, device: torch.device, max_bytes: int = MAX_MODULATION_BYTES
    ) -> None:
        self._head, self._max_bytes = head, max_bytes
        times_T = torch.tensor(solver.times, dtype=torch.float32, device=device)
        self._time_TD = head.embed_times(times_T)

    def bind(self, cond_BPZ: torch.Tensor) -> Predict:
        """The head under a condition, to be called for every step in order."""
        head, time_TD = self._head, self._time_TD
        cond_BPD = head.embed_condition(cond_BPZ)
        size = self.steps_per_group(cond_BPD)
        group: list[torch.Tensor] = []

        def predict(x_BPC: torch.Tensor, step: int) -> torch.Tensor:
            if step % size == 0:
                # The old group is freed before the new one is made.
                group.clear()
                group.extend(head.modulations(time_TD[step : step + size], cond_BPD))
            return head.denoise(x_BPC, [part[step % size] for part in group])

        return predict

    def steps_per_group(self, cond_BPD: torch.Tensor) -> int:
        """Steps whose modulations are computed together: within the bound, in groups of about the same size."""
        num_times = len(self._time_TD)
        step_bytes = cond_BPD.numel() * cond_BPD.element_size() * self._head.modulations_per_channel
        most = max(1, self._max_bytes // step_bytes)
        return math.ceil(num_times / math.ceil(num_times / most))


class ImageNoise:
    """The noise of sample images in training: image i draws from stream i of a seed, in any batch.

    Args:
        seed: seed of the images.
        image_numbers: i of every image.
        shape: (K, P, C).
        device: where the noise is used.
    """

    def __init__(
        self, seed: int, image_numbers: Sequence[int], shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self._streams = [generator(seed, Purpose.SAMPLE_IMAGE, 0, number) for number in image_numbers]
        self._shape, self._device = shape, device

    def __call__(self) -> torch.Tensor:
        """The noise of the next block, N(0, 1), float32 [K, I, P, C]."""
        rows = [stream.standard_normal(self._shape, dtype=np.float32) for stream in self._streams]
        return torch.from_numpy(np.stack(rows, axis=1)).to(self._device)


class GeneratorNoise:
    """The noise of a pipeline's images, from torch's generators.

    One generator draws tensors [I, P, C] for the whole batch, as the release does. A list gives each image its own
    stream of tensors [P, C], so that an image is the same in any batch. A generator on the CPU gives the same numbers
    for images on a GPU.

    Args:
        generators: one per image, or one for all; None: torch's default generator of `device`.
        num_images: I.
        shape: (K, P, C).
        device: where the noise is used.
    """

    def __init__(
        self,
        generators: torch.Generator | Sequence[torch.Generator] | None,
        num_images: int,
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self._generators, self._device = generators, device
        self._num_images, self._shape = num_images, shape

    def __call__(self) -> torch.Tensor:
        """The noise of the next block, N(0, 1), float32 [K, I, P, C]."""
        num_draws, *shape = self._shape
        if self._generators is None or isinstance(self._generators, torch.Generator):
            return _draw(self._generators, (num_draws, self._num_images, *shape), self._device).to(self._device)
        images = [_draw(numbers, self._shape, self._device) for numbers in self._generators]
        return torch.stack([image.to(self._device) for image in images], dim=1)


def _draw(numbers: torch.Generator | None, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Normal tensors, drawn one by one along the first axis, on the generator's device."""
    noise = torch.empty(shape, dtype=torch.float32, device=device if numbers is None else numbers.device)
    # A single call would give the numbers in another order.
    for row in noise:
        row.normal_(generator=numbers)
    return noise
