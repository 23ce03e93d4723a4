"""The log of storages against memory counted by hand."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdance_scale.parallel.storage_log import StorageLog


def test_peak_counts_what_is_alive_together():
    with FakeTensorMode(), StorageLog() as log:
        first = torch.empty(100)
        second = first + 1
        start = log.position
        del first
        third = torch.cat([second, second])
    peak = log.peak(0, log.position)
    assert peak.total == 400 + 800
    assert [storage.nbytes for storage in peak.storages] == [800, 400]
    assert log.peak(start, start).total == 800
    assert third.shape == (200,)


def test_views_and_meta_tensors_take_nothing():
    with FakeTensorMode(), StorageLog() as log:
        whole = torch.empty(10, 10, dtype=torch.bfloat16)
        views = [whole[0], whole.t(), whole.view(-1)]
        meta = torch.empty(1000, device="meta")
        assert sum(storage.nbytes for storage in log.alive()) == 200
    assert len(views) == 3 and meta.numel() == 1000


def test_autograd_keeps_what_backward_needs():
    with FakeTensorMode(), StorageLog() as log:
        weight = torch.empty(50, 50, requires_grad=True)
        hidden = torch.empty(20, 50)
        # tanh keeps its result for the backward pass, and the sum's input is that result.
        loss = (hidden @ weight).tanh().sum()
        before = sum(storage.nbytes for storage in log.alive())
        assert before == 4 * (50 * 50 + 20 * 50 + 20 * 50 + 1)
        loss.backward()
        log.assign([weight.grad], "gradients")
    peak = log.peak(0, log.position)
    assert peak.by_role["gradients"] == 4 * 50 * 50
    assert any(storage.maker.endswith("of the backward pass") for storage in peak.storages)


def test_the_first_role_stays():
    with FakeTensorMode(), StorageLog() as log:
        tensor = torch.empty(10)
        log.assign([tensor], "weights")
        log.assign([tensor[2:]], "gradients")
    assert log.peak(0, log.position).by_role == {"weights": 40}


def test_written_integers_have_values_others_do_not():
    with FakeTensorMode(), StorageLog():
        written = torch.tensor([3, 5])
        assert [item.item() for item in written] == [3, 5]
        assert torch.ones(1, dtype=torch.int64).item() == 0
        assert torch.zeros(1).item() == 1.0
