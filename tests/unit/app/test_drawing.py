"""Pictures grow, block by block, without a bit of the result depending on who looks; one drawing at a time."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from bitdance_scale.app.drawing import Studio, preview_blocks
from bitdance_scale.app.settings import DrawSettings
from bitdance_scale.errors import ConfigError

SETTINGS = DrawSettings("a", 32, 32, 4, 2.0, 3, 2)


def draw(studio, settings=SETTINGS, stop=None):
    return list(studio.draw(settings, stop or threading.Event()))


@pytest.mark.parametrize(
    ("num_blocks", "most", "expected"),
    [(1, 12, []), (2, 12, [1]), (5, 12, [1, 2, 3, 4]), (16, 3, [4, 8, 12]), (256, 12, 12), (16, 0, [])],
)
def test_previews_are_few_and_even(num_blocks, most, expected):
    found = sorted(preview_blocks(num_blocks, most))
    assert found == expected if isinstance(expected, list) else len(found) == expected
    assert not found or (found[0] >= 1 and found[-1] < num_blocks)
    gaps = np.diff([0, *found, num_blocks])
    assert gaps.max() - gaps.min() <= 1 or not found


def test_a_picture_grows(drawer):
    progress = draw(Studio(drawer, max_previews=3))
    previews = [event for event in progress if event.images and not event.is_finished]
    assert [(event.num_drawn, event.num_blocks) for event in previews] == [(4, 16), (8, 16), (12, 16)]
    finished = progress[-1]
    assert finished.is_finished and sum(event.is_finished for event in progress) == 1
    bits = drawer.bits(SETTINGS)
    for number in range(2):
        assert (finished.images[number] == drawer.vision.decode(bits[number], (8, 8)).numpy()).all()
        # Four blocks of 2 x 2 cells of 4 px: a row of them.
        rows = [event.images[number] for event in previews]
        assert all((picture[8 * (row + 1) :] == 128).all() for row, picture in enumerate(rows))
        assert all((picture[: 8 * (row + 1)] != 128).any(axis=(1, 2)).all() for row, picture in enumerate(rows))
        expected = drawer.vision.decode_first(bits[number, :48], (8, 8)).numpy()
        assert (previews[2].images[number] == expected).all()


def test_a_drawing_stops_when_it_is_asked_to(drawer):
    studio, stop, seen = Studio(drawer), threading.Event(), []
    drawer.pace.clear()
    drawing = studio.draw(SETTINGS, stop)
    threading.Timer(0.05, drawer.pace.set).start()
    for event in drawing:
        seen.append(event)
        stop.set()
    assert not seen[-1].is_finished and seen[-1].num_drawn < 16
    # The next one has its turn.
    assert draw(studio)[-1].is_finished


def test_whoever_leaves_stops_their_drawing(drawer):
    studio, stop = Studio(drawer), threading.Event()
    drawer.pace.clear()
    drawing = studio.draw(SETTINGS, stop)
    threading.Timer(0.05, drawer.pace.set).start()
    next(drawing)
    drawing.close()
    assert stop.is_set()
    assert draw(studio)[-1].is_finished


def test_drawings_wait_for_each_other_in_order(drawer):
    studio, order, progress = Studio(drawer), [], {}
    drawer.pace.clear()

    def ask(number: int) -> None:
        settings = DrawSettings(str(number), 32, 32, 4, 2.0, 0, 1)
        progress[number] = draw(studio, settings)
        order.append(number)

    threads = []
    for number in range(3):
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
        # It stands in line before the next one asks.
        until(lambda number=number: len(studio._turns._line) == number + 1)
    drawer.pace.set()
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2] and [batch.prompts for batch in drawer.drawn] == [["0"], ["1"], ["2"]]
    assert [event.num_ahead for event in progress[0]] == [0] * len(progress[0])
    waited = [event.num_ahead for event in progress[2] if event.num_ahead]
    assert waited[0] == 2 and waited == sorted(waited, reverse=True)


def test_whoever_waits_may_leave(drawer):
    studio, stop = Studio(drawer), threading.Event()
    drawer.pace.clear()
    first = threading.Thread(target=draw, args=(studio,))
    first.start()
    until(lambda: drawer.drawn)
    waiting = studio.draw(SETTINGS, stop)
    assert next(waiting).num_ahead == 1
    stop.set()
    assert list(waiting) == []
    drawer.pace.set()
    first.join(30)
    assert len(drawer.drawn) == 1


def test_errors_come_to_whoever_asked(drawer):
    studio = Studio(drawer)
    drawer.error = ConfigError("Size: no")
    with pytest.raises(ConfigError, match="^Size: no$"):
        draw(studio)
    drawer.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(
        ConfigError, match="^Images = 2 of 32 x 32 px: need more memory .* take fewer images or a smaller"
    ):
        draw(studio)
    drawer.error = KeyError("a fault")
    with pytest.raises(KeyError):
        draw(studio)
    drawer.error = None
    assert draw(studio)[-1].is_finished


def until(is_so, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
