"""The layout of samples and packs: what every position is, and which attention group it is in.

One text-to-image sample (arXiv 2602.14041 Sec. 4.3, `[bos] {text} [boi] [res_i] [res_j] {visual} [eoi] [eos]`) is

    {before} <|vision_start|> <|res_h|> <|res_w|> <|query_1|> .. <|query_{P-1}|> {vision tokens} <|vision_end|> {after}

The P positions `<|res_w|>, <|query_1|>, ..` predict the first block, block m predicts block m + 1, and the last block
predicts nothing (Sec. 3.3). A block is an attention group, and so are `<|res_w|>` and the queries together; every other
position is a group by itself. `sequence/visibility.py` says who sees whom. In the ablations of Table 14, every position
is a group by itself (`is_causal`), or vision tokens follow row by row, and the next P are a block (`is_raster`).

An image that is only the context of a caption predicts nothing. It is laid as the release's inference lays it, without
queries and with every position a group by itself (docs/generation.md has the reasons):

    {before} <|vision_start|> <|res_h|> <|res_w|> {vision tokens} <|vision_end|> {after}

With `has_context_queries` it is laid as an image to draw is, as earlier versions trained it.

A class-conditional sample (Sec. 4.2) has the tokens of its class as `before`, of which the last takes the place of
`<|res_w|>`, and ends before its last block, which predicts nothing and which nothing sees:

    {class tokens} {query_1} .. {query_{P-1}} {vision tokens without the last block}

What differs between the two is in `ImageTokens` and `ClassTokens`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from einops import rearrange

from bitdance_scale.sequence.pack import Pack, Sample


class SequenceTokens(Protocol):
    """The special tokens of a sample, and what of its image is in the sequence."""

    @property
    def block_tokens(self) -> int:
        """P, vision tokens per block."""
        ...

    @property
    def is_causal(self) -> bool:
        """Whether positions of a block see only those before them."""
        ...

    @property
    def is_raster(self) -> bool:
        """Whether vision tokens follow row by row, and not block by block."""
        ...

    @property
    def reads_last_block(self) -> bool:
        """Whether the last block of an image is in the sequence."""
        ...

    def prefix_ids(self, grid: tuple[int, int], *, is_context: bool = False) -> np.ndarray:
        """int64, the tokens between the text or class and an image of `grid` (height, width) cells."""
        ...

    def has_blocks(self, *, is_context: bool) -> bool:
        """Whether an image has queries and is seen block by block; else every position is a group by itself."""
        ...

    def end_ids(self) -> np.ndarray:
        """int64, the tokens right after an image."""
        ...


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the special tokens around an image that is drawn from text.

    Attributes:
        vision_start, vision_end: ids of `<|vision_start|>` and `<|vision_end|>`.
        resolution: ids of `<|res_1|>`, `<|res_2|>`, ..; the token of n cells is `resolution[n - 1]`.
        queries: ids of `<|query_1|>` .. `<|query_{P-1}|>`.
        is_causal: whether positions of a block see only those before them.
        is_raster: whether vision tokens follow row by row, and not block by block.
        has_context_queries: whether an image that is only context is laid as an image to draw.
    """

    vision_start: int
    vision_end: int
    resolution: tuple[int, ...]
    queries: tuple[int, ...]
    is_causal: bool = False
    is_raster: bool = False
    has_context_queries: bool = False

    @property
    def block_tokens(self) -> int:
        """P, vision tokens per block: one per query and one for `<|res_w|>`."""
        return len(self.queries) + 1

    @property
    def reads_last_block(self) -> bool:
        """The last block is in the sequence, because text may follow it."""
        return True

    def has_blocks(self, *, is_context: bool) -> bool:
        """Whether an image has queries: an image to draw has, one that is only context by `has_context_queries`."""
        return self.has_context_queries or not is_context

    def prefix_ids(self, grid: tuple[int, int], *, is_context: bool = False) -> np.ndarray:
        """int64 [P + 2], `<|vision_start|> <|res_h|> <|res_w|> <|query_1|> .. <|query_{P-1}|>`; or the first three.

        Args:
            grid: (height, width) of the image in cells.
            is_context: whether the image is only the context of a caption.

        Raises:
            ValueError: there is no resolution token for a side of the grid.
        """
        height, width = grid
        limit = len(self.resolution)
        if not (0 < height <= limit and 0 < width <= limit):
            raise ValueError(f"grid {grid}: sides must be within 1..{limit}, one resolution token each")
        resolution = (self.resolution[height - 1], self.resolution[width - 1])
        queries = self.queries if self.has_blocks(is_context=is_context) else ()
        return np.array([self.vision_start, *resolution, *queries], dtype=np.int64)

    def end_ids(self) -> np.ndarray:
        """int64 [1], `<|vision_end|>`."""
        return np.array([self.vision_end], dtype=np.int64)


