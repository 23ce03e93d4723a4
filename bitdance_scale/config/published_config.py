"""The configuration files of a published folder as sections of the configuration tree, and back.

`config.json` is a plain Qwen3's, `vision_head_config.json` holds the keyword arguments of the release's head.

The release pins transformers 4.57, where a rotary base is `rope_theta` and a dtype `torch_dtype`; transformers 5 writes
`rope_parameters` and `dtype`. Each version silently takes a default where its own name is missing. Both names are
written, either is read, and two that disagree are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bitdance_scale.config.schema import HeadSection, ModelSection, VisionSection
from bitdance_scale.errors import CheckpointError

MODEL_CONFIG_NAME = "config.json"
HEAD_CONFIG_NAME = "vision_head_config.json"
ARCHITECTURE = "Qwen3ForCausalLM"
# What the release's head assumes, so that its configuration does not say it.
PUBLISHED_HEAD_DIM = 128
PUBLISHED_MLP_RATIO = 1.5

# Settings of config.json that change what the network computes, with the one value that is supported.
_FIXED_MODEL: Mapping[str, object] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": None,
}
# Settings of config.json with no influence on the network, and their values where no folder gave others (Qwen3's).
_INERT_MODEL: Mapping[str, object] = {
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 40960,
    "pad_token_id": None,
}
# Keyword arguments of the release's head with no influence on what it computes, and their values in the release.
_INERT_HEAD: Mapping[str, object] = {"grad_checkpointing": False, "diff_batch_mul": 1}
_OPTIONAL_HEAD = {*_INERT_HEAD, "head_dim", "mlp_ratio"}


def read_model(config: Mapping[str, Any], where: str) -> ModelSection:
    """The backbone that a `config.json` describes.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        CheckpointError: another architecture, a missing value, or one that changes the network in a way that is not
            supported.
    """
    problems = [*_model_problems(config)]
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelSection(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn_size=config["intermediate_size"],
        norm_eps=float(config["rms_norm_eps"]),
        rope_base=float(_rope_bases(config)[0]),
        tie_embeddings=config["tie_word_embeddings"],
        init_std=float(config.get("initializer_range", 0.02)),
    )


def published_model(section: ModelSection, vocab_size: int, dtype: str, inert: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a backbone, for transformers 4.57 and 5 alike.

    Args:
        section: its sizes.
        vocab_size: rows of the embedding.
        dtype: name of the dtype of its tensors.
        inert: values of the keys without influence, from `inert_model_settings`.
    """
    return {key: inert.get(key, default) for key, default in _INERT_MODEL.items()} | {
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": section.head_dim,
        "hidden_act": "silu",
        "hidden_size": section.hidden_size,
        "initializer_range": section.init_std,
        "intermediate_size": section.ffn_size,
        "layer_types": ["full_attention"] * section.num_layers,
        "max_window_layers": section.num_layers,
        "model_type": "qwen3",
        "num_attention_heads": section.num_heads,
        "num_hidden_layers": section.num_layers,
        "num_key_value_heads": section.num_kv_heads,
        "rms_norm_eps": section.norm_eps,
        "rope_parameters": {"rope_theta": section.rope_base, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": section.rope_base,
        "sliding_window": None,
        "tie_word_embeddings": section.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def read_head(config: Mapping[str, Any], where: str, hidden_size: int, num_bits: int) -> tuple[HeadSection, int]:
    """The diffusion head that a `vision_head_config.json` describes, and its block side p.

    Args:
        config: its content.
        where: the file, for messages.
        hidden_size: of the backbone, which the head must be made for.
        num_bits: of the autoencoder, likewise.

    Raises:
        CheckpointError: a key is missing or unknown, or the head is not one of this backbone and autoencoder.
    """
    problems = [*_head_problems(config, hidden_size, num_bits)]
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
    section = HeadSection(
        width=config["ch_latent"],
        num_blocks=config["depth_latent"],
        num_adaln=config["depth_adanln"],
        head_dim=config.get("head_dim", PUBLISHED_HEAD_DIM),
        mlp_ratio=float(config.get("mlp_ratio", PUBLISHED_MLP_RATIO)),
        time_schedule=config["time_schedule"],
        time_mean=float(config["P_mean"]),
        time_std=float(config["P_std"]),
        time_shift=float(config["time_shift"]),
    )
    return section, math.isqrt(config["parallel_num"])


def published_head(
    section: HeadSection, hidden_size: int, vision: VisionSection, inert: Mapping[str, Any]
) -> dict[str, Any]:
    """The `vision_head_config.json` of a head.

    A head whose attention heads or SwiGLU differ from what the release assumes says so in two keys that the release's
    pipeline does not know. The pipeline therefore refuses such a head, instead of computing something else.

    Args:
        section: the head.
        hidden_size: of the backbone.
        vision: bits and block side.
        inert: values of the keys without influence, from `inert_head_settings`.
    """
    config = {
        "ch_target": vision.num_bits,
        "ch_cond": hidden_size,
        "ch_latent": section.width,
        "depth_latent": section.num_blocks,
        "depth_adanln": section.num_adaln,
        "grad_checkpointing": inert.get("grad_checkpointing", _INERT_HEAD["grad_checkpointing"]),
        "time_shift": section.time_shift,
        "time_schedule": section.time_schedule,
        "P_mean": section.time_mean,
        "P_std": section.time_std,
        "parallel_num": vision.block_tokens,
        "diff_batch_mul": inert.get("diff_batch_mul", _INERT_HEAD["diff_batch_mul"]),
        "use_swiglu": True,
    }
    return config | beyond_release(section)


def beyond_release(section: HeadSection) -> dict[str, Any]:
    """The keys of a head's configuration that the release does not know; empty for a head that the release can run."""
    extra: dict[str, Any] = {}
    if section.head_dim != PUBLISHED_HEAD_DIM:
        extra["head_dim"] = section.head_dim
    if section.mlp_ratio != PUBLISHED_MLP_RATIO:
        extra["mlp_ratio"] = section.mlp_ratio
    return extra


def inert_model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `config.json` that change nothing in the network, to be written back as they were."""
    return {key: config[key] for key in _INERT_MODEL if key in config}


def inert_head_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `vision_head_config.json` that change nothing, to be written back as they were."""
    return {key: config[key] for key in _INERT_HEAD if key in config}


def _model_problems(config: Mapping[str, Any]) -> Iterator[str]:
    architectures = config.get("architectures")
    if architectures != [ARCHITECTURE] or config.get("model_type") != "qwen3":
        yield (
            f"architectures = {architectures}, model_type = {config.get('model_type')!r}: must be [{ARCHITECTURE!r}] "
            "and 'qwen3'; only dense Qwen3 backbones are supported"
        )
        return
    sizes = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    )
    for key in sizes:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            yield f"{key} = {value!r}: must be a positive integer"
    if not isinstance(config.get("rms_norm_eps"), int | float) or isinstance(config["rms_norm_eps"], bool):
        yield f"rms_norm_eps = {config.get('rms_norm_eps')!r}: must be a number"
    if not isinstance(config.get("tie_word_embeddings"), bool):
        yield f"tie_word_embeddings = {config.get('tie_word_embeddings')!r}: must be true or false"
    for key, wanted in _FIXED_MODEL.items():
        if config.get(key, wanted) != wanted:
            yield f"{key} = {config[key]!r}: only {wanted!r} is supported"
    rope = config.get("rope_parameters")
    if rope is not None and not isinstance(rope, Mapping):
        yield f"rope_parameters = {rope!r}: must be an object"
        return
    bases = _rope_bases(config)
    for base in bases:
        if not isinstance(base, int | float) or isinstance(base, bool):
            yield f"rope_theta = {base!r}: must be a number"
            return
    if not bases:
        yield "rope_theta or rope_parameters.rope_theta: one of them must give the rotary base"
    elif len(set(bases)) > 1:
        yield (
            f"rope_theta = {bases[0]} and rope_parameters.rope_theta = {bases[1]} disagree: keep the one that was "
            "trained with"
        )
    rope_type = (rope or {}).get("rope_type", "default")
    if rope_type != "default":
        yield f"rope_parameters.rope_type = {rope_type!r}: only 'default' is supported"


def _rope_bases(config: Mapping[str, Any]) -> list[Any]:
    """What the two names of the rotary base say, without those that say nothing."""
    places = (config.get("rope_theta"), (config.get("rope_parameters") or {}).get("rope_theta"))
    return [base for base in places if base is not None]


def _head_problems(config: Mapping[str, Any], hidden_size: int, num_bits: int) -> Iterator[str]:
    section = HeadSection(width=1)
    wanted = {*published_head(section, 1, VisionSection(weights=""), {})} - _OPTIONAL_HEAD
    yield from (f"{key}: is missing" for key in sorted(wanted - {*config}))
    yield from (f"{key}: unknown to this program" for key in sorted({*config} - wanted - _OPTIONAL_HEAD))
    if wanted - {*config}:
        return
    made_for = {
        "ch_cond": (hidden_size, "the backbone's hidden_size"),
        "ch_target": (num_bits, "the autoencoder's bits"),
    }
    for key, (value, owner) in made_for.items():
        if config[key] != value:
            yield f"{key} = {config[key]!r}: must be {value}, {owner}"
    for key in ("ch_latent", "depth_latent", "depth_adanln", "parallel_num"):
        if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] <= 0:
            yield f"{key} = {config[key]!r}: must be a positive integer"
            return
    if math.isqrt(config["parallel_num"]) ** 2 != config["parallel_num"]:
        yield f"parallel_num = {config['parallel_num']}: must be a square, the tokens of a block of p x p"
    if config["use_swiglu"] is not True:
        yield f"use_swiglu = {config['use_swiglu']!r}: only true is supported"
    if config["time_schedule"] not in ("logit_normal", "uniform"):
        yield f"time_schedule = {config['time_schedule']!r}: must be 'logit_normal' or 'uniform'"
    for key in ("P_mean", "P_std", "time_shift"):
        if not isinstance(config[key], int | float) or isinstance(config[key], bool):
            yield f"{key} = {config[key]!r}: must be a number"
