"""Scores drawings of the demo's classes: is each picture of its class, and how far are all of them from real ones?

    python tools/score_classes.py a=drawn/a b=drawn/b --out scores.json

A drawing is what `bitdance evaluate draw imagenet` wrote, of the 24 classes of data/demo_classes. Accuracy: the share
of pictures that `bitdance_scale/evaluation/scenes` reads as one shape, of the right kind and colour. Frechet distance:
between Gaussians fitted to the features of drawn and of real pictures; the features are those of a small network that
is trained here to tell the classes apart, always with the same seed. For comparison, the real held-out pictures are
scored too, as they are and after the vision tokenizer, which is the best that a model of its bits can reach.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import linalg
from torch import nn
from torch.nn import functional

from bitdance_scale.config.load import load_config
from bitdance_scale.demo.scenes import class_names
from bitdance_scale.errors import BitDanceError, DataError
from bitdance_scale.evaluation.image_array import map_npz, read_labels
from bitdance_scale.evaluation.scenes.reading import read_scene
from bitdance_scale.evaluation.scenes.scorer import class_of
from bitdance_scale.vision.tokenizer import VisionTokenizer

NUM_FEATURES = 64
EPOCHS, BATCH, RATE = 4, 64, 2e-3


class FeatureNetwork(nn.Module):
    """Three convolutions and a linear to the classes; the features are their mean over the picture."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (3, 32, 64, NUM_FEATURES)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body, self.classifier = nn.Sequential(*layers), nn.Linear(NUM_FEATURES, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, NUM_FEATURES]."""
        return self.body(images.permute(0, 3, 1, 2).float() / 127.5 - 1).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] -> logits [N, classes]."""
        return self.classifier(self.features(images))


def read_shards(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, H, W, 3], labels int64 [N]) of a folder of class scenes."""
    images, labels = [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None, "the demo's shards hold files"
                if member.name.endswith(".jpg"):
                    images.append(np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB")))
                elif member.name.endswith(".cls"):
                    labels.append(int(content.read()))
    if not images or len(images) != len(labels):
        raise DataError(f"{folder}: no class scenes; draw them with: bitdance demo-data {folder}")
    return np.stack(images), np.array(labels)


def train_features(images: np.ndarray, labels: np.ndarray) -> FeatureNetwork:
    """Trains the network of the features on real pictures."""
    torch.manual_seed(0)
    network = FeatureNetwork(int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    order = np.random.default_rng(0)
    for _ in range(EPOCHS):
        places = order.permutation(len(images))
        for start in range(0, len(places), BATCH):
            batch = places[start : start + BATCH]
            loss = functional.cross_entropy(
                network(torch.from_numpy(images[batch])), torch.from_numpy(labels[batch]).long()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@torch.no_grad()
def features_of(network: FeatureNetwork, images: np.ndarray) -> np.ndarray:
    """float64 [N, NUM_FEATURES]."""
    parts = [network.features(torch.from_numpy(images[start : start + 256])) for start in range(0, len(images), 256)]
    return torch.cat(parts).double().numpy()


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to features [N, F] and [M, F] (Heusel et al. 2017)."""
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root.real))


def read_classes(images: np.ndarray) -> np.ndarray:
    """int64 [N], the class that each picture shows; -1 where it shows no single shape of one of the classes."""
    numbers = {name: number for number, name in enumerate(class_names())}
    return np.array([numbers.get(class_of(read_scene(Image.fromarray(image))), -1) for image in images])


def score(images: np.ndarray, labels: np.ndarray, network: FeatureNetwork, real: np.ndarray) -> dict[str, Any]:
    """Accuracy, in all and by class, and Frechet distance of some pictures.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int64 [N], what each should show.
        network: of the features.
        real: features of real pictures.
    """
    is_right = read_classes(images) == labels
    by_class = {name: float(is_right[labels == number].mean()) for number, name in enumerate(class_names())}
    return {
        "images": len(images),
        "accuracy": float(is_right.mean()),
        "frechet": frechet(features_of(network, images), real),
        "accuracy_by_class": by_class,
    }


def through_tokenizer(images: np.ndarray, config_name: str) -> np.ndarray:
    """The pictures after the vision tokenizer of a configuration."""
    config = load_config(config_name)
    tokenizer = VisionTokenizer(config.vision, torch.device("cpu"))
    grid = (images.shape[1] // config.vision.downsample, images.shape[2] // config.vision.downsample)
    bits = tokenizer.encode([torch.from_numpy(image) for image in images])
    return np.stack([tokenizer.decode(rows, grid).numpy() for rows in bits])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", nargs="*", metavar="NAME=FOLDER", help="drawings, each under a name")
    parser.add_argument("--real", type=Path, default=Path("data/demo_classes"), help="default: %(default)s")
    parser.add_argument(
        "--held-out", type=Path, default=Path("data/demo_classes_held_out"), help="default: %(default)s"
    )
    parser.add_argument("--config", default="class_demo", help="whose tokenizer is scored (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        scores = _scores(options)
    except BitDanceError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    for name, found in scores.items():
        print(
            f"{name:24} accuracy {found['accuracy']:.3f}  frechet {found['frechet']:8.3f}  ({found['images']} images)"
        )
    return 0


def _scores(options: argparse.Namespace) -> dict[str, Any]:
    images, labels = read_shards(options.real)
    network = train_features(images, labels)
    real = features_of(network, images)
    held_out, held_out_labels = read_shards(options.held_out)
    scores = {
        "real, held out": score(held_out, held_out_labels, network, real),
        "after the tokenizer": score(through_tokenizer(held_out, options.config), held_out_labels, network, real),
    }
    for drawing in options.drawings:
        name, equals, folder = drawing.partition("=")
        samples = Path(folder) / "samples.npz"
        if not (equals and samples.is_file()):
            raise DataError(
                f"{drawing}: must be NAME=FOLDER, a folder that `bitdance evaluate draw imagenet` has finished"
            )
        try:
            drawn, labels = np.array(map_npz(samples)), read_labels(samples)
        except ValueError as error:
            raise DataError(f"{samples}: {error}; draw it again with `bitdance evaluate draw imagenet`") from error
        scores[name] = score(drawn, labels, network, real)
    return scores


if __name__ == "__main__":
    sys.exit(main())
