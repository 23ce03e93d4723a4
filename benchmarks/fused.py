"""Times the elementwise parts of a layer and of the head, forward and backward: compiled against uncompiled, in turns.

OMP_NUM_THREADS=1 python benchmarks/fused.py --positions 2048
python benchmarks/fused.py --positions 8192 --device cuda --dtype bfloat16

Sizes are those of the 0.6B on one rank. Products and attention are left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from packs import machine
from torch._dynamo.utils import counters

from bitdance_scale.model import fused_autograd as operations

WIDTH, FFN, HEADS, GROUPS, HEAD_DIM, HEAD_FFN, EPS = 1024, 3072, 16, 8, 128, 1536, 1e-6
Operation = Callable[..., tuple[torch.Tensor, ...]]


def cases(num_positions: int) -> dict[str, tuple[Operation, list[tuple[int, ...]]]]:
    """Operation and shapes of its arguments, by name; the last argument of an operation is `is_compiled`."""
    stream, channel = (num_positions, 1, WIDTH), (WIDTH,)
    table = torch.rand(num_positions, 1, HEAD_DIM)
    stacked = (num_positions, 1, (HEADS + 2 * GROUPS) * HEAD_DIM)

    def turn(rows: torch.Tensor, query: torch.Tensor, key: torch.Tensor, is_compiled: bool) -> tuple[torch.Tensor, ...]:
        turning = table.to(rows)
        return operations.turn_heads(rows, turning, (query, key), EPS, GROUPS, False, is_compiled)

    return {
        "residual and norm": (
            lambda x, added, weight, on: operations.stream_rms_norm(x, added, weight, EPS, on),
            [stream, stream, channel],
        ),
        "norm and rotation of heads": (turn, [stacked, (HEAD_DIM,), (HEAD_DIM,)]),
        "SwiGLU": (lambda x, on: (operations.swiglu(x, on),), [(num_positions, 1, 2 * FFN)]),
        "gated residual and modulated norm": (
            lambda x, gate, added, weight, bias, scale, shift, on: operations.gated_add_norm(
                x, gate, added, (weight, bias), (scale, shift), EPS, on
            ),
            [stream, stream, stream, channel, channel, stream, stream],
        ),
    }


def run(operation: Operation, inputs: list[torch.Tensor], is_compiled: bool) -> float:
    """Seconds of a forward and a backward pass."""
    begun = time.perf_counter()
    results = operation(*inputs, is_compiled)
    torch.autograd.grad(results, inputs, [torch.ones_like(result) for result in results])
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args()
    print(machine())
    sums = np.zeros(2)
    for name, (operation, shapes) in cases(options.positions).items():
        inputs = [
            torch.randn(shape, device=options.device, dtype=getattr(torch, options.dtype), requires_grad=True)
            for shape in shapes
        ]
        before = counters["stats"]["unique_graphs"]
        first_s = run(operation, inputs, True)
        num_graphs = counters["stats"]["unique_graphs"] - before
        times = [[run(operation, inputs, on) for on in (False, True)] for _ in range(options.rounds)]
        plain, compiled = np.median(times, axis=0)
        sums += plain, compiled
        print(
            f"{name}: {1e3 * plain:.1f} ms uncompiled, {1e3 * compiled:.1f} ms compiled, ratio {plain / compiled:.2f}; "
            f"{num_graphs} compilations in {first_s:.0f} s"
        )
    print(f"together: {1e3 * sums[0]:.1f} ms and {1e3 * sums[1]:.1f} ms, ratio {sums[0] / sums[1]:.2f}")


if __name__ == "__main__":
    main()
