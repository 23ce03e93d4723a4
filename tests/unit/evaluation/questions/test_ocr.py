from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation.questions import ocr


def test_drawn_words_are_read():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    picture = Image.new("RGB", (640, 260), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(48)
    pen.text((40, 30), "GRAND OPENING", fill=(150, 20, 20), font=font)
    pen.text((60, 140), "fresh bread today", fill="navy", font=font)
    reader = ocr.TextReader(num_threads=1)
    found = reader.accuracy(np.asarray(picture), ["Grand Opening", "Fresh bread tomorrow"])
    assert (found.words, found.words_read, found.is_exact) == (5, 4, False)
    assert reader.accuracy(np.asarray(picture), ["Grand opening", "fresh bread today"]).is_exact
    assert reader.read(np.full((64, 64, 3), 200, np.uint8)) == []


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed; .*bitdance_scale\[ocr\]"):
        ocr.TextReader()
