"""The layout of samples and packs: what every position is, and which attention group it is in.

One text-to-image sample (arXiv 2602.14041 Sec. 4.3, `[bos] {text} [boi] [res_i] [res_j] {visual} [eoi] [eos]`) is

    {before} <|vision_start|> <|res_h|> <|res_w|> <|query_1|> .. <|query_{P-1}|> {vision tokens} <|vision_end|> {after}

The P positions `<|res_w|>, <|query_1|>, ..` predict the first block, block m predicts block m + 1, and the last block
predicts nothing (Sec. 3.3). A block is an attention group, and so are `<|res_w|>` and the queries together; every other
position is a group by itself. `sequence/visibility.py` says who sees whom. With `ImageTokens.is_causal`, the ablation
of Table 14, every position is a group by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from bitdance_scale.sequence.pack import Pack, Sample


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the special tokens around an image.

    Attributes:
        vision_start, vision_end: ids of `<|vision_start|>` and `<|vision_end|>`.
        resolution: ids of `<|res_1|>`, `<|res_2|>`, ..; the token of n cells is `resolution[n - 1]`.
        queries: ids of `<|query_1|>` .. `<|query_{P-1}|>`.
        is_causal: whether positions of a block see only those before them.
    """

    vision_start: int
    vision_end: int
    resolution: tuple[int, ...]
    queries: tuple[int, ...]
    is_causal: bool = False

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


def attention_groups(num_before: int, num_vision: int, num_after: int, tokens: ImageTokens) -> np.ndarray:
    """Attention group of every position of a sample; a position sees the groups up to its own.

    Args:
        num_before: positions before `<|res_w|>`.
        num_vision: vision tokens, a multiple of P.
        num_after: positions after the vision tokens.
        tokens: size of a block, and whether its positions see each other.

    Returns:
        int32 [num_before + P + num_vision + num_after], counted from 0.
    """
    size = tokens.block_tokens
    if tokens.is_causal:
        return np.arange(num_before + size + num_vision + num_after, dtype=np.int32)
    # `<|res_w|>` with the queries is one group, and so is every vision block.
    sizes = np.ones(num_before + 1 + num_vision // size + num_after, dtype=np.int64)
    sizes[num_before : len(sizes) - num_after] = size
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def pack_samples(samples: Sequence[Sample], tokens: ImageTokens, pack_multiple: int) -> Pack:
    """Lays samples end to end in one training row, in the order given.

    Args:
        samples: at least one; the sides of their grids are divisible by the block side.
        tokens: ids of the special tokens around an image.
        pack_multiple: the row is padded to a multiple of this many positions.

    Returns:
        The pack, with `vision_bits` None.
    """
    rows = _Rows()
    for document, sample in enumerate(samples):
        _append_sample(rows, document, sample, tokens)
    padding = -rows.num_positions % pack_multiple
    rows.append(
        token_ids=np.zeros(padding, dtype=np.int64),
        position_ids=np.arange(padding, dtype=np.int64),
        document_ids=np.full(padding, -1, dtype=np.int32),
        block_ids=np.arange(padding, dtype=np.int32),
    )
    return Pack(
        **{name: np.concatenate(parts) for name, parts in rows.parts.items()},
        vision_bits=None,
        sample_keys=np.array([sample.key for sample in samples], dtype=np.int64),
        sample_predicts=np.array([sample.predicts_image for sample in samples], dtype=bool),
        sample_grids=np.array([sample.grid for sample in samples], dtype=np.int32),
        block_tokens=tokens.block_tokens,
    )


class _Rows:
    """Arrays of a pack under construction, part by part."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}
        self.num_positions = 0
        self.num_vision = 0

    def append(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.parts.setdefault(name, []).append(array)
        self.num_positions += len(arrays["token_ids"])
        self.num_vision += len(arrays.get("vision_positions", ()))


def _append_sample(rows: _Rows, document: int, sample: Sample, tokens: ImageTokens) -> None:
    """Adds one sample, the sequence in the module's docstring."""
    size = tokens.block_tokens
    prefix = image_prefix_ids(sample.grid, tokens)
    num_before, num_vision, num_after = len(sample.before_ids), sample.grid[0] * sample.grid[1], len(sample.after_ids)
    queries_start = num_before + 2
    vision_start = num_before + len(prefix)
    after_start = vision_start + num_vision + 1
    length = after_start + num_after

    token_ids = np.concatenate(
        [sample.before_ids, prefix, np.zeros(num_vision, dtype=np.int64), [tokens.vision_end], sample.after_ids]
    )

    # The P positions before a block predict it: token i of the image is predicted at queries_start + i.
    predicted = np.arange(num_vision if sample.predicts_image else 0, dtype=np.int64)
    text_indices = np.concatenate(
        [
            np.arange(sample.first_target_before, num_before, dtype=np.int64),
            after_start + np.arange(sample.first_target_after, num_after, dtype=np.int64),
        ]
    )
    start, vision_before = rows.num_positions, rows.num_vision
    rows.append(
        token_ids=token_ids,
        position_ids=np.arange(length, dtype=np.int64),
        document_ids=np.full(length, document, dtype=np.int32),
        block_ids=attention_groups(queries_start, num_vision, 1 + num_after, tokens),
        vision_positions=start + vision_start + np.arange(num_vision, dtype=np.int64),
        vision_cells=block_raster_cells(sample.grid, _side(size)),
        predict_positions=start + queries_start + predicted,
        predict_tokens=vision_before + predicted,
        text_positions=start + text_indices - 1,
        text_targets=token_ids[text_indices],
        sample_vision=np.array([[vision_before, vision_before + num_vision]], dtype=np.int64),
    )


def block_raster_cells(grid: tuple[int, int], block_side: int) -> np.ndarray:
    """Cells of an image in block raster order, in which its vision tokens follow: `(h p1) (w p2) -> (h w p1 p2)`.

    The grid is cut into p x p blocks; blocks come in raster order, and so do the cells inside a block
    (arXiv 2602.14041 Sec. 3.3, Fig. 4).

    Args:
        grid: (height, width) in latent cells, both divisible by `block_side`.
        block_side: p.

    Returns:
        int32 [height * width, 2], (row, column) of every cell.

    Raises:
        ValueError: a side is not divisible by `block_side`.
    """
    height, width = grid
    if height % block_side or width % block_side:
        raise ValueError(f"grid {grid}: sides must be divisible by the block side {block_side}")
    rows, columns = np.meshgrid(np.arange(height, dtype=np.int32), np.arange(width, dtype=np.int32), indexing="ij")
    cells = np.stack([rows, columns], axis=-1)
    return rearrange(cells, "(h p1) (w p2) rc -> (h w p1 p2) rc", p1=block_side, p2=block_side)


def _side(block_tokens: int) -> int:
    side = round(block_tokens**0.5)
    assert side * side == block_tokens, f"{block_tokens} tokens do not form a square block"
    return side
