"""A device without memory for a batch: the error names the option and another value."""

from __future__ import annotations

import pytest
import torch

from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.out_of_memory import refused_batch_size
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.requests import Request, draw_requests


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


def test_drawing_requests_says_so(model, tmp_path, monkeypatch):
    pipeline = BitDancePipeline(model)
    monkeypatch.setattr(pipeline, "_draw_bits", lambda *arguments: too_much())
    requests = [Request(number, "a red circle", number, 32, 48) for number in range(3)]
    settings = {"steps": 2, "guidance": 2.0, "sampler": "euler", "batch_size": 6, "record": {}}
    with pytest.raises(ConfigError, match="--batch-size 6: .* try --batch-size 3"):
        draw_requests(pipeline, requests, tmp_path, **settings)
