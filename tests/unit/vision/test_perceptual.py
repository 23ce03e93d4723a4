import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitdance_scale.errors import CheckpointError, ConfigError
from bitdance_scale.vision.perceptual import LPIPS_MIN_PX, check_lpips_weights, load_lpips

# Convolutions of torchvision's networks (channels in and out, kernel, stride, padding), P pooling, T taken by LPIPS.
ALEX = ((3, 64, 11, 4, 2), "T", "P3", (64, 192, 5, 1, 2), "T", "P3", (192, 384, 3, 1, 1), "T",
        (384, 256, 3, 1, 1), "T", (256, 256, 3, 1, 1), "T")  # fmt: skip
VGG = tuple(
    item
    for number, channels_in, channels in ((2, 3, 64), (2, 64, 128), (3, 128, 256), (3, 256, 512), (3, 512, 512))
    for item in (
        (channels_in, channels, 3, 1, 1), *(((channels, channels, 3, 1, 1),) * (number - 1)), "T", "P2",
    )
)  # fmt: skip
# It does not look behind the last pooling.
PLANS = {"alex": ALEX, "vgg": VGG[:-1]}
STARTS = {"alex": (0, 3, 6, 8, 10), "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
SHIFT, SCALE = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])


def random_state(network: str) -> dict[str, torch.Tensor]:
    """A state dict as torchvision has it, with random weights, and a classifier that nobody reads."""
    generator = torch.Generator().manual_seed(5)
    convolutions = [item for item in PLANS[network] if isinstance(item, tuple)]
    state = {"classifier.1.weight": torch.full((3, 2), torch.nan)}
    for index, (channels_in, channels, side, *_) in zip(STARTS[network], convolutions, strict=True):
        scale = (2 / (channels_in * side**2)) ** 0.5
        state[f"features.{index}.weight"] = scale * torch.randn(channels, channels_in, side, side, generator=generator)
        state[f"features.{index}.bias"] = 0.01 * torch.randn(channels, generator=generator)
    return state


def features(network: str, state: dict[str, torch.Tensor], pixels: torch.Tensor) -> list[torch.Tensor]:
    """What LPIPS compares, each position's channels scaled to length 1; float64."""
    x = (pixels.double() - SHIFT[:, None, None]) / SCALE[:, None, None]
    taken, starts = [], iter(STARTS[network])
    for item in PLANS[network]:
        if item == "T":
            taken.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        elif isinstance(item, str):
            x = nn.functional.max_pool2d(x, int(item[1]), 2)
        else:
            index = next(starts)
            weight, bias = (state[f"features.{index}.{kind}"].double() for kind in ("weight", "bias"))
            x = nn.functional.conv2d(x, weight, bias, stride=item[3], padding=item[4]).relu()
    return taken


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perceptual")
    for network in PLANS:
        torch.save(random_state(network), folder / f"{network}.pth")
    return folder


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_is_the_distance_of_the_features_written_out(files, network):
    before = torch.random.get_rng_state()
    lpips = load_lpips(network, files / f"{network}.pth").train()
    assert torch.equal(torch.random.get_rng_state(), before)
    pixels = torch.rand(2, 3, 2, LPIPS_MIN_PX[network], 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    first, second = pixels.unbind(dim=2)
    linears = torch.load(Path(sys.modules["lpips"].__file__).parent / "weights" / "v0.1" / f"{network}.pth", "cpu")
    state = random_state(network)
    expected = sum(
        ((a - b).square() * linears[f"lin{layer}.model.1.weight"].double()).sum(dim=1).mean(dim=(1, 2))
        for layer, (a, b) in enumerate(
            zip(features(network, state, first), features(network, state, second), strict=True)
        )
    )
    distances = lpips(first, second)
    assert distances.shape == (2,)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=1e-6)
    assert expected.min() > 1e-3
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_the_kind_of_file_does_not_matter(files, tmp_path):
    # Some of torchvision's files are older than archives, and a copy may be safetensors.
    state = random_state("alex")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "alex.safetensors")
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = load_lpips("alex", files / "alex.pth")(pixels, -pixels)
    for name in ("old.pth", "alex.safetensors"):
        check_lpips_weights("alex", tmp_path / name)
        assert torch.equal(load_lpips("alex", tmp_path / name)(pixels, -pixels), expected)


def without(name):
    state = random_state("alex")
    del state[name]
    return state


def with_value(value):
    state = random_state("alex")
    state["features.3.bias"][7] = value
    return state


class Call:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (random_state("vgg"), "features.3.weight is missing.*It holds VGG-16. Name .* AlexNet, such as alexnet-owt"),
        ({"conv1.weight": torch.ones(2)}, "holds no tensor named features.N.weight, as networks of another kind"),
        (without("features.6.bias"), r"features.6.bias is missing, expected \[384\]"),
        (random_state("alex") | {"features.8.bias": torch.ones(3)},
         r"features.8.bias has shape \[3\], expected \[256\]"),
        (random_state("alex") | {"features.12.bias": torch.ones(3)}, "features.12.bias is no tensor of this network"),
        (random_state("alex") | {"features.0.bias": torch.ones(64).int()}, "features.0.bias is int32; weights are"),
        ([1], "holds list, expected tensors by name"),
        (Call(), "needs posix.system to be unpickled, which could run any code"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_archive", [True, False])
def test_other_files_are_refused_before_a_network_is_made(tmp_path, content, message, is_archive):
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=is_archive)
    for call in (check_lpips_weights, load_lpips):
        with pytest.raises(CheckpointError, match=f"bad.pth: {message}"):
            call("alex", tmp_path / "bad.pth")


@pytest.mark.parametrize("is_archive", [True, False])
def test_damage_is_refused(tmp_path, is_archive):
    torch.save(random_state("alex"), tmp_path / "bad.pth", _use_new_zipfile_serialization=is_archive)
    content = (tmp_path / "bad.pth").read_bytes()
    (tmp_path / "bad.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cut short" if is_archive else "unexpected EOF"):
        check_lpips_weights("alex", tmp_path / "bad.pth")
    (tmp_path / "bad.pth").write_text("weights")
    with pytest.raises(CheckpointError, match="bad.pth: cannot be read"):
        check_lpips_weights("alex", tmp_path / "bad.pth")
    torch.save(with_value(torch.nan), tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="features.3.bias holds NaN or infinity"):
        load_lpips("alex", tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="none.pth is missing; name the file itself"):
        check_lpips_weights("alex", tmp_path / "none.pth")


def test_a_missing_package_is_named(files, monkeypatch):
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    for call in (check_lpips_weights, load_lpips):
        with pytest.raises(ConfigError, match=r"LPIPS with AlexNet.*pip install 'bitdance_scale\[perceptual\]'"):
            call("alex", files / "alex.pth")
