"""A checkpoint saved by real engines under one layout, loaded under others: the same numbers, and the same next step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.layout_run import make_engine, step_inputs
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

NUM_STEPS = 2
Pieces = dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]


def _pieces(engine) -> Pieces:
    values = engine.model_values() | engine.optimizer_values()
    return {name: [(piece.offsets, piece.tensor.clone()) for piece in value.pieces] for name, value in values.items()}


def _continue(engine, config, topology) -> float:
    from bitdance_scale.parallel.step import train_step

    losses, _ = train_step(engine, step_inputs(config, topology, 2, NUM_STEPS), config.loss, 1e-3, topology)
    return losses.total


def _save(rank: int, config, root: str) -> tuple[Pieces, float]:
    """Trains, saves, and takes one more step."""
    engine, topology = make_engine(config)
    from bitdance_scale.checkpoint.folder import CheckpointFolder
    from bitdance_scale.checkpoint.state import TrainState, save_checkpoint
    from bitdance_scale.parallel.step import train_step

    for step in range(NUM_STEPS):
        train_step(engine, step_inputs(config, topology, 2, step), config.loss, 1e-3, topology)
    state = TrainState(NUM_STEPS, 0, 0, {}, {"step": engine.optimizer_step()}, "digest")
    save_checkpoint(
        CheckpointFolder(Path(root), keep=1), state, engine.model_values(), engine.optimizer_values(), config_text=""
    )
    return _pieces(engine), _continue(engine, config, topology)


def _load(rank: int, config, root: str) -> tuple[Pieces, float]:
    """Loads into a new engine, and takes the next step."""
    engine, topology = make_engine(config)
    from bitdance_scale.checkpoint.folder import CheckpointFolder
    from bitdance_scale.checkpoint.state import load_checkpoint

    path = CheckpointFolder(Path(root), keep=1).latest()
    state = load_checkpoint(path, engine.model_values(), engine.optimizer_values(), tokenizer_digest="digest")
    engine.set_optimizer_step(state.optimizer["step"])
    return _pieces(engine), _continue(engine, config, topology)


def _whole(records: list[tuple[Pieces, float]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the pieces of all ranks, so that differently cut ones compare."""
    tensors: dict[str, torch.Tensor] = {}
    for pieces, _ in records:
        for name, boxes in pieces.items():
            for offsets, part in boxes:
                corner = [start + size for start, size in zip(offsets, part.shape, strict=True)]
                old = tensors.get(name)
                shape = corner if old is None else [max(a, b) for a, b in zip(corner, old.shape, strict=True)]
                if old is None or list(old.shape) != shape:
                    grown = torch.full(shape, float("nan"))
                    if old is not None:
                        grown[tuple(slice(size) for size in old.shape)] = old
                    tensors[name] = grown
                box = tuple(slice(start, stop) for start, stop in zip(offsets, corner, strict=True))
                tensors[name][box] = part
    return tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("checkpoints"))
    # Tensor and data parallel at once: slices of flattened slices.
    return root, run_ranks(4, _save, toy_config(tensor=2, zero_stage=1), root)


@pytest.mark.parametrize(("tensor", "pipeline", "data", "zero_stage"), [(1, 2, 1, 1), (1, 1, 2, 3), (1, 2, 2, 1)])
def test_checkpoint_loads_under_another_layout(saved, tensor, pipeline, data, zero_stage):
    root, expected = saved
    config = toy_config(tensor=tensor, pipeline=pipeline, zero_stage=zero_stage)
    found = run_ranks(tensor * pipeline * data, _load, config, root)
    whole, reference = _whole(found), _whole(expected)
    assert whole.keys() == reference.keys()
    for name, tensor_found in whole.items():
        assert torch.equal(tensor_found, reference[name]), f"{name} differs"
    # float32 sums in another order, as between layouts without a checkpoint.
    assert found[0][1] == pytest.approx(expected[0][1], rel=1e-5)
