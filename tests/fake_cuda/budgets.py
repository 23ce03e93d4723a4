"""What a layer, the rest of a stage and a step cost in calls and bytes: the numbers of budgets.toml, and the table.

    python -m tests.fake_cuda.budgets [--write] [--only TEXT]

prints the table as measured now, the differences from the file, and with --write rewrites the file, so that a change
of what a step costs is a change of that file. A layer is the difference between two depths.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fake_cuda.cases import Case
from tests.fake_cuda.walks import Request, Walk, walk_of

FILE = Path(__file__).with_name("budgets.toml")
TOLERANCE = 0.02
"""Share by which bytes may grow, or shrink, before the file must be rewritten; counts must be equal."""
_FEW_BYTES = 2**20
_HEAD = """\
# What the CUDA branches do, by walks (tests/fake_cuda/): written by `python -m tests.fake_cuda.budgets --write`.
# layer_*: one more layer on this stage, forward and backward, for one micro-batch. rest_*: everything else of a
# micro-batch (embedding or head, losses, messages) and what a step adds to its micro-batches, divided among them.
# optimiser_*: the update. waits: of the host for the device, within all micro-batches of a step. peak: of a step.
# Counts must be equal, bytes within 2 %. Kernels count what they read and write, collectives what they are given.
"""

MEASURED = [
    Case("pt_14b", 64),
    Case("ct_14b", 64),
    Case("distill_14b", 64),
    Case("pt_0p6b", 8),
    Case("imagenet_h_1x", 64),
    Case("imagenet_h_16x", 8),
    Case("pt_14b", 64, "whole sequences"),
    Case("pt_14b", 64, "no recomputation"),
    Case("pt_14b", 64, "full recomputation"),
    Case("pt_14b", 64, "ZeRO-2"),
    Case("pt_14b", 64, "uncompiled"),
    Case("pt_14b", 64, "Megatron"),
    Case("pt_14b", 64, "pipeline 2"),
    Case("pt_14b", 64, "interleaved"),
    Case("pt_0p6b", 8, "pipeline 2"),
]
"""The jobs with budgets."""


@dataclass(frozen=True)
class Costs:
    """Calls and bytes of some part of a step.

    Attributes:
        kernels: calls of operators that run at least one kernel.
        kernel_bytes: that these read and write.
        collectives: calls, messages included.
        collective_bytes: of the tensors that they are given.
    """

    kernels: int
    kernel_bytes: int
    collectives: int
    collective_bytes: int

    @classmethod
    def of_phase(cls, walked: Walk, phase: str) -> Costs:
        """Of a phase of a walk."""
        kernels = [kernel for kernel in walked.record.kernels if kernel.phase == phase]
        calls = [call for call in walked.record.collectives if call.phase == phase]
        num_bytes = sum(kernel.num_bytes for kernel in kernels), sum(call.num_bytes for call in calls)
        return cls(len(kernels), num_bytes[0], len(calls), num_bytes[1])

    def minus(self, other: Costs, times: int = 1) -> Costs:
        """These without those of something that happens so many times."""
        return Costs(*(mine - times * theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    def shared_by(self, number: int) -> Costs:
        """Of one of so many equal parts."""
        return Costs(*(value // number for value in _values(self)))

    def fields(self, prefix: str) -> dict[str, int]:
        """By name."""
        return {f"{prefix}_{name}": value for name, value in vars(self).items()}


def measure(case: Case, stage: int) -> dict[str, int]:
    """The budget of the first rank of a stage, as it is now."""
    rank = case.first_ranks()[stage]
    walked, deeper = (walk_of(request) for request in _requests(case, rank))
    more = deeper.num_layers - walked.num_layers
    assert more == case.run.parallel.virtual_stages, "every stage has one more layer"
    passes = walked.num_micro_batches
    shallow, deep = (Costs.of_phase(found, "micro-batches") for found in (walked, deeper))
    layer = deep.minus(shallow).shared_by(more * passes)
    return {
        **layer.fields("layer"),
        **shallow.minus(layer, walked.num_layers * passes).shared_by(passes).fields("rest"),
        **Costs.of_phase(walked, "optimiser").fields("optimiser"),
        "waits": sum(walked.waits_of_micro_batches().values()),
        "peak_bytes": sum(walked.peak.values()),
    }


def requests_of(cases: Iterable[Case]) -> list[Request]:
    """The walks that the budgets of some jobs are measured on."""
    return [request for case in cases for rank in case.first_ranks() for request in _requests(case, rank)]


def _requests(case: Case, rank: int) -> tuple[Request, Request]:
    deeper = replace(case, layers_per_stage=case.layers_per_stage + 1)
    return case.request(rank, parts=("steps",)), deeper.request(rank, parts=("steps",))


def read() -> dict[str, dict[str, int]]:
    """The budgets of the file, by `name_of`."""
    with FILE.open("rb") as file:
        return tomllib.load(file)


def name_of(case: Case, stage: int) -> str:
    """The name of a budget."""
    return f"{case}, stage {stage}" if case.run.parallel.pipeline > 1 else str(case)


def breaches(found: dict[str, int], allowed: dict[str, int]) -> list[str]:
    """Where what is found is not what is allowed, as sentences."""
    lines = [f"{name}: in the file, not measured" for name in sorted(allowed.keys() - found.keys())]
    for name, value in found.items():
        if name not in allowed:
            lines.append(f"{name}: {value:,} measured, not in the file")
        elif abs(value - allowed[name]) > _slack(name, allowed[name]):
            lines.append(f"{name}: {value:,} instead of {allowed[name]:,}")
    return lines


def write(budgets: dict[str, dict[str, int]]) -> None:
    """Makes the file."""
    parts = [_HEAD]
    for name, budget in budgets.items():
        parts.append(f'\n["{name}"]\n' + "".join(f"{key} = {value:_}\n" for key, value in budget.items()))
    FILE.write_text("".join(parts), encoding="utf-8")


def table(budgets: dict[str, dict[str, int]]) -> str:
    """A Markdown table of the most important numbers."""
    lines = [
        "| rank | a layer: kernels | GB | collectives | GB | waits a step | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, budget in budgets.items():
        cells = (
            name,
            budget["layer_kernels"],
            f"{budget['layer_kernel_bytes'] / 1e9:.2f}",
            budget["layer_collectives"],
            f"{budget['layer_collective_bytes'] / 1e9:.3f}",
            budget["waits"],
            f"{budget['peak_bytes'] / 2**30:.2f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from tests.fake_cuda.server import in_parallel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite budgets.toml")
    parser.add_argument("--only", default="", metavar="TEXT", help="budgets whose names have it; others are kept")
    options = parser.parse_args(arguments)
    chosen = [case for case in MEASURED if options.only in str(case)]
    in_parallel([lambda request=request: walk_of(request) for request in requests_of(chosen)])  # type: ignore[misc]
    found = {
        name_of(case, stage): measure(case, stage) for case in chosen for stage in range(case.run.parallel.pipeline)
    }
    print(table(found))
    before = read() if FILE.exists() else {}
    for name, budget in found.items():
        for line in breaches(budget, before.get(name, {})):
            print(f"{name}: {line}")
    if options.write:
        names = [name_of(case, stage) for case in MEASURED for stage in range(case.run.parallel.pipeline)]
        write({name: found.get(name) or before[name] for name in names if name in found or name in before})


def _values(costs: Costs) -> tuple[int, int, int, int]:
    return costs.kernels, costs.kernel_bytes, costs.collectives, costs.collective_bytes


def _slack(name: str, allowed: int) -> float:
    return max(TOLERANCE * allowed, _FEW_BYTES) if name.endswith("_bytes") else 0


if __name__ == "__main__":
    main()
