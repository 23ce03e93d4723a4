"""Embeddings of images and texts by CLIP (Radford et al., ICML 2021, arXiv 2103.00020), in one space.

Images are prepared here and not by transformers, whose image processors need torchvision since its version 5: the
shorter side is resized to that of the network with Pillow's bicubic filter, the middle is cropped, and values are
normalised, as open_clip does for OpenAI's weights (mlfoundations/open_clip, src/open_clip/transform.py, constants.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from bitdance_scale.errors import CheckpointError
from bitdance_scale.evaluation.pretrained import check_report, reading
from bitdance_scale.torchvision_operators import declare_operators

_MODEL_TYPE = "clip"
# Of the red, green and blue of OpenAI's training images; CLIP models of others were trained with the same.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_EXAMPLE = "openai/clip-vit-large-patch14"
_STD = (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """CLIP, frozen, in float32.

    Args:
        model: transformers' `CLIPModel`.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self._tokenizer = tokenizer
        self.image_px: int = self.model.config.vision_config.image_size
        self.text_tokens: int = self.model.config.text_config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.parameters()).device

    @torch.no_grad()
    def embed_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """float32 [n, D] of length 1 each, of uint8 images [H, W, 3] of any sizes.

        Raises:
            ValueError: there is no image, or one is not uint8 [H, W, 3].
        """
        pixels = torch.from_numpy(np.stack([clip_input(image, self.image_px) for image in images])).to(self.device)
        found = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return nn.functional.normalize(found, dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [n, D] of length 1 each.

        A text that is too long loses what is before its end mark (`is_cut`). All are padded to the same length, so that
        a text's embedding does not depend on its neighbours.

        Raises:
            ValueError: there is no text.
        """
        if not texts:
            raise ValueError("there is no text to embed")
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.text_tokens, return_tensors="pt"
        ).to(self.device)
        output = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return nn.functional.normalize(self.model.text_projection(output.pooler_output), dim=-1)

    def is_cut(self, text: str) -> bool:
        """Whether a text has more tokens than the network takes, 77 of which the marks of start and end are two."""
        return len(self._tokenizer(text, truncation=False, verbose=False)["input_ids"]) > self.text_tokens


def clip_input(image: np.ndarray, side_px: int) -> np.ndarray:
    """An image uint8 [H, W, 3] as CLIP wants it, float32 [3, side, side]: the middle, the shorter side made `side_px`.

    Sizes and places are rounded as by torchvision's `Resize` and `CenterCrop`, the latter to even numbers, where
    transformers rounds down.

    Raises:
        ValueError: it is no such image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"an image is {image.dtype} {list(image.shape)}, expected uint8 [height, width, 3]")
    height, width = image.shape[:2]
    short = min(width, height)
    size = side_px * width // short, side_px * height // short
    left, top = (round((length - side_px) / 2) for length in size)
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float32)[top : top + side_px, left : left + side_px] / 255
    normalised = (pixels - np.array(_MEAN, dtype=np.float32)) / np.array(_STD, dtype=np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


def load_clip(name: str) -> Clip:
    """CLIP on the CPU.

    Args:
        name: folder of the model in transformers' layout, with its tokenizer, or its name on the Hugging Face Hub, such
            as openai/clip-vit-large-patch14. Weights are read from safetensors only.

    Raises:
        CheckpointError: it is not there, is another network, is incomplete, or has no tokenizer of its own.
    """
    # Before transformers is imported, which takes seconds.
    declare_operators()
    from transformers import AutoTokenizer, CLIPModel, PretrainedConfig

    fix = f"name the folder of a CLIP model with its tokenizer, or its name on the hub such as {_EXAMPLE}"
    with reading(name):
        kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    if kind != _MODEL_TYPE:
        raise CheckpointError(f"{name}: is a model of type {kind!r}, expected {_MODEL_TYPE!r}; {fix}")
    with reading(name):
        model, report = CLIPModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    check_report(name, report)
    wanted = model.config.text_config.vocab_size
    if len(tokenizer) != wanted:
        raise CheckpointError(f"{name}: its tokenizer has {len(tokenizer)} entries and its network {wanted}; {fix}")
    return Clip(model.float(), tokenizer)
