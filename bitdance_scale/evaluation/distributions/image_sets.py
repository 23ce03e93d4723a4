"""Images of a folder, or of an .npz as ADM's suite reads it, in batches; never all at once."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from bitdance_scale.errors import DataError
from bitdance_scale.wording import first_few

IMAGES_KEY = "arr_0"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_ARRAY_SUFFIX = ".npy"
# A zip member's content may be any bytes; numpy's own limit on a header is the same.
_READ_ERRORS = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


class ArraySpec(NamedTuple):
    """An array in an .npz, from its header."""

    shape: tuple[int, ...]
    dtype: np.dtype


class ImageFile(NamedTuple):
    """Size of the images of a set, and their number."""

    number: int
    size_px: tuple[int, int]


def read_arrays_header(path: Path) -> dict[str, ArraySpec]:
    """The arrays in an .npz, by name; no values are read.

    Raises:
        DataError: there is no such file, or it is damaged, cut short, or holds Python objects.
    """
    specs = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as member:
                    spec = _read_header(path, info.filename, member)
                    size = member.tell() + math.prod(spec.shape) * spec.dtype.itemsize
                if size != info.file_size:
                    raise DataError(
                        f"{path}: {info.filename} has {info.file_size} bytes and its header says {size}; write or "
                        "fetch the file again"
                    )
                specs[info.filename.removesuffix(_ARRAY_SUFFIX)] = spec
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error
    return specs


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an .npz, without pickles; errors as `read_arrays_header`."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in names}
    except (*_READ_ERRORS, KeyError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: is no readable .npz ({type(error).__name__}: {error}); write or fetch it again")


def _read_header(path: Path, name: str, member: IO[bytes]) -> ArraySpec:
    """Reads the header of an array up to its values."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{path}: {name} is of version {version} of NumPy's format; save it with numpy.savez")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = reader(member)
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects, which must be unpickled; save plain arrays")
    if is_fortran and len(shape) > 1 and name == IMAGES_KEY + _ARRAY_SUFFIX:
        raise DataError(f"{path}: {name} is in Fortran order; save numpy.ascontiguousarray of it")
    return ArraySpec(tuple(shape), dtype)


class NpzImages:
    """The images `arr_0` of an .npz, stored or deflated, of which one batch is held at a time.

    Args:
        path: the file.
        batch_images: images per batch.

    Attributes:
        file: their number and size.

    Raises:
        DataError: they are not uint8 [N, H, W, 3], or as `read_arrays_header`.
    """

    def __init__(self, path: Path, batch_images: int = 64) -> None:
        self._path, self._batch_images = path, batch_images
        spec = read_arrays_header(path).get(IMAGES_KEY)
        if spec is None:
            raise DataError(
                f"{path}: has no {IMAGES_KEY}, which are the images; save them with numpy.savez(FILE, images)"
            )
        shape = spec.shape
        if spec.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise DataError(
                f"{path}: {IMAGES_KEY} is {spec.dtype} {list(shape)}, expected uint8 [N, height, width, 3] with N > 0; "
                "save RGB images of 8 bits per channel"
            )
        self.file = ImageFile(shape[0], (shape[1], shape[2]))

    def __iter__(self) -> Iterator[np.ndarray]:
        """As `batches`."""
        return self.batches(self._batch_images)

    def batches(self, batch_images: int) -> Iterator[np.ndarray]:
        """Batches uint8 [n, H, W, 3] of `batch_images`; the last one may be smaller.

        Raises:
            DataError: the file is damaged.
        """
        number, (height, width) = self.file
        image_bytes = height * width * 3
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open(IMAGES_KEY + _ARRAY_SUFFIX) as member:
                _read_header(self._path, IMAGES_KEY + _ARRAY_SUFFIX, member)
                for first in range(0, number, batch_images):
                    count = min(batch_images, number - first)
                    content = bytearray(member.read(count * image_bytes))
                    if len(content) != count * image_bytes:
                        raise EOFError(f"it ends within image {first + len(content) // image_bytes}")
                    yield np.frombuffer(content, dtype=np.uint8).reshape(count, height, width, 3)
                # The checksum is compared at the end.
                member.read(1)
        except _READ_ERRORS as error:
            raise _unreadable(self._path, error) from error


class FolderImages:
    """The images below a folder in the order of their names, of which one batch is held at a time.

    Args:
        folder: the folder; images are looked for in folders within it, too. Files with other endings are left out.
        batch_images: images per batch.

    Attributes:
        file: their number and size.
        paths: of the images.

    Raises:
        DataError: there is no image, or one is not RGB of 8 bits per channel, or of another size than the first. Known
            from the beginnings of the files, before any is decoded.
    """

    def __init__(self, folder: Path, batch_images: int = 64) -> None:
        self._batch_images = batch_images
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder of images")
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise DataError(f"{folder}: holds no image; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        sizes: dict[tuple[int, int], list[Path]] = {}
        odd = []
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    sizes.setdefault((image.height, image.width), []).append(path)
                    problem = _kind_problem(image)
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
                raise DataError(f"{path}: is no readable image ({error}); write it again or remove it") from error
            odd += [f"{path} {problem}"] if problem else []
        if odd:
            raise DataError(
                f"{first_few(odd)}: images that are compared are RGB of 8 bits per channel; lay transparent ones on a "
                'background, and convert others with Pillow\'s convert("RGB")'
            )
        if len(sizes) > 1:
            found = [f"{len(paths)} of {w} x {h} px such as {paths[0].name}" for (h, w), paths in sizes.items()]
            raise DataError(
                f"{folder}: images are of {len(sizes)} sizes ({first_few(found)}); a set is of one size: crop and "
                "resize them first, as the model's training images were"
            )
        self.file = ImageFile(len(self.paths), next(iter(sizes)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """As `batches`."""
        return self.batches(self._batch_images)

    def batches(self, batch_images: int) -> Iterator[np.ndarray]:
        """Batches uint8 [n, H, W, 3] of `batch_images`; the last one may be smaller.

        Raises:
            DataError: a file is damaged.
        """
        for first in range(0, len(self.paths), batch_images):
            yield np.stack([_decode(path) for path in self.paths[first : first + batch_images]])


def _kind_problem(image: Image.Image) -> str | None:
    if image.has_transparency_data:
        return f"is transparent (mode {image.mode})"
    if image.mode in ("L", "1", "I;16", "I;16B", "I", "F"):
        return f"is grey (mode {image.mode})"
    return None if image.mode == "RGB" else f"is of mode {image.mode}"


def _decode(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); write it again or remove it") from error


def open_images(path: Path, batch_images: int = 64) -> NpzImages | FolderImages:
    """The images of a folder, or of an .npz.

    Args:
        path: the folder or file.
        batch_images: images per batch.

    Raises:
        DataError: as the two classes.
    """
    return FolderImages(path, batch_images) if path.is_dir() else NpzImages(path, batch_images)
