"""Settings of low-rank adaptation: frozen weights, and small matrices beside them that are trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from bitdance_scale.config.setting import setting

BACKBONE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD_TARGETS = ("wqkv", "wo", "w1", "w2")

UNQUANTISED_BITS = 16
"""The value of `lora.base_bits` that means the dtype of the run."""
BLOCK_SIZE = 64
"""Quantised weights of a row with one scale, as in QLoRA (arXiv 2305.14314)."""


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Low-rank adaptation (LoRA, arXiv 2106.09685): a frozen weight W acts as W + scale * B A.

    `run.start_from` names the frozen weights. A checkpoint of such a run has what is trained alone.
    """

    rank: int = setting(0, doc="Rows of A and columns of B; 0: all weights are trained, and there are no adapters.")
    alpha: float = setting(16.0, doc="The scale is alpha / rank, or alpha / sqrt(rank) if `rank_stabilized`.")
    rank_stabilized: bool = setting(
        False, doc="Whether the scale falls with the square root of the rank (rsLoRA, arXiv 2312.03732)."
    )
    dropout: float = setting(0.0, doc="Share of the inputs of A that are zero in a training step.")
    targets: tuple[str, ...] = setting(
        BACKBONE_TARGETS + HEAD_TARGETS,
        doc="Linears with an adapter, by their published names, such as `q_proj`, `layers.[0-9].mlp.*` or "
        "`head.*.w1`: a pattern is the whole name, or its end after a dot.",
    )
    base_bits: int = setting(
        UNQUANTISED_BITS,
        doc="Bits of the frozen linears of backbone and head: 16 for `run.dtype`, 8 for integers, or 4 for NF4 (QLoRA, "
        "arXiv 2305.14314). Fewer take less memory, change the network that the adapters learn beside, and are made "
        "into weights again for every product.",
    )
    train_projector: bool = setting(False, doc="Whether the projector of the bits is trained too, all of it.")
    train_queries: bool = setting(
        False, doc="Whether the embeddings of the query tokens are trained too, new ones among them."
    )
    start_from: str = setting(
        "",
        doc="Adapters that a new run goes on from: a run with the same rank and targets, a checkpoint of it, or a "
        "folder of adapters, exported or written by PEFT. Empty: adapters that change nothing.",
    )

    @property
    def is_used(self) -> bool:
        """Whether the weights of the network are frozen."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True, kw_only=True)
class LoraOnly:
    """What a configuration says of adapters, apart from the rest."""

    lora: LoraSection = field(default_factory=LoraSection)
