"""Measures a machine's constants: one GPU, or one core of a processor, and messages between two processes of it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn import functional

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.load import dump_toml, load_config
from bitdance_scale.data.plan.synthetic_packs import typical_packs
from bitdance_scale.float32_products import PRECISIONS, float32_products
from bitdance_scale.model.attention import pack_mask
from bitdance_scale.observe.cost import peak_flops
from bitdance_scale.planning.machine import Constant, Machine
from bitdance_scale.sequence.visibility import count_visible_pairs

_REPEATS = 5
_MESSAGE_TIMEOUT_S = 120


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of what is measured: those of the 14B model for a GPU, of the layout benchmark for a core.

    Attributes:
        product: rows, inner and outer width.
        moved_elements: float32 elements of a tensor.
        image_px: side of an image.
        message_elements: float32 elements of an all-reduce.
    """

    product: tuple[int, int, int]
    moved_elements: int
    image_px: int
    message_elements: int


_GPU = _Sizes(product=(8192, 5120, 8704), moved_elements=2**27, image_px=512, message_elements=2**25)
_CORE = _Sizes(product=(1024, 256, 768), moved_elements=2**19, image_px=64, message_elements=2**19)
_ENCODER_CHANNELS = 128
_KERNELS = 1000
_NUM_MESSAGES = 10


def calibrate(base: Machine, file: Path) -> str:
    """Measures what this machine can do and writes it as a machine file; returns what was measured, in lines.

    Constants that cannot be measured here keep the value and source of `base`: the network between nodes, reserved
    memory, the overlap of messages, and with one GPU the connection within a node.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    measured = measure(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "one core of this machine"
    source = f"measured by bitdance plan --calibrate on {name}, torch {torch.__version__}"
    changed: dict[str, Any] = {key: Constant(value=value, source=source) for key, value in measured.items()}
    if device.type == "cpu":
        # What is measured is already what is reached.
        reached = Constant(value=1.0, source="the rates of this file are what was reached")
        names = ("gemm_fraction", "encoder_fraction", "memory_fraction", "node_fraction")
        changed |= dict.fromkeys(names, reached)
        libraries = "assumed: the interpreter with PyTorch and the engines"
        changed["reserved_gib"] = Constant(value=min(0.75, measured["memory_gib"] / 2), source=libraries)
        changed["overlap_fraction"] = Constant(value=0.0, source="gloo's messages take the core that computes")
        changed |= {"name": "one processor core", "device": "cpu"}
    machine = dataclasses.replace(base, **changed)
    write_text(
        file, f"# {source[0].upper()}{source[1:]}; what was not measured is of {base.name}.\n\n{dump_toml(machine)}"
    )
    lines = [f"{key} = {value:.4g}" for key, value in measured.items()]
    return "\n".join([f"{name}:", *lines, f"Written to {file}; use it with --gpu {file}."])


def measure(device: torch.device) -> dict[str, float]:
    """The constants that one device, or two processes on it, can show; by the names of `Machine`.

    A GPU keeps the peaks of its data sheet, of which the utilisation is a share, where `observe/cost.py` knows them.
    """
    sizes = _GPU if device.type == "cuda" else _CORE
    found = _measure_core(device, sizes) if device.type == "cpu" else _measure_gpu(device, sizes)
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        rate, message_s = measure_messages(device.type, sizes.message_elements)
        found |= {"node_bytes_per_s": rate, "message_s": message_s}
        if device.type == "cuda":
            found["node_fraction"] = 1.0
    return found


def _measure_core(device: torch.device, sizes: _Sizes) -> dict[str, float]:
    products = product_rate(device, torch.float32, sizes.product)
    attention = attention_rate(device, torch.float32, "demo")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "memory_gib": memory_bytes / (os.cpu_count() or 1) / 2**30,
        "gemm_halved_fraction": halved_fraction(device, torch.float32, sizes.product),
        "attention_fraction": min(1.0, attention / products),
        "bfloat16_flops": products,
        "float32_flops": products,
        **{f"encoder_{name}_flops": encoder_rate(device, sizes.image_px, name) for name in PRECISIONS},
        "memory_bytes_per_s": moved_rate(device, sizes.moved_elements),
        "kernel_gap_s": kernel_s(device),
        "kernel_launch_s": 0.0,
    }


def _measure_gpu(device: torch.device, sizes: _Sizes) -> dict[str, float]:
    """Rates with a fraction of 1, but for products and attention, which are shares of the peak."""
    name = torch.cuda.get_device_name()
    products = product_rate(device, torch.bfloat16, sizes.product)
    attention = attention_rate(device, torch.bfloat16, "pt_14b")
    peak = peak_flops(name, "bfloat16")
    found = {
        **{f"encoder_{name}_flops": encoder_rate(device, sizes.image_px, name) for name in PRECISIONS},
        "encoder_fraction": 1.0,
        "memory_bytes_per_s": moved_rate(device, sizes.moved_elements),
        "memory_fraction": 1.0,
        "kernel_launch_s": kernel_s(device),
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30,
    }
    if peak is None:
        peak = products
        found["bfloat16_flops"] = peak
    found["gemm_halved_fraction"] = halved_fraction(device, torch.bfloat16, sizes.product)
    return found | {"gemm_fraction": min(1.0, products / peak), "attention_fraction": attention / peak}


def seconds_of(action: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Seconds of one call in the fastest of five rounds of `count` calls, after one call to warm up.

    On a processor they are its own seconds, which other programs disturb less than the clock's.
    """
    return _fastest(action, device, count, time.perf_counter if device.type == "cuda" else time.process_time)


