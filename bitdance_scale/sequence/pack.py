"""Sample and Pack: what the loader hands to the model.

A `Sample` is one image with its text, tokenized. A `Pack` is one training row: several samples laid end to end by
`layout.py`. It holds, per position and per vision token, everything that the model needs to know, so no other code
works out what a position is. Packs are numpy arrays: loader threads build them, the ranks of a replica send them to
each other, and they move to the device once.

Sizes: S positions, V vision tokens, I those of them in the sequence, Q predicted vision tokens, P vision tokens
per block, C bits, T text targets, N samples.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One image-text pair, ready to be laid out; `sequence/tokens.py` makes them from captions.

    Attributes:
        key: identity of the sample in the data set, 0 <= key < 2^63; all its noise depends on it.
        grid: (height, width) of the image in latent cells.
        before_ids: int64 [A], tokens before `<|vision_start|>`.
        after_ids: int64 [B], tokens after `<|vision_end|>`.
        first_target_before: index in before_ids of the first text target (at least 1); A if there is none.
        first_target_after: index in after_ids of the first text target (at least 1); B if there is none.
        predicts_image: whether the vision tokens are targets (text-to-image) or only context (image-to-text).
    """

    key: int
    grid: tuple[int, int]
    before_ids: np.ndarray
    after_ids: np.ndarray
    first_target_before: int
    first_target_after: int
    predicts_image: bool = True


@dataclass(frozen=True)
class Pack:
    """One training row.

    Attributes:
        token_ids: int64 [S], text and special token ids; 0 at vision positions and padding.
        position_ids: int64 [S], rotary position, restarting at 0 in every sample.
        document_ids: int32 [S], sample of the position, -1 for padding.
        block_ids: int32 [S], attention group within the sample, never decreasing along it. With `document_ids` it
            decides who sees whom (`sequence/visibility.py`).
        vision_positions: int64 [I], position of every vision token that is in the sequence.
        vision_inputs: int64 [I], its index in 0..V-1.
        vision_cells: int32 [V, 2], (row, column) of its latent cell.
        vision_bits: uint8 [V, C / 8], its bits packed by `vision/bits.py`; None until the images are encoded.
        predict_positions: int64 [Q], position whose hidden state predicts a vision token, block after block.
        predict_tokens: int64 [Q], index in 0..V-1 of the token it predicts.
        text_positions: int64 [T], position whose hidden state predicts a text token.
        text_targets: int64 [T], id of the token it predicts.
        sample_keys: int64 [N], `Sample.key`.
        sample_vision: int64 [N, 2], start and stop of the sample's vision tokens in 0..V.
        sample_predicts: bool [N], `Sample.predicts_image`.
        sample_grids: int32 [N, 2], (height, width) in latent cells.
        block_tokens: P.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    document_ids: np.ndarray
    block_ids: np.ndarray
    vision_positions: np.ndarray
    vision_inputs: np.ndarray
    vision_cells: np.ndarray
    vision_bits: np.ndarray | None
    predict_positions: np.ndarray
    predict_tokens: np.ndarray
    text_positions: np.ndarray
    text_targets: np.ndarray
    sample_keys: np.ndarray
    sample_vision: np.ndarray
    sample_predicts: np.ndarray
    sample_grids: np.ndarray
    block_tokens: int

    @property
    def num_positions(self) -> int:
        """S, padding included."""
        return len(self.token_ids)

    @property
    def num_padding(self) -> int:
        """Positions that belong to no sample."""
        return int((self.document_ids < 0).sum())

    def with_bits(self, vision_bits: np.ndarray) -> Pack:
        """The pack with its images encoded, as uint8 [V, C / 8]; ValueError for another shape or dtype."""
        if vision_bits.shape[0] != len(self.vision_cells) or vision_bits.dtype != np.uint8:
            raise ValueError(
                f"vision_bits: {vision_bits.dtype} {vision_bits.shape}, expected uint8 [{len(self.vision_cells)}, C/8]"
            )
        return dataclasses.replace(self, vision_bits=vision_bits)
