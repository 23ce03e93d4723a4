"""The Qwen3 backbone: Megatron-core's TransformerBlock through a ModuleSpec, with our core attention and norm.

Only two submodules of the layer are ours. `BlockCausalAttention` takes the mask of a pack and can keep keys and values
for block-by-block decoding; `RMSNorm` sums its weight gradient over tensor-parallel ranks where each rank sees only
its own heads. Everything else (fused query/key/value, SwiGLU, rotary application, residuals) is Megatron-core's.

Shape suffixes: S positions, B batch, N query heads, G key/value heads, K head size, D hidden size, of this rank.
"""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, copy_to_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn
from torch.nn import functional

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.attention import PackMask, attend
from bitdance_scale.parallel.topology import Topology


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, as Qwen3 computes it.

    With `is_per_head` the norm runs on the query or key heads of this tensor-parallel rank: its weight is replicated,
    but each rank sees only its own heads, so that the gradient must be summed over the ranks. Summing inside autograd
    keeps it right under every ZeRO stage, whose hooks take the gradient as soon as it is made.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, is_per_head: bool = False, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.is_per_head = is_per_head
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis of `hidden` [..., hidden_size]; same shape and dtype out."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.is_per_head else self.weight
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * wide.to(hidden.dtype)


class BlockCausalAttention(nn.Module):
    """Core attention under the mask of a pack, with an optional key/value memory for decoding."""

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
        self.remembers = False
        self._memory: tuple[torch.Tensor, torch.Tensor] | None = None

    def remember(self, is_on: bool) -> None:
        """Starts with an empty key/value memory (True), or drops it (False)."""
        self.remembers = is_on
        self._memory = None

    def forward(
        self,
        query_SBNK: torch.Tensor,
        key_SBGK: torch.Tensor,
        value_SBGK: torch.Tensor,
        attention_mask: torch.Tensor | PackMask,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """Attends; returns [S, B, N * K].

        attention_mask: a pack's mask, or in decoding bool, broadcastable to [B, 1, S, S_key], True where a key is seen.
        """
        if not isinstance(attention_mask, torch.Tensor):
            assert not self.remembers, "decoding masks are dense"
            return attention_mask.attend(query_SBNK, key_SBGK, value_SBGK).flatten(2)
        if self.remembers:
            if self._memory is not None:
                key_SBGK = torch.cat([self._memory[0], key_SBGK])
                value_SBGK = torch.cat([self._memory[1], value_SBGK])
            self._memory = (key_SBGK, value_SBGK)
        return attend(query_SBNK, key_SBGK, value_SBGK, attention_mask).flatten(2)


def transformer_config(config: RunConfig, topology: Topology) -> TransformerConfig:
    """Megatron's configuration, derived from the tree."""
    model, parallel = config.model, config.parallel
    dtype = getattr(torch, config.run.dtype)
    is_cuda = topology.device.type == "cuda"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=False,
        rotary_interleaved=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # A parameter is made on the device in force and filled by `parallel/initialise.py`, so that its values do not
        # depend on the layout.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        variable_seq_lengths=True,
        # There is no mixture of experts, but its default dispatcher refuses packs of unequal length.
        moe_token_dispatcher_type="alltoall",
        # gloo has no batched point-to-point calls.
        batch_p2p_comm=is_cuda,
        # Losses are sums over global counts: the schedule must not divide them by the number of micro-batches.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
    )


def layer_spec() -> ModuleSpec:
    """One Qwen3 layer out of Megatron-core's parts and our norm and core attention."""
    per_head_norm = ModuleSpec(module=RMSNorm, params={"is_per_head": True})
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=BlockCausalAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=per_head_norm,
        k_layernorm=per_head_norm,
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.arbitrary}, submodules=attention
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(
            module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        ),
        mlp_bda=get_bias_dropout_add,
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def make_backbone(megatron: TransformerConfig, num_layers: int, topology: Topology) -> TransformerBlock:
    """The layers of this pipeline stage, with the final norm on the last one."""
    block = TransformerBlockSubmodules(layer_specs=[layer_spec()] * num_layers, layer_norm=RMSNorm)
    return TransformerBlock(megatron, block, pre_process=topology.is_first_stage, post_process=topology.is_last_stage)


def remember_keys(backbone: TransformerBlock, is_on: bool) -> None:
    """Switches the key/value memory of every layer, for block-by-block decoding."""
    for layer in backbone.layers:
        layer.self_attention.core_attention.remember(is_on)
