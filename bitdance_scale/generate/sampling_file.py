"""With what a published model draws unless it is told otherwise: `sampling.json`, which an export of a run has.

It holds size, steps, guidance, sampler and prompts of the run's own pictures, under the names of the section
`[sample]`. The release's folders have no such file, and its settings apply to them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.coerce import Coercion
from bitdance_scale.config.ranges import CONSTRAINTS
from bitdance_scale.errors import CheckpointError
from bitdance_scale.weight_files import read_json

SAMPLING_NAME = "sampling.json"


@dataclass(frozen=True)
class Sampling:
    """How a model draws; the defaults are the release's.

    Attributes:
        size_px: (height, width) of a picture.
        num_steps: solver steps per block.
        guidance: classifier-free guidance scale; 1 is none.
        sampler: euler_maruyama or euler.
        prompts: what is drawn to show the model; none of the release.
    """

    size_px: tuple[int, int] = (1024, 1024)
    num_steps: int = 50
    guidance: float = 7.5
    sampler: str = "euler_maruyama"
    prompts: tuple[str, ...] = ()


def write_sampling(folder: Path, section: Mapping[str, Any]) -> None:
    """Writes the file into a folder that is being made.

    Args:
        folder: the published folder.
        section: `[sample]` of the run; other settings than those of `Sampling` are left out.
    """
    names = [field.name for field in dataclasses.fields(Sampling)]
    content = {name: section[name] for name in names if name in section}
    write_text(folder / SAMPLING_NAME, json.dumps(content, indent=2) + "\n")


def read_sampling(folder: Path) -> Sampling | None:
    """The settings that a published folder has of its own; None: it has none, as the release's.

    Raises:
        CheckpointError: the file is damaged, or a setting in it is unknown or not possible; names all that are.
    """
    path = folder / SAMPLING_NAME
    if not path.is_file():
        return None
    coercion = Coercion(Sampling, lambda _: str(path))
    found = coercion.build(read_json(path))
    problems = coercion.problems or [f"{path}: {problem}" for problem in _problems(found)]
    if problems:
        raise CheckpointError("\n".join([*problems, f"correct {path}, or remove it to draw as the release does"]))
    return found


def _problems(sampling: Sampling) -> Iterator[str]:
    """The settings out of range; the size is checked against the model (`image_sizes.check_size`)."""
    for name, value in dataclasses.asdict(sampling).items():
        constraint = CONSTRAINTS.get(f"sample.{name}")
        if constraint is not None and value not in constraint:
            yield f"{name} = {value!r}: must be {constraint}"
