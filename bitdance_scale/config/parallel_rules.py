"""Rules between the layout of the ranks and what they divide."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bitdance_scale.config.rule import RuleSet, divisors, nearest_multiples
from bitdance_scale.config.schema import RunConfig

RULES = RuleSet()


@RULES.rule("parallel.tensor", "parallel.pipeline")
def _replicas_fill_the_ranks(config: RunConfig, world_size: int) -> Iterator[str]:
    """`parallel.tensor` x `parallel.pipeline` divides the number of ranks.

    The ranks of a replica are tensor x pipeline, and data parallelism takes whole replicas.
    """
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline
    if world_size % replica:
        yield (
            f"parallel.tensor = {parallel.tensor}, parallel.pipeline = {parallel.pipeline}: their product {replica} "
            f"must divide the {world_size} ranks; start {nearest_multiples(world_size, replica)} ranks, or choose a product "
            f"among {divisors(world_size)}"
        )


@RULES.rule("parallel.pipeline", "model.num_layers")
def _every_stage_has_a_layer(config: RunConfig, world_size: int) -> Iterator[str]:
    """`parallel.pipeline` is at most `model.num_layers`.

    Every pipeline stage holds at least one backbone layer.
    """
    pipeline, num_layers = config.parallel.pipeline, config.model.num_layers
    if pipeline > num_layers:
        yield (
            f"parallel.pipeline = {pipeline}: must be at most model.num_layers = {num_layers}, one layer per stage; "
            f"use parallel.pipeline = {num_layers} or less"
        )


@RULES.rule("parallel.pipeline", "parallel.zero_stage")
def _pipeline_keeps_gradients_whole(config: RunConfig, world_size: int) -> Iterator[str]:
    """`parallel.zero_stage` is 1 when `parallel.pipeline` is above 1.

    ZeRO 2 and 3 partition gradients at every micro-batch, while a pipeline schedule accumulates them over a step.
    """
    parallel = config.parallel
    if parallel.zero_stage > 1 and parallel.pipeline > 1:
        yield (
            f"parallel.zero_stage = {parallel.zero_stage}: must be 1 with parallel.pipeline = {parallel.pipeline}, "
            f"because ZeRO-{parallel.zero_stage} partitions gradients at every micro-batch; "
            "set parallel.zero_stage = 1 or parallel.pipeline = 1"
        )


@RULES.rule("parallel.pipeline", "model.tie_embeddings")
def _tied_embeddings_stay_on_one_stage(config: RunConfig, world_size: int) -> Iterator[str]:
    """`model.tie_embeddings` is false when `parallel.pipeline` is above 1.

    The token embedding is on the first stage and the output projection on the last; one weight cannot be on both.
    """
    if config.model.tie_embeddings and config.parallel.pipeline > 1:
        yield (
            f"model.tie_embeddings = true: must be false with parallel.pipeline = {config.parallel.pipeline}, because "
            "the embedding and the output projection are on different stages; set parallel.pipeline = 1 (and raise "
            "parallel.tensor or parallel.zero_stage for memory) or model.tie_embeddings = false"
        )


@RULES.rule("parallel.tensor", "model", "head.width", "head.head_dim", "head.mlp_ratio")
def _tensor_ranks_divide_sizes(config: RunConfig, world_size: int) -> Iterator[str]:
    """`parallel.tensor` divides the heads and feed-forward widths of the backbone and of the diffusion head.

    Each tensor-parallel rank holds whole attention heads and equal slices of every split linear.
    """
    model, head, tensor = config.model, config.head, config.parallel.tensor
    sizes = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.ffn_size": model.ffn_size,
        "model.hidden_size": model.hidden_size,
        "head.width x head.mlp_ratio": int(head.width * head.mlp_ratio),
    }
    if head.width % head.head_dim == 0:
        sizes["head.width / head.head_dim"] = head.width // head.head_dim
    undivided = [f"{name} = {size}" for name, size in sizes.items() if size % tensor]
    if undivided:
        yield (
            f"parallel.tensor = {tensor}: must divide {', '.join(undivided)}; "
            f"use one of {divisors(math.gcd(*sizes.values()))}"
        )


@RULES.rule("data.global_batch", "parallel.tensor", "parallel.pipeline")
def _every_replica_has_an_image(config: RunConfig, world_size: int) -> Iterator[str]:
    """`data.global_batch` is at least the number of replicas.

    Every data-parallel rank takes part in every step with at least one image.
    """
    num_replicas = world_size // (config.parallel.tensor * config.parallel.pipeline)
    if config.data.global_batch < num_replicas:
        yield (
            f"data.global_batch = {config.data.global_batch}: must be at least the {num_replicas} replicas (ranks / "
            f"tensor / pipeline); use data.global_batch >= {num_replicas} or fewer ranks"
        )
