"""The memory that a run needs, as a table: one line per pipeline stage, for GPUs, in GiB."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.model.attention import uses_flex
from bitdance_scale.parallel.memory_estimate import MemoryEstimate, estimate_memory
from bitdance_scale.parallel.memory_parts import Bytes
from bitdance_scale.parallel.pinned import pinned_bytes
from bitdance_scale.wording import in_columns

GIB = 2**30


@dataclass(frozen=True)
class StageLine:
    """The first rank of one pipeline stage."""

    rank: int
    estimate: MemoryEstimate


def stage_lines(config: RunConfig, vocab_size: int, world_size: int) -> list[StageLine]:
    """The memory of the first rank of every pipeline stage."""
    ranks_per_stage = world_size // config.parallel.pipeline
    ranks = [stage * ranks_per_stage for stage in range(config.parallel.pipeline)]
    return [StageLine(rank, estimate_memory(config, vocab_size, world_size, rank)) for rank in ranks]


def table(lines: Sequence[StageLine], device_gib: float, is_markdown: bool) -> str:
    """The lines as text in columns, or as a Markdown table."""
    # Most runs average no weights.
    has_averages = any(line.estimate.peak.averages for line in lines)
    roles = [field.name for field in dataclasses.fields(Bytes) if has_averages or field.name != "averages"]
    header = [
        "stage",
        *roles,
        "total",
        "most activations",
        "largest at the peak",
        f"fits {device_gib:g} GiB",
    ]
    rows = [header]
    for stage, line in enumerate(lines):
        peak, (name, size) = line.estimate.peak, line.estimate.largest
        needed = max(peak.total, line.estimate.building_peak)
        fits = fits_in(needed, device_gib)
        most = f"{line.estimate.most_activations / GIB:.2f}"
        rows.append([str(stage), *_gib(peak, roles), most, f"{size / GIB:.2f} {name}", fits])
    return in_columns(rows, is_markdown)


def fits_in(needed: int, device_gib: float) -> str:
    """Whether so many bytes fit a device, in words."""
    return "yes" if needed <= device_gib * GIB else f"no, {needed / GIB:.1f}"


def remark(lines: Sequence[StageLine]) -> str:
    """What the table does not say, in a sentence."""
    building = ", ".join(f"{line.estimate.building_peak / GIB:.1f}" for line in lines)
    in_flight = ", ".join(str(line.estimate.num_in_flight) for line in lines)
    copies = ", ".join(f"{pinned_bytes(line.estimate.host_copy) / GIB:.1f}" for line in lines)
    return (
        f"{lines[0].estimate.num_micro_batches} micro-batches per replica and step; activations of {in_flight} at "
        f"once (by stage); at most {building} GiB while the model is built; {copies} GiB of host memory per rank for "
        "checkpoints in the background."
    )


def _gib(peak: Bytes, roles: Sequence[str]) -> list[str]:
    sizes = [*(getattr(peak, role) for role in roles), peak.total]
    return [f"{size / GIB:.2f}" for size in sizes]


def on_gpu(config: RunConfig) -> RunConfig:
    """The run with the form of attention that it has on a GPU, whatever this machine has."""
    if not uses_flex(config.model, torch.device("cuda")):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="flex"))
