"""Inception with random weights against torch_fidelity's own class, and files that are not it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from bitdance_scale.evaluation.inception import (
    NUM_FEATURES,
    NUM_LOGITS,
    NUM_SPATIAL_FEATURES,
    Inception,
    check_inception_weights,
    load_inception,
)
from bitdance_scale.vision.perceptual import perceptual_packages


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The names and shapes of the published file, with values whose activations neither vanish nor explode."""
    with perceptual_packages("a test"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    folder = tmp_path_factory.mktemp("inception")

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *details):
            return None

    torch.save({}, folder / "empty.pth")
    with torch.device("meta"):
        network = Untrained("inception", ["2048"], str(folder / "empty.pth"))
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if value.ndim > 1:
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = torch.full(value.shape, 1.0 if name.endswith(("bn.weight", "running_var")) else 0.01)
    torch.save(state, folder / "inception.pth")
    return folder / "inception.pth"


def spatial_features(network, images):
    """Channels 0 to 6 of the first branch of the block that TensorFlow's graph calls mixed_6, rows first."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = (interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(299, 299), align_corners=False) - 128) / 128
    for layer in (*("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
                  *("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c")):  # fmt: skip
        x = getattr(network, layer)(x)
    branch = network.Mixed_6d.branch1x1
    x = torch.nn.functional.conv2d(x, branch.conv.weight)
    norm = branch.bn
    scale = norm.weight / (norm.running_var + 0.001).sqrt()
    x = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    return x.clamp(min=0)[:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)


def test_features_and_rfid(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3), dtype=np.uint8)
    images[1] //= 3
    decoded = (images // 32 * 32).astype(np.uint8)
    before = torch.random.get_rng_state()
    inception = load_inception(weights)
    assert torch.equal(torch.random.get_rng_state(), before)
    activations = inception.activations(images)
    features = [activations.pool, inception(decoded)]
    # The package's class reads counters, too, that its own file has.
    counters = {name: torch.tensor(0) for name in inception.network.state_dict() if name.endswith("tracked")}
    own = weights.with_name("own.pth")
    torch.save(torch.load(weights) | counters, own)
    theirs = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(own))
    expected, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert torch.equal(features[0], expected)
    assert torch.equal(activations.logits, logits) and logits.shape == (3, NUM_LOGITS)
    spatial = spatial_features(theirs, images[1:2])
    assert torch.allclose(activations.spatial[1:2], spatial, rtol=1e-5, atol=1e-5)
    assert activations.spatial.shape == (3, NUM_SPATIAL_FEATURES) and (spatial == 0).any() and spatial.std() > 1e-3
    assert not torch.allclose(spatial, spatial.reshape(17 * 17, 7).T.reshape(1, -1), atol=1e-2)

    # The digest is of the values, and not of the file.
    save_file(
        {name: value.contiguous() for name, value in torch.load(weights).items()}, own.with_suffix(".safetensors")
    )
    assert load_inception(own.with_suffix(".safetensors")).digest == inception.digest
    inception.network.fc.bias[0] += 1
    assert Inception(inception.network).digest != inception.digest
    assert features[0].shape == (3, NUM_FEATURES) and features[0].std(dim=0).max() > 1e-3

    # The Frechet distance in float64 by the singular values of the centred features, which is tr (C1 C2)^(1/2).
    parts = [part.double().numpy() for part in features]
    centred = [(part - part.mean(axis=0)) / np.sqrt(2) for part in parts]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    spread = sum(np.square(part).sum() for part in centred)
    distance = np.square(parts[0].mean(axis=0) - parts[1].mean(axis=0)).sum() + spread - 2 * root
    statistics = [FeatureStatistics(NUM_FEATURES, torch.device("cpu")) for _ in range(2)]
    for part, found in zip(statistics, features, strict=True):
        part.add(found)
    found = frechet_distance(*(part.moments() for part in statistics))
    assert found == pytest.approx(distance, rel=1e-3) and distance > 0


class Call:
    def __reduce__(self):
        return os.system, ("true",)


def test_other_files_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.ones(2)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet.pth: Conv2d_1a_3x3.conv.weight is missing.*Name torch_fidelity"):
        check_inception_weights(tmp_path / "resnet.pth")
    torch.save(Call(), tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="code.pth: needs posix.system to be unpickled"):
        check_inception_weights(tmp_path / "code.pth")
