"""Block-by-block decoding with transformers' Qwen3 on one device.

Every block takes two steps of fixed shape: the backbone reads the block before, and the head solves the flow of the
next block. On CUDA each step is recorded once as a graph; elsewhere they are plain calls.

Keys and values are in memory of fixed size: new keys are written to numbered slots, and attention sees a number of
slots from the first. All queries of a block of vision tokens see the same keys, so the query heads that share a
key/value head are stacked along the queries and no key is repeated. transformers' own functions repeat keys under a
mask, five times in the 14B model.

Shape suffixes: B sequences, I images (B / 2 under guidance), L prefix positions, P vision tokens per block, S queries,
T key slots, N query heads, G key/value heads, K head size (draws in noise_KIPC), C bits, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import Qwen3Config, Qwen3Model
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from bitdance_scale.generate.block_decode import DecodeLayout, Draw
from bitdance_scale.generate.sampler import FlowSolver, HeadSteps, sample_block
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.positions import sincos_2d
from bitdance_scale.model.projector import Projector

BLOCK_ATTENTION = "bitdance_blocks"
"""Name under which transformers finds `attend_blocks`."""
CAPACITY_MULTIPLE = 256
"""Slots are allocated in multiples of this, so that prompts of similar length share the memory and its graphs."""
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
        self._memory: KeyValues | None = None
        self._captured: dict[tuple[object, ...], CapturedCall] = {}

    @property
    def last_hidden(self) -> torch.Tensor:
        """Hidden states [B, P, D] that predict the next block; after `start`."""
        return self._hidden_BPD

    def start(self, layout: DecodeLayout) -> None:
        """Reads the prefixes [B, L]."""
        self._layout = layout
        self._backbone.set_attn_implementation(BLOCK_ATTENTION)
        # The last block is never read.
        num_read_in_all = layout.position_ids.shape[1] - layout.block_tokens
        memory = self._make_memory(layout.num_sequences, max(num_read_in_all, layout.prefix_length))
        # int64 [B, 1, 1, 1], the first position of each sequence.
        self._first = (layout.document_ids < 0).sum(1)[:, None, None, None]
        self._num_read = layout.prefix_length
        rows_BLD = self._backbone.embed_tokens(layout.prefix_ids)
        slots_L = torch.arange(self._num_read, device=self._device)
        mask = self._additive(layout.mask(0, self._num_read))
        hidden = self._read(memory, rows_BLD, layout.position_ids[:, : self._num_read], slots_L, mask)
        self._hidden_BPD = hidden[:, -layout.block_tokens :]

    def extend(self, bits: torch.Tensor, cells: torch.Tensor) -> None:
        """Reads a block, bits [I, P, C] at cells [P, 2]; under guidance by both halves of the batch."""
        start, stop = self._num_read, self._num_read + len(cells)
        self._num_read = stop
        num_seen = self._num_seen_in_graph(stop) if self._use_graphs else stop
        slots_T = torch.arange(num_seen, device=self._device)
        # Everything except the padding on the left and the slots that are not written yet.
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
        assert self._memory is not None, "`start` comes first"
        rows_IPD = self._projector(bits_IPC) + self._places(cells_P2)
        rows_BPD = rows_IPD.repeat(len(positions_BP) // len(rows_IPD), 1, 1)
        return self._read(self._memory, rows_BPD, positions_BP, slots_P, mask_B11T)

    def _read(
        self, memory: KeyValues, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        memory.place(slots, mask.shape[-1])
        # By position, without token ids: transformers 5.24 renamed the argument that takes the memory.
        output = self._backbone(None, {"full_attention": mask}, positions, memory, rows)
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

    def _make_memory(self, num_sequences: int, num_positions: int) -> KeyValues:
        """Keeps the memory, and the graphs that point into it, while the batch has the same shape."""
        shape = (num_sequences, -(-num_positions // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE)
        if self._memory is None or shape != self._memory.shape:
            # The old memory is freed before the new one is made.
            self._captured, self._memory = {}, None
            self._memory = KeyValues(self._backbone.config, *shape, self._dtype, self._device)
        return self._memory

    def _num_seen_in_graph(self, num_read: int) -> int:
        assert self._memory is not None, "`start` comes first"
        _, capacity = self._memory.shape
        return min(capacity, -(-num_read // SEEN_MULTIPLE) * SEEN_MULTIPLE)

    def _places(self, cells_P2: torch.Tensor) -> torch.Tensor:
        return sincos_2d(cells_P2, self._backbone.config.hidden_size).to(self._dtype)

    def _additive(self, is_seen: torch.Tensor) -> torch.Tensor:
        """0 where a key is seen and minus infinity elsewhere, in the dtype of the scores."""
        return torch.zeros(is_seen.shape, dtype=self._dtype, device=self._device).masked_fill_(~is_seen, -torch.inf)


class KeyValues(Cache):
    """Keys and values of all layers in tensors that stay in place, as a captured graph needs them.

    Args:
        config: of the Qwen3.
        num_sequences: B.
        capacity: slots per sequence.
        dtype: of the keys and values.
        device: of the keys and values.

    Attributes:
        shape: (num_sequences, capacity).
    """

    def __init__(
        self, config: Qwen3Config, num_sequences: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        self.shape = (num_sequences, capacity)
        shape = (2, num_sequences, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros: a slot that was never written is masked, but 0 times NaN would be NaN.
        self._layers_2BGTK = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._slots_S, self._num_seen = torch.zeros(0, dtype=torch.long), 0

    def place(self, slots_S: torch.Tensor, num_seen: int) -> None:
        """Sets where the next keys go, int64 [S], and how many slots, from the first, their queries see."""
        self._slots_S, self._num_seen = slots_S, num_seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values [B, G, S, K] of a layer; returns those seen, [B, G, num_seen, K]."""
        keys_BGTK, values_BGTK = self._layers_2BGTK[layer_idx]
        keys_BGTK.index_copy_(2, self._slots_S, key_states)
        values_BGTK.index_copy_(2, self._slots_S, value_states)
        return keys_BGTK[:, :, : self._num_seen], values_BGTK[:, :, : self._num_seen]

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
    """An attention function of transformers; its mask [B, 1, S or 1, T] is added to the scores.

    Returns:
        [B, S, N, K], and None for the weights.
    """
    num_sequences, num_heads, length, size = query_BNSK.shape
    num_groups = key_BGTK.shape[1]
    if attention_mask.shape[2] > 1:
        attention_mask = attention_mask.repeat(1, 1, num_heads // num_groups, 1)
    mixed = functional.scaled_dot_product_attention(
        query_BNSK.reshape(num_sequences, num_groups, -1, size),
        key_BGTK,
        value_BGTK,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return mixed.reshape(num_sequences, num_heads, length, -1).transpose(1, 2).contiguous(), None


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
