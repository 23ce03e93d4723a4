"""A function of tensors recorded as a CUDA graph: one launch instead of thousands.

Decoding calls the same two functions with the same shapes for every block of an image, and their kernels are short, so
that launching them one by one from Python would take longer than running them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Libraries choose kernels and allocate workspaces in the first calls, which a recording must not contain.
NUM_WARM_UPS = 2


class CapturedCall:
    """A function under a CUDA graph, for inputs of the shapes and dtypes of `examples`.

    The function is run on the examples before it is recorded, more than once: what it writes besides its result must
    depend on its inputs only. It must not wait for the GPU or draw random numbers.
    """

    def __init__(self, function: Callable[..., torch.Tensor], *examples: torch.Tensor) -> None:
        self._inputs = [example.clone(memory_format=torch.contiguous_format) for example in examples]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(NUM_WARM_UPS):
                function(*self._inputs)
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The function of `inputs`, in memory of its own."""
        for buffer, value in zip(self._inputs, inputs, strict=True):
            buffer.copy_(value)
        self._graph.replay()
        return self._output.clone()
