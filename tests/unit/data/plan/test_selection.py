"""What of a data set is trained on: filters and their counts, captions by share, the picture inside a border."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitdance_scale.config.schema import CaptionChoice, DataFilter, DataSource
from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.plan.borders import content_px
from bitdance_scale.data.plan.buckets import SAMPLES_PER_CHUNK
from bitdance_scale.data.plan.filters import KeptSamples, describe
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import bare_index, encode_image, write_tar

SOURCE = DataSource(name="open", shards=("x",), share=1)
NAN = float("nan")


def test_filters_count_what_they_leave_out_one_after_the_other() -> None:
    height = np.array([10, 20, 30, 40, 50, 60, 7])
    width = np.array([10, 10, 30, 10, 50, 60, 7])
    score = np.array([0.1, 0.2, 0.9, 0.1, NAN, NAN, 0.3], np.float32)
    index = bare_index(height, width, **{"score.punsafe": score})
    rules = [
        DataFilter(column="short_side_px", min=8),
        DataFilter(column="aspect", max=2),
        DataFilter(column="punsafe", max=0.5),
        DataFilter(column="pixels", max=1, source="another"),
    ]
    kept = KeptSamples(index, range(7), SOURCE, rules)
    assert kept(slice(0, 7)).tolist() == [True, True, False, False, False, False, False]
    assert [(c.num_outside, c.num_missing, c.num_kept) for c in kept.counts] == [(1, 0, 6), (1, 0, 5), (1, 2, 2)]
    assert describe(kept.counts[2]) == "punsafe <= 0.5: leaves out 1, 2 without it; 2 left"
    lenient = [*rules[:2], dataclasses.replace(rules[2], missing="keep")]
    assert KeptSamples(index, range(7), SOURCE, lenient)(slice(0, 7)).tolist() == [
        True,
        True,
        *[False] * 2,
        True,
        True,
        False,
    ]
    with pytest.raises(DataError, match="'unsafe' is no size and no numeric field.*fields found: punsafe"):
        KeptSamples(index, range(7), SOURCE, [DataFilter(column="unsafe", max=1)])


def test_a_plan_draws_what_its_filters_keep(make_config) -> None:
    """In a source that begins in the middle of the index and of a chunk of it."""
    count = 5000
    numbers = np.random.default_rng(0)
    sides = np.full(SAMPLES_PER_CHUNK + 3 + count, 40)
    score = numbers.random(len(sides)).astype(np.float32)
    index = bare_index(sides, sides, **{"score.s": score})
    index.sources = (range(SAMPLES_PER_CHUNK + 3), range(SAMPLES_PER_CHUNK + 3, len(sides)))
    sources = tuple(DataSource(name=name, shards=(name,), share=1) for name in ("a", "b"))
    rules = (DataFilter(column="s", max=0.25, source="b"), DataFilter(column="s", min=0.5, source="a"))
    data = make_config(shards=(), sources=sources, filters=rules, global_batch=1000).data
    plan = Plan(0, index, data)
    for step in range(4):
        batch = plan.batch(step)
        is_b = batch.source == 1
        assert (score[batch.samples[is_b]] <= 0.25).all() and (batch.samples[is_b] >= SAMPLES_PER_CHUNK + 3).all()
        assert (score[batch.samples[~is_b]] >= 0.5).all() and (batch.samples[~is_b] < SAMPLES_PER_CHUNK + 3).all()
    assert plan.filter_counts()["b"][0].num_kept == np.count_nonzero(score[SAMPLES_PER_CHUNK + 3 :] <= 0.25)
    hashes = {Plan(0, index, dataclasses.replace(data, filters=some)).hash for some in (rules, rules[:1], ())}
    assert len(hashes) == 3


def test_filters_that_leave_nothing_are_refused(make_config) -> None:
    sides = np.full(20, 40)
    data = make_config(shards=("x",), filters=(DataFilter(column="pixels", min=1e9),)).data
    with pytest.raises(DataError, match="none of the 20 images .* passes data.filters.*widen the filters"):
        Plan(0, bare_index(sides, sides), data)


def shard_of_captions(folder: Path) -> str:
    """Samples 0..59; every third lacks the field, every fifth the text; alternatives are two."""
    jpg = encode_image(40, 40)
    samples = {}
    for number in range(60):
        record = {"width": 40, "height": 40} | ({} if number % 3 == 0 else {"re": [f"r{number}", f"s{number}"]})
        text = {} if number % 5 == 0 else {"txt": f"t{number}".encode()}
        samples[f"{number:03d}"] = {"jpg": jpg, "json": json.dumps(record).encode(), **text}
    return str(write_tar(folder / "0.tar", samples))


def test_captions_are_drawn_by_share_among_those_there_are(tmp_path: Path, make_config, tokenizer) -> None:
    shard = shard_of_captions(tmp_path)
    captions = (CaptionChoice(source="json:re", share=3), CaptionChoice(source="caption", share=1))
    config = make_config([shard], captions=captions, text_drop=0.0, global_batch=60)
    index = build_index([shard], tmp_path / "index", captions=["json:re", "caption"])
    plan, seen, by_kind = Plan(3, index, config.data), Counter(), Counter()
    for step in range(100):
        batch = plan.batch(step)
        for sample, caption in zip(batch.samples.tolist(), batch.caption.tolist(), strict=True):
            has = (sample % 3 != 0, sample % 5 != 0)
            assert caption == -1 if not any(has) else has[caption]
            seen[all(has)] += 1
            by_kind[all(has), caption] += 1
    # A deviation of four standard errors.
    assert abs(by_kind[True, 0] / seen[True] - 0.75) < 4 * np.sqrt(0.75 * 0.25 / seen[True])
    texts: Counter[str] = Counter()
    with Loader(config, tokenizer, index, 0, 1) as loader:
        for _ in range(20):
            for loaded in loader.next_step().packs:
                texts.update(prompts(loaded.pack, tokenizer))
    assert set(texts) == {f"{kind}{n}" for n in range(60) for kind in "rst" if (n % 5 if kind == "t" else n % 3)} | {""}
    alternatives = [sum(count for text, count in texts.items() if text.startswith(kind)) for kind in "rs"]
    assert abs(alternatives[0] / sum(alternatives) - 0.5) < 4 * 0.5 / np.sqrt(sum(alternatives))


def prompts(pack, tokenizer) -> list[str]:
    """Captions of a pack's samples; empty for those without."""
    found = []
    for document in range(int(pack.document_ids.max()) + 1):
        text = tokenizer.decode([i for i in pack.token_ids[pack.document_ids == document].tolist() if i < 256])
        found.append(text.removeprefix("user\n").split("\nassistant")[0] if text.startswith("user") else "")
    return found


