"""Seconds that messages between ranks are exposed: tensor-parallel, pipeline-parallel and data-parallel."""

from __future__ import annotations

from typing import Protocol

from bitdance_scale.config.schema import NUM_MODULATIONS, NUM_TOKEN_MODULATIONS, RunConfig
from bitdance_scale.planning.adapters import RankParameters
from bitdance_scale.planning.machine import Machine
from bitdance_scale.planning.parameters import FLOAT_BYTES, RankStages, element_bytes
from bitdance_scale.planning.rank_memory import (
    is_megatron_engine,
    local_positions,
    reduced_bytes,
    scatters_gradients,
)
from bitdance_scale.planning.roofline import gather_s, group_rate, send_s, sum_s

# All-gathers and reduce-scatters of [S, D] in a layer; an all-reduce counts as two. Of the backward ones, Megatron-core
# starts some beside the product of a weight gradient.
LAYER_FORWARD = 4
LAYER_BACKWARD_EXPOSED, LAYER_BACKWARD_BESIDE = 2, 4
WHOLE_BACKWARD_EXPOSED, WHOLE_BACKWARD_BESIDE = 0, 4
# Sums of one vector under ZeRO-2 and 3: gradients of the norms that see a part of the positions or heads.
LAYER_VECTORS = 4
# Of the time of both passes.
BACKWARD_SHARE = 2 / 3
# Linears, which ZeRO-3 gathers one by one.
LAYER_LINEARS, HEAD_BLOCK_LINEARS = 4, 4


class Tokens(Protocol):
    """What decides the size of messages: counts of the mean pack."""

    @property
    def num_positions(self) -> float:
        """Positions, padding included."""
        ...

    @property
    def num_vision(self) -> float:
        """Vision tokens at the input."""
        ...

    @property
    def num_predicted(self) -> float:
        """Vision tokens that the head predicts."""
        ...


def tensor_micro_s(config: RunConfig, micro: Tokens, stages: RankStages, machine: Machine) -> float:
    """Of one micro-batch between tensor-parallel ranks; what runs beside products counts by its exposed share."""
    parallel = config.parallel
    if parallel.tensor == 1:
        return 0.0
    rate, _ = group_rate(parallel.tensor, 1, machine.gpus_per_node, machine.node_rate, machine.network_rate)
    exposed = 1 - machine.overlap_fraction.value
    repeated = int(parallel.recompute == "full")

    def gathers(number: float, num_bytes: float) -> float:
        return number * gather_s(num_bytes, parallel.tensor, rate, machine.message_s.value)

    is_split = parallel.sequence_parallel
    number: float = LAYER_FORWARD * (1 + repeated) + (LAYER_BACKWARD_EXPOSED if is_split else WHOLE_BACKWARD_EXPOSED)
    number += exposed * (LAYER_BACKWARD_BESIDE if is_split else WHOLE_BACKWARD_BESIDE)
    whole = micro.num_positions * config.model.hidden_size * element_bytes(config)
    # ZeRO-1 sums them once per step, in one message.
    vectors = LAYER_VECTORS * 2 * machine.message_s.value if parallel.zero_stage > 1 else 0.0
    seconds = sum(stages.num_layers) * (gathers(number, whole) + vectors)
    if stages.is_first:
        # The embedding's sum, the projector's, and the division of positions.
        seconds += gathers(3, whole)
    if stages.is_last:
        seconds += gathers(2, whole) + gathers(head_gathers(config, exposed), head_unit_bytes(config, micro))
    return seconds


def head_unit_bytes(config: RunConfig, micro: Tokens) -> float:
    """Bytes of one channel block [tokens, width] of the head, over all draws."""
    return micro.num_predicted * config.head.diff_batch_mul * config.head.width * element_bytes(config)


def head_gathers(config: RunConfig, exposed: float) -> float:
    """All-gathers of [tokens, width] in the head: sums after every divided input, gathered modulations."""
    head = config.head
    if head.kind == "bitwise":
        return 0.0
    attends = config.model.parts.head_attends(config.vision.block_tokens)
    per_block = 4 if attends else 2
    modules = head.num_adaln + 1
    modulations = head.num_adaln * (NUM_MODULATIONS if attends else NUM_TOKEN_MODULATIONS) + 2
    repeated = int(config.parallel.recompute == "full")
    forward = head.num_blocks * per_block * (1 + repeated) + modulations + 1
    # Gradients of the inputs, beside the products of the weights' gradients.
    return forward + exposed * (head.num_blocks * per_block + 2 * (modules + 1))


