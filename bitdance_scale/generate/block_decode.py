"""Block-by-block decoding of images, with any implementation of the backbone.

Prompts of different length are padded on the left, so that all images of a batch predict the same block at the same
time. With guidance, the unconditional prompts are the second half of the batch and share the bits of the first half,
but for blocks at which the scale is 1 (`FlowSolver.guidance_growth`): those each half draws and reads for itself.

Shape suffixes: B sequences, I images (B / 2 under guidance), L prefix positions, S positions, P vision tokens per
block, T key slots, C bits, D hidden size, K draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from bitdance_scale.sequence.layout import SequenceTokens, attention_groups, vision_cells
from bitdance_scale.sequence.visibility import visible


@dataclass(frozen=True)
class DecodeLayout:
    """All that is known of the sequences of a batch before a bit is drawn.

    Attributes:
        prefix_ids: int64 [B, L], prompt and image prefix, padded on the left with 0.
        position_ids: int64 [B, S], rotary positions of prefix and vision tokens; 0 on padding.
        document_ids: int64 [B, S], 0, and -1 on padding.
        block_ids: int64 [S], attention groups, the same for every sequence.
        cells: int64 [h * w, 2], (row, column) of the vision tokens.
        block_tokens: P.
        is_causal: whether positions of one block see only those before them.
    """

    prefix_ids: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    block_ids: torch.Tensor
    cells: torch.Tensor
    block_tokens: int
    is_causal: bool

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.prefix_ids)

    @property
    def prefix_length(self) -> int:
        """L."""
        return self.prefix_ids.shape[1]

    @property
    def num_blocks(self) -> int:
        """Blocks per image."""
        return len(self.cells) // self.block_tokens

    @property
    def num_read(self) -> int:
        """Positions of every sequence that are read in all: not the last block, which predicts nothing."""
        return max(self.position_ids.shape[1] - self.block_tokens, self.prefix_length)

    def mask(self, start: int, stop: int) -> torch.Tensor:
        """Who positions start..stop-1 see among 0..stop-1: bool [B, 1, stop - start, stop]."""
        return visible(self.document_ids[:, :stop], self.block_ids[:stop], stop - start)[:, None]


class SeenKeys:
    """The masks of the reads of a batch, added to the scores: 0 where a key is seen and minus infinity elsewhere.

    All positions of a block of vision tokens see the same keys: what was read, without the padding. Their masks are
    views of one row, in which a block is uncovered when it is read. (Under a causal mask they differ, and are made.)

    Args:
        layout: the batch.
        capacity: T, slots of its key/value memory.
        dtype: of the scores.
    """

    def __init__(self, layout: DecodeLayout, capacity: int, dtype: torch.dtype) -> None:
        self._layout, self._dtype = layout, dtype
        length = layout.prefix_length
        shape = (layout.num_sequences, 1, 1, capacity)
        self._row_B11T = torch.full(shape, -torch.inf, dtype=dtype, device=layout.document_ids.device)
        self._row_B11T[:, 0, 0, :length] = additive(layout.document_ids[:, :length] >= 0, dtype)

    def prefix(self) -> torch.Tensor:
        """Who the prefixes see, [B, 1, L, L]."""
        return additive(self._layout.mask(0, self._layout.prefix_length), self._dtype)

    def block(self, start: int, stop: int, num_slots: int) -> torch.Tensor:
        """Who positions start..stop-1, a block that is read, see among the first slots: [B, 1, 1 or P, num_slots].

        The blocks before it have been read.
        """
        if self._layout.is_causal:
            assert num_slots == stop, "under a causal mask, attention runs over what was read"
            return additive(self._layout.mask(start, stop), self._dtype)
        self._row_B11T[..., start:stop] = 0
        return self._row_B11T[..., :num_slots]


def additive(is_seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what is added to the scores: 0 where a key is seen and minus infinity elsewhere."""
    return torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device).masked_fill_(~is_seen, -torch.inf)


def lay_out(
    prompts: Sequence[np.ndarray], grid: tuple[int, int], tokens: SequenceTokens, device: torch.device
) -> DecodeLayout:
    """Lays out prompts (int64 token ids each), each followed by an image of `grid` (height, width) latent cells."""
    suffix = tokens.prefix_ids(grid)
    rows = [np.concatenate([prompt, suffix]) for prompt in prompts]
    length, size = max(map(len, rows)), tokens.block_tokens
    num_vision = grid[0] * grid[1]
    prefix_ids = np.zeros((len(rows), length), dtype=np.int64)
    document_ids = np.zeros((len(rows), length + num_vision), dtype=np.int64)
    position_ids = np.zeros_like(document_ids)
    for index, row in enumerate(rows):
        padding = length - len(row)
        prefix_ids[index, padding:] = row
        document_ids[index, :padding] = -1
        position_ids[index, padding:] = np.arange(len(row) + num_vision)
    block_ids = attention_groups(length - size, num_vision, 0, tokens).astype(np.int64)
    return DecodeLayout(
        prefix_ids=torch.from_numpy(prefix_ids).to(device),
        position_ids=torch.from_numpy(position_ids).to(device),
        document_ids=torch.from_numpy(document_ids).to(device),
        block_ids=torch.from_numpy(block_ids).to(device),
        cells=torch.from_numpy(vision_cells(grid, tokens)).to(device).long(),
        block_tokens=size,
        is_causal=tokens.is_causal,
    )


Draw = Callable[[], torch.Tensor]
"""Returns the noise of the next block of every image, N(0, 1), float32 [K, I, P, C]: a start tensor, then one per
stochastic step."""


OnBlock = Callable[[Sequence[torch.Tensor]], None]
"""Called after every block of a batch with the blocks so far, float32 [I, P, C] each, in the order of the sequence.

An error that it raises ends the drawing."""


class BlockModel(Protocol):
    """A backbone with its head, one block at a time."""

    def start(self, layout: DecodeLayout) -> None:
        """Reads the prefixes; the first block is drawn next."""
        ...

    def draw_block(self, cells: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Draws the next block of every image: bits [I, P, C] at `cells` [P, 2], from the noise `draw()`."""
        ...

    def extend(self, bits: torch.Tensor, cells: torch.Tensor) -> None:
        """Reads the block just drawn, bits [I, P, C] at `cells` [P, 2]."""
        ...


@torch.no_grad()
def decode_blocks(model: BlockModel, layout: DecodeLayout, draw: Draw, on_block: OnBlock | None = None) -> torch.Tensor:
    """Draws all blocks of a batch of images.

    Args:
        model: backbone and head.
        layout: the sequences of the batch.
        draw: the noise, called once per block; twice where the unconditional prompts draw blocks of their own.
        on_block: sees every block as soon as it is drawn; it must not change them.

    Returns:
        float32 [I, h * w, C] of -1 and 1, or continuous latents, in the order of the sequence.
    """
    model.start(layout)
    blocks: list[torch.Tensor] = []
    read = None
    for cells in layout.cells.split(layout.block_tokens):
        if read is not None:
            model.extend(blocks[-1], read)
        blocks.append(model.draw_block(cells, draw))
        read = cells
        if on_block is not None:
            on_block(blocks)
    return torch.cat(blocks, dim=1)
