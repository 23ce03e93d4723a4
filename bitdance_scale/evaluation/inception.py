"""The features that FID compares: the last pooling of the Inception-v3 that FID has been computed with since 2017.

This is the only file that imports torch_fidelity, an optional dependency, whose network computes what the TensorFlow
graph of 2015-12-05 does, its resize included. Its weights are a file that the user names; nothing is downloaded.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitdance_scale.pickled_weights import StateFile
from bitdance_scale.vision.perceptual import perceptual_packages

NUM_FEATURES = 2048
# Counts steps of training, and is missing in some files.
_COUNTER = ".num_batches_tracked"


class Inception(nn.Module):
    """Features of images, frozen.

    Args:
        network: torch_fidelity's extractor with its weights.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: np.ndarray) -> torch.Tensor:
        """float32 [n, 2048], on the device of the network, of uint8 images [n, H, W, 3] of any size."""
        device = next(self.network.parameters()).device
        (features,) = self.network(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous())
        return features


def load_inception(weights: Path) -> Inception:
    """The network on the CPU in float32.

    Args:
        weights: `weights-inception-2015-12-05-6726825d.pth` of torch_fidelity, or its tensors as safetensors.

    Raises:
        ConfigError: a package is not installed.
        CheckpointError: there is no such file, or it is not of this network; names the first wrong tensors.
    """
    file, network = _checked(weights)
    state = file.read()
    network.to_empty(device="cpu")
    counters = {name: value.zero_() for name, value in network.state_dict().items() if name.endswith(_COUNTER)}
    nn.Module.load_state_dict(network, state | counters)
    return Inception(network)


def check_inception_weights(path: Path) -> None:
    """Checks a file of weights without reading its values; the argument and errors of `load_inception`."""
    _checked(path)


def _checked(path: Path) -> tuple[StateFile, nn.Module]:
    """The file, and the network that it fits, on the meta device."""
    file = StateFile(path, lambda name: not name.endswith(_COUNTER))
    with perceptual_packages("rFID"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        class WithoutWeights(FeatureExtractorInceptionV3):
            """The package would unpickle the file as it is, which may run any code."""

            def load_state_dict(self, *details: Any, **settings: Any) -> None:
                """Leaves the weights for later."""

        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        with torch.device("meta"):
            network: nn.Module = WithoutWeights("inception", [str(NUM_FEATURES)], nothing)
    wanted = {name: tuple(v.shape) for name, v in network.state_dict().items() if not name.endswith(_COUNTER)}
    file.check(wanted, "Name torch_fidelity's weights of Inception, weights-inception-2015-12-05-6726825d.pth")
    return file, network
