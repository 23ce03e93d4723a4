"""Block-by-block decoding with transformers' Qwen3 on one device.

Every block takes two steps of fixed shape: the backbone reads the block before, and the head solves the flow of the
next block. On CUDA each step is recorded once as a graph; elsewhere they are plain calls (`qwen3_memory.py`).

Shape suffixes: B sequences, I images (B / 2 under guidance), L prefix positions, P vision tokens per block, K draws,
C bits, T key slots, D hidden size.
"""

from __future__ import annotations

import torch
from transformers import Qwen3Model

from bitdance_scale.generate.block_decode import DecodeLayout, Draw, SeenKeys
from bitdance_scale.generate.qwen3_memory import Qwen3Reader
from bitdance_scale.generate.sampler import FlowSolver, HeadSteps, sample_block
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.projector import Projector


class Qwen3Blocks:
    """A `generate.block_decode.BlockModel` of a Qwen3, the projector and the head, all on one device.

    Args:
        backbone: the Qwen3 without its output projection; its attention is set to `attend_blocks`.
        projector: from bits to hidden states.
        head: the diffusion head.
        solver: how blocks are drawn.
        use_graphs: whether the steps are recorded as CUDA graphs; default on CUDA.
    """

    def __init__(
        self,
        backbone: Qwen3Model,
        projector: Projector,
        head: DiffusionHead,
        solver: FlowSolver,
        use_graphs: bool | None = None,
    ) -> None:
        self._reader, self._solver = Qwen3Reader(backbone, projector, use_graphs), solver
        with torch.no_grad():
            self._head_steps = HeadSteps(head, solver, self._reader.device)

    @property
    def last_hidden(self) -> torch.Tensor:
        """Hidden states [B, P, D] that predict the next block; after `start`."""
        return self._hidden_BPD

    def start(self, layout: DecodeLayout) -> None:
        """Reads the prefixes [B, L]."""
        self._layout, reader = layout, self._reader
        reader.start(layout.num_sequences, layout.num_read)
        self._seen = SeenKeys(layout, reader.capacity, reader.dtype)
        self._num_read = length = layout.prefix_length
        rows_BLD = reader.backbone.embed_tokens(layout.prefix_ids)
        hidden = reader.read(rows_BLD, layout.position_ids[:, :length], reader.slots[:length], self._seen.prefix())
        self._hidden_BPD = hidden[:, -layout.block_tokens :]

    def extend(self, bits: torch.Tensor, cells: torch.Tensor) -> None:
        """Reads a block, bits [I, P, C] at cells [P, 2]; under guidance by both halves of the batch."""
        start, stop = self._num_read, self._num_read + len(cells)
        self._num_read = stop
        self._hidden_BPD = self._reader.run(
            self._read_block,
            bits,
            cells,
            self._layout.position_ids[:, start:stop],
            self._reader.slots[start:stop],
            self._seen.block(start, stop, self._reader.num_seen(stop)),
        )

    def draw_block(self, cells: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Draws the next block of every image; float32 [I, P, C]."""
        return self._reader.run(self._solve, self._hidden_BPD, cells, draw())

    def _read_block(
        self,
        bits_IPC: torch.Tensor,
        cells_P2: torch.Tensor,
        positions_BP: torch.Tensor,
        slots_P: torch.Tensor,
        mask_B11T: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [B, P, D] of a block; writes its keys and values to `slots_P`."""
        rows_IPD = self._reader.embed_bits(bits_IPC, cells_P2)
        rows_BPD = rows_IPD.repeat(len(positions_BP) // len(rows_IPD), 1, 1)
        return self._reader.read(rows_BPD, positions_BP, slots_P, mask_B11T)

    def _solve(self, hidden_BPD: torch.Tensor, cells_P2: torch.Tensor, noise_KIPC: torch.Tensor) -> torch.Tensor:
        """Bits [I, P, C] of the block at the cells."""
        condition_BPD = hidden_BPD + self._reader.places(cells_P2)
        return sample_block(self._head_steps.bind(condition_BPD), noise_KIPC, self._solver)
