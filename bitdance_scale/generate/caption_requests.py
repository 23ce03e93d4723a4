"""Images that a user wants described: found, fitted to a size as training fits them, described in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from bitdance_scale.config.data_schema import Resolution
from bitdance_scale.config.schema import VisionSection
from bitdance_scale.data.data_errors import SampleError
from bitdance_scale.data.image_decode import decode_image, read_size_px
from bitdance_scale.data.plan.buckets import assign_buckets, resolution_buckets
from bitdance_scale.errors import ConfigError, DataError
from bitdance_scale.evaluation.benchmarks.prompt import image_seed
from bitdance_scale.evaluation.distributions.image_sets import IMAGE_SUFFIXES
from bitdance_scale.generate.caption_decode import TokenChoice
from bitdance_scale.generate.caption_pipeline import Caption, CaptionPipeline
from bitdance_scale.generate.image_sizes import PUBLISHED_DOWNSAMPLE, PUBLISHED_SIZES, check_size
from bitdance_scale.generate.out_of_memory import refused_batch_size
from bitdance_scale.text_files import is_utf8
from bitdance_scale.wording import first_few


@dataclass(frozen=True)
class CaptionRequest:
    """An image to describe.

    Attributes:
        path: its file.
        stored_px: (height, width) of the upright picture in it.
        bucket_px: (height, width) at which the model sees it.
    """

    path: Path
    stored_px: tuple[int, int]
    bucket_px: tuple[int, int]

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3] of the bucket, decoded and resized as an image of training.

        Raises:
            DataError: the file is damaged, has changed, or is of an unsupported kind.
        """
        try:
            return decode_image(self.path.read_bytes(), self.stored_px, self.bucket_px)
        except (SampleError, OSError) as error:
            raise _unreadable([f"{self.path}: {error}"]) from error


def find_images(places: Sequence[Path]) -> list[Path]:
    """The images that files and folders name: a file itself, of a folder all images below it, in order of name.

    Raises:
        DataError: there is no such file or folder, or a folder holds no image.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{place}: holds no image; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise DataError(f"{place}: there is no such file or folder; name images, or a folder of images")
    return list(dict.fromkeys(found))


def caption_buckets(sizes: Sequence[tuple[int, int]], vision: VisionSection) -> np.ndarray:
    """int32 [B, 2], the (height, width) in pixels at which images are described, and their transposes.

    Args:
        sizes: those that the user names; none: those that the release samples at, of the larger area first.
        vision: pixels per cell and the block side.

    Raises:
        ConfigError: a size is not possible; or none is named for a tokenizer that is not of the release's scale.
    """
    if not sizes and vision.downsample != PUBLISHED_DOWNSAMPLE:
        multiple = vision.downsample * vision.block_side
        raise ConfigError(
            f"--size: this model has {vision.downsample} px a cell, the release's sizes are for "
            f"{PUBLISHED_DOWNSAMPLE}; name the sizes of its training (data.resolutions) as HEIGHTxWIDTH, in multiples "
            f"of {multiple} px"
        )
    chosen = tuple(sizes) or PUBLISHED_SIZES
    for size in chosen:
        check_size(*size, vision)
    return resolution_buckets(Resolution(side_px=0, share=1, buckets_px=chosen))


def plan_captions(paths: Sequence[Path], buckets: np.ndarray, max_upscale: float) -> list[CaptionRequest]:
    """The bucket of every image, by the rule of training (`data/plan/buckets.py`); only headers are read.

    Args:
        paths: of the images.
        buckets: as `caption_buckets` gives them.
        max_upscale: largest enlargement.

    Raises:
        DataError: files are not images, too small, or have names that are not UTF-8; names them.
    """
    sizes, faults = {}, []
    for path in paths:
        if not is_utf8(str(path)):
            faults.append(f"{str(path)!r}: its name is not UTF-8")
            continue
        try:
            sizes[path] = read_size_px(path.read_bytes())
        except (SampleError, OSError) as error:
            faults.append(f"{path}: {error}")
    if faults:
        raise _unreadable(faults)
    heights, widths = np.array(list(sizes.values()), dtype=np.int32).T
    rows = assign_buckets(heights, widths, buckets, max_upscale)
    small = [
        f"{path}: {sizes[path][0]} x {sizes[path][1]} px" for path, row in zip(sizes, rows, strict=True) if row < 0
    ]
    if small:
        listed = ", ".join(f"{height}x{width}" for height, width in buckets.tolist())
        raise DataError(
            f"images that cover no size when enlarged at most {max_upscale:g} times: {first_few(small)}. The sizes are "
            f"{listed}; name smaller ones with --size, or allow more with --max-upscale"
        )
    return [
        CaptionRequest(path, size, (int(buckets[row][0]), int(buckets[row][1])))
        for (path, size), row in zip(sizes.items(), rows, strict=True)
    ]


def describe_images(
    pipeline: CaptionPipeline,
    requests: Sequence[CaptionRequest],
    choice: TokenChoice,
    seed: int,
    max_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda num_images: None,
) -> Iterator[tuple[CaptionRequest, Caption]]:
    """Describes images in their order, each batch as it is finished.

    Args:
        pipeline: the model.
        requests: the images.
        choice: how tokens are chosen.
        seed: with the name of its file it decides what is drawn for an image.
        max_tokens: a caption is cut after so many tokens.
        batch_size: images described together.
        on_batch: called after every batch with its images.

    Raises:
        DataError: an image is damaged.
        ConfigError: the device has too little memory for `batch_size` images.
    """
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        generators = [torch.Generator().manual_seed(image_seed(seed, request.path.name, 0)) for request in batch]
        with refused_batch_size(batch_size):
            captions = pipeline([request.pixels() for request in batch], choice, generators, max_tokens)
        on_batch(len(batch))
        yield from zip(batch, captions, strict=True)


def write_line(lines: TextIO, request: CaptionRequest, caption: Caption, settings: dict[str, object]) -> None:
    """Writes the line of an image as JSON: its file, the caption with what is known of it, and the settings."""
    said = asdict(caption)
    line = {"file": str(request.path), "caption": said.pop("text")} | said | {"size_px": request.bucket_px} | settings
    lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    lines.flush()


def _unreadable(faults: Sequence[str]) -> DataError:
    return DataError(f"images that cannot be read: {first_few(faults)}; repair them or leave them out")
