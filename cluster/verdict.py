"""Decides from the nodes' reports which of them are bad; part of the pre-flight that touches no node."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# With fewer, nothing says which one differs from the rest.
MIN_NODES_TO_COMPARE = 3


@dataclass(frozen=True)
class Gpu:
    """A GPU before training; sizes in GiB."""

    name: str
    total_gib: float
    used_gib: float


@dataclass(frozen=True)
class Report:
    """What a node found out about itself so far.

    Attributes:
        node: its name.
        phase: what the node was doing when it wrote this; "done" at the end.
        errors: failures, as (rule that was broken, message).
        gpus: the GPUs that CUDA sees; None if the node did not get that far.
        compiler_fault: why kernels cannot be compiled; None if they can, or need not.
        clock_s: its clock at a moment common to all nodes, within milliseconds.
        local_gbs: bus bandwidth in GB/s of an all-reduce over its own processes; None if not measured.
        pairs: (other node, bus bandwidth in GB/s of an all-reduce over both, or None if it failed).
    """

    node: str
    phase: str = "start"
    errors: tuple[tuple[str, str], ...] = ()
    gpus: tuple[Gpu, ...] | None = None
    compiler_fault: str | None = None
    clock_s: float | None = None
    local_gbs: float | None = None
    pairs: tuple[tuple[str, float | None], ...] = ()

    def to_json(self) -> str:
        """The report as the text of its file."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads the text of `to_json`."""
        fields = json.loads(text)
        if fields["gpus"] is not None:
            fields["gpus"] = tuple(Gpu(**gpu) for gpu in fields["gpus"])
        for name in ("errors", "pairs"):
            fields[name] = tuple(tuple(entry) for entry in fields[name])
        return cls(**fields)


@dataclass(frozen=True)
class Limits:
    """The limits of a good node.

    Attributes:
        num_gpus: GPUs per node of the job; 0 if the launcher does not count them.
        max_used_gib: memory of a GPU that may be in use before training.
        max_skew_s: allowed distance of a clock from the others.
        min_share: share of the median bandwidth that a node must reach.
        min_local_gbs: bandwidth that every node must reach alone, in GB/s, whatever the others reach.
        min_pair_gbs: the same with a neighbour.
    """

    num_gpus: int
    max_used_gib: float = 2.0
    max_skew_s: float = 2.0
    min_share: float = 0.6
    min_local_gbs: float = 0.0
    min_pair_gbs: float = 0.0


@dataclass(frozen=True)
class Finding:
    """Something wrong with a node."""

    node: str
    found: str
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.found}; rule: {self.rule}; fix: {self.fix}"


def judge(reports: Mapping[str, Report | None], limits: Limits) -> list[Finding]:
    """Everything that is wrong, in the order of the nodes.

    Args:
        reports: node of the job -> its report, or None if there is none.
        limits: those of a good node.
    """
    found = [report for report in reports.values() if report is not None]
    findings: list[Finding] = []
    for node, report in reports.items():
        if report is None:
            findings.append(
                Finding(
                    node,
                    "it wrote no report to the shared log folder",
                    "every node starts Python and writes to that folder",
                    "read the node's log; mount the shared file system on the node",
                )
            )
            continue
        findings += [Finding(node, message, rule, "read the node's log") for rule, message in report.errors]
        if report.phase != "done":
            findings.append(
                Finding(
                    node,
                    f"it did not get past this phase: {report.phase}",
                    "every node finishes the pre-flight in time",
                    "read the node's log",
                )
            )
    findings += [
        Finding(
            report.node,
            f"kernels cannot be compiled: {report.compiler_fault}",
            "a C compiler (gcc, clang or $CC) and Python.h, as the configuration compiles kernels",
            "install gcc and the headers of this Python (python3-dev) on the node, or name a compiler with CC; without "
            "one, train with model.attention=dense parallel.compile=false",
        )
        for report in found
        if report.compiler_fault is not None
    ]
    findings += _judge_gpus(found, limits) + _judge_clocks(found, limits) + _judge_bandwidth(found, limits)
    order = list(reports)
    return sorted(findings, key=lambda finding: order.index(finding.node))


