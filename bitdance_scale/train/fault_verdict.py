"""Which rank and which samples a bad step is laid to, from what all ranks saw of their micro-batches.

A number that is not finite comes from the samples, the weights or the machine. The forward pass is computed again with
the same weights: what is the same again lies in samples or weights, what is not lies in the machine. Where forward
passes do not repeat to the bit anyway, on most micro-batches, only a number that is finite one time and not the other
is laid to the machine.

Within a replica a number is followed to where it first goes wrong: forwards along the stages, and if the forward pass
is sound, backwards from the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

INPUT, LOSS, GRADIENT = "input", "loss", "gradient"


@dataclass(frozen=True)
class Sign:
    """A number that a micro-batch gave on a rank.

    Attributes:
        kind: INPUT (what enters a stage), LOSS (a loss sum of the last stage) or GRADIENT (that of what enters).
        stage: pipeline stage.
        value: the number.
        again: the number computed again; None: it was not.
    """

    kind: str
    stage: int
    value: float
    again: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether it was finite in the step."""
        return math.isfinite(self.value)

    @property
    def flips(self) -> bool:
        """Whether it is finite one time and not the other."""
        return self.again is not None and math.isfinite(self.again) != self.is_finite

    @property
    def differs(self) -> bool:
        """Whether it is finite both times, and another number."""
        return self.again is not None and not self.flips and self.is_finite and self.again != self.value


@dataclass(frozen=True)
class MicroReading:
    """A micro-batch on a rank.

    Attributes:
        number: within the step on its replica, from 0.
        keys: of its samples.
        signs: its numbers.
        loss: mean over its own targets; None on ranks that have no loss.
    """

    number: int
    keys: tuple[int, ...]
    signs: tuple[Sign, ...]
    loss: float | None = None

    @property
    def is_broken(self) -> bool:
        """Whether one of its numbers was not finite in the step."""
        return any(not sign.is_finite for sign in self.signs)

    @property
    def is_suspect(self) -> bool:
        """Whether one of its numbers is not finite or another one when computed again."""
        return self.is_broken or any(sign.flips or sign.differs for sign in self.signs)

    @property
    def largest_gradient(self) -> float | None:
        """The largest magnitude of the gradient of what enters the first stage; None on ranks without it."""
        return next((sign.value for sign in self.signs if sign.kind == GRADIENT and sign.stage == 0), None)


@dataclass(frozen=True)
class RankReport:
    """What a rank tells the first one of a bad step.

    Attributes:
        rank, node: global rank and its host.
        replica: data rank.
        tensor_rank: rank on the tensor-parallel axis.
        stages: pipeline stages of the rank.
        num_micro: micro-batches of the step on the replica.
        num_broken: of those, how many gave a number on this rank that is not finite.
        num_differing: of those, how many gave other finite numbers when computed again.
        readings: those of the micro-batches that matter, not all if they are many.
    """

    rank: int
    node: str
    replica: int
    tensor_rank: int
    stages: tuple[int, ...]
    num_micro: int
    num_broken: int
    num_differing: int
    readings: tuple[MicroReading, ...]


@dataclass(frozen=True)
class MicroFault:
    """What is said of a micro-batch; the fields are those of `observe.faults.Fault`."""

    cause: str
    rank: int
    node: str
    replica: int
    micro_batch: int
    evidence: str
    keys: tuple[int, ...] = ()


SUM_FAULT = MicroFault(
    "sum", -1, "", -1, -1,
    "loss, hidden states and their gradient are finite in every micro-batch: the gradient of a weight, or the sum over "
    "micro-batches and ranks, is not",
)  # fmt: skip


def explain_non_finite(reports: Sequence[RankReport]) -> list[MicroFault]:
    """The micro-batches that are to blame for a gradient that is not finite, those of the machine first."""
    num_micro = sum(report.num_micro for report in reports if 0 in report.stages and report.tensor_rank == 0)
    is_noisy = _sum_over_replicas(reports, lambda report: report.num_differing) > max(num_micro, 2) / 2
    num_broken = _sum_over_replicas(reports, lambda report: report.num_broken)
    faults = [fault for micro in _by_micro_batch(reports).values() if (fault := _explain(micro, reports, is_noisy))]
    if num_broken == num_micro > 1 and all(fault.cause == "data" for fault in faults):
        # No sample is to blame where all are.
        named = faults[0]
        evidence = f"as in all {num_micro} micro-batches of the step, {named.evidence}"
        faults = [MicroFault("weights", named.rank, named.node, named.replica, named.micro_batch, evidence)]
    return sorted(faults, key=lambda fault: fault.cause != "machine") or [SUM_FAULT]


