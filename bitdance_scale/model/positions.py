"""Positions: the 2-D sine-cosine table of vision tokens, and rotary angles along the sequence or over the cells.

Shape suffixes: V vision tokens, S positions, B batch, N heads, K head size, D hidden size.
"""

from __future__ import annotations

import torch

from bitdance_scale.config.data_rules import NUM_RESOLUTION_TOKENS
from bitdance_scale.errors import ConfigError

SINCOS_BASE = 10000.0
CELL_ROTARY_BASE = 10000.0


def sincos_2d(cells: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """The 2-D sine-cosine embedding of latent cells: [column embedding, row embedding] (published release).

    Each axis takes D / 2 channels, half sines then half cosines of coordinate / 10000^(i / (D / 4)).

    Args:
        cells: int [.., 2], (row, column) of each cell.
        hidden_size: D, a multiple of 4.

    Returns:
        float32 [.., D].

    Raises:
        ConfigError: D is not a multiple of 4.
    """
    if hidden_size % 4:
        raise ConfigError(f"model.hidden_size = {hidden_size}: must be a multiple of 4 for the 2-D positions")
    # float64 up to the sine: at coordinate 256 a float32 angle would be off by 1e-5.
    quarter = hidden_size // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device=cells.device) / quarter
    angles = cells.double()[..., None] * SINCOS_BASE**-exponents
    row_angles, column_angles = angles.unbind(-2)
    table = [column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos()]
    return torch.cat(table, dim=-1).float()


def axis_table(hidden_size: int) -> torch.Tensor:
    """The part of `sincos_2d` for one axis, float32 [coordinates, D / 2], with all coordinates that an image can have.

    It is computed once. `sincos_2d` itself takes a dozen float64 kernels, which would run twice for every pack.
    """
    coordinates = torch.arange(NUM_RESOLUTION_TOKENS)
    return sincos_2d(torch.stack([coordinates, coordinates], dim=1), hidden_size)[:, : hidden_size // 2]


def look_up_cells(table: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """`sincos_2d` [.., D] of cells, int [.., 2], from an `axis_table` [coordinates, D / 2] in any dtype."""
    row, column = cells.long().unbind(-1)
    return torch.cat([table[column], table[row]], dim=-1)


def rotary_frequencies(position_ids_S: torch.Tensor, head_dim: int, base: float) -> torch.Tensor:
    """Rotary angles position / base^(2 i / K), i = 0 .. K / 2 - 1, repeated twice along the last axis.

    In float32, as Qwen3 and Megatron-core compute them: trained weights have adapted to this rounding.

    Args:
        position_ids_S: int [S].
        head_dim: K, even.
        base: base of the frequencies.

    Returns:
        float32 [S, 1, 1, K], for `rotary_table`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_S.device) / head_dim
    angles = position_ids_S.float()[:, None] * (1.0 / base**exponents)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def cell_rotary(cells_S2: torch.Tensor, is_vision_S: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotary angles over the cells of vision tokens (published class-conditional release).

    The first half of the channels turns with the column, the second with the row. Neighbouring channels (2 j, 2 j + 1)
    turn together, by coordinate / 10000^(4 i / K), i = 0 .. K / 4 - 1. The coordinate is that of the centre of the
    cell plus one; what is no vision token does not turn.

    Args:
        cells_S2: int [S, 2], (row, column) of every position; anything where there is no vision token.
        is_vision_S: bool [S].
        head_dim: K, a multiple of 4.

    Returns:
        float32 [S, 1, 1, K], for `rotary_table` with interleaved channels.
    """
    quarter = head_dim // 4
    exponents = torch.arange(quarter, dtype=torch.float32, device=cells_S2.device) / quarter
    frequencies = 1.0 / CELL_ROTARY_BASE**exponents
    row_S, column_S = ((cells_S2.float() + 1.5) * is_vision_S[:, None]).unbind(-1)
    angles = torch.cat([column_S[:, None] * frequencies, row_S[:, None] * frequencies], dim=-1)
    return angles.repeat_interleave(2, dim=-1)[:, None, None, :]


def rotary_table(angles_SB1K: torch.Tensor, is_interleaved: bool, dtype: torch.dtype) -> torch.Tensor:
    """What turns queries and keys, computed once for all layers.

    Args:
        angles_SB1K: float32, the angle of every channel.
        is_interleaved: whether neighbouring channels have the same angle, rather than those of the two halves.
        dtype: of the queries and keys; trained weights have adapted to its rounding.

    Returns:
        [S, B, K]: the cosines, then the sines, of the angles of the K / 2 pairs.
    """
    angles_SBK = angles_SB1K[:, :, 0]
    half = angles_SBK.shape[-1] // 2
    pairs = angles_SBK[..., ::2] if is_interleaved else angles_SBK[..., :half]
    return torch.cat([pairs.cos(), pairs.sin()], dim=-1).to(dtype)


def raster_index(cells: torch.Tensor, grid: tuple[int, int], order_side: int) -> torch.Tensor:
    """The place of cells in block raster order, in which tokens are generated (`sequence/layout.block_raster_cells`).

    Args:
        cells: int [.., 2], (row, column).
        grid: (height, width) of the image in cells.
        order_side: side of the blocks of that order; 1 is plain raster order.

    Returns:
        int64 [..].
    """
    row, column = cells.long().unbind(-1)
    block = (row // order_side) * (grid[1] // order_side) + column // order_side
    return block * order_side**2 + (row % order_side) * order_side + column % order_side
