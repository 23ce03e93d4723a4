"""Decoding with the model that is being trained, under any tensor and pipeline layout and ZeRO stage.

All ranks of a replica call the same methods in the same order. Hidden states travel down the pipeline; the last stage
draws the bits and broadcasts them. Tensor-parallel ranks draw the same noise and hence the same bits.

Shape suffixes: S new positions, B sequences, I images, R blocks that are drawn or read (I; B where every sequence has
its own), P vision tokens per block, C bits, D hidden size, K draws.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import TransformerBlock

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.generate.block_decode import DecodeLayout, Draw, SeenKeys
from bitdance_scale.generate.sampler import BlockSampler, block_sampler, configured_solver
from bitdance_scale.model.key_values import KeyValueMemory
from bitdance_scale.model.positions import cell_rotary, rotary_frequencies, rotary_table
from bitdance_scale.parallel.backbone import use_memory, whole_sequences
from bitdance_scale.parallel.still_model import StageHolder
from bitdance_scale.parallel.topology import Topology


class StageDecoder:
    """A `BlockModel` (`generate/block_decode.py`) over the stages of a pipeline rank.

    With `sample.use_cache` the keys and values of every layer are kept and only new positions are computed; without it
    the whole sequence is computed again for every block. It is entered for every batch, and what batches have in common
    stays: the memory of keys and values for batches of one shape, and the head's sampler. The weights must not change.
    """

    def __init__(self, model: StageHolder, config: RunConfig, topology: Topology) -> None:
        self._model, self._config, self._topology = model, config, topology
        self._first, self._last = model.stages[0], model.stages[-1]
        self._solver = configured_solver(config)
        self._sampler: BlockSampler | None = None
        self._memory: KeyValueMemory | None = None
        self._embedded: list[torch.Tensor] = []
        self._hidden: torch.Tensor | None = None
        self._own_bits: torch.Tensor | None = None

    @property
    def last_hidden(self) -> torch.Tensor | None:
        """Hidden states [P, B, D] that predict the next block; None before `start` and on all stages but the last."""
        return self._hidden

    def __enter__(self) -> StageDecoder:
        if self._model.tied is not None:
            self._model.tied.share_weight()
        self._contexts = contextlib.ExitStack()
        self._contexts.enter_context(torch.no_grad())
        for stage in self._model.stages:
            self._contexts.enter_context(whole_sequences(stage))
        return self

    def __exit__(self, *_: object) -> None:
        use_memory(self._backbones, None)
        self._embedded = []
        self._contexts.close()

    def start(self, layout: DecodeLayout) -> None:
        """Reads the prefixes [B, L]."""
        self._layout = layout
        self._num_read, self._embedded, self._own_bits = 0, [], None
        if self._last.is_last and self._sampler is None:
            self._sampler = block_sampler(
                self._last.head, self._solver, self._topology.device, self._config.vision.latents
            )
        if self._config.sample.use_cache:
            memory = self._make_memory(layout)
            use_memory(self._backbones, memory)
            _, capacity = memory.shape
            self._slots_T = torch.arange(capacity, device=self._topology.device)
            self._seen = SeenKeys(layout, capacity, self._first.config.params_dtype)
        rows = self._first.enter(self._first.embed_tokens(layout.prefix_ids)) if self._first.is_first else None
        self._read(rows, layout.prefix_length)

    def extend(self, bits: torch.Tensor, cells: torch.Tensor) -> None:
        """Reads a block, bits [I, P, C] at cells [P, 2].

        Under guidance the unconditional sequences read it too, or the block that they have drawn themselves.
        """
        if self._own_bits is not None:
            bits, self._own_bits = torch.cat([bits, self._own_bits]), None
        rows = None
        if self._first.is_first:
            rows_PRD = self._first.enter(self._first.embed_bits(bits, cells).transpose(0, 1))
            rows = rows_PRD.repeat(1, self._layout.num_sequences // len(bits), 1)
        self._read(rows, len(cells))

    def draw_block(self, cells: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Draws the next block of every image on the last stage and broadcasts it; float32 [I, P, C].

        Where nothing is guided, the unconditional sequences draw blocks of their own, with a further `draw()`.
        """
        layout, solver = self._layout, self._solver
        block = (self._num_read - layout.prefix_length) // layout.block_tokens
        num_images = layout.num_sequences // (2 if solver.is_guided else 1)
        num_drawn = num_images if solver.guides(block, layout.num_blocks) else layout.num_sequences
        if self._last.is_last:
            assert self._hidden is not None and self._sampler is not None, "start() comes first"
            # In order: a product with rows that lie apart would be computed sequence by sequence.
            condition_BPD = self._last.conditions(self._hidden.transpose(0, 1).contiguous(), cells)
            noise_KRPC = torch.cat([draw() for _ in range(num_drawn // num_images)], dim=1)
            bits = self._sampler.draw(condition_BPD, noise_KRPC, solver.guidance_at(block, layout.num_blocks))
        else:
            shape = (num_drawn, layout.block_tokens, self._config.vision.num_bits)
            bits = torch.empty(shape, dtype=torch.float32, device=self._topology.device)
        if self._topology.pipeline_size > 1:
            dist.broadcast(bits, self._topology.last_stage_rank, group=self._topology.pipeline_group)
        self._own_bits = bits[num_images:] if num_drawn > num_images else None
        return bits[:num_images]

    def _read(self, rows: torch.Tensor | None, num_rows: int) -> None:
        """Runs the stages over new rows [S, B, D] (first stage) and keeps the last P hidden states (last stage)."""
        start, stop = self._num_read, self._num_read + num_rows
        self._num_read = stop
        if self._memory is not None:
            self._memory.place(self._slots_T[start:stop], stop)
            mask = self._seen.block(start, stop, stop) if start else self._seen.prefix()
        else:
            if rows is not None:
                self._embedded.append(rows)
                rows = torch.cat(self._embedded)
            start = 0
            mask = self._layout.mask(start, stop)
        rotary = self._rotary(start, stop)
        for stage in self._model.stages:
            if not stage.is_first:
                rows = self._receive(stop - start)
                stage.set_input_tensor(rows)
            # In order, as above.
            hidden = stage.decoder(
                None if rows is None else rows.contiguous(), attention_mask=mask, rotary_pos_emb=rotary
            )
            if stage.is_last:
                self._hidden = hidden[-self._layout.block_tokens :]
            else:
                dist.send(hidden.contiguous(), self._neighbour(+1), group=self._topology.pipeline_group)

    @property
    def _backbones(self) -> list[TransformerBlock]:
        return [stage.decoder for stage in self._model.stages]

    def _make_memory(self, layout: DecodeLayout) -> KeyValueMemory:
        """Keeps the memory while batches have the same shape."""
        shape = (layout.num_sequences, layout.num_read)
        if self._memory is None or not self._memory.fits(*shape):
            # The old memory is freed before the new one is made.
            use_memory(self._backbones, None)
            self._memory = None
            model = self._config.model
            self._memory = KeyValueMemory(
                sum(len(backbone.layers) for backbone in self._backbones),
                *shape,
                model.num_kv_heads // self._topology.tensor_size,
                model.head_dim,
                self._first.config.params_dtype,
                self._topology.device,
            )
        return self._memory

    def _rotary(self, start: int, stop: int) -> torch.Tensor:
        """The rotary table of positions start..stop-1 of every sequence, [S, B or 1, K]."""
        layout, section, dtype = self._layout, self._config.model, self._first.config.params_dtype
        if section.parts.rotary == "sequence":
            positions = layout.position_ids[:, start:stop].T.flatten()
            angles = rotary_frequencies(positions, section.head_dim, section.rope_base)
            return rotary_table(angles.view(stop - start, layout.num_sequences, 1, -1), False, dtype)
        tokens = torch.arange(start, stop, device=layout.cells.device) - layout.prefix_length
        angles = cell_rotary(layout.cells[tokens.clamp(min=0)], tokens >= 0, section.head_dim)
        return rotary_table(angles, True, dtype)

    def _receive(self, num_rows: int) -> torch.Tensor:
        shape = (num_rows, self._layout.num_sequences, self._config.model.hidden_size)
        rows = torch.empty(shape, dtype=self._first.config.params_dtype, device=self._topology.device)
        dist.recv(rows, self._neighbour(-1), group=self._topology.pipeline_group)
        return rows

    def _neighbour(self, step: int) -> int:
        group = self._topology.pipeline_group
        return dist.get_global_rank(group, (self._topology.pipeline_rank + step) % self._topology.pipeline_size)
