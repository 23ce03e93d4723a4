"""How much memory a rank of a run needs, in bytes, without allocating it.

The stage, the optimiser engine and the pipeline schedule of that rank run for two optimiser steps, on tensors without
memory (`fake_ranks.py`); only a log of their storages (`storage_log.py`) is kept. No formula is involved, so a change
of the model or of an engine shows in the result.

On a GPU the estimate leaves out the CUDA context, NCCL's and cuBLAS's own buffers, and what the caching allocator loses
to rounding and fragmentation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bitdance_scale.config.schema import RunConfig, VisionSection
from bitdance_scale.data.plan.synthetic_packs import typical_packs
from bitdance_scale.model.inputs import PackInputs, make_inputs
from bitdance_scale.parallel.build import build_stages, engine_of
from bitdance_scale.parallel.engine import TrainingEngine
from bitdance_scale.parallel.fake_ranks import join_fake_job, no_memory, products_of_cuda
from bitdance_scale.parallel.memory_parts import Bytes, num_in_flight
from bitdance_scale.parallel.partition import ShardedValue
from bitdance_scale.parallel.quantised_linears import quantised_weights
from bitdance_scale.parallel.step import accumulate_gradients, count_targets
from bitdance_scale.parallel.storage_log import Peak, StorageLog
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.noise import pack_noise
from bitdance_scale.sequence.pack import Pack
from bitdance_scale.vision.tokenizer import num_elements

Result = TypeVar("Result")

# The second step is measured: in the first, ZeRO-3 learns the order in which it will prefetch weights.
_NUM_STEPS = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """How much memory one rank needs.

    Attributes:
        held: bytes held between the last backward pass of a step and the optimiser's step.
        peak: bytes at the fullest moment of a step.
        building_peak: the most bytes before the first step: initial weights, the engine's construction, and frozen
            linears that are quantised as they are loaded.
        most_activations: the most bytes of activations at any moment of a step; the peak may be another moment, such as
            the reduction of gradients.
        largest: name and bytes of the largest single activation or buffer at the peak.
        num_micro_batches: micro-batches of this replica in a step.
        num_in_flight: how many of them this rank keeps activations of at once.
        host_copy: bytes of host memory in which a rank copies what it writes of a checkpoint in the background.
    """

    held: Bytes
    peak: Bytes
    building_peak: int
    most_activations: int
    largest: tuple[str, int]
    num_micro_batches: int
    num_in_flight: int
    host_copy: int


def estimate_memory(
    config: RunConfig, vocab_size: int, world_size: int, rank: int, is_fused: bool = True
) -> MemoryEstimate:
    """How much memory rank `rank` of a job of `world_size` ranks needs, computed in a separate process.

    The packs of a step are those of `typical_packs`. As many run as are in the pipeline at once, and each of these is
    the pack with the most text targets.

    Args:
        config: the run, checked for `world_size`.
        vocab_size: entries of the tokenizer.
        world_size: ranks of the job.
        rank: which of them. Under ZeRO-3 it must be 0; there all ranks need the same.
        is_fused: whether AdamW, and the product that adds to a float32 gradient, are one kernel each without temporary
            tensors, as on CUDA.

    Raises:
        ConfigError: the global batch cannot be divided among the replicas.
    """
    return in_own_process(estimate_memory_here, config, vocab_size, world_size, rank, is_fused=is_fused)


def in_own_process(function: Callable[..., Result], *args: object, **options: object) -> Result:
    """What a function returns in a process that it may make a rank of a fake job; what it prints is discarded."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_be_quiet) as executor:
        return executor.submit(function, *args, **options).result()


def estimate_memory_here(
    config: RunConfig,
    vocab_size: int,
    world_size: int,
    rank: int,
    packs: Sequence[Pack] | None = None,
    is_fused: bool = True,
) -> MemoryEstimate:
    """`estimate_memory` in this process, which joins the fake job for good.

    `packs` are the micro-batches of a step, all of which run; None: as in `estimate_memory`.
    """
    assert config.parallel.zero_stage < 3 or rank == 0, "under ZeRO-3 ranks compare values with rank 0, which is fake"
    topology = join_fake_job(world_size, rank, config.parallel)
    in_flight = num_in_flight(config.parallel, topology.pipeline_rank)
    waiting: list[Pack] = []
    if packs is None:
        packs, waiting = packs_to_run(config, topology.data_size, in_flight)
    # Packs are small: they are made of real tensors, then copied into tensors without memory.
    made = {id(pack): _inputs(pack, config) for pack in [*packs, *waiting]}
    with no_memory() as log, products_of_cuda() if is_fused else contextlib.nullcontext():
        engine = build_logged(log, config, vocab_size, topology, is_fused)
        building_peak = log.peak(0, log.position).total
        batch, _kept = ([_copy(made[id(pack)], log) for pack in group] for group in (packs, waiting))
        held, peak, most_activations = _run_steps(log, engine, batch, config, topology)
        host_copy = _host_copy(engine, config, topology)
    tokenizer = _tokenizer_bytes(config.vision)
    largest = next(storage for storage in peak.storages if storage.role in ("buffers", "activations"))
    return MemoryEstimate(
        held=Bytes(**held, tokenizer=tokenizer),
        peak=Bytes(**peak.by_role, tokenizer=tokenizer),
        building_peak=building_peak + tokenizer,
        most_activations=most_activations,
        largest=(largest.maker, largest.nbytes),
        num_micro_batches=len(packs) + len(waiting),
        num_in_flight=min(in_flight, (len(packs) + len(waiting)) * config.parallel.virtual_stages),
        host_copy=host_copy,
    )


