from __future__ import annotations

from bitdance_scale.train.progress import Progress, progress_fields


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
