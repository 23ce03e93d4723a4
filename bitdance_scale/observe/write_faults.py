"""What a run shows must not end it: files that cannot be written are warned of, seldom, and training goes on."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Iterator

from bitdance_scale.atomic_files import is_storage_fault

WARN_EVERY_S = 300.0

logger = logging.getLogger(__name__)


class WarningClock:
    """Says when a cause may be warned of: at its first time, and then at most every `WARN_EVERY_S`."""

    def __init__(self) -> None:
        self._said_s: dict[object, float] = {}

    def is_due(self, cause: object) -> bool:
        """Whether the cause may be warned of now, which counts as having done so."""
        now_s = time.monotonic()
        if cause in self._said_s and now_s - self._said_s[cause] < WARN_EVERY_S:
            return False
        self._said_s[cause] = now_s
        return True


class WriteFaults:
    """Files of one run that could not be written."""

    def __init__(self) -> None:
        self._clock = WarningClock()

    @contextlib.contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """Goes on where the block fails because storage is full, read-only or failing; other errors are raised.

        Args:
            what: what the block writes, for the warning.
        """
        try:
            yield
        except OSError as error:
            if not is_storage_fault(error):
                raise
            self.warn(what, error)

    def warn(self, what: str, error: OSError) -> None:
        """Says that something could not be written; once per cause and then at most every `WARN_EVERY_S`."""
        if self._clock.is_due(error.errno):
            cause = errno.errorcode.get(error.errno or 0, "OSError")
            logger.warning(
                "%s: cannot be written (%s); training goes on, and this is said again in %.0f minutes at the earliest. "
                "Make room on the disk, or see that it can be written [%s]",
                what,
                error,
                WARN_EVERY_S / 60,
                cause,
            )
