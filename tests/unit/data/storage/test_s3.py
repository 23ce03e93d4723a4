"""Shards on a real S3 server, read through a proxy that refuses, resets, cuts, confuses and delays requests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest
from botocore.exceptions import ClientError
from botocore.loaders import create_loader
from botocore.retries import standard

from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.data.data_errors import ErrorCause, SampleError
from bitdance_scale.data.index.build import build_index
from bitdance_scale.data.loader import Loader
from bitdance_scale.data.reader import ShardReader
from bitdance_scale.data.storage.s3 import S3Store
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.data.storage.store_contract import ReadError
from bitdance_scale.data.storage.stores import Stores
from bitdance_scale.errors import ConfigError, DataError
from tests.s3_server import CREDENTIALS, FAULTS, FaultInjector, s3_server

BUCKET = "images"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server() as url:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        # Without the configuration of this machine.
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        yield url


@pytest.fixture(scope="module")
def client(server: str):
    client = boto3.client("s3", endpoint_url=server)
    client.create_bucket(Bucket=BUCKET)
    return client


@pytest.fixture(scope="module")
def remote(client, data_set: list[str]) -> list[str]:
    """The small data set as objects."""
    for path in data_set:
        client.upload_file(path, BUCKET, f"small/{Path(path).name}")
    return [f"s3://{BUCKET}/small/{Path(path).name}" for path in data_set]


@pytest.fixture
def injector(server: str) -> Iterator[FaultInjector]:
    with FaultInjector(server) as injector:
        yield injector


def section(url: str, **changes: object) -> S3Section:
    return S3Section(**{"endpoint_url": url, "deadline_s": 20.0, "read_timeout_s": 5.0} | changes)


def test_index_and_packs_are_those_of_the_files(
    server: str, remote: list[str], data_set: list[str], tmp_path: Path, make_config, tokenizer
) -> None:
    stores = Stores(section(server))
    local, found = build_index(data_set, tmp_path / "local"), build_index(remote, tmp_path / "remote", stores=stores)
    assert found.hash == local.hash and found.digests == local.digests
    assert [entry.path for entry in found.shards] == remote
    loaders = [
        Loader(make_config(data_set), tokenizer, local, 0, 1),
        Loader(make_config(remote, s3=section(server)), tokenizer, found, 0, 1),
    ]
    for _ in range(3):
        steps = [loader.next_step() for loader in loaders]
        for one, other in zip(*(step.packs for step in steps), strict=True):
            np.testing.assert_array_equal(one.pack.token_ids, other.pack.token_ids)
            assert all(np.array_equal(*images) for images in zip(one.images, other.images, strict=True))
        assert [step.num_skipped for step in steps] == [0, 0]
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("kind", FAULTS)
def test_temporary_failures_are_retried(
    injector: FaultInjector, remote: list[str], data_set: list[str], kind: str
) -> None:
    injector.share, injector.kinds = 0.4, (kind,)
    store = S3Store(section(injector.url), pause=lambda _: None)
    content = Path(data_set[0]).read_bytes()
    numbers = np.random.default_rng(0)
    ranges = [(int(numbers.integers(len(content) - 5000)), int(numbers.integers(1, 5000))) for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda span: store.read(remote[0], *span, ""), ranges))
    assert found == [content[offset : offset + num_bytes] for offset, num_bytes in ranges]
    assert injector.counts[kind] > 5
    assert (store.num_retries > 5) == (kind != "slow_start")


def test_all_that_boto_retries_is_retried(server: str) -> None:
    """By its lists, as its own retries are off: for all services and for S3, in its first and in its standard mode."""
    table = create_loader().load_data("_retry")
    policies = table["retry"]["__default__"]["policies"] | table["retry"]["s3"]["__default__"]["policies"]
    found = [policy if "$ref" not in policy else table["definitions"][policy["$ref"]] for policy in policies.values()]
    answers = [policy["applies_when"]["response"] for policy in found if "response" in policy["applies_when"]]
    errors = [(answer["http_status_code"], answer.get("service_error_code", "")) for answer in answers]
    transient, throttled = standard.TransientRetryableChecker, standard.ThrottledRetryableChecker
    errors += [(400, code) for code in (*transient._TRANSIENT_ERROR_CODES, *throttled._THROTTLED_ERROR_CODES)]
    errors += [(status, "") for status in transient._TRANSIENT_STATUS_CODES]
    assert {(400, "RequestTimeout"), (400, "BadDigest"), (400, "Throttling"), (509, "")} <= set(errors)
    store = S3Store(section(server), pause=lambda _: None)
    for number, (status, code) in enumerate(errors):
        failures = iter([ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "x")])

        def attempt(failures: Iterator[ClientError] = failures) -> bool:
            for failure in failures:
                raise failure
            return True

        store.until_done(attempt, f"status {status} with the code {code!r}", lambda: 0)
        assert store.num_retries == number + 1


def test_a_broken_body_resumes_where_it_broke(injector: FaultInjector, remote, data_set) -> None:
    """Every response is cut in half: the rest of the range still arrives, in smaller and smaller pieces, none twice."""
    injector.share, injector.kinds = 1.0, ("cut",)
    store = S3Store(section(injector.url, deadline_s=0.5), pause=lambda _: None)
    assert store.read(remote[0], 100, 1000, "") == Path(data_set[0]).read_bytes()[100:1100]
    assert 8 <= injector.counts["cut"] <= 12


def test_a_range_past_the_end_is_short(server: str, remote: list[str], data_set: list[str]) -> None:
    content = Path(data_set[0]).read_bytes()
    assert Stores(section(server)).read(remote[0], len(content) - 10, 100) == content[-10:]


def test_retries_end_after_the_deadline(injector: FaultInjector, remote: list[str]) -> None:
    injector.share, injector.kinds = 1.0, ("refused",)
    store = S3Store(section(injector.url, deadline_s=0.3))
    with pytest.raises(
        ReadError, match=rf"s3://{BUCKET}/small/00000.tar, bytes 0..9: nothing arrived for .* status 503"
    ):
        store.read(remote[0], 0, 9, "")


def test_permanent_failures_name_bucket_key_and_cause(
    server: str, injector: FaultInjector, remote: list[str], tmp_path: Path
) -> None:
    store = S3Store(section(server))
    with pytest.raises(ReadError, match=f"s3://{BUCKET}/gone.tar, .*NoSuchKey.*does not exist; correct data.shards"):
        store.read(f"s3://{BUCKET}/gone.tar", 0, 9, "")
    with pytest.raises(DataError, match=f"s3://{BUCKET}/small/gone.tar: there is no such object"):
        build_index([f"s3://{BUCKET}/small/gone.tar"], tmp_path, stores=Stores(section(server)))
    with pytest.raises(DataError, match="list of s3://nowhere/x/: NoSuchBucket"):
        build_index(["s3://nowhere/x/0.tar"], tmp_path, stores=Stores(section(server)))
    injector.share, injector.kinds = 1.0, ("denied",)
    with pytest.raises(ReadError, match="status 403: the credentials of boto3 do not allow it; set AWS_PROFILE"):
        S3Store(section(injector.url)).read(remote[0], 0, 9, "")
    with pytest.raises(DataError, match="data.s3: cannot make a client for S3 .*nobody"):
        S3Store(section(server, profile="nobody"))


def test_a_replaced_object_is_noticed(server: str, client, data_set: list[str], tmp_path: Path) -> None:
    client.upload_file(data_set[0], BUCKET, "replaced/0.tar")
    path = f"s3://{BUCKET}/replaced/0.tar"
    index = build_index([path], tmp_path / "index", stores=Stores(section(server)))
    client.upload_file(data_set[1], BUCKET, "replaced/0.tar")
    with pytest.raises(SampleError, match="PreconditionFailed") as error:
        ShardReader(Stores(section(server))).image(index, 0)
    assert error.value.cause == ErrorCause.SHARD_CHANGED
    again = build_index([path], tmp_path / "index", stores=Stores(section(server)))
    assert len(again) == 5


def test_epochs_of_two_replicas_fetch_every_shard_once(
    injector: FaultInjector, remote: list[str], data_set: list[str], tmp_path: Path, make_config, tokenizer
) -> None:
    """Through the cache, while half of all requests fail; the pixels are those of local files."""
    cached = section(injector.url, cache_dir=str(tmp_path / "cache"), cache_block_mb=1)
    local = build_index(data_set, tmp_path / "local")
    index = build_index(remote, tmp_path / "remote", stores=Stores(section(injector.url)))
    injector.share = 0.5
    config = make_config(remote, s3=cached)
    loaders = [Loader(config, tokenizer, index, rank, 2) for rank in range(2)]
    expected = [Loader(make_config(data_set), tokenizer, local, rank, 2) for rank in range(2)]
    for _ in range(6):
        for loader, reference in zip(loaders, expected, strict=True):
            ours, theirs = loader.next_step(), reference.next_step()
            assert ours.num_skipped == 0
            for one, other in zip(ours.packs, theirs.packs, strict=True):
                assert all(np.array_equal(*images) for images in zip(one.images, other.images, strict=True))
    # 60 samples of 3 shards, each smaller than a block.
    assert sum(loader._reader._stores._s3.cache.num_fetches for loader in loaders) == 3
    for loader in loaders + expected:
        loader.close()


def test_a_cache_that_the_shards_do_not_fit_is_refused(
    server: str, remote: list[str], tmp_path: Path, make_config, tokenizer
) -> None:
    index = build_index(remote, tmp_path / "remote", stores=Stores(section(server)))
    small = section(server, cache_dir=str(tmp_path / "cache"), cache_gb=1e-6)
    with pytest.raises(
        ConfigError, match=r"data.s3.cache_gb=1e-06: the shards on S3 have .* kB. .*Raise data.s3.cache_gb"
    ):
        Loader(make_config(remote, s3=small), tokenizer, index, 0, 1)
    (tmp_path / "file").write_text("")
    unusable = section(server, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="data.s3.cache_dir=.*cannot be used"):
        Loader(make_config(remote, s3=unusable), tokenizer, index, 0, 1)


def test_folders_globs_and_brace_lists(server: str, client, remote: list[str]) -> None:
    for key in ("small/notes.txt", "small/below/9.tar", "smaller/0.tar"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"")
    stores = Stores(section(server))
    below = f"s3://{BUCKET}"
    assert expand_shards([f"{below}/small"], stores=stores) == remote
    assert expand_shards([f"{below}/small/"], stores=stores) == remote
    assert expand_shards([f"{below}/small/0000[12].tar"], stores=stores) == remote[1:]
    assert expand_shards([f"{below}/small*/*.tar"], stores=stores) == [*remote, f"{below}/smaller/0.tar"]
    assert expand_shards([f"{below}/small/{{00000..00002}}.tar"], stores=stores) == remote
    with pytest.raises(DataError, match="'s3://images/none' holds no"):
        expand_shards([f"{below}/none"], stores=stores)


def test_more_objects_than_one_response_holds(server: str, client) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: client.put_object(Bucket=BUCKET, Key=f"many/{n:05d}.tar", Body=b""), range(1003)))
    paths = expand_shards([f"s3://{BUCKET}/many"], stores=Stores(section(server)))
    assert paths == [f"s3://{BUCKET}/many/{n:05d}.tar" for n in range(1003)]


def test_secrets_stay_out_of_logs_and_errors(injector: FaultInjector, remote: list[str], caplog) -> None:
    injector.share, injector.kinds = 1.0, ("denied",)
    with caplog.at_level(logging.DEBUG, logger="bitdance_scale"), pytest.raises(ReadError) as error:
        S3Store(section(injector.url)).read(remote[0], 0, 9, "")
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in caplog.text + str(error.value)
