"""Captions with transformers' Qwen3 on one device: a context is read once, then one token of every sequence at a time.

Shape suffixes: B sequences, L positions of the longest context, I vision tokens of all images, C bits, V vocabulary
rows, D hidden size, T key slots.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import Qwen3Model

from bitdance_scale.generate.block_decode import additive
from bitdance_scale.generate.caption_decode import ContextLayout
from bitdance_scale.generate.qwen3_memory import Qwen3Reader
from bitdance_scale.model.projector import Projector


class Qwen3Captions:
    """A `generate.caption_decode.CaptionModel` of a Qwen3 and the projector, all on one device.

    Args:
        backbone: the Qwen3 without its output projection; its attention is set to `attend_blocks`.
        output_VD: its output projection.
        projector: from bits to hidden states.
        use_graphs: whether the reading of a token is recorded as a CUDA graph; default on CUDA.
    """

    def __init__(
        self, backbone: Qwen3Model, output_VD: torch.Tensor, projector: Projector, use_graphs: bool | None = None
    ) -> None:
        self._reader, self._output_VD = Qwen3Reader(backbone, projector, use_graphs), output_VD

    def start(self, layout: ContextLayout, bits: torch.Tensor, max_tokens: int) -> torch.Tensor:
        """Reads the contexts [B, L] with the bits [I, C] of their images; logits [B, V]."""
        reader, (num_sequences, length) = self._reader, layout.token_ids.shape
        reader.start(num_sequences, length + max_tokens)
        rows_BLD = reader.backbone.embed_tokens(layout.token_ids)
        rows_BLD[layout.vision_rows, layout.vision_positions] = reader.embed_bits(bits, layout.vision_cells)
        mask = additive(layout.mask(), reader.dtype)
        hidden_BLD = reader.read(rows_BLD, layout.position_ids, reader.slots[:length], mask)
        self._first_B, self._num_read = layout.first, length
        return functional.linear(hidden_BLD[:, -1], self._output_VD)

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads a token of every sequence, int64 [B]; logits [B, V]."""
        slot, self._num_read = self._num_read, self._num_read + 1
        return self._reader.run(
            self._read_token,
            tokens,
            (slot - self._first_B)[:, None],
            self._reader.slots[slot : slot + 1],
            self._reader.later_mask(self._first_B, self._num_read),
        )

    def _read_token(
        self, tokens_B: torch.Tensor, positions_B1: torch.Tensor, slots_1: torch.Tensor, mask_B11T: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, V] after a token, whose keys and values are written to the slot."""
        rows_B1D = self._reader.backbone.embed_tokens(tokens_B[:, None])
        hidden_B1D = self._reader.read(rows_B1D, positions_B1, slots_1, mask_B11T)
        return functional.linear(hidden_B1D[:, 0], self._output_VD)
