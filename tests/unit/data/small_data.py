"""Small shards and a stand-in text tokenizer for the tests of the loader."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from bitdance_scale.sequence.layout import ImageTokens

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


@dataclasses.dataclass(frozen=True)
class CharacterTokenizer:
    """A stand-in for the text tokenizer: one token per character, the loader's part of the interface."""

    max_caption_tokens: int = 64
    vocab_size: int = 400
    image_tokens: ImageTokens = ImageTokens(301, 302, tuple(range(310, 342)), (350, 351, 352))

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)[: self.max_caption_tokens]

    def prompt_ids(self, caption: str) -> np.ndarray:
        return np.concatenate([[303, 1], self.encode(caption), [304, 303, 2]])

    def unconditional_ids(self) -> np.ndarray:
        return np.array([303, 2], dtype=np.int64)