def explain_spike(reports: Sequence[RankReport], quantity: str, num_named: int) -> list[MicroFault]:
    """The micro-batches with the highest numbers of a step whose loss or gradient norm is a spike.

    Args:
        reports: of all ranks.
        quantity: `loss`: by the mean over the own targets; `grad_norm`: by the largest gradient that arrives at the
            first stage, where that was watched, and else by the loss.
        num_named: how many.
    """
    has_gradients = any(reading.largest_gradient is not None for report in reports for reading in report.readings)
    by_loss = quantity == "loss" or not has_gradients
    found: dict[tuple[int, int], tuple[float, RankReport, MicroReading]] = {}
    for report in sorted(reports, key=lambda report: report.rank):
        for reading in report.readings:
            value = reading.loss if by_loss else reading.largest_gradient
            if value is not None:
                found.setdefault((report.replica, reading.number), (value, report, reading))
    what = "own loss" if by_loss else "largest gradient at the model's input"
    return [
        MicroFault(
            "spike", report.rank, report.node, report.replica, reading.number, f"{what} {value:.4g}", reading.keys
        )
        for value, report, reading in sorted(found.values(), key=lambda item: -item[0])[:num_named]
    ]


Micro = list[tuple[RankReport, MicroReading]]


def _by_micro_batch(reports: Sequence[RankReport]) -> dict[tuple[int, int], Micro]:
    """(replica, number) -> what the ranks of the replica saw of it."""
    grouped: dict[tuple[int, int], Micro] = {}
    for report in sorted(reports, key=lambda report: report.rank):
        for reading in report.readings:
            grouped.setdefault((report.replica, reading.number), []).append((report, reading))
    return dict(sorted(grouped.items()))


def _sum_over_replicas(reports: Sequence[RankReport], count: Callable[[RankReport], int]) -> int:
    """A count of micro-batches over the replicas, of the rank of each that saw most."""
    most: dict[int, int] = {}
    for report in reports:
        most[report.replica] = max(most.get(report.replica, 0), count(report))
    return sum(most.values())


def _explain(micro: Micro, reports: Sequence[RankReport], is_noisy: bool) -> MicroFault | None:
    signs = [(report, sign) for report, reading in micro for sign in reading.signs]
    flipped = [(report, sign) for report, sign in signs if sign.flips]
    differing = [(report, sign) for report, sign in signs if sign.differs]
    broken = [(report, sign) for report, sign in signs if not sign.is_finite]
    if flipped:
        cause, found, verb = "machine", flipped, "was {first} and is {second} when computed again"
    elif differing and not is_noisy:
        cause, found, verb = "machine", differing, "was {first} and is {second} when computed again"
    elif any(sign.kind != GRADIENT for _, sign in broken):
        cause, found, verb = "data", broken, "is not finite, and is so again: its samples or the weights"
    elif broken:
        cause, found, verb = "backward", broken, "is not finite, while the forward pass is, and repeats"
    else:
        return None
    report, sign = _first_wrong(found)
    blamed = _origin(report, sign, reports)
    second = math.nan if sign.again is None else sign.again
    evidence = f"the {_NAMES[sign.kind]} {verb.format(first=f'{sign.value:.9g}', second=f'{second:.9g}')}"
    return MicroFault(cause, blamed.rank, blamed.node, report.replica, micro[0][1].number, evidence, micro[0][1].keys)


def _first_wrong(found: Sequence[tuple[RankReport, Sign]]) -> tuple[RankReport, Sign]:
    """Where the number went wrong first: forwards, or backwards if only gradients did."""
    forwards = [(report, sign) for report, sign in found if sign.kind != GRADIENT]
    if forwards:
        return min(forwards, key=lambda item: (item[1].stage, item[1].kind == LOSS))
    return max(found, key=lambda item: item[1].stage)


def _origin(report: RankReport, sign: Sign, reports: Sequence[RankReport]) -> RankReport:
    """The rank that computed it: what enters a stage was made by the one before it."""
    if sign.kind != INPUT or sign.stage == 0:
        return report
    return next(_holders(reports, report.replica, report.tensor_rank, sign.stage - 1), report)


def _holders(reports: Sequence[RankReport], replica: int, tensor_rank: int, stage: int) -> Iterator[RankReport]:
    return (
        report
        for report in reports
        if report.replica == replica and report.tensor_rank == tensor_rank and stage in report.stages
    )


_NAMES = {INPUT: "hidden state", LOSS: "loss", GRADIENT: "gradient"}
