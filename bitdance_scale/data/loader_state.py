"""Where a loader stands: all that a resume needs, in a few hundred bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bitdance_scale.errors import CheckpointError


@dataclass(frozen=True)
class LoaderState:
    """The place in the plan where a loader goes on.

    Attributes:
        seed: seed of the run.
        index_hash: `Index.hash`.
        plan_hash: `Plan.hash`.
        step: optimiser step of the next pack.
        pack: number of the next pack in that step, on every rank; 0 at a step boundary, and so in every checkpoint of
            training (`LoadedStep.state`). Only there may another version of `packing.py` go on.
        num_data_ranks: data-parallel ranks that the step was dealt to; matters only where `pack` is not 0.
    """

    seed: int
    index_hash: str
    plan_hash: str
    step: int
    pack: int
    num_data_ranks: int

    def to_dict(self) -> dict[str, int | str]:
        """The state as JSON-able values; under 1 KB as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoaderState:
        """The state that `to_dict` gave.

        Raises:
            CheckpointError: fields are missing, unknown or of another type.
        """
        expected = {"seed": int, "index_hash": str, "plan_hash": str, "step": int, "pack": int, "num_data_ranks": int}
        if {name: type(value) for name, value in values.items()} != expected:
            raise CheckpointError(
                f"loader state {values}: expected the fields {sorted(expected)}. Resume from another checkpoint."
            )
        negative = [name for name, value in values.items() if isinstance(value, int) and value < 0]
        if negative:
            raise CheckpointError(
                f"loader state {values}: {negative[0]} must not be negative. Resume from another checkpoint."
            )
        return cls(**values)

    def check(self, expected: LoaderState) -> None:
        """Refuses to resume where the data would not go on as they began.

        Args:
            expected: the state in which this run would start without a checkpoint.

        Raises:
            CheckpointError: another data set, seed or plan, or the middle of a step on another number of ranks.
        """
        if self.index_hash != expected.index_hash:
            raise CheckpointError(
                f"the checkpoint was trained on the data set with index {self.index_hash}, data.shards now gives "
                f"{expected.index_hash}: shards (or data.sources) were added, removed, reordered or changed. Restore "
                "them, or start a new run from the checkpoint's weights."
            )
        if self.seed != expected.seed:
            raise CheckpointError(
                f"the checkpoint was trained with run.seed={self.seed}, now it is {expected.seed}: the data order "
                "would not go on. Restore run.seed, or start a new run from the checkpoint's weights."
            )
        if self.plan_hash != expected.plan_hash:
            raise CheckpointError(
                "the checkpoint was trained with another data.global_batch, data.resolutions, data.max_upscale, "
                "data.filters, data.captions, data.has_borders or data.sources (names, shares, shards of each), or "
                "with other captions or scores in the shards: the data order would not go on. Restore them, or start a "
                "new run from the checkpoint's weights."
            )
        if self.pack and self.num_data_ranks != expected.num_data_ranks:
            raise CheckpointError(
                f"the checkpoint lies inside step {self.step}, after pack {self.pack} on each of {self.num_data_ranks} "
                f"data-parallel replicas; this run has {expected.num_data_ranks}. Resume on {self.num_data_ranks} "
                "replicas, or from a checkpoint at a step boundary."
            )
