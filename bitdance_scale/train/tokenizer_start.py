"""What the training of a tokenizer starts with: published weights, those of LPIPS, or a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.run_checkpoint import CONFIG_NAME, MODEL_PREFIX, TENSORS_DIR
from bitdance_scale.checkpoint.step_names import CHECKPOINTS_DIR, step_of
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.config.tokenizer_schema import AutoencoderSection, TokenizerConfig
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.vision.autoencoder import Autoencoder
from bitdance_scale.vision.perceptual import check_lpips_weights
from bitdance_scale.vision.weights import find_autoencoder
from bitdance_scale.weight_files import PICKLED_SUFFIXES, refuse

NOISE_ENTRY = "decoder.conv_in.weight"
DISCRIMINATOR = "discriminator"
"""What the names of the discriminator's tensors begin with in a checkpoint."""
_COMPARED = ("num_bits", "channels", "channel_mult", "num_res_blocks", "norm_groups")


def check_start_files(config: TokenizerConfig) -> None:
    """Checks the files that a run needs before its first step, from their headers where they have any.

    `run.start_from` is left out where the run goes on from a checkpoint, or may fetch one.

    Raises:
        ConfigError: one is missing, or is not of the networks that are configured; names the setting.
        CheckpointError: a file of published weights is damaged.
    """
    section, run = config.reconstruction, config.run
    if section.lpips_weight:
        try:
            check_lpips_weights("vgg", Path(section.lpips_weights))
        except CheckpointError as error:
            raise ConfigError(f"reconstruction.lpips_weights: {error}, or set reconstruction.lpips_weight=0") from error
    if run.start_from and not config.checkpoint.upload and not _has_checkpoint(Path(run.root) / run.name):
        check_start(Path(run.start_from), config.autoencoder)


def check_start(where: Path, section: AutoencoderSection) -> tuple[Path, dict[str, Any]]:
    """Compares published weights with the network that is to start from them; reads no values.

    Args:
        where: folder with `ae.safetensors`, or a weights file, with its configuration beside it.
        section: sizes that the run is configured with.

    Returns:
        The weights file, and its network's sizes as `Autoencoder` takes them.

    Raises:
        ConfigError: there is no such file, or it is of a network of other sizes.
        CheckpointError: it is damaged.
    """
    named = f"run.start_from = {str(where)!r}"
    if where.suffix in PICKLED_SUFFIXES and where.is_file():
        raise ConfigError(f"{named}: a file of torch.save; make safetensors of it with `bitdance import FILE OUT`")
    try:
        weights, sizes = find_autoencoder(where)
    except ConfigError as error:
        raise ConfigError(f"{named}: {error}") from error
    problems = [
        f"autoencoder.{name} = {_plain(getattr(section, name))}, the file's is {_plain(sizes[name])}"
        for name in _COMPARED
        if _plain(getattr(section, name)) != _plain(sizes[name])
    ]
    if sizes["gan_decoder"] and not section.gan_decoder:
        problems.append("autoencoder.gan_decoder = false, but the file's decoder takes noise")
    if problems:
        raise ConfigError(
            f"{named}: {'; '.join(problems)}. A run starts from a tokenizer of its own sizes: set these to the file's"
        )
    return weights, sizes


def load_start(autoencoder: Autoencoder, where: Path, section: AutoencoderSection) -> None:
    """Fills a network with published weights.

    A decoder that takes noise may start from one that does not: it begins as the same function, as the weights of the
    noise are 0, and learns to use it.

    Args:
        autoencoder: the network, of the sizes of `section`.
        where: as for `check_start`.
        section: sizes that the run is configured with.

    Raises:
        ConfigError: there is no such file, or it is of a network of other sizes.
        CheckpointError: it is damaged, or holds NaN or infinity.
    """
    weights, sizes = check_start(where, section)
    state = load_file(weights)
    odd = [f"{name} holds NaN or infinity" for name, value in state.items() if not value.isfinite().all()]
    refuse(weights, odd, "Name other weights in run.start_from")
    if section.gan_decoder and not sizes["gan_decoder"]:
        bits = state[NOISE_ENTRY]
        state[NOISE_ENTRY] = torch.cat([bits, torch.zeros_like(bits)], dim=1)
    autoencoder.load_state_dict(state)


def check_discriminator(path: Path, config: TokenizerConfig) -> None:
    """Refuses to go on from a checkpoint with a discriminator without one, or the other way round.

    Raises:
        ConfigError: one of them has a discriminator, the other has none.
        CheckpointError: the checkpoint cannot be read.
    """
    index = read_index(path / TENSORS_DIR)
    had_one = any(name.startswith(f"{MODEL_PREFIX}{DISCRIMINATOR}.") for name in index.tensors)
    weight = config.adversarial.weight
    if had_one == bool(weight):
        return
    fix = f"set it as in {path / CONFIG_NAME}" if had_one else "set adversarial.weight=0"
    raise ConfigError(
        f"adversarial.weight = {weight}: {path} was trained {'with' if had_one else 'without'} a discriminator, which "
        f"cannot {'go' if had_one else 'come'} within a run; {fix}, or give the run another name (run.name = "
        f"{config.run.name!r}) and start it from this one's output (run.start_from)"
    )


def _has_checkpoint(run_folder: Path) -> bool:
    folder = run_folder / CHECKPOINTS_DIR
    return folder.is_dir() and any(step_of(path.name) is not None for path in folder.iterdir())


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple | list) else value
