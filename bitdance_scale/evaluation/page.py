"""One self-contained HTML page with tables and pictures, for a person to look through."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_SHOWN_PX = 512
"""Of larger pictures the middle is shown."""
DIFFERENCE_FACTOR = 4
_STYLE = """
body { font: 14px sans-serif; margin: 2em; color: #1e1e1e }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; white-space: nowrap }
td, th { border: 1px solid #ccc; padding: 3px 8px; text-align: right }
td:first-child, th:first-child { text-align: left }
.row { display: flex; flex-wrap: wrap; gap: 6px; margin: 2px 0 14px }
.row img { min-width: 128px; max-width: 32%; image-rendering: pixelated; align-self: start }
.row figure { margin: 0; width: 200px; font-size: 12px; overflow-wrap: anywhere }
.row figure img { min-width: 128px; max-width: 100% }
.figure { max-width: 100% }
summary { cursor: pointer; font-weight: bold; margin: 8px 0 }
"""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        header: name of each column.
        rows: cells of each row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def html(self) -> str:
        """As HTML."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in self.rows]
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def heading(text: str, level: int = 2) -> str:
    """A heading; the title of the page is of level 1."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>"


def listing(texts: Sequence[str]) -> str:
    """A list of texts."""
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"


def folded(summary: str, parts: Sequence[str], *, is_open: bool = False) -> str:
    """Parts that are shown or hidden by a click on their summary."""
    state = " open" if is_open else ""
    return f"<details{state}><summary>{html.escape(summary)}</summary>{''.join(parts)}</details>"


def row(parts: Sequence[str]) -> str:
    """Parts side by side, as far as there is room."""
    return f'<div class="row">{"".join(parts)}</div>'


def column(parts: Sequence[str]) -> str:
    """Parts below each other, as one part of a row."""
    return f"<div>{''.join(parts)}</div>"


def captioned(content: bytes, media_type: str, caption: str) -> str:
    """A small picture, given as a file, with a text below it; for `row`."""
    shown = _embedded(content, media_type)
    return f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>"


def figure(content: bytes, description: str, media_type: str = "image/png") -> str:
    """A drawing of values, or a large picture, given as a file, with what it shows for those who cannot see it."""
    return _embedded(content, media_type, f' class="figure" alt="{html.escape(description)}"')


def comparison(caption: str, image: np.ndarray, other: np.ndarray) -> str:
    """An image, another of the same shape, and their difference, `DIFFERENCE_FACTOR` times as large around grey.

    Args:
        caption: text above them.
        image: uint8 [H, W, 3].
        other: uint8 [H, W, 3].
    """
    image, other = (_middle(pixels) for pixels in (image, other))
    difference = 128 + DIFFERENCE_FACTOR * (other.astype(np.int16) - image)
    pictures = (image, other, difference.clip(0, 255).astype(np.uint8))
    return f"<div>{html.escape(caption)}</div>{row(list(map(_picture, pictures)))}"


def histogram(values: np.ndarray, unit: str, num_bins: int = 24) -> str:
    """A histogram as a drawing of its own, without scripts."""
    counts, edges = np.histogram(values, bins=num_bins)
    width, height = 18, 100
    bars = "".join(
        f'<rect x="{width * place}" y="{height - tall:.1f}" width="{width - 2}" height="{tall:.1f}" fill="#1f6fb4">'
        f"<title>{edges[place]:.2f} to {edges[place + 1]:.2f} {html.escape(unit)}: {count}</title></rect>"
        for place, (count, tall) in enumerate(zip(counts.tolist(), counts / counts.max() * height, strict=True))
    )
    return (
        f'<svg width="{width * num_bins}" height="{height}">{bars}</svg>'
        f"<div>{edges[0]:.2f} to {edges[-1]:.2f} {html.escape(unit)}, {len(values)} images</div>"
    )


def page(title: str, parts: Sequence[str]) -> str:
    """The page of a title and parts, each made by a function of this file."""
    name = html.escape(title)
    return (
        f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{name}</h1>{''.join(parts)}</body></html>\n"
    )


def _middle(pixels: np.ndarray) -> np.ndarray:
    top, left = (max(0, side - MAX_SHOWN_PX) // 2 for side in pixels.shape[:2])
    return pixels[top : top + MAX_SHOWN_PX, left : left + MAX_SHOWN_PX]


def _picture(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, format="PNG")
    return _embedded(content.getvalue(), "image/png")


def _embedded(content: bytes, media_type: str, attributes: str = "") -> str:
    return f'<img{attributes} src="data:{media_type};base64,{base64.b64encode(content).decode()}">'
