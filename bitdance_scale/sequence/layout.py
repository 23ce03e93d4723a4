"""The sole home of "which position is what, which block it is in and who sees whom".

One text-to-image sample (arXiv 2602.14041 Sec. 4.3, `[bos] {text} [boi] [res_i] [res_j] {visual} [eoi] [eos]`) is

    {before} <|vision_start|> <|res_h|> <|res_w|> <|query_1|> .. <|query_{P-1}|> {vision tokens} <|vision_end|> {after}

The P positions `<|res_w|>, <|query_1|>, ..` predict the first block, block m predicts block m + 1, and the last block
predicts nothing (Sec. 3.3). Attention is causal, but positions of one block (and of the group `<|res_w|>` and queries)
all see each other. Samples of a pack do not see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.sequence.grid import block_raster_cells
from bitdance_scale.sequence.pack import Pack, Sample


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the special tokens around an image.

    Attributes:
        vision_start, vision_end: ids of `<|vision_start|>` and `<|vision_end|>`.
        resolution: ids of `<|res_1|>`, `<|res_2|>`, ..; the token of n cells is `resolution[n - 1]`.
        queries: ids of `<|query_1|>` .. `<|query_{P-1}|>`.
    """

    vision_start: int
    vision_end: int
    resolution: tuple[int, ...]
    queries: tuple[int, ...]

    @property
    def block_tokens(self) -> int:
        """P, vision tokens per block: one per query and one for `<|res_w|>`."""
        return len(self.queries) + 1


def num_positions(num_before: int, num_after: int, grid: tuple[int, int], block_tokens: int) -> int:
    """Positions of a sample with that many text tokens before and after an image of `grid` (height, width) cells."""
    return num_before + 3 + (block_tokens - 1) + grid[0] * grid[1] + 1 + num_after


def image_prefix_ids(grid: tuple[int, int], tokens: ImageTokens) -> np.ndarray:
    """int64 [P + 2], `<|vision_start|> <|res_h|> <|res_w|> <|query_1|> .. <|query_{P-1}|>`."""
    height, width = grid
    limit = len(tokens.resolution)
    if not (0 < height <= limit and 0 < width <= limit):
        raise ValueError(f"grid {grid}: sides must be within 1..{limit}, one resolution token each")
    resolution = (tokens.resolution[height - 1], tokens.resolution[width - 1])
    return np.array([tokens.vision_start, *resolution, *tokens.queries], dtype=np.int64)
