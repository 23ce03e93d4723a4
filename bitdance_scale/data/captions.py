"""Which text of a sample is its caption, and what is wrong with it when there is none.

The `.txt` member is the caption; without one, `caption` of the `.json` is. A sample whose caption is empty, missing or
not UTF-8 is still an image worth learning: it is trained unconditionally, as if its caption had been dropped, and the
ledger counts it.
"""

from __future__ import annotations

import enum
from typing import Any

from bitdance_scale.data.ledger import FaultCause


class CaptionStatus(enum.IntEnum):
    """How the caption of an indexed sample was found; stored in the index as uint8."""

    USABLE = 0
    EMPTY = 1
    MISSING = 2
    INVALID = 3

    @property
    def fault(self) -> FaultCause | None:
        """What the ledger counts a sample of this status under."""
        return _FAULTS[self]


_FAULTS = {
    CaptionStatus.USABLE: None,
    CaptionStatus.EMPTY: FaultCause.EMPTY_CAPTION,
    CaptionStatus.MISSING: FaultCause.MISSING_CAPTION,
    CaptionStatus.INVALID: FaultCause.INVALID_CAPTION,
}


def choose_caption(text: bytes | None, record: dict[str, Any]) -> tuple[str, CaptionStatus]:
    """The caption of a sample, stripped, and its status; the caption is empty unless the status is USABLE.

    Args:
        text: content of the `.txt` member, None when there is none.
        record: content of the `.json` member, empty when there is none.
    """
    if text is None:
        caption = record.get("caption")
        if caption is None:
            return "", CaptionStatus.MISSING
        # JSON can spell lone surrogates, which no UTF-8 text holds.
        if not isinstance(caption, str) or _has_surrogates(caption):
            return "", CaptionStatus.INVALID
    else:
        try:
            caption = text.decode("utf-8")
        except UnicodeDecodeError:
            return "", CaptionStatus.INVALID
    caption = caption.strip()
    return caption, CaptionStatus.USABLE if caption else CaptionStatus.EMPTY


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
