"""The backbone's published configuration as a section, and back, against what transformers makes of the same file."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import Qwen3Config

from bitdance_scale.config.load import load_network
from bitdance_scale.config.published_backbone import (
    FIXED_VALUES,
    MODEL_KEYS,
    Use,
    inert_model_settings,
    published_model,
    read_model,
    unknown_model_keys,
)
from bitdance_scale.errors import CheckpointError

PT_14B = load_network("pt_14b")
# As the folder of Qwen3-0.6B has it, written by hand.
QWEN3_06B = json.loads("""
{
  "architectures": ["Qwen3ForCausalLM"],
  "attention_bias": false,
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "head_dim": 128,
  "hidden_act": "silu",
  "hidden_size": 1024,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "max_position_embeddings": 40960,
  "max_window_layers": 28,
  "model_type": "qwen3",
  "num_attention_heads": 16,
  "num_hidden_layers": 28,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-06,
  "rope_scaling": null,
  "rope_theta": 1000000,
  "sliding_window": null,
  "tie_word_embeddings": true,
  "torch_dtype": "bfloat16",
  "transformers_version": "4.51.0",
  "use_cache": true,
  "use_sliding_window": false,
  "vocab_size": 151936
}
""")
# Of every key that is read: a value that must be refused.
REFUSED_VALUES = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 0,
    "hidden_size": "1024",
    "num_attention_heads": 1.5,
    "num_key_value_heads": True,
    "head_dim": None,
    "intermediate_size": -1,
    "vocab_size": None,
    "rms_norm_eps": "1e-6",
    "tie_word_embeddings": None,
    "initializer_range": "small",
    "rope_theta": 0,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0},
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "layer_types": ["full_attention"] * 27 + ["sliding_attention"],
    "bitdance_context": "causal",
}
OTHER_FIXED_VALUES = {
    "attention_bias": True,
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "compression_config": {"format": "int-quantized"},
    "hidden_act": "gelu",
    "mlp_bias": True,
    "partial_rotary_factor": 0.5,
    "per_layer_config": {"3": {"head_dim": 64}},
    "pruned_heads": {"3": [0, 1]},
    "quantization_config": {"quant_method": "fp8"},
}


def refusal(config: dict[str, object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_model(config, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    return str(caught.value)


def test_the_published_file_is_read_as_transformers_reads_it():
    section, theirs = read_model(QWEN3_06B, "here"), Qwen3Config(**QWEN3_06B)
    assert section.rope_base == theirs.rope_parameters["rope_theta"] == 1e6
    assert theirs.rope_parameters["rope_type"] == "default"
    assert section.tie_embeddings is theirs.tie_word_embeddings is True
    assert (section.num_layers, section.hidden_size, section.ffn_size) == (28, 1024, 3072)
    assert {*theirs.layer_types} == {"full_attention"}
    assert unknown_model_keys(QWEN3_06B) == []


# They count together: `test_a_window_counts_where_a_layer_has_it`.
WINDOW_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers"}


@pytest.mark.parametrize("key", [key for key, use in MODEL_KEYS.items() if use is Use.READ and key not in WINDOW_KEYS])
def test_every_key_that_is_read_is_checked(key):
    assert key in refusal(QWEN3_06B | {key: REFUSED_VALUES[key]})


@pytest.mark.parametrize("key", [key for key, use in MODEL_KEYS.items() if use is Use.FIXED])
def test_keys_that_would_change_the_function_have_one_value(key):
    message = refusal(QWEN3_06B | {key: OTHER_FIXED_VALUES[key]})
    assert f"{key} = {OTHER_FIXED_VALUES[key]!r}: must be {json.dumps(FIXED_VALUES[key])} or missing" in message
    wanted = read_model(QWEN3_06B, "here")
    for value in (FIXED_VALUES[key], None):
        assert read_model(QWEN3_06B | {key: value}, "here") == wanted


@pytest.mark.parametrize("key", [key for key, use in MODEL_KEYS.items() if use is Use.HARMLESS])
def test_harmless_keys_change_nothing(key):
    wanted = read_model(QWEN3_06B, "here")
    assert read_model(QWEN3_06B | {key: "anything"}, "here") == wanted
    assert unknown_model_keys({**QWEN3_06B, key: "anything"}) == []


def test_keys_of_no_row_are_ignored_and_named():
    config = QWEN3_06B | {"unsloth_version": "2025.6", "embedding_multiplier": 12.0}
    assert read_model(config, "here") == read_model(QWEN3_06B, "here")
    assert unknown_model_keys(config) == ["embedding_multiplier", "unsloth_version"]


def test_the_table_has_every_key_of_transformers():
    assert {*Qwen3Config(num_hidden_layers=2).to_dict()} <= {*MODEL_KEYS}


@pytest.mark.parametrize(
    ("changes", "is_full"),
    [
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21}, False),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28}, True),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, True),
        ({"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0}, True),
        ({"use_sliding_window": None, "sliding_window": 4096}, True),
        ({"use_sliding_window": True, "sliding_window": 4096, "layer_types": ["full_attention"] * 28}, True),
        ({"layer_types": ["full_attention"] * 28}, True),
        ({"layer_types": ["full_attention"] * 27}, False),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, False),
        ({"layer_types": "full_attention"}, False),
    ],
)
def test_a_window_counts_where_a_layer_has_it(changes, is_full):
    config = QWEN3_06B | changes
    if is_full:
        assert read_model(config, "here") == read_model(QWEN3_06B, "here")
        # transformers 5 takes no null here; 4.57 does.
        if config["use_sliding_window"] is not None:
            assert {*Qwen3Config(**config).layer_types} == {"full_attention"}
    else:
        message = refusal(config)
        assert "layer_types" in message or "use_sliding_window = True: layers from max_window_layers = 21 on" in message


def without_rope(**changes: object) -> dict[str, object]:
    return {key: value for key, value in QWEN3_06B.items() if "rope" not in key} | changes


@pytest.mark.parametrize(
    "config",
    [
        without_rope(rope_theta=5e5),
        without_rope(rope_theta=500000, rope_scaling=None, rope_parameters=None),
        without_rope(rope_parameters={"rope_theta": 5e5}),
        without_rope(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        without_rope(rope_parameters={"rope_theta": 5e5, "type": "default"}, rope_theta=5e5),
        without_rope(rope_theta=5e5, rope_scaling={"type": "default"}),
        without_rope(rope_theta=5e5, rope_scaling={"rope_type": "default", "type": "default"}),
        without_rope(rope_theta=5e5, rope_scaling={}),
        without_rope(rope_scaling={"rope_type": "default", "rope_theta": 5e5}),
        without_rope(rope_theta=5e5, partial_rotary_factor=1.0),
    ],
)
def test_unscaled_positions_under_all_their_names(config):
    theirs = Qwen3Config(**json.loads(json.dumps(config))).rope_parameters
    assert (theirs["rope_type"], theirs["rope_theta"]) == ("default", 5e5)
    assert read_model(config, "here").rope_base == 5e5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            without_rope(rope_parameters={"type": "linear", "factor": 4.0, "rope_theta": 1e6}),
            "rope_parameters.type = 'linear': scaled positions are not supported",
        ),
        (
            without_rope(rope_parameters={"type": "linear", "factor": 4.0, "rope_theta": 1e6}),
            "rope_parameters.factor = 4",
        ),
        (without_rope(rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type = 'linear'"),
        (
            without_rope(rope_theta=1e6, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            "rope_scaling.rope_type = 'yarn'",
        ),
        # The old name of a version before the new one: transformers 4.57 takes the old one, 5 the new one.
        (
            without_rope(rope_theta=1e6, rope_scaling={"rope_type": "default", "type": "dynamic"}),
            "rope_scaling.type = 'dynamic'",
        ),
        (without_rope(rope_parameters={"rope_theta": 1e6, "factor": 4.0}), "remove factor"),
        (without_rope(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rope_parameters.full_attention = "),
        (without_rope(rope_theta=1e6, rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
        (without_rope(rope_theta=1e4, rope_parameters={"rope_theta": 1e6}), "rope_theta = 10000.0 and rope_parameters"),
        (without_rope(rope_theta=1e4, rope_scaling={"type": "default", "rope_theta": 1e6}), "rope_scaling.rope_theta"),
        (without_rope(), "one of them must give the rotary base"),
        (without_rope(rope_parameters=[1]), "rope_parameters = [1]: must be an object"),
        (without_rope(rope_theta="1e6"), "rope_theta = '1e6': must be a number above 0"),
        (without_rope(rope_theta=float("inf")), "rope_theta = inf: must be a number above 0"),
    ],
)
def test_scaled_or_unclear_positions_are_refused(config, message):
    assert message in refusal(config)


def test_the_backbone_goes_both_ways():
    inert = {"bos_token_id": 151643, "eos_token_id": 151645, "max_position_embeddings": 32768, "pad_token_id": None}
    config = published_model(PT_14B.model, 151940, "bfloat16", inert)
    assert read_model(config, "here") == dataclasses.replace(PT_14B.model, preset="")
    assert inert_model_settings(config) == inert
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert unknown_model_keys(config) == []
