"""The page in a browser: pictures are drawn, grow, are kept and saved; a run is watched."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitdance_scale.app.settings import read_settings
from bitdance_scale.observe.metrics import METRICS_FILE
from tests.app.served import HAS_GRADIO, Served, served
from tests.chromium import CHROMIUM, Page, chromium
from tests.released import write_published
from tests.unit.observe.test_metrics import point

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH"),
    pytest.mark.skipif(not HAS_GRADIO, reason="needs gradio, which make setup installs"),
]
STATUS = "document.querySelector('#status').innerText"
IS_OPEN = "!!document.querySelector('#draw') && !document.querySelector('#draw').disabled"
ENTRIES = "document.querySelectorAll('#history button[data-entry]').length"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small_run"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Iterator[Served]:
    model = write_published(tmp_path_factory.mktemp("model") / "small")
    with served(model, "--run", run_folder, "--size=64x64", "--steps=3", "--device=cpu") as started:
        yield started


@pytest.fixture(scope="module")
def page(app: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as tab:
        tab.resize(1280, 900)
        tab.open(app.address)
        tab.wait_for(IS_OPEN)
        yield tab
        outside = [address for address in tab.requested if not address.startswith(app.address)]
        assert outside == [] and tab.complaints == []


def draw(page: Page, prompt: str, **values: object) -> None:
    page.write("#prompt textarea", prompt)
    for name, value in values.items():
        page.write(f"#{name} input", str(value))
    page.click("#draw")


def open_tab(page: Page, name: str) -> None:
    tabs = "[...document.querySelectorAll('button[role=tab]')]"
    page.evaluate(f"{tabs}.find((tab) => tab.innerText.includes({json.dumps(name)})).click()")


def test_two_drawings_and_a_saved_picture(page: Page, tmp_path: Path) -> None:
    page.evaluate("""
        window.previews = [];
        new MutationObserver(() => {
            const image = document.querySelector("#pictures img");
            if (image && image.src.startsWith("data:")) previews.push(image.src);
        }).observe(document.querySelector("#pictures"), {childList: true, subtree: true, attributes: true});
    """)
    draw(page, "a red circle, ${1 + 1} {{two}} <b>", images=2, seed=5)
    page.wait_for(f"{STATUS}.includes('2 pictures in')")
    previews = page.evaluate("previews")
    assert previews, "no preview was shown before the pictures"
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(previews[0].split(",")[1]))).convert("RGB"))
    # Blocks of 16 px in rows: the last row has not been drawn.
    assert first.shape == (64, 64, 3) and (first[48:] == 128).all() and (first[:16, :16] != 128).any()
    assert page.evaluate("document.querySelectorAll('#pictures img').length") == 2
    page.wait_for("[...document.querySelectorAll('#pictures img')].every((image) => image.naturalWidth === 64)")

    draw(page, "a blue square", images=1, seed=8)
    page.wait_for(f"{ENTRIES} === 2")
    assert "a blue square" in page.evaluate("document.querySelector('#history button').innerText")
    page.click("#history button:nth-of-type(2)")
    page.wait_for("document.querySelector('#seed input').value === '5'")
    assert page.evaluate("document.querySelector('#prompt textarea').value") == "a red circle, ${1 + 1} {{two}} <b>"
    assert "a red circle, ${1 + 1} {{two}} <b>" in page.evaluate("document.querySelector('#history').innerText")
    page.wait_for("document.querySelectorAll('#pictures a[download]').length === 2")

    page.save_downloads(tmp_path)
    page.click("#pictures figure:nth-of-type(2) a[download]")
    deadline_s = time.monotonic() + 30
    while not (found := [*tmp_path.glob("*.png")]):
        assert time.monotonic() < deadline_s, [*tmp_path.iterdir()]
        time.sleep(0.05)
    settings = read_settings(found[0])
    assert settings["prompt"] == "a red circle, ${1 + 1} {{two}} <b>" and settings["model"] == "small"
    assert [settings[key] for key in ("height", "width", "steps", "seed", "images", "image")] == [64, 64, 3, 5, 2, 1]
    assert Image.open(found[0]).size == (64, 64)


def test_what_is_wrong_is_written_on_the_page(page: Page) -> None:
    draw(page, "a red circle", images=99)
    page.wait_for(f"{STATUS}.includes('Images = 99: must be a whole number from 1 to 8')")
    draw(page, " ", images=1)
    page.wait_for(f"{STATUS}.includes('Prompt is empty')")
    assert page.evaluate("document.querySelector('#status [role=alert]') !== null")


def begin_long_drawing(page: Page) -> None:
    """A thousand blocks, each of which is soon drawn."""
    page.write("#size input", "512 x 512")
    draw(page, "a long drawing", images=1, steps=3)
    page.wait_for("!document.querySelector('#stop').disabled")


def test_a_drawing_is_stopped(page: Page) -> None:
    num_entries = page.evaluate(ENTRIES)
    begin_long_drawing(page)
    assert page.evaluate("document.querySelector('#draw').disabled")
    page.click("#stop")
    page.wait_for(f"{STATUS}.includes('Stopped ')")
    page.wait_for("!document.querySelector('#draw').disabled")
    assert page.evaluate(ENTRIES) == num_entries
    # A drawing of whoever closes the page ends, too: the next one would have to wait for all of it.
    begin_long_drawing(page)
    address = page.evaluate("location.href")
    page.close()
    page.resize(1280, 900)
    page.open(address)
    page.wait_for(IS_OPEN)
    # History is still there.
    page.wait_for(f"document.querySelector('#history') && {ENTRIES} === {num_entries}")
    draw(page, "a short drawing", images=1, steps=1)
    page.wait_for(f"{STATUS}.includes('1 picture in')")
    assert page.evaluate(ENTRIES) == num_entries + 1


def test_all_fields_have_labels_and_are_reached_by_keyboard(page: Page) -> None:
    unnamed = page.evaluate("""
        [...document.querySelectorAll("input, textarea, select, button, img")].filter((element) => {
            if (!element.checkVisibility()) return false;
            if (element.tagName === "IMG") return !element.hasAttribute("alt");
            const labels = [...(element.labels || [])].map((label) => label.innerText);
            return ![element.ariaLabel, element.innerText, ...labels].some((name) => name && name.trim());
        }).map((element) => element.outerHTML)
    """)
    assert unnamed == []
    page.evaluate("document.querySelector('#prompt textarea').focus()")
    reached = []
    for _ in range(20):
        page.press("Tab", 9)
        reached += page.evaluate(
            "(() => { const ids = []; for (let e = document.activeElement; e; e = e.parentElement) ids.push(e.id); "
            "return ids; })()"
        )
    wanted = ["size", "steps", "guidance", "images", "seed", "new-seed", "draw", "pictures", "history"]
    assert list(dict.fromkeys(name for name in reached if name in wanted)) == wanted


def test_a_run_is_watched_as_it_is_written_and_fits_a_telephone(page: Page, run_folder: Path) -> None:
    open_tab(page, "Training run")
    page.wait_for("document.querySelector('#run-head').innerText.includes('There is no metrics.jsonl')")
    (run_folder / METRICS_FILE).write_text(point(1).to_json() + "\n" + point(2).to_json()[:30])
    (run_folder / "samples").mkdir()
    Image.new("RGB", (40, 30), "red").save(run_folder / "samples/step_000001.png")
    page.wait_for("document.querySelectorAll('#run-panels img').length === 12", 30)
    assert "1 steps" in page.evaluate("document.querySelector('#run-head').innerText")
    page.wait_for("!!document.querySelector('#run-samples img')")
    page.resize(420, 900)
    page.wait_for("document.documentElement.clientWidth === 420")
    for name in ("Training run", "Draw"):
        open_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") == 420
    page.resize(1280, 900)


def test_the_command_ends_and_leaves_nothing(app: Served, page: Page) -> None:
    assert [path.name[:12] for path in app.temporary.iterdir() if path.name.startswith("bitdance")] == ["bitdance-app"]
    assert app.end() == 0
    assert [path for path in app.temporary.iterdir() if path.name.startswith("bitdance")] == []
