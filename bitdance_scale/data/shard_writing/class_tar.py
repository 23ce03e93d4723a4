"""A tar with a tar of pictures for every class, as ImageNet's official ILSVRC2012_img_train.tar.

Nothing is extracted: the headers are walked once, and a picture is then read where it lies.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bitdance_scale.data.index.tar_scan import TarScan
from bitdance_scale.data.shard_writing.picture_folder import PICTURE_EXTENSIONS
from bitdance_scale.data.shard_writing.source import SourcePicture, digest_of, kind_of_file
from bitdance_scale.errors import DataError, printable
from bitdance_scale.wording import first_few

# Less than a picture, so that of most members little more than the header is read.
_WINDOW_BYTES = 1 << 12


class _Member(NamedTuple):
    """A file in a tar: its path, first byte from the start of the outermost tar, and length."""

    name: str
    offset: int
    num_bytes: int

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def extension(self) -> str:
        return os.path.splitext(self.name)[1][1:].lower()


class ClassTar:
    """The pictures in the tars of a tar (a `PictureSource`), by the bytes of their names: `n01440764/xyz.JPEG`.

    Args:
        path: the outer tar.

    Attributes:
        names: path of each picture, with its class as the first folder.
        class_names: the classes, one for each inner tar.

    Raises:
        DataError: a tar is cut, damaged or compressed, holds pictures beside the tars of classes, or two tars are of
            the same class.
    """

    kind = "tar of classes"

    def __init__(self, path: Path) -> None:
        self._path = path
        left_out: Counter[str] = Counter()
        pictures: list[_Member] = []
        with path.open("rb") as file:
            tars = self._tars(file.fileno(), left_out)
            for class_name, tar in tars.items():
                named = f"{path}: {tar.name}"
                for member in _members(file.fileno(), tar.offset, tar.num_bytes, named, left_out):
                    if member.extension in PICTURE_EXTENSIONS:
                        name = f"{class_name}/{member.name.removeprefix(f'{class_name}/')}"
                        pictures.append(member._replace(name=name))
                    else:
                        left_out[kind_of_file(member.extension)] += 1
        self._pictures = sorted(pictures, key=lambda picture: os.fsencode(picture.name))
        self.names = [picture.name for picture in self._pictures]
        self.class_names = list(tars)
        self.num_bytes = np.array([picture.num_bytes for picture in self._pictures], np.int64)
        self.digest = digest_of(text for picture in self._pictures for text in (picture.name, str(picture.num_bytes)))
        self.left_out = dict(sorted(left_out.items()))

    def can_start_at(self, position: int) -> bool:
        """Anywhere."""
        return True

    def pictures(self, start: int, stop: int) -> Iterator[SourcePicture]:
        """The pictures from `start` to `stop`."""
        with self._path.open("rb") as file:
            for picture in self._pictures[start:stop]:
                content = os.pread(file.fileno(), picture.num_bytes, picture.offset)
                if len(content) < picture.num_bytes:
                    raise DataError(f"{self._path}: has become shorter since packing began; fetch it again")
                yield SourcePicture(printable(picture.name), content)

    def without_caption(self) -> Iterator[str]:
        """All pictures: a tar of classes has no captions."""
        return map(printable, self.names)

    def _tars(self, descriptor: int, left_out: Counter[str]) -> dict[str, _Member]:
        """Class -> its tar."""
        path, tars, pictures = self._path, dict[str, _Member](), list[str]()
        for member in _members(descriptor, 0, os.fstat(descriptor).st_size, str(path), left_out):
            if member.extension == "tar":
                class_name = member.base.removesuffix(member.base[-4:])
                if class_name in tars:
                    raise DataError(
                        f"{path}: {tars[class_name].name} and {member.name} are of the same class; a class has one tar"
                    )
                tars[class_name] = member
            elif member.extension in PICTURE_EXTENSIONS:
                pictures.append(member.name)
            elif ".tar." in member.base or member.extension in ("tgz", "tbz2", "txz", "zip"):
                raise DataError(f"{path}: {member.name} is compressed, and cannot be read in place; unpack it")
            else:
                left_out[kind_of_file(member.extension)] += 1
        if pictures and not tars:
            raise DataError(
                f"{path}: holds pictures ({first_few(pictures)}) and no tar of a class, so it is a shard already: "
                f"bitdance index {path}"
            )
        if pictures:
            raise DataError(
                f"{path}: {len(pictures)} pictures lie beside the tars of classes, and so have no class "
                f"({first_few(pictures)}); move them into the tar of their class"
            )
        return tars


def _members(descriptor: int, start: int, total_bytes: int, named: str, left_out: Counter[str]) -> Iterator[_Member]:
    """The files of a tar that lies in a file; names with a leading dot and links are counted in `left_out`.

    Raises:
        DataError: the tar is cut, damaged or none: how many pictures it has lost nobody can tell.
    """
    scan = TarScan(_reader(descriptor, start, total_bytes), total_bytes, _WINDOW_BYTES)
    for members in scan:
        for name, offset, num_bytes in zip(members.names, members.offsets, members.num_bytes, strict=True):
            member = _Member(os.fsdecode(name).removeprefix("./"), start + offset, num_bytes)
            if any(part.startswith(".") for part in member.name.split("/")):
                left_out["hidden"] += 1
            else:
                yield member
    if scan.tar_errors:
        error = scan.tar_errors[0]
        raise DataError(f"{named}: byte {error.offset}: {error.problem}; fetch it again, or rebuild it")
    if scan.links:
        left_out["link"] += len(scan.links)


def _reader(descriptor: int, start: int, total_bytes: int) -> Callable[[int, int], bytes]:
    def read(offset: int, num_bytes: int) -> bytes:
        return os.pread(descriptor, max(0, min(num_bytes, total_bytes - offset)), start + offset)

    return read
