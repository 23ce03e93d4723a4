"""Block-by-block decoding with transformers' Qwen3 on one device.

Every block takes two steps of fixed shape: the backbone reads the block before, and the head solves the flow of the
next block. On CUDA each step is recorded once as a graph; elsewhere they are plain calls.

Keys and values are in memory of fixed size (`model/key_values.py`), and no key is repeated
(`model/attention.attend_grouped`). transformers' own functions repeat keys under a mask, five times in the 14B model.

Shape suffixes: B sequences, I images (B / 2 under guidance), L prefix positions, P vision tokens per block, S queries,
T key slots, N query heads, G key/value heads, K head size (draws in noise_KIPC), C bits, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Qwen3Model
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from bitdance_scale.generate.block_decode import DecodeLayout, Draw, SeenKeys
from bitdance_scale.generate.sampler import FlowSolver, HeadSteps, sample_block
from bitdance_scale.model.attention import attend_grouped
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.key_values import KeyValueMemory
from bitdance_scale.model.positions import sincos_2d
from bitdance_scale.model.projector import Projector

BLOCK_ATTENTION = "bitdance_blocks"
"""Name under which transformers finds `attend_blocks`."""
SEEN_MULTIPLE = 1024
"""Under a graph, attention runs over a multiple of this many slots: one graph each, and little wasted computation."""
NUM_WARM_UPS = 2
"""Calls before a graph is recorded: libraries choose kernels and allocate workspaces in the first calls."""


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
        self._backbone, self._projector, self._solver = backbone, projector, solver
        self._device, self._dtype = backbone.device, backbone.dtype
        self._use_graphs = self._device.type == "cuda" if use_graphs is None else use_graphs
        with torch.no_grad():
            self._head_steps = HeadSteps(head, solver, self._device)
        self._memory: KeyValueMemory | None = None
        self._captured: dict[tuple[object, ...], CapturedCall] = {}

    @property
    def last_hidden(self) -> torch.Tensor:
        """Hidden states [B, P, D] that predict the next block; after `start`."""
        return self._hidden_BPD

    def start(self, layout: DecodeLayout) -> None:
        """Reads the prefixes [B, L]."""
        self._layout = layout
        self._backbone.set_attn_implementation(BLOCK_ATTENTION)
        memory = self._make_memory(layout)
        _, capacity = memory.shape
        self._seen = SeenKeys(layout, capacity, self._dtype)
        self._slots_T = torch.arange(capacity, device=self._device)
        self._num_read = length = layout.prefix_length
        rows_BLD = self._backbone.embed_tokens(layout.prefix_ids)
        hidden = self._read(
            memory, rows_BLD, layout.position_ids[:, :length], self._slots_T[:length], self._seen.prefix()
        )
        self._hidden_BPD = hidden[:, -layout.block_tokens :]

    def extend(self, bits: torch.Tensor, cells: torch.Tensor) -> None:
        """Reads a block, bits [I, P, C] at cells [P, 2]; under guidance by both halves of the batch."""
        start, stop = self._num_read, self._num_read + len(cells)
        self._num_read = stop
        num_seen = self._num_seen_in_graph(stop) if self._use_graphs else stop
        self._hidden_BPD = self._run(
            self._read_block,
            bits,
            cells,
            self._layout.position_ids[:, start:stop],
            self._slots_T[start:stop],
            self._seen.block(start, stop, num_seen),
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
        assert self._memory is not None, "`start` comes first"
        rows_IPD = self._projector(bits_IPC) + self._places(cells_P2)
        rows_BPD = rows_IPD.repeat(len(positions_BP) // len(rows_IPD), 1, 1)
        return self._read(self._memory, rows_BPD, positions_BP, slots_P, mask_B11T)

    def _read(
        self,
        memory: KeyValueMemory,
        rows: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        memory.place(slots, mask.shape[-1])
        # By position, without token ids: transformers 5.24 renamed the argument that takes the memory.
        output = self._backbone(None, {"full_attention": mask}, positions, Qwen3Cache(memory), rows)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _solve(self, hidden_BPD: torch.Tensor, cells_P2: torch.Tensor, noise_KIPC: torch.Tensor) -> torch.Tensor:
        """Bits [I, P, C] of the block at the cells."""
        return sample_block(self._head_steps.bind(hidden_BPD + self._places(cells_P2)), noise_KIPC, self._solver)

    def _run(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """Calls a function, on CUDA under a graph made for inputs of these shapes."""
        if not self._use_graphs:
            return function(*inputs)
        key = (function.__name__, *(value.shape for value in inputs))
        if key not in self._captured:
            self._captured[key] = CapturedCall(function, *inputs)
        return self._captured[key](*inputs)

    def _make_memory(self, layout: DecodeLayout) -> KeyValueMemory:
        """Keeps the memory, and the graphs that point into it, while the batch has the same shape."""
        shape = (layout.num_sequences, layout.num_read)
        if self._memory is None or not self._memory.fits(*shape):
            # The old memory is freed before the new one is made.
            self._captured, self._memory = {}, None
            config = self._backbone.config
            self._memory = KeyValueMemory(
                config.num_hidden_layers,
                *shape,
                config.num_key_value_heads,
                config.head_dim,
                self._dtype,
                self._device,
            )
        return self._memory

    def _num_seen_in_graph(self, num_read: int) -> int:
        assert self._memory is not None, "`start` comes first"
        _, capacity = self._memory.shape
        return min(capacity, -(-num_read // SEEN_MULTIPLE) * SEEN_MULTIPLE)

    def _places(self, cells_P2: torch.Tensor) -> torch.Tensor:
        return sincos_2d(cells_P2, self._backbone.config.hidden_size).to(self._dtype)


class Qwen3Cache(Cache):
    """A key/value memory as transformers takes it."""

    def __init__(self, memory: KeyValueMemory) -> None:
        super().__init__(layers=[])
        self._memory = memory

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values [B, G, S, K] of a layer; returns those seen, [B, G, num_seen, K]."""
        return self._memory.update(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are always given, so transformers needs no count."""
        return 0


def attend_blocks(
    module: torch.nn.Module,
    query_BNSK: torch.Tensor,
    key_BGTK: torch.Tensor,
    value_BGTK: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """`attend_grouped` as an attention function of transformers.

    Returns:
        [B, S, N, K], and None for the weights.
    """
    mixed_BNSK = attend_grouped(query_BNSK, key_BGTK, value_BGTK, attention_mask, scaling)
    return mixed_BNSK.transpose(1, 2).contiguous(), None


AttentionInterface.register(BLOCK_ATTENTION, attend_blocks)


class CapturedCall:
    """A function of tensors recorded as a CUDA graph: one launch instead of thousands.

    The kernels of a step are short, so launching them one by one from Python would take longer than running them. The
    function is called on the examples before it is recorded, more than once: anything that it writes in addition to its
    result must depend on its inputs only. It must not wait for the GPU or draw random numbers.

    Args:
        function: what is recorded.
        examples: inputs of the shapes and dtypes that it will be called with.
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
        """Runs the function on `inputs`; the result is in memory of its own."""
        for buffer, value in zip(self._inputs, inputs, strict=True):
            buffer.copy_(value)
        self._graph.replay()
        return self._output.clone()
