"""Credentials in URLs are refused wherever a URL can be written, and nothing repeats them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from bitdance_scale.cli.main import main
from bitdance_scale.config.data_schema import S3Section
from bitdance_scale.config.kinds import check_any
from bitdance_scale.config.load import load_config
from bitdance_scale.config.tokenizer_schema import TokenizerConfig
from bitdance_scale.credentials import find_credentials, hide_credentials
from bitdance_scale.data.storage.s3_client import S3Client
from bitdance_scale.data.storage.shards import expand_shards
from bitdance_scale.data.storage.store_contract import ReadError
from bitdance_scale.errors import ConfigError, DataError

SECRET = "hunter2"
LOGIN, SIGNED = f"https://user:{SECRET}@host", f"https://host/x?X-Amz-Signature={SECRET}&X-Amz-Date=1"
BUCKET = f"s3://AKIAKEY:{SECRET}@bucket/a"
WITH_CREDENTIALS = [
    LOGIN,
    SIGNED,
    BUCKET,
    # The secret keys of AWS hold slashes and signs.
    f"s3://AKIAKEY:ab/{SECRET}+x/@bucket/a/{{00..09}}.tar",
    f"https://user:ab/{SECRET}@host:9000",
    f"https://{SECRET}@host",
    f"user:{SECRET}@host:9000",
    f"https://host/?token={SECRET}",
    f"https://host/a?b=1&sig={SECRET}#end",
    f"https://host/?AWSAccessKeyId={SECRET}",
    f"pipe:curl -s https://user:{SECRET}@host/0.tar",
    f"HTTP://user:p'\"{SECRET}@host",
    # As a path is written.
    f"runs/https:/user:{SECRET}@host",
    f"data.shards=['s3://bucket/0.tar','{BUCKET}']",
]
WITHOUT = [
    "https://host:9000",
    "http://[::1]:9000/a@b",
    "http://host:80/a@b",
    "s3://bucket/a@b/{00..99}.tar",
    "s3://bucket/part-?.tar",
    "s3://bucket/token=5/0.tar",
    "data/x:1@2.tar",
    "me@mail.org",
    "rank 0: tensor model.layers.0.weight@0,0 is damaged",
    "two dogs at 10:30 @ home",
]
CONFIG = f"{Path(__file__).parents[2]}/bitdance_scale/config/files/demo.toml"


@pytest.mark.parametrize("text", WITH_CREDENTIALS)
def test_credentials_are_found_and_hidden(text: str) -> None:
    found = find_credentials(text)
    assert found is not None and SECRET not in found
    assert SECRET not in hide_credentials(text) and "***" in hide_credentials(text)
    error = ConfigError(f"where = {text!r}: is wrong")
    assert SECRET not in str(error) + repr(error) + repr(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize("text", WITHOUT)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert find_credentials(text) is None and hide_credentials(text) == text


SETTINGS = {
    "data.s3.endpoint_url": LOGIN,
    "checkpoint.upload_endpoint_url": SIGNED,
    "checkpoint.upload": BUCKET,
    "run.start_from": BUCKET,
    "data.shards": [BUCKET],
    "evaluate.shards": ["data", BUCKET],
    "data.bits_dir": BUCKET,
    "data.index_dir": BUCKET,
    "vision.weights": LOGIN,
    "text.path": LOGIN,
}


def refusal(capfd, *arguments: str) -> str:
    """What a command says that is refused; nothing of it may repeat the secret."""
    assert main(arguments) == 2
    said = "".join(capfd.readouterr())
    assert SECRET not in said
    return said


def as_toml(value: str | list[str]) -> str:
    return f"{value!r}" if isinstance(value, list) else f"'{value}'"


@pytest.mark.parametrize("setting", [*SETTINGS, "data.sources"])
@pytest.mark.parametrize("place", ["file", "argument"])
def test_no_setting_takes_them(setting: str, place: str, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    value = f"[{{name='a', share=1, shards=['{BUCKET}']}}]" if setting == "data.sources" else as_toml(SETTINGS[setting])
    if place == "file":
        (tmp_path / "own.toml").write_text(f"extends = '{CONFIG}'\n{setting} = {value}\n")
    for command in (["check"], ["config", "print"], ["train", "--nproc", "1"], ["memory", "--ranks", "1"]):
        arguments = [*command, "own.toml"] if place == "file" else [*command, "demo", f"{setting}={value}"]
        said = refusal(capfd, *arguments)
        assert setting in said and "boto3's own chain: the environment" in said and "~/.aws" in said
        assert "role of the instance" in said
    assert {path.name for path in tmp_path.iterdir()} <= {"own.toml"}


def test_messages_before_the_check_do_not_repeat_them(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    documents = {
        "syntax": f"data.s3.endpoint_url = {LOGIN}\n",
        "twice": f"'{LOGIN}' = 1\n'{LOGIN}' = 1\n",
        "key": f"extends = 'demo'\n'{LOGIN}' = 1\n",
        "type": f"extends = 'demo'\nrun.steps = '{LOGIN}'\n",
        "unknown": f"extends = 'demo'\ndata.endpoint = '{LOGIN}'\n",
        "base": f"extends = '{LOGIN}'\n",
        "preset": f"extends = 'demo'\nmodel.preset = '{LOGIN}'\n",
    }
    for name, text in documents.items():
        (tmp_path / f"{name}.toml").write_text(text)
        refusal(capfd, "check", f"{name}.toml")
    for arguments in (
        ["check", BUCKET],
        ["check", "demo", LOGIN],
        ["check", "demo", f"nonsense.{LOGIN}"],
        ["check", "demo", f"run.steps={LOGIN}"],
        ["check", "demo", f"run.name=1=user:{SECRET}@host"],
        ["check", "demo", f"--unknown={LOGIN}"],
        [LOGIN],
    ):
        refusal(capfd, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["index", BUCKET],
        ["index", "data", "--endpoint-url", LOGIN],
        ["index", "data", "--endpoint-url", SIGNED],
        ["index", "data", "--index-dir", BUCKET],
        ["inspect", BUCKET],
        ["inspect", "--config", BUCKET],
        ["encode", "demo", f"data.shards=['{BUCKET}']", "--out", "bits"],
        ["encode", "demo", "--out", BUCKET],
        ["tokenizer", "evaluate", "--shards", BUCKET],
        ["pack-length", "demo", f"data.shards=['{BUCKET}']"],
        ["plot", BUCKET, "--out", "page.png"],
        ["export", BUCKET, "out"],
        ["sample", BUCKET],
    ],
)
def test_no_command_takes_them(arguments: list[str], tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert "boto3's own chain" in refusal(capfd, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_endpoint_of_the_environment_is_refused(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", LOGIN)
    with pytest.raises(DataError, match="endpoint that boto3 found .*holds a user or password") as error:
        S3Client(S3Section())
    assert SECRET not in str(error.value)
    monkeypatch.setenv("WDS_PLACE", f"AKIAKEY:{SECRET}@bucket")
    for spec in ("s3://${PLACE}/0.tar", "${PLACE}/0.tar"):
        with pytest.raises(DataError, match="DATASET holds a user or password") as error:
            expand_shards([spec], "DATASET")
        assert SECRET not in str(error.value)


def test_a_proxy_that_cannot_be_reached_is_named_without_its_password(monkeypatch, caplog, tmp_path: Path) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://user:{SECRET}@127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    client = S3Client(S3Section(endpoint_url="http://host.invalid", anonymous=True, deadline_s=0.01))
    with pytest.raises(ReadError, match="127.0.0.1:9") as error:
        client.fetch("s3://bucket/key", 0, 10, "")
    assert SECRET not in str(error.value) + caplog.text


def test_a_tokenizer_is_checked_by_the_same_rule(tmp_path: Path) -> None:
    config = load_config("demo_tokenizer", schema=TokenizerConfig)
    object.__setattr__(config.checkpoint, "upload", BUCKET)
    with pytest.raises(ConfigError, match="checkpoint.upload holds a user or password") as error:
        check_any(config, None)
    assert SECRET not in str(error.value)
    object.__setattr__(config.checkpoint, "upload", "gs://bucket")
    with pytest.raises(ConfigError, match="checkpoint.upload = 'gs://bucket': must be s3://BUCKET/PREFIX"):
        check_any(config, None)


def test_log_files_hide_them(tmp_path: Path) -> None:
    script = (
        "import logging, sys, warnings\n"
        "from pathlib import Path\n"
        "from bitdance_scale.observe.console import setup_logging\n"
        "for rank in (0, 1):\n"
        "    setup_logging(Path(sys.argv[1]), rank)\n"
        "    logging.getLogger('bitdance_scale').error('cannot reach %s', sys.argv[2])\n"
        "    warnings.warn(sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), LOGIN], capture_output=True, text=True, check=True
    )
    written = "".join(path.read_text() for path in tmp_path.rglob("*.txt"))
    assert SECRET not in written + done.stdout + done.stderr
    assert written.count("cannot reach https://***@host") == 2
