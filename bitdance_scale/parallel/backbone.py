"""The backbone of all families: Megatron-core's TransformerBlock, with our core attention and norm.

Only two submodules of the layer are ours. `BlockCausalAttention` takes the mask of a pack, and in block-by-block
decoding a memory of keys and values. The weight gradient of `RMSNorm` is summed over tensor-parallel ranks where each
rank sees only its own heads or positions. Everything else (fused query/key/value, SwiGLU, rotary application,
residuals) is Megatron-core's. Recomputation is torch's checkpointing, around our core attention or around the whole
layer.

Shape suffixes: S positions, B batch, N query heads, G key/value heads, K head size, D hidden size, of this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
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
from torch.utils.checkpoint import checkpoint

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.attention import PackMask, attend, attend_grouped
from bitdance_scale.model.key_values import KeyValueMemory
from bitdance_scale.parallel.stage_split import stage_split
from bitdance_scale.parallel.tensor_linears import without_sequence_parallel
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.parallel.weight_gradients import provide_accumulation


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, as Qwen3 computes it.

    Its weight is replicated, but a tensor-parallel rank may see only a part of what the norm is applied to: its own
    query or key heads (`is_per_head`), and under sequence parallelism its own positions. The gradient must then be
    summed over the ranks. It is summed inside autograd because the hooks of ZeRO-2 and 3 take a gradient as soon as it
    exists, unless an optimiser takes the sum over (`parallel/partial_gradients.py`).

    Attributes:
        sums_in_backward: whether the gradient of the weight is summed over tensor-parallel ranks inside autograd.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, is_per_head: bool = False, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.sums_in_backward = config.tensor_model_parallel_size > 1 and (is_per_head or config.sequence_parallel)
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis of `hidden` [..., hidden_size]; same shape and dtype out."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.sums_in_backward else self.weight
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * wide.to(hidden.dtype)


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
        self.recomputes = False
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
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """Attends; returns [S, B, N * K].

        `attention_mask` is the mask of a pack. In decoding it is a tensor: with a memory as in `attend_grouped`, where
        T counts the keys that were read before; without as in `attend`.
        """
        if not isinstance(attention_mask, torch.Tensor):
            assert self._memory is None, "decoding masks are dense"
            if self.recomputes and torch.is_grad_enabled():
                mixed = recompute(attention_mask.attend, query_SBNK, key_SBGK, value_SBGK)
            else:
                mixed = attention_mask.attend(query_SBNK, key_SBGK, value_SBGK)
            return mixed.flatten(2)
        if self._memory is None:
            return attend(query_SBNK, key_SBGK, value_SBGK, attention_mask).flatten(2)
        query_BNSK, key_BGSK, value_BGSK = (
            rearrange(heads, "s b n k -> b n s k") for heads in (query_SBNK, key_SBGK, value_SBGK)
        )
        key_BGTK, value_BGTK = self._memory.update(self._memory_layer, key_BGSK, value_BGSK)
        return rearrange(attend_grouped(query_BNSK, key_BGTK, value_BGTK, attention_mask), "b n s k -> s b (n k)")


class RecomputedLayer(TransformerLayer):
    """A layer that keeps only its input and runs a second time in the backward pass."""

    def forward(self, hidden_states: torch.Tensor, **inputs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Same arguments and result as `TransformerLayer.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, **inputs)
        return recompute(super().forward, hidden_states, **inputs)


def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose activations are computed again in the backward pass instead of being kept.

    Nothing random runs inside a layer, so no generator state is saved. Megatron-core's own checkpointing would not do:
    it takes only tensors, which the mask of a pack is not, and needs CUDA's generators.
    """
    # Under ZeRO-3 the weights among the saved tensors are gathered in one pass and empty in the other; a check of their
    # shapes would refuse that.
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **kwargs
    )


