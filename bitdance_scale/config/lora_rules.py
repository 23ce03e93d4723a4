"""Rules of low-rank adaptation."""

from __future__ import annotations

from collections.abc import Iterator

from bitdance_scale.config.lora_schema import BLOCK_SIZE, UNQUANTISED_BITS, LoraSection
from bitdance_scale.config.rule import RuleSet
from bitdance_scale.config.schema import RunConfig

RULES = RuleSet()


@RULES.rule("lora.rank", "run.start_from")
def _something_to_adapt(config: RunConfig) -> Iterator[str]:
    """`lora.rank` greater than 0 goes with `run.start_from`.

    The frozen weights stay as they begin, and random ones draw nothing.
    """
    if config.lora.is_used and not config.run.start_from:
        yield (
            f"lora.rank = {config.lora.rank}: run.start_from = '', so the frozen weights would be random; name an "
            "imported release or a run (run.start_from=runs/NAME), or set lora.rank=0 to train all weights"
        )


@RULES.rule("lora")
def _only_with_a_rank(config: RunConfig) -> Iterator[str]:
    """The other settings of `lora` go with `lora.rank` greater than 0.

    Without adapters all weights are trained, those that the settings name among them.
    """
    lora, default = config.lora, LoraSection()
    for name in ("dropout", "base_bits", "train_projector", "train_queries", "start_from"):
        value = getattr(lora, name)
        if not lora.is_used and value != getattr(default, name):
            yield f"lora.{name} = {value!r}: lora.rank = 0, so there are no adapters; set lora.rank, such as 16"


@RULES.rule("lora.base_bits", "parallel.zero_stage")
def _quantised_weights_are_whole(config: RunConfig) -> Iterator[str]:
    """`lora.base_bits` less than 16 goes with `parallel.zero_stage` 1 or 2.

    ZeRO-3 divides parameters among replicas, and quantised weights are none.
    """
    if config.lora.base_bits < UNQUANTISED_BITS and config.parallel.zero_stage == 3:
        yield (
            f"lora.base_bits = {config.lora.base_bits}: parallel.zero_stage = 3 divides the frozen weights in "
            "run.dtype; set parallel.zero_stage=1, where each rank has all of them in few bits, or lora.base_bits=16"
        )


@RULES.rule("lora.base_bits", "parallel.tensor", "model", "head")
def _ranks_divide_whole_blocks(config: RunConfig) -> Iterator[str]:
    """`lora.base_bits` less than 16 goes with tensor-parallel ranks that have whole blocks of 64 inputs.

    The weights in a block share a scale. The quantised network then does not depend on the layout.
    """
    model, head, tensor = config.model, config.head, config.parallel.tensor
    if config.lora.base_bits == UNQUANTISED_BITS or tensor == 1:
        return
    inputs = {
        "model.num_heads * model.head_dim": model.num_heads * model.head_dim,
        "model.ffn_size": model.ffn_size,
        "head.width": head.width,
        "head.width * head.mlp_ratio": head.mlp_size,
    }
    for name, size in inputs.items():
        if size % BLOCK_SIZE == 0 and size // tensor % BLOCK_SIZE:
            yield (
                f"lora.base_bits = {config.lora.base_bits}: parallel.tensor = {tensor} divides {name} = {size} into "
                f"parts that are no multiple of {BLOCK_SIZE}; lower parallel.tensor, or set lora.base_bits=16"
            )


@RULES.rule("lora.train_queries", "vision.block_side")
def _there_are_queries(config: RunConfig) -> Iterator[str]:
    """`lora.train_queries` goes with blocks of several tokens.

    Blocks of one token have no query tokens.
    """
    if config.lora.train_queries and config.vision.block_side == 1:
        yield "lora.train_queries = true: vision.block_side = 1 has no query tokens; set lora.train_queries=false"


@RULES.rule("lora.rank", "run.stage")
def _new_queries_are_trained(config: RunConfig) -> Iterator[str]:
    """Distillation with adapters trains the query tokens (`lora.train_queries`).

    It adds query tokens whose embeddings no one has trained.
    """
    if config.lora.is_used and config.run.stage == "distill" and not config.lora.train_queries:
        yield "lora.train_queries = false: stage distill adds query tokens; set lora.train_queries=true"
