"""`drawing.json`: what the pictures of a folder were drawn with. A folder of another drawing is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitdance_scale.atomic_files import WRITING, write_text
from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks import layout
from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.prompt import Prompt, prompts_digest
from bitdance_scale.text_files import read_utf8
from bitdance_scale.wording import first_few

DRAWING_NAME = "drawing.json"
_LONGEST_SHOWN = 60
_TOLD_BY_WEIGHTS = "model.block_tokens"
"""A folder that does not say it may be drawn on: the digest of the weights decides."""


@dataclass(frozen=True)
class Drawing:
    """What decides the pictures of a folder; all of it JSON values.

    Attributes:
        benchmark: name of the benchmark.
        prompts_sha256: `prompts_digest` of its prompts.
        num_prompts: how many there are.
        images_per_prompt: how many images each has.
        model: name of the model, the tokens that it draws at once, and what tells its weights from others.
        size_px: (height, width) of an image.
        settings: how it draws: steps, guidance and whatever else changes an image.
        seed: of `image_seed`.
        layout_version: `layout.VERSION` of the program that drew.
    """

    benchmark: str
    prompts_sha256: str
    num_prompts: int
    images_per_prompt: int
    model: Mapping[str, Any]
    size_px: tuple[int, int]
    settings: Mapping[str, Any]
    seed: int
    layout_version: int = layout.VERSION

    @classmethod
    def of(
        cls,
        benchmark: Benchmark,
        prompts: Sequence[Prompt],
        *,
        model: Mapping[str, Any],
        size_px: tuple[int, int],
        settings: Mapping[str, Any],
        seed: int,
    ) -> Drawing:
        """The drawing of prompts; the arguments are the attributes."""
        digest = prompts_digest(prompts)
        return cls(benchmark.name, digest, len(prompts), benchmark.num_images, model, size_px, settings, seed)


def begin_drawing(root: Path, drawing: Drawing) -> None:
    """Makes the folder of a drawing, or checks that it has this one begun.

    Raises:
        ConfigError: it is of another drawing, or holds something and no `drawing.json`; says what differs.
    """
    if (root / DRAWING_NAME).is_file():
        check_drawing(root, drawing)
        return
    if root.exists() and (not root.is_dir() or any(not path.name.endswith(WRITING) for path in root.iterdir())):
        raise ConfigError(f"{root}: exists and holds no drawing ({DRAWING_NAME} is missing); name a new folder")
    write_text(root / DRAWING_NAME, json.dumps(asdict(drawing), indent=2) + "\n")


def check_drawing(root: Path, drawing: Drawing) -> None:
    """Refuses the folder of another drawing.

    Raises:
        ConfigError: something differs, and what, or `drawing.json` cannot be read.
    """
    found = flat_values(read_drawing(root))
    wanted = flat_values(json.loads(json.dumps(asdict(drawing))))
    if _TOLD_BY_WEIGHTS not in found:
        wanted.pop(_TOLD_BY_WEIGHTS, None)
    differing = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if not differing:
        return
    # A different benchmark explains the rest.
    if "benchmark" in differing:
        differing = ["benchmark"]
    listed = [f"{name} is {_shown(found.get(name))} there, {_shown(wanted.get(name))} here" for name in differing]
    raise ConfigError(
        f"{root}: holds another drawing ({DRAWING_NAME}): {first_few(listed)}. Name another folder, draw with what is "
        "written there, or remove the folder to start over"
    )


def read_drawing(root: Path) -> dict[str, Any]:
    """The content of the `drawing.json` of a folder.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = root / DRAWING_NAME
    try:
        found = json.loads(read_utf8(path))
    except FileNotFoundError as error:
        raise ConfigError(f"{root}: holds no drawing ({DRAWING_NAME} is missing); name the folder of one") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); restore it, or remove the folder to start over"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path}: is {type(found).__name__}, expected an object; restore it, or remove the folder to start over"
        )
    return found


def flat_values(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat_values(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _shown(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