def pairings(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of nodes to measure, in rounds in which every node is in at most one pair.

    The pairs are the edges of a ring. With three nodes or more, each is measured with two others: if both pairs are
    slow, the node is at fault and not its partner.
    """
    if num_nodes < 2:
        return []
    if num_nodes == 2:
        return [[(0, 1)]]
    edges = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    is_odd = num_nodes % 2
    rounds = [edges[0 : num_nodes - is_odd : 2], edges[1::2]]
    return [*rounds, [edges[-1]]] if is_odd else rounds


def _judge_gpus(reports: Sequence[Report], limits: Limits) -> list[Finding]:
    findings = []
    looked = {report.node: report.gpus for report in reports if report.gpus is not None}
    num_gpus = limits.num_gpus or statistics.mode([len(gpus) for gpus in looked.values()] or [0])
    count_rule = f"{num_gpus}, as {'the job asks for' if limits.num_gpus else 'on most nodes'}"
    largest_gib = max((gpu.total_gib for gpus in looked.values() for gpu in gpus), default=0.0)
    for node, gpus in looked.items():
        if len(gpus) != num_gpus:
            findings.append(
                Finding(
                    node,
                    f"CUDA sees {len(gpus)} GPUs",
                    count_rule,
                    "find the lost GPU with nvidia-smi and dmesg; leave the node out until it has been restarted",
                )
            )
        for index, gpu in enumerate(gpus):
            # GPUs of one size differ by some MiB.
            if gpu.total_gib < 0.98 * largest_gib:
                findings.append(
                    Finding(
                        node,
                        f"GPU {index} ({gpu.name}) has {gpu.total_gib:.1f} GiB",
                        f"GPUs of one size; the largest has {largest_gib:.1f} GiB",
                        "ask for one kind of GPU (Slurm: --constraint or --gres), or leave the node out",
                    )
                )
            if gpu.used_gib > limits.max_used_gib:
                findings.append(
                    Finding(
                        node,
                        f"GPU {index} has {gpu.used_gib:.1f} GiB in use before training",
                        f"at most {limits.max_used_gib:g} GiB (--max-used-gib)",
                        "end the process that nvidia-smi lists on the node",
                    )
                )
    return findings


def _judge_clocks(reports: Sequence[Report], limits: Limits) -> list[Finding]:
    clocks = {report.node: report.clock_s for report in reports if report.clock_s is not None}
    if len(clocks) < 2:
        return []
    # Of two clocks either may be wrong; the first node's counts as right.
    is_comparable = len(clocks) >= MIN_NODES_TO_COMPARE
    right_s = statistics.median(clocks.values()) if is_comparable else next(iter(clocks.values()))
    reference = "the median of all nodes" if is_comparable else f"the clock of {next(iter(clocks))}"
    return [
        Finding(
            node,
            f"its clock is {clock_s - right_s:+.1f} s from {reference}",
            f"at most {limits.max_skew_s:g} s (--max-skew-s)",
            "run chrony or ntpd on the node",
        )
        for node, clock_s in clocks.items()
        if abs(clock_s - right_s) > limits.max_skew_s
    ]


def _judge_bandwidth(reports: Sequence[Report], limits: Limits) -> list[Finding]:
    findings = []
    local = {report.node: report.local_gbs for report in reports if report.local_gbs is not None}
    local_rule, local_gbs = _bandwidth_rule(list(local.values()), limits.min_share, limits.min_local_gbs)
    for node, value in local.items():
        if value < local_gbs:
            findings.append(
                Finding(
                    node,
                    f"all-reduce over its own GPUs: {value:.3g} GB/s",
                    local_rule,
                    "check nvidia-smi topo -m and nvidia-smi nvlink -s; leave the node out",
                )
            )
    measured = [value for report in reports for _, value in report.pairs if value is not None]
    pair_rule, pair_gbs = _bandwidth_rule(measured, limits.min_share, limits.min_pair_gbs)
    for report in reports:
        # One good pair clears a node: in the other pair, the partner is the slow one.
        if not report.pairs or any(value is not None and value >= pair_gbs for _, value in report.pairs):
            continue
        pairs = ", ".join(
            f"with {other} " + ("failed" if value is None else f"{value:.3g} GB/s") for other, value in report.pairs
        )
        alone = len(report.pairs) == 1
        findings.append(
            Finding(
                report.node,
                f"all-reduce: {pairs}" + ("; the other node may be at fault instead" if alone else ""),
                pair_rule,
                "check ibstat and the switch's error counters; leave the node out",
            )
        )
    return findings


def _bandwidth_rule(values: Sequence[float], min_share: float, least_gbs: float) -> tuple[str, float]:
    """The rule in words, and the bandwidth in GB/s that it asks for."""
    if len(values) < MIN_NODES_TO_COMPARE:
        return f"it succeeds with at least {least_gbs:g} GB/s", least_gbs
    median_gbs = statistics.median(values)
    wanted_gbs = max(least_gbs, min_share * median_gbs)
    return f"at least {wanted_gbs:.3g} GB/s; the median is {median_gbs:.3g} (--min-share {min_share:g})", wanted_gbs
