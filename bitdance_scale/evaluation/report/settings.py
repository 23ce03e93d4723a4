"""Settings that drawings, or scorers, share, and those in which they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_TOKENS = "model.block_tokens"
_TITLES = {
    BLOCK_TOKENS: "tokens at once",
    "model.name": "name in paths",
    "model.sha256": "weights (SHA-256)",
    "model.weights": "weights",
    "prompts_sha256": "prompts (SHA-256)",
    "num_prompts": "prompts",
    "images_per_prompt": "images per prompt",
    "size_px": "size (px)",
    "layout_version": "version of the layout",
}
_DIGEST_CHARACTERS = 12
_MAX_CHARACTERS = 60
UNKNOWN = "not known"


@dataclass(frozen=True)
class Settings:
    """Settings of several things.

    Attributes:
        equal: those that all share.
        differing: by setting, the value of each thing; None where it has none.
    """

    equal: Mapping[str, Any]
    differing: Mapping[str, Sequence[Any]]


def split_settings(settings: Sequence[Mapping[str, Any]]) -> Settings:
    """The shared and the differing settings, given flat ones of every thing."""
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one.get(name) for one in settings] for name in names}
    equal = {name: found[0] for name, found in values.items() if all(value == found[0] for value in found)}
    return Settings(equal, {name: found for name, found in values.items() if name not in equal})


def setting_title(name: str) -> str:
    """What a setting of a drawing is called for readers."""
    return _TITLES.get(name, name.removeprefix("settings.").replace("_", " "))


def setting_text(name: str, value: Any) -> str:
    """The value of a setting for readers: digests and long texts cut, sizes as they are written."""
    if value is None:
        return UNKNOWN
    if name.endswith("sha256"):
        return str(value)[:_DIGEST_CHARACTERS]
    if name == "size_px" and isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    if name == BLOCK_TOKENS and isinstance(value, int):
        return f"{value} (p = {math.isqrt(value)})"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."
