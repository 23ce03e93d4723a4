"""Groups the members of a tar into samples.

As in webdataset, the key of a member is its name up to the first dot of the file name, and its extension is the rest in
lower case: `a/0001.syn.json` has key `a/0001` and extension `syn.json`. Members of a sample need not be neighbours. If
the same member comes twice, the later run of members is another sample with the same key, such as in two tars that were
joined: it is left out as a whole and counted, so that no caption gets the image of another sample.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Container, Iterator, Set
from typing import Any, NamedTuple

from bitdance_scale.data.captions import MAX_TEXT_BYTES
from bitdance_scale.data.checksums import checksum32
from bitdance_scale.data.images.header import Header, sniff
from bitdance_scale.data.images.limits import MAX_IMAGE_BYTES
from bitdance_scale.data.index.shard_errors import ShardError
from bitdance_scale.data.index.tar_scan import BLOCK_BYTES, Members, ReadRange, TarScan

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
DOTTED = "a name with dots"
"""Key in a `Sample` of the number of images that have a dot before their extension; no extension has spaces."""
_DOTTED_IMAGES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
# Folders that webdataset reserves for itself.
_META_FOLDER = re.compile(rb"__[^/]*__/")
_UNREADABLE_TEXT = b"\xff"
"""Neither valid UTF-8 nor valid JSON."""


class ImageMember(NamedTuple):
    """The image file of a sample.

    Attributes:
        offset: first byte of its content in the tar.
        num_bytes: length of the content.
        checksum: of the tar header and the content (`checksums.checksum32`).
        header: what its first bytes say; None if they are no image.
    """

    offset: int
    num_bytes: int
    checksum: int
    header: Header | None


Sample = dict[str, Any]
"""Extension -> `ImageMember`, or the `ShardError` why there is none; the bytes of a text; None for an unused member."""


def group_members(
    scan: TarScan, read: ReadRange, text_extensions: Set[str], errors: Counter[str]
) -> dict[bytes, Sample]:
    """Key -> members of the sample, in the order of first members; samples of hard links come last.

    Args:
        scan: the walk, not begun.
        read: reads a range of the tar.
        text_extensions: members that are read as texts.
        errors: counts `ShardError`.
    """
    grouping = _Grouping(read, text_extensions, errors)
    for members in scan:
        grouping.take(members)
    grouping.end_run()
    if scan.links:
        grouping.take_links(scan)
    return grouping.samples


class _Grouping:
    def __init__(self, read: ReadRange, text_extensions: Set[str], errors: Counter[str]) -> None:
        self.samples: dict[bytes, Sample] = {}
        self._read, self._text_extensions, self._errors = read, text_extensions, errors
        self._key: bytes | None = None
        # The members of the present key since it came up.
        self._run: Sample = {}
        self._extensions: dict[bytes, str] = {}

    def take(self, members: Members) -> None:
        """Adds some members of the tar."""
        for name, offset, num_bytes in zip(members.names, members.offsets, members.num_bytes, strict=True):
            split = self._open_run(name)
            if split is None:
                continue
            if split in IMAGE_EXTENSIONS:
                self._run[split] = self._image(members, offset, num_bytes)
            else:
                self._run[split] = self._text(members, split, offset, num_bytes)
                if split.endswith(_DOTTED_IMAGES):
                    self._run[DOTTED] = self._run.get(DOTTED, 0) + 1

    def end_run(self) -> None:
        """Adds the present run to the samples."""
        key, run = self._key, self._run
        self._key, self._run = None, {}
        if key is None or (key[:2] == b"__" and _META_FOLDER.match(key) is not None):
            return
        known = self.samples.setdefault(key, run)
        if known is run:
            return
        repeated = [extension for extension in run if extension in known and extension != DOTTED]
        if not repeated:
            known |= run | {DOTTED: known.get(DOTTED, 0) + run.get(DOTTED, 0)}
        elif not has_image(run):
            self._errors[ShardError.DUPLICATE_MEMBER] += len(repeated)
        elif has_image(known):
            self._errors[ShardError.DUPLICATE_SAMPLE] += 1
        else:
            # The earlier one has lost its image.
            self._errors[ShardError.MISSING_IMAGE] += 1
            self.samples[key] = run

    def take_links(self, scan: TarScan) -> None:
        """Adds the members that are links: hard links with the content that they share, symbolic ones as lost."""
        places = dict(self._places(scan))
        for link in scan.links:
            extension = self._open_run(link.name)
            place = None if link.is_symbolic else places.get(_normal(link.target))
            if place is not None:
                places.setdefault(_normal(link.name), place)
            if extension is None:
                continue
            alone = Members(b"", 0, [], [], [])
            if extension in IMAGE_EXTENSIONS:
                lost = ShardError.SYMBOLIC_LINK if link.is_symbolic else ShardError.BROKEN_LINK
                self._run[extension] = self._image(alone, *place) if place is not None else lost
            elif extension in self._text_extensions:
                self._run[extension] = self._text(alone, extension, *place) if place is not None else _UNREADABLE_TEXT
        self.end_run()

    @staticmethod
    def _places(scan: TarScan) -> Iterator[tuple[bytes, tuple[int, int]]]:
        """Path -> offset and length of the members that hard links name; the headers are walked once more."""
        wanted = {_normal(link.target) for link in scan.links if not link.is_symbolic}
        if wanted:
            for members in scan.again():
                for name, offset, size in zip(members.names, members.offsets, members.num_bytes, strict=True):
                    if (path := _normal(name)) in wanted:
                        yield path, (offset, size)

    def _open_run(self, name: bytes) -> str | None:
        """Makes the key of a member the present one and returns its extension; None if the name has no key."""
        begin = name.rfind(b"/") + 1
        dot = name.find(b".", begin)
        if dot <= begin:
            return None
        extension = self._extensions.get(name[dot + 1 :])
        if extension is None:
            extension = name[dot + 1 :].decode("utf-8", errors="replace").lower()
            self._extensions[name[dot + 1 :]] = extension
        key = name[:dot]
        if key != self._key or extension in self._run:
            self.end_run()
            self._key = key
        return extension

    def _image(self, members: Members, offset: int, num_bytes: int) -> ImageMember | ShardError:
        if num_bytes > MAX_IMAGE_BYTES:
            return ShardError.TOO_LARGE
        begin = offset - BLOCK_BYTES - members.start
        content = memoryview(members.window)[begin : begin + BLOCK_BYTES + num_bytes]
        if len(content) < BLOCK_BYTES + num_bytes or begin < 0:
            content = memoryview(self._read(offset - BLOCK_BYTES, BLOCK_BYTES + num_bytes))
        return ImageMember(offset, num_bytes, checksum32(content), sniff(content[BLOCK_BYTES:]))

    def _text(self, members: Members, extension: str, offset: int, num_bytes: int) -> bytes | None:
        if extension not in self._text_extensions:
            return None
        if num_bytes > MAX_TEXT_BYTES:
            return _UNREADABLE_TEXT
        begin = offset - members.start
        if begin >= 0 and begin + num_bytes <= len(members.window):
            return members.window[begin : begin + num_bytes]
        return self._read(offset, num_bytes)


def is_ambiguous(extensions: Container[str]) -> bool:
    """Whether a sample has two JPEGs. A `.png` or `.webp` beside a JPEG is taken for something else, such as a mask."""
    return "jpg" in extensions and "jpeg" in extensions


def has_image(sample: Sample) -> bool:
    """Whether a sample has an image, or a reason why there is none."""
    return any(extension in sample for extension in IMAGE_EXTENSIONS)


def _normal(path: bytes) -> bytes:
    return posixpath.normpath(path)
