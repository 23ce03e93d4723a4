"""A drawer without a network: bits by seed, decoded by a small autoencoder, as fast or as slowly as a test wants."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from bitdance_scale.config.schema import VisionSection
from bitdance_scale.generate.block_decode import OnBlock
from bitdance_scale.generate.drawer import Batch, ModelFacts
from bitdance_scale.vision.tokenizer import VisionTokenizer
from tests.released import AUTOENCODER, write_autoencoder


class FakeDrawer:
    """Blocks of 2 x 2 cells of 4 px: a picture of 32 x 32 px has 16.

    Args:
        folder: for the weights of the autoencoder.
        facts: what differs from the usual ones.

    Attributes:
        pace: every block waits for it, if it is cleared.
        error: raised in place of a drawing.
        drawn: batches of all drawings, in the order in which they began.
    """

    def __init__(self, folder: Path, **facts: object) -> None:
        section = VisionSection(weights=str(write_autoencoder(folder)), block_side=2, **AUTOENCODER)
        self.vision = VisionTokenizer(section, "cpu")
        usual = {"name": "fake", "vision": section, "sizes_px": [(32, 32)], "steps": 4, "guidance": 2.0}
        self.facts = ModelFacts(**(usual | facts))
        self.pace = threading.Event()
        self.pace.set()
        self.error: Exception | None = None
        self.drawn: list[Batch] = []

    def bits(self, batch: Batch) -> torch.Tensor:
        """What it draws, float32 [I, h * w, C]."""
        num_cells = batch.size_px[0] * batch.size_px[1] // 16
        rows = [
            torch.randint(0, 2, (num_cells, 16), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
            for seed in batch.seeds
        ]
        return torch.stack(rows)

    def draw(self, batch: Batch, on_block: OnBlock) -> torch.Tensor:
        """As in `Drawer`."""
        self.drawn.append(batch)
        if self.error is not None:
            raise self.error
        bits, blocks = self.bits(batch), []
        for block in bits.split(4, dim=1):
            assert self.pace.wait(30)
            blocks.append(block)
            on_block(blocks)
        return bits
