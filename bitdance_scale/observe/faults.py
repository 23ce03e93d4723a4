"""`faults.jsonl` in the run folder: which ranks and samples gave a number that is not finite, or a spike.

A line is one micro-batch of one step. Lines are only added: a step that a resumed run takes again may be there twice,
as what was seen of a machine or of a sample stays true. Read them with `metrics.read_records`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bitdance_scale.observe.metrics import StepRecord

FAULTS_FILE = "faults.jsonl"
NUM_DESCRIBED_FAULTS = 3
NUM_DESCRIBED_SAMPLES = 4


@dataclass(frozen=True)
class Fault(StepRecord):
    """One micro-batch of a step that went wrong, and where it was computed.

    Attributes:
        step: optimiser steps taken, this one included.
        kind: `non_finite` or `spike`.
        cause: what the numbers speak for: `data` (the same again: its samples or the weights), `weights` (the same
            again in every micro-batch), `machine` (another number when computed again), `backward` (the forward pass
            is sound, the gradient is not), `sum` (every micro-batch is sound, their sum is not), `spike`.
        rank: where the number arose; -1: on no rank that can be named.
        node: host of the rank.
        replica: data rank.
        micro_batch: number within the step on its replica, from 0; -1: none.
        evidence: what was seen, as a sentence without its subject.
        samples: `key` (position in the index), `name` and `shard` of all samples of the micro-batch.
    """

    content: ClassVar[str] = "faults"

    kind: str
    cause: str
    rank: int
    node: str
    replica: int
    micro_batch: int
    evidence: str
    samples: tuple[dict[str, Any], ...] = ()

    def describe(self) -> str:
        """The fault in one line, of which only the first samples are named."""
        if self.rank < 0:
            return self.evidence
        named = [f"{sample['name']} of {sample['shard']}" for sample in self.samples[:NUM_DESCRIBED_SAMPLES]]
        num_more = len(self.samples) - len(named)
        samples = f"; samples {', '.join(named)}" if named else ""
        samples += f" and {num_more} more" if num_more else ""
        return f"rank {self.rank} (node {self.node}), micro-batch {self.micro_batch}: {self.evidence}{samples}"


def append_faults(run_folder: Path, faults: Sequence[Fault]) -> None:
    """Adds the lines of one step."""
    with (run_folder / FAULTS_FILE).open("a", encoding="utf-8") as file:
        file.write("".join(fault.to_json() + "\n" for fault in faults))


def describe_faults(faults: Sequence[Fault]) -> str:
    """All faults of a step in one line, of which only the first are described."""
    num_more = len(faults) - NUM_DESCRIBED_FAULTS
    described = [fault.describe() for fault in faults[:NUM_DESCRIBED_FAULTS]]
    if num_more > 0:
        described.append(f"{num_more} more micro-batches are in {FAULTS_FILE}")
    return ". ".join(described)
