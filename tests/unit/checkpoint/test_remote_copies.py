"""Copies of checkpoints on a real S3 server, through a proxy that breaks what it is told to."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch

from bitdance_scale.checkpoint import remote_copies
from bitdance_scale.checkpoint.checkpoint_folder import CheckpointFolder
from bitdance_scale.checkpoint.integrity import find_damage
from bitdance_scale.checkpoint.remote_copies import RemoteCopies
from bitdance_scale.checkpoint.remote_restore import fetch_start, find_latest
from bitdance_scale.checkpoint.run_checkpoint import TrainState, load_checkpoint, read_state, save_checkpoint
from bitdance_scale.checkpoint.start_weights import load_start_weights
from bitdance_scale.config.schema import CheckpointSection
from bitdance_scale.errors import CheckpointError, DataError
from bitdance_scale.parallel.partition import Placement, ShardedValue, whole_pieces
from bitdance_scale.phases import POSITION
from tests.s3_server import FaultInjector, bucket_server

BUCKET = "copies"
WAIT_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with bucket_server(BUCKET) as url:
        yield url


@pytest.fixture
def injector(server: str) -> Iterator[FaultInjector]:
    with FaultInjector(server) as injector:
        yield injector


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_copies, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote_copies, "_LONGEST_PAUSE_S", 0.02)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture
def make_copies(injector: FaultInjector, prefix: str) -> Iterator[object]:
    made: list[RemoteCopies] = []

    def make(**changes: object) -> RemoteCopies:
        named = {name: changes.pop(name) for name in ("deadline_s",) if name in changes}
        made.append(RemoteCopies(prefix, section(injector.url, **changes), poll_s=0.01, **named))
        return made[-1]

    yield make
    for copies in made:
        copies.close(0.0)


def section(url: str, **changes: object) -> CheckpointSection:
    return CheckpointSection(**{"upload": "s3://unused", "upload_endpoint_url": url} | changes)


def values(fill: float) -> tuple[dict[str, ShardedValue], dict[str, ShardedValue]]:
    def one(dtype: torch.dtype) -> ShardedValue:
        return whole_pieces(torch.full((2, 3), fill, dtype=dtype), Placement.replicated((2, 3)))

    return {"w": one(torch.bfloat16)}, {f"{kind}.w": one(torch.float32) for kind in ("master", "exp_avg", "exp_avg_sq")}


def save(folder: CheckpointFolder, step: int, fill: float = 1.5) -> Path:
    state = TrainState(step=step, images=1, tokens=1, loader={}, optimizer={"step": step}, tokenizer_digest="abc")
    save_checkpoint(folder, state, *values(fill), config_text="[run]\nname = 'x'\n")
    return folder.root / f"step_{step:08d}"


def fill_of(path: Path) -> float:
    model, optimizer = values(0.0)
    load_checkpoint(path, model, optimizer, tokenizer_digest="abc")
    (found,) = {float(x) for value in (*model.values(), *optimizer.values()) for x in value.pieces[0].tensor.unique()}
    return found


def wait(copies: RemoteCopies) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while copies.status.waiting_steps and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not copies.status.waiting_steps


def names(url: str, prefix: str) -> set[str]:
    bucket, _, key = prefix.removeprefix("s3://").partition("/")
    found = boto3.client("s3", endpoint_url=url).list_objects_v2(Bucket=bucket, Prefix=f"{key}/").get("Contents", [])
    return {entry["Key"].removeprefix(f"{key}/") for entry in found}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run" / "checkpoints", keep=10)


def test_a_copy_comes_back_as_it_was_saved(make_copies, folder, tmp_path, injector, caplog):
    copies = make_copies()
    path = save(folder, 7)
    with caplog.at_level(logging.INFO):
        copies.upload(path)
        copies.close(WAIT_S)
    assert copies.status == remote_copies.CopyStatus(copied_step=7)
    assert "checkpoint of step 7 copied to" in caplog.text
    before = {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    shutil.rmtree(tmp_path / "run")
    injector.requests.clear()
    with caplog.at_level(logging.INFO):
        found = find_latest(folder, make_copies())
    assert found == path and find_damage(path) is None and fill_of(path) == 1.5
    assert {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert (folder.root / "latest").read_text() == "step_00000007\n"
    assert "had no checkpoint: step 7 came from s3://" in caplog.text
    # Every file once; the marker and `latest` beside them.
    fetched = [request for method, request, _ in injector.requests if method == "GET" and "list-type" not in request]
    assert len(fetched) == len(set(fetched)) == len(before) + 1


def test_the_marker_is_the_last_of_the_files(make_copies, folder, injector, prefix):
    copies = make_copies()
    path = save(folder, 1)
    copies.upload(path)
    wait(copies)
    sent = [request.partition("?")[0] for method, request, _ in injector.requests if method == "PUT"]
    below = [request.rpartition(f"{prefix.rpartition('/')[2]}/")[2] for request in sent]
    assert below[-2:] == ["step_00000001/manifest.json", "latest"]
    # Before the name of a file is the digest of the list of files.
    assert sorted(name.split("/", 2)[2] for name in below[:-2]) == sorted(
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()
    )


def test_a_copy_without_its_marker_is_not_read_and_is_taken_over(make_copies, folder, injector, server, prefix):
    """The process dies before the marker; the next one sends only what is missing."""
    path = save(folder, 3)
    script = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from bitdance_scale.checkpoint.remote_copies import RemoteCopies\n"
        "from bitdance_scale.checkpoint.remote_folder import RemoteFolder\n"
        "from bitdance_scale.config.schema import CheckpointSection\n"
        "RemoteFolder.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "copies = RemoteCopies(sys.argv[1], CheckpointSection(upload='s3://x', upload_endpoint_url=sys.argv[2]))\n"
        "copies.upload(Path(sys.argv[3]))\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, prefix, server, str(path)], timeout=WAIT_S, check=False)
    assert done.returncode == -signal.SIGKILL
    copies = make_copies()
    assert copies.steps() == [] and copies.folder.latest() is None and len(names(server, prefix)) >= 4
    with pytest.raises(CheckpointError, match=r"step_00000003: no copy of a checkpoint is there \(copies: none\)"):
        copies.folder.find(3)
    # The run goes on from its own checkpoint, which is copied to its end now.
    assert find_latest(folder, copies) == path
    wait(copies)
    assert copies.steps() == [3]
    sent = [request for method, request, _ in injector.requests if method == "PUT"]
    assert len(sent) == 3 and all("manifest.json" in request or "latest" in request for request in sent)
    shutil.rmtree(folder.root)
    assert fill_of(find_latest(folder, copies)) == 1.5


def test_a_server_that_fails_now_and_then_gets_the_copy(make_copies, folder, injector):
    injector.write_share = 0.5
    copies = make_copies()
    for step in (1, 2, 3):
        copies.upload(save(folder, step))
        wait(copies)
    assert copies.steps() == [1, 2, 3] and copies.status.num_failed == 0
    assert sum(injector.counts.values()) > 5


def test_a_server_that_fails_for_good_is_only_warned_of(make_copies, folder, injector, caplog):
    injector.write_share, injector.write_kinds = 1.0, ("denied",)
    copies = make_copies(deadline_s=0.05)
    copies.upload(save(folder, 1))
    wait(copies)
    status = copies.status
    assert (status.copied_step, status.num_failed) == (None, 1) and "status 403" in status.problem
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "the checkpoint of step 1 was not copied, given up after" in warnings[-1]
    assert "Training goes on; the next one will be copied as usual" in warnings[-1]
    # The next one is.
    injector.write_share = 0.0
    copies.upload(save(folder, 2))
    wait(copies)
    assert copies.steps() == [2]
    assert copies.status == remote_copies.CopyStatus(copied_step=2, num_failed=1)


def test_a_checkpoint_that_is_deleted_meanwhile_ends_its_copy_with_a_warning(make_copies, folder, injector, caplog):
    path, copies = save(folder, 1), make_copies()

    def delete(method: str, request: str) -> None:
        if method == "PUT":
            shutil.rmtree(path, ignore_errors=True)

    injector.before = delete
    assert not copies.is_uploading(1)
    copies.upload(path)
    wait(copies)
    assert "the checkpoint of step 1 was not copied, its folder was deleted meanwhile" in caplog.text
    assert copies.steps() == [] and copies.status.num_failed == 1


def test_retention_spares_a_checkpoint_that_is_being_copied(make_copies, injector, tmp_path):
    copies, gate = make_copies(), threading.Event()
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1, is_busy=copies.is_uploading)
    injector.before = lambda method, _: gate.wait(WAIT_S) if method == "PUT" else None
    copies.upload(save(folder, 1))
    copies.upload(save(folder, 2))
    save(folder, 3)
    assert folder.steps() == [1, 2, 3]
    gate.set()
    wait(copies)
    save(folder, 4)
    assert folder.steps() == [4] and copies.steps() == [1, 2]


def test_the_first_rank_names_what_other_ranks_have_not_sent(make_copies, folder, caplog):
    copies = make_copies(deadline_s=0.1)
    # As if there were a second rank, which sends nothing.
    copies._num_ranks = 2
    copies.upload(save(folder, 1))
    wait(copies)
    assert copies.steps() == [] and copies.status.num_failed == 1
    assert "files have not come from other ranks, such as " in caplog.text and "warnings are in logs/" in caplog.text


def test_a_newer_checkpoint_takes_the_place_of_one_that_waits(make_copies, folder, injector, caplog):
    copies, gate = make_copies(), threading.Event()
    injector.before = lambda method, _: gate.wait(WAIT_S) if method == "PUT" else None
    paths = [save(folder, step) for step in (1, 2, 3, 4)]
    copies.upload(paths[0])
    while not injector.requests:
        time.sleep(0.01)
    begun_s = time.monotonic()
    with caplog.at_level(logging.INFO):
        for path in paths[1:]:
            copies.upload(path)
    assert time.monotonic() - begun_s < WAIT_S / 2, "it returns at once"
    assert copies.status.waiting_steps == (1, 4)
    assert [copies.is_uploading(step) for step in (1, 2, 3, 4)] == [True, False, False, True]
    gate.set()
    wait(copies)
    assert copies.steps() == [1, 4]
    assert [step for step in (2, 3) if f"the checkpoint of step {step} is not copied: a newer one" in caplog.text] == [
        2,
        3,
    ]


def test_the_end_of_a_run_waits_so_long_and_no_longer(make_copies, folder, injector, caplog):
    copies, gate = make_copies(), threading.Event()
    injector.before = lambda method, _: gate.wait(WAIT_S) if method == "PUT" else None
    copies.upload(save(folder, 1))
    before = POSITION.changes
    copies.close(0.05)
    assert POSITION.changes > before + 1, "the heartbeat sees that it gets on, however long it waits"
    gate.set()
    assert "the copy of step 1 to s3://" in caplog.text and "was not finished in 0 s" in caplog.text
    assert copies.steps() == []


def test_retention_keeps_the_newest_and_the_round_ones(make_copies, folder, server, prefix):
    client, key = boto3.client("s3", endpoint_url=server), prefix.partition(f"{BUCKET}/")[2]
    # Left by a killed copy, by abandoned training, and by someone else.
    for name in ("step_00000001/abc/tensors/x", "step_00000099/manifest.json", "notes.txt"):
        client.put_object(Bucket=BUCKET, Key=f"{key}/{name}", Body=b"{}")
    copies = make_copies(upload_keep=2, keep_every_steps=4)
    for step in range(2, 8):
        copies.upload(save(folder, step))
        wait(copies)
    assert copies.steps() == [4, 6, 7, 99]
    left = names(server, prefix)
    assert {name.partition("/")[0] for name in left} == {
        "latest",
        "notes.txt",
        *(f"step_{step:08d}" for step in (4, 6, 7, 99)),
    }
    assert copies.folder.latest() == 7


def test_a_step_that_is_trained_again_replaces_its_copy(make_copies, folder, server, prefix):
    copies = make_copies()
    copies.upload(save(folder, 5, fill=1.0))
    wait(copies)
    before = names(server, prefix)
    shutil.rmtree(folder.root)
    copies.upload(save(folder, 5, fill=2.0))
    wait(copies)
    after = names(server, prefix)
    assert len(after) == len(before) and len(after - before) == len(before) - 2
    shutil.rmtree(folder.root)
    assert fill_of(find_latest(folder, copies)) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("damaged", "is damaged: its SHA-256 is not that of what was written; there is no other copy"),
        ("truncated", "it is shorter than it was; there is no other copy"),
        ("missing", "NoSuchKey"),
    ],
)
def test_a_changed_object_is_named_and_nothing_is_committed(make_copies, folder, server, prefix, change, message):
    copies = make_copies()
    copies.upload(save(folder, 5))
    wait(copies)
    shutil.rmtree(folder.root)
    client = boto3.client("s3", endpoint_url=server)
    name = next(name for name in sorted(names(server, prefix)) if name.endswith(".safetensors"))
    key = f"{prefix.partition(f'{BUCKET}/')[2]}/{name}"
    content = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    content[-1] ^= 1
    if change == "missing":
        client.delete_object(Bucket=BUCKET, Key=key)
    else:
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(content if change == "damaged" else content[:-9]))
    with pytest.raises(CheckpointError, match=f"{re.escape(f'{prefix}/{name}')}.*{message}"):
        find_latest(folder, copies)
    assert folder.steps() == [] and not list(folder.root.iterdir())


def test_a_run_never_begins_over_copies_that_cannot_be_read(make_copies, folder, injector, caplog, monkeypatch):
    copies = make_copies()
    assert find_latest(folder, copies) is None
    for url, reason in ((f"{injector.url}", "NoSuchBucket"), ("http://127.0.0.1:9", "Could not connect")):
        monkeypatch.setattr("bitdance_scale.checkpoint.remote_folder.REQUEST_DEADLINE_S", 0.01)
        away = RemoteCopies("s3://nowhere/run", section(url))
        with pytest.raises(CheckpointError, match=f"checkpoint.upload: .*{reason}.*has no checkpoint, and whether"):
            find_latest(folder, away)
    path = save(folder, 1)
    assert find_latest(folder, away) == path
    assert "Could not connect" in caplog.text and "goes on from its own checkpoint, of step 1" in caplog.text


def test_a_damaged_pointer_or_marker_is_named(make_copies, folder, server, prefix):
    copies = make_copies()
    copies.upload(save(folder, 5))
    wait(copies)
    shutil.rmtree(folder.root)
    client, key = boto3.client("s3", endpoint_url=server), prefix.partition(f"{BUCKET}/")[2]
    client.put_object(Bucket=BUCKET, Key=f"{key}/latest", Body=b"step_00000006\n")
    with pytest.raises(CheckpointError, match=r"latest: names 'step_00000006', which is no copy there .step_00000005"):
        find_latest(folder, copies)
    client.delete_object(Bucket=BUCKET, Key=f"{key}/latest")
    assert copies.folder.latest() == 5
    client.put_object(Bucket=BUCKET, Key=f"{key}/step_00000005/manifest.json", Body=b"{}")
    with pytest.raises(CheckpointError, match="step_00000005/manifest.json has version 1"):
        find_latest(folder, copies)


def test_a_newer_copy_than_the_own_checkpoint_is_told(make_copies, folder, caplog):
    copies = make_copies()
    for step in (1, 2):
        copies.upload(save(folder, step))
        wait(copies)
    shutil.rmtree(folder.root)
    path = save(folder, 1)
    assert find_latest(folder, copies) == path
    assert "has a copy of step 2; the run goes on from its own checkpoint, of step 1" in caplog.text


def test_a_start_fetches_what_it_reads(make_copies, folder, injector, prefix, tmp_path, monkeypatch):
    # A file for every tensor.
    monkeypatch.setattr("bitdance_scale.checkpoint.sharded.DEFAULT_MAX_FILE_BYTES", 24)
    monkeypatch.setattr("bitdance_scale.checkpoint.sharded.save_sharded.__kwdefaults__", {"max_file_bytes": 24})
    path, copies = save(folder, 5, fill=3.0), make_copies()
    assert len(list((path / "tensors").glob("*.safetensors"))) == 4
    copies.upload(path)
    wait(copies)
    injector.requests.clear()
    for where in (prefix, f"{prefix}/", f"{prefix}/step_00000005"):
        start = fetch_start(where, section(injector.url), tmp_path / "new")
        assert start == tmp_path / "new" / "start" / "step_00000005"
    # Fetched once, and found in place after that.
    fetched = [request for method, request, _ in injector.requests if method == "GET" and ".safetensors" in request]
    assert len(fetched) == 1 and len(list((start / "tensors").glob("*.safetensors"))) == 1
    with pytest.raises(CheckpointError, match="safetensors is missing"):
        read_state(start)
    model, optimizer = values(0.0)
    masters = {"w": optimizer["master.w"]}
    with pytest.raises(CheckpointError, match="safetensors is missing"):
        load_start_weights(start, model, masters, tokenizer_digest="abc")
    load_start_weights(start, model, masters, tokenizer_digest="abc", is_partial=True)
    assert float(model["w"].pieces[0].tensor.float().mean()) == float(masters["w"].pieces[0].tensor.mean()) == 3.0
    # What it does read must be there.
    next((start / "tensors").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="safetensors is missing"):
        load_start_weights(start, model, masters, tokenizer_digest="abc", is_partial=True)
    fetch_start(prefix, section(injector.url), tmp_path / "new")
    load_start_weights(start, model, masters, tokenizer_digest="abc", is_partial=True)


def test_a_start_from_averages_fetches_them_alone(make_copies, folder, injector, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr("bitdance_scale.checkpoint.sharded.save_sharded.__kwdefaults__", {"max_file_bytes": 24})
    copies, (model, optimizer), (_, averages) = make_copies(), values(3.0), values(7.0)
    copies.upload(save(folder, 4))
    wait(copies)
    optimizer |= {"average.w": averages["master.w"]}
    state = TrainState(step=5, images=1, tokens=1, loader={}, optimizer={"step": 5}, tokenizer_digest="abc")
    copies.upload(save_checkpoint(folder, state, model, optimizer, config_text="[run]\nname = 'x'\n"))
    wait(copies)
    found, filled = values(0.0)
    masters = {"w": filled["master.w"]}
    for weights, fill in (("averaged", 7.0), ("trained", 3.0)):
        start = fetch_start(prefix, section(injector.url), tmp_path / "new", weights=weights)
        assert len(list((start / "tensors").glob("*.safetensors"))) == 1
        load_start_weights(start, found, masters, tokenizer_digest="abc", weights=weights, is_partial=True)
        assert float(found["w"].pieces[0].tensor.float().mean()) == float(masters["w"].pieces[0].tensor.mean()) == fill
    injector.requests.clear()
    with pytest.raises(CheckpointError, match=r"run.start_weights = 'averaged': .*step_00000004.* has no averaged"):
        fetch_start(f"{prefix}/step_00000004", section(injector.url), tmp_path / "new", weights="averaged")
    assert not [request for _, request, _ in injector.requests if ".safetensors" in request]


def test_a_start_that_is_not_there_says_where_to_look(make_copies, folder, injector, prefix, tmp_path, monkeypatch):
    copies = make_copies()
    copies.upload(save(folder, 5))
    wait(copies)
    access = section(injector.url)
    above = prefix.rpartition("/")[0]
    for where, message in (
        (f"{prefix}/step_00000004", r"step_00000004: no copy of a checkpoint is there \(copies: step_00000005\)"),
        (f"{above}/none", "no copy of a checkpoint is there; name the copies of a run"),
        (above, f"no copy of a checkpoint is there; name a run below it: {above}/"),
        ("s3://nowhere/run", "run.start_from: list of s3://nowhere/run/: NoSuchBucket .*correct run.start_from"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fetch_start(where, access, tmp_path / "new")
    with pytest.raises(DataError, match="checkpoint: cannot make a client .*nobody.*checkpoint.upload_profile"):
        fetch_start(prefix, section(injector.url, upload_profile="nobody"), tmp_path / "new")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(CheckpointError, match="NoCredentialsError.*set AWS_PROFILE or checkpoint.upload_profile"):
        fetch_start(prefix, access, tmp_path / "new")


def test_a_checkpoint_that_was_put_there_by_hand_is_read(folder, server, prefix, tmp_path):
    path, client = save(folder, 5, fill=4.0), boto3.client("s3", endpoint_url=server)
    for file in path.rglob("*"):
        if file.is_file():
            key = f"{prefix.partition(f'{BUCKET}/')[2]}/{path.name}/{file.relative_to(path).as_posix()}"
            client.upload_file(str(file), BUCKET, key)
    start = fetch_start(prefix, section(server), tmp_path / "new")
    model, optimizer = values(0.0)
    load_start_weights(start, model, {"w": optimizer["master.w"]}, tokenizer_digest="abc", is_partial=True)
    assert float(model["w"].pieces[0].tensor.float().mean()) == 4.0
