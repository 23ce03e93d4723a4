"""Seconds per image of class-conditional drawing with blocks of 1, 4 and 16 tokens, in one run.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/class_drawing.py [--preset b] [--steps 100] [--batch 1]

The networks are those of the shipped recipes `imagenet_{b,l,h}_{1x,4x,16x}` with random weights: 256 px, 16 x 16
tokens, guidance, keys and values kept. They take turns, so that other programs on the machine disturb all alike. The
autoencoder is left out: it costs the same for all of them. On a GPU, `--dtype bfloat16 --batch 64` is the paper's case
(arXiv 2602.14041 Table 3: B-4x 24.18 and B-16x 90.26 images/s on an A100, a ratio of 3.7).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from packs import machine

from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.generate.sampler import configured_solver
from bitdance_scale.observe.cost import StepFlops, count_pack, step_flops
from bitdance_scale.parallel.still_model import StillModel
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.condition import Condition, load_condition
from bitdance_scale.sequence.layout import pack_samples
from bitdance_scale.train.run import joined_ranks
from bitdance_scale.train.sampling import BatchDrawer, sample_grid

BLOCKS = ("1x", "4x", "16x")
# The speed does not depend on how many there are, the memory does.
NUM_CLASSES = 10
PAPER = {("b", "4x"): 24.18, ("b", "16x"): 90.26}


@dataclass(frozen=True)
class Network:
    """One of the networks."""

    config: RunConfig
    condition: Condition
    model: StillModel


def make_network(preset: str, blocks: str, options: argparse.Namespace, topology: Topology) -> Network:
    """A network of a shipped recipe, with random weights."""
    settings = [f"run.dtype={options.dtype}", f"classes.num_classes={NUM_CLASSES}", "sample.prompts=[]"]
    settings += [f"sample.num_steps={options.steps}", "sample.use_cache=true", "parallel.pipeline=1"]
    config = load_config(f"imagenet_{preset}_{blocks}", settings)
    assert configured_solver(config).is_guided and sample_grid(config) == config.classes.grid
    condition = load_condition(config)
    return Network(config, condition, StillModel(config, condition.vocab_size, topology))


def draw_flops(network: Network) -> StepFlops:
    """FLOPs of an image and of its unconditional twin: the head once per solver time, the last block not read."""
    config, condition = network.config, network.condition
    sample = condition.drawing_sample(0, "0", sample_grid(config), False)
    pack = pack_samples([sample], condition.image_tokens, 1)
    head = dataclasses.replace(config.head, diff_batch_mul=len(configured_solver(config).times))
    flops = step_flops(dataclasses.replace(config, head=head), condition.vocab_size, count_pack(pack))
    return StepFlops(**{name: 2 * value for name, value in dataclasses.asdict(flops).items()})


def measure(network: Network, batch: int, number: int, topology: Topology) -> tuple[float, float]:
    """Seconds per image on the clock, and of processor time."""
    wait: Callable[[], None] = torch.cuda.synchronize if topology.device.type == "cuda" else lambda: None
    numbers = list(range(number * batch, (number + 1) * batch))
    prompts = [network.condition.prompt_ids(str(image % NUM_CLASSES)) for image in numbers]
    wait()
    clock, processor = time.perf_counter(), time.process_time()
    BatchDrawer(network.model, network.config, network.condition, topology).draw(prompts, numbers)
    wait()
    return (time.perf_counter() - clock) / batch, (time.process_time() - processor) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("b", "l", "h"), default="b")
    parser.add_argument("--steps", type=int, default=100, help="solver steps per block; default 100")
    parser.add_argument("--batch", type=int, default=1, help="images drawn together; default 1")
    parser.add_argument("--repeat", type=int, default=3, help="batches of each network; default 3")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    print(machine())
    with joined_ranks(load_config("imagenet_b_1x", []).parallel) as topology:
        networks = {name: make_network(options.preset, name, options, topology) for name in BLOCKS}
        threads = f", {torch.get_num_threads()} threads" if topology.device.type == "cpu" else ""
        print(
            f"BitDance-{options.preset.upper()}, {options.steps} steps, batch {options.batch}, {options.dtype}{threads}"
        )
        if topology.device.type == "cuda":
            for network in networks.values():
                measure(network, options.batch, 0, topology)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in BLOCKS}
        for number in range(options.repeat):
            for name, network in networks.items():
                runs[name].append(measure(network, options.batch, number, topology))
                print(f"{number} {name}: {runs[name][-1][0]:.2f} s, {runs[name][-1][1]:.2f} of processor", flush=True)
        seconds = {name: np.median(rows, axis=0) for name, rows in runs.items()}
        flops = {name: draw_flops(network) for name, network in networks.items()}
    print_table(options.preset, seconds, flops)


def print_table(preset: str, seconds: dict[str, np.ndarray], flops: dict[str, StepFlops]) -> None:
    """A table in Markdown; ratios are speeds over that of 4x, as the paper's."""
    print("| blocks | s an image | processor s | speed over 4x | of processor time | TFLOP | head | paper, A100 |")
    print("|---" * 8 + "|")
    for name, (clock, processor) in seconds.items():
        ratios = seconds["4x"] / seconds[name]
        count = flops[name]
        paper = f"{PAPER[preset, name] / PAPER[preset, '4x']:.2f}" if (preset, name) in PAPER else ""
        print(
            f"| {name} | {clock:.2f} | {processor:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} | "
            f"{count.forward / 1e12:.3f} | {count.head / count.forward:.0%} | {paper} |"
        )


if __name__ == "__main__":
    main()
