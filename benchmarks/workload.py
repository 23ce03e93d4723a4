"""Times optimiser steps of any configuration and layout on synthetic packs; the worker of the other benchmarks.

torchrun --nproc_per_node=2 benchmarks/workload.py CONFIG [section.key=value ...] --steps 5

A slice of the 14B model at full width on one GPU, eager and compiled (as many layers as fit with head and optimiser):

torchrun --nproc_per_node=1 benchmarks/workload.py pipelines/configs/pt_14b.toml parallel.tensor=1 \
    parallel.sequence_parallel=false model.num_layers=8 --vocab 32000 --steps 10 [--compile]

Every pack is filled to `data.max_pack_tokens` from the configured mix of buckets, with random bits and captions. Rank 0
prints one line of JSON: the median step, tokens per second and model FLOPs utilisation (pairs of positions that see each
other, the head, logits of text targets only; recomputation and the autoencoder left out), peak memory, and the seconds
of processor time each rank's main thread spent in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bitdance_scale.config.load import load_config
from bitdance_scale.config.rules import check
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.inputs import PackInputs, make_inputs
from bitdance_scale.observe.flops import PackCounts, count_pack, peak_flops, step_flops, utilisation
from bitdance_scale.observe.memory import memory_bytes
from bitdance_scale.parallel.topology import make_topology, start_process_group
from bitdance_scale.sequence.layout import ImageTokens, num_positions, pack_samples
from bitdance_scale.sequence.noise import pack_noise
from bitdance_scale.sequence.pack import Pack, Sample

NUM_RESOLUTION_TOKENS = 256
CAPTION_TOKENS = (16, 128)


def synthetic_packs(config: RunConfig, vocab_size: int, num_packs: int, first_pack: int = 0) -> list[Pack]:
    """Full packs of the configured mix; pack number n is the same whoever makes it."""
    vision = config.vision
    num_queries = vision.block_tokens - 1
    first_query = vocab_size - num_queries
    tokens = ImageTokens(
        vision_start=0,
        vision_end=1,
        resolution=tuple(range(first_query - NUM_RESOLUTION_TOKENS, first_query)),
        queries=tuple(range(first_query, vocab_size)),
    )
    buckets = [
        (image_class.share / len(image_class.buckets_px), size_px)
        for image_class in config.data.classes
        for size_px in image_class.buckets_px
    ]
    shares = np.array([share for share, _ in buckets])
    packs = []
    for number in range(first_pack, first_pack + num_packs):
        draw = np.random.default_rng(number)
        samples: list[Sample] = []
        free = config.data.max_pack_tokens
        while True:
            height, width = buckets[draw.choice(len(buckets), p=shares / shares.sum())][1]
            grid = (height // vision.downsample, width // vision.downsample)
            before = draw.integers(2, first_query - NUM_RESOLUTION_TOKENS, size=int(draw.integers(*CAPTION_TOKENS)))
            length = num_positions(len(before), 1, grid, vision.block_tokens)
            if length > free and samples:
                break
            free -= length
            samples.append(Sample(number * 1000 + len(samples), grid, before, np.array([2]), 1, 1))
        pack = pack_samples(samples, tokens, config.data.pack_multiple)
        shape = (len(pack.vision_positions), vision.num_bits // 8)
        packs.append(pack.with_bits(draw.integers(0, 256, size=shape, dtype=np.uint8)))
    return packs


def measure(
    config: RunConfig, vocab_size: int, packs_per_step: int, num_steps: int, is_compiled: bool
) -> dict[str, object]:
    """Trains `num_steps` steps after one to warm up; every layout does the same packs in the same number of steps."""
    start_process_group(timeout_s=600)
    topology = make_topology(config.parallel)
    # Imported after the engines know the device.
    from bitdance_scale.parallel.build import build_engine
    from bitdance_scale.parallel.step import train_step

    engine = build_engine(config, vocab_size, topology)
    if is_compiled:
        for stage in engine.stages:
            for layer in stage.decoder.layers:
                layer.compile(dynamic=True)
    num_micro = packs_per_step // topology.data_size
    packs = synthetic_packs(config, vocab_size, num_micro, topology.data_rank * num_micro)
    batch: list[PackInputs] = [
        make_inputs(pack, pack_noise(pack, config.vision.num_bits, 0, 0), config, topology.device) for pack in packs
    ]
    elapsed, busy = [], []
    for _ in range(num_steps + 1):
        _synchronise(topology.device)
        begun, begun_busy = time.monotonic(), time.thread_time()
        losses, _ = train_step(engine, batch, config.loss, 1e-5, topology)
        _synchronise(topology.device)
        elapsed.append(time.monotonic() - begun)
        busy.append(time.thread_time() - begun_busy)
    all_busy: list[float | None] = [None] * topology.world_size
    dist.all_gather_object(all_busy, statistics.median(busy[1:]))
    counts = sum((count_pack(pack) for pack in synthetic_packs(config, vocab_size, packs_per_step)), PackCounts())
    step_s = statistics.median(elapsed[1:])
    name = torch.cuda.get_device_name() if topology.device.type == "cuda" else "cpu"
    flops = step_flops(config, vocab_size, counts).training
    return {
        "device": name,
        "step_s": step_s,
        "first_step_s": elapsed[0],
        "tokens_per_s": counts.num_positions / step_s,
        "mfu": utilisation(flops, step_s, topology.world_size, peak_flops(name, config.run.dtype)),
        "training_flops": flops,
        "memory_bytes": memory_bytes(topology.device),
        "busy_s": all_busy,
        "loss": losses.total,
    }


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
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    check(config, int(os.environ["WORLD_SIZE"]))
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    result = measure(config, options.vocab, options.packs, options.steps, options.compile)
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
