"""Keys and values of what a Qwen3 has read, and its attention over them, in transformers' terms.

Memory of fixed size: new keys are written to numbered slots, and attention sees the first so many slots. All queries of
a block of vision tokens see the same keys, so the query heads that share a key/value head are laid below each other and
no key is repeated; transformers' own functions repeat keys under a mask, five times in the 14B model.

Shape suffixes: B sequences, N query heads, G key/value heads, S queries, T keys, K head size.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import Qwen3Config
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

# Name under which transformers finds `attend_blocks`.
BLOCK_ATTENTION = "bitdance_blocks"


class KeyValues(Cache):
    """Keys and values of all layers in tensors that stay in place, as a captured graph needs them.

    Args:
        config: of the Qwen3.
        num_sequences: B.
        capacity: slots per sequence.
        dtype, device: of the keys.
    """

    def __init__(
        self, config: Qwen3Config, num_sequences: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        shape = (2, num_sequences, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros: a slot that was never written is masked, but 0 times NaN would be NaN.
        self._layers_2BGTK = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._slots_S, self._num_seen = torch.zeros(0, dtype=torch.long), 0

    def place(self, slots_S: torch.Tensor, num_seen: int) -> None:
        """Where the next keys go, int64 [S], and how many of the first slots their queries are shown."""
        self._slots_S, self._num_seen = slots_S, num_seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new keys and values [B, G, S, K] of a layer; returns those shown, [B, G, num_seen, K]."""
        keys_BGTK, values_BGTK = self._layers_2BGTK[layer_idx]
        keys_BGTK.index_copy_(2, self._slots_S, key_states)
        values_BGTK.index_copy_(2, self._slots_S, value_states)
        return keys_BGTK[:, :, : self._num_seen], values_BGTK[:, :, : self._num_seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given, so that transformers needs no count."""
        return 0


def attend_blocks(
    module: torch.nn.Module,
    query_BNSK: torch.Tensor,
    key_BGTK: torch.Tensor,
    value_BGTK: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers; its mask [B, 1, S or 1, T] is added to the scores.

    Returns:
        [B, S, N, K], and None for the weights.
    """
    num_sequences, num_heads, length, size = query_BNSK.shape
    num_groups = key_BGTK.shape[1]
    if attention_mask.shape[2] > 1:
        attention_mask = attention_mask.repeat(1, 1, num_heads // num_groups, 1)
    mixed = functional.scaled_dot_product_attention(
        query_BNSK.reshape(num_sequences, num_groups, -1, size),
        key_BGTK,
        value_BGTK,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return mixed.reshape(num_sequences, num_heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(BLOCK_ATTENTION, attend_blocks)
