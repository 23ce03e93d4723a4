"""Prompts of a benchmark drawn by ranks: stopped, killed, gone on with by another number of ranks, the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.spawn import run_ranks

SIZE_PX = (8, 12)
BATCH_SIZE = 8
NUM_PROMPTS = 7


class Drawn:
    """In place of a network: an image of its text, its seed, and the images it is drawn with, as rounding has it."""

    def __init__(self, dies_after: int | None) -> None:
        self._dies_after, self._calls = dies_after, 0

    def draw(self, texts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        if self._calls == self._dies_after:
            os._exit(9)
        self._calls += 1
        company = hashlib.sha256(repr((*texts, *seeds)).encode()).digest()
        images = []
        for text, seed in zip(texts, seeds, strict=True):
            digest = hashlib.sha256(f"{text} {seed}".encode() + company).digest()
            numbers = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            images.append(numbers.integers(0, 256, (*SIZE_PX, 3), dtype=np.uint8))
        return images


def _draw(
    rank: int, benchmark: str, prompts: Path | None, out: Path, dies_after: int | None, asks_to_stop: bool
) -> int:
    from bitdance_scale.config.parallel_schema import ParallelSection
    from bitdance_scale.evaluation.benchmarks.catalogue import find_benchmark, read_prompts
    from bitdance_scale.evaluation.benchmarks.manifest import Drawing
    from bitdance_scale.train import draw_prompts
    from bitdance_scale.train.draw_prompts import PromptDrawing, run_draw_prompts

    found = replace(find_benchmark(benchmark).of_model(NUM_PROMPTS, ()), num_images=4)
    read = read_prompts(found, prompts)
    drawing = Drawing.of(found, read, model={"name": "small"}, size_px=SIZE_PX, settings={}, seed=3)
    if asks_to_stop:
        real = draw_prompts._draw_batch

        def stopping(*arguments: object) -> None:
            real(*arguments)
            os.kill(os.getpid(), 10)

        draw_prompts._draw_batch = stopping
    model = Drawn(dies_after if rank == 0 else None)
    return run_draw_prompts(
        PromptDrawing(out, found, read, "small", lambda: drawing, BATCH_SIZE), ParallelSection(), lambda topology: model
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=["dpg", "imagenet", pytest.param("geneval", marks=pytest.mark.large)])
def benchmark(request, tmp_path) -> tuple[str, Path | None]:
    """Prompts of four images each: one file for all of them, in one array, or a file each."""
    if request.param == "imagenet":
        return request.param, None
    if request.param == "dpg":
        path = tmp_path / "prompts.json"
        path.write_text(json.dumps({f"item{number}": f"prompt {number}" for number in range(NUM_PROMPTS)}))
    else:
        path = tmp_path / "evaluation_metadata.jsonl"
        line = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
        lines = [json.dumps(line | {"prompt": f"a photo of {number} benches"}) for number in range(NUM_PROMPTS)]
        path.write_text("\n".join(lines) + "\n")
    return request.param, path


def test_killed_and_stopped_drawings_end_with_the_same_bytes(benchmark, tmp_path):
    assert run_ranks(1, _draw, *benchmark, tmp_path / "alone", None, False) == [0]
    expected = contents(tmp_path / "alone")
    pictures = {"samples.npz", "grid.png"} if benchmark[0] == "imagenet" else {n for n in expected if n[-4:] == ".png"}
    assert pictures <= expected.keys() and len(pictures) >= (2 if benchmark[0] == "imagenet" else NUM_PROMPTS)
    out = tmp_path / "broken"
    # Three replicas, one of which dies in its second turn: what was drawn stays.
    with pytest.raises(AssertionError, match="exit code 9"):
        run_ranks(3, _draw, *benchmark, out, 1, False, grace_s=2.0)
    there = contents(out)
    assert {"drawing.json"} < there.keys() and not expected.keys() <= there.keys() and "run.lock" not in expected
    # Two, asked to stop after a turn; and two to the end.
    assert run_ranks(2, _draw, *benchmark, out, None, True) == [75, 75]
    assert run_ranks(2, _draw, *benchmark, out, None, False) == [0, 0]
    assert contents(out) == expected
    # Nothing is drawn again.
    assert run_ranks(1, _draw, *benchmark, out, 0, False) == [0]
