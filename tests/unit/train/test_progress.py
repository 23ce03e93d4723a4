from __future__ import annotations

import pytest

from bitdance_scale.config.schema import OptimSection
from bitdance_scale.train.progress import Progress, learning_rate, progress_fields


@pytest.mark.parametrize(("step", "share"), [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (10_000, 1.0)])
def test_rate_warms_up_and_stays(step, share):
    assert learning_rate(OptimSection(lr=2e-4, warmup_steps=4), step) == pytest.approx(2e-4 * share)


def test_rate_without_warmup_is_whole_at_once():
    assert learning_rate(OptimSection(lr=2e-4, warmup_steps=0), 0) == 2e-4


def test_progress_fields_are_json_values():
    fields = progress_fields(
        Progress(3, 58, 900, images_by_class={32: 12, 64: 42}, holes=2, faults={"bad_image": 2}, skipped_steps=1)
    )
    assert fields == {
        "step": 3,
        "images": 58,
        "tokens": 900,
        "images_by_class": {"32": 12, "64": 42},
        "holes": 2,
        "faults": {"bad_image": 2},
        "optimizer": {"skipped_steps": 1},
    }
