"""What each pipeline stage holds, and its forward pass.

The first stage embeds bits and text, or the class. Every stage runs its share of the backbone. The last stage holds the
diffusion head and the text projection, and returns the two loss sums. Which parts there are is the network family's to
say (`config/families.py`). Without a pipeline one stage does all of it. A pipeline rank holds one stage, or several
under the interleaved schedule: stage k is on rank k modulo the number of ranks.

Under sequence parallelism the hidden states between the split linears are divided among the tensor-parallel ranks,
[S / ranks, B, D]. They are whole before the first layer and after the last.

Shape suffixes: S positions, V vision tokens, M predicted blocks, P vision tokens per block, C bits, T text targets,
D hidden size, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import nn
from torch.nn import functional

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.diffusion_head import DiffusionHead
from bitdance_scale.model.heads import make_head
from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.model.low_rank import dropout_rows
from bitdance_scale.model.positions import axis_table, look_up_cells, raster_index
from bitdance_scale.model.projector import PROJECTORS
from bitdance_scale.parallel.backbone import RMSNorm, make_backbone, transformer_config
from bitdance_scale.parallel.quantised_linears import without_weights
from bitdance_scale.parallel.recomputing import recompute
from bitdance_scale.parallel.stage_split import stage_layers
from bitdance_scale.parallel.step_trace import StepTrace
from bitdance_scale.parallel.tensor_linears import ColumnLinear, TensorParallelLinears, without_sequence_parallel
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.parallel.vocab_loss import cross_entropy


class RankStages(nn.Module):
    """The stages of one pipeline rank, which one engine trains.

    Attributes:
        stages: in the order in which a micro-batch passes through them.
    """

    def __init__(self, config: RunConfig, vocab_size: int, topology: Topology) -> None:
        super().__init__()
        numbers = range(topology.pipeline_rank, config.parallel.num_stages, topology.pipeline_size)
        stages = nn.ModuleList(Stage(config, vocab_size, topology, number) for number in numbers)
        # ModuleList is not generic.
        self.stages = cast(Sequence[Stage], stages)

    def forward(self, inputs: PackInputs) -> torch.Tensor:
        """The loss sums of a micro-batch; only where one stage is the whole model."""
        assert len(self.stages) == 1, "a pipeline is driven by its schedule"
        return self.stages[0](inputs)


class QueryDeltas(nn.Module):
    """What is added to the embeddings of the query tokens, whose table is frozen; whole on every rank.

    Args:
        first: id of the first query token; the others follow.
        num_queries: how many.
        hidden_size: D.
        dtype: of the changes.
    """

    def __init__(self, first: int, num_queries: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._first = first
        self.weight = nn.Parameter(torch.empty(num_queries, hidden_size, dtype=dtype))

    def forward(self, token_ids_BS: torch.Tensor, embedded_BSD: torch.Tensor) -> torch.Tensor:
        """The embeddings [B, S, D] of tokens [B, S], with the changes of those that are query tokens."""
        number_BS = token_ids_BS - self._first
        is_query_BS = (number_BS >= 0) & (number_BS < len(self.weight))
        delta_BSD = functional.embedding(number_BS.clamp(0, len(self.weight) - 1), self.weight)
        return embedded_BSD + delta_BSD * is_query_BS[..., None]


class Stage(nn.Module):
    """One pipeline stage of the model on one tensor-parallel rank.

    Attributes:
        number: 0 .. `parallel.num_stages` - 1, in the order in which a micro-batch passes through them.
        vocab_size: entries of the tokenizer. The tables hold `padded_vocab_size` rows, divided among the
        tensor-parallel
            ranks; the padding is kept out of the softmax.
        layers: global indices of the backbone layers held here.
        has_copied_output: whether the text projection is a copy of the embedding on another rank (`parallel/tied.py`).
        cell_table: positions of cells along one axis, [coordinates, D / 2]; on the first and the last stage.
        query_deltas: changes of the embeddings of query tokens; None: they are those of the table.
        trace: what watches the hidden states that enter the layers; None: nothing.
    """

    cell_table: torch.Tensor

    def __init__(self, config: RunConfig, vocab_size: int, topology: Topology, number: int) -> None:
        super().__init__()
        self.config = transformer_config(config, vocab_size, topology)
        self.model_type = ModelType.encoder_or_decoder
        self.number = number
        self.is_first, self.is_last = number == 0, number == config.parallel.num_stages - 1
        self.vocab_size = vocab_size
        self.padded_vocab_size = vocab_size + -vocab_size % topology.tensor_size
        self.hidden_size = config.model.hidden_size
        self.parts, self.order_side = config.model.parts, config.vision.order_side
        self.grid = config.classes.grid
        self.layers = stage_layers(config, vocab_size, number)
        self.has_copied_output = False
        self.query_deltas: QueryDeltas | None = None
        self.trace: StepTrace | None = None
        whole = without_sequence_parallel(self.config)
        linears = TensorParallelLinears(self.config, topology)
        if self.is_first:
            self.embedding = VocabParallelEmbedding(
                self.padded_vocab_size, self.hidden_size, init_method=lambda weight: weight, config=self.config
            )
            self.projector = PROJECTORS[self.parts.projector](config.vision.num_bits, self.hidden_size, linears)
            if self.parts.has_input_norm:
                # Over the whole sequence, before tensor-parallel ranks divide it.
                self.input_norm = RMSNorm(whole, self.hidden_size, config.model.norm_eps)
        with without_weights(config.lora):
            self.decoder = make_backbone(
                self.config,
                len(self.layers),
                number // topology.pipeline_size,
                self.is_first,
                self.is_last,
                config.parallel.recompute,
            )
            if self.is_last:
                self.head = make_head(config, linears, is_compiled=config.parallel.compile)
        if self.is_last:
            if config.parallel.recompute == "full" and isinstance(self.head, DiffusionHead):
                self.head.recompute_blocks(recompute)
            if self.parts.head_cells == "learned":
                self.head_positions = nn.Embedding(
                    config.classes.num_cells, self.hidden_size, dtype=self.config.params_dtype
                )
            if self.parts.has_text:
                self._make_output(whole, config.model.tie_embeddings, topology)
        embeds_cells = self.is_first and self.parts.adds_cells_at_input
        if embeds_cells or (self.is_last and self.parts.head_cells == "sincos"):
            self.register_buffer("cell_table", axis_table(self.hidden_size), persistent=False)

    def _make_output(self, megatron: TransformerConfig, is_tied: bool, topology: Topology) -> None:
        """The projection to the vocabulary."""
        self.output = ColumnLinear(
            self.hidden_size, self.padded_vocab_size, 1, gather_output=False, bias=False, config=megatron
        )
        if is_tied:
            self.has_copied_output = not self.is_first
            if self.is_first:
                self.output.weight = self.embedding.weight
        local = self.padded_vocab_size // topology.tensor_size
        self._first_entry = topology.tensor_rank * local
        self._num_local_entries = max(0, min(local, self.vocab_size - self._first_entry))
        self._tensor_group = topology.tensor_group if topology.tensor_size > 1 else None

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor] | None) -> None:
        """Takes the hidden states [S, B, D] that Megatron's schedule received from the previous stage."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def forward(self, inputs: PackInputs) -> torch.Tensor:
        """Hidden states [S, 1, D] for the next stage; on the last stage the result of `losses`."""
        hidden_SBD = self.embed_pack(inputs) if self.is_first else None
        if self.is_first and self.config.sequence_parallel:
            hidden_SBD = scatter_to_sequence_parallel_region(hidden_SBD)
        if self.trace is not None:
            entering_SBD = hidden_SBD if self.is_first else self.decoder.input_tensor
            assert entering_SBD is not None, "the schedule sets what a later stage begins with"
            self.trace.watch(self.number, entering_SBD)
        with dropout_rows(inputs.dropout_rows):
            hidden_SBD = self.decoder(hidden_SBD, attention_mask=inputs.mask, rotary_pos_emb=inputs.rotary)
        if not self.is_last:
            if torch.is_grad_enabled() and not hidden_SBD.requires_grad:
                # Nothing is trained up to here, but the schedule passes a gradient back to every stage.
                hidden_SBD.requires_grad_()
            return hidden_SBD
        if self.config.sequence_parallel:
            # What follows sums its gradient over the ranks itself, so every rank has the whole gradient and keeps its
            # own part.
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        return self.losses(hidden_SBD[:, 0], inputs)

    def embed_pack(self, inputs: PackInputs) -> torch.Tensor:
        """Embeds text tokens and bits into [S, 1, D]."""
        text_S1D = self.embed_tokens(inputs.token_ids[None])
        vision_VD = self.embed_bits(inputs.vision_bits, inputs.vision_cells)
        return self.enter(text_S1D.index_copy(0, inputs.vision_positions, vision_VD[:, None]))

    def enter(self, hidden_SBD: torch.Tensor) -> torch.Tensor:
        """The embedded sequence as the first layer takes it."""
        return self.input_norm(hidden_SBD) if self.parts.has_input_norm else hidden_SBD

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeds text and special tokens [B, S] into [S, B, D]."""
        embedded_BSD = self.embedding(token_ids)
        if self.query_deltas is not None:
            embedded_BSD = self.query_deltas(token_ids, embedded_BSD)
        return embedded_BSD.transpose(0, 1)

    def add_query_deltas(self, num_queries: int) -> None:
        """Makes the embeddings of the query tokens, the last of the table, trainable while the table is not."""
        first = self.vocab_size - num_queries
        self.query_deltas = QueryDeltas(first, num_queries, self.hidden_size, self.config.params_dtype)

    def embed_bits(self, bits: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Projects bits [.., V, C] to [.., V, D]; some families add the 2-D positions of their `cells` [V, 2]."""
        dtype = self.config.params_dtype
        vision = self.projector(bits.to(dtype))
        return vision + look_up_cells(self.cell_table, cells) if self.parts.adds_cells_at_input else vision

    def conditions(self, hidden_MPD: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Adds to predicting hidden states [M, P, D] the positions of the cells that they predict.

        The cells are [M, P, 2], or [P, 2] where they are the same for all.
        """
        if self.parts.head_cells == "learned":
            return hidden_MPD + self.head_positions(raster_index(cells, self.grid, self.order_side))
        return hidden_MPD + look_up_cells(self.cell_table, cells)

    def losses(self, hidden_SD: torch.Tensor, inputs: PackInputs) -> torch.Tensor:
        """The head's loss summed over vision targets and the cross-entropy summed over text targets, float32 [2].

        With `inputs.reports_blocks` the head's losses of the M predicted blocks follow: float32 [2 + M].
        """
        condition_MPD = self.conditions(hidden_SD[inputs.predict_positions], inputs.predict_cells)
        with dropout_rows(inputs.head_dropout_rows):
            vision, losses_M = self.head.losses(
                condition_MPD, inputs.clean_bits, inputs.noise, inputs.time, inputs.reports_blocks
            )
        if self.parts.has_text:
            text = self.text_loss_sum(hidden_SD[inputs.text_positions], inputs.text_targets)
        else:
            text = torch.zeros_like(vision)
        # Numbers of the host, which are not copied: that would wait for the device.
        sums = torch.stack([vision * (inputs.num_vision_targets > 0), text * (inputs.num_text_targets > 0)])
        return sums if losses_M is None else torch.cat([sums, losses_M])

    def text_loss_sum(self, hidden_TD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Cross-entropy summed over text targets; the tensor-parallel ranks divide the vocabulary."""
        return cross_entropy(
            self.output(hidden_TD),
            targets_T,
            self._first_entry,
            self._num_local_entries,
            self._tensor_group,
            self.config.is_compiled,
        ).sum()
