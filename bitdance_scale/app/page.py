"""The page: its look, and its tabs."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from bitdance_scale.app.desk import Desk
from bitdance_scale.app.draw_tab import add_draw_tab
from bitdance_scale.app.run_tab import add_run_tab
from bitdance_scale.app.run_watch import RunWatch
from bitdance_scale.app.settings import Fields

_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
_FIXED_FONTS = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace")


@dataclass(frozen=True)
class Page:
    """What gradio serves.

    Attributes:
        blocks: the page.
        theme: its look, with fonts of the visitor's own system.
    """

    blocks: gr.Blocks
    theme: gr.themes.Base


def make_page(desk: Desk | None, start: Fields | None, watch: RunWatch | None) -> Page:
    """The page with the tabs that there is something for; with at least one."""
    names = [desk.facts.name] if desk is not None else []
    names += [watch.folder.resolve().name] if watch is not None else []
    title = " · ".join(["BitDance", *dict.fromkeys(names)])
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_head(desk, watch), js_on_load=None)
        draw_tab = None
        with gr.Tabs():
            if desk is not None:
                assert start is not None, "a desk has fields"
                with gr.Tab("Draw", id="draw-tab") as draw_tab:
                    add_draw_tab(desk, start, blocks)
            if watch is not None:
                with gr.Tab("Training run", id="run-tab") as tab:
                    add_run_tab(watch, tab, draw_tab, blocks)
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        font=list(_FONTS),
        font_mono=list(_FIXED_FONTS),
    )
    return Page(blocks, theme)


def _head(desk: Desk | None, watch: RunWatch | None) -> str:
    from bitdance_scale.app.fragments import escaped

    name = desk.facts.name if desk is not None else watch.folder.resolve().name if watch is not None else ""
    return f'<header class="bd-head"><h1>BitDance</h1><span class="bd-quiet">{escaped(name)}</span></header>'