@dataclass(frozen=True)
class ClassTokens:
    """Rows of the embedding table of a class-conditional network: every class has `num_tokens`, queries follow.

    The published release has a row of `num_tokens` vectors per class, one more class for "no class", and the queries as
    a parameter of their own. The rows of this table are the same vectors in the same order.

    Attributes:
        num_classes: classes, "no class" not counted; it is number `num_classes`.
        num_tokens: tokens of a class.
        block_tokens: P.
        is_causal: whether positions of a block see only those before them.
        is_raster: whether vision tokens follow row by row, and not block by block.
    """

    num_classes: int
    num_tokens: int
    block_tokens: int
    is_causal: bool = False
    is_raster: bool = False

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""
        return (self.num_classes + 1) * self.num_tokens + self.block_tokens - 1

    @property
    def reads_last_block(self) -> bool:
        """Nothing follows the last block, so it is left out."""
        return False

    def class_ids(self, label: int) -> np.ndarray:
        """int64 [num_tokens], the tokens of a class; `num_classes` is "no class"."""
        assert 0 <= label <= self.num_classes, f"class {label} of {self.num_classes}"
        return label * self.num_tokens + np.arange(self.num_tokens, dtype=np.int64)

    def has_blocks(self, *, is_context: bool) -> bool:
        """Always: a class has no words, so no image is the context of any."""
        assert not is_context, "class-conditional networks describe no image"
        return True

    def prefix_ids(self, grid: tuple[int, int], *, is_context: bool = False) -> np.ndarray:
        """int64 [P - 1], the queries."""
        return (self.num_classes + 1) * self.num_tokens + np.arange(self.block_tokens - 1, dtype=np.int64)

    def end_ids(self) -> np.ndarray:
        """int64 [0], nothing."""
        return np.zeros(0, dtype=np.int64)


def num_positions(sample: Sample, tokens: SequenceTokens) -> int:
    """Positions that a sample takes in a pack."""
    around = len(tokens.prefix_ids(sample.grid, is_context=not sample.predicts_image)) + len(tokens.end_ids())
    return len(sample.before_ids) + around + num_read(sample.grid, tokens) + len(sample.after_ids)


def num_read(grid: tuple[int, int], tokens: SequenceTokens) -> int:
    """Vision tokens of an image that are in the sequence."""
    return grid[0] * grid[1] - (0 if tokens.reads_last_block else tokens.block_tokens)


def attention_groups(num_before: int, num_vision: int, num_after: int, tokens: SequenceTokens) -> np.ndarray:
    """Attention group of every position of a sample; a position sees the groups up to its own.

    Args:
        num_before: positions before `<|res_w|>`, or the last class token.
        num_vision: vision tokens in the sequence, a multiple of P.
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


def pack_samples(samples: Sequence[Sample], tokens: SequenceTokens, pack_multiple: int) -> Pack:
    """Lays samples end to end in one training row, in the order given.

    Args:
        samples: at least one; the sides of their grids are divisible by the block side.
        tokens: the special tokens.
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
        self.num_vision += len(arrays.get("vision_cells", ()))


def _append_sample(rows: _Rows, document: int, sample: Sample, tokens: SequenceTokens) -> None:
    """Adds one sample, a sequence in the module's docstring."""
    is_context = not sample.predicts_image
    prefix, end = tokens.prefix_ids(sample.grid, is_context=is_context), tokens.end_ids()
    num_before, num_vision, num_after = len(sample.before_ids), sample.grid[0] * sample.grid[1], len(sample.after_ids)
    num_input = num_read(sample.grid, tokens)
    vision_start = num_before + len(prefix)
    after_start = vision_start + num_input + len(end)
    length = after_start + num_after

    token_ids = np.concatenate([sample.before_ids, prefix, np.zeros(num_input, dtype=np.int64), end, sample.after_ids])

    # The P positions before a block predict it: token i of the image is predicted at queries_start + i.
    queries_start = vision_start - tokens.block_tokens
    predicted = np.arange(0 if is_context else num_vision, dtype=np.int64)
    if tokens.has_blocks(is_context=is_context):
        block_ids = attention_groups(queries_start, num_input, len(end) + num_after, tokens)
    else:
        block_ids = np.arange(length, dtype=np.int32)
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
        block_ids=block_ids,
        vision_positions=start + vision_start + np.arange(num_input, dtype=np.int64),
        vision_inputs=vision_before + np.arange(num_input, dtype=np.int64),
        vision_cells=vision_cells(sample.grid, tokens),
        predict_positions=start + queries_start + predicted,
        predict_tokens=vision_before + predicted,
        text_positions=start + text_indices - 1,
        text_targets=token_ids[text_indices],
        sample_vision=np.array([[vision_before, vision_before + num_vision]], dtype=np.int64),
    )


def vision_cells(grid: tuple[int, int], tokens: SequenceTokens) -> np.ndarray:
    """Cells of an image in the order in which its vision tokens follow: int32 [h * w, 2], (row, column) of each.

    Raises:
        ValueError: a side is not divisible by the block side.
    """
    side = math.isqrt(tokens.block_tokens)
    assert side**2 == tokens.block_tokens, f"{tokens.block_tokens} tokens do not form a square block"
    cells = block_raster_cells(grid, side)
    return block_raster_cells(grid, 1) if tokens.is_raster else cells


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
