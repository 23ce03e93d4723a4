"""Finds the samples of one shard: image-text pairs in img2dataset's WebDataset layout.

A sample is the members of one key: an image (`.jpg`, `.jpeg`, `.png` or `.webp`), a `.txt` caption that may be missing,
and a `.json` record whose `width` and `height` are the stored size. Only headers, texts and records are read; an image
is read only when its record does not give its size.
"""

from __future__ import annotations

import enum
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitdance_scale.data.captions import choose_caption
from bitdance_scale.data.decode import read_size_px
from bitdance_scale.data.ledger import SampleFault
from bitdance_scale.data.reader import split_name
from bitdance_scale.data.tar_scan import Member, scan_members

_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Members that webdataset keeps for itself.
_META_NAME = re.compile(r"__[^/]*__($|/)")

COLUMN_DTYPES: dict[str, type] = {
    "image_offset": np.int64,
    "image_bytes": np.int64,
    "header_crc": np.uint32,
    "height_px": np.int32,
    "width_px": np.int32,
    "caption_status": np.uint8,
}


class IndexFault(enum.StrEnum):
    """What a scan finds wrong with a sample; the first two leave it out of the index."""

    MISSING_IMAGE = "missing_image"
    UNREADABLE_SIZE = "unreadable_size"
    INVALID_JSON = "invalid_json"
    DUPLICATE_MEMBER = "duplicate_member"


@dataclass(frozen=True)
class ShardContent:
    """The samples of one shard, in the order of their first members.

    Attributes:
        columns: one array [n] per entry of `COLUMN_DTYPES`.
        captions: UTF-8 caption of every sample, empty when it has none.
        names: key of every sample in the shard, as bytes.
        faults: how often each `IndexFault` was found.
    """

    columns: dict[str, np.ndarray]
    captions: list[bytes]
    names: list[bytes]
    faults: dict[str, int]


def scan_shard(path: str) -> ShardContent:
    """Reads headers, captions and records of a tar.

    Raises:
        DataError: the tar is missing, cut or damaged (see `tar_scan.scan_members`).
    """
    faults: Counter[str] = Counter()
    rows: list[tuple[int, ...]] = []
    captions: list[bytes] = []
    names: list[bytes] = []
    with open(path, "rb", buffering=0) as file:
        for key, members in _group(path, faults).items():
            image = next((members[extension] for extension in _IMAGE_EXTENSIONS if extension in members), None)
            if image is None:
                faults[IndexFault.MISSING_IMAGE] += 1
                continue
            record = _record(file.fileno(), members.get("json"), faults)
            size = _stored_size_px(file.fileno(), image, record)
            if size is None:
                faults[IndexFault.UNREADABLE_SIZE] += 1
                continue
            text = members.get("txt")
            caption, status = choose_caption(None if text is None else _content(file.fileno(), text), record)
            rows.append((image.offset, image.num_bytes, image.header_crc, *size, int(status)))
            captions.append(caption.encode("utf-8"))
            names.append(key.encode("utf-8", errors="surrogateescape"))
    values = zip(*rows, strict=True) if rows else [()] * len(COLUMN_DTYPES)
    columns = {
        name: np.array(column, dtype=dtype) for (name, dtype), column in zip(COLUMN_DTYPES.items(), values, strict=True)
    }
    return ShardContent(columns, captions, names, dict(faults))


def _group(path: str, faults: Counter[str]) -> dict[str, dict[str, Member]]:
    """Members by key and extension; of a repeated name the first counts."""
    samples: dict[str, dict[str, Member]] = {}
    for member in scan_members(path):
        parts = split_name(member.name)
        if parts is None or _META_NAME.match(member.name):
            continue
        key, extension = parts
        members = samples.setdefault(key, {})
        if extension in members:
            faults[IndexFault.DUPLICATE_MEMBER] += 1
        else:
            members[extension] = member
    return samples


def _content(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, member.num_bytes, member.offset)


def _record(descriptor: int, member: Member | None, faults: Counter[str]) -> dict[str, Any]:
    if member is None:
        return {}
    try:
        record = json.loads(_content(descriptor, member))
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return record
    faults[IndexFault.INVALID_JSON] += 1
    return {}


def _stored_size_px(descriptor: int, image: Member, record: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) by the record, else by the image's own header; None when neither tells."""
    sides = (record.get("height"), record.get("width"))
    if all(type(side) is int and 0 < side < 2**31 for side in sides):
        return sides
    try:
        return read_size_px(_content(descriptor, image))
    except SampleFault:
        return None
