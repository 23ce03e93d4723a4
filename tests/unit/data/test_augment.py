"""Views by epoch: a pure function with the right shares, the same for any ranks and any resume, and never held-out."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.config.data_schema import AugmentSection
from bitdance_scale.config.schema import EvaluateSection
from bitdance_scale.data.augment import (
    Augmentation,
    crop_share,
    num_stored_views,
    stored_recipe,
    stored_views,
)
from bitdance_scale.data.image_decode import decode_image, decode_views
from bitdance_scale.data.images.resize import ResizeMethod
from bitdance_scale.data.images.views import CENTRE, Crop, View, place
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.loader import LoadedPack, Loader
from bitdance_scale.data.loader_state import LoaderState
from bitdance_scale.data.plan.plan import Plan
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.data.stream import StreamLoader
from bitdance_scale.train.evaluation import held_out_run
from tests.unit.data.small_data import encode_image

Found = tuple[int, tuple[int, ...], bytes]
RECIPE = AugmentSection(flip=0.5, crop=1.0, crop_until_epoch=700, crop_ends_epoch=750)
NUM_SAMPLES = 4000


def views_of(section: AugmentSection, epoch: int, seed: int = 3) -> list[View]:
    augmentation = Augmentation(section, seed)
    return [augmentation.view(epoch, sample) for sample in range(NUM_SAMPLES)]


def found_in(loaded: LoadedPack) -> list[Found]:
    """(key, shape, pixels) of the images of a pack."""
    keys = loaded.pack.sample_keys.tolist()
    return [(key, image.shape, image.tobytes()) for key, image in zip(keys, loaded.images, strict=True)]


def test_share_of_crops_falls_between_the_two_epochs() -> None:
    epochs = [0, 699, 700, 710, 725, 749, 750, 10_000]
    expected = [1, 1, 1, 0.8, 0.5, 0.02, 0, 0]
    assert [crop_share(RECIPE, epoch) for epoch in epochs] == pytest.approx(expected)
    for epoch in (710, 725):
        share = np.mean([view.crop is not None for view in views_of(RECIPE, epoch)])
        # Four standard deviations.
        assert share == pytest.approx(crop_share(RECIPE, epoch), abs=4 * 0.5 / NUM_SAMPLES**0.5)
    fractions = dataclasses.replace(RECIPE, crop=0.6, crop_until_epoch=0.5, crop_ends_epoch=2.5)
    assert [crop_share(fractions, epoch) for epoch in range(4)] == pytest.approx([0.6, 0.45, 0.15, 0])
    at_once = dataclasses.replace(RECIPE, crop_until_epoch=2, crop_ends_epoch=2)
    assert [crop_share(at_once, epoch) for epoch in range(4)] == [1, 1, 0, 0]
    for_ever = AugmentSection(crop=0.25)
    assert crop_share(for_ever, 0) == crop_share(for_ever, 2**31 - 1) == 0.25


def test_flips_and_places_are_uniform_and_independent() -> None:
    views = views_of(RECIPE, 5)
    crops = [view.crop for view in views if view.crop is not None]
    assert len(crops) == NUM_SAMPLES
    numbers = np.array([[view.is_flipped, *crop[1:]] for view, crop in zip(views, crops, strict=True)], float)
    assert numbers.mean(axis=0) == pytest.approx([0.5] * 4, abs=0.032)
    assert numbers[:, 1:].var(axis=0) == pytest.approx([1 / 12] * 3, abs=0.006)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 4 / NUM_SAMPLES**0.5
    shorts = Counter(min(place((375, 500), (256, 256), view).scaled_px) for view in views)
    # Every side of 256 .. 320 px is drawn, about as often as the others.
    assert sorted(shorts) == list(range(256, 321)) and max(shorts.values()) < 2 * NUM_SAMPLES / 65
    for view in views:
        placed = place((375, 500), (256, 256), view)
        assert 0 <= placed.top <= placed.scaled_px[0] - 256 and 0 <= placed.left <= placed.scaled_px[1] - 256


def test_views_change_with_seed_epoch_and_sample_alone() -> None:
    one = Augmentation(RECIPE, 3)
    assert views_of(RECIPE, 5) == views_of(RECIPE, 5)
    assert len({one.view(epoch, sample) for epoch in range(10) for sample in range(10)}) == 100
    assert Augmentation(RECIPE, 4).view(5, 7) != one.view(5, 7)
    # The end of the crops does not change which images are mirrored.
    assert [view.is_flipped for view in views_of(RECIPE, 725)] == [
        view.is_flipped for view in views_of(dataclasses.replace(RECIPE, crop=0.0), 725)
    ]
    assert {Augmentation(AugmentSection(), 3).view(epoch, 7) for epoch in range(9)} == {CENTRE}


def test_stored_views_have_the_same_shares() -> None:
    num = 1000
    augmentation = Augmentation(RECIPE, 3)
    assert num_stored_views(RECIPE) == len(stored_views(RECIPE, 0)) == 12
    for epoch in (0, 725, 800):
        numbers = [augmentation.stored_view(epoch, sample) for sample in range(num)]
        stored = [stored_views(RECIPE, sample)[number] for sample, number in enumerate(numbers)]
        share = np.mean([view.crop is not None for view in stored])
        assert share == pytest.approx(crop_share(RECIPE, epoch), abs=0.064)
        assert np.mean([view.is_flipped for view in stored]) == pytest.approx(0.5, abs=0.064)
        # Crop or centre, and whether the centre is mirrored, are decided as without stored views.
        for view, direct in zip(stored, views_of(RECIPE, epoch)[:num], strict=True):
            assert (view.crop is None) == (direct.crop is None)
            assert view.crop is not None or view == direct
    drawn = Counter(augmentation.stored_view(0, sample) for sample in range(num))
    assert sorted(drawn) == list(range(2, 12)) and max(drawn.values()) < 1.5 * num / 10


@pytest.mark.parametrize(
    ("section", "num_views"),
    [
        (AugmentSection(), 1),
        (AugmentSection(flip=0.5), 2),
        (AugmentSection(crop=0.5, bits_crops=3), 4),
        (AugmentSection(crop=0.5, flip=0.1, bits_crops=3), 5),
    ],
)
def test_every_stored_view_that_is_drawn_exists(section: AugmentSection, num_views: int) -> None:
    augmentation = Augmentation(section, 3)
    assert {augmentation.stored_view(4, sample) for sample in range(500)} == set(range(num_views))
    assert len(stored_views(section, 9)) == num_views and stored_views(section, 9)[0] == CENTRE
    assert stored_recipe(section).get("views", 1) == num_views


@pytest.mark.parametrize("method", ResizeMethod)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_views_of_a_file_are_those_of_one_decoding_each(method: ResizeMethod, kind: str) -> None:
    data = encode_image(90, 130, seed=2, kind=kind)
    crop = Crop(1.25, 0.7, 0.2, 0.9)
    views = [CENTRE, View(is_flipped=True), View(crop=crop), View(True, crop)]
    found = decode_views(data, (90, 130), (32, 32), None, method, views)
    for view, pixels in zip(views, found, strict=True):
        np.testing.assert_array_equal(pixels, decode_image(data, (90, 130), (32, 32), None, method, view))
        assert pixels.flags.c_contiguous and pixels.shape == (32, 32, 3)
    np.testing.assert_array_equal(found[1], found[0][:, ::-1])
    np.testing.assert_array_equal(found[3], found[2][:, ::-1])
    assert not np.array_equal(found[0], found[2])


def test_crops_leave_out_the_border() -> None:
    """A white border around a dark picture; the crop is out of the picture alone."""
    pixels = np.full((100, 100, 3), 255, np.uint8)
    pixels[20:80] = 40
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    for method in ResizeMethod:
        for top in (0.0, 0.999):
            view = View(crop=Crop(1.0, 0.0, top, 0.0))
            # "fast" resizes a region of the whole image, and its filter sees two pixels of the border.
            found = decode_image(file.getvalue(), (100, 100), (32, 32), (60, 100), method, view)[2:-2]
            assert found.min() >= 35 and found.max() <= 45


def test_batches_do_not_depend_on_ranks_threads_or_resumes(data_set, make_config, tokenizer, tmp_path) -> None:
    """And every image is the view of its own epoch, also where a batch has the end of one epoch and the next one."""
    index = build_index(data_set, tmp_path / "index")
    augment = AugmentSection(flip=0.5, crop=1.0, crop_until_epoch=1, crop_ends_epoch=3)
    config = make_config(data_set, augment=augment, resize="adm", read_threads=3)

    def images(num_ranks: int, num_threads: int, state: LoaderState | None = None) -> list[Counter[Found]]:
        one = dataclasses.replace(config, data=dataclasses.replace(config.data, read_threads=num_threads))
        loaders = [Loader(one, tokenizer, index, rank, num_ranks, state) for rank in range(num_ranks)]
        steps = []
        for _ in range(8 if state is None else 4):
            loaded = [pack for loader in loaders for pack in loader.next_step().packs]
            steps.append(Counter(found for pack in loaded for found in found_in(pack)))
            if len(steps) == 4 and state is None:
                states.append(loaders[0].state)
        for loader in loaders:
            loader.close()
        return steps

    states: list[LoaderState] = []
    whole = images(1, 1)
    assert images(2, 3) == whole and images(1, 2, states[0]) == whole[4:]
    plan, reader, augmentation = Plan(config.run.seed, index, config.data), ShardReader(), Augmentation(augment, 3)
    num_boundaries, kinds = 0, set()
    for step, found in enumerate(whole):
        batch, expected = plan.batch(step), Counter()
        num_boundaries += len(set(batch.epoch[batch.side_px == 16].tolist())) > 1
        for sample, epoch, bucket in zip(batch.samples, batch.epoch, batch.bucket_px.tolist(), strict=True):
            view, size = augmentation.view(int(epoch), int(sample)), index.size_px(int(sample))
            kinds.add((view.crop is None, view.is_flipped))
            image = decode_image(reader.image(index, int(sample)), size, tuple(bucket), size, "adm", view)
            expected[int(sample), image.shape, image.tobytes()] += 1
        assert found == expected
    assert num_boundaries >= 1 and len(kinds) == 4


def test_streams_draw_by_step(data_set, make_config, tokenizer) -> None:
    """Mirrored or not by (seed, step, sample), so that samples that come again may look otherwise."""
    plain = {"text_drop": 0.0, "mode": "stream", "stream_buffer": 4, "resize": "adm"}
    found = {}
    for flip in (0.0, 0.5):
        config = make_config(data_set, augment=AugmentSection(flip=flip), **plain)
        with StreamLoader(config, tokenizer, 0, 1) as streams:
            steps = [streams.next_step() for _ in range(4)]
        found[flip] = [
            (step.step, key, image)
            for step in steps
            for pack in step.packs
            for key, image in zip(pack.pack.sample_keys.tolist(), pack.images, strict=True)
        ]
    augmentation, flipped = Augmentation(AugmentSection(flip=0.5), 3), Counter()
    for (step, key, image), (_, other, plain_image) in zip(found[0.5], found[0.0], strict=True):
        is_flipped = augmentation.view(step, key).is_flipped
        flipped[is_flipped] += 1
        assert key == other
        np.testing.assert_array_equal(image, plain_image[:, ::-1] if is_flipped else plain_image)
    assert min(flipped[True], flipped[False]) > 10


def test_held_out_images_are_not_varied(data_set, make_config, tokenizer, tmp_path) -> None:
    index = build_index(data_set, tmp_path / "index")
    packs = []
    for augment in (AugmentSection(), AugmentSection(flip=1.0, crop=1.0)):
        config = make_config(data_set, augment=augment)
        config = dataclasses.replace(config, evaluate=EvaluateSection(shards=tuple(data_set), images=10))
        with Loader(held_out_run(config), tokenizer, index, 0, 1) as loader:
            packs.append(loader.next_step().packs)
        if augment.is_active:
            with Loader(dataclasses.replace(held_out_run(config), data=config.data), tokenizer, index, 0, 1) as loader:
                varied = loader.next_step().packs
    assert all(
        np.array_equal(ours, theirs)
        for one, two in zip(*packs, strict=True)
        for ours, theirs in zip(one.images, two.images, strict=True)
    )
    assert not all(np.array_equal(*pair) for pair in zip(packs[0][0].images, varied[0].images, strict=True))


def test_views_can_be_drawn_in_any_thread() -> None:
    augmentation, begin = Augmentation(RECIPE, 3), threading.Barrier(4)

    def draw(_: int) -> list[View]:
        begin.wait()
        return [augmentation.view(2, sample) for sample in range(200)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(draw, range(4)))
    assert found == [found[0]] * 4 and found[0] == views_of(RECIPE, 2)[:200]
