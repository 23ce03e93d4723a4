"""A plan as text, and as a document for scripts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from bitdance_scale.planning.advice import changes, limit, shares
from bitdance_scale.planning.layouts import Dropped, name_of
from bitdance_scale.planning.plan import GIB, Prediction, StagePlan
from bitdance_scale.wording import in_columns

CAVEAT = "Predicted from a roofline (docs/plan.md), not measured."


def stage_text(plan: StagePlan, num_shown: int) -> str:
    """The plan of a stage: the fastest layouts, the parts of the first, what limits it, and what was dropped."""
    kinds = Counter(item.kind for item in plan.dropped)
    best = plan.ranked[0]
    heading = (
        f"{plan.config.run.name} on {plan.num_gpus} x {plan.machine.name}: of {len(plan.ranked) + len(plan.dropped):,} "
        f"layouts {len(plan.ranked):,} fit; {kinds['memory']:,} are legal and do not fit, {kinds['illegal']:,} break a "
        f"rule, {kinds['batch']:,} cannot divide the batch. {CAVEAT}"
    )
    parts = [
        heading,
        in_columns(_rows(plan, num_shown), is_markdown=False),
        _table_remark(plan),
        in_columns(_part_rows(best), is_markdown=False),
        f"What limits it: {limit(best)}",
        "\n".join(["What to change next:", *(f"- {line}" for line in changes(best, plan))]),
        "\n".join(["Dropped:", *_dropped_lines(plan.dropped)]),
    ]
    return "\n\n".join(parts)


def recipe_text(plans: Sequence[StagePlan], chosen: Sequence[Prediction]) -> str:
    """The stages of a recipe, each under its fastest layout, and their sum."""
    rows = [["stage", "layout", "steps", "step s", "images/s", "MFU", "GiB", "days", "GPU-hours", "EFLOP"]]
    for plan, item in zip(plans, chosen, strict=True):
        rows.append(
            [
                plan.config.run.name,
                name_of(item.parallel),
                f"{plan.config.run.steps:,}",
                *_numbers(item),
                f"{_flops(plan, item) / 1e18:,.0f}",
            ]
        )
    total_days, total_hours = sum(item.days for item in chosen), sum(item.gpu_hours for item in chosen)
    total_flops = sum(_flops(plan, item) for plan, item in zip(plans, chosen, strict=True))
    rows.append(["sum", *[""] * 6, f"{total_days:.1f}", f"{total_hours:,.0f}", f"{total_flops / 1e18:,.0f}"])
    heading = f"{len(plans)} stages on {plans[0].num_gpus} x {plans[0].machine.name}, each under its fastest layout."
    return "\n\n".join([f"{heading} {CAVEAT}", in_columns(rows, is_markdown=False)])


def stage_document(plan: StagePlan) -> dict[str, object]:
    """The plan as values of JSON: every layout that fits, every one that was dropped with its reason."""
    return {
        "run": plan.config.run.name,
        "stage": plan.config.run.stage,
        "machine": plan.machine.name,
        "num_gpus": plan.num_gpus,
        "ranked": [_document(item) for item in plan.ranked],
        "limit": limit(plan.ranked[0]) if plan.ranked else None,
        "changes": changes(plan.ranked[0], plan) if plan.ranked else [],
        "dropped": [
            {"parallel": dataclasses.asdict(item.parallel), "kind": item.kind, "reason": item.reason}
            for item in plan.dropped
        ],
    }


def _document(item: Prediction) -> dict[str, object]:
    return {
        "parallel": dataclasses.asdict(item.parallel),
        "pipeline_layers": list(item.split),
        "num_replicas": item.num_replicas,
        "num_micro_batches": item.num_micro_batches,
        "step_s": item.time.total,
        "step_parts_s": dataclasses.asdict(item.time),
        "images_per_s": item.images_per_s,
        "mfu": item.mfu,
        "needed_bytes": item.memory.needed,
        "memory_bytes": dataclasses.asdict(item.memory.peak),
        "days": item.days,
        "gpu_hours": item.gpu_hours,
    }


def _rows(plan: StagePlan, num_shown: int) -> list[list[str]]:
    rows = [["", "layout", "step s", "images/s", "MFU", "GiB", "days", "GPU-hours", "packs", "most of the rest"]]
    shown = [(place, item) for place, item in enumerate(plan.ranked, 1) if place <= num_shown]
    configured = plan.configured
    if configured is not None and configured not in plan.ranked[:num_shown]:
        shown.append((plan.ranked.index(configured) + 1, configured))
    for place, item in shown:
        rest = next((f"{name} {share:.0%}" for name, share in shares(item).items() if name != "gemm"), "")
        mark = "*" if item.parallel == plan.config.parallel else ""
        packs = str(item.num_micro_batches)
        rows.append([f"{mark}{place}", name_of(item.parallel), *_numbers(item), packs, rest])
    return rows


def _numbers(item: Prediction) -> list[str]:
    return [
        f"{item.time.total:.3g}",
        f"{item.images_per_s:.3g}" if item.images_per_s < 1000 else f"{item.images_per_s:,.0f}",
        f"{item.mfu:.1%}",
        f"{item.memory.needed / GIB:.1f}",
        f"{item.days:.1f}",
        f"{item.gpu_hours:,.0f}",
    ]


def _part_rows(item: Prediction) -> list[list[str]]:
    rows = [["part of the step", "s", "share"]]
    parts = dataclasses.asdict(item.time)
    for name, share in shares(item).items():
        rows.append([name.replace("_", " "), f"{parts[name]:.3f}", f"{share:.1%}"])
    return rows


def _table_remark(plan: StagePlan) -> str:
    machine, best = plan.machine, plan.ranked[0]
    return (
        f"GiB are those of `bitdance memory`, by formula; {machine.usable_bytes / GIB:.1f} of "
        f"{machine.memory_gib.value:g} are usable. {_configured_remark(plan)} The first has {best.num_replicas} "
        f"replicas with {best.num_micro_batches} packs each per step; the stage has {plan.config.run.steps:,} steps."
    )


def _configured_remark(plan: StagePlan) -> str:
    if plan.configured is not None:
        return "* is the layout that is configured."
    reason = next((item.reason for item in plan.dropped if item.parallel == plan.config.parallel), "")
    return f"The layout that is configured was dropped: {reason}."


def _dropped_lines(dropped: Sequence[Dropped]) -> list[str]:
    """A line for every rule, with the first of its messages."""
    counts = Counter((item.kind, item.rule) for item in dropped)
    lines = []
    for (kind, rule), number in counts.most_common():
        example = next(item for item in dropped if (item.kind, item.rule) == (kind, rule))
        lines.append(f"- {number:,} ({kind}): {rule} Such as {name_of(example.parallel)}: {example.reason}")
    return lines


def _flops(plan: StagePlan, item: Prediction) -> float:
    """Model FLOPs of a stage."""
    peak = plan.machine.peak_flops(plan.config.run.dtype)
    return item.mfu * peak * item.num_gpus * item.stage_s
