"""Takes the pictures of docs/app.md: starts `bitdance app`, draws in a headless Chromium, and photographs the page.

    python -m tests.app.photograph published --run runs/demo --size 64x64 --guidance 3 --steps 20 --out docs/images

OUT gets app_draw.png and app_run.png, 1280 px wide, and with --narrow the same at 420 px.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.app.served import served
from tests.app.test_in_chromium import IS_OPEN, STATUS, draw, open_tab
from tests.chromium import Page, chromium

PROMPTS = ("two blue stars", "a purple circle to the left of an orange square", "a white triangle above a red square")
SIZE_PX = (1280, 1250)
NARROW_PX = (420, 1250)


def photograph(page: Page, address: str, out: Path, *, is_narrow: bool) -> None:
    """Draws with the page at an address, and writes its pictures."""
    page.resize(*SIZE_PX)
    page.open(address)
    page.wait_for(IS_OPEN)
    for number, prompt in enumerate(PROMPTS):
        draw(page, prompt, images=4, seed=10 * number)
        page.wait_for(
            f"{STATUS}.includes('4 pictures in') && document.querySelector('#history b').innerText === {prompt!r}"
        )
    page.wait_for("[...document.querySelectorAll('#pictures img')].every((image) => image.complete)")
    sizes = [("", SIZE_PX), *([("_narrow", NARROW_PX)] if is_narrow else [])]
    for name, tab in (("app_draw", "Draw"), ("app_run", "Training run")):
        open_tab(page, tab)
        if tab == "Training run":
            page.wait_for("document.querySelectorAll('#run-panels img').length > 0")
        for suffix, size_px in sizes:
            page.resize(*size_px)
            # Let the page lie where it will.
            page.evaluate("new Promise((done) => setTimeout(done, 500))")
            # Of a run there is more than fits into a picture.
            page.screenshot(out / f"{name}{suffix}.png", is_whole=tab == "Draw")
        page.resize(*SIZE_PX)


def main() -> None:
    """The command line; options that are not its own are those of `bitdance app`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--narrow", action="store_true", help="photograph the page at 420 px, too")
    options, rest = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, served(*rest) as app, chromium(Path(profile)) as page:
        photograph(page, app.address, options.out, is_narrow=options.narrow)


if __name__ == "__main__":
    main()
