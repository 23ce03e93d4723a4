"""Credentials in URLs: found so that they are refused, and hidden so that no message repeats them.

A URL is stored with the configuration of a run, in every checkpoint and in W&B, and is printed in messages. What it
must never hold is a user or password (`https://user:password@host`), or a key or signature in its query
(`?X-Amz-Signature=`). The lowest module of all, because the errors themselves hide what a message repeats.
"""

from __future__ import annotations

import re

HIDDEN = "***"
"""What is printed in place of credentials."""
WAY_OUT = (
    "take it out, renew it if it was stored or shown, and give credentials to boto3's own chain: the environment "
    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), a profile in ~/.aws, or the role of the instance"
)
"""How credentials reach S3 instead."""

# A URL ends at a blank or where the next one begins. A password may hold quotes, slashes and further signs. A URL that
# was taken for a path has one slash left.
_SCHEME = r"[A-Za-z][\w+.-]*:/{1,2}"
_URL = re.compile(rf"(?P<scheme>{_SCHEME})(?P<rest>(?:(?!{_SCHEME})\S)*)")
_SECRET_NAME = r"[\w.-]*(?:signature|credential|token|secret|passw|pwd|access_?key|api_?key|\bsig\b|\bauth)[\w.-]*"
_SECRET_FIELD = re.compile(rf"(?P<name>[?&#;]{_SECRET_NAME}=)(?P<value>[^\s&#;]+)", re.IGNORECASE)
# `user:password@host` without a scheme; an address of mail has no colon.
_LOGIN = re.compile(r"(?<![\w./@:%+-])[\w.%+~-]+:[^\s/@:'\"]+@(?=[\w\[])")
_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]*\]|[^:]*)(?::\d*)?")


def find_credentials(text: str) -> str | None:
    """What in a text is credentials of a URL, in words that do not repeat them; None if nothing is."""
    if any(_has_login(url["scheme"], url["rest"]) for url in _URL.finditer(text)) or _LOGIN.search(text):
        return "a user or password before the host"
    field = _SECRET_FIELD.search(text)
    return None if field is None else f"a value of {field['name'][1:-1]!r} in the query"


def hide_credentials(text: str) -> str:
    """The text with `HIDDEN` in place of everything that may be credentials of a URL."""
    text = _URL.sub(_without_login, text)
    text = _LOGIN.sub(f"{HIDDEN}@", text)
    return _SECRET_FIELD.sub(rf"\g<name>{HIDDEN}", text)


def _has_login(scheme: str, rest: str) -> bool:
    """Whether something stands before the host.

    The secret keys of AWS hold slashes, so that a login may seem to end before its `@`: then what is taken for the port
    is no number. A bucket has no colon at all.
    """
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        return True
    if ":" not in host or "@" not in rest:
        return False
    return scheme.lower().startswith("s3:") or _PORT.fullmatch(host) is None


def _without_login(url: re.Match[str]) -> str:
    if not _has_login(url["scheme"], url["rest"]):
        return url[0]
    return f"{url['scheme']}{HIDDEN}@{url['rest'].rpartition('@')[2]}"
