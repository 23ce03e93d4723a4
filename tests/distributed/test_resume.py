"""Killed anywhere and started again, a run ends with the very weights and losses of an uninterrupted one."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from bitdance_scale.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.small_demo import small_demo
from tests.distributed.spawn import run_ranks

NUM_RANKS = 2
NUM_STEPS = 6
SAVE_EVERY = 2
KILL_STEP = 4
FAULT_STEP = 3


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("material")
    overrides = small_demo(folder, num_steps=NUM_STEPS, save_every=SAVE_EVERY)
    # Its two tars as two sources: the place in the data is that of four streams more.
    tars = sorted((folder / "shards").glob("*.tar"))
    sources = [
        f"{{name='{name}', share={share}, shards=['{tar}']}}"
        for (name, share), tar in zip((("open", 3), ("own", 2)), tars, strict=True)
    ]
    return [*overrides, "data.shards=[]", f"data.sources=[{', '.join(sources)}]"]


def _run(rank: int, root: str, overrides: list[str], kill: str | None) -> tuple[str, int]:
    """Trains in this process; `kill` names the moment of SIGKILL, or is "data" for data that cannot be read.

    Returns (digest of this rank's tensors, start step).
    """
    from bitdance_scale.config.load import load_config
    from bitdance_scale.parallel.topology import make_topology, start_process_group
    from bitdance_scale.train.process import StopRequest
    from bitdance_scale.train.run import train
    from bitdance_scale.train.text_to_image import TextToImageJob

    config = load_config("demo", [*overrides, f"run.root='{root}'"])
    start_process_group(timeout_s=60)
    job = TextToImageJob(config, make_topology(config.parallel), Path(root) / config.run.name)
    start_step = job.step

    def die_if(is_moment: bool) -> None:
        if is_moment:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill == "data":
        _break_data(rank)
    elif kill not in (None, "between"):
        # In the thread that saves, while the main thread may be some steps on.
        pattern = f"step_{KILL_STEP:08d}*"
        job.checkpoints._before = lambda action: die_if(action == kill and any(job.checkpoints.root.glob(pattern)))

    class KillingRequest(StopRequest):
        @property
        def is_requested(self) -> bool:
            # Asked after every step: the one after a checkpoint is trained, the next is read already.
            if kill == "between" and job.step == KILL_STEP + 1:
                job.settle()
                die_if(True)
            return super().is_requested

    with KillingRequest() as stop:
        assert train(job, stop)
    digest = hashlib.sha256()
    for values in (job._engine.model_values(), job._engine.optimizer_values()):
        for name in sorted(values):
            for piece in values[name].pieces:
                digest.update(name.encode() + piece.tensor.contiguous().numpy().tobytes())
    return digest.hexdigest(), start_step


def _run_that_cannot_decode(rank: int, root: str, overrides: list[str]) -> str:
    """The error of a run whose first rank cannot decode what was drawn, as when its device has no memory left."""
    from bitdance_scale.vision.tokenizer import VisionTokenizer

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    if rank == 0:
        VisionTokenizer.decode = fail
    try:
        _run(rank, root, overrides, None)
    except RuntimeError as error:
        return str(error)
    return ""


def _break_data(rank: int) -> None:
    """On rank 1 the step after `FAULT_STEP` cannot be read."""
    from bitdance_scale.data.loader import Loader
    from bitdance_scale.errors import DataError

    read, num_read = Loader.next_step, 0

    def read_or_fail(loader):
        nonlocal num_read
        if rank == 1 and num_read == FAULT_STEP:
            raise DataError("too many images cannot be read")
        num_read += 1
        return read(loader)

    Loader.next_step = read_or_fail


@pytest.fixture(scope="module")
def uninterrupted(material, tmp_path_factory):
    root = tmp_path_factory.mktemp("uninterrupted")
    digests = [digest for digest, _ in run_ranks(NUM_RANKS, _run, str(root), material, None)]
    return digests, read_metrics(root / "demo" / METRICS_FILE)


@pytest.mark.parametrize(
    # Before the manifest nothing of the save counts; after the rename all of it does, pointed at or not. What was
    # trained before a fault of the data is saved between two checkpoints.
    ("kill", "resumed_step", "message"),
    [
        ("between", KILL_STEP, "exit code -9"),
        ("manifest", SAVE_EVERY, "exit code -9"),
        ("latest", SAVE_EVERY, "exit code -9"),
        ("data", FAULT_STEP, "too many images"),
    ],
)
def test_broken_run_ends_as_the_uninterrupted_one(material, uninterrupted, tmp_path, kill, resumed_step, message):
    with pytest.raises(AssertionError, match=message):
        # The rank that is left waits for the other, to save with it.
        run_ranks(NUM_RANKS, _run, str(tmp_path), material, kill, grace_s=5.0 if kill == "data" else 0.5)
    records = run_ranks(NUM_RANKS, _run, str(tmp_path), material, None)
    assert [step for _, step in records] == [resumed_step] * NUM_RANKS
    assert [digest for digest, _ in records] == uninterrupted[0]
    metrics = read_metrics(tmp_path / "demo" / METRICS_FILE)
    assert [point.step for point in metrics] == list(range(1, NUM_STEPS + 1))
    for found, expected in zip(metrics, uninterrupted[1], strict=True):
        assert (found.loss, found.grad_norm, found.images, found.tokens, found.images_by_resolution) == (
            expected.loss,
            expected.grad_norm,
            expected.images,
            expected.tokens,
            expected.images_by_resolution,
        )
        # 3 : 2 of the resolutions' 2, 7 and 1 images a step: less than one image off in each of the three resolutions.
        assert found.images_by_source == expected.images_by_source
        assert sum(found.images_by_source.values()) == 10 * found.step
        assert abs(found.images_by_source["own"] - 4 * found.step) < 3


def test_pictures_that_one_rank_cannot_decode_end_the_run_after_a_save(material, tmp_path):
    drawn = ["sample.every_steps=1", "sample.num_steps=2", "sample.prompts=['a red circle']"]
    overrides = [*material, *drawn, "checkpoint.every_steps=100"]
    errors = run_ranks(NUM_RANKS, _run_that_cannot_decode, str(tmp_path), overrides)
    assert errors == ["out of memory"] * NUM_RANKS
    # Of the step after which all ranks hear of it: the next start is past the pictures of the first.
    assert (tmp_path / "demo" / "checkpoints" / "latest").read_text() == "step_00000002\n"
