"""What limits a layout, and what to change next, in sentences with numbers."""

from __future__ import annotations

import dataclasses

from bitdance_scale.planning.layouts import name_of
from bitdance_scale.planning.plan import GIB, Prediction, StagePlan

# A part below this share of the step is not worth a sentence.
LEAST_SHARE = 0.05
# Room that is left before a longer pack is advised.
LEAST_ROOM_BYTES = 8 * GIB

_MEANING = {
    "gemm": "products with weights, as they should",
    "attention": "attention",
    "elementwise": "elementwise kernels, which the memory limits",
    "accumulation": "adding the gradients of every micro-batch",
    "launch": "starting kernels",
    "tensor_traffic": "messages between tensor-parallel ranks",
    "pipeline_traffic": "messages between pipeline stages",
    "bubble": "waiting while the pipeline fills and drains",
    "data_traffic": "messages between replicas",
    "optimiser": "the optimiser",
    "encoder": "encoding images",
}
_CHANGES = {
    "attention": "longer packs do not help; fewer tokens per image (vision tokenizers with more downsampling) would",
    "elementwise": "parallel.compile=true fuses those of layers, head and cross-entropy, if it is not on",
    "accumulation": "longer packs (data.max_pack_tokens) make fewer micro-batches; so does a lower parallel.tensor",
    "launch": "longer packs (data.max_pack_tokens) give every kernel more to do",
    "tensor_traffic": "a lower parallel.tensor sends less, where memory allows it (parallel.recompute=full, more GPUs)",
    "pipeline_traffic": "fewer parallel.pipeline stages or parallel.virtual_stages send less",
    "bubble": "a larger data.global_batch, fewer stages or more parallel.virtual_stages shorten it",
    "data_traffic": "parallel.zero_stage=1 sends once per step; a larger data.global_batch spreads it over more images",
    "optimiser": "more replicas divide the optimiser's state further",
    "encoder": "`bitdance encode` stores the bits once for all epochs (data.bits_dir), and this part is gone",
}


def shares(prediction: Prediction) -> dict[str, float]:
    """Part of the step -> its share, the largest first; parts that take no time are left out."""
    parts = dataclasses.asdict(prediction.time)
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return {name: seconds / prediction.time.total for name, seconds in ordered if seconds > 0}


def limit(prediction: Prediction) -> str:
    """What most of the time goes into, and what most of the rest."""
    (first, share), *others = shares(prediction).items()
    text = f"{share:.0%} of the step goes into {_MEANING[first]}"
    if others:
        second, second_share = others[0]
        text += f", {second_share:.0%} into {_MEANING[second]}"
    return f"{text}."


def changes(prediction: Prediction, plan: StagePlan) -> list[str]:
    """What to change next, the largest gain first: what a part costs, and what lowers it."""
    lines = [
        f"{share:.0%} {_MEANING[name]}: {_CHANGES[name]}"
        for name, share in shares(prediction).items()
        if name in _CHANGES and share >= LEAST_SHARE
    ]
    room = plan.machine.usable_bytes - prediction.memory.needed
    if room >= LEAST_ROOM_BYTES:
        lines.append(f"{room / GIB:.0f} GiB are free: try a larger data.max_pack_tokens")
    if faster := _faster_with_memory(prediction, plan):
        gain = prediction.time.total / faster.time.total - 1
        missing = (faster.memory.needed - plan.machine.usable_bytes) / GIB
        lines.append(f"{name_of(faster.parallel)} would be {gain:.0%} faster and lacks {missing:.1f} GiB per GPU")
    return lines


def _faster_with_memory(prediction: Prediction, plan: StagePlan) -> Prediction | None:
    """The layout that lacks least memory of those that would be 3 % faster."""
    faster = [item for item in plan.too_large if item.time.total < prediction.time.total / 1.03]
    return min(faster, key=lambda item: item.memory.needed, default=None)
