"""Packs of a given length for the benchmarks, the lines that say where a number was measured, and earlier versions."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from bitdance_scale.sequence.layout import ImageTokens, num_positions, pack_samples
from bitdance_scale.sequence.pack import Pack, Sample

# Latent grids of 256, 512 and 1024 px images, as they come in a batch of the PT stage (shares 2 : 7 : 1).
MIXED_GRIDS = (((16, 16), 0.2), ((32, 32), 0.7), ((64, 64), 0.1))
MAX_CAPTION = 256


def mixed_pack(length: int, side: int, seed: int = 0) -> Pack:
    """A pack of exactly `length` positions: images of all resolutions with captions, then padding.

    Args:
        length: positions, padding included.
        side: p, cells per side of a block.
        seed: of the choice of images and captions.
    """
    numbers = np.random.default_rng(seed)
    grids, shares = zip(*MIXED_GRIDS, strict=True)
    samples: list[Sample] = []
    filled = 0
    # Samples that do not fit are skipped; after so many draws, hardly any other would fit.
    for _ in range(20 + length // 256):
        grid = grids[numbers.choice(len(grids), p=shares)]
        num_before = int(numbers.integers(1, MAX_CAPTION))
        size = num_positions(num_before, 1, grid, _tokens(side))
        if filled + size <= length:
            filled += size
            samples.append(_sample(len(samples), grid, num_before))
    if not samples:
        samples.append(_sample(0, grids[0], length - num_positions(0, 1, grids[0], _tokens(side))))
    return pack_samples(samples, _tokens(side), pack_multiple=length)


def document_pack(length: int, document: int, side: int) -> Pack:
    """A pack of exactly `length` positions in samples of `document` each, with an image of at most 64 x 64 cells."""
    cells = 64
    while num_positions(1, 1, (cells, cells), _tokens(side)) > document:
        cells -= side
    num_before = 1 + document - num_positions(1, 1, (cells, cells), _tokens(side))
    samples = [_sample(key, (cells, cells), num_before) for key in range(length // document)]
    return pack_samples(samples, _tokens(side), pack_multiple=length)


def _sample(key: int, grid: tuple[int, int], num_before: int) -> Sample:
    return Sample(key, grid, np.full(num_before, 5), np.array([6]), 1, 1)


def _tokens(side: int) -> ImageTokens:
    return ImageTokens(1, 2, resolution=tuple(range(10, 110)), queries=tuple(range(200, 199 + side**2)))


def machine() -> str:
    """Command, processor or GPU, and versions, to print beside a number."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (models or [platform.processor()])[0]
    return (
        f"command: python {' '.join(sys.argv)}\n"
        f"machine: {device}, torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    )


def module_before(checkout: str, file: str) -> ModuleType:
    """A file of the package of another version, beside ours.

    Args:
        checkout: root of a checkout of that version.
        file: path of the file below `bitdance_scale/`.
    """
    path = Path(checkout, "bitdance_scale", file)
    spec = importlib.util.spec_from_file_location(f"{path.stem}_before", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
