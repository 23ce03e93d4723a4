"""The diffusion head over all steps of a sampler: what does not depend on the noisy bits is computed in batches.

The linears of the modulations are a fifth of the head's weights. Computed for all steps of a block together they are
read once per group of steps and not once per step. The embedding of the times is the same for all blocks of an image,
that of the condition for all steps of a block.

Shape suffixes: B blocks, P tokens per block, C bits, D head width, Z condition size, T flow times.
"""

from __future__ import annotations

import math

import torch

from bitdance_scale.generate.sampler import FlowSolver, Predict
from bitdance_scale.model.diffusion_head import DiffusionHead

# Bound of the modulations that are held at a time. The 14B head needs 18 MB a step for an image of 64 tokens a block.
MAX_MODULATION_BYTES = 256 << 20


class HeadSteps:
    """A head prepared for the times of a solver.

    Args:
        head: the head; its weights must stay as they are.
        solver: whose times are prepared.
        device: of the head.
        max_bytes: the modulations of consecutive steps are computed together up to this size (one step at least).
    """

    def __init__(
        self, head: DiffusionHead, solver: FlowSolver, device: torch.device, max_bytes: int = MAX_MODULATION_BYTES
    ) -> None:
        self._head, self._max_bytes = head, max_bytes
        times_T = torch.tensor(solver.times, dtype=torch.float32, device=device)
        self._time_TD = head.embed_times(times_T)

    def bind(self, cond_BPZ: torch.Tensor) -> Predict:
        """The head under a condition, to be asked for every step in its order."""
        head, time_TD = self._head, self._time_TD
        cond_BPD = head.embed_condition(cond_BPZ)
        size = self.steps_per_group(cond_BPD)
        group: list[torch.Tensor] = []

        def predict(x_BPC: torch.Tensor, step: int) -> torch.Tensor:
            if step % size == 0:
                # The old group goes before the new one is made.
                group.clear()
                group.extend(head.modulations(time_TD[step : step + size], cond_BPD))
            return head.denoise(x_BPC, [part[step % size] for part in group])

        return predict

    def steps_per_group(self, cond_BPD: torch.Tensor) -> int:
        """Steps whose modulations are computed together: as many as the bound allows, in groups of about one size."""
        num_times = len(self._time_TD)
        step_bytes = cond_BPD.numel() * cond_BPD.element_size() * self._head.modulations_per_channel
        most = max(1, self._max_bytes // step_bytes)
        return math.ceil(num_times / math.ceil(num_times / most))
