"""Grids of the configured prompts of a run, beside what its start drew of them.

A run that starts from other weights draws its prompts once before the first step. These pictures are kept in
`samples/start/`, with what they were drawn with; a later grid shows each picture beside that of its prompt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bitdance_scale.atomic_files import replacing, write_text
from bitdance_scale.config.schema import SampleSection
from bitdance_scale.observe.figures import image_grid

SAMPLES_DIR, START_DIR = "samples", "start"
DRAWN_FILE = "drawn.json"
GRID_COLUMNS = 4
# Settings of `[sample]` that do not change a picture.
_OF_NO_PICTURE = ("every_steps", "prompts")


def samples_path(run_folder: Path, step: int) -> Path:
    """Where the sample grid of a step goes."""
    return run_folder / SAMPLES_DIR / f"step_{step:06d}.png"


def newest_samples(run_folder: Path) -> Path | None:
    """The grid of the last step that has one; None: there is none."""
    steps = sample_steps(run_folder)
    return samples_path(run_folder, steps[-1]) if steps else None


def sample_steps(run_folder: Path) -> list[int]:
    """Steps of which there is a grid, in order."""
    found = [path.stem.removeprefix("step_") for path in (run_folder / SAMPLES_DIR).glob("step_*.png")]
    return sorted(int(step) for step in found if step.isdecimal())


def has_start(run_folder: Path) -> bool:
    """Whether grids of the run show what its start drew."""
    return (run_folder / SAMPLES_DIR / START_DIR / DRAWN_FILE).exists()


def write_start(run_folder: Path, images: Sequence[np.ndarray], section: SampleSection) -> None:
    """Keeps the start's pictures of the configured prompts, uint8 [H, W, 3] each."""
    folder = run_folder / SAMPLES_DIR / START_DIR
    folder.mkdir(parents=True, exist_ok=True)
    # Without it the pictures count for nothing, so that they never lie under the settings of others.
    (folder / DRAWN_FILE).unlink(missing_ok=True)
    for number, image in enumerate(images):
        with replacing(folder / f"{number:05d}.png") as aside:
            Image.fromarray(image).save(aside, format="PNG")
    drawn = {"prompts": list(section.prompts), "settings": _settings(section)}
    write_text(folder / DRAWN_FILE, json.dumps(drawn, indent=2) + "\n")


def read_start(run_folder: Path, section: SampleSection) -> dict[int, np.ndarray]:
    """The start's pictures, uint8 [H, W, 3], by the number of their prompt.

    Prompts that were added, changed or moved since have none, and none has one if pictures are drawn in another way
    now: they would not be comparable.
    """
    folder = run_folder / SAMPLES_DIR / START_DIR
    if not has_start(run_folder):
        return {}
    drawn = json.loads((folder / DRAWN_FILE).read_text(encoding="utf-8"))
    if drawn["settings"] != _settings(section):
        return {}
    same = [
        number
        for number, (before, now) in enumerate(zip(drawn["prompts"], section.prompts, strict=False))
        if before == now
    ]
    return {number: np.asarray(Image.open(folder / f"{number:05d}.png").convert("RGB")) for number in same}


def write_samples(run_folder: Path, step: int, images: Sequence[np.ndarray], section: SampleSection) -> Path:
    """Writes a grid of pictures, uint8 [H, W, 3] each, under their prompts; the start's is on the left of each."""
    path, start = samples_path(run_folder, step), read_start(run_folder, section)
    path.parent.mkdir(exist_ok=True)
    shown: list[np.ndarray] = []
    captions: list[str] = []
    for number, (image, prompt) in enumerate(zip(images, section.prompts, strict=True)):
        if start:
            # An empty place keeps the pairs in line.
            shown.append(start.get(number, np.full_like(image, 255)))
            captions.append("at the start" if number in start else "none at the start")
        shown.append(image)
        captions.append(f"step {step}: {prompt}" if start else prompt)
    image_grid(shown, captions, path, GRID_COLUMNS)
    return path


def _settings(section: SampleSection) -> dict[str, Any]:
    """What decides a picture beside its prompt, as JSON gives it back."""
    fields = {name: value for name, value in dataclasses.asdict(section).items() if name not in _OF_NO_PICTURE}
    settings: dict[str, Any] = json.loads(json.dumps(fields))
    return settings
