"""The two steps of a block as a recorded graph takes them, without a GPU, and the memory they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from bitdance_scale.generate import qwen3_memory
from bitdance_scale.generate.block_decode import DecodeLayout, decode_blocks, lay_out
from bitdance_scale.generate.published_model import PublishedModel
from bitdance_scale.generate.qwen3_blocks import Qwen3Blocks
from bitdance_scale.generate.sampler import FlowSolver, GeneratorNoise

SOLVER = FlowSolver(3, guidance=2.0)
GRID = (8, 12)
CPU = torch.device("cpu")


class StandInForCapture:
    """Does what `CapturedCall` does, without a graph: runs the function first, keeps buffers, refuses other shapes."""

    made: ClassVar[list[str]] = []

    def __init__(self, function, *examples):
        self.made.append(function.__name__)
        self._function, self._inputs = function, [example.clone() for example in examples]
        for _ in range(2):
            function(*self._inputs)

    def __call__(self, *inputs):
        for buffer, value in zip(self._inputs, inputs, strict=True):
            assert buffer.shape == value.shape and buffer.dtype == value.dtype
            buffer.copy_(value)
        return self._function(*self._inputs).clone()


class FakeCuda:
    """The current device and stream, and what ran where: ("warm-up", "capture" or "replay", device, stream)."""

    def __init__(self) -> None:
        self.device, self.streams, self.capturing = "cuda:0", {}, False
        self.ran: list[tuple[str, str, str]] = []

    def current_stream(self) -> Mock:
        return self.streams.get(self.device) or self.stream_of("default")

    def stream_of(self, kind: str) -> Mock:
        stream = Mock()
        stream.name, stream.device = f"{kind} of {self.device}", self.device
        return stream

    @contextlib.contextmanager
    def switch(self, device: object) -> Iterator[None]:
        before, self.device = self.device, str(device)
        yield
        self.device = before

    @contextlib.contextmanager
    def stream(self, stream: Mock) -> Iterator[None]:
        with self.switch(stream.device):
            self.streams[self.device] = stream
            yield
            del self.streams[self.device]

    @contextlib.contextmanager
    def graph(self, graph: Mock, stream: Mock) -> Iterator[None]:
        graph.replay = lambda: self.tell("replay")
        self.capturing = True
        with self.stream(stream):
            yield
        self.capturing = False

    def tell(self, what: str) -> None:
        self.ran.append((what, self.device, self.current_stream().name))


def test_a_graph_is_recorded_and_run_on_the_device_of_its_inputs(monkeypatch):
    cuda = FakeCuda()
    for name, stand_in in {
        "device": cuda.switch,
        "current_stream": cuda.current_stream,
        "Stream": lambda: cuda.stream_of("side"),
        "stream": cuda.stream,
        "CUDAGraph": Mock,
        "graph": cuda.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def function(value: torch.Tensor) -> torch.Tensor:
        cuda.tell("capture" if cuda.capturing else "warm-up")
        return value + 1

    # The device of no numbers in place of a second GPU.
    call = qwen3_memory.CapturedCall(function, torch.zeros(3, device="meta"))
    assert cuda.ran == [("warm-up", "meta", "side of meta")] * 2 + [("capture", "meta", "side of meta")]
    assert call(torch.ones(3, device="meta")).shape == (3,)
    assert cuda.ran[3:] == [("replay", "meta", "default of meta")] and cuda.device == "cuda:0"


def layout_of(model: PublishedModel, *prompts: str) -> DecodeLayout:
    rows = [model.text.prompt_ids(prompt) for prompt in prompts] + [model.text.unconditional_ids()] * len(prompts)
    return lay_out(rows, GRID, model.text.image_tokens, CPU)


def draw(model: PublishedModel, blocks: Qwen3Blocks, seed: int, *prompts: str) -> torch.Tensor:
    numbers = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    noise = GeneratorNoise(numbers, len(prompts), (SOLVER.num_draws, 16, 16), CPU)
    return decode_blocks(blocks, layout_of(model, *prompts), noise)


def make(model: PublishedModel, use_graphs: bool) -> Qwen3Blocks:
    return Qwen3Blocks(model.backbone, model.projector, model.head, SOLVER, use_graphs)


@pytest.mark.parametrize("seen_multiple", [32, 1024])
def test_steps_of_fixed_shape_draw_the_same_bits(model, monkeypatch, seen_multiple):
    monkeypatch.setattr(qwen3_memory, "CapturedCall", StandInForCapture)
    monkeypatch.setattr(qwen3_memory, "SEEN_MULTIPLE", seen_multiple)
    StandInForCapture.made.clear()
    plain, fixed = make(model, False), make(model, True)
    first = draw(model, fixed, 1, "a red circle", "two blue squares")
    assert torch.equal(first, draw(model, plain, 1, "a red circle", "two blue squares"))
    num_captures = len(StandInForCapture.made)
    # Five blocks are read; attention runs over so many slots after each.
    prefix = layout_of(model, "a red circle", "two blue squares").prefix_length
    seen = {min(-(-(prefix + 16 * read) // seen_multiple) * seen_multiple, 256) for read in range(1, 6)}
    assert len(seen) == (3 if seen_multiple == 32 else 1)
    assert StandInForCapture.made.count("_solve") == 1
    assert StandInForCapture.made.count("_read_block") == len(seen)
    # Other prompts that fill the same slots, and the first ones again: nothing is recorded again, nothing is left over.
    second = draw(model, fixed, 5, "two blue squares", "a")
    assert torch.equal(second, draw(model, plain, 5, "two blue squares", "a"))
    assert torch.equal(draw(model, fixed, 1, "a red circle", "two blue squares"), first)
    assert len(StandInForCapture.made) == num_captures
    draw(model, fixed, 1, "a red circle")
    assert len(StandInForCapture.made) > num_captures


def test_hidden_states_do_not_depend_on_padding(model):
    """The prompt alone, and in a batch with a longer one, which pads it on the left."""
    states = []
    for prompts in (["a"], ["a", "two blue squares and a red circle"]):
        blocks = Qwen3Blocks(model.backbone, model.projector, model.head, SOLVER)
        layout = layout_of(model, *prompts)
        with torch.no_grad():
            blocks.start(layout)
            rows = [blocks.last_hidden[0]]
            bits = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], size=(1, 16, 16))).float()
            for cells in layout.cells.split(16)[:-1]:
                blocks.extend(bits.expand(len(prompts), -1, -1), cells)
                rows.append(blocks.last_hidden[0])
        states.append(torch.stack(rows))
    # float32 rounding of four layers with outputs of order 1; a wrong mask or position shows at 1e-1.
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=2e-5)


def test_another_attention_set_in_between_does_not_matter(model):
    """Another user of the same model may have set transformers' own attention in between."""
    blocks = make(model, False)
    expected = draw(model, blocks, 1, "a red circle")
    model.backbone.set_attn_implementation("sdpa")
    assert torch.equal(draw(model, blocks, 1, "a red circle"), expected)
