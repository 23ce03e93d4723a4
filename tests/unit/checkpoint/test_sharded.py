from __future__ import annotations

import math
import pickletools
import weakref
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from bitdance_scale.checkpoint.sharded import load_sharded, save_sharded
from bitdance_scale.checkpoint.tensor_index import read_index
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.partition import (
    ConsumedValue,
    Piece,
    Placement,
    ShardedValue,
    fragment_pieces,
    whole_pieces,
)


def whole(tensor: torch.Tensor) -> ShardedValue:
    return whole_pieces(tensor, Placement.replicated(tuple(tensor.shape)))


def fragments(tensor: torch.Tensor, cuts: list[int]) -> ShardedValue:
    """The tensor in flat fragments, each a copy of its own."""
    flat, placement = tensor.reshape(-1), Placement.replicated(tuple(tensor.shape))
    pieces: list[Piece] = []
    for start, stop in zip([0, *cuts], [*cuts, flat.numel()], strict=True):
        pieces.extend(fragment_pieces(flat[start:stop].clone(), start, placement).pieces)
    return ShardedValue(tuple(tensor.shape), tensor.dtype, tuple(pieces))


def joined(value: ShardedValue) -> torch.Tensor:
    result = torch.empty(value.global_shape, dtype=value.dtype)
    for piece in value.pieces:
        result[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))] = piece.tensor
    return result


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=generator),
        "half": torch.randn(4, 3, 2, generator=generator).to(torch.bfloat16),
        "vector": torch.randn(11, generator=generator),
        "scalar": torch.tensor(3.5),
        "count": torch.arange(6),
    }


def cleared(values: dict[str, ShardedValue]) -> dict[str, ShardedValue]:
    for value in values.values():
        for piece in value.pieces:
            piece.tensor.fill_(-1)
    return values


# 40 bytes cut every tensor into several files, the default puts all into one.
@pytest.mark.parametrize("max_file_bytes", [40, 2**20])
def test_round_trip_into_other_pieces_is_bit_equal(tmp_path, max_file_bytes):
    tensors = make_tensors()
    save_sharded(tmp_path, {name: whole(tensor) for name, tensor in tensors.items()}, max_file_bytes=max_file_bytes)
    cuts = {"matrix": [3, 17, 18], "half": [1, 5, 6, 23], "vector": [4]}
    values = cleared({name: fragments(tensor, cuts.get(name, [])) for name, tensor in tensors.items()})
    load_sharded(tmp_path, values)
    for name, tensor in tensors.items():
        assert torch.equal(joined(values[name]), tensor)


# In files of 40 bytes, of which a tensor has several, two ranks wrote parts of all tensors.
def test_what_is_handed_over_is_whole_and_alone(tmp_path):
    tensors = make_tensors() | {"other": torch.randn(6, 9, generator=torch.Generator().manual_seed(1))}
    cuts = {"matrix": [3, 17, 18], "half": [1, 5, 6, 23], "other": [4, 30]}
    saved = {name: fragments(tensor, cuts.get(name, [])) for name, tensor in tensors.items()}
    save_sharded(tmp_path, saved, max_file_bytes=40)
    alive: list[weakref.ref] = []
    taken: dict[str, torch.Tensor] = {}

    class Watched(ConsumedValue):
        def make_slice(self) -> torch.Tensor:
            assert not any(made() is not None for made in alive), "a tensor is held beside another"
            tensor = super().make_slice()
            alive.append(weakref.ref(tensor.untyped_storage()))
            return tensor

    # The second half of the rows or of the columns, as a tensor-parallel rank has it.
    parts = {"half": (0, (2, 3, 2), (2, 2)), "other": (1, (6, 3), (6, 3)), "matrix": (None, (7, 5), None)}
    values = cleared({name: whole(tensor.clone()) for name, tensor in tensors.items() if name not in parts})
    for name, (dim, shape, block) in parts.items():
        global_shape = tuple(tensors[name].shape)
        placement = Placement(global_shape, shape, dim, ((0, *block),) if block else ())
        dtype = torch.float64
        values[name] = Watched(
            placement, dtype, torch.device("cpu"), lambda part, name=name: taken.update({name: part.clone()})
        )
    load_sharded(tmp_path, values, converts_dtype=True)
    assert len(alive) == 3
    for name, value in values.items():
        if name in parts:
            assert torch.equal(taken[name], value.placement.local_part(tensors[name]).double())
        else:
            assert torch.equal(joined(value), tensors[name])


