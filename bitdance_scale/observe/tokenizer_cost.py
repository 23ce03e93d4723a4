"""What training the visual tokenizer costs in floating-point operations, per image.

Model FLOPs as in `cost.py`: the products that the mathematics asks for, two per multiply-add, recomputation left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.config.tokenizer_schema import AdversarialSection, AutoencoderSection, TokenizerConfig
from bitdance_scale.observe.cost import TRAINING_OVER_FORWARD, encode_flops
from bitdance_scale.vision.discriminator import KERNEL_SIDE, MAX_WIDENING

_VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG-16's 3 x 3 convolutions; between the groups the sides are halved, rounded down."""
_KERNEL = KERNEL_SIDE**2


@dataclass(frozen=True)
class TokenizerFlops:
    """FLOPs of one image in one step.

    Attributes:
        encoder: forward pass.
        decoder: forward pass.
        autoencoder: forward and backward pass of what is trained of it.
        lpips: LPIPS of the reconstruction, and its gradient.
        adversarial: the discriminator's passes, for its own loss and for the autoencoder's.
    """

    encoder: int
    decoder: int
    autoencoder: int
    lpips: int
    adversarial: int

    @property
    def forward(self) -> int:
        """Encoding and decoding."""
        return self.encoder + self.decoder

    @property
    def training(self) -> int:
        """Everything in a step that has a discriminator."""
        return self.autoencoder + self.lpips + self.adversarial


def tokenizer_flops(config: TokenizerConfig, size_px: tuple[int, int]) -> TokenizerFlops:
    """FLOPs of one image of (height, width) pixels."""
    network = config.autoencoder
    trains_encoder = config.run.trains == "all"
    num_cells = size_px[0] * size_px[1] // network.downsample**2
    vision = VisionSection(
        weights="",
        num_bits=network.num_bits,
        channels=network.channels,
        channel_mult=network.channel_mult,
        num_res_blocks=network.num_res_blocks,
    )
    encoder = encode_flops(vision, num_cells)
    decoder, at_bits = _decode_flops(network, num_cells)
    # Of what sees the image, or bits that get no gradient, the backward pass forms the weights' gradient alone.
    if trains_encoder:
        autoencoder = (
            TRAINING_OVER_FORWARD * (encoder + decoder) - 2 * 9 * 3 * network.channels * size_px[0] * size_px[1]
        )
    else:
        autoencoder = encoder + TRAINING_OVER_FORWARD * decoder - at_bits
    return TokenizerFlops(
        encoder=encoder,
        decoder=decoder,
        autoencoder=autoencoder,
        lpips=_lpips_flops(size_px) if config.reconstruction.lpips_weight else 0,
        adversarial=_adversarial_flops(config.adversarial, size_px) if config.adversarial.weight else 0,
    )


def _decode_flops(network: AutoencoderSection, num_cells: int) -> tuple[int, int]:
    """Forward FLOPs of the decoder, and those of its layers that see the bits; follows `vision/autoencoder.py`."""
    widths = [network.channels * multiplier for multiplier in network.channel_mult]
    width = widths[-1]
    num_inputs = (2 if network.gan_decoder else 1) * network.num_bits
    # Scale and bias of every level, once per image.
    modulation = sum(2 * network.num_bits * entry for entry in [*widths[1:], widths[-1]])
    at_bits = 2 * (num_cells * 9 * num_inputs * width + modulation)
    weights = network.num_res_blocks * 2 * 9 * width**2 * num_cells
    for level in reversed(range(len(widths))):
        for _ in range(network.num_res_blocks):
            out_width = widths[level]
            shortcut = width * out_width if width != out_width else 0
            weights += num_cells * (9 * width * out_width + 9 * out_width**2 + shortcut)
            width = out_width
        if level > 0:
            weights += num_cells * 9 * width * 4 * width
            num_cells *= 4
    weights += num_cells * 9 * width * 3
    return 2 * weights + at_bits, at_bits


def _lpips_flops(size_px: tuple[int, int]) -> int:
    """Both images forward, and back to the pixels of one; the weights are frozen."""
    height, width = size_px
    convolutions, linears, channels = 0, 0, 3
    for group in _VGG_WIDTHS:
        for out_channels in group:
            convolutions += height * width * 9 * channels * out_channels
            channels = out_channels
        linears += height * width * channels
        height, width = height // 2, width // 2
    return 2 * (3 * convolutions + 2 * linears)


def _adversarial_flops(section: AdversarialSection, size_px: tuple[int, int]) -> int:
    """One pass and its gradient for the autoencoder, two passes and theirs for the discriminator."""
    height, width = size_px[0] // 2, size_px[1] // 2
    first = height * width * _KERNEL * 3 * section.channels
    weights, channels = first, section.channels
    for layer in range(1, section.num_layers + 1):
        if layer < section.num_layers:
            height, width = height // 2, width // 2
        else:
            height, width = height - 1, width - 1
        out_channels = section.channels * min(2**layer, MAX_WIDENING)
        weights += height * width * _KERNEL * channels * out_channels
        channels = out_channels
    weights += (height - 1) * (width - 1) * _KERNEL * channels
    # The autoencoder asks for no gradient of the weights, the discriminator for none of the pixels.
    return 2 * (2 * weights + 2 * (TRAINING_OVER_FORWARD * weights - first))
