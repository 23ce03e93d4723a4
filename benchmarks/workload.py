r"""Times optimiser steps of any configuration and layout on synthetic packs; the worker of the other benchmarks.

    torchrun --nproc_per_node=2 benchmarks/workload.py CONFIG [section.key=value ...] --steps 5

A slice of the 14B model at full width on one GPU, eager and compiled (as many layers as fit with head and optimiser):

    torchrun --nproc_per_node=1 benchmarks/workload.py pt_14b parallel.tensor=1 \
        parallel.sequence_parallel=false model.num_layers=8 --vocab 32000 --steps 10 [--compile]

The packs are those of `data/plan/synthetic_packs.py`: the configured mix with captions as long as allowed, the same for
every layout. Rank 0 prints one line of JSON: the median step time, tokens per second, model FLOPs utilisation
(`observe/cost.py`), peak memory, and the processor time in seconds that each rank's main thread spends in a step.
More is measured in steps of its own after these: `--trace` writes what ran when on rank 0, `--count-syncs` counts how
often a step waits for the device (CUDA), `--estimate` adds what `parallel/memory_estimate.py` says of rank 0, and
`--save` times how long a checkpoint in the background stalls a step, and how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.plan.synthetic_packs import typical_packs
from bitdance_scale.model.inputs import PackInputs, make_inputs
from bitdance_scale.observe.cost import PackCounts, count_pack, memory_bytes, peak_flops, step_flops, utilisation
from bitdance_scale.parallel.topology import Topology, make_topology, start_process_group
from bitdance_scale.sequence.noise import pack_noise
from bitdance_scale.sequence.pack import Pack

if TYPE_CHECKING:
    from bitdance_scale.parallel.engine import TrainingEngine


def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, object]:
    """Trains `--steps` steps after one to warm up; every layout trains on the same packs."""
    vocab_size, packs_per_step = options.vocab, options.packs
    start_process_group(timeout_s=600)
    topology = make_topology(config.parallel)
    # Imported after the engines know the device.
    from bitdance_scale.parallel.build import build_engine
    from bitdance_scale.parallel.step import train_step

    packs = typical_packs(config, num_replicas=1)[:packs_per_step]
    if len(packs) < packs_per_step or packs_per_step % topology.data_size:
        raise SystemExit(
            f"--packs {packs_per_step}: must be a multiple of the {topology.data_size} replicas and at most "
            f"{len(packs)}, which data.global_batch = {config.data.global_batch} fills; lower --packs or raise "
            f"data.global_batch"
        )
    engine = build_engine(config, vocab_size, topology)
    if options.compile:
        for stage in engine.stages:
            for layer in stage.decoder.layers:
                layer.compile(dynamic=True)
    batch: list[PackInputs] = [
        make_inputs(pack, pack_noise(pack, config.vision.num_bits, 0, 0), config, topology.device)
        for pack in packs[topology.data_rank :: topology.data_size]
    ]

    def step() -> float:
        losses, _ = train_step(engine, batch, config.loss, 1e-5, topology)
        _synchronise(topology.device)
        return losses.total

    elapsed, busy = [], []
    for _ in range(options.steps + 1):
        _synchronise(topology.device)
        begun, begun_busy = time.monotonic(), time.thread_time()
        loss = step()
        elapsed.append(time.monotonic() - begun)
        busy.append(time.thread_time() - begun_busy)
    all_busy: list[float | None] = [None] * topology.world_size
    dist.all_gather_object(all_busy, statistics.median(busy[1:]))
    counts = sum((count_pack(pack) for pack in packs), PackCounts())
    step_s = statistics.median(elapsed[1:])
    name = torch.cuda.get_device_name() if topology.device.type == "cuda" else "cpu"
    flops = step_flops(config, vocab_size, counts).training
    # Before what else is measured takes memory.
    used = memory_bytes(topology.device)
    more = _look_closer(options, config, packs[topology.data_rank :: topology.data_size], step, topology)
    if options.save is not None:
        more |= _time_saves(engine, options.save, step, topology)
    return {
        "device": name,
        "step_s": step_s,
        "first_step_s": elapsed[0],
        "tokens_per_s": counts.num_positions / step_s,
        "mfu": utilisation(flops, step_s, topology.world_size, peak_flops(name, config.run.dtype)),
        "training_flops": flops,
        "memory_bytes": used,
        "busy_s": all_busy,
        "loss": loss,
        **more,
    }


def _look_closer(
    options: argparse.Namespace,
    config: RunConfig,
    packs: Sequence[Pack],
    step: Callable[[], float],
    topology: Topology,
) -> dict[str, object]:
    """What the options ask for besides the times; all ranks make the same steps."""
    found: dict[str, object] = {}
    is_cuda = topology.device.type == "cuda"
    if options.count_syncs:
        found["syncs"] = _count_syncs(step) if is_cuda else None
    if options.trace is not None:
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if is_cuda else [])]
        with torch.profiler.profile(activities=kinds) as profile:
            step()
        if topology.rank == 0:
            options.trace.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(options.trace))
            events = [event for event in profile.events() if str(event.device_type).endswith("CUDA")]
            found["kernels"] = len(events) if is_cuda else None
    if options.estimate and topology.rank == 0:
        from bitdance_scale.parallel.memory_estimate import estimate_memory_here, in_own_process

        estimate = in_own_process(estimate_memory_here, config, options.vocab, topology.world_size, 0, packs, is_cuda)
        found["estimated_bytes"] = max(estimate.peak.total, estimate.building_peak) - estimate.peak.tokenizer
    return found


def _count_syncs(step: Callable[[], float]) -> dict[str, int]:
    """How often a step waits for the device, by the line that does."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{Path(warning.filename).name}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    return places