def pad_as_img2dataset(picture: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Scaled along the longer side and padded with white, more below and right; and the box of the picture."""
    scale = side / max(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    left, top = (side - width) // 2, (side - height) // 2
    padded = Image.new("RGB", (side, side), (255, 255, 255))
    padded.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    return padded, (left, top, left + width, top + height)


@given(st.integers(20, 3000), st.integers(20, 3000), st.sampled_from([64, 255, 256]))
def test_the_picture_is_found_inside_its_border(height: int, width: int, side: int) -> None:
    _, box = pad_as_img2dataset(Image.new("RGB", (width, height)), side)
    index = bare_index(
        np.array([side]), np.array([side]), original_height_px=np.array([height]), original_width_px=np.array([width])
    )
    found = tuple(int(values[0]) for values in content_px(index, slice(0, 1), True))
    expected = []
    for low, high in ((box[1], box[3]), (box[0], box[2])):
        expected.append(high - low if high - low == side else max(1, high - low - 2))
    assert found == tuple(expected)
    assert content_px(index, slice(0, 1), False)[0][0] == side


@pytest.mark.parametrize("size_px", [(300, 200), (200, 301), (333, 100)])
def test_no_border_is_left_in_a_decoded_image(size_px: tuple[int, int]) -> None:
    height, width = size_px
    black = Image.new("RGB", (width, height))
    padded, _ = pad_as_img2dataset(black, 256)
    file = io.BytesIO()
    padded.save(file, "JPEG", quality=95)
    index = bare_index(
        np.array([256]), np.array([256]), original_height_px=np.array([height]), original_width_px=np.array([width])
    )
    content = tuple(int(values[0]) for values in content_px(index, slice(0, 1), True))
    bucket = (64, 48) if height > width else (48, 64)
    assert decode_image(file.getvalue(), (256, 256), bucket, content).max() < 60
    assert decode_image(file.getvalue(), (256, 256), bucket).max() > 200
