"""Time per image of generation against a literal implementation of the method, with the same weights in one run.

    python benchmarks/generation.py                                        a small random model on the CPU
    python benchmarks/generation.py --folder FOLDER --height 512 --width 512
    python benchmarks/generation.py --model qwen3-14b --height 1024 --width 1024 --block-side 8 --device cuda

The baseline is `literal_generation.py`. Both draw from the same noise, and in float32 both must give the same bits.
Work done once per size (memory, graphs) is left out of the times and printed by itself. The breakdown waits for the
device after each part, so its sum is a little more than the time per image.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from literal_generation import draw_literally
from packs import machine
from transformers import AutoModel, Qwen3Model

from bitdance_scale.config.presets import PRESETS
from bitdance_scale.config.schema import HeadSection, ModelSection, VisionSection
from bitdance_scale.generate.block_decode import DecodeLayout, Draw, decode_blocks, lay_out
from bitdance_scale.generate.image_sizes import check_size
from bitdance_scale.generate.published_model import PublishedModel, load_published, qwen3_config
from bitdance_scale.generate.qwen3_blocks import Qwen3Blocks
from bitdance_scale.generate.sampler import FlowSolver, GeneratorNoise
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.linears import PlainLinears
from bitdance_scale.model.projector import Projector
from bitdance_scale.sequence.layout import ImageTokens
from bitdance_scale.vision.autoencoder import Autoencoder, published_config
from bitdance_scale.vision.tokenizer import VisionTokenizer
from bitdance_scale.vision.weights import WEIGHTS_NAME, save_weights

# A fifth as deep and a tenth as wide as the 14B model, with its proportions of backbone and head.
SMALL = ModelSection(num_layers=8, hidden_size=512, num_heads=8, num_kv_heads=2, head_dim=64, ffn_size=1536)
SMALL_HEAD = HeadSection(width=512, head_dim=64)
SMALL_VISION = {"channels": 32, "num_res_blocks": 1}
# Tokens of the prompt and of the unconditional one; a random model needs no more entries.
PROMPT_LENGTHS = (60, 3)
VOCAB_SIZE = 2048


@dataclass(frozen=True)
class Task:
    """What is drawn: the prompt's and the unconditional ids, grid, solver, and the seed of the noise."""

    prompts: list[np.ndarray]
    grid: tuple[int, int]
    solver: FlowSolver

    def noise(self, model: PublishedModel, seed: int) -> GeneratorNoise:
        """The noise of one image."""
        vision = model.vision.section
        shape = (self.solver.num_draws, vision.block_tokens, vision.num_bits)
        return GeneratorNoise([torch.Generator().manual_seed(seed)], 1, shape, model.backbone.device)


class TimedBlocks:
    """A block model that times its parts and waits for the device after each."""

    def __init__(self, blocks: Qwen3Blocks, wait: Callable[[], None]) -> None:
        self._blocks, self._wait = blocks, wait
        self.seconds: dict[str, float] = defaultdict(float)

    def start(self, layout: DecodeLayout) -> None:
        self._timed("prefix", self._blocks.start, layout)

    def draw_block(self, cells: torch.Tensor, draw: Draw) -> torch.Tensor:
        noise = self._timed("noise", draw)
        return self._timed("head", self._blocks.draw_block, cells, lambda: noise)

    def extend(self, bits: torch.Tensor, cells: torch.Tensor) -> None:
        self._timed("backbone", self._blocks.extend, bits, cells)

    def _timed(self, name: str, function: Callable[..., object], *inputs: object) -> object:
        self._wait()
        begun = time.perf_counter()
        result = function(*inputs)
        self._wait()
        self.seconds[name] += time.perf_counter() - begun
        return result


def random_model(name: str, block_side: int, dtype: torch.dtype, device: torch.device) -> PublishedModel:
    """Random weights; the published autoencoder for Qwen3's sizes, a small one for `small` and `demo`."""
    torch.manual_seed(0)
    if name == "small":
        section, head_section, vision_sizes = SMALL, SMALL_HEAD, SMALL_VISION
    else:
        section, head_section, vision_sizes = (
            ModelSection(**PRESETS[name]["model"]),
            HeadSection(**PRESETS[name]["head"]),
            SMALL_VISION if name == "demo" else {},
        )
    vision = VisionSection(weights="", block_side=block_side, **vision_sizes)
    backbone, projector, head = random_networks(section, head_section, vision, VOCAB_SIZE, dtype, device)
    sizes = {key: getattr(vision, key) for key in ("num_bits", "channels", "channel_mult", "num_res_blocks")}
    with tempfile.TemporaryDirectory() as folder:
        save_weights(folder, Autoencoder(**sizes).state_dict(), published_config(**sizes))
        vision = VisionSection(weights=f"{folder}/{WEIGHTS_NAME}", block_side=block_side, **vision_sizes)
        tokenizer = VisionTokenizer(vision, device, dtype=dtype)
    tokens = ImageTokens(1, 2, resolution=tuple(range(10, 266)), queries=tuple(range(300, 299 + block_side**2)))
    return PublishedModel(backbone, projector, head, tokenizer, SimpleNamespace(image_tokens=tokens))


