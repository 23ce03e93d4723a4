"""Published weights that the training of a tokenizer starts with."""

from __future__ import annotations

from pathlib import Path

import torch

from bitdance_scale.config.tokenizer_schema import AutoencoderSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.vision.autoencoder import Autoencoder, published_sizes
from bitdance_scale.vision.weights import WEIGHTS_NAME, config_beside, load_weights
from bitdance_scale.weight_files import read_json

NOISE_ENTRY = "decoder.conv_in.weight"
_COMPARED = ("num_bits", "channels", "channel_mult", "num_res_blocks", "norm_groups")


def load_start(autoencoder: Autoencoder, where: Path, section: AutoencoderSection) -> None:
    """Fills a network with published weights.

    A decoder that takes noise may start from one that does not: it begins as the same function, as the weights of the
    noise are 0, and learns to use it.

    Args:
        autoencoder: the network, of the sizes of `section`.
        where: folder with `ae.safetensors`, or a weights file, with its configuration beside it.
        section: sizes that the run is configured with.

    Raises:
        ConfigError: there is no such file, or it is of a network of other sizes.
        CheckpointError: it is damaged.
    """
    weights = where / WEIGHTS_NAME if where.is_dir() else where
    if not weights.is_file():
        raise ConfigError(
            f"run.start_from = {str(where)!r}: no {WEIGHTS_NAME} and no weights file; name a published tokenizer, "
            "or make one of a file of torch.save with `bitdance import FILE --out FOLDER`"
        )
    config = config_beside(weights)
    sizes = published_sizes(read_json(config), str(config))
    problems = [
        f"autoencoder.{name} = {_plain(getattr(section, name))}, the file's is {_plain(sizes[name])}"
        for name in _COMPARED
        if _plain(getattr(section, name)) != _plain(sizes[name])
    ]
    if sizes["gan_decoder"] and not section.gan_decoder:
        problems.append("autoencoder.gan_decoder = false, but the file's decoder takes noise")
    if problems:
        raise ConfigError(
            f"run.start_from = {str(where)!r}: {'; '.join(problems)}. A run starts from a tokenizer of its own sizes: "
            "set these to the file's"
        )
    with torch.device("meta"):
        wanted = Autoencoder(**sizes).state_dict()
    state = load_weights(weights, wanted)
    if section.gan_decoder and not sizes["gan_decoder"]:
        bits = state[NOISE_ENTRY]
        state[NOISE_ENTRY] = torch.cat([bits, torch.zeros_like(bits)], dim=1)
    autoencoder.load_state_dict(state)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple | list) else value
