"""A checkpoint saved by real engines under any layout and loaded under any other: the same bits, the same next step."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_scale.checkpoint.boxes import Box, disjoint_parts
from tests.distributed.class_toy import class_config
from tests.distributed.layout_run import make_engine, step_inputs
from tests.distributed.spawn import run_ranks
from tests.distributed.toy import toy_config

# (ranks of the job, settings of `parallel`); the ranks beyond tensor x pipeline are data-parallel.
LAYOUTS: list[tuple[int, dict[str, object]]] = [
    (1, {"tensor": 1, "pipeline": 1, "zero_stage": 1}),
    (2, {"tensor": 2, "pipeline": 1, "zero_stage": 1}),
    (2, {"tensor": 1, "pipeline": 2, "zero_stage": 1}),
    (2, {"tensor": 1, "pipeline": 1, "zero_stage": 2}),
    (3, {"tensor": 1, "pipeline": 1, "zero_stage": 3}),
    (4, {"tensor": 2, "pipeline": 1, "zero_stage": 1}),
    (4, {"tensor": 2, "pipeline": 1, "zero_stage": 3}),
    (4, {"tensor": 1, "pipeline": 2, "zero_stage": 1}),
    (4, {"tensor": 2, "pipeline": 2, "zero_stage": 1, "sequence_parallel": True, "pipeline_split": (3, 1)}),
    (4, {"tensor": 2, "pipeline": 1, "optimizer": "megatron"}),
]
# Numbers of the layouts that are compared, each with every other; bfloat16 in `make test-large`.
SAVED_LAYOUTS = {"float32": (0, 1, 2, 3, 4, 6, 8, 9), "bfloat16": (1, 4, 5, 7, 9)}
NUM_STEPS = 2
# float32: sums in another order, as between layouts without a checkpoint. bfloat16: the activations of the
# next loss are rounded at 2^-8 in other places; the loss averages over some hundred targets.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass
class Record:
    """What one rank of a saving job holds, and the loss of the step after it."""

    pieces: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]]
    shapes: dict[str, tuple[int, ...]]
    next_loss: float


def _config(parallel: dict[str, object], dtype: str):
    # Under bfloat16 the class-conditional network, whose weights are averaged too.
    config = toy_config(**parallel) if dtype == "float32" else class_config(**parallel)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dtype=dtype))


def _values(engine):
    return engine.model_values() | engine.optimizer_values()


def _state(number: int, optimizer_step: int):
    """A state that differs from every other layout's."""
    from bitdance_scale.checkpoint.run_checkpoint import TrainState

    return TrainState(
        step=100 + number,
        images=8 * number,
        tokens=1000 + number,
        loader={"step": number, "cursors": {"8": [number, 3]}},
        optimizer={"step": optimizer_step, "skipped_steps": number},
        tokenizer_digest="digest",
        images_by_resolution={"8": number, "16": 2 * number},
        skipped_samples=number,
    )


def _rate(number: int) -> float:
    """A different learning rate per layout, so that no two checkpoints hold the same numbers."""
    return 1e-3 * (1 + number / 4)


def _take_step(engine, config, topology, step: int, number: int) -> float:
    from bitdance_scale.parallel.step import train_step

    batch = step_inputs(config, topology, config.parallel.packs_multiple, step)
    losses, outcome = train_step(engine, batch, config.loss, _rate(number), topology)
    assert not outcome.is_skipped
    return losses.total


def _save(rank: int, config, root: Path, number: int) -> Record:
    """Trains, saves, and takes one more step."""
    engine, topology = make_engine(config)
    from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
    from bitdance_scale.checkpoint.run_checkpoint import save_checkpoint

    for step in range(NUM_STEPS):
        _take_step(engine, config, topology, step, number)
    folder = CheckpointFolder(root / str(number), keep=1)
    state = _state(number, engine.optimizer_step())
    save_checkpoint(folder, state, engine.model_values(), engine.optimizer_values(), config_text="")
    values = _values(engine)
    pieces = {name: [(p.offsets, p.tensor.clone()) for p in value.pieces] for name, value in values.items()}
    shapes = {name: value.global_shape for name, value in values.items()}
    return Record(pieces, shapes, _take_step(engine, config, topology, NUM_STEPS, number))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _load(rank: int, config, root: Path, numbers: list[int]) -> tuple[dict[str, list[Box]], float]:
    """Loads each checkpoint in turn into one engine and compares all that this rank holds, bit for bit.

    Returns:
        The boxes that were compared, and the loss of the next step after the last checkpoint.
    """
    engine, topology = make_engine(config)
    from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
    from bitdance_scale.checkpoint.run_checkpoint import load_checkpoint

    for number in numbers:
        expected = load_file(root / f"{number}.safetensors")
        values = _values(engine)
        for value in values.values():
            for piece in value.pieces:
                piece.tensor.fill_(float("nan"))
        engine.set_optimizer_step(0)
        path = CheckpointFolder(root / str(number), keep=1).latest()
        state = load_checkpoint(path, engine.model_values(), engine.optimizer_values(), tokenizer_digest="digest")
        assert state == _state(number, NUM_STEPS), number
        engine.set_optimizer_step(state.optimizer["step"])
        assert engine.optimizer_step() == NUM_STEPS
        for name, value in values.items():
            for piece in value.pieces:
                box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))
                assert piece.tensor.dtype == expected[name].dtype, name
                assert torch.equal(_bits(piece.tensor), _bits(expected[name][box])), (number, name, piece.offsets)
    boxes = {name: [Box(p.offsets, tuple(p.tensor.shape)) for p in v.pieces] for name, v in values.items()}
    return boxes, _take_step(engine, config, topology, NUM_STEPS, numbers[-1])


