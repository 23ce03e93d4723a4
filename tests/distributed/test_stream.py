"""Training from streams on two replicas: commands and tars, another number of packs on each, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks


def _train(rank: int, overrides: list[str], folder: str) -> int:
    import os

    from bitdance_scale.config.load import load_config
    from bitdance_scale.config.rules import check
    from bitdance_scale.train.text_to_image import run_text_to_image

    os.chdir(folder)
    config = load_config("demo", overrides)
    check(config, int(os.environ["WORLD_SIZE"]))
    return run_text_to_image(config)


def _packs(rank: int, overrides: list[str]) -> list[tuple[int, int, int]]:
    """(packs of this replica by itself, packs of the step, samples with targets) of some steps."""
    import torch.distributed as dist

    from bitdance_scale.config.load import load_config
    from bitdance_scale.data.stream import StreamLoader
    from bitdance_scale.parallel.agreement import largest_number
    from bitdance_scale.sequence.tokens import load_text_tokenizer

    dist.init_process_group("gloo")
    config = load_config("demo", overrides)
    text = load_text_tokenizer(config.text, config.vision.block_tokens)
    found = []
    with StreamLoader(config, text, rank, 2) as loader:
        for _ in range(4):
            step = loader.next_step()
            filled = loader.filled(step, largest_number(len(step.packs)))
            num_trained = sum(int(pack.pack.sample_predicts.sum()) for pack in filled.packs)
            found.append((len(step.packs), len(filled.packs), num_trained))
    dist.destroy_process_group()
    return found


def stream_overrides(folder: Path, **options: Any) -> list[str]:
    overrides = [text for text in small_demo(folder, **options) if not text.startswith("data.shards=")]
    shards = folder / "shards"
    return [
        *overrides,
        f"data.shards=['pipe:cat {shards}/00000.tar', '{shards}/00001.tar']",
        "data.mode=stream",
        "data.stream_buffer=8",
        "data.max_pack_tokens=512",
    ]


def test_replicas_run_the_same_number_of_packs(tmp_path):
    overrides = stream_overrides(tmp_path, num_steps=4, save_every=100)
    results = run_ranks(2, _packs, overrides)
    for first, second in zip(*results, strict=True):
        assert first[1] == second[1] == max(first[0], second[0])
        assert first[2] + second[2] == 10, "empty packs have no targets"
    assert any(first[0] != second[0] for first, second in zip(*results, strict=True)), "the test wants both to differ"


@pytest.mark.timeout(540)
def test_two_replicas_train_and_resume(tmp_path):
    from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics

    overrides = stream_overrides(tmp_path, num_steps=2, save_every=1)
    assert run_ranks(2, _train, overrides, str(tmp_path), timeout_s=240) == [0, 0]
    more = [text for text in overrides if not text.startswith("run.steps=")] + ["run.steps=4"]
    assert run_ranks(2, _train, more, str(tmp_path), timeout_s=240) == [0, 0]
    run = tmp_path / "runs" / "demo"
    points = read_metrics(run / METRICS_FILE)
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert "no exact epochs" in (run / "log.txt").read_text(encoding="utf-8")
