"""The networks of a tokenizer run on this rank: the autoencoder, the discriminator if there is one, and their steps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.parallel.agreement import all_ranks
from bitdance_scale.parallel.partition import Placement, ShardedValue, whole_pieces
from bitdance_scale.parallel.replicated import ReplicatedNetwork, summed
from bitdance_scale.train.tokenizer_objective import (
    Crops,
    Reconstructor,
    TokenizerObjective,
    draw_noise,
)
from bitdance_scale.train.tokenizer_start import DISCRIMINATOR, load_start
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.discriminator import PatchDiscriminator, updated_averages
from bitdance_scale.vision.perceptual import load_lpips

AUTOENCODER = "autoencoder"
_AVERAGES = f"{DISCRIMINATOR}.average_logits"

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class TokenizerNetworks:
    """What a tokenizer run trains, and how one step changes it. Built on all ranks together.

    Args:
        config: the run, checked.
        device: where it is trained.

    Attributes:
        autoencoder: the network itself; its weights are float32.

    Raises:
        BitDanceError: on all ranks, LPIPS cannot be loaded.
    """

    def __init__(self, config: TokenizerConfig, device: torch.device) -> None:
        self._config = config
        torch.manual_seed(config.run.seed)
        self.autoencoder = Autoencoder(**asdict(config.autoencoder)).to(device)
        section, optim = config.adversarial, config.optim
        self._discriminator: PatchDiscriminator | None = None
        if section.weight:
            discriminator = PatchDiscriminator(section.channels, section.num_layers, summed)
            self._discriminator = discriminator.to(device)
        if config.parallel.recompute == "blocks":
            self.autoencoder.recompute_blocks()
        if config.parallel.channels_last:
            _lay_out_channels_last(self.autoencoder)
            if self._discriminator is not None:
                _lay_out_channels_last(self._discriminator)
        reconstructor = Reconstructor(
            self.autoencoder, getattr(torch, config.run.dtype), trains_encoder=config.run.trains == "all"
        )
        betas, is_divided = (optim.beta1, optim.beta2), config.parallel.shard_optimizer
        self._generator = ReplicatedNetwork(
            reconstructor,
            root=self.autoencoder,
            betas=betas,
            weight_decay=optim.weight_decay,
            average_decay=optim.average_decay,
            is_divided=is_divided,
        )
        self._judge = None
        if self._discriminator is not None:
            self._judge = ReplicatedNetwork(
                self._discriminator,
                prefix=f"{DISCRIMINATOR}.",
                betas=betas,
                weight_decay=optim.weight_decay,
                is_divided=is_divided,
            )
        self._average_logits = torch.zeros(2, device=device)
        self._new_average_logits = self._average_logits
        lpips = None
        if config.reconstruction.lpips_weight:
            with all_ranks():
                lpips = load_lpips("vgg", Path(config.reconstruction.lpips_weights)).to(device)
        self._objective = TokenizerObjective(config, lpips)
        # Whether this step has gradients of the discriminator.
        self._is_judged = False

    def start_from(self, where: str) -> None:
        """Fills the autoencoder with published weights, and begins its averages with them; on all ranks."""
        with all_ranks():
            load_start(self.autoencoder, Path(where), self._config.autoencoder)
        self._generator.restart_averages()

    def reconstruct(self, crops: Crops, step: int) -> Outputs:
        """What `Reconstructor` gives of a step's crops; `step` counts from 0."""
        pixels = crops.pixels
        if self._config.parallel.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        size_px = (pixels.shape[2], pixels.shape[3])
        is_flipped, noise = draw_noise(self._config, step, crops.slots, size_px, pixels.device)
        outputs: Outputs = self._generator(pixels, is_flipped, noise)
        return outputs

    def backward(self, crops: Crops, outputs: Outputs, step: int) -> dict[str, torch.Tensor]:
        """Gradients of both networks, summed over the ranks.

        Returns:
            This rank's parts of all losses, without gradient, and of their `total`; the parts add up over the ranks.
        """
        self._is_judged = self._objective.has_adversary(step)
        losses = self._losses(crops, outputs, step)
        self._generator.backward(losses["total"])
        reported = {name: loss.detach() for name, loss in losses.items()}
        if self._is_judged:
            reported |= self._backward_discriminator(crops, outputs[2])
        return self._as_parts(reported, step)

    def _losses(self, crops: Crops, outputs: Outputs, step: int) -> dict[str, torch.Tensor]:
        """Losses of the autoencoder and their `total`; the discriminator takes no gradient from them."""
        judge = self._discriminator if self._objective.has_adversary(step) else None
        if judge is not None:
            judge.requires_grad_(False)
        losses = self._objective.losses(crops, outputs, judge)
        if judge is not None:
            judge.requires_grad_(True)
        return losses | {"total": self._objective.total(losses, step)}

    def _backward_discriminator(self, crops: Crops, decoded: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self._judge is not None, "a step with an adversary has a discriminator"
        losses = self._discriminator_losses(crops, decoded, self._judge)
        self._judge.backward(self._objective.discriminator_total(losses))
        return {name: loss.detach() for name, loss in losses.items()}

    def _discriminator_losses(
        self, crops: Crops, decoded: torch.Tensor, judge: ReplicatedNetwork
    ) -> dict[str, torch.Tensor]:
        """Losses of the discriminator, and the moving averages that it has after this step."""
        logits = self._objective.judged(crops, decoded, judge)
        decay = self._config.adversarial.lecam_decay
        self._new_average_logits = updated_averages(self._average_logits, *logits, crops.num_images, decay, summed)
        return self._objective.discriminator_losses(crops, logits, self._new_average_logits)

    def _as_parts(self, losses: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """Losses of which every one is this rank's part of the global one."""
        parts = losses | {"entropy_codebook": losses["entropy_codebook"] / self._generator.num_ranks}
        return parts | {"total": self._objective.total(parts, step)}

    def clip(self, max_norm: float) -> dict[str, float]:
        """Clips the gradient of each network by itself; their norms before, which are the same on all ranks."""
        norms = {AUTOENCODER: self._generator.clip(max_norm)}
        if self._is_judged and self._judge is not None:
            norms[DISCRIMINATOR] = self._judge.clip(max_norm)
        return {name: norm.item() for name, norm in norms.items()}

    def step(self, lr: float) -> None:
        """Steps the networks that have gradients."""
        self._generator.step(lr)
        if self._is_judged and self._judge is not None:
            self._judge.step(lr * self._config.adversarial.rate_factor)
            self._average_logits.copy_(self._new_average_logits)

    @torch.no_grad()
    def again(self, crops: Crops, step: int) -> dict[str, torch.Tensor]:
        """The losses of `backward`, computed again without gradients; a collective."""
        outputs = self.reconstruct(crops, step)
        losses = self._losses(crops, outputs, step)
        if self._is_judged:
            assert self._judge is not None, "a step with an adversary has a discriminator"
            losses |= self._discriminator_losses(crops, outputs[2], self._judge)
        return self._as_parts(losses, step)

    @property
    def discriminator_updates(self) -> int:
        """Steps that the discriminator's optimiser has taken."""
        return 0 if self._judge is None else self._judge.num_updates

    def weights_of(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """Within it the autoencoder has its `trained` or its `averaged` weights; a collective."""
        return contextlib.nullcontext() if kind == "trained" else self._generator.with_averages()

    def model_values(self) -> Mapping[str, ShardedValue]:
        """Parameters, whole on every rank, and the moving averages of the discriminator's logits."""
        values = dict(self._generator.model_values())
        if self._judge is not None:
            values |= self._judge.model_values()
            values[_AVERAGES] = whole_pieces(self._average_logits, Placement.replicated((2,)))
        return values

    def optimizer_values(self) -> Mapping[str, ShardedValue]:
        """Moments and averaged weights of what this rank steps."""
        values = dict(self._generator.optimizer_values())
        if self._judge is not None:
            values |= self._judge.optimizer_values()
        return values

    def restore(self, num_updates: int, discriminator_updates: int) -> None:
        """Says how many steps the optimisers have taken, after their values were loaded."""
        self._generator.restore(num_updates)
        if self._judge is not None:
            self._judge.restore(discriminator_updates)


def _lay_out_channels_last(network: nn.Module) -> None:
    """Lays out the weights of convolutions as their inputs are."""
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
