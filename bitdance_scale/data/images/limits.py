"""How large a file may be and how much work its decoding may take, and what is raised for a file that is not sound.

The limits are counts, not seconds, so that a file is accepted or refused on every machine alike.
"""

from __future__ import annotations

from bitdance_scale.data.data_errors import ErrorCause, SampleError

# 8192 x 8192: 200 MB decoded, more than any bucket can use. A header that claims more is refused before decoding.
MAX_IMAGE_PIXELS = 1 << 26
MAX_IMAGE_BYTES = 1 << 28
MAX_SCANS = 64
"""Scans of one JPEG. libjpeg's progressive script has 10, and 18 for CMYK; optimising encoders have up to 20."""
# The largest picture may have 24 scans: an empty one of 8192 x 8192 still takes 0.1 s.
MAX_SCAN_PIXELS = 24 * MAX_IMAGE_PIXELS
MAX_CHUNKS = 1 << 16
"""Segments or chunks of a file. A PNG of 256 MiB in the usual 8 KiB chunks has 32,768."""
# Profiles of CMYK presses are the largest, 0.5 to 3 MB.
MAX_PROFILE_BYTES = 1 << 22


def bad_image(detail: str) -> SampleError:
    """The error for a file with missing or corrupt data."""
    return SampleError(ErrorCause.BAD_IMAGE, detail)


def unsupported(detail: str) -> SampleError:
    """The error for a sound file of a kind that is not decoded."""
    return SampleError(ErrorCause.UNSUPPORTED_MODE, detail)


def too_expensive(detail: str) -> SampleError:
    """The error for a file whose decoding would take more work than any sound file does."""
    return SampleError(ErrorCause.TOO_EXPENSIVE, detail)
