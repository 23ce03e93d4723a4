"""The published configuration files as sections, and back."""

from __future__ import annotations

import dataclasses

import pytest

from bitdance_scale.config.load import load_network
from bitdance_scale.config.published_config import (
    beyond_release,
    inert_head_settings,
    inert_model_settings,
    published_head,
    published_model,
    read_head,
    read_model,
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


def test_settings_without_influence_are_kept():
    config = HEAD_64X | {"diff_batch_mul": 4, "grad_checkpointing": True}
    section, side = read_head(config, "here", 5120, 32)
    vision = dataclasses.replace(PT_14B.vision, block_side=side)
    assert published_head(section, 5120, vision, inert_head_settings(config)) == config


def test_the_backbone_goes_both_ways():
    inert = {"bos_token_id": 151643, "eos_token_id": 151645, "max_position_embeddings": 32768, "pad_token_id": None}
    config = published_model(PT_14B.model, 151940, "bfloat16", inert)
    assert read_model(config, "here") == dataclasses.replace(PT_14B.model, preset="")
    assert inert_model_settings(config) == inert
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("present", ["rope_theta", "rope_parameters"])
def test_either_name_of_the_rotary_base_is_read(present):
    config = published_model(PT_14B.model, 151940, "bfloat16", {})
    del config["rope_theta" if present == "rope_parameters" else "rope_parameters"]
    assert read_model(config, "here").rope_base == 1e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "'qwen3_moe'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: must be a positive integer"),
        ({"head_dim": None}, "head_dim = None: must be a positive integer"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6': must be a number"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings = None"),
        ({"attention_bias": True}, "attention_bias = True: only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu' is supported"),
        ({"rope_theta": 1e4}, "rope_theta = 10000.0 and rope_parameters.rope_theta = 1000000.0 disagree"),
        ({"rope_theta": None, "rope_parameters": None}, "one of them must give the rotary base"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters = [1]: must be an object"),
        ({"rope_theta": "1e6"}, "rope_theta = '1e6': must be a number"),
    ],
)
def test_backbones_that_are_not_supported(changes, message):
    config = published_model(PT_14B.model, 151940, "bfloat16", {}) | changes
    with pytest.raises(CheckpointError) as caught:
        read_model(config, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch_target": 16}, "ch_target = 16: must be 32, the autoencoder's bits"),
        ({"ch_cond": 4096}, "ch_cond = 4096: must be 5120, the backbone's hidden_size"),
        ({"depth_latent": "6"}, "depth_latent = '6': must be a positive integer"),
        ({"parallel_num": 32}, "parallel_num = 32: must be a square"),
        ({"use_swiglu": False}, "use_swiglu = False: only true is supported"),
        ({"time_schedule": "cosine"}, "time_schedule = 'cosine'"),
        ({"P_std": None}, "P_std = None: must be a number"),
        ({"seed": 1}, "seed: unknown to this program"),
    ],
)
def test_heads_that_are_not_supported(changes, message):
    with pytest.raises(CheckpointError) as caught:
        read_head(HEAD_64X | changes, "vision_head_config.json", 5120, 32)
    assert message in str(caught.value)


def test_a_missing_key_is_named():
    config = {key: value for key, value in HEAD_64X.items() if key != "time_shift"}
    with pytest.raises(CheckpointError, match="time_shift: is missing"):
        read_head(config, "vision_head_config.json", 5120, 32)


def test_a_head_that_the_release_cannot_be_told_says_so():
    section = HeadSection(width=128, head_dim=32, mlp_ratio=2.0)
    assert beyond_release(section) == {"head_dim": 32, "mlp_ratio": 2.0}
    config = published_head(section, 64, VisionSection(weights="", num_bits=16), {})
    assert read_head(config, "here", 64, 16) == (section, 4)
    assert beyond_release(PT_14B.head) == {}
