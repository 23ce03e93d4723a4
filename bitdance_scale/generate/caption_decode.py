"""Captions of images, token by token, for a batch of images of any sizes.

The sequences are those of training: `describing_prompt`, laid out by `pack_samples`. They are padded on the left, so
that all captions of a batch begin at the same slot.

Shape suffixes: B sequences, L positions of the longest, I vision tokens of all images, C bits, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from bitdance_scale.config.ranges import Range
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.sequence.layout import SequenceTokens, pack_samples
from bitdance_scale.sequence.pack import Sample
from bitdance_scale.sequence.visibility import visible


@dataclass(frozen=True)
class ContextLayout:
    """The sequences of a batch up to where their captions begin.

    Attributes:
        token_ids: int64 [B, L], padded on the left with 0; 0 at vision positions.
        position_ids: int64 [B, L], rotary positions; 0 on padding.
        document_ids: int64 [B, L], 0, and -1 on padding.
        block_ids: int64 [B, L], attention groups; 0 on padding.
        vision_rows: int64 [I], the sequence of every vision token, image after image.
        vision_positions: int64 [I], its position there.
        vision_cells: int64 [I, 2], its (row, column) in its image.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    block_ids: torch.Tensor
    vision_rows: torch.Tensor
    vision_positions: torch.Tensor
    vision_cells: torch.Tensor

    @property
    def first(self) -> torch.Tensor:
        """int64 [B], the first position of each sequence that is no padding."""
        return (self.document_ids < 0).sum(1)

    def mask(self) -> torch.Tensor:
        """Who sees whom: bool [B, 1, L, L]."""
        return visible(self.document_ids, self.block_ids)[:, None]


def lay_out_contexts(samples: Sequence[Sample], tokens: SequenceTokens, device: torch.device) -> ContextLayout:
    """Lays out samples that end where a caption begins (`TextTokenizer.describing_prompt`), as training lays them out.

    Raises:
        ValueError: there is no resolution token for a side, or the block side does not divide it.
    """
    packs = [pack_samples([sample], tokens, pack_multiple=1) for sample in samples]
    length = max(pack.num_positions for pack in packs)
    paddings = [length - pack.num_positions for pack in packs]

    def padded(name: str, fill: int) -> torch.Tensor:
        rows = [
            np.pad(getattr(pack, name), (padding, 0), constant_values=fill)
            for pack, padding in zip(packs, paddings, strict=True)
        ]
        return torch.from_numpy(np.stack(rows)).to(device).long()

    def joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device).long()

    return ContextLayout(
        token_ids=padded("token_ids", 0),
        position_ids=padded("position_ids", 0),
        document_ids=padded("document_ids", -1),
        block_ids=padded("block_ids", 0),
        vision_rows=joined([np.full(len(pack.vision_cells), row) for row, pack in enumerate(packs)]),
        vision_positions=joined(
            [pack.vision_positions + padding for pack, padding in zip(packs, paddings, strict=True)]
        ),
        vision_cells=joined([pack.vision_cells for pack in packs]),
    )


