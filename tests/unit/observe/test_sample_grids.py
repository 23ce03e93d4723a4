"""Grids of samples show each picture beside what the start drew of its prompt, as long as the two are comparable."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.config.schema import SampleSection
from bitdance_scale.observe import sample_grids
from bitdance_scale.observe.sample_grids import has_start, newest_samples, read_start, write_samples, write_start

SECTION = SampleSection(prompts=("a red circle", "a blue square", "two stars"), size_px=(8, 8), guidance=3.0)


def pictures(first: int) -> list[np.ndarray]:
    return [np.full((8, 8, 3), first + number, dtype=np.uint8) for number in range(len(SECTION.prompts))]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[str]]]:
    """Of every grid: the levels of its pictures, and its captions."""
    grids: list[tuple[list[int], list[str]]] = []

    def image_grid(images: list[np.ndarray], captions: list[str], path: Path, columns: int) -> None:
        grids.append(([int(image[0, 0, 0]) for image in images], captions))
        Image.fromarray(images[0]).save(path)

    monkeypatch.setattr(sample_grids, "image_grid", image_grid)
    return grids


def test_each_picture_is_beside_that_of_the_start(tmp_path: Path, drawn) -> None:
    write_start(tmp_path, pictures(10), SECTION)
    write_samples(tmp_path, 7, pictures(20), SECTION)
    levels, captions = drawn[0]
    assert levels == [10, 20, 11, 21, 12, 22]
    assert captions == [
        text for prompt in SECTION.prompts for text in ("at the start", f"step 7: {prompt}")
    ]  # fmt: skip
    assert newest_samples(tmp_path) == tmp_path / "samples" / "step_000007.png"
    for step in (999_999, 1_000_000):
        write_samples(tmp_path, step, pictures(20), SECTION)
    assert newest_samples(tmp_path) == tmp_path / "samples" / "step_1000000.png"


def test_a_run_without_a_start_has_its_pictures_alone(tmp_path: Path, drawn) -> None:
    write_samples(tmp_path, 7, pictures(20), SECTION)
    assert drawn == [([20, 21, 22], list(SECTION.prompts))] and not has_start(tmp_path)


def test_a_changed_prompt_has_no_picture_of_the_start(tmp_path: Path, drawn) -> None:
    write_start(tmp_path, pictures(10), SECTION)
    changed = dataclasses.replace(SECTION, prompts=("a red circle", "a green square", "two stars"))
    write_samples(tmp_path, 7, pictures(20), changed)
    levels, captions = drawn[0]
    assert levels == [10, 20, 255, 21, 12, 22] and captions[2:4] == ["none at the start", "step 7: a green square"]


@pytest.mark.parametrize("change", [{"guidance": 4.0}, {"size_px": (8, 16)}, {"seed": 1}, {"num_steps": 3}])
def test_pictures_of_other_settings_are_not_compared(tmp_path: Path, change: dict) -> None:
    write_start(tmp_path, pictures(10), SECTION)
    assert read_start(tmp_path, dataclasses.replace(SECTION, every_steps=3)).keys() == {0, 1, 2}
    assert read_start(tmp_path, dataclasses.replace(SECTION, **change)) == {}


def test_the_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    noise = [np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)] * 3
    write_start(tmp_path, noise, SECTION)
    assert all((image == noise[0]).all() for image in read_start(tmp_path, SECTION).values())


def test_pictures_that_were_not_all_written_count_for_nothing(tmp_path: Path, monkeypatch) -> None:
    write_start(tmp_path, pictures(10), SECTION)
    monkeypatch.setattr(sample_grids, "replacing", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_start(tmp_path, pictures(20), SECTION)
    assert not has_start(tmp_path)
