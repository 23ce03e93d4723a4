"""Files to and from a real S3 server, through a proxy that refuses, resets, delays and loses answers."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.data.storage import s3_files
from bitdance_scale.data.storage.s3_client import SettingNames
from bitdance_scale.data.storage.s3_files import S3Files, SendingRate
from bitdance_scale.data.storage.store_contract import ReadError, WriteError
from tests.s3_server import WRITE_FAULTS, FaultInjector, bucket_server

BUCKET = "files"
# The least that S3 takes.
PART_BYTES = 5 << 20
NUM_BYTES = 2 * PART_BYTES + 1000


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with bucket_server(BUCKET) as url:
        yield url


@pytest.fixture
def injector(server: str) -> Iterator[FaultInjector]:
    with FaultInjector(server) as injector:
        yield injector


@pytest.fixture
def files(injector: FaultInjector, monkeypatch: pytest.MonkeyPatch) -> S3Files:
    monkeypatch.setattr(s3_files, "PART_BYTES", PART_BYTES)
    section = S3Section(endpoint_url=injector.url, deadline_s=20.0, read_timeout_s=5.0)
    return S3Files(section, SettingNames(), pause=lambda _: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "large"
    path.write_bytes(bytes(range(251)) * (NUM_BYTES // 251 + 1))
    with path.open("r+b") as file:
        file.truncate(NUM_BYTES)
    return path


def test_a_large_file_goes_in_parts_of_bounded_size_and_comes_back_in_such(
    files: S3Files, injector: FaultInjector, source: Path, tmp_path: Path
) -> None:
    path = f"s3://{BUCKET}/large"
    calls = []
    files.write_file(path, source, lambda: calls.append(len(calls)))
    sent = [num_bytes for method, _, num_bytes in injector.requests if method == "PUT"]
    assert sorted(sent) == [1000, PART_BYTES, PART_BYTES] and len(calls) == 3
    found = files.read_file(path, tmp_path / "new" / "back", NUM_BYTES)
    assert found == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (tmp_path / "new" / "back").read_bytes() == source.read_bytes()
    assert sum(method == "GET" for method, _, _ in injector.requests) == 3
    files.delete([path])
    with pytest.raises(ReadError, match="NoSuchKey"):
        files.read(path, 10)


@pytest.mark.parametrize("calculation", ["when_supported", "when_required"])
def test_parts_have_the_checksums_that_s3_asks_for(
    injector: FaultInjector, source: Path, monkeypatch: pytest.MonkeyPatch, calculation: str
) -> None:
    """S3 refuses parts with a checksum whose kind was not announced, and an end without them; this server does not.

    `Checksum Type mismatch occurred, expected checksum Type: null` (github.com/boto/botocore/issues/3216).
    """
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", calculation)
    monkeypatch.setattr(s3_files, "PART_BYTES", PART_BYTES)
    files = S3Files(S3Section(endpoint_url=injector.url), SettingNames())
    asked: dict[str, dict] = {}

    def note(model, params, **_: object) -> None:
        asked.setdefault(model.name, params)

    files.boto.meta.events.register("before-parameter-build.s3", note)
    files.write_file(f"s3://{BUCKET}/checksums", source)
    has_them = calculation == "when_supported"
    assert ("ChecksumAlgorithm" in asked["CreateMultipartUpload"]) == has_them
    assert ("ChecksumAlgorithm" in asked["UploadPart"]) == has_them
    if has_them:
        found = [part.get("ChecksumCRC32") for part in asked["CompleteMultipartUpload"]["MultipartUpload"]["Parts"]]
        content = source.read_bytes()
        parts = [content[begin : begin + PART_BYTES] for begin in range(0, NUM_BYTES, PART_BYTES)]
        assert found == [base64.b64encode(zlib.crc32(part).to_bytes(4, "big")).decode() for part in parts]


@pytest.mark.parametrize("kind", WRITE_FAULTS)
def test_writes_that_fail_are_repeated(files: S3Files, injector: FaultInjector, source: Path, kind: str) -> None:
    injector.write_share, injector.write_kinds = 0.4, (kind,)
    path = f"s3://{BUCKET}/{kind}"
    for number in range(3):
        files.write_file(f"{path}/{number}", source)
        files.write(f"{path}/small", b"content")
    injector.write_share = 0.0
    assert injector.counts[kind] > 2 and (files.num_retries > 2) == (kind != "slow_start")
    assert {name: state.num_bytes for name, state in files.listed(f"{path}/").items()} == {
        **{f"{path}/{number}": NUM_BYTES for number in range(3)},
        f"{path}/small": 7,
    }
    assert files.read(f"{path}/small", 7) == b"content"


def test_a_write_that_is_denied_leaves_the_object_and_no_parts(
    files: S3Files, injector: FaultInjector, source: Path, server: str
) -> None:
    path = f"s3://{BUCKET}/denied"
    files.write(path, b"before")
    denied = []

    def deny_the_second_part(method: str, request: str) -> None:
        if "partNumber=1" in request:
            injector.write_share, injector.write_kinds = 1.0, ("denied",)
            denied.append(request)

    injector.before = deny_the_second_part
    with pytest.raises(WriteError, match=f"{path}, part 2: .*status 403: the credentials of boto3 do not allow it"):
        files.write_file(path, source)
    injector.write_share = 0.0
    assert denied and files.read(path, 6) == b"before"
    uploads = boto3.client("s3", endpoint_url=server).list_multipart_uploads(Bucket=BUCKET, Prefix="denied")
    assert uploads.get("Uploads", []) == []


def test_objects_that_were_not_deleted_for_now_are_deleted_later(files: S3Files) -> None:
    """S3 answers with status 200 and names them, and the reason of each."""
    paths = [f"s3://{BUCKET}/deleted/{number}" for number in range(3)]
    for path in paths:
        files.write(path, b"content")
    codes = ["SlowDown", "InternalError"]

    def leave_one(parsed: dict, **_: object) -> None:
        if codes:
            parsed["Errors"] = [{"Key": "deleted/1", "Code": codes.pop()}]

    files.boto.meta.events.register("after-call.s3.DeleteObjects", leave_one)
    files.delete(paths)
    assert files.num_retries == 2 and codes == [] and files.listed(f"s3://{BUCKET}/deleted/") == {}
    codes.append("AccessDenied")
    with pytest.raises(WriteError, match=r"deleted/1: not deleted \(AccessDenied\)"):
        files.delete(paths)
    assert files.num_retries == 2


def test_an_error_of_the_caller_ends_a_write_between_two_parts(files: S3Files, source: Path) -> None:
    left = iter([None, None])
    with pytest.raises(StopIteration):
        files.write_file(f"s3://{BUCKET}/ended", source, lambda: next(left))
    assert files.listed(f"s3://{BUCKET}/ended") == {}


def test_the_rate_bounds_what_is_sent_on_average() -> None:
    now_s, pauses = [0.0], []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        now_s[0] += seconds

    rate = SendingRate(100.0, pause, lambda: now_s[0])
    for _ in range(5):
        rate.wait(200)
    # Four pauses of two seconds: 1000 bytes end ten seconds after the first byte.
    assert pauses == [2.0] * 4
    now_s[0] += 1000.0
    rate.wait(200)
    rate.wait(200)
    assert pauses == [2.0] * 5
    unlimited = SendingRate(0.0, pause, lambda: now_s[0])
    unlimited.wait(10**12)
    unlimited.wait(10**12)
    assert len(pauses) == 5


def test_memory_is_one_part(injector: FaultInjector, files: S3Files, source: Path, tmp_path: Path) -> None:
    """No request, and no answer, is larger than a part, whatever the size of the file."""
    files.write_file(f"s3://{BUCKET}/bounded", source)
    files.read_file(f"s3://{BUCKET}/bounded", tmp_path / "back", NUM_BYTES)
    assert max(num_bytes for _, _, num_bytes in injector.requests) == PART_BYTES
    assert Counter(method for method, _, _ in injector.requests)["GET"] == -(-NUM_BYTES // PART_BYTES)
