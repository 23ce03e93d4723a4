"""The autoencoder's weights on disk: `ae.safetensors`, with the sizes beside it in `ae_config.json`, as published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from bitdance_scale.atomic_files import write_bytes
from bitdance_scale.config.named_files import autoencoder_faults
from bitdance_scale.errors import ConfigError
from bitdance_scale.vision.autoencoder import Autoencoder, published_sizes
from bitdance_scale.weight_files import check_tensors, read_json, read_single_header

WEIGHTS_NAME = "ae.safetensors"
CONFIG_NAME = "ae_config.json"


def config_beside(weights: Path) -> Path:
    """The configuration beside a weights file: `NAME_config.json` for NAME.safetensors, or `ae_config.json`.

    The release's collection of tokenizers uses the first.
    """
    own = weights.with_name(weights.stem + "_config.json")
    return own if own.is_file() else weights.with_name(CONFIG_NAME)


def load_weights(path: str | Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reads the weights of a network, in the dtypes of the file.

    Args:
        path: safetensors file.
        wanted: state of the network (the meta device suffices), whose names and shapes the file must have.

    Raises:
        ConfigError: no such file.
        CheckpointError: it is damaged or belongs to a network of other sizes; names the first wrong tensors.
    """
    check_weights(path, wanted)
    return load_file(path)


def check_weights(path: str | Path, wanted: Mapping[str, torch.Tensor]) -> None:
    """Compares the header of a weights file with a network; the arguments and errors of `load_weights`."""
    for fault in autoencoder_faults(Path(path)):
        raise ConfigError(fault)
    check_tensors(
        Path(path),
        read_single_header(Path(path)),
        {name: tensor.shape for name, tensor in wanted.items()},
        "The weights must match vision.num_bits, channels, channel_mult, num_res_blocks and gan_decoder; "
        f"{CONFIG_NAME} beside the file states its sizes (z_channels, ch, ch_mult, num_res_blocks, gan_decoder)",
    )


def weights_digest(path: str | Path) -> str:
    """Hexadecimal SHA-256 of the values of a weights file, by name and shape, as the float32 they are computed with.

    It does not depend on how the values are stored: the order of the tensors, the header, or bfloat16 for values that
    bfloat16 can hold. One tensor is in memory at a time.

    Args:
        path: safetensors file, checked before (`check_weights`).
    """
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            values = file.get_tensor(name).float().contiguous()
            digest.update(json.dumps([name, list(values.shape)]).encode())
            digest.update(values.view(-1).numpy().data)
    return digest.hexdigest()


def save_weights(
    folder: str | Path,
    state: Mapping[str, torch.Tensor],
    published_config: Mapping[str, object],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes `ae.safetensors` and `ae_config.json`, each complete or not at all.

    Args:
        folder: where to write; made if absent.
        state: the network's tensors by their published names.
        published_config: the result of `autoencoder.published_config` for the network.
        dtype: in which they are stored.
    """
    for name, content in _contents(state, published_config, dtype).items():
        write_bytes(Path(folder) / name, content)


def has_weights(
    folder: str | Path,
    state: Mapping[str, torch.Tensor],
    published_config: Mapping[str, object],
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Whether a folder has the very files that `save_weights` would write; the arguments are the same."""
    files = {Path(folder) / name: content for name, content in _contents(state, published_config, dtype).items()}
    return all(path.is_file() and path.read_bytes() == content for path, content in files.items())


def _contents(
    state: Mapping[str, torch.Tensor], published_config: Mapping[str, object], dtype: torch.dtype
) -> dict[str, bytes]:
    """The bytes of both files, by name."""
    tensors = {name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in state.items()}
    sizes = json.dumps(published_config, indent=2) + "\n"
    return {WEIGHTS_NAME: save(tensors), CONFIG_NAME: sizes.encode()}


def load_autoencoder(where: str | Path) -> Autoencoder:
    """The network of a weights file, or of a folder with `ae.safetensors`, on the CPU in float32.

    Raises:
        ConfigError: there are no weights.
        CheckpointError: they are damaged, or do not fit the configuration beside them (`config_beside`).
    """
    weights, sizes = find_autoencoder(where)
    autoencoder = Autoencoder(**sizes)
    autoencoder.load_state_dict(load_weights(weights, autoencoder.state_dict()))
    return autoencoder.eval()


def find_autoencoder(where: str | Path) -> tuple[Path, dict[str, Any]]:
    """(weights file, keyword arguments of `Autoencoder`) of a weights file or a folder, of which headers are read.

    Raises:
        ConfigError, CheckpointError: as `load_autoencoder`.
    """
    where = Path(where)
    weights = where / WEIGHTS_NAME if where.is_dir() else where
    if not weights.is_file():
        raise ConfigError(
            f"{weights}: no such file; name a folder with {WEIGHTS_NAME} and {CONFIG_NAME}, or a weights file"
        )
    config = config_beside(weights)
    sizes = published_sizes(read_json(config), str(config))
    with torch.device("meta"):
        check_weights(weights, Autoencoder(**sizes).state_dict())
    return weights, sizes
