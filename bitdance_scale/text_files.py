"""Text files that a user hands in: UTF-8, whatever the locale, with or without a byte order mark."""

from __future__ import annotations

import codecs
from pathlib import Path

# The mark of UTF-32 begins with that of UTF-16, so it comes first.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_utf8(path: Path) -> str:
    r"""The text of a file, its line ends as `\n`.

    Raises:
        OSError: of the file system.
        ValueError: as `decode_utf8`.
    """
    return decode_utf8(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def split_lines(text: str) -> list[str]:
    r"""The lines of a text that `read_utf8` has read; one `\n` at its end begins no further line.

    Only `\n` ends lines: `str.splitlines` also cuts at other separators of Unicode, which texts and JSON may hold.
    """
    return text.removesuffix("\n").split("\n")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode a text: JSON, file names and arguments of commands can hold lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def decode_utf8(content: bytes) -> str:
    """Text from its bytes; a byte order mark, which some editors write, is no part of it.

    Raises:
        ValueError: it is in another encoding; the message names it, as far as that can be told, and the way out.
    """
    for mark, name in _OTHER_MARKS:
        if content.startswith(mark):
            raise ValueError(f"is {name} text, expected UTF-8; save it as UTF-8")
    if b"\0" in content:
        raise ValueError("holds zero bytes, as UTF-16 without a byte order mark does, expected UTF-8; save it as UTF-8")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"is not UTF-8 text (byte 0x{byte:02x} after {error.start} bytes; it may be of ISO-8859-1, Windows-1252 or "
            "GBK); save it as UTF-8"
        ) from error
