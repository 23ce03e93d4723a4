"""Sets of images as ADM's evaluation suite reads them: one `.npz` with `arr_0`, uint8 [N, H, W, 3].

Where images are of classes, `arr_1`, int64 [N], has the class of each, as ADM's own sampling script writes it
(openai/guided-diffusion, scripts/classifier_sample.py); the suite does not read it. The images may be larger than
memory: they are written part by part, and mapped from the file to be read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

ARRAY_NAME, LABELS_NAME = "arr_0.npy", "arr_1.npy"
# Of an entry of a zip archive: signature to sizes, then the lengths of its name and of its extra field.
_LOCAL_HEADER_BYTES = 30


def write_npz(
    path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray], labels: np.ndarray | None = None
) -> None:
    """Writes an `.npz` with the array `arr_0` of uint8, part by part along its first axis, not compressed.

    Equal arrays make equal files: no time is in them.

    Args:
        path: the file.
        shape: of the whole array.
        parts: in order; their lengths sum up to `shape[0]`.
        labels: int64 [N], the class of each image, which become `arr_1`; None: no such array.

    Raises:
        ValueError: the lengths do not, or there is not one label per image.
    """
    if labels is not None and (labels.dtype != np.int64 or labels.shape != shape[:1]):
        raise ValueError(f"labels of {labels.dtype} {list(labels.shape)}, wanted int64 [{shape[0]}]")
    num_rows = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo(ARRAY_NAME), "w", force_zip64=True) as f:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            for part in parts:
                if part.dtype != np.uint8 or part.shape[1:] != shape[1:]:
                    raise ValueError(f"a part of {part.dtype} {list(part.shape)}, wanted uint8 [.., {shape[1:]}]")
                num_rows += len(part)
                f.write(np.ascontiguousarray(part).data)
        if labels is not None:
            with archive.open(zipfile.ZipInfo(LABELS_NAME), "w") as f:
                np.lib.format.write_array(f, labels, allow_pickle=False)
    if num_rows != shape[0]:
        raise ValueError(f"{num_rows} images, wanted {shape[0]}")


def read_labels(path: Path) -> np.ndarray:
    """The labels `arr_1` of an `.npz`, int64 [N].

    Raises:
        OSError: of the file system.
        ValueError: it is no such file, cut short, or has no labels.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(LABELS_NAME) as f:
            labels: np.ndarray = np.lib.format.read_array(f, allow_pickle=False)
    except KeyError as error:
        raise ValueError("has no labels of its images (arr_1)") from error
    except zipfile.BadZipFile as error:
        raise ValueError(f"is no .npz, or is cut short ({error})") from error
    if labels.dtype != np.int64 or labels.ndim != 1:
        raise ValueError(f"arr_1 is {labels.dtype} {list(labels.shape)}, expected int64 [N]")
    return labels


def map_npz(path: Path) -> np.ndarray:
    """The array `arr_0` of an `.npz`, uint8 [N, H, W, 3], read from the file as it is used; a compressed one is loaded.

    Raises:
        OSError: of the file system.
        ValueError: it is no such file, cut short, or holds another kind of array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(ARRAY_NAME)
            with archive.open(entry) as f:
                version = np.lib.format.read_magic(f)
                read_header = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                shape, is_fortran, dtype = read_header(f)
                header_bytes = f.tell()
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or is_fortran:
                raise ValueError(f"arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3]")
            if entry.compress_type != zipfile.ZIP_STORED:
                with archive.open(entry) as f:
                    return np.lib.format.read_array(f, allow_pickle=False)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"is no .npz with one array arr_0, or is cut short ({error})") from error
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        local = file.read(_LOCAL_HEADER_BYTES)
    skipped = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    offset = entry.header_offset + _LOCAL_HEADER_BYTES + skipped + header_bytes
    return np.memmap(path, np.uint8, "r", offset, shape)
