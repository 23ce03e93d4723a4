"""PNG files of every kind, written from their samples: what Pillow does not write is needed to test reading."""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def packed_rows(samples: np.ndarray, depth: int, is_interlaced: bool = False) -> bytes:
    """The rows of [h, w, c] samples before compression, each with another filter."""
    if not is_interlaced:
        return _filtered(samples, depth)
    return b"".join(_filtered(samples[top::down, left::across], depth) for left, top, across, down in ADAM7)


def write_png(
    samples: np.ndarray,
    depth: int,
    colour_type: int,
    is_interlaced: bool = False,
    before: bytes = b"",
    rows: bytes | None = None,
    idat_bytes: int = 1000,
) -> bytes:
    """A PNG of [h, w, c] samples.

    Args:
        samples: integers of `depth` bits.
        depth: bits of a sample.
        colour_type: as in the standard: 0, 2, 3, 4 or 6.
        is_interlaced: whether in the seven passes of Adam7.
        before: chunks between header and rows.
        rows: compressed rows, if not those of the samples.
        idat_bytes: bytes of compressed rows in a chunk.
    """
    height, width, _ = samples.shape
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(is_interlaced))
    if rows is None:
        rows = zlib.compress(packed_rows(samples, depth, is_interlaced))
    parts = [chunk(b"IDAT", rows[start : start + idat_bytes]) for start in range(0, len(rows), idat_bytes)]
    return SIGNATURE + chunk(b"IHDR", header) + before + b"".join(parts) + chunk(b"IEND", b"")


def _filtered(samples: np.ndarray, depth: int) -> bytes:
    height, width, num_samples = samples.shape
    if not height or not width:
        return b""
    if depth == 16:
        rows = samples.astype(">u2").view(np.uint8).reshape(height, -1)
    elif depth == 8:
        rows = samples.astype(np.uint8).reshape(height, -1)
    else:
        bits = (samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    step = max(1, depth * num_samples // 8)
    rows = rows.astype(int)
    left = np.pad(rows, ((0, 0), (step, 0)))[:, : rows.shape[1]]
    above = np.pad(rows, ((1, 0), (0, 0)))[:height]
    corner = np.pad(left, ((1, 0), (0, 0)))[:height]
    near = left + above - corner
    distances = np.abs([near - left, near - above, near - corner])
    paeth = np.choose(distances.argmin(axis=0), [left, above, corner])
    predictions = [0 * rows, left, above, (left + above) // 2, paeth]
    return b"".join(
        bytes([y % 5]) + ((rows - predictions[y % 5])[y] % 256).astype(np.uint8).tobytes() for y in range(height)
    )
