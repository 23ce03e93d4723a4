"""JPEG files: whether they are complete, and their samples.

libjpeg fills what is missing with grey and only warns. Two checks refuse such files: `parse` walks all markers and
counts what a complete picture needs, and TurboJPEG decodes so that its first warning is an error. Bytes after the end
marker are not read, so the first picture of an MPO is decoded, and files with trailing bytes are sound.

Entropy-coded data have no checksum: most flipped bits give other pixels without any warning, in every decoder.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

import numpy as np
import simplejpeg

from bitdance_scale.data.images.limits import (
    MAX_CHUNKS,
    MAX_PROFILE_BYTES,
    MAX_SCAN_PIXELS,
    MAX_SCANS,
    bad_image,
    too_expensive,
    unsupported,
)

_DHT, _SOI, _EOI, _SOS, _DRI, _DNL, _APP0, _APP2 = 0xC4, 0xD8, 0xD9, 0xDA, 0xDD, 0xDC, 0xE0, 0xE2
_RESTARTS = range(0xD0, 0xD8)
_TEM = 0x01
_SEQUENTIAL, _PROGRESSIVE, _ARITHMETIC = (0xC0, 0xC1, 0xC9), (0xC2, 0xCA), (0xC9, 0xCA)
"""Start of frame, Huffman or arithmetic."""
_OTHER_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC, *_SEQUENTIAL, *_PROGRESSIVE}
_ICC_PREFIX = b"ICC_PROFILE\x00"
_UNSEEN = 255
_fill = re.compile(rb"\xff+").match
_NUM_COMPONENTS = (1, 3, 4)


@dataclass
class _Component:
    """One colour component of the frame, and which of its coefficients the scans have sent.

    Attributes:
        across: horizontal sampling factor.
        down: vertical sampling factor.
        precision: uint8 [64]: lowest bit sent of each coefficient, or `_UNSEEN`.
    """

    across: int
    down: int
    precision: np.ndarray = field(default_factory=lambda: np.full(64, _UNSEEN, np.uint8))


@dataclass
class JpegFile:
    """A JPEG whose markers describe a complete picture.

    Attributes:
        data: the file; fields that decoders ignore, but warn of, have their usual values.
        num_components: 1, 3 or 4.
        profile: ICC profile; None: none, or it is not complete.
    """

    data: bytes
    num_components: int
    profile: bytes | None


def parse(data: bytes) -> JpegFile:
    """Walks the markers up to the end of the first picture.

    Raises:
        SampleError: a marker, scan, restart interval or coefficient is missing, or the file has more scans than any
            encoder writes, or it is of a kind that is not decoded (lossless, hierarchical, 12 bits, two components).
    """
    return _Walk(data).file()


def decode(jpeg: JpegFile, is_half_size: bool = False, size_px: tuple[int, int] = (0, 0)) -> np.ndarray:
    """The samples, with chroma upsampled and YCbCr converted; grey without a profile becomes RGB.

    Args:
        jpeg: what `parse` returned.
        is_half_size: whether to decode at half the size, with odd sides rounded up.
        size_px: (height, width) as stored; only needed at half size.

    Returns:
        uint8 [height, width, c], with c = 1 (grey), 3 (RGB) or 4 (CMYK, 0 is no ink).

    Raises:
        SampleError: the data are corrupt.
    """
    height, width = size_px
    half = {"min_height": -(-height // 2), "min_width": -(-width // 2), "min_factor": 2} if is_half_size else {}
    space = {1: "GRAY" if jpeg.profile else "RGB", 3: "RGB", 4: "CMYK"}[jpeg.num_components]
    try:
        samples = simplejpeg.decode_jpeg(jpeg.data, space, strict=True, **half)
    except Exception as error:
        if "subsampling" in str(error):
            raise unsupported("JPEG with an unusual chroma subsampling") from error
        raise bad_image(f"JPEG: {error}") from error
    # All programs that write CMYK JPEGs follow Adobe, who stored 255 for no ink.
    return 255 - samples if jpeg.num_components == 4 else samples


class _Walk:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 2
        self._patches: list[tuple[int, bytes]] = []
        self._profile_parts: dict[int, bytes] = {}
        self._num_profile_parts = 0
        self._components: dict[int, _Component] = {}
        self._size_px = (0, 0)
        self._is_progressive = False
        self._restart_interval = 0
        self._num_scans = 0
        self._is_arithmetic = False
        self._huffman_tables: set[int] = set()
        self._markers: np.ndarray | None = None

    def file(self) -> JpegFile:
        """Walks to the end marker."""
        for _ in range(MAX_CHUNKS):
            marker = self._marker()
            if marker == _EOI:
                break
            # Some encoders also write a restart marker behind the last interval.
            if marker == _TEM or marker in _RESTARTS:
                continue
            if marker == _SOI:
                raise bad_image(f"JPEG: marker {marker:02X} at byte {self._place - 2} is out of place")
            self._segment(marker)
        else:
            raise too_expensive(f"JPEG: more than {MAX_CHUNKS} segments")
        self._check_complete()
        data = self._data
        if self._patches:
            patched = bytearray(data)
            for place, content in self._patches:
                patched[place : place + len(content)] = content
            data = bytes(patched)
        return JpegFile(data, len(self._components), self._profile())

    def _marker(self) -> int:
        # Any number of FF may come before the code.
        match = _fill(self._data, self._place)
        code = self._data[match.end() : match.end() + 1] if match else b""
        if not match or code in (b"", b"\x00"):
            found = "not there" if self._place < len(self._data) else "behind the end of the file"
            raise bad_image(f"JPEG: the marker at byte {self._place} is {found}")
        self._place = match.end() + 1
        return code[0]

    def _segment(self, marker: int) -> None:
        start = self._place
        length = int.from_bytes(self._data[start : start + 2], "big")
        content = self._data[start + 2 : start + length]
        if length < 2 or len(content) != length - 2:
            raise bad_image(f"JPEG: segment {marker:02X} at byte {start - 2} is cut")
        self._place = start + length
        if marker in _SEQUENTIAL or marker in _PROGRESSIVE:
            self._is_arithmetic = marker in _ARITHMETIC
            self._frame(content, marker in _PROGRESSIVE)
        elif marker in _OTHER_FRAMES:
            raise unsupported(f"JPEG of process SOF{marker - 0xC0}, lossless or hierarchical")
        elif marker == _SOS:
            self._scan(content, start + 2)
        elif marker == _DHT:
            self._note_tables(content)
        elif marker == _DRI:
            if len(content) != 2:
                raise bad_image("JPEG: the restart interval has not two bytes")
            self._restart_interval = int.from_bytes(content, "big")
        elif marker == _DNL:
            raise bad_image("JPEG: the number of lines is changed after the frame header")
        elif marker == _APP0 and content[:5] == b"JFIF\x00" and content[5:6] not in (b"", b"\x01"):
            self._patches.append((start + 7, b"\x01"))
        elif marker == _APP2 and content[:12] == _ICC_PREFIX:
            # TurboJPEG would warn of a profile whose parts are not complete.
            self._patches.append((start + 2, b"icc"))
            if len(content) > 14:
                self._profile_parts.setdefault(content[12], content[14:])
                self._num_profile_parts = content[13]

    def _frame(self, content: bytes, is_progressive: bool) -> None:
        if self._components:
            raise bad_image("JPEG: two frame headers")
        if len(content) < 6 or len(content) != 6 + 3 * content[5]:
            raise bad_image("JPEG: the frame header has a wrong length")
        bits, height, width, num_components = struct.unpack_from(">BHHB", content)
        if bits != 8:
            raise unsupported(f"JPEG of {bits} bits a sample")
        if num_components not in _NUM_COMPONENTS:
            raise unsupported(f"JPEG of {num_components} components")
        self._size_px, self._is_progressive = (height, width), is_progressive
        for place in range(6, len(content), 3):
            across, down = content[place + 1] >> 4, content[place + 1] & 15
            if not (1 <= across <= 4 and 1 <= down <= 4):
                raise bad_image(f"JPEG: sampling factors {across} x {down}")
            self._components[content[place]] = _Component(across, down)
        if len(self._components) != num_components:
            raise bad_image("JPEG: two components have the same number")

    def _scan(self, content: bytes, start: int) -> None:
        num_components = content[0] if content else 0
        if not 1 <= num_components <= 4 or len(content) != 4 + 2 * num_components:
            raise bad_image("JPEG: a scan header has a wrong length")
        names = content[1 : 1 + 2 * num_components : 2]
        if len(set(names)) != num_components or not set(names) <= self._components.keys():
            raise bad_image("JPEG: a scan has components that the frame does not have")
        self._num_scans += 1
        pixels = self._size_px[0] * self._size_px[1]
        if self._num_scans > MAX_SCANS or self._num_scans * pixels > MAX_SCAN_PIXELS:
            raise too_expensive(f"JPEG: {self._num_scans} scans or more of {pixels} pixels")
        components = [self._components[name] for name in names]
        first, last, bits = content[-3:]
        if not self._is_progressive:
            # Some cameras leave these fields, which say nothing in a sequential file, at zero.
            if (first, last, bits) != (0, 63, 0):
                self._patches.append((start + len(content) - 3, b"\x00\x3f\x00"))
            first, last, bits = 0, 63, 0
        self._check_tables(content[2 : 2 + 2 * num_components : 2], first, last, bits >> 4)
        self._send(components, first, last, bits >> 4, bits & 15)
        self._skip_entropy_coded(components)

    def _note_tables(self, content: bytes) -> None:
        place = 0
        while place < len(content):
            self._huffman_tables.add(content[place])
            place += 17 + sum(content[place + 1 : place + 17])
        if place != len(content):
            raise bad_image("JPEG: the Huffman tables have a wrong length")

    def _check_tables(self, selectors: bytes, first: int, last: int, before: int) -> None:
        """Without this, libjpeg would take the tables of the standard's example for those that are missing."""
        if self._is_arithmetic:
            return
        for selector in selectors:
            mean, detail = selector >> 4, 0x10 | selector & 15
            is_missing = (first == 0 and not before and mean not in self._huffman_tables) or (
                last > 0 and detail not in self._huffman_tables
            )
            if is_missing:
                raise bad_image(f"JPEG: a scan uses Huffman tables {selector:02X}, which are missing")

    def _send(self, components: list[_Component], first: int, last: int, before: int, low: int) -> None:
        """Notes which bits of which coefficients a scan sends: down to bit `low`, after a scan down to `before`."""
        if not first <= last <= 63 or (first == 0 < last and self._is_progressive) or (first and len(components) > 1):
            raise bad_image(f"JPEG: a scan of coefficients {first} to {last} of {len(components)} components")
        for component in components:
            sent = component.precision[first : last + 1]
            if first and component.precision[0] == _UNSEEN:
                raise bad_image("JPEG: details come before the means")
            expected = before if before else _UNSEEN
            if low > 13 or (before and low != before - 1) or (sent != expected).any():
                raise bad_image(f"JPEG: a scan of bits {before} to {low} does not follow what was sent")
            sent[:] = low

    def _skip_entropy_coded(self, components: list[_Component]) -> None:
        start, interval = self._place, self._restart_interval
        if self._markers is None:
            self._markers = _markers(self._data, start)
        markers = self._markers
        first = stop = int(np.searchsorted(markers, start))
        if interval:
            expected = (self._num_units(components) - 1) // interval
            codes = np.frombuffer(self._data, np.uint8)[markers[first : first + expected] + 1]
            stop += expected
            if len(codes) != expected or (codes != 0xD0 + np.arange(expected) % 8).any():
                raise bad_image(f"JPEG: the {expected} restart markers of a scan are not there, or not in their order")
        if stop == len(markers):
            raise bad_image("JPEG: the file ends inside a scan")
        self._place = int(markers[stop])
        # An arithmetic coder leaves zeros at the end of a scan away.
        if self._place == start and not self._is_arithmetic:
            raise bad_image(f"JPEG: the scan at byte {start} is empty")

    def _num_units(self, components: list[_Component]) -> int:
        """Coded units (MCUs) of a scan: blocks of a single component, or of the whole pattern of several."""
        height, width = self._size_px
        down, across = (max(getattr(c, side) for c in self._components.values()) for side in ("down", "across"))
        if len(components) == 1:
            (one,) = components
            height, width = -(-height * one.down // down), -(-width * one.across // across)
            down = across = 1
        return -(-height // (8 * down)) * -(-width // (8 * across))

    def _check_complete(self) -> None:
        if not self._components:
            raise bad_image("JPEG: the picture ends before its frame header")
        for name, component in self._components.items():
            missing = np.flatnonzero(component.precision)
            if len(missing):
                raise bad_image(f"JPEG: coefficient {missing[0]} of component {name} is not complete")

    def _profile(self) -> bytes | None:
        num_parts = self._num_profile_parts
        if not num_parts or set(self._profile_parts) != set(range(1, num_parts + 1)):
            return None
        profile = b"".join(self._profile_parts[part] for part in range(1, num_parts + 1))
        return profile if len(profile) <= MAX_PROFILE_BYTES else None


def _markers(data: bytes, start: int) -> np.ndarray:
    """int64 [n], the bytes FF behind `start` that neither a 00 (a sample) nor another FF (padding) follows."""
    content = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(content[start:-1] == 0xFF) + start
    codes = content[places + 1]
    return places[(codes != 0) & (codes != 0xFF)]
