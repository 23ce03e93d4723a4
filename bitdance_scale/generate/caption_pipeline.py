"""Captions of images with a published folder on one device.

pipeline = CaptionPipeline.from_pretrained(folder)
caption = pipeline([pixels])[0].text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.caption_decode import TokenChoice, decode_captions, lay_out_contexts
from bitdance_scale.generate.image_sizes import check_size
from bitdance_scale.generate.published_model import PublishedDescriber, load_describer
from bitdance_scale.generate.qwen3_captions import Qwen3Captions
from bitdance_scale.model.adapter_source import WeightedAdapter
from bitdance_scale.vision.bits import unpack_bits

MAX_TOKENS = 512
"""Captions of training are cut to as many (`text.max_caption_tokens`)."""


@dataclass(frozen=True)
class Caption:
    """What is said of an image.

    Attributes:
        text: the caption.
        num_tokens: its tokens, without the one that ends it.
        is_ended: whether the model ended it; else it was cut.
    """

    text: str
    num_tokens: int
    is_ended: bool


class CaptionPipeline:
    """Describes images.

    Args:
        model: the parts of a published model, on one device.
    """

    def __init__(self, model: PublishedDescriber) -> None:
        self.model = model
        self._captions = Qwen3Captions(model.backbone, model.output, model.projector)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        context: str | None = None,
        adapters: Sequence[WeightedAdapter] = (),
    ) -> CaptionPipeline:
        """Loads a published folder without its diffusion head.

        Args:
            folder: a local folder as `bitdance export` or the release writes it; nothing is downloaded.
            dtype: of weights and activations; default bfloat16 on CUDA, float32 elsewhere.
            device: default CUDA where there is one.
            context: how images are laid, plain or queries; None: as the folder says it was trained.
            adapters: as for `BitDancePipeline.from_pretrained`.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit the others, or adapters do not fit the model.
            ConfigError: the folder holds no usable tokenizer.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        return cls(load_describer(folder, dtype, device, context, adapters))

    @property
    def device(self) -> torch.device:
        """Where images are described."""
        return self.model.backbone.device

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[np.ndarray],
        choice: TokenChoice | None = None,
        generators: Sequence[torch.Generator] = (),
        max_tokens: int = MAX_TOKENS,
    ) -> list[Caption]:
        """Describes all images as one batch; they may differ in size.

        Args:
            images: uint8 [H, W, 3] each, sRGB; sides are multiples of downsample * block side, up to 256 cells.
            choice: how tokens are chosen; None: the most probable one.
            generators: on the CPU, one per image, where tokens are drawn. A caption is then the same in any batch, up
                to rounding.
            max_tokens: a caption is cut after so many tokens.

        Raises:
            ConfigError: an argument is not possible; nothing has been computed then.
            CheckpointError: the model's numbers are not finite.
        """
        choice = choice or TokenChoice()
        if not images or max_tokens < 1:
            raise ConfigError(f"{len(images)} images, max_tokens = {max_tokens}: both must be at least 1")
        if not choice.is_greedy and len({*map(id, generators)}) != len(images):
            raise ConfigError(f"generators: {len(generators)} for {len(images)} images; give each one of its own")
        model = self.model
        grids = [check_size(image.shape[0], image.shape[1], model.vision.section) for image in images]
        prompts = [model.text.describing_prompt(0, grid) for grid in grids]
        codes = model.vision.encode([torch.from_numpy(np.ascontiguousarray(image)) for image in images])
        bits = unpack_bits(torch.from_numpy(np.concatenate(codes))).to(self.device)
        is_choice = torch.zeros(len(model.output), dtype=torch.bool)
        # Rows beyond the tokenizer's entries mean nothing.
        is_choice[: model.text.vocab_size] = torch.from_numpy(model.text.caption_entries())
        found = decode_captions(
            self._captions,
            lay_out_contexts(prompts, model.text.image_tokens, self.device),
            bits,
            choice,
            generators,
            is_choice.to(self.device),
            int(model.text.turn_end_ids[0]),
            max_tokens,
        )
        return [Caption(model.text.decode(tokens.ids), len(tokens.ids), tokens.is_ended) for tokens in found]
