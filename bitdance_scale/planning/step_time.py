"""The time of a step under a layout: the terms of the roofline added up over the slowest rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.observe.adapter_cost import adapter_weights, linear_rows
from bitdance_scale.observe.cost import PackCounts, StepFlops, encode_flops, step_flops
from bitdance_scale.planning.adapters import Linear, num_backward_layers, rank_linears, rank_parameters
from bitdance_scale.planning.machine import Machine
from bitdance_scale.planning.moved_bytes import (
    BothPasses,
    accumulated_bytes,
    adapter_bytes,
    head_block_bytes,
    head_rest_bytes,
    layer_bytes,
    logits_bytes,
    micro_kernels,
    num_made,
    optimiser_bytes,
    remade_bytes,
)
from bitdance_scale.planning.parameters import RankStages
from bitdance_scale.planning.roofline import bubble_s, moved_s, products_s
from bitdance_scale.planning.traffic import data_micro_s, data_step_s, exposed_s, pipeline_micro_s, tensor_micro_s
from bitdance_scale.planning.workload import Workload

# Products of a backward pass over those of the forward pass. A flash kernel's computes the scores again.
PRODUCTS_BACKWARD, ATTENTION_BACKWARD = 2.0, 2.5


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step on the slowest rank, by what they are spent on; they add up to the step.

    Attributes:
        gemm: products with weights.
        attention: of the backbone, over pairs that see each other.
        elementwise: norms, rotations, SwiGLU, residuals, modulations, cross-entropy.
        accumulation: gradients of every micro-batch added to those of the step.
        launch: gaps between kernels, or what the host needs longer to queue them than the device to run them.
        tensor_traffic: exposed messages between tensor-parallel ranks.
        pipeline_traffic: messages between stages.
        bubble: waiting while the pipeline fills and drains.
        data_traffic: gradients and weights between replicas.
        optimiser: conversion, norm and AdamW.
        encoder: the rank's part of the images.
    """

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    accumulation: float = 0.0
    launch: float = 0.0
    tensor_traffic: float = 0.0
    pipeline_traffic: float = 0.0
    bubble: float = 0.0
    data_traffic: float = 0.0
    optimiser: float = 0.0
    encoder: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: StepTime) -> StepTime:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return StepTime(*(mine + theirs for mine, theirs in pairs))

    def times(self, factor: float) -> StepTime:
        """All parts multiplied."""
        return StepTime(*(part * factor for part in dataclasses.astuple(self)))


@dataclass(frozen=True)
class MicroBatch:
    """The mean pack of a step.

    Attributes:
        num_positions: padding included.
        num_vision: vision tokens at the input.
        num_predicted: vision tokens that the head predicts.
        num_blocks: blocks that the head predicts.
        num_text_targets: text tokens predicted.
        flops: forward FLOPs of the whole model, padding left out.
        padding: positions over those of samples; products with weights of the backbone cost as much more.
    """

    num_positions: float
    num_vision: float
    num_predicted: float
    num_blocks: float
    num_text_targets: float
    flops: StepFlops
    padding: float


def mean_micro_batch(config: RunConfig, vocab_size: int, workload: Workload, num_replicas: int) -> MicroBatch:
    """The mean over all packs of all replicas."""
    num_packs, counts = workload.num_micro_batches * num_replicas, workload.counts
    flops = step_flops(config, vocab_size, counts)
    parts = {field.name: getattr(flops, field.name) / num_packs for field in dataclasses.fields(StepFlops)}
    return MicroBatch(
        num_positions=workload.num_positions / num_packs,
        num_vision=counts.num_vision / num_packs,
        num_predicted=counts.num_predicted / num_packs,
        num_blocks=counts.num_blocks / num_packs,
        num_text_targets=counts.num_text_targets / num_packs,
        flops=StepFlops(**{name: round(value) for name, value in parts.items()}),
        padding=workload.num_positions / counts.num_positions,
    )


def micro_time(
    config: RunConfig, vocab_size: int, micro: MicroBatch, stages: RankStages, machine: Machine, data_size: int
) -> StepTime:
    """Seconds of one micro-batch, forward and backward, on one pipeline rank."""
    tensor = config.parallel.tensor
    peak = machine.peak_flops(config.run.dtype)
    flops = product_flops(config, vocab_size, micro, stages)
    attention = attention_flops(config, vocab_size, micro, stages)
    parameters = rank_parameters(config, vocab_size, stages)
    busy = StepTime(
        gemm=products_s(flops / tensor, machine.product_rate(config.run.dtype, tensor)),
        attention=products_s(attention / tensor, peak * machine.attention_fraction.value),
        elementwise=moved_s(elementwise_bytes(config, vocab_size, micro, stages), machine.memory_rate),
        accumulation=moved_s(accumulated_bytes(config, parameters.trained), machine.memory_rate),
        tensor_traffic=tensor_micro_s(config, micro, stages, machine),
    )
    between_replicas = data_micro_s(config, parameters, data_size, stages, machine)
    busy = dataclasses.replace(busy, data_traffic=exposed_s(config, between_replicas, busy.total, machine))
    kernels = micro_kernels(config, vocab_size, stages)
    gaps = kernels * machine.kernel_gap_s.value
    waits = kernels * machine.kernel_launch_s.value - busy.total
    return dataclasses.replace(
        busy, launch=max(gaps, waits), pipeline_traffic=pipeline_micro_s(config, micro, stages, machine, data_size)
    )


