"""Small files of prompts in the published formats, and images to write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitdance_scale.evaluation.benchmarks.benchmark import Benchmark
from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark
from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoScenes
from bitdance_scale.evaluation.benchmarks.image_folder import ImageFolder
from bitdance_scale.evaluation.benchmarks.imagenet import ImageNet
from bitdance_scale.evaluation.benchmarks.prompt import Prompt

SIZE_PX = (16, 24)
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "two cups",
    },
]
DPG = {"0": "Eight cabbages.", "partiprompts12": "A naïve “sign” that says .png", "COCOval2014000000000042": "A dog."}
ONEIG = {
    "en": (
        "category,id,prompt_en,type,prompt_length,class\r\n"
        'Anime_Stylization,000,"4boys, ""nuns""\r\nand a hat",T,short,\r\n'
        "Portrait,000,A man.,NP,short,\r\nPortrait,001,A woman.,NP,short,\r\n"
    ),
    "zh": (
        "category,id,prompt_cn,class\r\nAnime_Stylization,000,4男孩与修女,\r\nMultilingualism,000,一个红色的帽子,\r\n"
    ),
}
TIIF = {
    "action+2d": [
        {"type": "action+2d", "short_description": "A cat.", "long_description": "A long\u2028cat."},
        {"type": "action+2d", "short_description": "A dog.", "long_description": "A dog."},
    ],
    "text": [{"type": "text", "short_description": 'A sign: "A/B"', "long_description": "A long sign."}],
}
NAMES = ("geneval", "dpg", "oneig-en", "oneig-zh", "tiif", "imagenet", "demo-scenes", "demo-classes")


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def published(folder: Path, name: str) -> Path | None:
    """A small file of prompts of a benchmark; None where it reads none."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.prompts"
    if name == "geneval":
        return write_lines(path, GENEVAL)
    if name == "dpg":
        path.write_text(json.dumps(DPG, indent=4), encoding="utf-8")
        return path
    if name.startswith("oneig"):
        path.write_bytes(ONEIG[name[-2:]].encode("utf-8-sig"))
        return path
    if name == "tiif":
        path.mkdir(exist_ok=True)
        for kind, records in TIIF.items():
            write_lines(path / f"{kind}_prompts.jsonl", records)
        return path
    return None


def small(name: str) -> Benchmark:
    """A benchmark with few prompts."""
    if name == "imagenet":
        return ImageNet(num_images=3, num_classes=2)
    return DemoScenes(per_category=1) if name == "demo-scenes" else find_benchmark(name)


def small_folder(tmp_path: Path, name: str, model: str = "ours") -> tuple[ImageFolder, list[Prompt]]:
    """The folder `tmp_path / "out"` of a small benchmark, and its prompts."""
    benchmark = small(name)
    prompts = benchmark.read(published(tmp_path / "published", name))
    (tmp_path / "out").mkdir(exist_ok=True)
    return ImageFolder(tmp_path / "out", benchmark.layout(model), prompts, SIZE_PX), prompts


def image(prompt: Prompt, k: int, size_px: tuple[int, int] = SIZE_PX) -> np.ndarray:
    """An image of its own for every image of every prompt: smooth, as pictures are."""
    rng = np.random.default_rng([*prompt.id.encode(), k])
    corners = rng.integers(0, 256, (2, 3))
    share = np.linspace(0, 1, size_px[1])[:, None]
    row = corners[0] * (1 - share) + corners[1] * share
    return np.repeat(row[None].round().astype(np.uint8), size_px[0], axis=0)


def images(prompt: Prompt) -> list[np.ndarray]:
    """The images of a prompt."""
    return [image(prompt, k) for k in range(prompt.num_images)]


def files(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
