"""What a real run on real ranks allocates, measured at the allocator; imported by the spawned ranks."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from bitdance_scale.checkpoint.staging import Stager
from bitdance_scale.config.schema import ModelSection, RunConfig
from bitdance_scale.data.plan.synthetic_packs import typical_packs
from bitdance_scale.model.inputs import PackInputs, make_inputs
from bitdance_scale.parallel.memory_estimate import MemoryEstimate, estimate_memory_here
from bitdance_scale.parallel.topology import make_topology, start_process_group
from bitdance_scale.sequence.noise import pack_noise
from bitdance_scale.sequence.pack import Pack
from tests.distributed.toy import toy_config

VOCAB_SIZE = 2001
NUM_MICRO = 2


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank, without the inputs.

    Attributes:
        storages: of the tensors that the engine keeps, by kind.
        held: of all tensors that exist between the last backward pass of the second step and its optimiser step.
        peak: the most that the allocator had given out during the second step.
        host_copy: of a checkpoint in the background.
    """

    storages: dict[str, int]
    held: int
    peak: int
    host_copy: int


def wide_config(dtype: str, **parallel: int | str | bool) -> RunConfig:
    """A model whose parameters (3.7 M) and activations outweigh bookkeeping, on packs of about 1,000 positions."""
    config = toy_config(**parallel)
    model = ModelSection(num_layers=2, hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=32, ffn_size=512)
    resolutions = (dataclasses.replace(config.data.resolutions[0], side_px=32, buckets_px=((32, 32), (16, 64))),)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dtype=dtype),
        model=model,
        head=dataclasses.replace(config.head, width=128, head_dim=32),
        text=dataclasses.replace(config.text, max_caption_tokens=40),
        data=dataclasses.replace(config.data, resolutions=resolutions, global_batch=24, max_pack_tokens=1024),
    )


def estimate(_rank: int, config: RunConfig, world_size: int, rank: int, is_fused: bool) -> MemoryEstimate:
    """The memory estimate of the same step."""
    packs = _packs(config)
    return estimate_memory_here(config, VOCAB_SIZE, world_size, rank, packs, is_fused)


def measure(_rank: int, config: RunConfig, is_fused: bool) -> Measured:
    """Two steps under PyTorch's profiler, which reports every allocation and release of the CPU allocator."""
    start_process_group(timeout_s=120)
    topology = make_topology(config.parallel)
    from bitdance_scale.parallel.build import build_stages, engine_of
    from bitdance_scale.parallel.step import accumulate_gradients, count_targets

    # Made before the profiler starts, so that it does not count them.
    batch = [_inputs(config, index) for index in range(NUM_MICRO)]
    not_counted = _tensors()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = engine_of(build_stages(config, VOCAB_SIZE, topology), config, topology, is_fused)
        for step in range(2):
            with record_function(f"step {step}"):
                counts = count_targets(batch, topology)
                accumulate_gradients(engine, batch, counts, config.loss, topology)
                storages = {kind: _bytes(tensors) for kind, tensors in engine.holdings().items()}
                gradients = [
                    parameter.grad for parameter, _ in engine.parameters.values() if parameter.grad is not None
                ]
                held = _bytes([*_tensors(), *gradients]) - _bytes(not_counted)
                engine.step(config.optim.lr)
        left = addresses()
    stager = Stager(None, topology.device)
    model = {f"model.{name}": value for name, value in engine.trained_values().items()}
    stager.prepare(model | engine.optimizer_values())
    return Measured(storages=storages, held=held, peak=allocated_peak(profiler, left), host_copy=stager.num_bytes)


def addresses() -> set[int]:
    """Where the storages of all tensors are that Python holds."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors()}


def allocated_peak(
    profiler: profile,
    left: set[int],
    scratch_of: tuple[str, ...] = (),
    since: str = "step 1",
    mapped_sizes: frozenset[int] = frozenset(),
) -> int:
    """The most bytes alive since the beginning of what is recorded as `since`, from the allocator's events.

    Releases by gloo's threads are not reported. Their reference can be the last one only right after a collective, when
    this thread has let go already: a block without a reported release that is not in use at the end (`left`, addresses)
    counts as released at once. Otherwise such blocks would pile up.

    What an operation of `scratch_of` (beginnings of names) takes and gives back before it ends is not counted. Nor are
    blocks of `mapped_sizes`: a mapped file is reported as well.
    """
    events = list(_flatten(profiler.profiler.kineto_results.experimental_event_tree()))
    begin = next(event.start_time_ns for event in events if event.name == since)
    allocations = sorted(
        (event for event in events if event.tag == _EventType.Allocation), key=lambda event: event.start_time_ns
    )
    scratch = _scratch(allocations, scratch_of) if scratch_of else set()
    changes = [
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for number, event in enumerate(allocations)
        if number not in scratch and abs(event.extra_fields.alloc_size) not in mapped_sizes
    ]
    # Going backwards, the next event reported about an address: True if it is a release.
    is_released_next: dict[int, bool] = dict.fromkeys(left, True)
    counted = []
    for time_ns, address, size in reversed(changes):
        if size < 0 or is_released_next.get(address, False):
            counted.append((time_ns, size))
        is_released_next[address] = size < 0
    live, peak = 0, 0
    for time_ns, size in reversed(counted):
        live += size
        peak = max(peak, live) if time_ns >= begin else 0
    return peak


def _scratch(allocations: Sequence[Any], scratch_of: tuple[str, ...]) -> set[int]:
    """Numbers of the events in which an operation of `scratch_of` takes what it gives back itself, and of those."""
    taken: dict[int, tuple[int, object]] = {}
    found: set[int] = set()
    for number, event in enumerate(allocations):
        operation = event.parent
        while operation is not None and not operation.name.startswith(scratch_of):
            operation = operation.parent
        key = None if operation is None else operation.id
        if event.extra_fields.alloc_size > 0:
            taken[event.extra_fields.ptr] = (number, key)
        else:
            begun, owner = taken.pop(event.extra_fields.ptr, (-1, None))
            if key is not None and owner == key:
                found |= {begun, number}
    return found


def _flatten(nodes: Sequence[object]) -> Iterator[object]:
    for node in nodes:
        yield node
        yield from _flatten(node.children)


def _tensors() -> list[torch.Tensor]:
    """Every tensor that Python holds."""
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.device.type == "cpu"]


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages of tensors, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _packs(config: RunConfig) -> list[Pack]:
    return typical_packs(config, num_replicas=1)[:NUM_MICRO]


def _inputs(config: RunConfig, index: int) -> PackInputs:
    pack = _packs(config)[index]
    noise = pack_noise(pack, config.vision.num_bits, config.run.seed, 0, num_draws=config.head.diff_batch_mul)
    return make_inputs(pack, noise, config, torch.device("cpu"))
