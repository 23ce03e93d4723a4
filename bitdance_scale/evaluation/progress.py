"""How far a long work on images is, in the log."""

from __future__ import annotations

import datetime
import logging
import time

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0


class Progress:
    """Images that are done, with their rate and what it means for the rest.

    Args:
        total: images to do.
        what: begins a line of the log, such as the name of a metric; empty for nothing.
    """

    def __init__(self, total: int, what: str = "") -> None:
        self._total, self._done = total, 0
        self._what = f"{what}: " if what else ""
        self._begun_s = self._logged_s = time.monotonic()

    def add(self, number: int) -> None:
        """Counts images as done."""
        self._done += number

    def log(self) -> None:
        """Says how far it is, at most every ten seconds and at the end."""
        now_s = time.monotonic()
        if now_s - self._logged_s < _LOG_EVERY_S and self._done < self._total:
            return
        self._logged_s = now_s
        rate = self._done / max(now_s - self._begun_s, 1e-9)
        logger.info(
            "%s%d of %d images, %.3g images/s, ETA %s",
            self._what, self._done, self._total, rate,
            datetime.timedelta(seconds=round((self._total - self._done) / rate)),
        )  # fmt: skip
