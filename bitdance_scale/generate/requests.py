"""Images that a user asks for: read from a prompt file, drawn in batches, written with a record of each."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.drawer import Batch, Drawer
from bitdance_scale.generate.out_of_memory import refused_batch_size
from bitdance_scale.generate.sampling_file import Sampling
from bitdance_scale.observe.figures import image_grid
from bitdance_scale.text_files import is_utf8, read_utf8, split_lines

GRID_NAME, REQUESTS_NAME = "grid.png", "requests.jsonl"
MAX_GRID_IMAGES = 64
MAX_GRID_COLUMNS = 8
_IMAGE_NAME = r"\d{5,}\.png"


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


def check_prompt(where: str, prompt: str) -> None:
    """Refuses a prompt that no tokenizer can read and no record can hold.

    Raises:
        ConfigError: UTF-8 cannot encode it: JSON and arguments of commands can hold lone surrogates.
    """
    if not is_utf8(prompt):
        raise ConfigError(f"{where} = {prompt!r}: holds what is no character in UTF-8; write it as UTF-8 text")


def read_requests(path: Path, size: tuple[int, int], seed: int) -> list[Request]:
    """The images that a prompt file asks for, in its order; empty lines are skipped.

    Raises:
        ConfigError: no such file, not text, no prompt in it, or a line that is not as described above; names the line.
    """
    if not path.is_file():
        raise ConfigError(f"--prompts {path}: no such file")
    requests: list[Request] = []
    try:
        lines = split_lines(read_utf8(path))
    except OSError as error:
        raise ConfigError(f"--prompts {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"--prompts {path}: {error}") from error
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


def batch_of(requests: Sequence[Request], sampling: Sampling, adapters: Mapping[str, float]) -> Batch:
    """What a model is asked for.

    Args:
        requests: of one size.
        sampling: the solver's settings.
        adapters: weight of each adapter of the model.
    """
    return Batch(
        [request.prompt for request in requests],
        [request.seed for request in requests],
        (requests[0].height, requests[0].width),
        sampling.num_steps,
        sampling.guidance,
        sampling.sampler,
        adapters,
    )


def draw_requests(
    drawer: Drawer,
    requests: Sequence[Request],
    out: Path,
    *,
    sampling: Sampling,
    batch_size: int,
    record: Mapping[str, object],
) -> None:
    """Draws all requests to a folder: an image each, a line each as it is finished, and a grid of the first.

    Args:
        drawer: the model; its adapters have the weights that it was opened with.
        requests: what to draw; an image depends on its own seed, prompt and settings only.
        out: folder, which exists.
        sampling: the solver's settings.
        batch_size: images drawn together.
        record: what the line of every image says beside its request and these settings.

    Raises:
        ConfigError: the device has too little memory for `batch_size` images, or the model cannot draw so.
    """
    vision = drawer.vision.section
    block_px = (vision.downsample * vision.block_side) ** 2
    settings = {"steps": sampling.num_steps, "guidance": sampling.guidance, "sampler": sampling.sampler}
    pictures: dict[int, np.ndarray] = {}
    total = sum(request.height * request.width // block_px for request in requests)
    with tqdm(total=total, unit="block") as bar, (out / REQUESTS_NAME).open("w", encoding="utf-8") as lines:
        for group in batches(requests, batch_size):
            begun_s = time.perf_counter()
            grid = group[0].height // vision.downsample, group[0].width // vision.downsample
            with refused_batch_size(batch_size):
                drawn = drawer.draw(
                    batch_of(group, sampling, drawer.facts.adapters), partial(_count_blocks, bar, len(group))
                )
                images = [drawer.vision.decode(tokens, grid).numpy() for tokens in drawn]
            seconds = (time.perf_counter() - begun_s) / len(group)
            for request, image in zip(group, images, strict=True):
                Image.fromarray(image).save(out / request.file)
                line = asdict(request) | settings | {**record, "file": request.file, "seconds": round(seconds, 3)}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                if request.number < MAX_GRID_IMAGES:
                    pictures[request.number] = image
            lines.flush()
    captions = [requests[number].prompt for number in sorted(pictures)]
    image_grid(
        [pictures[number] for number in sorted(pictures)], captions, out / GRID_NAME, _num_columns(len(pictures))
    )


def _num_columns(num_images: int) -> int:
    """Columns of a grid that is about as wide as high: of two such numbers the one that leaves fewer places empty."""
    least = math.ceil(math.sqrt(num_images))
    return min((least, least + 1), key=lambda columns: (columns > MAX_GRID_COLUMNS, -num_images % columns))


def _count_blocks(bar: tqdm[Any], num_images: int, _: Sequence[torch.Tensor]) -> None:
    """A block of each of so many images has been drawn."""
    bar.update(num_images)


def check_out(folder: Path, *, is_forced: bool) -> None:
    """Refuses a folder that images may not be written to.

    Raises:
        ConfigError: it is a file, or holds something and `is_forced` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; name a folder")
    if not is_forced and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: is not empty; name another folder, or replace its images with --force")


def clear_out(folder: Path) -> None:
    """Makes the folder, or removes what an earlier run wrote to it and leaves all other files."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name in (GRID_NAME, REQUESTS_NAME) or re.fullmatch(_IMAGE_NAME, path.name):
            path.unlink()


def _parse_line(where: str, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    kinds: dict[str, type] = {"prompt": str, "seed": int, "height": int, "width": int}
    if not isinstance(fields, dict) or "prompt" not in fields or not fields.keys() <= kinds.keys():
        raise ConfigError(
            f"{where}: must be an object with prompt and, if wanted, seed, height and width; it is {line}"
        )
    for key, value in fields.items():
        is_right = isinstance(value, kinds[key]) and not isinstance(value, bool)
        if not is_right or (key == "seed" and not 0 <= int(value) < 2**63):
            raise ConfigError(f"{where}: {key} = {value!r}: must be {_describe(key)}")
    check_prompt(f"{where}: prompt", fields["prompt"])
    return fields


def _describe(key: str) -> str:
    return {"prompt": "text", "seed": "an integer from 0 to 2^63 - 1"}.get(key, "a number of pixels")
