"""The `vision_head_config.json` of a published folder as the `[head]` section, and back.

It holds the keyword arguments of the release's head. A key that is missing takes the default of the release's own
class. Those defaults are not what the release was trained with: `time_note` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from bitdance_scale.config.published_backbone import is_number
from bitdance_scale.config.schema import HeadSection, VisionSection
from bitdance_scale.errors import CheckpointError

HEAD_CONFIG_NAME = "vision_head_config.json"
# What the release's head assumes, so that its configuration does not say it.
PUBLISHED_HEAD_DIM = 128
PUBLISHED_MLP_RATIO = 1.5

HEAD_DEFAULTS: Mapping[str, object] = {
    "P_mean": 0.0,
    "P_std": 1.0,
    "diff_batch_mul": 1,
    "grad_checkpointing": False,
    "parallel_num": 4,
    "time_schedule": "logit_normal",
    "time_shift": 1.0,
    "use_swiglu": False,
}
"""Values of the release's own class for keys that are missing (published release, `DiffHead`)."""
_SIZES = ("ch_target", "ch_cond", "ch_latent", "depth_latent", "depth_adanln")
# Keyword arguments with no influence on what the head computes.
_INERT = ("grad_checkpointing",)
# Keys that only this program writes and reads.
_BEYOND_RELEASE = ("head_dim", "mlp_ratio")


def read_head(config: Mapping[str, Any], where: str, hidden_size: int, num_bits: int) -> tuple[HeadSection, int]:
    """The diffusion head that a `vision_head_config.json` describes, and its block side p.

    Args:
        config: its content.
        where: the file, for messages.
        hidden_size: of the backbone, which the head must be made for.
        num_bits: of the autoencoder, likewise.

    Raises:
        CheckpointError: a size is missing, a key is unknown, or the head is not one of this backbone and autoencoder.
    """
    config = {**HEAD_DEFAULTS, **config}
    problems = [*_head_problems(config, hidden_size, num_bits)]
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
    section = HeadSection(
        width=config["ch_latent"],
        num_blocks=config["depth_latent"],
        num_adaln=config["depth_adanln"],
        head_dim=config.get("head_dim", PUBLISHED_HEAD_DIM),
        mlp_ratio=float(config.get("mlp_ratio", PUBLISHED_MLP_RATIO)),
        diff_batch_mul=config["diff_batch_mul"],
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
        "grad_checkpointing": inert.get("grad_checkpointing", HEAD_DEFAULTS["grad_checkpointing"]),
        "time_shift": section.time_shift,
        "time_schedule": section.time_schedule,
        "P_mean": section.time_mean,
        "P_std": section.time_std,
        "parallel_num": vision.block_tokens,
        "diff_batch_mul": section.diff_batch_mul,
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


def inert_head_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `vision_head_config.json` that change nothing, to be written back as they were."""
    return {key: config[key] for key in _INERT if key in config}


def time_note(section: HeadSection) -> str:
    """One line on the flow times that a run with this head is trained at, for the user who starts one from it.

    The release's training configurations have P_mean -0.8 and P_std 0.8, which are the defaults of `HeadSection`; its
    class has other defaults, so a file that says nothing asks for others. A head that the release cannot run is from
    this program, which writes all of them.
    """
    trained = HeadSection(width=section.width)
    asked = f"time_schedule {section.time_schedule}"
    if section.time_schedule == "logit_normal":
        asked += f", P_mean {section.time_mean}, P_std {section.time_std}"
    asked += f", time_shift {section.time_shift}"
    names = ("time_schedule", "time_mean", "time_std", "time_shift")
    if all(getattr(section, name) == getattr(trained, name) for name in names):
        return f"flow times in training: {asked}, as the release was trained"
    if beyond_release(section):
        return f"flow times in training: {asked}, as {HEAD_CONFIG_NAME} says"
    wanted = " ".join(f"head.{name}={getattr(trained, name)}" for name in names)
    return (
        f"flow times in training: {asked}, as {HEAD_CONFIG_NAME} and the defaults of the release's class say; the "
        f"release was trained with P_mean {trained.time_mean}, P_std {trained.time_std}: to train so, set {wanted}"
    )


def _head_problems(config: Mapping[str, Any], hidden_size: int, num_bits: int) -> Iterator[str]:
    """What is wrong with a head's configuration, in which all defaults are filled in."""
    missing = [key for key in _SIZES if key not in config]
    yield from (f"{key}: is missing" for key in missing)
    known = {*_SIZES, *HEAD_DEFAULTS, *_BEYOND_RELEASE}
    yield from (f"{key}: unknown to this program" for key in sorted({*config} - known))
    if missing:
        return
    made_for = {
        "ch_cond": (hidden_size, "the backbone's hidden_size"),
        "ch_target": (num_bits, "the autoencoder's bits"),
    }
    for key, (value, owner) in made_for.items():
        if config[key] != value:
            yield f"{key} = {config[key]!r}: must be {value}, {owner}"
    counts = ("ch_latent", "depth_latent", "depth_adanln", "parallel_num", "diff_batch_mul")
    for key in (*counts, *({"head_dim"} & {*config})):
        if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] <= 0:
            yield f"{key} = {config[key]!r}: must be a positive integer"
            return
    if math.isqrt(config["parallel_num"]) ** 2 != config["parallel_num"]:
        yield f"parallel_num = {config['parallel_num']}: must be a square, the tokens of a block of p x p"
    if config["use_swiglu"] is not True:
        yield (
            f"use_swiglu = {config['use_swiglu']!r} (false where the key is missing): the release's other MLP, two "
            "linears with SiLU between them, is not supported; only true is"
        )
    if config["time_schedule"] not in ("logit_normal", "uniform"):
        yield f"time_schedule = {config['time_schedule']!r}: must be 'logit_normal' or 'uniform'"
    if not is_number(config["P_mean"]):
        yield f"P_mean = {config['P_mean']!r}: must be a number"
    for key in ("P_std", "time_shift", *({"mlp_ratio"} & {*config})):
        if not is_number(config[key], above=0):
            yield f"{key} = {config[key]!r}: must be a number above 0"
