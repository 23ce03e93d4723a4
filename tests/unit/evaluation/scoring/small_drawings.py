"""Small drawings as `bitdance evaluate draw` leaves them, and the questions about them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_scale.evaluation.benchmarks.image_folder import ImageFolder
from bitdance_scale.evaluation.benchmarks.manifest import Drawing, begin_drawing
from bitdance_scale.evaluation.benchmarks.prompt import Prompt
from tests.unit.evaluation.benchmarks import small_benchmarks
from tests.unit.evaluation.benchmarks.small_benchmarks import DPG, SIZE_PX, TIIF, published, small, write_lines

MODEL = "ours"


def plain(value: int, size_px: tuple[int, int] = SIZE_PX) -> np.ndarray:
    """An image of one value."""
    return np.full((*size_px, 3), value, np.uint8)


def draw(
    folder: Path,
    name: str,
    image_of: Callable[..., np.ndarray] = small_benchmarks.image,
    prompt_file: Path | None = None,
    size_px: tuple[int, int] = SIZE_PX,
) -> tuple[Path, Path | None, list[Prompt]]:
    """(folder of the drawing, file of prompts, prompts) of a small benchmark.

    Args:
        folder: where both are made.
        name: of the benchmark.
        image_of: gives image k of a prompt.
        prompt_file: of the benchmark; the small published one by default.
        size_px: of an image.
    """
    benchmark = small(name)
    prompt_file = published(folder / "published", name) if prompt_file is None else prompt_file
    prompts = benchmark.read(prompt_file)
    root = folder / "drawn"
    drawing = Drawing.of(benchmark, prompts, model={"name": MODEL}, size_px=size_px, settings={"steps": 2}, seed=0)
    begin_drawing(root, drawing)
    images = ImageFolder(root, benchmark.layout(MODEL), prompts, size_px)
    for prompt in prompts:
        for k in range(prompt.num_images):
            images.write_image(prompt, k, image_of(prompt, k))
    images.finish()
    return root, prompt_file, prompts


def write_dpg_questions(path: Path, items: dict[str, int] | None = None) -> Path:
    """`dpg_bench.csv` with so many questions about each item, each depending on the one before it."""
    columns = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerow(["skipped", "s", 1, "0", "entity - whole (x)", "skipped 1?"])
        for item, number in (items or dict.fromkeys(DPG, 2)).items():
            for place in range(1, number + 1):
                category = "entity - whole" if place == 1 else "attribute - color"
                writer.writerow([item, item, place, str(place - 1), f"{category} (x)", f"{item} {place}?"])
    lines = path.read_text(encoding="utf-8").split("\n")
    # The row that the published script skips is one of the first item.
    path.write_text("\n".join([lines[0], *lines[2:]]), encoding="utf-8")
    return path


def write_tiif_questions(folder: Path) -> Path:
    """`testmini_eval_prompts` with two questions on each line, answered yes and no."""
    folder.mkdir()
    for kind, records in TIIF.items():
        record: dict[str, Any] = {
            "type": kind,
            "yn_question_list": ["Is A?", "Is B?"],
            "yn_answer_list": ["yes", "no"],
        }
        write_lines(folder / f"{kind}_eval_prompts.jsonl", [record] * len(records))
    return folder


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
