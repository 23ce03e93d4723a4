"""The tab in which one watches a run: curves, losses and samples, wired to a `RunWatch`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from bitdance_scale.app import fragments
from bitdance_scale.app.run_watch import RunWatch

REFRESH_S = 4.0
_NEWEST = "newest"


def add_run_tab(watch: RunWatch, tab: gr.Tab, other_tab: gr.Tab | None, page: gr.Blocks) -> None:
    """Adds the content of the tab to the page that is being built.

    Args:
        watch: what is behind it.
        tab: the tab itself.
        other_tab: in whose sight nothing is refreshed; None: there is no other.
        page: the page.
    """
    timer = gr.Timer(REFRESH_S, active=other_tab is None)
    # What this browser shows already: the stamp of the run, the steps that can be chosen, the grid.
    seen = gr.State([])
    head = gr.HTML("", html_template='<div class="bd-run-head">${value}</div>', elem_id="run-head", js_on_load=None)
    panels = gr.HTML("", elem_id="run-panels", js_on_load=None)
    tables = gr.HTML("", elem_id="run-tables", js_on_load=None)
    with gr.Column(elem_classes="bd-steps"):
        step = gr.Dropdown([_NEWEST], value=_NEWEST, label="Samples of step", elem_id="sample-step")
    grid = gr.HTML("", elem_id="run-samples", js_on_load=None)

    def refresh(seen_values: list[Any], chosen: str | None) -> list[Any]:
        view, steps = watch.look(), watch.sample_steps()
        shown_step = _step_of(chosen, steps)
        stamps = [*seen_values, None, None, None][:3]
        updates: list[Any] = [fragments.run_head(view, watch.is_training)]
        if stamps[0] == view.stamp:
            updates += [gr.skip(), gr.skip()]
        else:
            updates += [fragments.run_panels(view.panels), fragments.run_tables(view)]
        choices = [_NEWEST, *map(str, steps)]
        updates.append(gr.skip() if stamps[1] == choices else gr.Dropdown(choices))
        if stamps[2] == (shown_step,):
            updates.append(gr.skip())
        else:
            png = None if shown_step is None else watch.sample_png(shown_step)
            updates.append(fragments.sample_grid(png, shown_step))
        return [[view.stamp, choices, (shown_step,)], *updates]

    outputs = [seen, head, panels, tables, step, grid]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for trigger in (timer.tick, tab.select, step.input, page.load):
        trigger(refresh, [seen, step], outputs, trigger_mode="once", concurrency_limit=None, **quiet)
    if other_tab is not None:
        tab.select(lambda: gr.Timer(active=True), None, [timer], queue=False, **quiet)
        other_tab.select(lambda: gr.Timer(active=False), None, [timer], queue=False, **quiet)


def _step_of(chosen: str | None, steps: list[int]) -> int | None:
    """The step whose samples are shown: the chosen one, or the newest; None: there is none."""
    if chosen is not None and chosen.isdecimal() and int(chosen) in steps:
        return int(chosen)
    return steps[0] if steps else None
