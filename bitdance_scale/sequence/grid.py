"""Block raster order: the order in which the vision tokens of an image stand in the sequence."""

from __future__ import annotations

import numpy as np
from einops import rearrange


def block_raster_cells(grid: tuple[int, int], block_side: int) -> np.ndarray:
    """Cells of an image in block raster order: `(h p1) (w p2) -> (h w p1 p2)`.

    The grid is cut into p x p blocks; blocks come in raster order, and so do the cells inside a block
    (arXiv 2602.14041 Sec. 3.3, Fig. 4).

    Args:
        grid: (height, width) in latent cells, both divisible by `block_side`.
        block_side: p.

    Returns:
        int32 [height * width, 2], (row, column) of every cell.
    """
    height, width = grid
    if height % block_side or width % block_side:
        raise ValueError(f"grid {grid}: sides must be divisible by the block side {block_side}")
    rows, columns = np.meshgrid(np.arange(height, dtype=np.int32), np.arange(width, dtype=np.int32), indexing="ij")
    cells = np.stack([rows, columns], axis=-1)
    return rearrange(cells, "(h p1) (w p2) rc -> (h w p1 p2) rc", p1=block_side, p2=block_side)