def _host_copy(engine: TrainingEngine, config: RunConfig, topology: Topology) -> int:
    """Bytes of what a checkpoint has, each element of which is copied by one rank.

    Replicas share the weights out, unless ZeRO-3 has done so already, and tensor-parallel ranks what all of them have.
    """
    if not config.checkpoint.in_background:
        return 0

    def held(values: Mapping[str, ShardedValue], num_replicas: int) -> float:
        total = 0.0
        for name, value in values.items():
            # Those of the optimiser are called by kind and parameter.
            located = engine.parameters.get(name) or engine.parameters[name.partition(".")[2]]
            num_holders = num_replicas * (topology.tensor_size if located.placement.dim is None else 1)
            total += sum(piece.tensor.nbytes for piece in value.pieces) / num_holders
        return total

    num_replicas = 1 if config.parallel.zero_stage == 3 else topology.data_size
    return round(held(engine.trained_values(), num_replicas) + held(engine.optimizer_values(), 1))


def packs_to_run(config: RunConfig, num_replicas: int, in_flight: int) -> tuple[list[Pack], list[Pack]]:
    """(packs that run, packs of the step that only wait); the one with the most text targets runs every time.

    Args:
        config: the run.
        num_replicas: data-parallel ranks.
        in_flight: forward passes whose activations a rank keeps at once.
    """
    packs = typical_packs(config, num_replicas)
    # One pass more than are in flight, so that the oldest is replaced; virtual stages take packs in rounds of the
    # pipeline.
    num_run = max(2, -(-(in_flight + 1) // config.parallel.virtual_stages))
    num_run += -num_run % config.parallel.pipeline
    num_run = min(len(packs), num_run)
    return [packs[0]] * num_run, packs[num_run:]


def build_logged(
    log: StorageLog, config: RunConfig, vocab_size: int, topology: Topology, is_fused: bool
) -> TrainingEngine:
    """An engine with its stages whose gradients the log knows as soon as they are accumulated."""
    stages = build_stages(config, vocab_size, topology)

    def note(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None, "a hook that runs after the gradient is accumulated"
        log.assign([parameter.grad], "gradients")

    # Registered before the engine's own hooks, which take the gradient away.
    for parameter in stages.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)
    engine = engine_of(stages, config, topology, is_fused)
    for base in (base for stage in engine.stages for base in quantised_weights(stage)):
        # As a start does.
        base.value.consume(base.value.make_slice())
    return engine


def _run_steps(
    log: StorageLog, engine: TrainingEngine, batch: list[PackInputs], config: RunConfig, topology: Topology
) -> tuple[dict[str, int], Peak, int]:
    """(bytes held before the last optimiser step, peak of the last step, most activations in it)."""
    held: dict[str, int] = {}
    for _ in range(_NUM_STEPS):
        assign_holdings(log, engine)
        start = log.position
        counts = count_targets(batch, topology)
        accumulate_gradients(engine, batch, counts, config.loss, topology)
        held = held_before_update(log, engine)
        engine.step(config.optim.lr)
    assign_rest(log)
    return held, log.peak(start, log.position), log.most_of("activations", start)


def assign_holdings(log: StorageLog, engine: TrainingEngine) -> None:
    """Tells the log what the engine keeps from step to step."""
    for role, tensors in engine.holdings().items():
        log.assign(tensors, role)


def held_before_update(log: StorageLog, engine: TrainingEngine) -> dict[str, int]:
    """Bytes by role between the last backward pass of a step and the update."""
    assign_holdings(log, engine)
    # No activation is left: whatever else is held is a gradient, in whichever buffer the engine keeps it.
    held: Counter[str] = Counter()
    for storage in log.alive():
        storage.role = storage.role or "gradients"
        held[storage.role] += storage.nbytes
    return dict(held)


def assign_rest(log: StorageLog) -> None:
    """What has no role after the steps is a buffer if the engine made it, and an activation if the model did."""
    for storage, _ in log.events:
        if not storage.role:
            storage.role = "buffers" if storage.is_engine_made else "activations"


def _inputs(pack: Pack, config: RunConfig) -> PackInputs:
    noise = pack_noise(pack, config.vision.num_bits, config.run.seed, 0, num_draws=config.head.diff_batch_mul)
    return make_inputs(pack, noise, config, torch.device("cpu"))


def _copy(inputs: PackInputs, log: StorageLog) -> PackInputs:
    """The same in tensors without memory; a pack that a batch holds twice is copied twice, as in training."""

    # Any, because it rebuilds tensors, tuples and dataclasses.
    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            new = torch.empty_like(value)
            log.assign([new], "inputs")
            return new
        if isinstance(value, tuple):
            return tuple(copy(item) for item in value)
        # The inputs themselves and, within them, the mask.
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: copy(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        return value

    return copy(inputs)


def _tokenizer_bytes(section: VisionSection) -> int:
    return num_elements(section) * torch.float32.itemsize


def _be_quiet() -> None:
    """Discards what the engines print while they are built: standard output belongs to the caller."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