@dataclass(frozen=True)
class TokenChoice:
    """How the next token is chosen.

    Attributes:
        top_p: of the tokens in falling order of probability, as few as have this much together are drawn from
            (arXiv 1904.09751 Sec. 3.1); None: all.
        temperature: the logits are divided by it; None: 1. With neither, the most probable token is taken.

    Raises:
        ConfigError: a value is not possible.
    """

    top_p: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name, value, legal in (
            ("top_p", self.top_p, Range(0, 1, is_low_open=True)),
            ("temperature", self.temperature, Range(0, is_low_open=True, is_high_open=True)),
        ):
            if value is not None and value not in legal:
                raise ConfigError(f"{name} = {value}: must be {legal}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.top_p is None and self.temperature is None

    def choose(self, logits_BV: torch.Tensor, uniforms_B: torch.Tensor | None) -> torch.Tensor:
        """The next token of every sequence, int64 [B]; of equal logits the lowest row comes first.

        Args:
            logits_BV: floating point; minus infinity where a row cannot be chosen.
            uniforms_B: float64 in [0, 1), which token is drawn; None where none is.
        """
        if self.is_greedy:
            rows_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
            is_best = logits_BV == logits_BV.amax(dim=1, keepdim=True)
            return torch.where(is_best, rows_V, logits_BV.shape[1]).amin(dim=1)
        assert uniforms_B is not None, "tokens are drawn with numbers"
        falling_BV, rows_BV = (logits_BV.double() / (self.temperature or 1.0)).sort(dim=1, descending=True, stable=True)
        shares_BV = falling_BV.softmax(dim=1)
        sums_BV = shares_BV.cumsum(dim=1)
        # A token is drawn from if those before it have less than top_p together.
        is_kept = sums_BV - shares_BV < (1.0 if self.top_p is None else self.top_p)
        kept_B1 = torch.where(is_kept, shares_BV, 0.0).sum(dim=1, keepdim=True)
        places_B = (sums_BV <= uniforms_B[:, None] * kept_B1).sum(dim=1)
        # Rounding of the sums may leave the last number beyond the last token.
        last_B = (is_kept & (shares_BV > 0)).sum(dim=1) - 1
        return rows_BV.gather(1, torch.minimum(places_B, last_B)[:, None])[:, 0]


class CaptionModel(Protocol):
    """A backbone with its vocabulary, one token of every sequence at a time."""

    def start(self, layout: ContextLayout, bits: torch.Tensor, max_tokens: int) -> torch.Tensor:
        """Reads the contexts with the bits [I, C] of their images: logits [B, V] of the first token."""
        ...

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads a token of every sequence, int64 [B], at most `max_tokens` times: logits [B, V] of the next."""
        ...


@dataclass(frozen=True)
class CaptionTokens:
    """A caption.

    Attributes:
        ids: its tokens, without the one that ends it.
        is_ended: whether the model ended it; else it was cut.
    """

    ids: list[int]
    is_ended: bool


@torch.no_grad()
def decode_captions(
    model: CaptionModel,
    layout: ContextLayout,
    bits: torch.Tensor,
    choice: TokenChoice,
    generators: Sequence[torch.Generator],
    is_choice: torch.Tensor,
    end_id: int,
    max_tokens: int,
) -> list[CaptionTokens]:
    """Writes the captions of a batch of images.

    Args:
        model: backbone and vocabulary.
        layout: the sequences of the batch.
        bits: [I, C] of the images, in the order of the layout.
        choice: how tokens are chosen.
        generators: on the CPU, one per sequence; each gives one number per token, if tokens are drawn.
        is_choice: bool [V], rows that may be chosen.
        end_id: the row that ends a caption, one of them.
        max_tokens: a caption is cut after so many tokens.

    Raises:
        CheckpointError: the model's numbers are not finite.
    """
    logits = model.start(layout, bits, max_tokens)
    if not logits.isfinite().all():
        raise CheckpointError(
            "the model gives logits that are not finite; use another dtype, or export a checkpoint whose weights are"
        )
    is_ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    columns: list[torch.Tensor] = []
    # One choice more than tokens: whether a caption of full length ends there.
    for number in range(max_tokens + 1):
        uniforms = None
        if not choice.is_greedy:
            drawn = [torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]
            uniforms = torch.stack(drawn).to(logits.device)
        tokens = choice.choose(logits.masked_fill(~is_choice, -torch.inf), uniforms)
        columns.append(tokens)
        is_ended |= tokens == end_id
        if number == max_tokens or bool(is_ended.all()):
            break
        logits = model.extend(tokens)
    captions = []
    for row in torch.stack(columns, dim=1).tolist():
        has_end = end_id in row
        captions.append(CaptionTokens(row[: row.index(end_id)] if has_end else row[:max_tokens], has_end))
    return captions
