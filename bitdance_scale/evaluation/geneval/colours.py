"""The colour of an object by CLIP (Radford et al., 2021, arXiv 2103.00020), among ten words.

Sources: djghosh13/geneval, evaluation/evaluate_images.py (`ImageCrops`, `color_classification`); LAION-AI/
CLIP_benchmark, clip_benchmark/metrics/zeroshot_classification.py (`zero_shot_classifier`, `run_classification`);
mlfoundations/open_clip, src/open_clip/transform.py and constants.py (images of OpenAI's weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from bitdance_scale.evaluation.geneval.pretrained import load_network, reading
from bitdance_scale.evaluation.geneval.rules import COLOURS, Detection

# #999.
_BACKGROUND = 153
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_BATCH = 16


def colour_texts(colour: str, name: str) -> tuple[str, str, str]:
    """What an object of a class in a colour may be called."""
    return f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}", f"a photo of a {colour} object"


def crop(image: np.ndarray, found: Detection) -> Image.Image:
    """The object alone: grey outside its mask, cut to its box.

    Args:
        image: uint8 [H, W, 3].
        found: an object in it; without a mask nothing is made grey.
    """
    left, top, right, bottom = (round(side) for side in found.box)
    part = image[top:bottom, left:right]
    if found.mask is not None:
        part = np.where(found.mask[top:bottom, left:right, None], part, np.uint8(_BACKGROUND))
    return Image.fromarray(np.ascontiguousarray(part))


def clip_input(image: Image.Image, side_px: int) -> np.ndarray:
    """An RGB image as CLIP wants it, float32 [3, side, side]: the shorter side to `side_px`, the middle of the longer.

    Resized by Pillow's bicubic filter; sizes and places are rounded as by torchvision's `Resize` and `CenterCrop`.
    """
    width, height = image.size
    short = min(width, height)
    size = int(side_px * width / short), int(side_px * height / short)
    left, top = (round((length - side_px) / 2) for length in size)
    resized = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float32)[top : top + side_px, left : left + side_px] / 255
    normalised = (pixels - np.float32(_MEAN)) / np.float32(_STD)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


class ColourClassifier:
    """Names the colours of objects.

    Args:
        network: `CLIPModel`; the device is its own.
        tokenizer: of transformers, that of the network.
    """

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        self.network: Any = network
        self.tokenizer = tokenizer
        self._directions: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: np.ndarray, name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, one of `COLOURS`.

        Args:
            image: uint8 [H, W, 3].
            name: class of the objects.
            objects: in the image.
        """
        side_px = self.network.config.vision_config.image_size
        inputs = np.stack([clip_input(crop(image, one), side_px) for one in objects])
        names: list[str] = []
        for batch in torch.from_numpy(inputs).to(self._device).split(_BATCH):
            features = self.network.visual_projection(self.network.vision_model(pixel_values=batch).pooler_output)
            likeness = functional.normalize(features, dim=-1) @ self.directions(name).T
            names += [COLOURS[index] for index in likeness.argmax(dim=1).tolist()]
        return names

    @torch.no_grad()
    def directions(self, name: str) -> torch.Tensor:
        """A unit vector per colour, [10, D]: the mean of the unit vectors of its texts for this class."""
        if name not in self._directions:
            texts = [text for colour in COLOURS for text in colour_texts(colour, name)]
            features = functional.normalize(self._text_features(texts), dim=-1)
            means = features.unflatten(0, (len(COLOURS), -1)).mean(dim=1)
            self._directions[name] = functional.normalize(means, dim=-1)
        return self._directions[name]

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """[N, D]. Texts of one length go together, so that nothing is filled up."""
        tokens: Mapping[str, list[list[int]]] = self.tokenizer(list(texts))
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(tokens["input_ids"]):
            by_length.setdefault(len(ids), []).append(index)
        rows: dict[int, torch.Tensor] = {}
        for places in by_length.values():
            ids = torch.tensor([tokens["input_ids"][index] for index in places], device=self._device)
            features = self.network.text_projection(self.network.text_model(input_ids=ids).pooler_output)
            rows.update(zip(places, features, strict=True))
        return torch.stack([rows[index] for index in range(len(texts))])


def load_colour_classifier(source: str) -> ColourClassifier:
    """The classifier on the CPU in float32.

    Args:
        source: a folder of transformers or a hub name of a CLIP; GenEval's is `openai/clip-vit-large-patch14`.

    Raises:
        CheckpointError: it cannot be had, is damaged, or is another network.
    """
    from transformers import AutoTokenizer, CLIPModel

    network = load_network(CLIPModel, source)
    with reading(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    return ColourClassifier(network, tokenizer)
