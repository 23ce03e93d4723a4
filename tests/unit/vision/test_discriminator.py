"""The patch discriminator against the published layers, and its losses against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bitdance_scale.vision.discriminator import (
    GlobalBatchNorm,
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    one_rank,
    updated_averages,
)


def published(channels: int, num_layers: int) -> nn.Sequential:
    """The layers of pix2pix's NLayerDiscriminator with batch norm, for images of three channels."""
    widths = [channels * min(2**layer, 8) for layer in range(num_layers + 1)]
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
    for layer in range(1, num_layers + 1):
        stride = 2 if layer < num_layers else 1
        convolution = nn.Conv2d(widths[layer - 1], widths[layer], 4, stride, 1, bias=False)
        norm = nn.BatchNorm2d(widths[layer], track_running_stats=False)
        layers += [convolution, norm, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))


def test_three_layers_of_64_channels_are_those_of_pix2pix():
    discriminator, wanted = PatchDiscriminator(64, 3), published(64, 3)
    with torch.no_grad():
        (logits,) = discriminator(torch.zeros(1, 3, 256, 256))
    assert logits.shape == (1, 1, 30, 30)
    # pix2pix prints 2.769 M, for the six channels of image and condition: 3 * 64 * 16 more.
    assert sum(value.numel() for value in discriminator.parameters()) == 2_768_705 - 3 * 64 * 16
    shapes = {name: value.shape for name, value in discriminator.layers.state_dict().items()}
    assert shapes == {name: value.shape for name, value in wanted.state_dict().items()}


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_logits_and_gradients_are_those_of_the_published_layers(num_layers: int):
    torch.manual_seed(0)
    discriminator, wanted = PatchDiscriminator(4, num_layers), published(4, num_layers)
    wanted.load_state_dict(discriminator.layers.state_dict())
    pixels = torch.rand(3, 3, 48, 64) * 2 - 1
    batches = pixels.clone().requires_grad_(), (0.5 * pixels).requires_grad_()
    copies = pixels.clone().requires_grad_(), (0.5 * pixels).detach().requires_grad_()
    logits = discriminator(*batches)
    others = [wanted(copy) for copy in copies]
    for found, other in zip(logits, others, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    for network, values in ((discriminator, logits), (wanted, others)):
        sum(((number + 1) * value).sin().sum() for number, value in enumerate(values)).backward()
        assert all(value.grad is not None for value in network.parameters())
    for batch, copy in zip(batches, copies, strict=True):
        torch.testing.assert_close(batch.grad, copy.grad, rtol=1e-3, atol=1e-5)
    for (name, value), other in zip(discriminator.layers.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-3, atol=2e-4, msg=name)


def test_the_smallest_side_that_the_rules_allow_has_a_logit():
    for num_layers in (1, 2, 3):
        side = 3 * 2**num_layers
        discriminator = PatchDiscriminator(4, num_layers)
        assert discriminator(torch.zeros(2, 3, side, side))[0].shape == (2, 1, 1, 1)
        with pytest.raises(RuntimeError):
            discriminator(torch.zeros(2, 3, side - 2**num_layers, side))


def test_batch_norm_is_that_of_torch_in_values_and_gradients():
    torch.manual_seed(0)
    norm, wanted = GlobalBatchNorm(6, one_rank), nn.BatchNorm2d(6)
    wanted.weight.data, wanted.bias.data = norm.weight.data.clone(), norm.bias.data.normal_().clone()
    # A large mean: the difference of two large sums would lose the variance.
    hidden = (100 + torch.randn(3, 6, 4, 5)).requires_grad_()
    copy = hidden.detach().clone().requires_grad_()
    found, expected = norm(hidden), wanted.train()(copy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for value in (found, expected):
        value.square().mul(torch.linspace(0, 1, 5)).sum().backward()
    torch.testing.assert_close(hidden.grad, copy.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norm.weight.grad, wanted.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.bias.grad, wanted.bias.grad, rtol=1e-4, atol=1e-4)
    # Statistics are float32 whatever comes in, and what comes out has its dtype.
    half = norm(hidden.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    exact = wanted(hidden.detach().bfloat16().float())
    torch.testing.assert_close(half.float(), exact, rtol=2**-7, atol=1e-3)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1.5, shape)


def test_the_generator_loss_is_of_the_mean_logit_of_an_image():
    fake = numbers(0, 5, 1, 3, 4)
    expected = np.log1p(np.exp(-fake.mean(axis=(1, 2, 3)))).mean()
    assert generator_loss(torch.tensor(fake), 5).item() == pytest.approx(expected, rel=1e-6)
    parts = [generator_loss(torch.tensor(part), 5).item() for part in (fake[:2], fake[2:])]
    assert sum(parts) == pytest.approx(expected, rel=1e-6)
    # A softplus of every logit would be another loss.
    assert np.log1p(np.exp(-fake)).mean() > 1.05 * expected


def test_hinge_and_lecam_are_those_of_their_papers():
    real, fake = numbers(1, 5, 1, 3, 4), numbers(2, 5, 1, 3, 4)
    average_real, average_fake = 0.4, -0.2
    hinge = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    lecam = (np.maximum(0, real - average_fake) ** 2).mean() + (np.maximum(0, average_real - fake) ** 2).mean()
    averages = torch.tensor([average_real, average_fake])
    for splits in ([5], [2, 3]):
        parts = [
            discriminator_loss(a, b, 5, averages)
            for a, b in zip(torch.tensor(real).split(splits), torch.tensor(fake).split(splits), strict=True)
        ]
        assert sum(part.hinge.item() for part in parts) == pytest.approx(hinge, rel=1e-6)
        assert sum(part.lecam.item() for part in parts) == pytest.approx(lecam, rel=1e-6)


def test_moving_averages_of_the_mean_logits():
    averages, expected = torch.zeros(2), np.zeros(2)
    for step in range(4):
        real, fake = numbers(step, 5, 1, 3, 4), numbers(9 + step, 5, 1, 3, 4)
        expected = 0.9 * expected + 0.1 * np.array([real.mean(), fake.mean()])
        averages = updated_averages(averages, torch.tensor(real), torch.tensor(fake), 5, 0.9)
        np.testing.assert_allclose(averages.numpy(), expected, rtol=1e-5)
