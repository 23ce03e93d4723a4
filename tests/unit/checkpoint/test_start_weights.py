"""Rows of new query tokens, and how they are put into what a rank holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.run_checkpoint import TrainState, save_checkpoint
from bitdance_scale.checkpoint.start_weights import (
    NEW_ROW_SPREAD,
    NewQueries,
    fill_rows,
    first_rows,
    load_start_weights,
)
from bitdance_scale.errors import CheckpointError
from bitdance_scale.parallel.partition import Placement, ShardedValue, fragment_pieces, whole_pieces

TRAINED = torch.randn(15, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1


def new_queries(rule: str, num_new: int = 48, seed: int = 0) -> NewQueries:
    return NewQueries(num_old_rows=100, num_trained=15, num_new=num_new, rule=rule, seed=seed, init_std=0.02)


def test_repeat_takes_the_trained_ones_in_turn():
    rows = new_queries("repeat").rows("embedding.weight", TRAINED)
    assert all(torch.equal(rows[i], TRAINED[i % 15]) for i in range(48))


def test_mean_lies_around_their_mean():
    rows = new_queries("mean", num_new=4000).rows("embedding.weight", TRAINED)
    offset = (rows - TRAINED.mean(dim=0)) / TRAINED.std(dim=0, correction=0)
    # 4000 rows x 64 channels: six standard errors.
    assert abs(float(offset.mean())) < 6 * NEW_ROW_SPREAD / 256_000**0.5
    assert float(offset.std()) == pytest.approx(NEW_ROW_SPREAD, rel=0.01)


def test_noise_is_an_embedding_at_its_start():
    rows = new_queries("noise", num_new=4000).rows("embedding.weight", TRAINED)
    assert abs(float(rows.mean())) < 6 * 0.02 / 256_000**0.5 and float(rows.std()) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("rule", ["mean", "noise"])
def test_noise_depends_on_seed_and_table(rule):
    rows = new_queries(rule).rows("embedding.weight", TRAINED)
    assert torch.equal(rows, new_queries(rule).rows("embedding.weight", TRAINED))
    assert not torch.equal(rows, new_queries(rule, seed=1).rows("embedding.weight", TRAINED))
    assert not torch.equal(rows, new_queries(rule).rows("output.weight", TRAINED))


def values_of_a_job(whole: torch.Tensor) -> list[tuple[torch.Tensor, ShardedValue]]:
    """(memory, what it holds of `whole`) on ranks that cut the table by rows, and those rows at any element."""
    num_rows, num_columns = whole.shape
    values = []
    for rank in range(2):
        share = -(-num_rows // 2)
        local = torch.full((share, num_columns), -1.0)
        placement = Placement.split(tuple(local.shape), dim=0, rank=rank, size=2, valid_length=num_rows)
        values.append((local, whole_pieces(local, placement)))
        for start, stop in ((0, 5), (5, 3 * num_columns + 1), (3 * num_columns + 1, local.numel())):
            flat = torch.full((stop - start,), -1.0)
            values.append((flat, fragment_pieces(flat, start, placement)))
    return values


@pytest.mark.parametrize("num_old", [1, 6, 7, 8, 12])
def test_old_and_new_rows_make_up_what_a_rank_holds(num_old):
    whole = torch.arange(13 * 4, dtype=torch.float32).view(13, 4)
    for memory, value in values_of_a_job(whole):
        for piece in first_rows(value, num_old).pieces:
            assert piece.offsets[0] + piece.tensor.shape[0] <= num_old
            piece.tensor.copy_(box_of(whole, piece))
        fill_rows(value, num_old, whole[num_old:])
        for piece in value.pieces:
            assert torch.equal(piece.tensor, box_of(whole, piece))
        # Nothing but padding is left as it was.
        assert int((memory == -1.0).sum()) == memory.numel() - sum(piece.tensor.numel() for piece in value.pieces)


def box_of(whole: torch.Tensor, piece) -> torch.Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.tensor.shape, strict=True))]


def value(fill: float, dtype: torch.dtype = torch.float32) -> ShardedValue:
    return whole_pieces(torch.full((2, 3), fill, dtype=dtype), Placement.replicated((2, 3)))


def checkpoint_of(root: Path, *kinds: str) -> Path:
    """A checkpoint whose weights are 1, masters 2, averages 3."""
    optimizer = {f"{kind}.w": value({"master": 2, "average": 3}[kind]) for kind in kinds}
    state = TrainState(step=4, images=0, tokens=0, loader={}, optimizer={}, tokenizer_digest="abc")
    return save_checkpoint(CheckpointFolder(root, keep=1), state, {"w": value(1, torch.bfloat16)}, optimizer, "")


@pytest.mark.parametrize(
    ("kinds", "weights", "wanted"),
    [
        ((), "trained", 1),
        (("master",), "trained", 2),
        (("master", "average"), "trained", 2),
        (("master", "average"), "averaged", 3),
        (("average",), "averaged", 3),
    ],
)
def test_a_start_takes_the_weights_that_are_chosen(tmp_path, kinds, weights, wanted):
    model, masters = {"w": value(0, torch.bfloat16)}, {"w": value(0)}
    path = checkpoint_of(tmp_path, *kinds)
    load_start_weights(path, model, masters, tokenizer_digest="abc", weights=weights)
    for found in (model, masters):
        assert torch.equal(found["w"].pieces[0].tensor.float(), torch.full((2, 3), float(wanted)))


def test_a_start_from_averages_that_are_not_there_touches_nothing(tmp_path):
    model, masters = {"w": value(0, torch.bfloat16)}, {"w": value(0)}
    path = checkpoint_of(tmp_path, "master")
    with pytest.raises(CheckpointError, match=r"run.start_weights = 'averaged': .*step_00000004 has no averaged"):
        load_start_weights(path, model, masters, tokenizer_digest="abc", weights="averaged")
    assert not masters["w"].pieces[0].tensor.any()
