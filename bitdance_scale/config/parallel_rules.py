"""Rules between the layout of the ranks and the sizes that they divide."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bitdance_scale.config.rule import RuleSet, divisors, nearest_multiples
from bitdance_scale.config.schema import ObserveSection, RunConfig

RULES = RuleSet()


@RULES.rank_rule("parallel.tensor", "parallel.pipeline")
def _replicas_fill_the_ranks(config: RunConfig, world_size: int) -> Iterator[str]:
    """`parallel.tensor` x `parallel.pipeline` divides the number of ranks.

    The ranks of a replica are tensor x pipeline, and data parallelism takes whole replicas.
    """
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline
    if world_size % replica:
        yield (
            f"parallel.tensor = {parallel.tensor}, parallel.pipeline = {parallel.pipeline}: their product {replica} "
            f"must divide the {world_size} ranks; start {nearest_multiples(world_size, replica)} ranks, or choose a "
            f"product among {divisors(world_size)}"
        )


@RULES.rank_rule("observe.profile_ranks", "observe.profile_steps")
def _profiled_ranks_exist(config: RunConfig, world_size: int) -> Iterator[str]:
    """With `observe.profile_steps`, every one of `observe.profile_ranks` is below the number of ranks.

    Ranks count from 0; another one would write no trace, and nobody would hear of it.
    """
    yield from profile_faults(config.observe, world_size)


@RULES.rule("parallel.pipeline", "parallel.virtual_stages", "model.num_layers")
def _every_stage_has_a_layer(config: RunConfig) -> Iterator[str]:
    """`parallel.pipeline` x `parallel.virtual_stages` is at most `model.num_layers`.

    Every pipeline stage holds at least one backbone layer.
    """
    parallel, num_layers = config.parallel, config.model.num_layers
    if parallel.num_stages > num_layers:
        yield (
            f"parallel.pipeline = {parallel.pipeline}, parallel.virtual_stages = {parallel.virtual_stages}: their "
            f"product {parallel.num_stages} must be at most model.num_layers = {num_layers}, one layer per stage; "
            f"use parallel.pipeline = {max(1, num_layers // parallel.virtual_stages)} or less"
        )


@RULES.rule("parallel.pipeline_split", "parallel.pipeline", "parallel.virtual_stages", "model.num_layers")
def _split_has_all_layers(config: RunConfig) -> Iterator[str]:
    """A list in `parallel.pipeline_split` has one entry per stage, and they add up to `model.num_layers`.

    The list says how many backbone layers each of the pipeline x virtual_stages stages holds, in the order in which a
    micro-batch passes through them.
    """
    parallel, num_layers = config.parallel, config.model.num_layers
    split = parallel.pipeline_split
    if isinstance(split, str):
        return
    if len(split) != parallel.num_stages:
        yield (
            f"parallel.pipeline_split = {list(split)}: has {len(split)} entries and must have {parallel.num_stages}, "
            f"one per stage (parallel.pipeline = {parallel.pipeline} x parallel.virtual_stages = "
            f'{parallel.virtual_stages}); correct the list or use "auto"'
        )
    if sum(split) != num_layers:
        yield (
            f"parallel.pipeline_split = {list(split)}: adds up to {sum(split)} and must add up to model.num_layers = "
            f'{num_layers}; correct the list or use "auto"'
        )


@RULES.rule("parallel.virtual_stages", "parallel.pipeline")
def _interleaving_needs_a_pipeline(config: RunConfig) -> Iterator[str]:
    """`parallel.virtual_stages` is 1 when `parallel.pipeline` is 1.

    Several stages on a rank shorten the time in which a pipeline fills and drains.
    """
    parallel = config.parallel
    if parallel.virtual_stages > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_stages = {parallel.virtual_stages}: must be 1 with parallel.pipeline = 1; "
            "set parallel.virtual_stages = 1 or parallel.pipeline = 2 or more"
        )


@RULES.rank_rule("parallel.virtual_stages", "parallel.pipeline", "parallel.tensor", "data.global_batch")
def _interleaving_needs_micro_batches(config: RunConfig, world_size: int) -> Iterator[str]:
    """With `parallel.virtual_stages` above 1, `data.global_batch` holds `parallel.pipeline` images per replica.

    Megatron's interleaved schedule runs micro-batches in groups of `parallel.pipeline`; the loader makes a whole number
    of groups of packs, each with at least one image.
    """
    parallel, global_batch = config.parallel, config.data.global_batch
    num_replicas = world_size // (parallel.tensor * parallel.pipeline)
    needed = num_replicas * parallel.pipeline
    if parallel.virtual_stages > 1 and global_batch < needed:
        yield (
            f"data.global_batch = {global_batch}: must be at least {needed} = {num_replicas} replicas x "
            f"parallel.pipeline = {parallel.pipeline} with parallel.virtual_stages = {parallel.virtual_stages}; use "
            f"data.global_batch >= {needed} or parallel.virtual_stages = 1"
        )


@RULES.rule("parallel.sequence_parallel", "parallel.tensor")
def _sequence_parallel_needs_tensor_ranks(config: RunConfig) -> Iterator[str]:
    """`parallel.sequence_parallel` is false when `parallel.tensor` is 1.

    It divides positions among the tensor-parallel ranks; with one rank it saves nothing.
    """
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield (
            "parallel.sequence_parallel = true: must be false with parallel.tensor = 1, where there is no other rank "
            "to divide positions with; set parallel.sequence_parallel = false or parallel.tensor = 2 or more"
        )


@RULES.rule("parallel.sequence_parallel", "parallel.tensor", "data.pack_multiple")
def _tensor_ranks_divide_packs(config: RunConfig) -> Iterator[str]:
    """With `parallel.sequence_parallel`, `parallel.tensor` divides `data.pack_multiple`.

    Every tensor-parallel rank takes an equal share of the positions of a pack.
    """
    parallel, multiple = config.parallel, config.data.pack_multiple
    if parallel.sequence_parallel and multiple % parallel.tensor:
        yield (
            f"data.pack_multiple = {multiple}: must be a multiple of parallel.tensor = {parallel.tensor} with "
            f"parallel.sequence_parallel; use data.pack_multiple = {nearest_multiples(multiple, parallel.tensor)}"
        )


@RULES.rule("parallel.pipeline", "parallel.zero_stage")
def _pipeline_keeps_gradients_whole(config: RunConfig) -> Iterator[str]:
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


@RULES.rule("parallel.optimizer", "parallel.zero_stage")
def _stages_are_of_deepspeed(config: RunConfig) -> Iterator[str]:
    """`parallel.zero_stage` is 1 with `parallel.optimizer = "megatron"`.

    Megatron-core's distributed optimiser divides what ZeRO-1 divides; it keeps gradients and weights whole.
    """
    parallel = config.parallel
    if parallel.optimizer == "megatron" and parallel.zero_stage > 1:
        yield (
            f"parallel.zero_stage = {parallel.zero_stage}: must be 1 with parallel.optimizer = 'megatron', which "
            "divides masters and moments alone; set parallel.zero_stage = 1 or parallel.optimizer = deepspeed"
        )


@RULES.rule("parallel.optimizer", "parallel.reduce_dtype")
def _buffers_are_reduced_as_they_are(config: RunConfig) -> Iterator[str]:
    """`parallel.reduce_dtype` is float32 with `parallel.optimizer = "megatron"`.

    Megatron-core sends its float32 buffers from where gradients add up.
    """
    parallel = config.parallel
    if parallel.optimizer == "megatron" and parallel.reduce_dtype != "float32":
        yield (
            f"parallel.reduce_dtype = {parallel.reduce_dtype}: must be float32 with parallel.optimizer = 'megatron'; "
            "set parallel.reduce_dtype = float32 or parallel.optimizer = deepspeed"
        )


@RULES.rule("parallel.reduce_dtype", "run.dtype")
def _float32_gradients_stay_float32(config: RunConfig) -> Iterator[str]:
    """`parallel.reduce_dtype` is float32 when `run.dtype` is float32.

    Gradients of float32 are not rounded to be sent.
    """
    dtype, reduce_dtype = config.run.dtype, config.parallel.reduce_dtype
    if dtype == "float32" and reduce_dtype != "float32":
        yield (
            f'parallel.reduce_dtype = "{reduce_dtype}": must be "float32" with run.dtype = "{dtype}"; '
            'set parallel.reduce_dtype = "float32" or run.dtype = "bfloat16"'
        )


@RULES.rule("parallel.tensor", "model", "head.width", "head.head_dim", "head.mlp_ratio")
def _tensor_ranks_divide_sizes(config: RunConfig) -> Iterator[str]:
    """`parallel.tensor` divides the heads and feed-forward widths of the backbone and of the diffusion head.

    Each tensor-parallel rank holds whole attention heads and equal slices of every split linear.
    """
    model, head, tensor = config.model, config.head, config.parallel.tensor
    sizes = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.ffn_size": model.ffn_size,
        "model.hidden_size": model.hidden_size,
        "head.width x head.mlp_ratio": head.mlp_size,
    }
    if head.width % head.head_dim == 0:
        sizes["head.width / head.head_dim"] = head.width // head.head_dim
    undivided = [f"{name} = {size}" for name, size in sizes.items() if size % tensor]
    if undivided:
        yield (
            f"parallel.tensor = {tensor}: must divide {', '.join(undivided)}; "
            f"use one of {divisors(math.gcd(*sizes.values()))}"
        )


@RULES.rank_rule("data.global_batch", "parallel.tensor", "parallel.pipeline")
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


@RULES.rank_rule(
    "evaluate.images", "evaluate.shards", "parallel.tensor", "parallel.pipeline", "parallel.virtual_stages"
)
def _every_replica_has_a_held_out_image(config: RunConfig, world_size: int) -> Iterator[str]:
    """With `evaluate.shards`, `evaluate.images` is at least the number of replicas, with virtual stages x pipeline.

    Every data-parallel rank takes part in every evaluation with at least one image, and the interleaved schedule runs
    micro-batches in groups of `parallel.pipeline`.
    """
    if config.evaluate.shards:
        yield from held_out_faults(config, world_size)


def profile_faults(section: ObserveSection, world_size: int) -> Iterator[str]:
    """Ranks that are to write traces and are none of so many, in any kind of training."""
    unknown = [rank for rank in section.profile_ranks if rank >= world_size]
    if unknown and section.profile_steps:
        yield (
            f"observe.profile_ranks = {list(section.profile_ranks)}: {unknown[0]} is no rank of {world_size}; "
            f"use 0 to {world_size - 1}"
        )


def held_out_faults(config: RunConfig, world_size: int) -> Iterator[str]:
    """What is wrong with the number of held-out images for so many ranks, whatever is computed of them."""
    parallel, images = config.parallel, config.evaluate.images
    num_replicas = world_size // (parallel.tensor * parallel.pipeline)
    needed = num_replicas * parallel.packs_multiple
    if images < needed:
        groups = f" x parallel.pipeline = {parallel.pipeline}" if parallel.packs_multiple > 1 else ""
        yield (
            f"evaluate.images = {images}: must be at least {needed} for {num_replicas} replicas (ranks / tensor / "
            f"pipeline){groups}; use evaluate.images >= {needed} or fewer ranks"
        )
