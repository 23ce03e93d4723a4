"""Folders out: what the scorers find, what is read back, and how a folder that is not whole is called."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark
from bitdance_scale.evaluation.benchmarks.image_folder import ImageFolder
from bitdance_scale.evaluation.benchmarks.imagenet import ImageNet
from bitdance_scale.evaluation.benchmarks.prompt import rounds
from tests.unit.evaluation.benchmarks.small_benchmarks import (
    GENEVAL,
    NAMES,
    SIZE_PX,
    files,
    image,
    images,
    small,
    small_folder,
)

LAID_OUT = {
    "geneval": [
        f"{line:05d}/{name}"
        for line in (0, 1)
        for name in ("grid.png", "metadata.jsonl", *(f"samples/{k:04d}.png" for k in range(4)))
    ],
    "dpg": ["0.png", "COCOval2014000000000042.png", "partiprompts12.png"],
    "oneig-en": ["anime/ours/000.webp", "human/ours/000.webp", "human/ours/001.webp"],
    "oneig-zh": ["anime/ours/000.webp", "multilingualism/ours/000.webp"],
    "tiif": [
        *(f"action+2d/ours/{length}_description/{line}.png" for length in ("long", "short") for line in (0, 1)),
        *(f"text/ours/{length}_description/0.png" for length in ("long", "short")),
    ],
    "imagenet": ["samples.npz"],
    "demo-scenes": [f"{number:05d}.png" for number in range(6)],
    "demo-classes": [f"{number:05d}.png" for number in range(24)],
}


def drawn(tmp_path: Path, name: str) -> ImageFolder:
    """The whole folder of a small benchmark."""
    folder, prompts = small_folder(tmp_path, name)
    for prompt in prompts:
        folder.write(prompt, images(prompt))
    folder.finish()
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_laid_out_for_the_scorer_and_read_back(tmp_path: Path, name: str) -> None:
    folder, prompts = small_folder(tmp_path, name)
    assert folder.state().num_to_draw == sum(prompt.num_images for prompt in prompts)
    for prompt in prompts:
        folder.write(prompt, images(prompt))
    folder.finish()
    assert files(tmp_path / "out") == sorted(LAID_OUT[name])
    state = folder.state()
    assert state.complete == tuple(prompts) and not (state.to_draw or state.damaged or state.foreign)
    for prompt in prompts:
        found = folder.read(prompt)
        assert len(found) == prompt.num_images
        for k, pixels in enumerate(found):
            assert pixels.dtype == np.uint8 and pixels.shape == (*SIZE_PX, 3)
            # WebP is lossy, as the benchmark's script writes it.
            error = np.abs(pixels.astype(int) - image(prompt, k)).mean()
            assert error < 12 if name.startswith("oneig") else error == 0


@pytest.mark.parametrize("name", NAMES)
def test_images_are_written_one_by_one_in_any_order(tmp_path: Path, name: str) -> None:
    folder, prompts = small_folder(tmp_path, name)
    order = [(prompt, k) for prompt in prompts for k in range(prompt.num_images)][::-1]
    for prompt, k in order[:3]:
        folder.write_image(prompt, k, image(prompt, k))
    # Another process goes on with what is missing.
    folder, prompts = small_folder(tmp_path, name)
    missing = {(name, k) for name, numbers in folder.state().to_draw.items() for k in numbers}
    assert missing == {(prompt.id, k) for prompt, k in order[3:]}
    for prompt, k in order[3:]:
        folder.write_image(prompt, k, image(prompt, k))
    folder.finish()
    one_by_one = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    (tmp_path / "out").rename(tmp_path / "other")
    drawn(tmp_path, name)
    assert one_by_one.keys() == set(LAID_OUT[name])
    for path, content in one_by_one.items():
        assert content == (tmp_path / "out" / path).read_bytes()


def test_grids_and_lines_are_what_the_scorers_read(tmp_path: Path) -> None:
    folder, (first, second) = small_folder(tmp_path, "geneval")
    for prompt in (first, second):
        folder.write(prompt, images(prompt))
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text(encoding="ascii")) == GENEVAL[1]
    grid = np.asarray(Image.open(tmp_path / "out/00001/grid.png"))
    height, width = SIZE_PX
    assert grid.shape == (2 * height, 2 * width, 3)
    np.testing.assert_array_equal(grid[:height, width:], image(second, 1))
    np.testing.assert_array_equal(grid[height:, :width], image(second, 2))


def test_all_classes_are_one_array_in_rounds(tmp_path: Path) -> None:
    folder, prompts = small_folder(tmp_path, "imagenet")
    for prompt in prompts[::-1]:
        folder.write(prompt, images(prompt))
    folder.finish()
    with np.load(tmp_path / "out/samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_1"], [0, 1, 0, 1, 0, 1])
        np.testing.assert_array_equal(archive["arr_0"], [image(prompt, k) for k in range(3) for prompt in prompts])


def test_every_part_of_a_round_has_all_classes_alike() -> None:
    """Inception Score is the mean over parts of 5,000 samples in their order."""
    prompts = ImageNet().read(None)
    labels = [n for n, _ in rounds(prompts)]
    assert len(labels) == 50_000
    for start in range(0, 50_000, 5000):
        assert sorted(labels[start : start + 5000]) == sorted([*range(1000)] * 5)


def test_images_of_an_array_are_files_if_asked_for(tmp_path: Path) -> None:
    folder = drawn(tmp_path, "imagenet")
    _, prompts = small_folder(tmp_path, "imagenet")
    copies = [f"images/{number:05d}/{k:04d}.png" for number in (0, 1) for k in range(3)]
    folder.write_copies(0, 2)
    assert files(tmp_path / "out") == [*copies[:3], "samples.npz"]
    before = (tmp_path / "out" / copies[1]).stat().st_mtime_ns
    folder.write_copies()
    assert files(tmp_path / "out") == [*copies, "samples.npz"]
    # Those that were there are not written again.
    assert (tmp_path / "out" / copies[1]).stat().st_mtime_ns == before
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / copies[4])), image(prompts[1], 1))
    assert not folder.state().foreign and folder.state().complete == tuple(prompts)


@pytest.mark.parametrize("name", ["imagenet", "dpg"])
def test_a_part_that_is_cut_short_is_drawn_again(tmp_path: Path, name: str) -> None:
    folder, (prompt, *_) = small_folder(tmp_path, name)
    folder.write_image(prompt, 1, image(prompt, 1))
    part = tmp_path / f"out/parts/{prompt.id}/0001.npy"
    content = part.read_bytes()
    np.testing.assert_array_equal(np.load(part), image(prompt, 1))
    assert 1 not in folder.state().to_draw[prompt.id]
    np.save(tmp_path / "float.npy", np.zeros((16, 24, 3)))
    for damaged in (content[:-1], content[:20], b"", (tmp_path / "float.npy").read_bytes()):
        part.write_bytes(damaged)
        state = folder.state()
        assert 1 in state.to_draw[prompt.id] and list(state.damaged) == [f"parts/{prompt.id}/0001.npy"]
        assert not state.foreign


def test_an_array_in_another_order_is_refused(tmp_path: Path) -> None:
    folder, prompts = small_folder(tmp_path, "imagenet")
    by_class = np.stack([pixels for prompt in prompts for pixels in images(prompt)])
    np.savez(tmp_path / "out/samples.npz", by_class, np.repeat([0, 1], 3))
    with pytest.raises(ConfigError, match=r"samples.npz has the images of its classes \(arr_1\) in another order"):
        folder.state().refuse_foreign()
    np.savez(tmp_path / "out/samples.npz", by_class)
    assert folder.state().damaged == {"samples.npz": "has no labels of its images (arr_1)"}


@pytest.mark.parametrize("name", NAMES)
def test_who_may_share_out_the_images_of_a_prompt(tmp_path: Path, name: str) -> None:
    """Only where no file is made of them."""
    _, (prompt, *_) = small_folder(tmp_path, name)
    layout = small(name).layout("ours")
    singles = [layout.image(prompt, k) for k in range(prompt.num_images)]
    is_made = bool(layout.records(prompt)) or any(picture not in singles for picture in layout.pictures(prompt))
    assert layout.makes_files == is_made


@pytest.mark.parametrize(
    ("name", "removed", "message"),
    [
        ("geneval", "00001/grid.png", "1 of 2 prompts are not complete: prompt 00001 lacks a file that is made of its"),
        ("geneval", "00001/metadata.jsonl", "prompt 00001 lacks a file that is made of its images"),
        ("geneval", "00001/samples/0002.png", "prompt 00001 lacks image 2. Run the drawing again"),
        ("dpg", "partiprompts12.png", "1 of 3 prompts are not complete: prompt partiprompts12 lacks image 0, 1, 2, 3"),
        ("oneig-en", "human/ours/001.webp", "prompt human/001 lacks image 0, 1, 2, 3"),
        ("tiif", "text/ours/long_description/0.png", "prompt text/long_description/0 lacks image 0"),
        ("imagenet", "samples.npz", "2 of 2 prompts are not complete: prompt 00000 lacks image 0, 1, 2; "),
    ],
)
def test_what_is_missing_is_listed(tmp_path: Path, name: str, removed: str, message: str) -> None:
    folder = drawn(tmp_path, name)
    (tmp_path / "out" / removed).unlink()
    with pytest.raises(ConfigError, match=message):
        folder.state().require_complete()
    folder.state().refuse_foreign()


def test_a_missing_grid_is_made_of_the_images(tmp_path: Path) -> None:
    folder = drawn(tmp_path, "geneval")
    grid = tmp_path / "out/00001/grid.png"
    content = grid.read_bytes()
    grid.unlink()
    assert folder.state().to_draw == {"00001": ()}
    folder.finish()
    assert grid.read_bytes() == content and not folder.state().to_draw


@pytest.mark.parametrize(
    ("name", "path"), [("geneval", "00000/samples/0001.png"), ("dpg", "0.png"), ("oneig-en", "anime/ours/000.webp")]
)
def test_a_picture_that_is_cut_short_is_drawn_again(tmp_path: Path, name: str, path: str) -> None:
    folder = drawn(tmp_path, name)
    cut = tmp_path / "out" / path
    content = cut.read_bytes()
    for length in (len(content) - 5, 0):
        cut.write_bytes(content[:length])
        state = folder.state()
        assert list(state.damaged) == [path] and len(state.to_draw) == 1 and not state.foreign
        with pytest.raises(ConfigError, match=f"{path} is (cut short|no picture)"):
            state.require_complete()
    prompts = {prompt.id: prompt for prompt in small_folder(tmp_path, name)[1]}
    with pytest.raises(ConfigError, match=f"{path}: cannot be read as a picture .*; remove it and draw it again"):
        for prompt in prompts.values():
            folder.read(prompt)
    for prompt_id, numbers in state.to_draw.items():
        for k in numbers:
            folder.write_image(prompts[prompt_id], k, image(prompts[prompt_id], k))
    folder.finish()
    assert cut.read_bytes() == content


def test_an_array_that_is_cut_short_is_drawn_again(tmp_path: Path) -> None:
    folder, prompts = small_folder(tmp_path, "imagenet")
    for prompt in prompts:
        folder.write(prompt, images(prompt))
    (tmp_path / "out/samples.npz").write_bytes(b"PK")
    assert "is cut short" in folder.state().damaged["samples.npz"]
    folder.finish()
    assert folder.state().damaged == {}
    np.testing.assert_array_equal(folder.read(prompts[1]), images(prompts[1]))


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("geneval", "00002/samples/0000.png", "00002/samples/0000.png belongs to no prompt"),
        ("geneval", "00000/samples/0004.png", "00000/samples/0004.png belongs to no prompt"),
        ("dpg", "partiprompts13.png", "partiprompts13.png belongs to no prompt"),
        ("oneig-en", "human/theirs/000.webp", "human/theirs/000.webp is of model 'theirs', this drawing of 'ours'"),
        ("oneig-en", "multilingualism/ours/000.webp", "multilingualism/ours/000.webp belongs to no prompt"),
        ("tiif", "text/theirs/short_description/0.png", "is of model 'theirs', this drawing of 'ours'"),
        ("demo-scenes", "00000_1.png", "00000_1.png belongs to no prompt. Move them elsewhere, or name another folder"),
    ],
)
def test_pictures_of_no_prompt_are_refused(tmp_path: Path, name: str, path: str, message: str) -> None:
    folder = drawn(tmp_path, name)
    stranger = tmp_path / "out" / path
    stranger.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE_PX).save(stranger)
    # Notes and scores are nobody's pictures; what a stopped process was writing is neither.
    (tmp_path / "out/results.txt").write_text("0.86", encoding="utf-8")
    (tmp_path / "out/half.png.writing").write_bytes(b"")
    assert list(folder.state().foreign) == [path]
    for refuse in (folder.state().refuse_foreign, folder.state().require_complete):
        with pytest.raises(ConfigError, match=message):
            refuse()


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("geneval", "00000/samples/0001.png", "0001.png is 8 x 8 px, expected 16 x 24 px"),
        ("dpg", "0.png", "0.png is 8 x 8 px, expected 32 x 48 px"),
        ("oneig-zh", "anime/ours/000.webp", "000.webp is 8 x 8 px, expected 32 x 48 px"),
    ],
)
def test_a_picture_of_another_size_is_refused(tmp_path: Path, name: str, path: str, message: str) -> None:
    folder = drawn(tmp_path, name)
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / path)
    with pytest.raises(ConfigError, match=message):
        folder.state().refuse_foreign()
    with pytest.raises(ConfigError, match="remove its files and draw it again"):
        for prompt in folder.state().complete or small_folder(tmp_path, name)[1]:
            folder.read(prompt)
        folder.read(small_folder(tmp_path, name)[1][0])


def test_pictures_of_other_prompts_and_an_array_of_others_are_refused(tmp_path: Path) -> None:
    folder = drawn(tmp_path, "geneval")
    path = tmp_path / "out/00001/metadata.jsonl"
    path.write_text(json.dumps(GENEVAL[1] | {"prompt": "three cups"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"00001/metadata.jsonl holds another line than the file of prompts"):
        folder.state().refuse_foreign()
    (tmp_path / "classes").mkdir()
    drawn(tmp_path / "classes", "imagenet")
    more = ImageNet(num_images=4, num_classes=2)
    folder = ImageFolder(tmp_path / "classes/out", more.layout(""), more.read(None), SIZE_PX)
    with pytest.raises(ConfigError, match="samples.npz has 6 images of 16 x 24 px, expected 8 of 16 x 24 px"):
        folder.state().refuse_foreign()


def test_a_folder_of_another_program_is_measured_by_its_first_picture(tmp_path: Path) -> None:
    drawn(tmp_path, "dpg")
    benchmark = find_benchmark("dpg")
    prompts = small_folder(tmp_path, "dpg")[1]
    folder = ImageFolder(tmp_path / "out", benchmark.layout(""), prompts)
    folder.state().require_complete()
    Image.new("RGB", (8, 8)).save(tmp_path / "out/partiprompts12.png")
    with pytest.raises(ConfigError, match="partiprompts12.png is 8 x 8 px, expected 32 x 48 px"):
        ImageFolder(tmp_path / "out", benchmark.layout(""), prompts).state().require_complete()
    with pytest.raises(ConfigError, match="none: no such folder; draw the images first"):
        ImageFolder(tmp_path / "none", benchmark.layout(""), prompts).state()


def test_images_of_a_wrong_kind_are_a_fault_of_the_program(tmp_path: Path) -> None:
    folder, (prompt, *_) = small_folder(tmp_path, "dpg")
    with pytest.raises(ValueError, match="3 images, expected 4"):
        folder.write(prompt, images(prompt)[:3])
    for wrong in (image(prompt, 0).astype(np.float32), image(prompt, 0, (8, 8)), image(prompt, 0)[..., 0]):
        with pytest.raises(ValueError, match="expected uint8 .16, 24, 3."):
            folder.write_image(prompt, 0, wrong)
    assert files(tmp_path / "out") == []


def test_what_does_not_fit_a_layout_is_refused() -> None:
    for name in ("geneval", "dpg", "oneig-en"):
        benchmark = type(find_benchmark(name))(num_images=3)
        with pytest.raises(ConfigError, match=f"images per prompt = 3: {name} wants a square grid"):
            benchmark.layout("ours")
    with pytest.raises(ConfigError, match="images per prompt = 4: tiif has room for one"):
        type(find_benchmark("tiif"))(num_images=4).layout("ours")
    for name in ("oneig-zh", "tiif"):
        for model in ("runs/ours", "*", "", ".hidden", "a b"):
            with pytest.raises(ConfigError, match=f"{name} has a folder of this name, so it must be letters"):
                find_benchmark(name).layout(model)
