"""What is said of a small data set, and that it is trained on: every image, under any number of replicas."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.plan import small_set
from bitdance_scale.data.plan.small_set import remarks
from bitdance_scale.errors import DataError
from tests.unit.data.small_data import CharacterTokenizer, sample_members, write_tar


def index_of(folder: Path, *samples: tuple[int, int, str | None]) -> Index:
    """Images of (height, width) with captions, under the keys "0", "1", .."""
    members = {str(n): sample_members(*sample, n) for n, sample in enumerate(samples)}
    return build_index([str(write_tar(folder / "0.tar", members))], folder / "index")


def test_a_set_that_lacks_nothing_is_passed_over_in_silence(tmp_path, make_config):
    # The configuration has buckets of 16 x 16, 24 x 8 and 32 x 32 px, and 10 images a step.
    assert remarks(index_of(tmp_path, *[(40, 40, "a cat")] * 10), make_config().data) == []


def test_images_smaller_than_any_bucket_are_named_with_the_smallest_one(tmp_path, make_config):
    # The fourth fills the bucket of 24 x 8 px alone.
    sizes = [(40, 40), (15, 15), (7, 90), (24, 8)]
    index = index_of(tmp_path, *((height, width, "a cat") for height, width in sizes))
    data = make_config().data
    first, *_ = remarks(index, data)
    assert first.startswith("2 of 4 images are smaller than any bucket and are not trained: 1 (15 x 15), 2 (7 x 90).")
    assert "(height, width) 24 x 8 px with data.max_upscale=1; 2 images are left" in first
    # What the message proposes mends it.
    enlarged = make_config(max_upscale=1.2).data
    assert not any("smaller than any bucket" in remark for remark in remarks(index, enlarged))


def test_images_without_a_caption_are_counted_among_those_that_are_trained(tmp_path, make_config):
    index = index_of(tmp_path, *[(40, 40, "a cat")] * 10, (40, 40, None), (40, 40, ""), (4, 4, None))
    said = [remark for remark in remarks(index, make_config().data) if "caption" in remark]
    (remark,) = said
    assert remark.startswith("2 of 12 images have no usable caption") and ": 10, 11." in remark


def test_fewer_images_than_a_step_are_counted_by_how_often_each_is_seen(tmp_path, make_config):
    (remark,) = remarks(index_of(tmp_path, *[(40, 40, "a cat")] * 4), make_config().data)
    assert remark.startswith("4 images are fewer than a step takes (data.global_batch=10)")
    assert "about 250 times in 100 steps" in remark


def test_only_the_first_names_are_listed_and_nothing_of_a_large_set(make_config, monkeypatch, tmp_path):
    index = index_of(tmp_path, *[(4, 4, "a cat")] * 8)
    (remark,) = remarks(index, make_config().data)
    assert (
        "0 (4 x 4), 1 (4 x 4), 2 (4 x 4), 3 (4 x 4), 4 (4 x 4) and 3 more" in remark and "0 images are left" in remark
    )
    monkeypatch.setattr(small_set, "MAX_IMAGES", 7)
    assert remarks(index, make_config().data) == []


@pytest.mark.parametrize(("num_images", "num_replicas"), [(12, 1), (12, 5), (3, 2), (1, 2)])
def test_few_images_are_trained_evenly_under_any_number_of_replicas(tmp_path, make_config, num_images, num_replicas):
    index = index_of(tmp_path, *((40, 40, f"cat {n}") for n in range(num_images)))
    config = make_config()
    seen: Counter[int] = Counter()
    loaders = [Loader(config, CharacterTokenizer(), index, rank, num_replicas) for rank in range(num_replicas)]
    num_steps = 3
    for loader in loaders:
        with loader:
            for _ in range(num_steps):
                step = loader.next_step()
                assert step.num_skipped == 0
                for loaded in step.packs:
                    seen.update(loaded.pack.sample_keys.tolist())
    assert sum(seen.values()) == num_steps * config.data.global_batch and set(seen) == set(range(num_images))
    # In each resolution no image comes a second time before all have come once.
    num_resolutions = len(config.data.resolutions)
    assert max(seen.values()) - min(seen.values()) <= num_resolutions


def test_a_set_of_which_nothing_is_left_is_refused(tmp_path, make_config):
    index = index_of(tmp_path, *[(4, 4, "a cat")] * 3)
    with pytest.raises(DataError, match=r"none of the 3 images fills a bucket .* \(height, width\) \(4, 4\)"):
        Loader(make_config(), CharacterTokenizer(), index, 0, 1)
