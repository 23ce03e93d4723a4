from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import torch

from bitdance_scale.config.load import load_config
from bitdance_scale.data.data_errors import ErrorCause
from bitdance_scale.train.progress import Progress, StepMeter, progress_fields


def test_progress_fields_are_json_values():
    fields = progress_fields(
        Progress(
            3,
            58,
            900,
            images_by_resolution={32: 12, 64: 42},
            skipped_samples=2,
            sample_errors={"bad_image": 2},
            skipped_steps=1,
        )
    )
    assert fields == {
        "step": 3,
        "images": 58,
        "tokens": 900,
        "images_by_resolution": {"32": 12, "64": 42},
        "skipped_samples": 2,
        "sample_errors": {"bad_image": 2},
        "optimizer": {"skipped_steps": 1},
    }


def test_samples_that_a_stream_has_lost_are_not_taken_from_the_images(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    ranks = SimpleNamespace(device=torch.device("cpu"), device_name="cpu", data_group=None)
    progress = Progress()
    loaded = SimpleNamespace(
        packs=[],
        images_by_resolution={32: 4, 64: 6},
        images_by_source={},
        # A broken stream lacked 500 samples; of the ten that were planned, one could not be decoded.
        sample_errors=Counter({ErrorCause.READ_FAILED: 500, ErrorCause.BAD_IMAGE: 1, ErrorCause.EMPTY_CAPTION: 2}),
        num_skipped=1,
        num_ready=0,
    )
    meter = StepMeter(load_config("demo"), 755, ranks, progress)
    meter.add(SimpleNamespace(loaded=loaded, wait_s=0.0), is_skipped=False)
    assert (progress.images, progress.skipped_samples) == (9, 501)
    assert progress.sample_errors == {"read_failed": 500, "bad_image": 1, "empty_caption": 2}
