"""Small shards and a stand-in text tokenizer for the tests of the loader."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bitdance_scale.data.checksums import checksum32
from bitdance_scale.data.index.index import Index, Place, ShardEntry
from bitdance_scale.data.index.segment import Segment, text_columns
from bitdance_scale.data.index.tar_scan import BLOCK_BYTES, TarScan
from bitdance_scale.sequence.tokens import TextTokenizer

Members = dict[str, bytes]


def encode_image(height: int, width: int, seed: int = 0, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A smooth random picture, so that neighbouring decoders agree on it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    picture.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def sample_members(height: int, width: int, caption: str | None, seed: int = 0) -> Members:
    """Members of an img2dataset sample, by extension."""
    record = {"width": width, "height": height, "caption": caption, "key": f"{seed:09d}", "status": "success"}
    members = {"jpg": encode_image(height, width, seed), "json": json.dumps(record).encode()}
    if caption is not None:
        members["txt"] = caption.encode()
    return members


def write_tar(path: Path, samples: dict[str, Members]) -> Path:
    """Writes key -> extension -> content as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def members_of(path: str) -> list[Place]:
    """Places of the members of a tar, in the form that `ShardReader.read` takes."""
    content = Path(path).read_bytes()
    scan = TarScan(lambda offset, num_bytes: content[offset : offset + num_bytes], len(content))
    spans = [span for members in scan for span in zip(members.offsets, members.num_bytes, strict=True)]
    return [Place(path, at, size, checksum32(content[at - BLOCK_BYTES : at + size]), "") for at, size in spans]


def bare_index(
    height_px: np.ndarray,
    width_px: np.ndarray,
    shards: tuple[ShardEntry, ...] = (),
    *,
    originals_px: np.ndarray | None = None,
    status: np.ndarray | None = None,
    segment_sizes: Sequence[int] | None = None,
    **scores: Any,
) -> Index:
    """An index of sizes, caption statuses and `scores`, with no shards to read; in several segments if so asked."""
    count = len(height_px)
    columns = {
        "place": np.zeros((count, 3), np.uint32),
        "size_px": np.stack([height_px, width_px], axis=1).astype(np.uint16),
        "original_px": np.zeros((count, 2), np.uint16) if originals_px is None else originals_px.astype(np.uint16),
    } | {f"score.{field}": np.asarray(values, np.float32) for field, values in scores.items()}
    statuses = np.zeros(count, np.uint8) if status is None else status
    segments, start = [], 0
    for size in segment_sizes or [count]:
        rows = slice(start, start + size)
        text = text_columns("caption.caption", np.zeros(size, np.int64), statuses[rows], b"")
        segments.append(Segment({name: values[rows] for name, values in columns.items()} | text))
        start += size
    assert start == count
    return Index(shards, segments, captions=("caption",), scores=tuple(scores), digest="bare")


class CharacterTokenizer(TextTokenizer):
    """A stand-in for a trained text tokenizer: one token per byte."""

    def __init__(self, block_tokens: int = 4, max_caption_tokens: int = 64) -> None:
        markup = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
        added = [f"<|res_{cells}|>" for cells in range(1, 257)] + [f"<|query_{n}|>" for n in range(1, block_tokens)]
        super().__init__([*map(chr, range(256)), *markup, *added], len(added), block_tokens, max_caption_tokens)

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _text_entries(self) -> Sequence[int]:
        return range(256)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(index for index in ids if index < 256).decode()
