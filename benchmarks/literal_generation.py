"""A literal implementation of generation, one step at a time: the baseline of `generation.py` and of the tests.

It batches prompts with unconditional prompts, uses transformers' own growing cache and attention with a dense mask per
call, and runs the whole head in every step of a Python loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from bitdance_scale.generate.published_model import PublishedModel
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.positions import sincos_2d
from bitdance_scale.sequence.layout import block_raster_cells


@torch.no_grad()
def draw_literally(
    model: PublishedModel,
    prompts: Sequence[np.ndarray],
    grid: tuple[int, int],
    noise: Sequence[torch.Tensor],
    num_steps: int,
    guidance: float,
) -> torch.Tensor:
    """Bits of one image per prompt, float32 [I, h * w, C], by Euler-Maruyama with guidance.

    Args:
        model: the parts; the backbone's attention is set to transformers' "sdpa".
        prompts: ids of each prompt, then of as many unconditional ones.
        grid: (height, width) in latent cells.
        noise: per block float32 [num_steps + 1, I, P, C].
        num_steps: stochastic steps per block.
        guidance: scale.
    """
    backbone, head, projector = model.backbone, model.head, model.projector
    backbone.set_attn_implementation("sdpa")
    device, dtype, hidden_size = backbone.device, backbone.dtype, backbone.config.hidden_size
    side = model.vision.section.block_side
    size = side**2
    rows = [np.concatenate([prompt, model.text.image_tokens.prefix_ids(grid)]) for prompt in prompts]
    length = max(map(len, rows))
    padding = torch.tensor([length - len(row) for row in rows], device=device)
    ids = torch.tensor(np.stack([np.pad(row, (length - len(row), 0)) for row in rows]), device=device)
    cells = torch.from_numpy(block_raster_cells(grid, side)).to(device)
    # Group of each position: the last P of the prefix are one, and so is each block.
    group = torch.cat(
        [torch.arange(length - size), (length - size) + torch.arange(1 + len(cells) // size).repeat_interleave(size)]
    ).to(device)

    cache = DynamicCache(config=backbone.config)

    def read(embedded: torch.Tensor, start: int) -> torch.Tensor:
        stop = start + embedded.shape[1]
        queries = torch.arange(start, stop, device=device)
        mask = _mask(group, padding, start, stop)
        positions = (queries[None] - padding[:, None]).clamp(min=0)
        # By position, without token ids: transformers 5.24 renamed the argument that takes the cache.
        output = backbone(None, {"full_attention": mask[:, None]}, positions, cache, embedded, use_cache=True)
        return output.last_hidden_state[:, -size:]

    hidden = read(backbone.embed_tokens(ids), 0)
    blocks: list[torch.Tensor] = []
    for number, here in enumerate(cells.split(size)):
        if blocks:
            before = cells[(number - 1) * size : number * size]
            embedded = projector(torch.cat([blocks[-1], blocks[-1]])) + sincos_2d(before, hidden_size).to(dtype)
            hidden = read(embedded, length + (number - 1) * size)
        condition = hidden + sincos_2d(here, hidden_size).to(dtype)
        x = _solve(head, condition, noise[number], num_steps, guidance)
        blocks.append(torch.where(x > 0, 1.0, -1.0))
    return torch.cat(blocks, 1)


def _mask(group: torch.Tensor, padding: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Bool [R, stop - start, stop]: what each position from `start` on sees; padding [R] sees padding alone."""
    keys, queries = torch.arange(stop, device=group.device), torch.arange(start, stop, device=group.device)
    is_before = group[None, :stop] <= group[start:stop, None]
    is_padding = keys[None, None, :] < padding[:, None, None]
    is_query_padding = queries[None, :, None] < padding[:, None, None]
    return is_before & (is_padding == is_query_padding)


def _solve(
    head: DiffusionHead, condition: torch.Tensor, noise: torch.Tensor, num_steps: int, guidance: float
) -> torch.Tensor:
    """The blocks at the end of the flow, float32 [I, P, C]; the conditions [2 I, P, D] are of both kinds of prompts."""
    x = noise[0]
    ends = torch.linspace(0, 0.95, num_steps + 1, dtype=torch.float64)
    ends = (ends / (ends + head.time_shift * (1 - ends))).tolist()

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        both = torch.cat([x, x])
        clean = head(both, torch.full((len(both),), t, device=x.device), condition)
        conditional, unconditional = ((clean - both) / max(1 - t, 0.05)).chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    for step in range(num_steps):
        t, dt = ends[step], ends[step + 1] - ends[step]
        v = velocity(x, t)
        score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
        x = x + (v + (1 - t) * score) * dt + (2 * (1 - t) * dt) ** 0.5 * noise[step + 1]
    return x + velocity(x, 0.95) * 0.05
