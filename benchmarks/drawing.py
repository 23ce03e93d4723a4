"""Images per second of drawing in batches, over drawing the same images one by one in the same run.

    export PYTHONPATH=. OMP_NUM_THREADS=1
    torchrun --nproc_per_node=2 benchmarks/drawing.py                    the demo, on two replicas
    torchrun --nproc_per_node=2 benchmarks/drawing.py demo sample.size_px=[128,128] --turns 3
    python benchmarks/drawing.py sft_14b parallel.tensor=1 --batches 8 --images 8 --turns 1    on a GPU

Two ways, both with random weights of a configuration and its `[sample]`: "folder" is the pipeline of a published
folder, "run" is what draws with a checkpoint of a run. Every replica draws as many images as `--images` in batches of
each size, autoencoder included. Sizes and ways take turns, so that other programs on the machine disturb all alike; the
first turn warms up and is left out. Ratios are those within a turn, the median of all turns and their range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from generation import random_networks, waiter
from packs import machine

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.published_model import PublishedModel
from bitdance_scale.generate.sampler import configured_solver
from bitdance_scale.model.key_values import capacity_for, key_value_bytes
from bitdance_scale.parallel.still_model import StillModel
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.condition import Condition, load_condition
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.sampling import BatchDrawer, sample_grid
from bitdance_scale.vision.tokenizer import VisionTokenizer
from bitdance_scale.wording import file_size

BATCHES = (1, 2, 4, 8, 16)

Draw = Callable[[Sequence[str], Sequence[int]], list[np.ndarray]]
"""Draws images of prompts with seeds, together."""
Times = dict[tuple[str, int], list[tuple[float, float]]]
"""(way, batch) -> per turn: images/s of all replicas on the clock, and per second of their processor time."""


def folder_way(config: RunConfig, condition: Condition, topology: Topology) -> Draw:
    """Draws as with a published folder."""
    dtype, sample = getattr(torch, config.run.dtype), config.sample
    torch.manual_seed(0)
    networks = random_networks(config.model, config.head, config.vision, condition.vocab_size, dtype, topology.device)
    vision = VisionTokenizer(config.vision, topology.device, dtype=dtype)
    pipeline = BitDancePipeline(PublishedModel(*networks, vision, condition))

    def draw(texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        images = pipeline(
            list(texts),
            *sample.size_px,
            num_inference_steps=sample.num_steps,
            guidance_scale=sample.guidance,
            sampler=sample.sampler,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return [np.asarray(image) for image in images]

    return draw


def run_way(config: RunConfig, condition: Condition, topology: Topology) -> Draw:
    """Draws as with a run."""
    vision = VisionTokenizer(config.vision, topology.device)
    drawer = BatchDrawer(StillModel(config, condition.vocab_size, topology), config, condition, topology)

    def draw(texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        bits = drawer.draw([condition.prompt_ids(text) for text in texts], seeds)
        return [vision.decode(rows, sample_grid(config)).numpy() for rows in bits]

    return draw


def measure(draw: Draw, prompts: Sequence[str], batch: int, topology: Topology) -> tuple[float, float, np.ndarray]:
    """(images/s of all replicas on the clock, images per second of processor time, images of this replica)."""
    wait = waiter(topology.device)
    dist.barrier()
    clock, processor = time.perf_counter(), time.process_time()
    images: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        stop = start + batch
        images += draw(prompts[start:stop], range(start, min(stop, len(prompts))))
    wait()
    used_s = torch.tensor(time.process_time() - processor)
    dist.barrier()
    elapsed_s = time.perf_counter() - clock
    dist.all_reduce(used_s)
    num_images = len(prompts) * topology.data_size
    return num_images / elapsed_s, num_images / float(used_s), np.stack(images)


def take_turns(
    ways: dict[str, Draw], prompts: Sequence[str], batches: Sequence[int], num_turns: int, topology: Topology
) -> tuple[Times, dict[tuple[str, int], int]]:
    """The times of all turns but the first, and how many images are those that were drawn one by one."""
    times: Times = {(name, batch): [] for name in ways for batch in batches}
    num_equal: dict[tuple[str, int], int] = {}
    for turn in range(1 + num_turns):
        for name, draw in ways.items():
            alone: np.ndarray | None = None
            for batch in batches:
                clock, processor, images = measure(draw, prompts, batch, topology)
                alone = images if alone is None else alone
                num_equal[name, batch] = int((images == alone).reshape(len(images), -1).all(1).sum())
                if turn:
                    times[name, batch].append((clock, processor))
    return times, num_equal


def table(times: Times, num_equal: dict[tuple[str, int], int], memory: dict[int, int], num_images: int) -> str:
    """A table in Markdown."""
    lines = [
        "| way | batch | images/s | over one by one | by processor time | keys and values | images as one by one |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, batch), rows in times.items():
        speed = statistics.median(clock for clock, _ in rows)
        ratios = [_spread([row[i] / one[i] for row, one in zip(rows, times[name, 1], strict=True)]) for i in (0, 1)]
        cells = [name, str(batch), f"{speed:.2f}", *ratios, file_size(memory[batch])]
        lines.append(f"| {' | '.join(cells)} | {num_equal[name, batch]} of {num_images} |")
    return "\n".join(lines)


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("demo"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="sizes; one by one comes first")
    parser.add_argument("--images", type=int, default=max(BATCHES), help="that a replica draws in batches of each size")
    parser.add_argument("--turns", type=int, default=7, help="measured, after one to warm up")
    options = parser.parse_args()
    batches = [1, *(batch for batch in options.batches if batch > 1)]
    # Nothing is read but the tokenizers.
    config = load_config(options.config, ["data.shards=[]", "evaluate.shards=[]", *options.overrides])
    solver, condition = configured_solver(config), load_condition(config)
    prompts = [config.sample.prompts[number % len(config.sample.prompts)] for number in range(options.images)]
    grid = sample_grid(config)
    longest = max(len(condition.prompt_ids(prompt)) for prompt in prompts) + len(
        condition.image_tokens.prefix_ids(grid)
    )
    num_positions = longest + grid[0] * grid[1] - config.vision.block_tokens
    memory = {
        batch: key_value_bytes(
            config.model, batch * (2 if solver.is_guided else 1), num_positions, getattr(torch, config.run.dtype)
        )
        for batch in batches
    }
    with joined_ranks(config.parallel) as topology:
        ways = {
            "folder": folder_way(config, condition, topology),
            "run": run_way(config, condition, topology),
        }
        times, num_equal = take_turns(ways, prompts, batches, options.turns, topology)
        if topology.rank == 0:
            height, width = config.sample.size_px
            print(machine())
            print(
                f"{options.config}, {height} x {width} px, {solver.num_steps} steps, guidance {solver.guidance:g}, "
                f"{config.run.dtype}; {topology.data_size} replicas of {torch.get_num_threads()} threads, "
                f"{options.images} images each, {options.turns} turns; {capacity_for(num_positions)} slots a sequence"
            )
            print(table(times, num_equal, memory, options.images), flush=True)


if __name__ == "__main__":
    main()
