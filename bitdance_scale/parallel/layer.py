"""A layer of the backbone: Megatron-core's linears, with our attention and fused elementwise parts between them.

Megatron-core builds the modules (`parallel/backbone.py` names them), but their forward pass is written here. Everything
between two products is one operation of `model/fused_autograd.py`, and what the backward pass keeps is in plain sight:

| | kept with `parallel.recompute = "none"` | with "selective" |
|---|---|---|
| norms | residual stream, normalised stream | residual stream |
| attention | projection, rotated queries and keys, result | projection, result |
| SwiGLU | gate and up, product | gate and up |

Shape suffixes: S positions, B batch, N query heads, G key/value heads, K head size, D hidden size, C channels of the
fused projection, of this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from bitdance_scale.model.attention import PackMask, attend, attend_grouped
from bitdance_scale.model.fused_autograd import swiglu, turn_heads
from bitdance_scale.model.key_values import KeyValueMemory
from bitdance_scale.parallel.recomputing import not_kept, recompute


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron-core's configuration, and what our own parts ask beside it.

    Attributes:
        is_compiled: `parallel.compile`.
        drops_results: whether `parallel.recompute` is selective.
    """

    is_compiled: bool = False
    drops_results: bool = False


class BlockCausalAttention(nn.Module):
    """Core attention under the mask of a pack, or in decoding over a key/value memory."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self._memory: KeyValueMemory | None = None
        self._memory_layer = 0

    def use_memory(self, memory: KeyValueMemory | None, layer: int) -> None:
        """Writes keys and values to a layer of a memory from now on, and attends over it; None: no longer."""
        self._memory, self._memory_layer = memory, layer

    def forward(
        self,
        query_SBNK: torch.Tensor,
        key_SBGK: torch.Tensor,
        value_SBGK: torch.Tensor,
        attention_mask: torch.Tensor | PackMask,
    ) -> torch.Tensor:
        """Attends; returns [S, B, N * K].

        `attention_mask` is the mask of a pack. In decoding it is a tensor: with a memory as in `attend_grouped`, where
        T counts the keys that were read before; without as in `attend`.
        """
        if not isinstance(attention_mask, torch.Tensor):
            assert self._memory is None, "decoding masks are dense"
            return attention_mask.attend(query_SBNK, key_SBGK, value_SBGK).flatten(2)
        if self._memory is None:
            return attend(query_SBNK, key_SBGK, value_SBGK, attention_mask).flatten(2)
        query_BNSK, key_BGSK, value_BGSK = (
            rearrange(heads, "s b n k -> b n s k") for heads in (query_SBNK, key_SBGK, value_SBGK)
        )
        key_BGTK, value_BGTK = self._memory.update(self._memory_layer, key_BGSK, value_BGSK)
        return rearrange(attend_grouped(query_BNSK, key_BGTK, value_BGTK, attention_mask), "b n s k -> s b (n k)")


class Layer(TransformerLayer):
    """A layer of the backbone."""

    config: LayerConfig

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | PackMask | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Runs the layer.

        Args:
            hidden_states: [S, B, D]; under sequence parallelism this rank's part of S.
            attention_mask: see `BlockCausalAttention`.
            rotary_pos_emb: [S, B or 1, K], of `positions.rotary_table`, always whole.

        Returns:
            ([S, B, D], None); the second is Megatron-core's, for layers that read another sequence.
        """
        assert attention_mask is not None and rotary_pos_emb is not None, "every family has them"
        stream_SBD, normed_SBD, norm_again = self.input_layernorm(hidden_states)
        mixed_SBD = self._attention(normed_SBD, norm_again, attention_mask, rotary_pos_emb)
        stream_SBD, normed_SBD, norm_again = self.pre_mlp_layernorm(stream_SBD, mixed_SBD)
        return stream_SBD + self._feed_forward(normed_SBD, norm_again), None

    def _attention(
        self,
        normed_SBD: torch.Tensor,
        norm_again: Callable[[], torch.Tensor],
        mask: torch.Tensor | PackMask,
        rotary_SBK: torch.Tensor,
    ) -> torch.Tensor:
        """Projects, turns, attends and projects back; [S, B, D]."""
        attention = self.self_attention
        with self._dropping(normed_SBD, norm_again, attention.linear_qkv):
            stacked_SBC, _ = attention.linear_qkv(normed_SBD)
        weights = None
        if attention.q_layernorm is not None:
            weights = attention.q_layernorm(), attention.k_layernorm()

        def turn(stacked_SBC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return turn_heads(
                stacked_SBC,
                rotary_SBK,
                weights,
                self.config.layernorm_epsilon,
                attention.num_query_groups_per_partition,
                self.config.rotary_interleaved,
                self.config.is_compiled,
            )

        def attend_whole(stacked_SBC: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = attention.core_attention(*turn(stacked_SBC), mask)
            return mixed

        if not self._drops or isinstance(mask, torch.Tensor):
            mixed_SBC = attend_whole(stacked_SBC)
        elif mask.keeps_scores:
            mixed_SBC = recompute(attend_whole, stacked_SBC)
        else:
            query_SBNK, key_SBGK, value_SBGK = turn(stacked_SBC)
            kept_SBC = stacked_SBC.detach()
            with not_kept([query_SBNK, key_SBGK], lambda: turn(kept_SBC)[:2], attention.core_attention):
                mixed_SBC = attention.core_attention(query_SBNK, key_SBGK, value_SBGK, mask)
        output_SBD: torch.Tensor = attention.linear_proj(mixed_SBC)[0]
        return output_SBD

    def _feed_forward(self, normed_SBD: torch.Tensor, norm_again: Callable[[], torch.Tensor]) -> torch.Tensor:
        """SwiGLU between two linears; [S, B, D]."""
        first, second = self.mlp.linear_fc1, self.mlp.linear_fc2
        with self._dropping(normed_SBD, norm_again, first):
            stacked, _ = first(normed_SBD)
        product, kept = swiglu(stacked, self.config.is_compiled), stacked.detach()
        with self._dropping(product, lambda: swiglu(kept, self.config.is_compiled), second):
            output_SBD: torch.Tensor = second(product)[0]
        return output_SBD

    @property
    def _drops(self) -> bool:
        return self.config.drops_results and torch.is_grad_enabled()

    def _dropping(
        self, result: torch.Tensor, again: Callable[[], torch.Tensor], linear: nn.Module
    ) -> contextlib.AbstractContextManager[None]:
        """Within it a linear that takes a result keeps it, or under selective recomputation has it computed again."""
        return not_kept([result], lambda: [again()], linear) if self._drops else contextlib.nullcontext()


class RecomputedLayer(Layer):
    """A layer that keeps only its input and runs a second time in the backward pass."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **inputs: object) -> tuple[torch.Tensor, None]:
        """Same arguments and result as `Layer.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, *args, **inputs)  # type: ignore[arg-type]
        result: tuple[torch.Tensor, None] = recompute(super().forward, hidden_states, *args, **inputs)
        return result