def transformer_config(config: RunConfig, vocab_size: int, topology: Topology) -> TransformerConfig:
    """Megatron-core's configuration, derived from the run's."""
    model, parallel = config.model, config.parallel
    dtype = getattr(torch, config.run.dtype)
    is_cuda = topology.device.type == "cuda"
    adds_up_in_float32 = parallel.optimizer == "megatron"
    if adds_up_in_float32:
        provide_accumulation()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.parts.has_query_key_norms,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=False,
        rotary_interleaved=model.parts.rotary == "cells",
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=adds_up_in_float32,
        # Parameters are made on the default device and filled by `parallel/build.py`, so that their values do not
        # depend on the layout.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if parallel.virtual_stages > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(config, vocab_size),
        variable_seq_lengths=True,
        # The model has no mixture of experts, but the default dispatcher refuses packs of unequal length.
        moe_token_dispatcher_type="alltoall",
        # gloo has no batched point-to-point calls. The interleaved schedule sends beside the passes of other stages;
        # in a batch, two ranks that are each other's previous and next could not tell their messages apart.
        batch_p2p_comm=is_cuda and parallel.virtual_stages == 1,
        overlap_p2p_comm=parallel.virtual_stages > 1,
        # It would wait for the device after every message, for versions of PyTorch that are long gone.
        batch_p2p_sync=False,
        # Losses are sums divided by global counts: the schedule must not divide by the number of micro-batches.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
    )


def _pipeline_layout(config: RunConfig, vocab_size: int) -> list[list[str]] | None:
    """What every stage holds, in Megatron-core's terms; None without a pipeline."""
    if config.parallel.num_stages == 1:
        return None
    layout = [["decoder"] * num_layers for num_layers in stage_split(config, vocab_size)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def layer_spec(recomputes_layer: bool, has_query_key_norms: bool) -> ModuleSpec:
    """One layer made of Megatron-core's parts, our norm and our core attention."""
    per_head_norm = ModuleSpec(module=RMSNorm, params={"is_per_head": True}) if has_query_key_norms else None
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
    return ModuleSpec(module=RecomputedLayer if recomputes_layer else TransformerLayer, submodules=submodules)


def make_backbone(
    megatron: TransformerConfig, num_layers: int, virtual_stage: int, is_first: bool, is_last: bool, recomputes: str
) -> TransformerBlock:
    """The layers of one stage, with the final norm on the last one.

    Args:
        megatron: from `transformer_config`.
        num_layers: layers of the stage.
        virtual_stage: which of this rank's stages it is.
        is_first: whether it is the first stage of the model.
        is_last: whether it is the last stage of the model.
        recomputes: `parallel.recompute`.
    """
    specs = [layer_spec(recomputes == "full", megatron.qk_layernorm)] * num_layers
    backbone = TransformerBlock(
        megatron,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
        pre_process=is_first,
        post_process=is_last,
        vp_stage=virtual_stage,
    )
    # Under sequence parallelism the block would fork CUDA's random states around its layers, for dropouts that they do
    # not have.
    backbone.config = without_sequence_parallel(megatron)
    for layer in backbone.layers:
        layer.self_attention.core_attention.recomputes = recomputes == "selective"
    return backbone


@contextlib.contextmanager
def whole_sequences(module: nn.Module) -> Iterator[None]:
    """Switches sequence parallelism off within the context; gradients must be off.

    Decoding computes a few positions at a time, whose number the ranks need not divide.
    """
    assert not torch.is_grad_enabled(), "the split linears would not sum the gradient of their input"
    # Any, because the attribute is Megatron-core's.
    split: list[Any] = [part for part in module.modules() if getattr(part, "sequence_parallel", False)]
    for part in split:
        part.sequence_parallel = False
    try:
        yield
    finally:
        for part in split:
            part.sequence_parallel = True


def use_memory(backbones: Sequence[TransformerBlock], memory: KeyValueMemory | None) -> None:
    """Gives the layers of a rank, one after the other, a memory of their keys and values; None takes it away."""
    layers = [layer for backbone in backbones for layer in backbone.layers]
    for number, layer in enumerate(layers):
        layer.self_attention.core_attention.use_memory(memory, number)
