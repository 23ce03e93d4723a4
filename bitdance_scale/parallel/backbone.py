"""The backbone of all families: Megatron-core's TransformerBlock, over our own layer.

Megatron-core makes the linears and names them. `parallel/layer.py` has the forward pass of a layer and its core
attention. The weight gradient of `RMSNorm` is summed over tensor-parallel ranks where each rank sees only its own heads
or positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, copy_to_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn
from torch.nn import functional

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.fused_autograd import rms_norm, stream_rms_norm
from bitdance_scale.model.key_values import KeyValueMemory
from bitdance_scale.parallel.layer import BlockCausalAttention, Layer, LayerConfig, RecomputedLayer
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
        self, config: LayerConfig, hidden_size: int, eps: float = 1e-6, is_per_head: bool = False, **_: object
    ) -> None:
        super().__init__()
        self.eps, self.is_compiled = eps, config.is_compiled
        self.sums_in_backward = config.tensor_model_parallel_size > 1 and (is_per_head or config.sequence_parallel)
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis of `hidden` [..., hidden_size]; same shape and dtype out."""
        return rms_norm(hidden, self.summed_weight(), self.eps, self.is_compiled)

    @property
    def partial_parameters(self) -> list[nn.Parameter]:
        """Parameters of whose gradients a rank computes a part, where it does."""
        return [self.weight]

    def summed_weight(self) -> torch.Tensor:
        """The weight, whose gradient is summed over the ranks where that is done for every micro-batch."""
        return copy_to_tensor_model_parallel_region(self.weight) if self.sums_in_backward else self.weight


class StreamNorm(RMSNorm):
    """The norm at the start of a half of a layer, with the addition that ends the half before it."""

    def forward(  # type: ignore[override]
        self, stream: torch.Tensor, added: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]]:
        """Adds to the residual stream and normalises it.

        Args:
            stream: [.., hidden_size].
            added: of the same shape; None: nothing is added.

        Returns:
            (the stream after the addition, its norm, what computes the norm again without gradients).
        """
        weight = self.summed_weight()
        total, normed = stream_rms_norm(stream, added, weight, self.eps, self.is_compiled)
        # Detached, because ZeRO-3 takes the parameter away after this call.
        kept, kept_weight = total.detach(), weight.detach()
        return total, normed, lambda: rms_norm(kept, kept_weight, self.eps, self.is_compiled)


class HeadNorm(RMSNorm):
    """The norm of every query or key head, which is computed together with the rotation (`parallel/layer.py`)."""

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """Its weight [K], for use after this call: under ZeRO-3 the parameter itself is then gone."""
        weight = self.summed_weight()
        return weight.view_as(weight)


def transformer_config(config: RunConfig, vocab_size: int, topology: Topology) -> LayerConfig:
    """Megatron-core's configuration, derived from the run's."""
    model, parallel = config.model, config.parallel
    dtype = getattr(torch, config.run.dtype)
    is_cuda = topology.device.type == "cuda"
    adds_up_in_float32 = parallel.optimizer == "megatron"
    if adds_up_in_float32:
        provide_accumulation()
    return LayerConfig(
        is_compiled=parallel.compile,
        drops_results=parallel.recompute == "selective",
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
    """One layer: Megatron-core's linears in the containers that give them their names, our norms and core attention."""
    per_head_norm = ModuleSpec(module=HeadNorm, params={"is_per_head": True}) if has_query_key_norms else None
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=BlockCausalAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=per_head_norm,
        k_layernorm=per_head_norm,
    )
    submodules = TransformerLayerSubmodules(
        input_layernorm=StreamNorm,
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.arbitrary}, submodules=attention
        ),
        pre_mlp_layernorm=StreamNorm,
        mlp=ModuleSpec(
            module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        ),
    )
    return ModuleSpec(module=RecomputedLayer if recomputes_layer else Layer, submodules=submodules)


def make_backbone(
    megatron: LayerConfig, num_layers: int, virtual_stage: int, is_first: bool, is_last: bool, recomputes: str
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
