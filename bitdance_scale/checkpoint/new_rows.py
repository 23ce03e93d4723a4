"""Embedding rows of tokens that a start lacks: the query tokens that larger blocks need.

The release distils blocks of 16 tokens into blocks of 64 (arXiv 2602.14041 Sec. 4.3): the 15 trained query tokens stay, 48
follow them in the vocabulary. How their rows begin is not published; the rules here are `run.new_queries`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitdance_scale.checkpoint.boxes import Box
from bitdance_scale.model.initial import named_generator
from bitdance_scale.parallel.partition import Piece, ShardedValue

# Rows that begin around a mean lie around it a tenth as far as the rows it was taken of.
NEW_ROW_SPREAD = 0.1


@dataclass(frozen=True)
class NewQueries:
    """Query tokens that a start lacks.

    Attributes:
        num_old_rows: rows of the start's embedding; the new ones follow.
        num_trained: query tokens of the start, whose rows are its last.
        num_new: query tokens that it lacks.
        rule: repeat, mean or noise.
        seed: of the noise.
        init_std: standard deviation of rows that are noise.
    """

    num_old_rows: int
    num_trained: int
    num_new: int
    rule: str
    seed: int
    init_std: float

    def rows(self, name: str, trained: torch.Tensor) -> torch.Tensor:
        """The new rows of a table, float32 [num_new, D].

        repeat: the trained ones, from the first on, again and again. mean: their mean and normal noise of
        `NEW_ROW_SPREAD` times their spread, per channel. noise: normal, as an embedding starts.

        Args:
            name: global name of the table, which seeds the noise with the seed.
            trained: [num_trained, D], rows of the trained query tokens.
        """
        trained = trained.float()
        if self.rule == "repeat":
            return trained[torch.arange(self.num_new) % self.num_trained]
        noise = torch.randn(
            self.num_new, trained.shape[1], generator=named_generator(self.seed, f"new rows of {name}", "cpu")
        )
        if self.rule == "noise":
            return self.init_std * noise
        assert self.rule == "mean"
        return around_mean(trained.mean(dim=0), trained.std(dim=0, correction=0), noise)


def around_mean(mean: torch.Tensor, spread: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Rows [N, D] around a mean [D]: normal noise [N, D] times `NEW_ROW_SPREAD` of a spread [D]."""
    return mean + NEW_ROW_SPREAD * spread * noise


def first_rows(value: ShardedValue, num_rows: int) -> ShardedValue:
    """The part of a value in the first rows of its tensor; its pieces are views."""
    kept = Box((0,) * len(value.global_shape), (num_rows, *value.global_shape[1:]))
    pieces = []
    for piece in value.pieces:
        box = Box(tuple(piece.offsets), tuple(piece.tensor.shape))
        common = box.intersect(kept)
        if common is not None:
            pieces.append(Piece(common.offsets, piece.tensor[common.slices_in(box)]))
    return ShardedValue((num_rows, *value.global_shape[1:]), value.dtype, tuple(pieces))


def fill_rows(value: ShardedValue, first_row: int, rows: torch.Tensor) -> None:
    """Writes whole rows [N, D] into what a value holds of them, in its dtype, from row `first_row` on."""
    filled = Box((first_row, 0), tuple(rows.shape))
    for piece in value.pieces:
        box = Box(tuple(piece.offsets), tuple(piece.tensor.shape))
        common = box.intersect(filled)
        if common is not None:
            piece.tensor[common.slices_in(box)] = rows[common.slices_in(filled)].to(value.dtype)
