"""Block-by-block decoding with transformers' Qwen3 on one device.

Every block takes two steps of fixed shape: the backbone reads the block before, and the head solves the flow of the
next one. On CUDA each is recorded once as a graph; elsewhere they are called as they are.

Shape suffixes: B sequences, I images (B / 2 under guidance), L prefix positions, P vision tokens per block, V vision
tokens of an image, T key slots, C bits, D hidden size, K draws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Qwen3Model

from bitdance_scale.generate.block_decode import DecodeLayout, Draw
from bitdance_scale.generate.capture import CapturedCall
from bitdance_scale.generate.head_steps import HeadSteps
from bitdance_scale.generate.key_values import BLOCK_ATTENTION, KeyValues
from bitdance_scale.generate.sampler import FlowSolver, sample_block
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.positions import sincos_2d
from bitdance_scale.model.projector import Projector

# Memory is made for a multiple of so many positions, so that prompts of about one length share it and its graphs.
CAPACITY_MULTIPLE = 256
# Under a graph, attention runs over a multiple of so many slots: one graph each, and little computed in vain.
SEEN_MULTIPLE = 1024


class Qwen3Blocks:
    """A `generate.decode.BlockModel` of a Qwen3, the projector and the head, all on one device.

    Args:
        backbone: the Qwen3 without its output projection; its attention is set to `attend_blocks`.
        projector: bits to the backbone.
        head: the diffusion head.
        solver: how blocks are drawn.
        uses_graphs: whether the steps are recorded as CUDA graphs; default on CUDA.
    """

    def __init__(
        self,
        backbone: Qwen3Model,
        projector: Projector,
        head: DiffusionHead,
        solver: FlowSolver,
        uses_graphs: bool | None = None,
    ) -> None:
        self._backbone, self._projector, self._solver = backbone, projector, solver
        self._device, self._dtype = backbone.device, backbone.dtype
        self._uses_graphs = self._device.type == "cuda" if uses_graphs is None else uses_graphs
        with torch.no_grad():
            self._head_steps = HeadSteps(head, solver, self._device)
        self._memory_shape: tuple[int, int] | None = None

    @property
    def last_hidden(self) -> torch.Tensor:
        """Hidden states [B, P, D] that predict the next block; after `start`."""
        return self._hidden_BPD

    def start(self, layout: DecodeLayout) -> None:
        """Reads the prefixes [B, L]."""
        self._layout = layout
        self._backbone.set_attn_implementation(BLOCK_ATTENTION)
        # The last block is never read.
        needed = layout.position_ids.shape[1] - layout.block_tokens
        self._make_memory(layout.num_sequences, max(needed, layout.prefix_length))
        # int64 [B, 1, 1, 1], the first position of each sequence.
        self._first = (layout.document_ids < 0).sum(1)[:, None, None, None]
        self._num_read = layout.prefix_length
        rows_BLD = self._backbone.embed_tokens(layout.prefix_ids)
        slots_L = torch.arange(self._num_read, device=self._device)
        mask = self._additive(layout.mask(0, self._num_read))
        hidden = self._read(rows_BLD, layout.position_ids[:, : self._num_read], slots_L, mask)
        self._hidden_BPD = hidden[:, -layout.block_tokens :]

    def extend(self, bits: torch.Tensor, cells: torch.Tensor) -> None:
        """Reads a block, bits [I, P, C] at cells [P, 2]; under guidance by both halves of the batch."""
        start, stop = self._num_read, self._num_read + len(cells)
        self._num_read = stop
        num_seen = min(self._memory_shape[1], -(-stop // SEEN_MULTIPLE) * SEEN_MULTIPLE) if self._uses_graphs else stop
        slots_T = torch.arange(num_seen, device=self._device)
        # Everything but the padding on the left and what is not yet written.
        is_seen_B11T = (slots_T >= self._first) & (slots_T < stop)
        self._hidden_BPD = self._run(
            self._read_block,
            bits,
            cells,
            self._layout.position_ids[:, start:stop],
            torch.arange(start, stop, device=self._device),
            self._additive(is_seen_B11T),
        )

    def draw_block(self, cells: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Draws the next block of every image; float32 [I, P, C]."""
        return self._run(self._solve, self._hidden_BPD, cells, draw())

    def _read_block(
        self,
        bits_IPC: torch.Tensor,
        cells_P2: torch.Tensor,
        positions_BP: torch.Tensor,
        slots_P: torch.Tensor,
        mask_B11T: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [B, P, D] of a block; writes its keys and values to `slots_P`."""
        rows_IPD = self._projector(bits_IPC) + self._places(cells_P2)
        rows_BPD = rows_IPD.repeat(len(positions_BP) // len(rows_IPD), 1, 1)
        return self._read(rows_BPD, positions_BP, slots_P, mask_B11T)

    def _read(
        self, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        self._memory.place(slots, mask.shape[-1])
        # By position, without token ids: transformers 5.24 renamed the argument that takes the memory.
        output = self._backbone(None, {"full_attention": mask}, positions, self._memory, rows)
        return output.last_hidden_state

    def _solve(self, hidden_BPD: torch.Tensor, cells_P2: torch.Tensor, noise_KIPC: torch.Tensor) -> torch.Tensor:
        """Bits [I, P, C] of the block at the cells."""
        return sample_block(self._head_steps.bind(hidden_BPD + self._places(cells_P2)), noise_KIPC, self._solver)

    def _run(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """Calls a function, on CUDA under a graph made for inputs of these shapes."""
        if not self._uses_graphs:
            return function(*inputs)
        key = (function.__name__, *(value.shape for value in inputs))
        if key not in self._captured:
            self._captured[key] = CapturedCall(function, *inputs)
        return self._captured[key](*inputs)

    def _make_memory(self, num_sequences: int, num_positions: int) -> None:
        """Keeps the memory, and the graphs that point into it, while the batch has the same shape."""
        shape = (num_sequences, -(-num_positions // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE)
        if shape != self._memory_shape:
            # The old memory goes before the new one is made.
            self._captured: dict[tuple[object, ...], CapturedCall] = {}
            self._memory = None
            self._memory = KeyValues(self._backbone.config, *shape, self._dtype, self._device)
            self._memory_shape = shape

    def _places(self, cells_P2: torch.Tensor) -> torch.Tensor:
        return sincos_2d(cells_P2, self._backbone.config.hidden_size).to(self._dtype)

    def _additive(self, is_seen: torch.Tensor) -> torch.Tensor:
        """0 where a key is seen and minus infinity elsewhere, in the dtype of the scores."""
        return torch.zeros(is_seen.shape, dtype=self._dtype, device=self._device).masked_fill_(~is_seen, -torch.inf)