def test_files_hold_no_more_than_asked_for(tmp_path):
    save_sharded(tmp_path, {name: whole(tensor) for name, tensor in make_tensors().items()}, max_file_bytes=64)
    # 284 bytes of tensors in files of at most 64.
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) >= 5
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 64 for file in files)


def test_overlapping_replicas_are_written_once(tmp_path):
    # Two replicas of one tensor cut differently, as a tied weight on two pipeline stages is.
    tensor = make_tensors()["matrix"]
    pieces = fragments(tensor, [3, 17]).pieces + fragments(tensor, [9]).pieces
    save_sharded(tmp_path, {"matrix": ShardedValue((7, 5), torch.float32, pieces)})
    chunks = read_index(tmp_path).tensors["matrix"].chunks
    assert sum(math.prod(chunk.sizes) for chunk in chunks) == 35
    values = cleared({"matrix": whole(tensor.clone())})
    load_sharded(tmp_path, values)
    assert torch.equal(joined(values["matrix"]), tensor)


def test_nothing_in_the_folder_is_a_pickle(tmp_path):
    save_sharded(tmp_path, {name: whole(tensor) for name, tensor in make_tensors().items()})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["index.json", "rank00000_000.safetensors"]
    for path in files:
        assert not zipfile.is_zipfile(path)
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))


def test_loading_does_not_unpickle(tmp_path, monkeypatch):
    tensors = make_tensors()
    save_sharded(tmp_path, {name: whole(tensor) for name, tensor in tensors.items()})

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(module, refuse)
    load_sharded(tmp_path, {name: whole(tensor.clone()) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"more": torch.zeros(2)}, "more: in this model, not in the checkpoint"),
        (lambda t: {n: v for n, v in t.items() if n != "vector"}, "vector: in the checkpoint, not in this model"),
        (lambda t: t | {"matrix": torch.zeros(7, 6)}, r"matrix: shape \[7, 5\] in the checkpoint, \[7, 6\] in this"),
        (lambda t: t | {"half": torch.zeros(4, 3, 2)}, "half: torch.bfloat16 in the checkpoint, torch.float32 in this"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_another_model_is_refused_before_anything_is_written(tmp_path, change, message):
    tensors = make_tensors()
    save_sharded(tmp_path, {name: whole(tensor) for name, tensor in tensors.items()})
    values = cleared({name: whole(tensor.clone()) for name, tensor in change(tensors).items()})
    with pytest.raises(CheckpointError, match=f"a checkpoint of another model .*{message}.*config.toml"):
        load_sharded(tmp_path, values)
    assert all(bool((joined(value) == -1).all()) for value in values.values())


def test_many_differences_are_counted(tmp_path):
    save_sharded(tmp_path, {"a": whole(torch.zeros(1))})
    with pytest.raises(CheckpointError, match="b2: in this model, not in the checkpoint; and 7 more"):
        load_sharded(tmp_path, {f"b{i}": whole(torch.zeros(1)) for i in range(10)})


def test_a_prefix_selects_a_part(tmp_path):
    save_sharded(tmp_path, {"model.a": whole(torch.ones(2)), "optimizer.a": whole(torch.zeros(2))})
    values = {"model.a": whole(torch.zeros(2))}
    load_sharded(tmp_path, values, prefix="model.")
    assert torch.equal(joined(values["model.a"]), torch.ones(2))
    with pytest.raises(CheckpointError, match="optimizer.a: in the checkpoint, not in this model"):
        load_sharded(tmp_path, values)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="index.json: not a readable index.*FileNotFoundError"):
        load_sharded(tmp_path, {})


def test_pieces_that_leave_a_gap_are_not_saved(tmp_path):
    value = ShardedValue((4,), torch.float32, (Piece((0,), torch.zeros(3)),))
    with pytest.raises(CheckpointError, match="a: the ranks hold 3 of 4 elements"):
        save_sharded(tmp_path, {"a": value})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="tensors not written: (NotADirectoryError|FileExistsError)"):
        save_sharded(tmp_path / "file", {"a": whole(torch.zeros(1))})
