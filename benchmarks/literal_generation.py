"""Generation as the method is described, one thing after another: the baseline of `generation.py` and of the tests.

Prompts and unconditional prompts in one batch, transformers' own growing cache and attention, a dense mask per call, and
a Python loop over the steps that asks the whole head each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from bitdance_scale.generate.published_model import PublishedModel
from bitdance_scale.model.positions import sincos_2d
from bitdance_scale.sequence.layout import block_raster_cells, image_prefix_ids


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
    rows = [np.concatenate([prompt, image_prefix_ids(grid, model.text.image_tokens)]) for prompt in prompts]
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
        keys, queries = torch.arange(stop, device=device), torch.arange(start, stop, device=device)
        is_before = group[None, :stop] <= group[start:stop, None]
        is_padding = keys[None, None, :] < padding[:, None, None]
        is_query_padding = queries[None, :, None] < padding[:, None, None]
        mask = is_before & (is_padding == is_query_padding)
        output = backbone(
            inputs_embeds=embedded,
            attention_mask={"full_attention": mask[:, None]},
            position_ids=(queries[None] - padding[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -size:]

    hidden = read(backbone.embed_tokens(ids), 0)
    blocks: list[torch.Tensor] = []
    for number, here in enumerate(cells.split(size)):
        if blocks:
            before = cells[(number - 1) * size : number * size]
            embedded = projector(torch.cat([blocks[-1], blocks[-1]])) + sincos_2d(before, hidden_size).to(dtype)
            hidden = read(embedded, length + (number - 1) * size)
        condition = hidden + sincos_2d(here, hidden_size).to(dtype)
        x = noise[number][0]
        dt = 0.95 / num_steps
        for step in range(num_steps + 1):
            t = step * dt if step < num_steps else 0.95
            both = torch.cat([x, x])
            clean = head(both, torch.full((len(both),), t, device=device), condition)
            conditional, unconditional = ((clean - both) / max(1 - t, 0.05)).chunk(2)
            v = unconditional + guidance * (conditional - unconditional)
            if step == num_steps:
                x = x + v * 0.05
                break
            score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
            x = x + (v + (1 - t) * score) * dt + (2 * (1 - t) * dt) ** 0.5 * noise[number][step + 1]
        blocks.append(torch.where(x > 0, 1.0, -1.0))
    return torch.cat(blocks, 1)
