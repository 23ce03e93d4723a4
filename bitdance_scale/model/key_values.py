"""Keys and values of the positions that were read, in memory that is made once for batches of one shape.

Decoding writes the keys and values of a block in place and attends over a view of them. Nothing is copied or allocated
from block to block, and a CUDA graph finds them where they were.

Shape suffixes: B sequences, G key/value heads, T slots, S new positions, K head size.
"""

from __future__ import annotations

import torch

from bitdance_scale.config.schema import ModelSection

CAPACITY_MULTIPLE = 256
"""Slots are allocated in multiples of this, so that prompts of similar length share the memory and its graphs."""


def capacity_for(num_positions: int) -> int:
    """Slots per sequence for so many positions that are read."""
    return -(-num_positions // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


def key_value_bytes(section: ModelSection, num_sequences: int, num_positions: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of a whole backbone; tensor and pipeline ranks share them out.

    Args:
        section: sizes of the backbone.
        num_sequences: B; twice the images under guidance.
        num_positions: that are read of every sequence: prompt, image prefix, and all blocks but the last.
        dtype: of the keys and values.
    """
    per_position = 2 * section.num_layers * section.num_kv_heads * section.head_dim * dtype.itemsize
    return per_position * num_sequences * capacity_for(num_positions)


class KeyValueMemory:
    """Keys and values of some layers.

    Args:
        num_layers: how many layers.
        num_sequences: B.
        num_positions: that are read of every sequence, at most.
        num_heads: G, of this rank.
        head_dim: K.
        dtype: of the keys and values.
        device: of the keys and values.

    Attributes:
        shape: (num_sequences, capacity).
    """

    def __init__(
        self,
        num_layers: int,
        num_sequences: int,
        num_positions: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = (num_sequences, capacity_for(num_positions))
        _, capacity = self.shape
        # Zeros: a slot that was never written is masked, but 0 times NaN would be NaN.
        self._layers_2BGTK = [
            torch.zeros((2, num_sequences, num_heads, capacity, head_dim), dtype=dtype, device=device)
            for _ in range(num_layers)
        ]
        self._slots_S, self._num_seen = torch.zeros(0, dtype=torch.long, device=device), 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.nbytes for layer in self._layers_2BGTK)

    def fits(self, num_sequences: int, num_positions: int) -> bool:
        """Whether a batch has the shape that this memory was made for."""
        return self.shape == (num_sequences, capacity_for(num_positions))

    def place(self, slots_S: torch.Tensor, num_seen: int) -> None:
        """Sets where the next keys go, int64 [S], and how many slots, from the first, their queries see."""
        self._slots_S, self._num_seen = slots_S, num_seen

    def update(
        self, layer: int, keys_BGSK: torch.Tensor, values_BGSK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values [B, G, S, K] of a layer; returns views of those seen, [B, G, num_seen, K]."""
        keys_BGTK, values_BGTK = self._layers_2BGTK[layer]
        keys_BGTK.index_copy_(2, self._slots_S, keys_BGSK)
        values_BGTK.index_copy_(2, self._slots_S, values_BGSK)
        return keys_BGTK[:, :, : self._num_seen], values_BGTK[:, :, : self._num_seen]
