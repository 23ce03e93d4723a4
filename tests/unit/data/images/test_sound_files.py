"""Files as they are found in the wild: none is refused, and their pixels are those of an independent reference."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.data.image_decode import decode_image
from bitdance_scale.data.images.header import sniff
from tests.unit.data.images.sound_files import SoundFile, jpegs, pngs, webps

REFUSED_BY_PILLOW = ("large text", "transparency of a wrong length", "bare markers False", "bare markers True")


@pytest.mark.parametrize(("files", "least"), [(jpegs, 200), (pngs, 200), (webps, 30)])
def test_no_sound_file_is_refused(files: Callable[[], Iterator[SoundFile]], least: int) -> None:
    """Pixels agree to the level; where something is blended or has a profile, to within what rounding costs."""
    count = 0
    for file in files():
        size_px = file.pixels.shape[:2]
        found = decode_image(file.data, size_px, size_px)
        assert np.abs(found.astype(int) - file.pixels).max() <= file.tolerance, file.name
        header = sniff(file.data)
        if file.name in REFUSED_BY_PILLOW:
            continue
        image = Image.open(io.BytesIO(file.data))
        assert header is not None and header.stored_px == image.size[::-1], file.name
        assert header.format == {"MPO": "JPEG"}.get(image.format, image.format), file.name
        assert header.orientation == image.getexif().get(0x0112, 1), file.name
        count += 1
    assert count >= least
