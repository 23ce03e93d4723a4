"""Megatron-core's pipeline schedules over packs of unequal length.

Packs have unequal lengths, which Megatron-core would send from stage to stage ahead of every message, and wait for. But
every rank of a replica has the layout of all packs of a step, and the schedule says in which order they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from bitdance_scale.model.inputs import PackInputs
from bitdance_scale.parallel.pipeline_stages import Stage
from bitdance_scale.parallel.topology import Topology

# What a schedule calls with the output of the last stage: (loss, a token count, what is returned of the micro-batch).
Reduce = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
NONE = [0, 0, 0]


class KnownLengths(P2PCommunicator):
    """Messages between stages whose receivers know their shapes.

    Args:
        config: Megatron-core's, of a stage.
        lengths: positions of every micro-batch, of this rank's share under sequence parallelism.
        topology: the ranks.
        num_stages: stages of this rank.
        is_forward_only: whether no gradient is sent back.
    """

    def __init__(
        self,
        config: TransformerConfig,
        lengths: Sequence[int],
        topology: Topology,
        num_stages: int,
        is_forward_only: bool,
    ) -> None:
        super().__init__(topology.pipeline_group, config)
        order = get_schedule_table(
            len(lengths), num_stages, config.microbatch_group_size_per_vp_stage or topology.pipeline_size
        )
        self._hidden_size = config.hidden_size
        self._previous = self._received(lengths, order, topology.pipeline_rank == 0)
        is_last = topology.pipeline_rank == topology.pipeline_size - 1
        # Backwards a micro-batch passes the stages of a rank from the last to the first, in the same groups.
        self._next = self._received(lengths, [] if is_forward_only else order, is_last)

    def _received(self, lengths: Sequence[int], order: Sequence[tuple[int, int]], is_end: bool) -> deque[list[int]]:
        """Shapes of the messages of one direction in their order; the model's end receives none for its first stage."""
        return deque([lengths[micro], 1, self._hidden_size] for micro, turn in order if not (is_end and turn == 0))

    def _communicate(
        self, *, tensor_send_next: torch.Tensor | None, tensor_send_prev: torch.Tensor | None, **receives: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """Megatron-core's, on tensors of its own.

        The schedule may take the memory from a tensor that it has sent while the message is under way; one that shares
        its storage keeps it.
        """
        following, previous = (
            tensor if tensor is None else tensor.detach() for tensor in (tensor_send_next, tensor_send_prev)
        )
        sent: Any = super()._communicate(tensor_send_next=following, tensor_send_prev=previous, **receives)
        return sent[0], sent[1], sent[2]

    def _communicate_shapes(
        self, tensor_send_next: object, tensor_send_prev: object, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """In place of Megatron-core's exchange; the shapes of what comes from the previous and from the next rank."""
        return self._previous.popleft() if recv_prev else NONE, self._next.popleft() if recv_next else NONE

    @property
    def is_finished(self) -> bool:
        """Whether everything was received."""
        return not (self._previous or self._next)


def run_schedule(
    stages: Sequence[Stage],
    batch: Sequence[PackInputs],
    topology: Topology,
    forward: Callable[[Stage, PackInputs], torch.Tensor],
    reduce: Reduce,
    is_forward_only: bool = False,
) -> list[torch.Tensor]:
    """Runs the micro-batches of this replica through the pipeline: 1F1B, interleaved where a rank has several stages.

    Returns what `reduce` keeps of every micro-batch on the last stage, [] elsewhere.

    Args:
        stages: of this rank.
        batch: the micro-batches.
        topology: the ranks.
        forward: a stage's forward pass.
        reduce: of the last stage's output.
        is_forward_only: whether there is no backward pass.
    """

    def forward_step(inputs: Iterator[PackInputs], stage: Stage) -> tuple[torch.Tensor, Reduce]:
        return forward(stage, next(inputs)), reduce

    config = stages[0].config
    num_parts = topology.tensor_size if config.sequence_parallel else 1
    lengths = [len(inputs.token_ids) // num_parts for inputs in batch]
    messages = KnownLengths(config, lengths, topology, len(stages), is_forward_only)
    # Any, because Megatron-core returns what `reduce` returns.
    kept: Any = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batch) for _ in stages],
        model=list(stages),
        num_microbatches=len(batch),
        seq_length=0,  # unused: the lengths are known
        micro_batch_size=1,
        forward_only=is_forward_only,
        p2p_communicator=messages,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "pp", "embd", "pos_embd", "dp_cp"]),
    )
    assert messages.is_finished, "the schedule receives every micro-batch that is sent"
    return list(kept)
