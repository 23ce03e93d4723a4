"""Rules of settings that say where something lies outside this machine, for every kind of configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from bitdance_scale.config.rule import RuleSet
from bitdance_scale.config.schema import S3_SCHEME, CheckpointSection, RunConfig
from bitdance_scale.credentials import WAY_OUT, find_credentials

RULES = RuleSet()


@RULES.rule("run", "data", "evaluate", "checkpoint")
def _no_setting_holds_credentials(config: RunConfig) -> Iterator[str]:
    """No setting holds credentials: no user or password before a host, no key or signature in a query.

    A configuration is written to the run folder, to every checkpoint and to W&B. Files and overrides are refused before
    anything of them is printed.
    """
    yield from credential_faults(config)


@RULES.rule("checkpoint.upload")
def _uploads_have_a_bucket(config: RunConfig) -> Iterator[str]:
    """`checkpoint.upload` is `s3://BUCKET`, or a prefix in a bucket.

    Checkpoints are copied to `<upload>/<run.name>/`; nothing else than S3 is written to.
    """
    yield from upload_faults(config.checkpoint)


def upload_faults(section: CheckpointSection) -> Iterator[str]:
    """One message per fault of where checkpoints are copied to."""
    where = section.upload
    bucket = where.removeprefix(S3_SCHEME).partition("/")[0]
    if where and not (where.startswith(S3_SCHEME) and bucket):
        yield f"checkpoint.upload = {where!r}: must be s3://BUCKET/PREFIX, or empty to copy nothing"


def credential_faults(tree: object) -> Iterator[str]:
    """One message per setting of a configuration, or of a TOML document, that holds credentials in a URL."""
    for path, found in _credentials_in(tree, ""):
        yield f"{path} holds {found}: a configuration is stored with its run and shown; {WAY_OUT}"


def _credentials_in(tree: object, path: str) -> Iterator[tuple[str, str]]:
    """(setting, what it holds in words that do not repeat it), of values and of the keys of tables."""
    if isinstance(tree, str):
        found = find_credentials(tree)
        if found is None and path.endswith("endpoint_url") and "@" in tree:
            found = "a user or password before the host"
        if found is not None:
            yield path, found
    elif isinstance(tree, Mapping) or (dataclasses.is_dataclass(tree) and not isinstance(tree, type)):
        for name, value in _items(tree):
            in_name = find_credentials(name)
            if in_name is not None:
                yield path or "a key", in_name
            else:
                yield from _credentials_in(value, f"{path}.{name}" if path else name)
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _credentials_in(value, f"{path}[{index}]")


def _items(tree: Any) -> Iterator[tuple[str, object]]:
    if isinstance(tree, Mapping):
        yield from tree.items()
    else:
        yield from ((field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree))
