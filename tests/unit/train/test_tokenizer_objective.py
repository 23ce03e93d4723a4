"""Every loss of tokenizer training against its formula, written out in float64, and their weighted sum."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from bitdance_scale.sequence.noise import Purpose, generator
from bitdance_scale.train.tokenizer_objective import (
    LOSSES,
    Crops,
    Reconstructor,
    TokenizerObjective,
    draw_noise,
    entropy_weight,
)
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.discriminator import PatchDiscriminator
from bitdance_scale.vision.perceptual import load_lpips
from tests.small_tokenizer import ADVERSARY, small_config
from tests.unit.vision.test_perceptual import features, random_state

WEIGHTS = {
    "l1": 0.7, "l2": 0.3, "edge": 0.9, "lpips": 1.3, "adversarial": 0.2, "entropy": 0.4, "commit": 0.6,
}  # fmt: skip
SETTINGS = (
    *ADVERSARY, "adversarial.start_step=3", "adversarial.weight=0.2", "reconstruction.l1_weight=0.7",
    "reconstruction.l2_weight=0.3", "reconstruction.edge_weight=0.9", "reconstruction.lpips_weight=1.3",
    "quantiser.entropy_weight=0.4", "quantiser.commit_weight=0.6", "quantiser.temperature=0.01",
)  # fmt: skip


def enumerated_entropies(latents: np.ndarray) -> tuple[float, float]:
    """E[H(q)] and H[E q] of latents [n, C] over groups of 8 bits, with logits 2 <x, c> / 0.01."""
    codes = np.array(list(itertools.product([-1.0, 1.0], repeat=8)))
    tokens, means = [], []
    for group in np.split(latents, latents.shape[1] // 8, axis=1):
        logits = 2 * group @ codes.T / 0.01
        logits -= logits.max(axis=1, keepdims=True)
        q = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        tokens.append(-(q * np.log(np.maximum(q, 1e-300))).sum(axis=1).mean())
        mean = q.mean(axis=0)
        means.append(-(mean * np.log(np.maximum(mean, 1e-300))).sum())
    return float(np.mean(tokens)), float(np.mean(means))


def lpips_distance(folder: Path, state: dict[str, torch.Tensor], first: torch.Tensor, other: torch.Tensor) -> float:
    linears = torch.load(folder / "weights" / "v0.1" / "vgg.pth", "cpu")
    distances = sum(
        ((a - b).square() * linears[f"lin{layer}.model.1.weight"].double()).sum(dim=1).mean(dim=(1, 2))
        for layer, (a, b) in enumerate(zip(features("vgg", state, first), features("vgg", state, other), strict=True))
    )
    return float(distances.mean())


def test_every_term_is_its_formula_and_the_total_their_weighted_sum(tmp_path: Path):
    state = random_state("vgg")
    torch.save(state, tmp_path / "vgg.pth")
    objective = TokenizerObjective(small_config(tmp_path, *SETTINGS), load_lpips("vgg", tmp_path / "vgg.pth"))
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    pixels, decoded = (torch.rand(3, 3, 16, 16) * 2 - 1 for _ in range(2))
    # About the temperature: neither decided nor undecided.
    latents = 0.01 * torch.randn(3, 16, 8, 8)
    bits = torch.where(latents > 0, 1.0, -1.0)
    losses = objective.losses(Crops(pixels, range(3), 3), (latents, bits, decoded), discriminator)
    assert tuple(losses) == LOSSES

    error = (decoded.double() - pixels.double()).numpy()
    cells = latents.permute(0, 2, 3, 1).reshape(-1, 16).double().numpy()
    token, codebook = enumerated_entropies(cells)
    with torch.no_grad():
        logits = discriminator.double()(decoded.double())[0].numpy()
    import lpips

    expected = {
        "l1": np.abs(error).mean(),
        "l2": (error**2).mean(),
        "edge": 0.5 * (np.abs(np.diff(error, axis=3)).mean() + np.abs(np.diff(error, axis=2)).mean()),
        "lpips": lpips_distance(Path(lpips.__file__).parent, state, decoded, pixels),
        "adversarial": np.log1p(np.exp(-logits.mean(axis=(1, 2, 3)))).mean(),
        "entropy_token": token,
        "entropy_codebook": codebook,
        "commit": ((cells - np.where(cells > 0, 1.0, -1.0)) ** 2).mean(),
    }
    assert 0.5 < token < 5 and codebook > token
    for name, value in expected.items():
        # float32; LPIPS goes through 13 convolutions.
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    total = (
        sum(WEIGHTS[name] * expected[name] for name in ("l1", "l2", "edge", "lpips", "adversarial", "commit"))
        + WEIGHTS["entropy"] * (token - codebook)
    )  # fmt: skip
    assert objective.total(losses, 5).item() == pytest.approx(total, rel=1e-4)

    decoder_only = TokenizerObjective(small_config(tmp_path, *SETTINGS, "run.trains=decoder"), None)
    rest = total - WEIGHTS["entropy"] * (token - codebook) - WEIGHTS["commit"] * expected["commit"]
    assert decoder_only.total(losses, 5).item() == pytest.approx(rest, rel=1e-4)
    own = {"hinge": torch.tensor(2.0), "lecam": torch.tensor(3.0)}
    assert objective.discriminator_total(own).item() == pytest.approx(2.0 + 1.0 * 3.0)
    assert [objective.has_adversary(step) for step in (0, 2, 3, 4)] == [False, False, True, True]
    without = objective.losses(Crops(pixels, range(3), 3), (latents, bits, decoded), None)
    assert without["adversarial"].item() == 0 and without["l1"] == losses["l1"]


def test_the_entropy_weight_falls_to_its_value(tmp_path: Path):
    section = small_config(
        tmp_path, "quantiser.entropy_weight=0.1", "quantiser.entropy_ramp=3.0", "quantiser.entropy_ramp_steps=2000"
    ).quantiser
    weights = [entropy_weight(section, step) for step in (0, 500, 1000, 2000, 9000)]
    assert weights == pytest.approx([0.4, 0.325, 0.25, 0.1, 0.1])
    assert entropy_weight(small_config(tmp_path, "quantiser.entropy_weight=0.1").quantiser, 0) == 0.1


def test_noise_is_a_function_of_seed_step_and_slot(tmp_path: Path):
    config = small_config(tmp_path, *ADVERSARY, "autoencoder.gan_decoder=true", "quantiser.flip_max=0.5")
    flips, noise = draw_noise(config, 3, [0, 4, 2], (16, 24), torch.device("cpu"))
    assert flips.shape == noise.shape == (3, 16, 8, 12) and flips.dtype == torch.bool
    other_flips, other_noise = draw_noise(config, 3, [2], (16, 24), torch.device("cpu"))
    assert torch.equal(other_flips[0], flips[2]) and torch.equal(other_noise[0], noise[2])
    for step, slot in ((4, 2), (3, 3)):
        assert not torch.equal(draw_noise(config, step, [slot], (16, 24), torch.device("cpu"))[1][0], noise[2])
    assert abs(noise.mean().item()) < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)
    # Whether a decoder takes noise does not change which bits are flipped.
    plain = small_config(tmp_path, "quantiser.flip_max=0.5")
    found, none = draw_noise(plain, 3, [0, 4, 2], (16, 24), torch.device("cpu"))
    assert torch.equal(found, flips) and none is None
    level = 0.5 * generator(0, Purpose.TOKENIZER, 3, 4).random(dtype=np.float32)
    assert flips[1].float().mean().item() == pytest.approx(level, abs=0.03)
    assert draw_noise(small_config(tmp_path, "quantiser.flip_max=0.0"), 3, [0], (16, 16), torch.device("cpu")) == (
        None, None,
    )  # fmt: skip


def test_outputs_are_float32_under_autocast_and_flips_reach_the_decoder_alone():
    torch.manual_seed(0)
    autoencoder = Autoencoder(num_bits=8, channels=32, channel_mult=(1, 1), num_res_blocks=1)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    reconstructor = Reconstructor(autoencoder, torch.bfloat16, trains_encoder=True)
    latents, bits, decoded = reconstructor(pixels, None, None)
    assert {output.dtype for output in (latents, bits, decoded)} == {torch.float32}
    assert torch.equal(bits, torch.where(latents > 0, 1.0, -1.0))
    is_flipped = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    is_flipped[:, 3] = True
    _, same_bits, other = reconstructor(pixels, is_flipped, None)
    assert torch.equal(same_bits, bits) and not torch.equal(other, decoded)
    frozen = Reconstructor(autoencoder, torch.float32, trains_encoder=False)
    frozen(pixels, None, None)[2].sum().backward()
    assert all(value.grad is None for value in autoencoder.encoder.parameters())
    assert all(value.grad is not None for value in autoencoder.decoder.parameters())