def product_flops(config: RunConfig, vocab_size: int, micro: MicroBatch, stages: RankStages) -> float:
    """FLOPs of the products with weights of one micro-batch on a pipeline rank, all tensor-parallel ranks together.

    A frozen weight has the product of the gradient of its input alone; before the first trained weight not even that.
    """
    lora, repeated = config.lora, int(config.parallel.recompute == "full")
    of_weights = 0.0 if lora.is_used else 1.0
    share, back = layer_shares(config, vocab_size, stages)
    layers = micro.padding * micro.flops.backbone
    flops = share * layers + back * layers * (1 + of_weights + repeated)
    if stages.is_first:
        flops += micro.flops.projector * (1 + PRODUCTS_BACKWARD * (not lora.is_used or lora.train_projector))
    if stages.is_last:
        flops += micro.flops.head * (1 + 1 + of_weights + repeated)
        flops += micro.flops.text * (1 + of_weights + (back > 0))
    if lora.is_used:
        for linear, num_rows in adapted_rows(config, vocab_size, micro, stages):
            weights = sum(adapter_weights(config, part) for part in linear.adapted)
            flops += 2 * weights * num_rows * (1 + PRODUCTS_BACKWARD + repeated)
    return flops


def attention_flops(config: RunConfig, vocab_size: int, micro: MicroBatch, stages: RankStages) -> float:
    """FLOPs of the backbone's attention of one micro-batch on a pipeline rank, all tensor-parallel ranks together."""
    share, back = layer_shares(config, vocab_size, stages)
    repeated = int(config.parallel.recompute == "full")
    return micro.flops.attention * (share + back * (ATTENTION_BACKWARD + repeated))


def layer_shares(config: RunConfig, vocab_size: int, stages: RankStages) -> tuple[float, float]:
    """A rank's share of the layers, and of those that a backward pass goes through."""
    num_layers = config.model.num_layers
    return sum(stages.num_layers) / num_layers, num_backward_layers(config, vocab_size, stages) / num_layers


def adapted_rows(
    config: RunConfig, vocab_size: int, micro: MicroBatch, stages: RankStages
) -> Iterator[tuple[Linear, float]]:
    """A rank's linears with adapters, each with the rows that it multiplies."""
    for linear in rank_linears(config, vocab_size, stages):
        if linear.adapted:
            counts = (micro.num_positions, micro.num_predicted, micro.num_blocks)
            yield linear, linear_rows(config, linear.adapted[0], *counts)


def elementwise_bytes(config: RunConfig, vocab_size: int, micro: MicroBatch, stages: RankStages) -> float:
    """Bytes that the elementwise kernels of one micro-batch move on a rank."""
    recompute = config.parallel.recompute
    layer = layer_bytes(config, micro.num_positions)
    num_backward = num_backward_layers(config, vocab_size, stages)
    moved = num_backward * layer.training(recompute) + (sum(stages.num_layers) - num_backward) * layer.forward
    if config.lora.is_used:
        # Selective recomputation makes no product again.
        repeats = "full" if recompute == "full" else "none"
        for linear, num_rows in adapted_rows(config, vocab_size, micro, stages):
            moved += adapter_bytes(config, linear, num_rows).training(repeats)
        linears = rank_linears(config, vocab_size, stages)
        moved += num_made(config) * sum(remade_bytes(config, linear) for linear in linears)
    if stages.is_last:
        moved += logits_bytes(config, vocab_size, micro.num_text_targets).training("none")
        if config.head.kind == "diffusion":
            num_tokens = micro.num_predicted * config.head.diff_batch_mul
            block: BothPasses = head_block_bytes(config, num_tokens)
            moved += config.head.num_blocks * block.training(recompute)
            moved += head_rest_bytes(config, num_tokens).training("none")
    return moved


def encoder_s(config: RunConfig, counts: PackCounts, num_ranks: int, machine: Machine) -> float:
    """Seconds in which a rank encodes its part of the images of a step; none where bits are stored."""
    if config.data.bits_dir:
        return 0.0
    flops = encode_flops(config.vision, counts.num_encoded) / num_ranks
    return products_s(flops, machine.encoder_rate(config.vision.precision))


def step_time(
    config: RunConfig,
    vocab_size: int,
    workload: Workload,
    ranks: Sequence[RankStages],
    data_size: int,
    machine: Machine,
) -> StepTime:
    """Seconds of one optimiser step.

    Args:
        config: the run, laid out.
        vocab_size: entries of the tokenizer.
        workload: what a step asks for.
        ranks: what every pipeline rank holds.
        data_size: data-parallel ranks.
        machine: what it runs on.
    """
    parallel, num_micro = config.parallel, workload.num_micro_batches
    micro = mean_micro_batch(config, vocab_size, workload, data_size)
    times = [micro_time(config, vocab_size, micro, stages, machine, data_size) for stages in ranks]
    slowest = max(times, key=lambda time: time.total)
    elements = max(rank_parameters(config, vocab_size, stages).trained for stages in ranks)
    num_ranks = parallel.tensor * parallel.pipeline * data_size
    busy = slowest.times(num_micro)
    once = StepTime(
        bubble=bubble_s([time.total for time in times], parallel.virtual_stages),
        data_traffic=data_step_s(config, elements, data_size, machine),
        optimiser=moved_s(optimiser_bytes(config, elements, data_size), machine.memory_rate),
        encoder=encoder_s(config, workload.counts, num_ranks, machine),
    )
    return busy + once
