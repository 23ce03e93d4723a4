"""Images from a published folder on one device, called like a diffusers pipeline.

    pipeline = BitDancePipeline.from_pretrained(folder)
    image = pipeline("a red cube on a blue ball", height=512, width=512).images[0]

Defaults are those of the release: 1024 px, 50 Euler-Maruyama steps, guidance 7.5. The unconditional prompt is an
assistant's turn without a user's turn before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.block_decode import OnBlock, decode_blocks, lay_out
from bitdance_scale.generate.image_sizes import check_size
from bitdance_scale.generate.published_model import PublishedModel, load_published
from bitdance_scale.generate.qwen3_blocks import Qwen3Blocks
from bitdance_scale.generate.sampler import FlowSolver, GeneratorNoise
from bitdance_scale.model.adapter_source import WeightedAdapter
from bitdance_scale.vision.bits import pack_bits

OUTPUT_TYPES = ("pil", "np", "pt", "bits")

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class PipelineOutput:
    """What a call returns.

    Attributes:
        images: by `output_type`: pil, a list of PIL images; np, float32 [n, H, W, 3] in 0 .. 1; pt, float32
            [n, 3, H, W] in 0 .. 1 on the CPU; bits, uint8 [n, h * w, C / 8], packed and in block raster order.
    """

    images: Any


class BitDancePipeline:
    """Draws images of prompts.

    Args:
        model: the parts of a published model, on one device.
    """

    def __init__(self, model: PublishedModel) -> None:
        self.model = model
        self._blocks: tuple[FlowSolver, Qwen3Blocks] | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        adapters: Sequence[WeightedAdapter] = (),
    ) -> BitDancePipeline:
        """Loads a published folder.

        Args:
            folder: a local folder as `bitdance export` or the release writes it; nothing is downloaded.
            dtype: of weights and activations; default bfloat16 on CUDA, float32 elsewhere.
            device: default CUDA where there is one.
            adapters: from `checkpoint.named_adapters.parse_adapters`; merged into the weights, in float32.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit the others, or adapters do not fit the model.
            ConfigError: the folder holds no usable tokenizer.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        return cls(load_published(folder, dtype, device, adapters))

    @property
    def device(self) -> torch.device:
        """Where images are drawn."""
        return self.model.backbone.device

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str = "euler_maruyama",
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        on_block: OnBlock | None = None,
    ) -> PipelineOutput:
        """Draws all images of the prompts as one batch, prompt by prompt.

        Args:
            prompt: one or several.
            height: in pixels; a multiple of downsample * block side, up to 256 cells.
            width: in pixels; likewise.
            num_inference_steps: solver steps per block.
            guidance_scale: 1 is no guidance; any other scale doubles the sequences.
            sampler: euler_maruyama or euler.
            num_images_per_prompt: images of each prompt.
            generator: one draws for the whole batch, as in the release. A list has one per image, and an image is then
                the same in any batch, up to rounding.
            output_type: pil, np, pt or bits; see `PipelineOutput`.
            on_block: sees each block of the batch as soon as it is drawn (`block_decode.OnBlock`).

        Raises:
            ConfigError: an argument is not possible; nothing has been computed then.
        """
        vision = self.model.vision.section
        solver = FlowSolver(num_inference_steps, float(guidance_scale), sampler, self.model.head.time_shift)
        grid = check_size(height, width, vision)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check_request(prompts, num_images_per_prompt, generator, output_type)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        bits = self._draw_bits(prompts, grid, solver, generator, on_block)
        if output_type == "bits":
            return PipelineOutput(pack_bits(bits).cpu().numpy())
        images = [self.model.vision.decode(rows, grid).numpy() for rows in bits]
        if output_type == "pil":
            return PipelineOutput([Image.fromarray(image) for image in images])
        fractions = np.stack(images).astype(np.float32) / 255
        return PipelineOutput(fractions if output_type == "np" else torch.from_numpy(fractions).permute(0, 3, 1, 2))

    def _draw_bits(
        self,
        prompts: Sequence[str],
        grid: tuple[int, int],
        solver: FlowSolver,
        generator: Generators,
        on_block: OnBlock | None,
    ) -> torch.Tensor:
        """Bits of one image per prompt, float32 [n, h * w, C]."""
        text, vision = self.model.text, self.model.vision.section
        rows = [text.prompt_ids(prompt) for prompt in prompts]
        if solver.is_guided:
            rows += [text.unconditional_ids()] * len(prompts)
        layout = lay_out(rows, grid, text.image_tokens, self.device)
        shape = (solver.num_draws, vision.block_tokens, vision.num_bits)
        noise = GeneratorNoise(generator, len(prompts), shape, self.device)
        return decode_blocks(self._blocks_for(solver), layout, noise, on_block)

    def _blocks_for(self, solver: FlowSolver) -> Qwen3Blocks:
        """The decoder of the last call if it has the same solver, with its memory and its graphs; else a new one."""
        if self._blocks is None or self._blocks[0] != solver:
            # The old decoder's memory is freed before the new one is made.
            self._blocks = None
            model = self.model
            self._blocks = (solver, Qwen3Blocks(model.backbone, model.projector, model.head, solver))
        return self._blocks[1]


def _check_request(prompts: Sequence[str], images_per_prompt: int, generator: Generators, output_type: str) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"prompt = {prompts!r}: must be a text or a list with at least one")
    if images_per_prompt < 1:
        raise ConfigError(f"num_images_per_prompt = {images_per_prompt}: must be at least 1")
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type = {output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
    num_images = len(prompts) * images_per_prompt
    if generator is None or isinstance(generator, torch.Generator):
        return
    if len(generator) != num_images:
        raise ConfigError(
            f"generator: a list of {len(generator)} for {num_images} images; give one per image, or a single one"
        )
    if len(set(map(id, generator))) != num_images:
        raise ConfigError("generator: one is in the list twice, so images would share its numbers; make one per image")
