"""Settings of the layout: who holds what, and what is computed again."""

from __future__ import annotations

from dataclasses import dataclass

from bitdance_scale.config.setting import setting


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """How a replica of the model is laid out; data parallelism takes the remaining ranks."""

    tensor: int = setting(1, doc="Tensor-parallel ranks (Megatron).")
    sequence_parallel: bool = setting(
        False, doc="Whether the tensor-parallel ranks divide the positions between the split linears of a layer."
    )
    pipeline: int = setting(1, doc="Pipeline-parallel ranks (Megatron's 1F1B schedule).")
    virtual_stages: int = setting(1, doc="Stages per pipeline rank; more than 1 is Megatron's interleaved schedule.")
    pipeline_split: str | tuple[int, ...] = setting(
        "auto", doc="Backbone layers per stage: auto (slowest stage as fast as can be, by FLOPs), even, or a list."
    )
    optimizer: str = setting(
        "deepspeed", doc="What divides the optimiser: deepspeed (ZeRO) or megatron (Megatron-core's)."
    )
    zero_stage: int = setting(1, doc="DeepSpeed ZeRO stage over the data-parallel ranks: 1, 2 or 3.")
    reduce_dtype: str = setting(
        "float32", doc="In which dtype replicas send and sum gradients: float32, or bfloat16 (half the traffic)."
    )
    reduce_bucket_elements: int = setting(100_000_000, doc="ZeRO 2, 3: elements of gradients that are sent together.")
    prefetch_elements: int = setting(50_000_000, doc="ZeRO 3: elements of weights gathered ahead, beside other layers.")
    live_elements: int = setting(1_000_000_000, doc="ZeRO 3: elements of gathered weights that may be kept for later.")
    persistent_elements: int = setting(100_000, doc="ZeRO 3: weights of fewer elements (norms, biases) stay whole.")
    recompute: str = setting(
        "none",
        doc="What the backward pass computes again instead of keeping: none, selective (norms, rotation and SwiGLU; "
        "dense attention too) or full (layers).",
    )
    compile: bool = setting(
        False,
        doc="Whether elementwise parts are compiled into a kernel each; needs a C++ compiler, on CUDA Triton too.",
    )

    @property
    def num_stages(self) -> int:
        """Stages that a micro-batch passes through, over all pipeline ranks."""
        return self.pipeline * self.virtual_stages

    @property
    def packs_multiple(self) -> int:
        """A step has a multiple of this many packs per replica: the interleaved schedule runs groups of `pipeline`."""
        return self.pipeline if self.virtual_stages > 1 else 1