def _whole(records: list[Record]) -> Tensors:
    """Whole tensors from what the engines of all ranks hold, without the checkpoint."""
    tensors: Tensors = {}
    covered: dict[str, torch.Tensor] = {}
    for record in records:
        for name, pieces in record.pieces.items():
            for offsets, part in pieces:
                tensor = tensors.setdefault(name, torch.empty(record.shapes[name], dtype=part.dtype))
                box = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
                tensor[box] = part
                covered.setdefault(name, torch.zeros(record.shapes[name], dtype=torch.bool))[box] = True
    assert all(bool(mask.all()) for mask in covered.values())
    return tensors


def _assert_covered(boxes_of_ranks: list[dict[str, list[Box]]], tensors: Tensors) -> None:
    """Every element of every tensor was compared on some rank."""
    for name, tensor in tensors.items():
        boxes = {box for boxes in boxes_of_ranks for box in boxes.get(name, [])}
        assert sum(part.num_elements for _, part in disjoint_parts(boxes)) == math.prod(tensor.shape), name


@dataclasses.dataclass
class Saved:
    """Checkpoints of some layouts below `root`, with the tensors they must hold as `<number>.safetensors`."""

    dtype: str
    root: Path
    next_losses: dict[int, float] = dataclasses.field(default_factory=dict)
    tensors: Tensors = dataclasses.field(default_factory=dict)


@pytest.fixture(scope="module")
def saved_in(tmp_path_factory) -> Callable[[str], Saved]:
    """The checkpoints of all layouts in a dtype, saved once."""
    return functools.cache(lambda dtype: _save_all(dtype, tmp_path_factory.mktemp(dtype)))


def _save_all(dtype: str, root: Path) -> Saved:
    saved = Saved(dtype, root)
    for number in SAVED_LAYOUTS[dtype]:
        num_ranks, parallel = LAYOUTS[number]
        records = run_ranks(num_ranks, _save, _config(parallel, dtype), saved.root, number)
        saved.tensors = _whole(records)
        save_file(saved.tensors, saved.root / f"{number}.safetensors")
        saved.next_losses[number] = records[0].next_loss
        # Masters, moments and averages are float32 under either dtype; the weights have the dtype of training.
        for name, tensor in saved.tensors.items():
            is_weight = not name.startswith(("master.", "exp_avg.", "exp_avg_sq.", "average."))
            assert tensor.dtype == (getattr(torch, dtype) if is_weight else torch.float32), name
    # The loss identifies a checkpoint: its learning rate moves the loss by more than the tolerance.
    losses = saved.next_losses.values()
    assert min(abs(a - b) for a, b in itertools.combinations(losses, 2)) > 3 * LOSS_TOLERANCE[dtype]
    return saved


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        pytest.param(dtype, number, marks=[pytest.mark.large] if dtype == "bfloat16" else [])
        for dtype, numbers in SAVED_LAYOUTS.items()
        for number in numbers
    ],
)
def test_a_layout_loads_every_other_bit_for_bit(saved_in, dtype, number):
    saved = saved_in(dtype)
    num_ranks, parallel = LAYOUTS[number]
    others = [other for other in saved.next_losses if other != number]
    found = run_ranks(num_ranks, _load, _config(parallel, saved.dtype), saved.root, others)
    _assert_covered([boxes for boxes, _ in found], saved.tensors)
    for _, loss in found:
        assert loss == pytest.approx(saved.next_losses[others[-1]], rel=LOSS_TOLERANCE[saved.dtype])


@pytest.mark.parametrize("optimizer", ["deepspeed", pytest.param("megatron", marks=pytest.mark.large)])
def test_tied_weights_and_interleaved_stages_move_both_ways(optimizer, tmp_path):
    """Six stages on three ranks: a rank holds stages 1 and 4, and the last one only a copy of the tied weight."""

    def config(**parallel: object):
        toy = _config(parallel, "float32")
        return dataclasses.replace(toy, model=dataclasses.replace(toy.model, num_layers=6, tie_embeddings=True))

    layouts = [(1, config()), (3, config(pipeline=3, virtual_stages=2, optimizer=optimizer))]
    losses = []
    for number, (num_ranks, saved_under) in enumerate(layouts):
        records = run_ranks(num_ranks, _save, saved_under, tmp_path, number)
        whole = _whole(records)
        assert "output.weight" not in whole
        save_file(whole, tmp_path / f"{number}.safetensors")
        losses.append(records[0].next_loss)
    for number, (num_ranks, loaded_under) in enumerate(layouts):
        for _, loss in run_ranks(num_ranks, _load, loaded_under, tmp_path, [1 - number]):
            assert loss == pytest.approx(losses[1 - number], rel=LOSS_TOLERANCE["float32"])