def pipeline_micro_s(config: RunConfig, micro: Tokens, stages: RankStages, machine: Machine, data_size: int) -> float:
    """Of one micro-batch with both neighbours, forward and backward; the interleaved schedule sends beside passes."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    stride = parallel.tensor * data_size
    is_near = parallel.pipeline * stride <= machine.gpus_per_node
    rate = machine.node_rate if is_near else machine.network_rate
    num_bytes = local_positions(config, micro.num_positions) * config.model.hidden_size * element_bytes(config)
    # A message per stage and direction; with one stage per rank the ends send in one direction only.
    hops = 2 * parallel.virtual_stages
    exposed = 1.0 if parallel.virtual_stages == 1 else 1 - machine.overlap_fraction.value
    return exposed * hops * send_s(num_bytes, rate, machine.message_s.value)


def _data_rate(config: RunConfig, data_size: int, machine: Machine) -> float:
    stride = config.parallel.tensor
    return group_rate(data_size, stride, machine.gpus_per_node, machine.node_rate, machine.network_rate)[0]


def data_micro_s(
    config: RunConfig, parameters: RankParameters, data_size: int, stages: RankStages, machine: Machine
) -> float:
    """Of one micro-batch between replicas, exposed or not (`exposed_s`).

    ZeRO-2 all-reduces every micro-batch's gradients. ZeRO-3 gathers the weights for the forward and for the backward
    pass, linear by linear, frozen ones as well, and reduce-scatters the gradients.
    """
    if data_size == 1:
        return 0.0
    num_bytes, rate = parameters.elements * element_bytes(config), _data_rate(config, data_size, machine)
    reduced = parameters.trained * reduced_bytes(config)
    if config.parallel.zero_stage == 2:
        return sum_s(reduced, data_size, rate, machine.message_s.value)
    if config.parallel.zero_stage == 3:
        linears = sum(stages.num_layers) * LAYER_LINEARS
        if stages.is_last:
            linears += config.head.num_blocks * HEAD_BLOCK_LINEARS
        messages = 2 * linears * machine.message_s.value
        sent = 2 * num_bytes + reduced
        return messages + gather_s(sent, data_size, rate, 3 * machine.message_s.value)
    return 0.0


def exposed_s(config: RunConfig, traffic_s: float, computing_s: float, machine: Machine) -> float:
    """What is left of a micro-batch's traffic between replicas beside its passes.

    Args:
        config: the run.
        traffic_s: seconds of the traffic alone.
        computing_s: seconds of both passes. ZeRO-2 sends beside the backward pass alone.
        machine: what it runs on.
    """
    beside = computing_s if config.parallel.zero_stage == 3 else BACKWARD_SHARE * computing_s
    return traffic_s - min(machine.overlap_fraction.value * traffic_s, beside)


def data_step_s(config: RunConfig, num_elements: float, data_size: int, machine: Machine) -> float:
    """Once per step between replicas: ZeRO-1 reduces gradients, ZeRO-1 and 2 gather the new weights.

    In bfloat16 ZeRO-1 reduce-scatters them, in float32 it all-reduces them. Megatron-core's engine reduce-scatters
    float32 gradients beside the last backward pass, in a pipeline after it on all ranks but the first, and gathers the
    weights beside the first forward pass; of what runs beside products the exposed share counts.
    """
    num_bytes, rate = num_elements * element_bytes(config), _data_rate(config, data_size, machine)
    if is_megatron_engine(config):
        exposed = 1 - machine.overlap_fraction.value
        reduced = gather_s(num_elements * FLOAT_BYTES, data_size, rate, machine.message_s.value)
        gathered = gather_s(num_bytes, data_size, rate, machine.message_s.value)
        return reduced * (1.0 if config.parallel.pipeline > 1 else exposed) + gathered * exposed
    seconds = 0.0
    if config.parallel.zero_stage == 1:
        reduce_s = gather_s if scatters_gradients(config) else sum_s
        seconds += reduce_s(num_elements * reduced_bytes(config), data_size, rate, machine.message_s.value)
    if config.parallel.zero_stage < 3:
        seconds += gather_s(num_bytes, data_size, rate, machine.message_s.value)
    return seconds