def random_networks(
    section: ModelSection,
    head_section: HeadSection,
    vision: VisionSection,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Qwen3Model, Projector, DiffusionHead]:
    """The networks of a published model with random weights."""
    with torch.device(device):
        config = qwen3_config(section, vocab_size)
        backbone = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
        head = DiffusionHead(head_section, section.hidden_size, vision.num_bits, vision.block_tokens, PlainLinears())
        projector = Projector(vision.num_bits, section.hidden_size, PlainLinears())
    for module in (backbone, projector.to(dtype), head.to(dtype)):
        module.eval().requires_grad_(False)
    return backbone, projector, head


def waiter(device: torch.device) -> Callable[[], None]:
    """The function that waits for the device to finish its work."""
    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def measure(function: Callable[[], torch.Tensor], wait: Callable[[], None]) -> tuple[float, float, torch.Tensor]:
    """(seconds on the clock, seconds of processor time, result) of one call."""
    wait()
    clock, processor = time.perf_counter(), time.process_time()
    result = function()
    wait()
    return time.perf_counter() - clock, time.process_time() - processor, result


def compare(model: PublishedModel, task: Task, num_images: int, has_baseline: bool) -> None:
    """Prints the seconds per image of both, their ratio, and the breakdown of ours."""
    device, vision = model.backbone.device, model.vision
    wait = waiter(device)
    num_blocks = task.grid[0] * task.grid[1] // vision.section.block_tokens
    blocks = Qwen3Blocks(model.backbone, model.projector, model.head, task.solver)

    def layout() -> DecodeLayout:
        return lay_out(task.prompts, task.grid, model.text.image_tokens, device)

    def ours(seed: int) -> torch.Tensor:
        bits = decode_blocks(blocks, layout(), task.noise(model, seed))
        vision.decode(bits[0], task.grid)
        return bits

    def literal(seed: int) -> torch.Tensor:
        draw, solver = task.noise(model, seed), task.solver
        noise = [draw() for _ in range(num_blocks)]
        bits = draw_literally(model, task.prompts, task.grid, noise, solver.num_steps, solver.guidance)
        vision.decode(bits[0], task.grid)
        return bits

    ways = {"generate": ours} | ({"literal": literal} if has_baseline else {})
    # They take turns image by image, so that other programs on the machine disturb both alike.
    runs = {name: [] for name in ways}
    for seed in range(1 + num_images):
        for name, way in ways.items():
            runs[name].append(measure(functools.partial(way, seed), wait))
    medians = {name: [float(np.median([run[i] for run in runs[name][1:]])) for i in (0, 1)] for name in ways}
    for name, (clock, processor) in medians.items():
        print(
            f"{name}: {clock:.3f} s an image on the clock, {processor:.3f} s of processor time "
            f"(medians of {num_images}); the first of its size {runs[name][0][0]:.3f} s"
        )
    if has_baseline:
        ratios = [medians["literal"][i] / medians["generate"][i] for i in (0, 1)]
        print(f"literal over generate: {ratios[0]:.2f} on the clock, {ratios[1]:.2f} of processor time")
        pairs = [(run[2], other[2]) for run, other in zip(runs["generate"], runs["literal"], strict=True)]
        share = float(np.mean([(one == other).float().mean().item() for one, other in pairs]))
        print(f"equal bits: {share:.6f} of {sum(one.numel() for one, _ in pairs)}")
        if model.backbone.dtype is torch.float32 and device.type == "cpu" and share < 1:
            sys.exit("error: the same weights and noise must give the same bits in float32")
    timed = TimedBlocks(blocks, wait)
    bits = decode_blocks(timed, layout(), task.noise(model, 0))
    seconds, _, _ = measure(lambda: vision.decode(bits[0], task.grid), wait)
    parts = timed.seconds | {"autoencoder": seconds}
    total = sum(parts.values())
    print("breakdown: " + ", ".join(f"{name} {value:.3f} s ({value / total:.0%})" for name, value in parts.items()))
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--folder", help="published folder")
    source.add_argument("--model", default="small", help="small, or a preset such as qwen3-14b; random weights")
    parser.add_argument("--prompt", default="a red circle left of two blue squares", help="with --folder")
    parser.add_argument("--block-side", type=int, default=4, help="p of a random model; default 4")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--images", type=int, default=3, help="images measured after the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default bfloat16 on CUDA, else float32")
    parser.add_argument("--no-baseline", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    print(machine())
    if arguments.folder:
        model = load_published(arguments.folder, dtype, device)
        prompts = [model.text.prompt_ids(arguments.prompt), model.text.unconditional_ids()]
    else:
        model = random_model(arguments.model, arguments.block_side, dtype, device)
        numbers = np.random.default_rng(0)
        prompts = [numbers.integers(600, VOCAB_SIZE, size=length) for length in PROMPT_LENGTHS]
    grid = check_size(arguments.height, arguments.width, model.vision.section)
    num_threads = torch.get_num_threads() if device.type == "cpu" else 0
    size = f"{arguments.height} x {arguments.width} px"
    print(f"{arguments.folder or arguments.model}, {size}, {dtype}, {num_threads} threads")
    compare(
        model,
        Task(prompts, grid, FlowSolver(arguments.steps, arguments.guidance)),
        arguments.images,
        not arguments.no_baseline,
    )


if __name__ == "__main__":
    main()