def _time_saves(
    engine: TrainingEngine, folder: Path, step: Callable[[], float], topology: Topology
) -> dict[str, object]:
    """Of three saves with a step beside each, seconds: until the call returns, until it is committed, of the step."""
    from bitdance_scale.checkpoint.background_save import CheckpointSaver
    from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
    from bitdance_scale.checkpoint.run_checkpoint import StepState
    from bitdance_scale.parallel.topology import make_host_group

    checkpoints = CheckpointFolder(folder, keep=1, group=make_host_group())
    saver = CheckpointSaver(checkpoints, topology.device, is_background=True)
    model, optimizer = engine.model_values(), engine.optimizer_values()
    saver.prepare(model, optimizer)
    found: dict[str, list[float]] = {"save_stall_s": [], "save_whole_s": [], "save_step_s": []}
    for number in range(1, 4):
        _synchronise(topology.device)
        begun = time.monotonic()
        saver.save(StepState(number), model, optimizer, "")
        found["save_stall_s"].append(time.monotonic() - begun)
        stepped = time.monotonic()
        step()
        found["save_step_s"].append(time.monotonic() - stepped)
        saver.wait()
        found["save_whole_s"].append(time.monotonic() - begun)
    saver.close()
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    dist.barrier()
    if topology.rank == 0:
        shutil.rmtree(folder)
    return {**found, "save_bytes": num_bytes}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description="Times optimiser steps on synthetic packs.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--vocab", type=int, default=1000, help="entries of the vocabulary")
    parser.add_argument("--packs", type=int, default=4, help="packs of a step, over all replicas")
    parser.add_argument("--steps", type=int, default=5, help="steps timed")
    parser.add_argument("--compile", action="store_true", help="compile every backbone layer")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="trace of one step, .json or .json.gz")
    parser.add_argument("--count-syncs", action="store_true", help="waits for the device in one step")
    parser.add_argument("--estimate", action="store_true", help="estimated memory, too")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where checkpoints are timed; removed afterwards")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    check(config, int(os.environ["WORLD_SIZE"]))
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    result = measure(config, options)
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