def _fastest(action: Callable[[], object], device: torch.device, count: int, clock: Callable[[], float]) -> float:
    action()
    rounds = []
    for _ in range(_REPEATS):
        _wait(device)
        begun = clock()
        for _ in range(count):
            action()
        _wait(device)
        rounds.append((clock() - begun) / count)
    return min(rounds)


def product_rate(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int]) -> float:
    """FLOP/s of a product of so many rows, inner and outer width."""
    rows, inner, outer = size
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, outer, device=device, dtype=dtype)
    return 2 * rows * inner * outer / seconds_of(lambda: left @ right, device, 3)


def halved_fraction(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int]) -> float:
    """What is left of the rate of products when a width is halved, as by twice the tensor-parallel ranks; at most 1.

    The mean of halving the outer width (column-parallel) and the inner one (row-parallel).
    """
    rows, inner, outer = size
    column = product_rate(device, dtype, (rows, inner, outer // 2)) / product_rate(device, dtype, size)
    row = product_rate(device, dtype, (rows, outer // 2, inner)) / product_rate(device, dtype, (rows, outer, inner))
    return min(1.0, (column + row) / 2)


def attention_rate(device: torch.device, dtype: torch.dtype, config_name: str) -> float:
    """FLOP/s of the backbone's attention under the mask of a typical pack, over pairs that see each other.

    Args:
        device: where.
        dtype: of queries, keys and values.
        config_name: a shipped configuration, whose packs and heads are taken.
    """
    config = load_config(config_name)
    model, pack = config.model, typical_packs(config, num_replicas=1)[0]
    mask = pack_mask(pack.document_ids, pack.block_ids, model, device)

    def heads(number: int) -> torch.Tensor:
        return torch.randn(pack.num_positions, 1, number, model.head_dim, device=device, dtype=dtype)

    query, key, value = heads(model.num_heads), heads(model.num_kv_heads), heads(model.num_kv_heads)
    pairs = count_visible_pairs(pack.document_ids, pack.block_ids)
    return 4 * model.num_heads * model.head_dim * pairs / seconds_of(lambda: mask.attend(query, key, value), device, 3)


def encoder_rate(device: torch.device, image_px: int, precision: str) -> float:
    """FLOP/s of a 3 x 3 convolution of float32, with the precision `float32` or `tf32`."""
    image = torch.randn(1, _ENCODER_CHANNELS, image_px, image_px, device=device)
    weight = torch.randn(_ENCODER_CHANNELS, _ENCODER_CHANNELS, 3, 3, device=device)
    flops = 2 * 9 * _ENCODER_CHANNELS**2 * image_px**2
    with float32_products(precision):
        return flops / seconds_of(lambda: functional.conv2d(image, weight, padding=1), device, 3)


def moved_rate(device: torch.device, num_elements: int) -> float:
    """Bytes/s that a sum of two tensors reads and writes."""
    left, right = (torch.randn(num_elements, device=device) for _ in range(2))
    return 3 * left.nbytes / seconds_of(lambda: left + right, device, 3)


def kernel_s(device: torch.device) -> float:
    """Seconds to start a kernel that does next to nothing."""
    tensor = torch.zeros(1, device=device, requires_grad=True)
    return seconds_of(lambda: tensor + 1, device, _KERNELS)


def measure_messages(device_type: str, num_elements: int) -> tuple[float, float]:
    """(bytes/s of a rank's link, fixed seconds) of all-reduces between two processes of this machine."""
    context = torch.multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_exchange, args=(rank, port, device_type, num_elements, sending)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        if not receiving.poll(_MESSAGE_TIMEOUT_S):
            raise TimeoutError(f"two processes exchanged nothing within {_MESSAGE_TIMEOUT_S} s")
        large_s, small_s = receiving.recv()
    finally:
        for process in processes:
            process.terminate()
            process.join()
    # An all-reduce between two ranks sends as many bytes as the tensor has over each link.
    return 4 * num_elements / max(large_s - small_s, 1e-9), small_s / 2


def _exchange(rank: int, port: int, device_type: str, num_elements: int, sending: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=_MESSAGE_TIMEOUT_S),
    )
    # The clock's seconds: a message is mostly waiting.
    seconds = [
        _fastest(functools.partial(dist.all_reduce, message), device, _NUM_MESSAGES, time.perf_counter)
        for message in (torch.zeros(num_elements, device=device), torch.zeros(1, device=device))
    ]
    dist.barrier()
    if rank == 0:
        sending.send(seconds)
    dist.destroy_process_group()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
