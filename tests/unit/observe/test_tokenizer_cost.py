"""FLOPs of tokenizer training against what PyTorch counts on the networks themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bitdance_scale.config.load import load_config
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.observe.tokenizer_cost import tokenizer_flops
from bitdance_scale.train.tokenizer_objective import Reconstructor
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.discriminator import PatchDiscriminator
from bitdance_scale.vision.perceptual import make_lpips

SIZE_PX = (64, 96)
NUM_IMAGES = 2


def small(*settings: str) -> TokenizerConfig:
    overrides = ["autoencoder.channel_mult=[1, 2, 2]", "autoencoder.num_res_blocks=2", "reconstruction.lpips_weight=1"]
    return load_config("ae_small_d16c32", [*overrides, *settings], TokenizerConfig)


def images(*, asks_gradient: bool = False) -> torch.Tensor:
    return torch.empty(NUM_IMAGES, 3, *SIZE_PX, requires_grad=asks_gradient)


@pytest.mark.parametrize(
    "settings",
    [(), ("run.trains=decoder", "autoencoder.gan_decoder=true"), ("run.trains=decoder",)],
    ids=["all", "gan", "decoder"],
)
def test_autoencoder(settings):
    config = small(*settings)
    flops = tokenizer_flops(config, SIZE_PX)
    network = config.autoencoder
    with FakeTensorMode():
        autoencoder = Autoencoder(**dataclasses.asdict(network))
        reconstructor = Reconstructor(autoencoder, torch.float32, trains_encoder=config.run.trains == "all")
        cells = (NUM_IMAGES, network.num_bits, *(side // network.downsample for side in SIZE_PX))
        noise = torch.empty(cells) if network.gan_decoder else None
        with FlopCounterMode(display=False) as counter:
            _latents, _bits, decoded = reconstructor(images(), None, noise)
        assert flops.forward * NUM_IMAGES == counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            decoded.sum().backward()
    assert flops.autoencoder * NUM_IMAGES == flops.forward * NUM_IMAGES + counter.get_total_flops()


def test_lpips():
    with FakeTensorMode():
        lpips = make_lpips("vgg")
        with FlopCounterMode(display=False) as counter:
            lpips(images(asks_gradient=True), images()).sum().backward()
    assert tokenizer_flops(small(), SIZE_PX).lpips * NUM_IMAGES == counter.get_total_flops()
    assert tokenizer_flops(small("reconstruction.lpips_weight=0"), SIZE_PX).lpips == 0


@pytest.mark.parametrize("num_layers", [1, 3])
def test_discriminator(num_layers):
    config = small("adversarial.channels=16", f"adversarial.num_layers={num_layers}")
    with FakeTensorMode():
        discriminator = PatchDiscriminator(16, num_layers)
        with FlopCounterMode(display=False) as counter:
            discriminator.requires_grad_(False)
            discriminator(images(asks_gradient=True))[0].sum().backward()
            discriminator.requires_grad_(True)
            real, fake = discriminator(images(), images())
            (real.sum() + fake.sum()).backward()
    assert tokenizer_flops(config, SIZE_PX).adversarial * NUM_IMAGES == counter.get_total_flops()
    assert tokenizer_flops(small("adversarial.weight=0"), SIZE_PX).adversarial == 0
