"""What sets of images are compared by: layers of the Inception-v3 that FID has been computed with since 2017.

This is the only file that imports torch_fidelity, an optional dependency, whose network computes what the TensorFlow
graph of 2015-12-05 does, its resize included. Its weights are a file that the user names; nothing is downloaded.

ADM's evaluation suite (openai/guided-diffusion, evaluations/evaluator.py) reads three tensors of that graph:

- `pool_3:0`, the last pooling, for FID, precision and recall;
- channels 0 to 6 of `mixed_6/conv:0`, which is `Mixed_6d.branch1x1` here, after its ReLU (toshas/torch-fidelity,
  utils/util_convert_inception_weights.py, has the names of both), for sFID;
- `softmax/logits/MatMul`, the logits without their bias, for the Inception Score.
"""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bitdance_scale.float32_products import float32_products
from bitdance_scale.pickled_weights import StateFile
from bitdance_scale.vision.perceptual import perceptual_packages

NUM_FEATURES = 2048
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
NUM_SPATIAL_FEATURES = SPATIAL_SIDE * SPATIAL_SIDE * SPATIAL_CHANNELS
NUM_LOGITS = 1008
"""Of which 1,000 are ImageNet's classes; the Inception Score is of all of them."""
# Counts steps of training, and is missing in some files.
_COUNTER = ".num_batches_tracked"


class Activations(NamedTuple):
    """What one pass over images gives, float32 on the device of the network.

    Attributes:
        pool: [n, 2048].
        spatial: [n, 2023], of which the row, the column and the channel are the slow, middle and fast index, as in
            ADM's files.
        logits: [n, 1008], without bias.
    """

    pool: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor


class Inception(nn.Module):
    """Features of images, frozen.

    Args:
        network: torch_fidelity's extractor with its weights.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights in hexadecimal digits; of a file of torch.save and of safetensors it is the same."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            if not name.endswith(_COUNTER):
                digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def forward(self, images: np.ndarray) -> torch.Tensor:
        """float32 [n, 2048], on the device of the network, of uint8 images [n, H, W, 3] of any size."""
        return self.activations(images).pool

    @torch.no_grad()
    def activations(self, images: np.ndarray) -> Activations:
        """All that is compared, of uint8 images [n, H, W, 3] of any size."""
        device = next(self.network.parameters()).device
        found: list[torch.Tensor] = []
        layer = self.network.get_submodule("Mixed_6d.branch1x1")
        handle = layer.register_forward_hook(
            lambda _module, _inputs, output: found.append(output[:, :SPATIAL_CHANNELS])
        )
        try:
            with float32_products("float32"):
                pool, logits = self.network(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous())
        finally:
            handle.remove()
        return Activations(pool, found[0].permute(0, 2, 3, 1).flatten(1), logits)


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
            network: nn.Module = WithoutWeights("inception", [str(NUM_FEATURES), "logits_unbiased"], nothing)
    wanted = {name: tuple(v.shape) for name, v in network.state_dict().items() if not name.endswith(_COUNTER)}
    file.check(wanted, "Name torch_fidelity's weights of Inception, weights-inception-2015-12-05-6726825d.pth")
    return file, network
