"""Reading with transformers' Qwen3 on one device: its key/value memory, its attention, and steps of fixed shape.

Keys and values are in memory of fixed size (`model/key_values.py`), and no key is repeated
(`model/attention.attend_grouped`). transformers' own functions repeat keys under a mask, five times in the 14B model.

A step of fixed shape is recorded once as a graph on CUDA; elsewhere it is a plain call.

Shape suffixes: B sequences, I images, P vision tokens per block, S new positions, T key slots, N query heads, G
key/value heads, K head size, C bits, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import Qwen3Model
from transformers.cache_utils import Cache
from transformers.modeling_utils import AttentionInterface

from bitdance_scale.generate.block_decode import additive
from bitdance_scale.model.attention import attend_grouped
from bitdance_scale.model.key_values import KeyValueMemory
from bitdance_scale.model.positions import axis_table, look_up_cells
from bitdance_scale.model.projector import Projector

BLOCK_ATTENTION = "bitdance_blocks"
"""Name under which transformers finds `attend_blocks`."""
SEEN_MULTIPLE = 1024
"""Under a graph, attention runs over a multiple of this many slots: one graph each, and little wasted computation."""
NUM_WARM_UPS = 2
"""Calls before a graph is recorded: libraries choose kernels and allocate workspaces in the first calls."""


class Qwen3Reader:
    """Reads rows of a batch of sequences, some positions at a time, and remembers them.

    Args:
        backbone: the Qwen3 without its output projection; its attention is set to `attend_blocks`.
        projector: from bits to hidden states.
        use_graphs: whether steps are recorded as CUDA graphs; default on CUDA.

    Attributes:
        backbone: as given.
        device, dtype: of its weights.
        slots: int64 [capacity], the numbers of all slots; after `start`.
    """

    def __init__(self, backbone: Qwen3Model, projector: Projector, use_graphs: bool | None = None) -> None:
        self.backbone, self._projector = backbone, projector
        self.device, self.dtype = backbone.device, backbone.dtype
        self._cell_table = axis_table(backbone.config.hidden_size).to(self.device, self.dtype)
        self._use_graphs = self.device.type == "cuda" if use_graphs is None else use_graphs
        self._memory: KeyValueMemory | None = None
        self._captured: dict[tuple[object, ...], CapturedCall] = {}

    def start(self, num_sequences: int, num_positions: int) -> None:
        """Makes room for so many sequences and positions of each; nothing is remembered.

        The memory, and the graphs that point into it, are kept while the batch has the same shape.
        """
        self.backbone.set_attn_implementation(BLOCK_ATTENTION)
        if self._memory is None or not self._memory.fits(num_sequences, num_positions):
            # The old memory is freed before the new one is made.
            self._captured, self._memory = {}, None
            config = self.backbone.config
            self._memory = KeyValueMemory(
                config.num_hidden_layers,
                num_sequences,
                num_positions,
                config.num_key_value_heads,
                config.head_dim,
                self.dtype,
                self.device,
            )
            self.slots = torch.arange(self.capacity, device=self.device)

    @property
    def capacity(self) -> int:
        """Slots per sequence; after `start`."""
        assert self._memory is not None, "`start` comes first"
        return self._memory.shape[1]

    def read(
        self, rows_BSD: torch.Tensor, positions_BS: torch.Tensor, slots_S: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [B, S, D] of new rows, whose keys and values are written to slots.

        Args:
            rows_BSD: embedded.
            positions_BS: int64, rotary positions.
            slots_S: int64.
            mask: [B, 1, S or 1, T], added to the scores; the first T slots are seen.
        """
        assert self._memory is not None, "`start` comes first"
        self._memory.place(slots_S, mask.shape[-1])
        # By position, without token ids: transformers 5.24 renamed the argument that takes the memory.
        output = self.backbone(None, {"full_attention": mask}, positions_BS, Qwen3Cache(self._memory), rows_BSD)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def embed_bits(self, bits: torch.Tensor, cells_P2: torch.Tensor) -> torch.Tensor:
        """Rows [.., P, D] of vision tokens, bits [.., P, C] at cells."""
        rows: torch.Tensor = self._projector(bits) + self.places(cells_P2)
        return rows

    def places(self, cells_P2: torch.Tensor) -> torch.Tensor:
        """The 2-D positions [P, D] of cells."""
        return look_up_cells(self._cell_table, cells_P2)

    def later_mask(self, first_B: torch.Tensor, num_read: int) -> torch.Tensor:
        """The mask [B, 1, 1, T] of rows that see all slots before `num_read`, but the padding before `first_B`."""
        slots_T, first_B111 = self.slots[: self.num_seen(num_read)], first_B[:, None, None, None]
        return additive((slots_T >= first_B111) & (slots_T < num_read), self.dtype)

    def run(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """Calls a function, on CUDA under a graph made for inputs of these shapes."""
        if not self._use_graphs:
            return function(*inputs)
        key = (function.__name__, *(value.shape for value in inputs))
        if key not in self._captured:
            self._captured[key] = CapturedCall(function, *inputs)
        return self._captured[key](*inputs)

    def num_seen(self, num_read: int) -> int:
        """Slots that attention runs over where so many positions were read."""
        return min(self.capacity, -(-num_read // SEEN_MULTIPLE) * SEEN_MULTIPLE) if self._use_graphs else num_read


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

    It is recorded and run on the device of its inputs, whatever the thread's current device is.

    Args:
        function: what is recorded.
        examples: inputs of the shapes and dtypes that it will be called with, all on one device.
    """

    def __init__(self, function: Callable[..., torch.Tensor], *examples: torch.Tensor) -> None:
        self._inputs = [example.clone(memory_format=torch.contiguous_format) for example in examples]
        self._device = self._inputs[0].device
        # Streams and graphs are those of the thread's current device.
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(NUM_WARM_UPS):
                    function(*self._inputs)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # The stream that `graph` would take by itself is one for all devices, and lies on the first.
            with torch.cuda.graph(self._graph, stream=side):
                self._output = function(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Runs the function on `inputs`; the result is in memory of its own."""
        with torch.cuda.device(self._device):
            for buffer, value in zip(self._inputs, inputs, strict=True):
                buffer.copy_(value)
            self._graph.replay()
            return self._output.clone()
