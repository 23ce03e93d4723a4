"""Checkpoints on S3 under several ranks: each file goes there and comes back once, and a run goes on from there."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch

from bitdance_scale.observe.metrics import METRICS_FILE, StepMetrics, read_metrics
from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks
from tests.s3_server import CREDENTIALS, FaultInjector, s3_server

BUCKET = "runs"
ENVIRONMENT = CREDENTIALS | {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
NUM_RANKS = 2
NUM_TENSORS = 5


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as url:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=BUCKET)
        yield url


def _copy_and_fetch(rank: int, root: str, url: str, where: str) -> list[tuple[int, ...]]:
    """Saves, copies, deletes and fetches; returns the steps that waited on this rank after each call."""
    os.environ.update(ENVIRONMENT)
    import torch.distributed as dist

    from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
    from bitdance_scale.checkpoint.integrity import find_damage
    from bitdance_scale.checkpoint.remote_copies import RemoteCopies
    from bitdance_scale.checkpoint.remote_restore import find_latest
    from bitdance_scale.checkpoint.run_checkpoint import TrainState, save_checkpoint
    from bitdance_scale.config.schema import CheckpointSection
    from bitdance_scale.parallel.partition import Placement, whole_pieces
    from bitdance_scale.parallel.topology import start_process_group

    start_process_group(timeout_s=60)
    folder = CheckpointFolder(Path(root), keep=10)
    copies = RemoteCopies(where, CheckpointSection(upload="s3://x", upload_endpoint_url=url), poll_s=0.01)
    # Each rank has rows of its own, and writes files of them.
    split = Placement.split((2, 3), dim=0, rank=rank, size=2, valid_length=4)
    values = {f"w{number}": whole_pieces(torch.full((2, 3), float(rank)), split) for number in range(NUM_TENSORS)}
    waiting = []
    for step in (1, 2, 3, 4):
        state = TrainState(step=step, images=1, tokens=1, loader={}, optimizer={}, tokenizer_digest="")
        save_checkpoint(folder, state, values, {}, "[run]\n")
        copies.upload(folder.root / f"step_{step:08d}")
        waiting.append(copies.status.waiting_steps)
        if step == 1:
            # The first rank's request waits for the test; the other rank may be done with its share.
            time.sleep(0.5)
    dist.barrier()
    if rank == 0:
        Path(root).with_name("go").touch()
    copies.close(60.0)
    dist.barrier()
    steps = copies.steps()
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder.root)
    dist.barrier()
    path = find_latest(folder, RemoteCopies(where, CheckpointSection(upload="s3://x", upload_endpoint_url=url)))
    assert path is not None and path.name == "step_00000004" and find_damage(path) is None
    assert steps == [1, 4], steps
    return waiting


def test_ranks_share_the_files_and_agree_which_checkpoints_are_copied(server, tmp_path) -> None:
    with FaultInjector(server) as injector:

        def hold(method: str, request: str) -> None:
            """What the first rank sends of step 1 arrives after all steps were saved."""
            while method == "PUT" and "rank00000" in request and not (tmp_path / "go").exists():
                time.sleep(0.01)

        injector.before = hold
        waiting = run_ranks(NUM_RANKS, _copy_and_fetch, str(tmp_path / "run"), injector.url, f"s3://{BUCKET}/shared")
        # The checkpoints between were not begun by any rank, and so left out by both, whoever was done with the first.
        assert waiting[0] == [(1,), (1, 2), (1, 3), (1, 4)]
        assert [steps[-1] for steps in waiting[1]] == [1, 2, 3, 4]
        sent = Counter(request.partition("?")[0] for method, request, _ in injector.requests if method == "PUT")
        fetched = Counter(
            request.partition("?")[0]
            for method, request, _ in injector.requests
            if method == "GET" and "list-type" not in request
        )
        assert {count for name, count in sent.items() if not name.endswith("/latest")} == {1}
        assert set(fetched.values()) == {1} and sum(".safetensors" in name for name in fetched) == NUM_RANKS


def _train(rank: int, overrides: list[str]) -> int:
    os.environ.update(ENVIRONMENT)
    from bitdance_scale.config.load import load_config
    from bitdance_scale.train.text_to_image import run_text_to_image

    return run_text_to_image(load_config("demo", overrides))


def numbers(metrics: list[StepMetrics]) -> list[tuple[object, ...]]:
    return [(point.step, point.loss, point.grad_norm, point.images, point.tokens) for point in metrics]


@pytest.mark.large
def test_a_run_goes_on_and_another_starts_from_s3_with_the_same_numbers(server, tmp_path) -> None:
    material = small_demo(tmp_path, num_steps=4, save_every=2)
    remote = f"s3://{BUCKET}/demo"
    # The rate does not depend on how many steps a run has.
    material += [f"checkpoint.upload_endpoint_url={server}", f"run.root='{tmp_path}'", "optim.decay_steps=0"]

    def run(name: str, *overrides: str) -> list[tuple[object, ...]]:
        assert run_ranks(NUM_RANKS, _train, [*material, f"run.name={name}", *overrides]) == [0] * NUM_RANKS
        return numbers(read_metrics(tmp_path / name / METRICS_FILE))

    uninterrupted = run("whole")
    assert run("lost", f"checkpoint.upload={remote}", "run.steps=2") == uninterrupted[:2]
    shutil.rmtree(tmp_path / "lost")
    assert run("lost", f"checkpoint.upload={remote}") == uninterrupted[2:]
    log = (tmp_path / "lost" / "log.txt").read_text()
    assert f"had no checkpoint: step 2 came from {remote}/lost" in log
    assert f"checkpoint of step 4 copied to {remote}/lost" in log

    stage = ["run.stage=ct", "run.steps=1"]
    expected = run("from_folder", *stage, f"run.start_from='{tmp_path / 'whole'}'")
    assert run("from_s3", *stage, f"run.start_from={remote}/lost") == expected
    tensors = [path.name for path in (tmp_path / "from_s3" / "start").rglob("*.safetensors")]
    all_tensors = [path.name for path in (tmp_path / "whole/checkpoints/step_00000004").rglob("*.safetensors")]
    assert 0 < len(tensors) <= len(all_tensors)
