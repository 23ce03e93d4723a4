"""The errors a user can cause, and can mend.

Every message states where (file, field or shard), what value was found, which rule it breaks and how to fix it.
"""

from __future__ import annotations

import re

from bitdance_scale.credentials import hide_credentials

# How Python keeps a byte of a file name that is no UTF-8.
_BYTE = re.compile("[\udc80-\udcff]")


def printable(text: str) -> str:
    r"""A text as UTF-8 can say it: bytes of names in another encoding, and lone surrogates of JSON, become escapes.

    `café.tar` in Latin-1 is `caf\xe9.tar`.
    """
    text = _BYTE.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class BitDanceError(Exception):
    """Base of the errors whose message is meant for the user; entry points print it without a traceback.

    Args:
        message: it is made `printable` and credentials of a URL in it are hidden, as messages are printed, stored and
            sent to other ranks.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(hide_credentials(printable(message)))


class ConfigError(BitDanceError):
    """A configuration that cannot be run."""


class DataError(BitDanceError):
    """Training data that is missing, damaged or against the configuration."""


class UnreadableError(DataError):
    """A file that cannot be read now: its storage fails, or it is another user's. It need not be damaged."""


class CheckpointError(BitDanceError):
    """A checkpoint that is missing, incomplete, damaged or of another model."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not what was written; an older one may be whole."""


class DiskFullError(CheckpointError):
    """A checkpoint for which there is no room."""


class TrainingError(BitDanceError):
    """A run that cannot go on, such as one whose gradients stay non-finite."""
