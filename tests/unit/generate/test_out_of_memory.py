"""A device without memory for a batch: the error names the option and another value."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.block_decode import OnBlock
from bitdance_scale.generate.drawer import Batch, ModelFacts
from bitdance_scale.generate.out_of_memory import refused_batch_size
from bitdance_scale.generate.requests import Request, draw_requests
from bitdance_scale.generate.sampling_file import Sampling
from bitdance_scale.vision.tokenizer import VisionTokenizer


def too_much() -> torch.Tensor:
    """The CPU's own error."""
    return torch.empty(1 << 58)


def test_the_next_smaller_batch_is_named():
    advice = r"--batch-size 8: .* more memory .* try --batch-size 4 and another --out"
    with pytest.raises(ConfigError, match=advice), refused_batch_size(8, " and another --out"):
        too_much()
    advice = r"--batch-size 1: .* smaller images \(--size\)"
    with pytest.raises(ConfigError, match=advice), refused_batch_size(1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), refused_batch_size(8):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@dataclass
class HungryDrawer:
    """Needs more memory than there is."""

    vision: VisionTokenizer
    facts: ModelFacts

    def draw(self, batch: Batch, on_block: OnBlock) -> torch.Tensor:
        """As in `Drawer`."""
        return too_much()


def test_drawing_requests_says_so(model, tmp_path):
    drawer = HungryDrawer(model.vision, ModelFacts("hungry", model.vision.section, [(32, 48)], 2, 2.0))
    requests = [Request(number, "a red circle", number, 32, 48) for number in range(3)]
    with pytest.raises(ConfigError, match="--batch-size 6: .* try --batch-size 3"):
        draw_requests(drawer, requests, tmp_path, sampling=Sampling(), batch_size=6, record={})
