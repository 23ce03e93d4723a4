"""What a walk must not do, whatever its layout."""

from __future__ import annotations

from tests.fake_cuda.recording import Kernel
from tests.fake_cuda.walks import Walk

_COPIES = ("_to_copy", "copy_")
_ENDS_OF_A_STEP = {
    # What is read of the device once a step: counts of targets before, losses after all micro-batches.
    "count_targets",
    "_reduce_losses",
}
# What the optimiser may do in float64: add up norms, one number of each parameter. DeepSpeed's ZeRO optimisers also
# convert this rank's part of the gradients, once a step.
_NORM_BYTES = 2**16
_DEEPSPEED = "deepspeed/"
_NORM_OF_DEEPSPEED = "deepspeed/runtime/zero/stage"
_STEP_PHASES = ("first micro-batches", "micro-batches", "first optimiser", "optimiser")


def findings(walked: Walk) -> list[str]:
    """What is wrong with a walk, as sentences; whoever walks finds tensors on two devices and mixed products itself."""
    found = [] if walked.device == "cuda:0" else [f"tensors are on {walked.device}"]
    for kernel in walked.record.kernels:
        if kernel.devices != ("cuda",) and not _may_be_elsewhere(kernel):
            found.append(
                f"{kernel.name} at {kernel.place} ({kernel.phase}): on {', '.join(kernel.devices) or 'no device'}"
            )
        if "torch.float64" in kernel.dtypes and kernel.phase in _STEP_PHASES and not _is_of_a_norm(kernel):
            found.append(f"{kernel.name} at {kernel.place} ({kernel.phase}): in float64")
    for (what, place), number in walked.waits("inputs", "save").items():
        found.append(f"inputs and saves must not wait: {number} x {what} at {place}")
    return sorted(set(found))


def _may_be_elsewhere(kernel: Kernel) -> bool:
    """Copies between devices outside of steps; and two things that DeepSpeed does once, with tensors of its own."""
    if kernel.phase == "build" and "meta" in kernel.devices:
        # A placeholder without memory for a buffer that is made later.
        return kernel.place.startswith(_DEEPSPEED)
    is_comparison = kernel.phase == "first micro-batches" and "get_lst_from_rank0" in kernel.place
    return kernel.name in _COPIES and (kernel.phase not in _STEP_PHASES or is_comparison)


def _is_of_a_norm(kernel: Kernel) -> bool:
    is_small = kernel.num_bytes <= _NORM_BYTES
    return "optimiser" in kernel.phase and (is_small or kernel.place.startswith(_NORM_OF_DEEPSPEED))
