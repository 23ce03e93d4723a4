"""The memory of a walk against the estimate of `bitdance memory`, for the same packs.

The walk logs what the CUDA branches allocate; the estimate runs the branches of a CPU (`parallel/memory_estimate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.fake_cuda.server import server
from tests.fake_cuda.walks import Request, Walk

HELD = ("weights", "gradients", "masters", "moments", "averages")
"""What a rank keeps from step to step, in roles of `parallel/memory_parts.py`."""
BOUND = 0.03
"""Largest share by which the estimate may be off."""
_SMALL_BYTES = 2**20


@dataclass(frozen=True)
class Estimate:
    """What `bitdance memory` says of a rank.

    Attributes:
        held: bytes by role between the last backward pass and the update.
        peak: bytes by role at the fullest moment of a step, without the autoencoder, which a walk does not have.
        most_activations: the most bytes of activations in a step.
    """

    held: dict[str, int]
    peak: dict[str, int]
    most_activations: int


def import_engines() -> None:
    """Imports what an estimate needs."""
    import bitdance_scale.parallel.memory_estimate  # noqa: F401  (imported for the time it takes)


def estimate(request: Request) -> Estimate:
    """The estimate for the packs of a walk."""
    found = server("cpu").call("tests.fake_cuda.memory:estimate_here", request)
    assert isinstance(found, Estimate), "what `estimate_here` returns"
    return found


def estimate_here(request: Request) -> Estimate:
    """The estimate in this process, which becomes the rank for good."""
    import dataclasses

    from bitdance_scale.config.load import load_config
    from bitdance_scale.parallel.memory_estimate import estimate_memory_here
    from bitdance_scale.parallel.memory_table import on_gpu
    from tests.fake_cuda.walk import choose_packs

    config = on_gpu(load_config(request.config, list(request.overrides)))
    data_size = request.world // (config.parallel.tensor * config.parallel.pipeline)
    packs = choose_packs(config, data_size, request.is_uneven)
    found = estimate_memory_here(config, request.vocab, request.world, request.rank, packs)
    return Estimate(
        held=dataclasses.asdict(found.held) | {"tokenizer": 0},
        peak=dataclasses.asdict(found.peak) | {"tokenizer": 0},
        most_activations=found.most_activations,
    )


def differences(walked: Walk, estimated: Estimate) -> list[str]:
    """Where the two are further apart than `BOUND`, as sentences."""
    pairs = {f"held {role}": (walked.held.get(role, 0), estimated.held[role]) for role in HELD}
    pairs["peak"] = (sum(walked.peak.values()), sum(estimated.peak.values()))
    pairs["most activations"] = (walked.most_activations, estimated.most_activations)
    return [
        f"{what}: {seen / 2**30:.3f} GiB walked, {said / 2**30:.3f} GiB estimated"
        for what, (seen, said) in pairs.items()
        if abs(seen - said) > max(BOUND * seen, _SMALL_BYTES)
    ]
