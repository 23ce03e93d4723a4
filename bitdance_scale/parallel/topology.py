"""The process groups of a run as one object.

Ranks are laid out as in Megatron-core: tensor-parallel ranks are neighbours, then data, then pipeline, so that
tensor-parallel traffic stays inside a node. The ranks that hold one copy of the model (tensor x pipeline) are a
*replica*; the data rank numbers the replicas.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bitdance_scale.config.parallel_schema import ParallelSection

DEFAULT_TIMEOUT_S = 1800.0
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Each rank keeps its last collectives, and NCCL's watchdog writes them to a file when one times out; torchfrtrace
reads the files. What the environment sets wins."""


@dataclass(frozen=True)
class Topology:
    """The position of this rank in the layout, and the groups in which it communicates.

    The `get_*` methods are the model-parallel interface that DeepSpeed expects of its `mpu` argument.

    Attributes:
        device: device of this rank's tensors.
        tensor_group, pipeline_group, data_group: one group per axis of the layout.
        replica_group: all ranks of this replica, tensor x pipeline.
        replica_host_group: the same ranks over gloo, for host objects; the same group on CPU.
        replica_ranks: global ranks of the replica; the first reads the data.
        ends_group: the first and the last pipeline rank with this rank's tensor and data rank, which exchange a tied
            embedding; None on the ranks between them and without a pipeline.
    """

    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    replica_host_group: dist.ProcessGroup
    replica_ranks: tuple[int, ...]
    ends_group: dist.ProcessGroup | None

    @property
    def device_name(self) -> str:
        """The vendor's name of this rank's device; `cpu` without CUDA."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def rank(self) -> int:
        """Global rank."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return dist.get_world_size()

    @property
    def tensor_rank(self) -> int:
        """Rank on the tensor-parallel axis."""
        return dist.get_rank(self.tensor_group)

    @property
    def tensor_size(self) -> int:
        """Ranks on the tensor-parallel axis."""
        return dist.get_world_size(self.tensor_group)

    @property
    def pipeline_rank(self) -> int:
        """Rank on the pipeline axis."""
        return dist.get_rank(self.pipeline_group)

    @property
    def pipeline_size(self) -> int:
        """Ranks on the pipeline axis."""
        return dist.get_world_size(self.pipeline_group)

    @property
    def data_rank(self) -> int:
        """Number of this replica."""
        return dist.get_rank(self.data_group)

    @property
    def data_size(self) -> int:
        """Number of replicas."""
        return dist.get_world_size(self.data_group)

    @property
    def first_stage_rank(self) -> int:
        """Global rank of the first pipeline stage with this rank's tensor and data rank."""
        return dist.get_global_rank(self.pipeline_group, 0)

    @property
    def is_reader(self) -> bool:
        """Whether this rank runs the replica's loader."""
        return self.rank == self.replica_ranks[0]

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage with this rank's tensor and data rank."""
        return dist.get_global_rank(self.pipeline_group, self.pipeline_size - 1)

    def get_model_parallel_rank(self) -> int:
        """Rank in the replica."""
        return dist.get_rank(self.replica_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The replica."""
        return self.replica_group

    def get_model_parallel_world_size(self) -> int:
        """Ranks of the replica."""
        return dist.get_world_size(self.replica_group)

    def get_data_parallel_rank(self) -> int:
        """`data_rank`."""
        return self.data_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """`data_group`."""
        return self.data_group

    def get_data_parallel_world_size(self) -> int:
        """`data_size`."""
        return self.data_size

    def get_tensor_model_parallel_rank(self) -> int:
        """`tensor_rank`."""
        return self.tensor_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """`tensor_group`."""
        return self.tensor_group

    def get_tensor_model_parallel_world_size(self) -> int:
        """`tensor_size`."""
        return self.tensor_size

    def get_pipeline_model_parallel_rank(self) -> int:
        """`pipeline_rank`."""
        return self.pipeline_rank

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """`pipeline_group`."""
        return self.pipeline_group

    def get_pipeline_model_parallel_world_size(self) -> int:
        """`pipeline_size`."""
        return self.pipeline_size


def start_process_group(timeout_s: float = DEFAULT_TIMEOUT_S, recorder_folder: Path | None = None) -> None:
    """Joins the job that torchrun started: NCCL on this rank's GPU, or gloo without CUDA.

    Args:
        timeout_s: seconds after which a collective fails, in this group and in those of `make_topology`.
        recorder_folder: where NCCL's flight recorder writes the last collectives of a rank when one fails; None: it is
            left as the environment has it.
    """
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if recorder_folder is not None:
        if has_cuda:
            recorder_folder.mkdir(parents=True, exist_ok=True)
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
        # torch puts the rank behind it.
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(recorder_folder / "rank_"))
    dist.init_process_group("nccl" if has_cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s))


def set_timeout_of_all_groups(timeout_s: float) -> None:
    """Gives every group of this rank the timeout: Megatron and DeepSpeed make theirs with torch's default."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def end_process_group() -> None:
    """Leaves the job and forgets its groups, so that this process can join another one."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def make_topology(section: ParallelSection, timeout_s: float = DEFAULT_TIMEOUT_S) -> Topology:
    """Builds the groups over all ranks of the running job; `start_process_group` comes first.

    Args:
        section: layout of a replica.
        timeout_s: seconds after which a collective fails, in all groups.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=section.tensor,
        pipeline_model_parallel_size=section.pipeline,
        virtual_pipeline_model_parallel_size=section.virtual_stages if section.virtual_stages > 1 else None,
        # Gloo twins of every group, which nothing here uses.
        create_gloo_process_groups=False,
    )
    replica_group = parallel_state.get_model_parallel_group()
    replica_ranks = tuple(dist.get_process_group_ranks(replica_group))
    has_cuda = torch.cuda.is_available()
    topology = Topology(
        device=torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu"),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        replica_group=replica_group,
        replica_host_group=_host_group(replica_ranks) if has_cuda else replica_group,
        replica_ranks=replica_ranks,
        ends_group=_ends_group(section),
    )
    set_timeout_of_all_groups(timeout_s)
    return topology


def own_store() -> Any:
    """A connection of its own to the key-value store of the job, for a thread of its own."""
    return cast(Any, dist.distributed_c10d._get_default_store()).clone()


def make_host_group() -> dist.ProcessGroup:
    """A group of all ranks over gloo that nothing else uses, so that a thread of its own can; a collective."""
    return dist.new_group(backend="gloo")


def _ends_group(section: ParallelSection) -> dist.ProcessGroup | None:
    """Megatron's embedding group, of the first and last pipeline rank."""
    is_end = parallel_state.is_rank_in_embedding_group(ignore_virtual=True)
    return parallel_state.get_embedding_group() if section.pipeline > 1 and is_end else None


def _host_group(replica_ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A gloo group of this replica, which its ranks make among themselves.

    If all ranks took part in making the group of every replica, a start would take longer the more replicas there are.
    """
    group = dist.new_group(list(replica_ranks), backend="gloo", use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), "a rank of the replica"
    return group
