"""What a tokenizer run records: its state in a checkpoint, its metrics and its evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bitdance_scale.checkpoint.run_checkpoint import StepState
from bitdance_scale.observe.metrics import StepRecord
from bitdance_scale.train.run_sinks import RecordKinds
from bitdance_scale.train.tokenizer_evaluation import Reconstruction


@dataclass(frozen=True)
class TokenizerState(StepState):
    """How far a tokenizer run is.

    Attributes:
        images: images trained on.
        skipped_samples: images that could not be read, on all ranks; each had another one in its place.
        skipped_steps: steps whose gradient was not finite and changed nothing.
        data_digest: digest of all that decides which crops make up a step.
        guards: what the rules on skipped steps and spikes remember (`train/step_guards.py`); JSON values.
        discriminator_updates: steps that the discriminator's optimiser has taken.
    """

    images: int = 0
    skipped_samples: int = 0
    skipped_steps: int = 0
    data_digest: str = ""
    guards: dict[str, Any] = dataclasses.field(default_factory=dict)
    discriminator_updates: int = 0


@dataclass(frozen=True)
class TokenizerMetrics(StepRecord):
    """A logged step of tokenizer training, over all ranks.

    Attributes:
        images: images trained on since the start of the run.
        loss: the weighted sum that is differentiated, of the global batch, as are its unweighted parts.
        l1, l2, edge: errors of the pixels, which are in [-1, 1].
        entropy_token, entropy_codebook: E[H(q)] and H[E q] in nats, means over the groups (Eq. 1, 2).
        commit: mean squared distance of the latents from their signs.
        lpips: perceptual distance; 0 where it has no weight.
        adversarial: loss of the autoencoder against the discriminator; 0 where there is none.
        hinge, lecam: terms of the discriminator's own loss.
        discriminator_grad_norm: norm of its gradient before clipping.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the step.
        step_s: seconds per step, a mean since the last logged step.
        data_wait_s: seconds of it in which the slowest rank waited for its images.
        images_per_s: images per second of all ranks together.
        mfu: model FLOPs utilisation in 0..1 (`observe/tokenizer_cost.py`); None where the device's peak is unknown.
        memory_bytes: highest memory in use on any rank so far.
        skipped_samples: images since the start of the run that could not be read; each had another one in its place.
        skipped_steps: steps since the start of the run whose gradient was not finite and changed nothing.
        spikes: steps since the start of the run with a loss or gradient norm far above its course
            (`train/step_guards.py`), taken or not.
    """

    images: int
    loss: float
    l1: float
    l2: float
    edge: float
    entropy_token: float
    entropy_codebook: float
    commit: float
    grad_norm: float
    lr: float
    step_s: float
    data_wait_s: float
    images_per_s: float
    memory_bytes: int
    skipped_samples: int
    skipped_steps: int
    spikes: int = 0
    lpips: float = 0.0
    adversarial: float = 0.0
    hinge: float = 0.0
    lecam: float = 0.0
    discriminator_grad_norm: float = 0.0
    mfu: float | None = None


@dataclass(frozen=True)
class TokenizerEvaluation(StepRecord):
    """Reconstruction of held-out images, by size as `HEIGHTxWIDTH` in pixels.

    Attributes:
        psnr_db: PSNR of the decoded bytes in dB, a mean over the images.
        psnr_flipped_db: the same when one bit in a hundred is flipped.
        code_share: share of the codes of a group that occur, a mean over the groups.
        code_entropy_bits: entropy of the codes of a group, a mean over the groups.
        ssim: structural similarity, a mean over the images; empty in the records of earlier versions.
    """

    content: ClassVar[str] = "reconstruction"

    psnr_db: dict[str, float]
    psnr_flipped_db: dict[str, float]
    code_share: dict[str, float]
    code_entropy_bits: dict[str, float]
    ssim: dict[str, float] = dataclasses.field(default_factory=dict)


KINDS = RecordKinds(
    step=TokenizerMetrics,
    step_panels={
        "step": "progress/step",
        "images": "progress/images",
        "loss": "loss/total",
        "l1": "loss/l1",
        "l2": "loss/l2",
        "edge": "loss/edge",
        "entropy_token": "loss/entropy_token",
        "entropy_codebook": "loss/entropy_codebook",
        "commit": "loss/commit",
        "lpips": "loss/lpips",
        "adversarial": "loss/adversarial",
        "hinge": "discriminator/hinge",
        "lecam": "discriminator/lecam",
        "discriminator_grad_norm": "discriminator/grad_norm",
        "grad_norm": "optim/grad_norm",
        "lr": "optim/lr",
        "skipped_steps": "optim/skipped_steps",
        "spikes": "optim/spikes",
        "step_s": "speed/step_s",
        "images_per_s": "speed/images_per_s",
        "mfu": "speed/mfu",
        "memory_bytes": "speed/memory_gib",
        "data_wait_s": "data/wait_s",
        "skipped_samples": "data/skipped_samples",
    },
    evaluation_panels={
        "step": "progress/step",
        "psnr_db": "evaluate/psnr_db_{}",
        "psnr_flipped_db": "evaluate/psnr_flipped_db_{}",
        "ssim": "evaluate/ssim_{}",
        "code_share": "evaluate/code_share_{}",
        "code_entropy_bits": "evaluate/code_entropy_bits_{}",
    },
    summaries={
        "progress": "last",
        "loss": "last",
        "evaluate": "max",
        "discriminator": "last",
        "optim": "last",
        "speed": "last",
        "data": "last",
    },
    evaluation=TokenizerEvaluation,
)


def evaluation_record(step: int, results: Mapping[tuple[int, int], Reconstruction]) -> TokenizerEvaluation:
    """The record of an evaluation by (height, width) in pixels."""
    return TokenizerEvaluation(
        step,
        psnr_db={size_name(size): result.psnr_db for size, result in results.items()},
        psnr_flipped_db={size_name(size): result.psnr_flipped_db for size, result in results.items()},
        code_share={size_name(size): result.code_share for size, result in results.items()},
        code_entropy_bits={size_name(size): result.code_entropy_bits for size, result in results.items()},
        ssim={size_name(size): result.ssim for size, result in results.items()},
    )


def size_name(size_px: tuple[int, int]) -> str:
    """`HEIGHTxWIDTH`."""
    return f"{size_px[0]}x{size_px[1]}"
