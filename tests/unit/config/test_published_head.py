"""The head's published configuration as a section, and back."""

from __future__ import annotations

import dataclasses

import pytest

from bitdance_scale.config.load import load_network
from bitdance_scale.config.published_head import (
    beyond_release,
    inert_head_settings,
    published_head,
    read_head,
    time_note,
)
from bitdance_scale.config.schema import HeadSection, VisionSection
from bitdance_scale.errors import CheckpointError

PT_14B = load_network("pt_14b")
# The head of BitDance-14B-64x, as the release configures it.
HEAD_64X = {
    "ch_target": 32,
    "ch_cond": 5120,
    "ch_latent": 5120,
    "depth_latent": 6,
    "depth_adanln": 2,
    "grad_checkpointing": False,
    "time_shift": 1.0,
    "time_schedule": "logit_normal",
    "P_mean": -0.8,
    "P_std": 0.8,
    "parallel_num": 64,
    "diff_batch_mul": 1,
    "use_swiglu": True,
}


def test_the_models_defaults_are_the_published_head():
    vision = dataclasses.replace(PT_14B.vision, block_side=8)
    assert published_head(PT_14B.head, 5120, vision, {}) == HEAD_64X
    assert read_head(HEAD_64X, "here", 5120, 32) == (PT_14B.head, 8)


def test_draws_per_block_and_settings_without_influence_are_kept():
    config = HEAD_64X | {"diff_batch_mul": 4, "grad_checkpointing": True}
    section, side = read_head(config, "here", 5120, 32)
    assert section == dataclasses.replace(PT_14B.head, diff_batch_mul=4)
    vision = dataclasses.replace(PT_14B.vision, block_side=side)
    assert published_head(section, 5120, vision, inert_head_settings(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch_target": 16}, "ch_target = 16: must be 32, the autoencoder's bits"),
        ({"ch_cond": 4096}, "ch_cond = 4096: must be 5120, the backbone's hidden_size"),
        ({"depth_latent": "6"}, "depth_latent = '6': must be a positive integer"),
        ({"diff_batch_mul": 0}, "diff_batch_mul = 0: must be a positive integer"),
        ({"parallel_num": 32}, "parallel_num = 32: must be a square"),
        ({"use_swiglu": False}, "use_swiglu = False"),
        ({"time_shift": 0.0}, "time_shift = 0.0: must be a number above 0"),
        ({"P_mean": float("nan")}, "P_mean = nan: must be a number"),
        ({"P_std": float("inf")}, "P_std = inf: must be a number above 0"),
        ({"head_dim": 12.5}, "head_dim = 12.5: must be a positive integer"),
        ({"mlp_ratio": True}, "mlp_ratio = True: must be a number above 0"),
        ({"time_schedule": "cosine"}, "time_schedule = 'cosine'"),
        ({"P_std": None}, "P_std = None: must be a number"),
        ({"seed": 1}, "seed: unknown to this program"),
    ],
)
def test_heads_that_are_not_supported(changes, message):
    with pytest.raises(CheckpointError) as caught:
        read_head(HEAD_64X | changes, "vision_head_config.json", 5120, 32)
    assert message in str(caught.value)


# What the release's class does where its caller says nothing, and what we make of it.
RELEASE_DEFAULTS = [
    ("time_shift", "time_shift", 1.0),
    ("time_schedule", "time_schedule", "logit_normal"),
    ("P_mean", "time_mean", 0.0),
    ("P_std", "time_std", 1.0),
    ("diff_batch_mul", "diff_batch_mul", 1),
]


@pytest.mark.parametrize(("key", "name", "value"), RELEASE_DEFAULTS)
def test_a_missing_key_takes_the_default_of_the_releases_class(key, name, value):
    config = {other: stated for other, stated in HEAD_64X.items() if other != key}
    section, _ = read_head(config, "vision_head_config.json", 5120, 32)
    assert section == dataclasses.replace(PT_14B.head, **{name: value})


def test_only_the_sizes_and_the_mlp_have_to_be_stated():
    config = {key: HEAD_64X[key] for key in ("ch_target", "ch_cond", "ch_latent", "depth_latent", "depth_adanln")}
    section, side = read_head(config | {"use_swiglu": True}, "vision_head_config.json", 5120, 32)
    assert side == 2 and (section.time_mean, section.time_std, section.time_shift) == (0.0, 1.0, 1.0)
    with pytest.raises(CheckpointError, match=r"use_swiglu = False \(false where the key is missing\).*not supported"):
        read_head(config, "vision_head_config.json", 5120, 32)
    for key in config:
        rest = {other: value for other, value in config.items() if other != key} | {"use_swiglu": True}
        with pytest.raises(CheckpointError, match=f"{key}: is missing"):
            read_head(rest, "vision_head_config.json", 5120, 32)


def test_a_user_is_told_at_which_flow_times_a_run_would_train():
    assert time_note(PT_14B.head).endswith("P_mean -0.8, P_std 0.8, time_shift 1.0, as the release was trained")
    config = {key: value for key, value in HEAD_64X.items() if key != "P_std"}
    note = time_note(read_head(config, "here", 5120, 32)[0])
    assert "P_mean -0.8, P_std 1.0" in note and "head.time_mean=-0.8 head.time_std=0.8" in note
    ours = HeadSection(width=128, head_dim=32, time_shift=3.0)
    assert time_note(ours).endswith("time_shift 3.0, as vision_head_config.json says")


def test_a_head_that_the_release_cannot_be_told_says_so():
    section = HeadSection(width=128, head_dim=32, mlp_ratio=2.0)
    assert beyond_release(section) == {"head_dim": 32, "mlp_ratio": 2.0}
    config = published_head(section, 64, VisionSection(weights="", num_bits=16), {})
    assert read_head(config, "here", 64, 16) == (section, 4)
    assert beyond_release(PT_14B.head) == {}
