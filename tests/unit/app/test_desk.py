"""What a click does, and what is to be seen then."""

from __future__ import annotations

import errno
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.app.desk import Desk
from bitdance_scale.app.drawing import Studio
from bitdance_scale.app.settings import Fields, read_settings
from bitdance_scale.errors import ConfigError
from tests.unit.app.fake_drawer import FakeDrawer

FIELDS = Fields("a <b>red</b> circle", "32 x 32", 4, 2.0, 3, 2)


@pytest.fixture
def desk(drawer, folder) -> Desk:
    return Desk(Studio(drawer, max_previews=3), folder, max_images=4)


def saved(view) -> list[str]:
    return re.findall(r'<img src="pictures/([^"]+)"', view.pictures)


def test_a_drawing_from_click_to_history(desk, drawer, folder):
    visitor, history = desk.welcome("")
    assert "Drawings are kept here" in history
    views = list(desk.draw(visitor, "tab", FIELDS))
    assert all(view.is_drawing for view in views[:-1]) and not views[-1].is_drawing
    growing = [view.pictures for view in views[:-1] if view.pictures]
    assert len(growing) == 3 and all(html.count('src="data:image/png;base64,') == 2 for html in growing)
    assert not any("download" in html for html in growing)
    assert any('<progress max="16" value="' in (view.status or "") for view in views)
    last = views[-1]
    assert re.search(r"2 pictures in \d+\.\d s", last.status)
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in last.history and "<b>red" not in last.history + last.pictures
    assert "32 x 32 px, 2 images, 4 steps, guidance 2, seed 3" in last.history
    assert 'download="a_b_red_b_circle_seed3.png"' in last.pictures
    bits = drawer.bits(drawer.drawn[0])
    for number, name in enumerate(saved(last)):
        expected = drawer.vision.decode(bits[number], (8, 8)).numpy()
        assert (np.asarray(Image.open(folder.path / name)) == expected).all()
        found = read_settings(folder.path / name)
        assert (found["prompt"], found["seed"], found["images"], found["image"]) == (FIELDS.prompt, 3, 2, number)
    # Another time, or after the page was loaded again.
    assert desk.welcome(visitor) == (visitor, last.history)


def test_an_earlier_drawing_comes_back_with_its_settings(desk):
    visitor, _ = desk.welcome(None)
    first = list(desk.draw(visitor, "tab", FIELDS))[-1]
    list(desk.draw(visitor, "tab", Fields("other", "16 x 32", 1, 1.0, 0, 1)))
    restored = desk.restore(visitor, 1)
    assert restored.fields == Fields("a <b>red</b> circle", "32 x 32", 4, 2.0, 3, 2, [])
    assert restored.pictures == first.pictures
    assert desk.restore(visitor, 7) is None
    stranger, _ = desk.welcome(None)
    assert desk.restore(stranger, 1) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (Fields("", "32 x 32", 4, 2.0, 3, 2), "Prompt is empty"),
        (Fields("a", "33 x 32", 4, 2.0, 3, 2), "multiples of 8 px"),
        (Fields("a", "32 x 32", 4, 2.0, 3, 5), "Images = 5: must be a whole number from 1 to 4"),
    ],
)
def test_bad_fields_are_explained_and_nothing_is_drawn(desk, drawer, fields, words):
    (view,) = desk.draw(desk.welcome(None)[0], "tab", fields)
    assert words in view.status and 'role="alert"' in view.status and not view.is_drawing and view.pictures is None
    assert drawer.drawn == []


def test_stop_ends_the_drawing_and_keeps_what_is_there(desk, drawer):
    visitor, _ = desk.welcome(None)
    drawer.pace.clear()
    drawing = desk.draw(visitor, "tab", FIELDS)
    assert next(drawing).is_drawing
    # Another tab's is no matter of this one's.
    desk.stop("other tab")
    threading.Timer(0.05, drawer.pace.set).start()
    views = []
    for view in drawing:
        views.append(view)
        desk.stop("tab")
    assert re.search(r"Stopped (after block \d+ of 16|before the first block)", views[-1].status)
    assert views[-1].pictures is None and not views[-1].is_drawing and desk.welcome(visitor)[1].count("<button") == 0
    assert "2 pictures" in list(desk.draw(visitor, "tab", FIELDS))[-1].status


def test_one_drawing_of_a_tab_at_a_time(desk, drawer):
    visitor, _ = desk.welcome(None)
    drawer.pace.clear()
    drawing = desk.draw(visitor, "tab", FIELDS)
    next(drawing)
    (view,) = desk.draw(visitor, "tab", FIELDS)
    assert "A drawing is under way here" in view.status
    drawer.pace.set()
    assert "2 pictures" in list(drawing)[-1].status


def test_a_drawing_that_nobody_looks_at_ends(desk, drawer):
    visitor, _ = desk.welcome(None)
    drawer.pace.clear()
    drawing = desk.draw(visitor, "tab", FIELDS)
    next(drawing)
    threading.Timer(0.05, drawer.pace.set).start()
    next(drawing)
    # The generator stays where it is: nobody asks it for more.
    desk.leave("tab")
    assert "2 pictures" in list(desk.draw(visitor, "tab", FIELDS))[-1].status
    drawing.close()
    assert "2 pictures" in list(desk.draw(visitor, "tab", FIELDS))[-1].status


def test_a_failure_is_told_and_the_page_goes_on(desk, drawer):
    visitor, _ = desk.welcome(None)
    drawer.error = ConfigError("no such class")
    assert "no such class" in list(desk.draw(visitor, "tab", FIELDS))[-1].status
    drawer.error = KeyError("fault")
    assert "The drawing failed (KeyError" in list(desk.draw(visitor, "tab", FIELDS))[-1].status
    drawer.error = None
    assert "2 pictures" in list(desk.draw(visitor, "tab", FIELDS))[-1].status


def test_a_full_disk_is_told_and_the_page_goes_on(desk, folder, monkeypatch):
    visitor, _ = desk.welcome(None)
    write_bytes, written = Path.write_bytes, []

    def fill_the_disk(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == 2:
            write_bytes(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    last = list(desk.draw(visitor, "tab", FIELDS))[-1]
    assert "The pictures cannot be kept (No space left on device): see that" in last.status and not last.is_drawing
    # They are to be seen, without a file that they could be saved from.
    assert last.pictures.count('src="data:image/png;base64,') == 2 and "download" not in last.pictures
    assert len(written) == 2 and not any(folder.path.iterdir()) and desk.restore(visitor, 1) is None
    assert "2 pictures" in list(desk.draw(visitor, "tab", FIELDS))[-1].status


def test_weights_of_adapters_are_settings(folder, tmp_path):
    drawer = FakeDrawer(tmp_path / "with", adapters={"ink": 1.0})
    desk = Desk(Studio(drawer), folder)
    visitor, _ = desk.welcome(None)
    fields = Fields("a", "32 x 32", 4, 2.0, 3, 1, [0.5])
    last = list(desk.draw(visitor, "tab", fields))[-1]
    assert drawer.drawn[0].adapters == {"ink": 0.5}
    assert "seed 3, ink 0.5" in last.history and read_settings(folder.path / saved(last)[0])["adapters"] == {"ink": 0.5}
    assert desk.restore(visitor, 1).fields == fields
