"""CLIP of transformers on images and texts as open_clip prepares them for OpenAI's weights.

Source: mlfoundations/open_clip, src/open_clip/transform.py and constants.py.
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
from bitdance_scale.torchvision_operators import declare_operators

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """CLIP, frozen.

    Args:
        network: `CLIPModel`.
        tokenizer: of transformers, that of the network.
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__()
        self.network: Any = network
        self._tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device

    @torch.no_grad()
    def embed_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """float32 [n, D] of length 1 each, of uint8 images [H, W, 3] of any sizes."""
        side_px = self.network.config.vision_config.image_size
        inputs = torch.from_numpy(np.stack([clip_input(image, side_px) for image in images])).to(self.device)
        features = self.network.visual_projection(self.network.vision_model(pixel_values=inputs).pooler_output)
        return functional.normalize(features, dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [n, D] of length 1 each. Texts of one length go together, so that nothing is filled up."""
        tokens: Mapping[str, list[list[int]]] = self._tokenizer(list(texts))
        by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(tokens["input_ids"]):
            by_length.setdefault(len(ids), []).append(index)
        rows: dict[int, torch.Tensor] = {}
        for places in by_length.values():
            inputs = torch.tensor([tokens["input_ids"][index] for index in places], device=self.device)
            features = self.network.text_projection(self.network.text_model(input_ids=inputs).pooler_output)
            rows.update(zip(places, functional.normalize(features, dim=-1), strict=True))
        return torch.stack([rows[index] for index in range(len(texts))])


def clip_input(image: np.ndarray, side_px: int) -> np.ndarray:
    """An image uint8 [H, W, 3] as CLIP wants it, float32 [3, side, side]: the middle, the shorter side made `side_px`.

    Resized by Pillow's bicubic filter. Sizes and places are rounded as by torchvision's `Resize` and `CenterCrop`, the
    latter to even numbers, where transformers rounds down.
    """
    height, width = image.shape[:2]
    short = min(width, height)
    size = side_px * width // short, side_px * height // short
    left, top = (round((length - side_px) / 2) for length in size)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float32)[top : top + side_px, left : left + side_px] / 255
    normalised = (pixels - np.array(_MEAN, dtype=np.float32)) / np.array(_STD, dtype=np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


def load_clip(source: str) -> Clip:
    """CLIP on the CPU in float32.

    Args:
        source: a folder of transformers or a hub name; GenEval's is `openai/clip-vit-large-patch14`.

    Raises:
        CheckpointError: it cannot be had, is damaged, or is another network.
    """
    # Before transformers is imported, which takes seconds.
    declare_operators()
    from transformers import AutoTokenizer, CLIPModel

    network = load_network(CLIPModel, source)
    with reading(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    return Clip(network, tokenizer)
