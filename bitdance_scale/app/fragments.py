"""The parts of the page that are HTML of our own: pictures, progress, history, curves. All text is escaped here."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bitdance_scale.app.history import Entry
from bitdance_scale.app.run_watch import RunView, Shown
from bitdance_scale.app.settings import DrawSettings, shown_size
from bitdance_scale.generate.drawer import ModelFacts

PICTURES_PATH = "pictures"
"""Where the page's server has the files of the picture folder, relative to the page."""
_SMALL_PX = 256
"""Pictures up to this side are shown with square pixels, and their previews without loss."""
_PREVIEW_QUALITY = 85


@dataclass(frozen=True)
class ShownPicture:
    """A picture as the page shows it.

    Attributes:
        source: its address.
        seed: of its own.
        download_name: what it is called when it is saved; empty: it is not finished.
    """

    source: str
    seed: int
    download_name: str = ""


def escaped(text: str) -> str:
    """Text as HTML, which no template of the page takes for its own."""
    return html.escape(text).translate({ord("{"): "&#123;", ord("}"): "&#125;", ord("$"): "&#36;"})


def preview_source(image: np.ndarray) -> str:
    """A picture in its own address, uint8 [H, W, 3]."""
    content = io.BytesIO()
    if max(image.shape[:2]) <= _SMALL_PX:
        Image.fromarray(image).save(content, format="PNG")
        return _data_address(content.getvalue(), "png")
    Image.fromarray(image).save(content, format="JPEG", quality=_PREVIEW_QUALITY)
    return _data_address(content.getvalue(), "jpeg")


def pictures(shown: Sequence[ShownPicture], settings: DrawSettings) -> str:
    """Pictures beside each other, each with its seed and, once it is finished, a link that saves it."""
    sharp = " bd-sharp" if max(settings.size_px) <= _SMALL_PX else ""
    figures = []
    for number, picture in enumerate(shown, 1):
        what = f"Picture {number} of {len(shown)}: {settings.prompt}"
        size = f'width="{settings.width}" height="{settings.height}"'
        image = f'<img src="{escaped(picture.source)}" alt="{escaped(what)}" {size}>'
        label = f'<span class="bd-quiet">Seed {picture.seed}</span>'
        if picture.download_name:
            name = escaped(picture.download_name)
            link = (
                f'<a href="{escaped(picture.source)}" download="{name}" aria-label="Save picture {number}">Save PNG</a>'
            )
            label += link
        figures.append(f"<figure>{image}<figcaption>{label}</figcaption></figure>")
    return f'<div class="bd-pictures bd-of-{min(len(shown), 4)}{sharp}">{"".join(figures)}</div>'


def no_pictures(facts: ModelFacts) -> str:
    """In place of pictures, before the first."""
    return f'<div class="bd-empty">What {escaped(facts.name)} draws appears here, block by block.</div>'


def waiting(num_ahead: int) -> str:
    """The place in the queue."""
    drawings = "one drawing" if num_ahead == 1 else f"{num_ahead} drawings"
    return f"<p>Waiting for {drawings} of others</p>"


def progress(num_drawn: int, num_blocks: int, seconds: float) -> str:
    """How far a drawing is."""
    text = f"Block {num_drawn} of {num_blocks}"
    bar = f'<progress max="{num_blocks}" value="{num_drawn}" aria-label="Blocks drawn"></progress>'
    return f'<p aria-hidden="true">{text}<span class="bd-quiet"> · {seconds:.1f} s</span></p>{bar}'


def note(text: str) -> str:
    """A line about what has ended well."""
    return f"<p>{escaped(text)}</p>"


def problem(text: str) -> str:
    """What is wrong, in words."""
    return f'<p class="bd-problem" role="alert">{escaped(text)}</p>'


def history(entries: Sequence[Entry]) -> str:
    """Drawings, newest first, as buttons that show them again with their settings."""
    if not entries:
        return '<p class="bd-quiet">Drawings are kept here until the command ends.</p>'
    return f'<div class="bd-history">{"".join(map(_history_button, entries))}</div>'


def _history_button(entry: Entry) -> str:
    settings = entry.settings
    images = f", {settings.images} images" if settings.images > 1 else ""
    adapters = "".join(f", {name} {weight:g}" for name, weight in settings.adapters.items())
    details = (
        f"{shown_size(settings.size_px)} px{images}, {settings.steps} steps, guidance {settings.guidance:g}, "
        f"seed {settings.seed}{adapters}"
    )
    thumbnail = f'<img src="{PICTURES_PATH}/{entry.pictures[0].file}" alt="" loading="lazy">'
    return (
        f'<button type="button" data-entry="{entry.id}">{thumbnail}<span><b>{escaped(settings.prompt)}</b>'
        f"<small>{escaped(details)}</small></span></button>"
    )


def run_head(view: RunView, is_training: bool) -> str:
    """The name of a run, how far it is, and whether it is being trained."""
    state = "training" if is_training else "not training now"
    mark = f'<span class="bd-state{" bd-on" if is_training else ""}">{state}</span>'
    head = f"<h2>{escaped(view.name)} {mark}</h2><p>{escaped(view.summary)}</p>"
    return head + (problem(view.problem) if view.problem else "")


def run_panels(panels: Sequence[Shown]) -> str:
    """The curves of a run beside each other; a page of one picture has the whole width."""
    images = [f'<img src="{_data_address(panel.png, "png")}" alt="{escaped(panel.title)}">' for panel in panels]
    return f'<div class="bd-panels{" bd-whole" if len(panels) == 1 else ""}">{"".join(images)}</div>' if images else ""


def run_tables(view: RunView) -> str:
    """The numbers of a run that are not in its curves' corners."""
    parts = []
    for title, table in (("Held-out losses", view.held_out), ("Benchmarks", view.scores)):
        if table is not None:
            parts.append(f'<section><h3>{title}</h3><div class="bd-table" tabindex="0">{table.html()}</div></section>')
    return f'<div class="bd-tables">{"".join(parts)}</div>' if parts else ""


def sample_grid(png: bytes | None, step: int | None) -> str:
    """The grid of samples of a step."""
    if png is None:
        return '<p class="bd-quiet">No samples yet.</p>'
    image = f'<img class="bd-grid" src="{_data_address(png, "png")}" alt="Samples drawn at step {step}">'
    return f'<div class="bd-scroll" tabindex="0" role="group" aria-label="Samples">{image}</div>'


def _data_address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
