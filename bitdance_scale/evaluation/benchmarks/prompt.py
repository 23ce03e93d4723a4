"""A prompt of a benchmark, the seeds of its images, and what the ids of prompts must be."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdance_scale.errors import ConfigError
from bitdance_scale.text_files import is_utf8

_NAME = re.compile(r"[A-Za-z0-9_+-]+")
_MODEL_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
        id: unique in the benchmark, the same in every order of its file; made of names that any file system takes,
            joined by "/".
        text: what the model is asked for. Of class-conditional models the number of a class.
        category: what results are summed up by.
        num_images: how many images are drawn.
        record: the published line or row.
    """

    id: str
    text: str
    category: str
    num_images: int
    record: Mapping[str, Any] = field(repr=False)


def image_seed(seed: int, prompt_id: str, k: int) -> int:
    """The seed of image k of a prompt: of these three alone, so that ranks, order and batches do not matter.

    It comes from a digest, as the generators of initial weights do (`model/initial.py`).

    Args:
        seed: of the drawing.
        prompt_id: of the prompt.
        k: number of the image among those of the prompt.

    Returns:
        0 .. 2^63 - 1: a seed of `torch.Generator`, or the number of a noise stream.
    """
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


Place = tuple[int, int]
"""An image: (number of its prompt, its number among those of the prompt)."""


def rounds(prompts: Sequence[Prompt]) -> list[Place]:
    """All images, in rounds: the first image of every prompt, then the second of every prompt, and so on.

    So any part of so many images that follow each other has all prompts alike, as Inception Score wants them: it is the
    mean over parts of 5,000 samples in their order.
    """
    most = max((prompt.num_images for prompt in prompts), default=0)
    return [(n, k) for k in range(most) for n, prompt in enumerate(prompts) if k < prompt.num_images]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """A digest of the prompts, whatever their order and the line ends of their file: ids, texts and records."""
    rows = sorted([prompt.id, prompt.text, dict(prompt.record)] for prompt in prompts)
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def check_name(where: str, value: str) -> str:
    """A part of an id, which becomes the name of a file.

    Raises:
        ConfigError: it has other characters than letters, digits, "_", "+" and "-".
    """
    if not _NAME.fullmatch(value):
        raise ConfigError(
            f"{where} = {value!r}: becomes the name of a file, so it must be letters, digits, '_', '+' and '-' alone; "
            "take the published file as it is, or rename this one"
        )
    return value


def check_model_name(benchmark: str, value: str) -> str:
    """The name of a model where it is the name of a folder, which scorers look for by patterns.

    Raises:
        ConfigError: it cannot be.
    """
    if not _MODEL_NAME.fullmatch(value):
        raise ConfigError(
            f"model = {value!r}: {benchmark} has a folder of this name, so it must be letters, digits, '_', '.', '+' "
            "and '-' alone and not begin with '.'; choose another name"
        )
    return value


def check_prompts(path: Path, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, if there are any, all have a text that UTF-8 can encode, and no two the same id.

    Raises:
        ConfigError: otherwise; names the ids.
    """
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt")
    seen: set[str] = set()
    for prompt in prompts:
        if not prompt.text.strip():
            raise ConfigError(f"{path}: prompt {prompt.id} is empty; take the published file as it is")
        if not is_utf8(prompt.text):
            raise ConfigError(
                f"{path}: prompt {prompt.id} holds half of a surrogate pair, which is no character; take the published "
                "file as it is"
            )
        # Some file systems do not tell small letters from capitals.
        if prompt.id.lower() in seen:
            raise ConfigError(f"{path}: prompt {prompt.id} comes twice, and one picture would replace the other's")
        seen.add(prompt.id.lower())
    return list(prompts)
