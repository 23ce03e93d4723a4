"""A corpus of broken shards and samples: nothing crashes, and every skipped sample is counted."""

from __future__ import annotations

import dataclasses
import io
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitdance_scale.config.data_schema import Resolution
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.data_errors import SampleError
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.reader import ShardReader
from tests.unit.data.small_data import Members, sample_members, write_tar

NUM_SOUND = 6
SIZE_PX = (40, 60)
Change = Callable[[bytes, dict[str, int]], bytes]


def replaced(members: Members, **changes: bytes | None) -> Members:
    """The members with some replaced; None removes one, and `_` in a name means a dot."""
    changed = members | {name.replace("_", "."): content for name, content in changes.items()}
    return {name: content for name, content in changed.items() if content is not None}


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.effect_mandelbrot(SIZE_PX[::-1], (-3, -2.5, 2, 2.5), 50).convert(mode).save(file, kind, **options)
    return file.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", SIZE_PX[::-1], color) for color in ("red", "blue", "green")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def bomb() -> bytes:
    """A JPEG whose header claims 60000 x 60000 pixels."""
    data = bytearray(saved("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 60000, 60000)
    return bytes(data)


@dataclass(frozen=True)
class Case:
    """A shard of sound samples and one more sample, and what must be counted.

    Attributes:
        sample: changes the members of the last sample.
        shard: changes the bytes of the shard; also gets the place of the header of each member.
        shard_errors: shard errors that the index counts.
        sample_errors: sample errors that the loader counts in one pass.
        num_trained: samples that are trained on.
    """

    sample: Callable[[Members], Members] = lambda members: members
    shard: Change = lambda content, headers: content
    shard_errors: dict[str, int] = field(default_factory=dict)
    sample_errors: dict[str, int] = field(default_factory=dict)
    num_trained: int = NUM_SOUND + 1


def put(content: bytes, offset: int, value: bytes) -> bytes:
    return content[:offset] + value + content[offset + len(value) :]


SKIPPED = {"num_trained": NUM_SOUND}
CASES = {
    "nothing": Case(),
    "tar cut in a header": Case(shard=lambda c, h: c[: h["6.jpg"] + 100], shard_errors={"damaged_tar": 1}, **SKIPPED),
    "tar cut in a body": Case(shard=lambda c, h: c[: h["6.jpg"] + 700], shard_errors={"damaged_tar": 1}, **SKIPPED),
    "tar cut between the members of a sample": Case(
        shard=lambda c, h: c[: h["6.json"]], shard_errors={"damaged_tar": 1}, sample_errors={"missing_caption": 1}
    ),
    "flipped byte in the header of an image": Case(
        shard=lambda c, h: put(c, h["3.jpg"] + 5, b"#"), shard_errors={"damaged_tar": 1, "missing_image": 1}, **SKIPPED
    ),
    "flipped byte in the header of a caption": Case(
        shard=lambda c, h: put(c, h["3.txt"], b"#"), shard_errors={"damaged_tar": 1}
    ),
    "zeroed block at a header": Case(
        shard=lambda c, h: put(c, h["3.jpg"], bytes(512)),
        shard_errors={"damaged_tar": 1, "missing_image": 1},
        **SKIPPED,
    ),
    "repeated key": Case(shard=lambda c, h: c[: h["end"]] + c, shard_errors={"duplicate_sample": NUM_SOUND + 1}),
    "no image": Case(lambda m: replaced(m, jpg=None), shard_errors={"missing_image": 1}, **SKIPPED),
    "no record": Case(lambda m: replaced(m, json=None)),
    "empty caption": Case(lambda m: replaced(m, txt=b" \n"), sample_errors={"empty_caption": 1}),
    "no caption": Case(
        lambda m: replaced(m, txt=None, json=b'{"width": 60, "height": 40}'), sample_errors={"missing_caption": 1}
    ),
    "caption in another encoding": Case(
        lambda m: replaced(m, txt="größe".encode("latin-1")), sample_errors={"invalid_caption": 1}
    ),
    "truncated JPEG": Case(lambda m: replaced(m, jpg=m["jpg"][:-200]), sample_errors={"bad_image": 1}, **SKIPPED),
    "JPEG bomb by its header": Case(lambda m: replaced(m, jpg=bomb()), sample_errors={"too_many_pixels": 1}, **SKIPPED),
    "JPEG bomb without a record": Case(
        lambda m: replaced(m, jpg=bomb(), json=None), shard_errors={"unreadable_size": 1}, **SKIPPED
    ),
    "another size than the record says": Case(
        lambda m: replaced(m, json=b'{"width": 61, "height": 40}'), sample_errors={"size_mismatch": 1}, **SKIPPED
    ),
    "CMYK JPEG": Case(lambda m: replaced(m, jpg=saved("JPEG", "CMYK"))),
    "palette PNG": Case(lambda m: replaced(m, jpg=None, png=saved("PNG", "P"))),
    "animated WebP": Case(lambda m: replaced(m, jpg=None, webp=animated("WEBP"))),
    "animated PNG": Case(lambda m: replaced(m, jpg=None, png=animated("PNG"))),
    "PNG called a JPEG": Case(lambda m: replaced(m, jpg=saved("PNG"))),
    "GIF called a JPEG": Case(lambda m: replaced(m, jpg=saved("GIF")), sample_errors={"bad_image": 1}, **SKIPPED),
    "web page called a JPEG": Case(
        lambda m: replaced(m, jpg=b"<html>404</html>"), sample_errors={"bad_image": 1}, **SKIPPED
    ),
    "image of no bytes": Case(lambda m: replaced(m, jpg=b""), sample_errors={"bad_image": 1}, **SKIPPED),
    "image of no bytes, no record": Case(
        lambda m: replaced(m, jpg=b"", json=None), shard_errors={"unreadable_size": 1}, **SKIPPED
    ),
    "record that is no JSON": Case(lambda m: replaced(m, json=b'{"width": 6'), shard_errors={"invalid_json": 1}),
    "record of NaN": Case(lambda m: replaced(m, json=b'{"width": 60, "height": 40, "punsafe": NaN}')),
}


def write(folder: Path, case: Case) -> str:
    samples = {str(n): sample_members(*SIZE_PX, "red", n) for n in range(NUM_SOUND)}
    samples[str(NUM_SOUND)] = case.sample(sample_members(*SIZE_PX, "red", NUM_SOUND))
    path = write_tar(folder / "0.tar", samples)
    with tarfile.open(path) as tar:
        headers = {member.name: member.offset for member in tar}
        headers["end"] = tar.offset
    path.write_bytes(case.shard(path.read_bytes(), headers))
    return str(path)


def one_pass(config: RunConfig, index: Index, tokenizer) -> tuple[int, dict[str, int]]:
    """Samples trained, and sample errors by cause, of a loader that goes through the index once."""
    resolution = Resolution(side_px=16, share=1, buckets_px=((16, 16),))
    data = dataclasses.replace(config.data, resolutions=(resolution,), global_batch=len(index), text_drop=0.0)
    with Loader(dataclasses.replace(config, data=data), tokenizer, index, 0, 1) as loader:
        step = loader.next_step()
        counts = {cause: sum(shards.values()) for cause, shards in loader.error_counter.counts().items()}
    assert counts == {str(cause): count for cause, count in step.sample_errors.items()}
    return len(index) - step.num_skipped, counts


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path, make_config, tokenizer) -> None:
    case = CASES[name]
    shard = write(tmp_path, case)
    index = build_index([shard], tmp_path / "index")
    assert {error: shards[shard] for error, shards in index.errors().items()} == case.shard_errors
    assert one_pass(make_config([shard]), index, tokenizer) == (case.num_trained, case.sample_errors)


def test_shard_replaced_after_indexing(tmp_path: Path, make_config, tokenizer) -> None:
    shard = write(tmp_path, Case())
    index = build_index([shard], tmp_path / "index")
    write_tar(Path(shard), {f"other{n}": sample_members(*SIZE_PX, "blue", n) for n in range(20)})
    assert one_pass(make_config([shard]), index, tokenizer) == (0, {"shard_changed": NUM_SOUND + 1})


def test_one_bit_flipped_in_every_image_after_indexing(tmp_path: Path, make_config, tokenizer) -> None:
    """Nearly all of them would still decode. The message says which bytes of which shard have changed."""
    shard = write(tmp_path, Case())
    index = build_index([shard], tmp_path / "index")
    content = bytearray(Path(shard).read_bytes())
    for sample in range(len(index)):
        place = index.place(sample)
        content[place.offset + place.num_bytes // 2] ^= 4
    Path(shard).write_bytes(content)
    assert one_pass(make_config([shard]), index, tokenizer) == (0, {"shard_changed": NUM_SOUND + 1})
    place = index.place(3)
    with pytest.raises(
        SampleError, match=rf"shard_changed: bytes {place.offset - 512}..{place.offset + place.num_bytes}:"
    ):
        ShardReader().image(index, 3)


def test_shard_cut_after_indexing(tmp_path: Path, make_config, tokenizer) -> None:
    shard = write(tmp_path, Case())
    index = build_index([shard], tmp_path / "index")
    Path(shard).write_bytes(Path(shard).read_bytes()[: index.place(4).offset])
    assert one_pass(make_config([shard]), index, tokenizer) == (4, {"read_failed": NUM_SOUND - 3})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_bytes_are_counted(tmp_path_factory, make_config_once, tokenizer_once, seed: int) -> None:
    """Bytes anywhere are overwritten and perhaps the end is cut: every sample is trained on or its error is counted."""
    folder = tmp_path_factory.mktemp("random")
    shard = Path(write(folder, Case()))
    draw = np.random.default_rng(seed)
    content = bytearray(shard.read_bytes())
    for _ in range(int(draw.integers(1, 5))):
        start, length = int(draw.integers(len(content))), int(draw.choice([1, 4, 512, 3000]))
        content[start : start + length] = draw.bytes(len(content[start : start + length]))
    shard.write_bytes(content[: int(draw.integers(len(content) // 2, 2 * len(content)))])
    index = build_index([str(shard), write(folder / "sound", Case())], folder / "index")
    num_all = 2 * (NUM_SOUND + 1)
    if len(index) < num_all:
        assert index.shards[0].errors, "samples are missing and no shard error was counted"
    num_trained, counts = one_pass(make_config_once([str(shard)]), index, tokenizer_once)
    num_skipped = sum(count for cause, count in counts.items() if not cause.endswith("caption"))
    assert num_trained + num_skipped == len(index) <= num_all + sum(index.shards[0].errors.values())
    assert index.shards[1].errors == {} and index.shards[1].num_samples == NUM_SOUND + 1


@pytest.fixture(scope="module")
def make_config_once():
    from tests.unit.data.conftest import make_config

    return make_config.__wrapped__()


@pytest.fixture(scope="module")
def tokenizer_once():
    from tests.unit.data.small_data import CharacterTokenizer

    return CharacterTokenizer()
