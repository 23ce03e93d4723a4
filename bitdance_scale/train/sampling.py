"""Pictures of the configured prompts, drawn with the model as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.generate.block_decode import OnBlock, decode_blocks, lay_out
from bitdance_scale.generate.sampler import ImageNoise, configured_solver, num_draws
from bitdance_scale.parallel.agreement import from_all_ranks
from bitdance_scale.parallel.engine import TrainingEngine
from bitdance_scale.parallel.layout_decode import StageDecoder
from bitdance_scale.parallel.still_model import StageHolder
from bitdance_scale.parallel.topology import Topology
from bitdance_scale.sequence.condition import Condition
from bitdance_scale.vision.codes import pack_codes
from bitdance_scale.vision.tokenizer import VisionTokenizer

# Images decoded together on one replica: bounds the key/value memory.
MAX_BATCH = 8


def draw_samples(
    engine: TrainingEngine, config: RunConfig, condition: Condition, topology: Topology
) -> list[np.ndarray]:
    """Draws one image per prompt; all ranks call it, prompts are dealt to the replicas.

    Image i draws from noise stream i of `sample.seed`, so that it is the same under every layout.

    Returns:
        Codes of the image of each prompt on rank 0, uint8 [h * w, code bytes] in the order of `vision.order`; nothing
        elsewhere.
    """
    prompts = [condition.prompt_ids(prompt) for prompt in config.sample.prompts]
    per_replica = math.ceil(len(prompts) / topology.data_size)
    # Every replica draws as many, some of them twice, because ZeRO-3 gathers weights at every call.
    numbers = [(topology.data_rank + topology.data_size * index) % len(prompts) for index in range(per_replica)]
    mine: dict[int, np.ndarray] = {}
    drawer = BatchDrawer(engine, config, condition, topology)
    for start in range(0, per_replica, MAX_BATCH):
        batch = numbers[start : start + MAX_BATCH]
        bits = drawer.draw([prompts[number] for number in batch], batch)
        mine |= dict(zip(batch, pack_codes(bits.cpu().numpy(), config.vision.latents), strict=True))
    drawn = from_all_ranks(mine, topology.data_group)
    if topology.rank != 0:
        return []
    all_codes = {number: codes for part in drawn for number, codes in part.items()}
    return [all_codes[number] for number in range(len(prompts))]


def decode_samples(codes: Sequence[np.ndarray], config: RunConfig, vision: VisionTokenizer) -> list[np.ndarray]:
    """The pictures of what `draw_samples` has drawn, uint8 [H, W, 3] each; no collective."""
    return [vision.decode(image_codes, sample_grid(config)).numpy() for image_codes in codes]


def sample_grid(config: RunConfig) -> tuple[int, int]:
    """(height, width) in latent cells of the images of `sample.size_px`."""
    height, width = config.sample.size_px
    return height // config.vision.downsample, width // config.vision.downsample


class BatchDrawer:
    """Draws batches of images on one replica, whose ranks all call it.

    The memory of keys and values stays between batches of one shape; it goes with the drawer.

    Args:
        model: its stages; their weights must not change.
        config: `sample` says how to draw.
        condition: for the unconditional prompt.
        topology: the ranks.
    """

    def __init__(self, model: StageHolder, config: RunConfig, condition: Condition, topology: Topology) -> None:
        self._config, self._condition, self._topology = config, condition, topology
        self._decoder = StageDecoder(model, config, topology)

    def draw(
        self, prompts: Sequence[np.ndarray], numbers: Sequence[int], on_block: OnBlock | None = None
    ) -> torch.Tensor:
        """Draws images together.

        Args:
            prompts: int64 token ids of each image.
            numbers: the noise stream of each.
            on_block: sees every block as soon as it is drawn, on all ranks.

        Returns:
            Bits or continuous latents, float32 [I, h * w, C], on all ranks of the replica.
        """
        config, condition, device = self._config, self._condition, self._topology.device
        rows = list(prompts)
        if configured_solver(config).is_guided:
            rows += [condition.unconditional_ids()] * len(rows)
        layout = lay_out(rows, sample_grid(config), condition.image_tokens, device)
        shape = (num_draws(config), config.vision.block_tokens, config.vision.num_bits)
        noise = ImageNoise(config.sample.seed, numbers, shape, device)
        with self._decoder as decoder:
            return decode_blocks(decoder, layout, noise, on_block)
