"""Draws images of prompts with a published BitDance folder.

    python tools/sample.py FOLDER --prompts prompts.txt --out samples --size 1024x1024
    python tools/sample.py FOLDER --prompt "a red cube on a blue ball" --out samples --seed 7

The prompt file is text with one prompt per line, or .jsonl with {"prompt": .., "seed": .., "height": .., "width": ..} per
line, of which only the prompt is required. Image i has the seed --seed + i unless its line gives one; an image depends
on its own seed, prompt and settings, not on the others in its batch. Written are OUT/00000.png and so on, grid.png with
the first 64 of them, and requests.jsonl with one line per image as it is finished.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.generate.image_sizes import beyond_published, check_size
from bitdance_scale.generate.pipeline import BitDancePipeline
from bitdance_scale.generate.published_model import read_sections
from bitdance_scale.generate.sampler import SAMPLERS, FlowSolver
from bitdance_scale.observe.figures import image_grid

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRID_NAME, REQUESTS_NAME = "grid.png", "requests.jsonl"
MAX_GRID_IMAGES = 64
MAX_GRID_COLUMNS = 8


@dataclass(frozen=True)
class Request:
    """One image to draw; sizes in pixels."""

    number: int
    prompt: str
    seed: int
    height: int
    width: int

    @property
    def file(self) -> str:
        """Name of its picture."""
        return f"{self.number:05d}.png"


def parse_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError(f"--size {text}: must be HEIGHTxWIDTH in pixels, such as 1024x1024")
    return int(match[1]), int(match[2])


def read_requests(path: Path, size: tuple[int, int], seed: int) -> list[Request]:
    """The images that a prompt file asks for, in its order; empty lines are skipped.

    Raises:
        ConfigError: no such file, not text, no prompt in it, or a line that is not as described above; names the line.
    """
    if not path.is_file():
        raise ConfigError(f"--prompts {path}: no such file")
    requests: list[Request] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read as UTF-8 text ({error}); save it so") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = _parse_line(f"{path}:{number}", line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
        defaults = {"seed": seed + len(requests), "height": size[0], "width": size[1]}
        requests.append(Request(len(requests), **(defaults | fields)))
    if not requests:
        raise ConfigError(f"--prompts {path}: holds no prompt")
    return requests


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Requests of one size together, up to `batch_size`."""
    groups: dict[tuple[int, int], list[Request]] = {}
    for request in requests:
        groups.setdefault((request.height, request.width), []).append(request)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def draw(pipeline: BitDancePipeline, requests: Sequence[Request], arguments: argparse.Namespace) -> None:
    """Draws all requests to the output folder."""
    vision = pipeline.model.vision.section
    block_px = (vision.downsample * vision.block_side) ** 2
    settings = {"steps": arguments.steps, "guidance": arguments.guidance, "sampler": arguments.sampler}
    pictures: dict[int, np.ndarray] = {}
    total = sum(request.height * request.width // block_px for request in requests)
    with (
        tqdm(total=total, unit="block") as bar,
        (arguments.out / REQUESTS_NAME).open("w", encoding="utf-8") as record,
    ):
        for batch in batches(requests, arguments.batch_size):
            begun = time.perf_counter()
            images = pipeline(
                [request.prompt for request in batch],
                batch[0].height,
                batch[0].width,
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance,
                sampler=arguments.sampler,
                generator=[torch.Generator().manual_seed(request.seed) for request in batch],
                on_block=lambda: bar.update(len(batch)),
            ).images
            seconds = (time.perf_counter() - begun) / len(batch)
            for request, image in zip(batch, images, strict=True):
                image.save(arguments.out / request.file)
                line = asdict(request) | settings | {"folder": str(arguments.folder), "file": request.file}
                record.write(json.dumps(line | {"seconds": round(seconds, 3)}, ensure_ascii=False) + "\n")
                if request.number < MAX_GRID_IMAGES:
                    pictures[request.number] = np.asarray(image)
            record.flush()
    columns = min(MAX_GRID_COLUMNS, math.ceil(math.sqrt(len(pictures))))
    captions = [requests[number].prompt for number in sorted(pictures)]
    image_grid([pictures[number] for number in sorted(pictures)], captions, arguments.out / GRID_NAME, columns)


def _parse_line(where: str, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    kinds = {"prompt": str, "seed": int, "height": int, "width": int}
    if not isinstance(fields, dict) or "prompt" not in fields or not fields.keys() <= kinds.keys():
        raise ConfigError(
            f"{where}: must be an object with prompt and, if wanted, seed, height and width; it is {line}"
        )
    for key, value in fields.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool) or (key == "seed" and not 0 <= value < 2**63):
            raise ConfigError(f"{where}: {key} = {value!r}: must be {_describe(key)}")
    return fields


def _describe(key: str) -> str:
    return {"prompt": "a text", "seed": "an integer from 0 to 2^63 - 1"}.get(key, "a number of pixels")


def _check_out(folder: Path, is_forced: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; name a folder")
    if not is_forced and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: is not empty; name another folder, or replace its images with --force")


def _clear_out(folder: Path) -> None:
    """Makes the folder, or takes an earlier run's files out of it and leaves all others."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name in (GRID_NAME, REQUESTS_NAME) or re.fullmatch(r"\d{5,}\.png", path.name):
            path.unlink()


def _run(arguments: argparse.Namespace) -> None:
    size = parse_size(arguments.size)
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size}: must be at least 1")
    if not 0 <= arguments.seed < 2**62:
        raise ConfigError(f"--seed {arguments.seed}: must be from 0 to 2^62 - 1")
    _check_out(arguments.out, arguments.force)
    # What can be refused is, before minutes of loading.
    FlowSolver(arguments.steps, arguments.guidance, arguments.sampler)
    if arguments.prompts is not None:
        requests = read_requests(arguments.prompts, size, arguments.seed)
    else:
        requests = [
            Request(number, text, arguments.seed + number, *size) for number, text in enumerate(arguments.prompt)
        ]
    vision = read_sections(arguments.folder).vision
    for size in sorted({(request.height, request.width) for request in requests}):
        check_size(*size, vision)
        if note := beyond_published(*size, vision):
            print(f"note: {note}", file=sys.stderr)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    pipeline = BitDancePipeline.from_pretrained(arguments.folder, dtype, arguments.device)
    _clear_out(arguments.out)
    draw(pipeline, requests, arguments)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="published folder")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--prompts", type=Path, help="prompt file, text or .jsonl")
    wanted.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must be empty")
    parser.add_argument("--force", action="store_true", help="replace the images of an earlier run in OUT")
    parser.add_argument("--size", default="1024x1024", help="HEIGHTxWIDTH in pixels; default 1024x1024")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps per block; default 50")
    parser.add_argument("--guidance", type=float, default=7.5, help="guidance scale, 1 for none; default 7.5")
    parser.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help=f"default {SAMPLERS[0]}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; default 0")
    parser.add_argument("--batch-size", type=int, default=4, help="images drawn together; default 4")
    parser.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", help="default cuda where there is one")
    try:
        _run(arguments := parser.parse_args())
    except BitDanceError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
