"""The settings that a published folder draws with unless told otherwise."""

from __future__ import annotations

import json

import pytest

from bitdance_scale.errors import CheckpointError
from bitdance_scale.generate.sampling_file import Sampling, read_sampling, write_sampling


def test_settings_of_a_run_come_back(tmp_path):
    assert read_sampling(tmp_path) is None
    drawn = {"size_px": [64, 96], "num_steps": 20, "guidance": 3, "sampler": "euler", "prompts": ["ein Käse"]}
    write_sampling(tmp_path, drawn | {"every_steps": 400, "weights": "averaged"})
    assert read_sampling(tmp_path) == Sampling((64, 96), 20, 3.0, "euler", ("ein Käse",))
    # A run of an earlier version may lack some.
    write_sampling(tmp_path, {"size_px": [64, 96]})
    assert read_sampling(tmp_path) == Sampling(size_px=(64, 96))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_step": 3}, "unknown section 'num_step'; did you mean 'num_steps'"),
        ({"num_steps": "3"}, "num_steps = '3': expected an integer"),
        ({"num_steps": 0}, "num_steps = 0: must be at least 1"),
        ({"guidance": -1}, "guidance = -1.0: must be at least 0"),
        ({"sampler": "heun"}, "sampler = 'heun': must be one of"),
        ({"size_px": [64]}, "size_px = .*64.*: expected a pair of integers"),
        ({"prompts": "a red circle"}, "prompts = 'a red circle': expected a list of strings"),
    ],
)
def test_what_cannot_be_drawn_with_is_refused(tmp_path, content, message):
    (tmp_path / "sampling.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"sampling.json: {message}") as refusal:
        read_sampling(tmp_path)
    assert "or remove it to draw as the release does" in str(refusal.value)
