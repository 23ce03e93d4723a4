"""Reads the text in images; the only file that imports rapidocr, an optional dependency whose wheel holds its weights.

The networks are PaddleOCR's, as ONNX: one finds lines, one reads them. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.questions.words import TextAccuracy, compare

_PACKAGES = ("rapidocr", "onnxruntime")


class TextReader:
    """Reads lines of text.

    Args:
        num_threads: threads of one image; -1 for all cores.

    Raises:
        ConfigError: a package is not installed.
    """

    def __init__(self, num_threads: int = -1) -> None:
        check_packages()
        from rapidocr import RapidOCR

        self._engine = RapidOCR(
            params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": num_threads}
        )

    def read(self, image: np.ndarray) -> list[str]:
        """Lines of text in an image, from top to bottom and left to right; none where there is no text.

        Args:
            image: uint8 [H, W, 3].
        """
        # An array is taken for blue, green, red.
        found = self._engine(np.ascontiguousarray(image[..., ::-1]))
        return list(found.txts or ())

    def accuracy(self, image: np.ndarray, expected: Sequence[str]) -> TextAccuracy:
        """How much of the expected lines an image, uint8 [H, W, 3], shows."""
        return compare(expected, self.read(image))


def check_packages() -> None:
    """Checks that text can be read here.

    Raises:
        ConfigError: a package is not installed.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"reading text in images needs the packages {' and '.join(_PACKAGES)}, and {missing[0]} is not installed; "
            "install them with `pip install 'bitdance_scale[ocr]'`"
        )
