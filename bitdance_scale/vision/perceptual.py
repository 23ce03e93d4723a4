"""Networks that compare images as people do: LPIPS (Zhang et al., CVPR 2018, arXiv 1801.03924), version 0.1.

This is the only file that imports lpips and torchvision, which are optional dependencies. The linear layers of LPIPS
ship with its package. The convolutions below them are those of torchvision's AlexNet or VGG-16; their weights are a
file that the user names. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from bitdance_scale.config.tokenizer_schema import VGG_PX
from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.pickled_weights import StateFile
from bitdance_scale.torchvision_operators import declare_operators

Network = Literal["alex", "vgg"]

LPIPS_MIN_PX: Mapping[Network, int] = {"alex": 31, "vgg": VGG_PX}
"""Shortest side of an image that a network can take: of a shorter one its last layers would have nothing left."""

_PACKAGES = ("torchvision", "lpips", "torch_fidelity")
_CONVOLUTIONS: Mapping[str, Mapping[int, tuple[int, int, int]]] = {
    # Index in torchvision's `features` -> channels out, channels in, side of the kernel.
    "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
    "vgg": {
        0: (64, 3, 3), 2: (64, 64, 3),
        5: (128, 64, 3), 7: (128, 128, 3),
        10: (256, 128, 3), 12: (256, 256, 3), 14: (256, 256, 3),
        17: (512, 256, 3), 19: (512, 512, 3), 21: (512, 512, 3),
        24: (512, 512, 3), 26: (512, 512, 3), 28: (512, 512, 3),
    },
}  # fmt: skip
_TITLES = {"alex": "AlexNet", "vgg": "VGG-16"}
_PREFIX = "features."


class Lpips(nn.Module):
    """LPIPS of pairs of images, frozen.

    Args:
        network: `lpips.LPIPS` with all its weights.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def forward(self, pixels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Distances [N] of pixels [N, 3, H, W] in [-1, 1] from others of the same shape; differentiable in both.

        No side may be shorter than `LPIPS_MIN_PX`.
        """
        distances: torch.Tensor = self.network(pixels, others)
        return distances.flatten()

    def train(self, mode: bool = True) -> Lpips:
        """Stays as it is: a distance has no dropout."""
        return self


def load_lpips(network: Network, weights: Path) -> Lpips:
    """LPIPS on the CPU in float32, frozen.

    Args:
        network: `alex` for AlexNet, with which LPIPS is reported, or `vgg` for VGG-16, with which networks are trained.
        weights: state dict of torchvision's network of that name, by torch.save or as safetensors; only its
            `features` are read.

    Raises:
        ConfigError: a package is not installed.
        CheckpointError: there is no such file, or it is not what `network` needs; names the first wrong tensors.
    """
    features = _checked(network, weights).read()
    # Random weights would take a second and draw from the global generator.
    with torch.device("meta"):
        model = make_lpips(network).network
    with perceptual_packages(f"LPIPS with {_TITLES[network]}"):
        import lpips

        scaling = lpips.lpips.ScalingLayer()
        own = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{network}.pth"
    model.to_empty(device="cpu")
    linears = torch.load(own, map_location="cpu", weights_only=True)
    state = {f"scaling_layer.{name}": value for name, value in scaling.state_dict().items()} | linears
    # The package has each linear layer under two names, of which its file holds one.
    state |= {f"lins.{name.removeprefix('lin')}": value for name, value in linears.items()}
    slices = {int(name.split(".")[2]): name.rsplit(".", 1)[0] for name in model.state_dict() if name.startswith("net.")}
    for name, value in features.items():
        index, kind = name.removeprefix(_PREFIX).split(".")
        state[f"{slices[int(index)]}.{kind}"] = value
    model.load_state_dict(state)
    return Lpips(model)


def make_lpips(network: Network) -> Lpips:
    """LPIPS with random weights: its distances mean nothing, but cost what those of `load_lpips` do.

    Raises:
        ConfigError: a package is not installed.
    """
    with perceptual_packages(f"LPIPS with {_TITLES[network]}"), warnings.catch_warnings():
        # It asks torchvision in a deprecated way.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        import lpips

        return Lpips(lpips.LPIPS(net=network, pretrained=False, pnet_rand=True, verbose=False))


def check_lpips_weights(network: Network, path: Path) -> None:
    """Checks that LPIPS can be made with a file of weights; the arguments and errors of `load_lpips`.

    Names, shapes and dtypes are compared; values are read by `load_lpips` only.
    """
    _find_packages(f"LPIPS with {_TITLES[network]}", ("torchvision", "lpips"))
    _checked(network, path)


@contextlib.contextmanager
def perceptual_packages(what: str) -> Iterator[None]:
    """Within it torchvision and packages that need it can be imported.

    Its operators are declared first where they are missing (`torchvision_operators.py`).

    Args:
        what: what the packages are for, in the error.

    Raises:
        ConfigError: a package is not installed, or cannot be imported.
    """
    _find_packages(what)
    declare_operators()
    try:
        yield
    except ImportError as error:
        raise ConfigError(_missing(what, str(error))) from error


def _find_packages(what: str, names: tuple[str, ...] = _PACKAGES) -> None:
    missing = [name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(_missing(what, f"no package {missing[0]}"))


def _missing(what: str, reason: str) -> str:
    return (
        f"{what}: the packages {', '.join(_PACKAGES)} are needed and cannot be imported ({reason}); install them with "
        "`pip install 'bitdance_scale[perceptual]'`"
    )


def _checked(network: Network, path: Path) -> StateFile:
    """The file, if it holds the features of `network`."""
    file = StateFile(path, lambda name: name.startswith(_PREFIX))
    wanted = (
        f"Name the state dict of torchvision's {_TITLES[network]}, such as "
        f"{'alexnet-owt-7be5be79.pth' if network == 'alex' else 'vgg16-397923af.pth'}"
    )
    if not file.specs:
        raise CheckpointError(f"{path}: holds no tensor named {_PREFIX}N.weight, as networks of another kind. {wanted}")
    others = [title for other, title in _TITLES.items() if other != network and file.specs.keys() == {*_shapes(other)}]
    file.check(_shapes(network), f"It holds {others[0]}. {wanted}" if others else wanted)
    return file


def _shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the convolutions, by their names in torchvision's state dict."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (channels_out, channels_in, side) in _CONVOLUTIONS[network].items():
        shapes[f"{_PREFIX}{index}.weight"] = (channels_out, channels_in, side, side)
        shapes[f"{_PREFIX}{index}.bias"] = (channels_out,)
    return shapes
