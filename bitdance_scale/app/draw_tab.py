"""The tab in which one draws: fields, pictures and history, wired to a `Desk`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from bitdance_scale.app import fragments
from bitdance_scale.app.desk import Desk, DrawView
from bitdance_scale.app.settings import Fields, shown_size
from bitdance_scale.generate.drawer import ModelFacts

# A click on a drawing of the history tells the server its number.
_PICK_AN_ENTRY = """
element.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-entry]");
    if (button) trigger("select", {entry: Number(button.dataset.entry)});
});
"""
_NEW_SEED = "() => Math.floor(Math.random() * 1000000)"
_TO_LOCAL_STORAGE = "bitdance-app-visitor"


@dataclasses.dataclass(frozen=True)
class _Form:
    """The fields in which one says what to draw, in the order of `Fields`."""

    prompt: gr.Textbox | gr.Dropdown
    size: gr.Dropdown
    steps: gr.Number
    guidance: gr.Number
    seed: gr.Number
    images: gr.Number
    adapters: Sequence[gr.Number]

    @property
    def components(self) -> list[Any]:
        """All of them."""
        return [self.prompt, self.size, self.steps, self.guidance, self.seed, self.images, *self.adapters]


def add_draw_tab(desk: Desk, start: Fields, page: gr.Blocks) -> None:
    """Adds the content of the tab to the page that is being built.

    Args:
        desk: what is behind it.
        start: what stands in the fields at first.
        page: the page.
    """
    visitor = gr.BrowserState("", storage_key=_TO_LOCAL_STORAGE)
    with gr.Row(elem_classes="bd-draw"):
        with gr.Column(scale=2, min_width=300, elem_classes="bd-fields"):
            form, new_seed = _add_fields(desk.facts, start, desk.max_images)
            with gr.Row(elem_classes="bd-buttons"):
                # Until it is known whose drawing it would be.
                draw = gr.Button("Draw", variant="primary", elem_id="draw", interactive=False, min_width=120)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", interactive=False, min_width=120)
        with gr.Column(scale=5, min_width=320, elem_classes="bd-result"):
            # The region is there before its words are, so that they are read out.
            status = gr.HTML("", html_template='<div role="status">${value}</div>', elem_id="status", js_on_load=None)
            pictures = gr.HTML(fragments.no_pictures(desk.facts), elem_id="pictures", js_on_load=None)
    gr.HTML("<h2>History</h2>", js_on_load=None)
    history = gr.HTML(fragments.history([]), elem_id="history", js_on_load=_PICK_AN_ENTRY)

    shown = [pictures, status, history, draw, stop]

    def on_open(visitor_id: str) -> list[Any]:
        return [*desk.welcome(visitor_id), gr.Button(interactive=True)]

    def on_draw(request: gr.Request, visitor_id: str, *values: Any) -> Iterator[list[Any]]:
        for view in desk.draw(visitor_id, _tab_of(request), _fields(values)):
            yield _updates(view)

    def on_stop(request: gr.Request) -> None:
        desk.stop(_tab_of(request))

    def on_leave(request: gr.Request) -> None:
        desk.leave(_tab_of(request))

    def on_select(visitor_id: str, event: gr.EventData) -> list[Any]:
        restored = desk.restore(visitor_id, int(event._data["entry"]))
        if restored is None:
            gone = fragments.problem("This drawing is not kept any more")
            return [gr.skip(), gone, *[gr.skip() for _ in form.components]]
        one = restored.fields
        values = [one.prompt, one.size, one.steps, one.guidance, one.seed, one.images, *one.adapters]
        return [restored.pictures, restored.status, *values]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    triggers = [draw.click, *([form.prompt.submit] if isinstance(form.prompt, gr.Textbox) else [])]
    # The studio has a queue of its own, which says how long it is.
    gr.on(triggers, on_draw, [visitor, *form.components], shown, concurrency_limit=None, **quiet)
    stop.click(on_stop, None, None, queue=False, **quiet)
    new_seed.click(None, None, [form.seed], js=_NEW_SEED, **quiet)
    history.select(on_select, [visitor], [pictures, status, *form.components], queue=False, **quiet)
    page.load(on_open, [visitor], [visitor, history, draw], queue=False, **quiet)
    page.unload(on_leave)


def _add_fields(facts: ModelFacts, start: Fields, max_images: int) -> tuple[_Form, gr.Button]:
    with gr.Group():
        prompt = _prompt_field(facts, start)
        size = gr.Dropdown(
            [*map(shown_size, facts.sizes_px)],
            value=start.size,
            label="Size (height x width, px)",
            allow_custom_value=True,
            elem_id="size",
        )
        with gr.Row(elem_classes="bd-pair"):
            steps = gr.Number(start.steps, label="Steps per block", elem_id="steps", min_width=100)
            guidance = gr.Number(start.guidance, label="Guidance", elem_id="guidance", min_width=100)
        with gr.Row(elem_classes="bd-pair"):
            images = gr.Number(start.images, label=f"Images (up to {max_images})", elem_id="images", min_width=100)
            seed = gr.Number(start.seed, label="Seed", elem_id="seed", min_width=100)
        adapters = [
            gr.Number(weight, label=f"Weight of {name}", elem_id=f"adapter-{number}")
            for number, (name, weight) in enumerate(zip(facts.adapters, start.adapters, strict=True))
        ]
        new_seed = gr.Button("New seed", size="sm", elem_id="new-seed")
    return _Form(prompt, size, steps, guidance, seed, images, adapters), new_seed


def _prompt_field(facts: ModelFacts, start: Fields) -> gr.Textbox | gr.Dropdown:
    if not facts.num_classes:
        return gr.Textbox(
            start.prompt, label="Prompt", lines=3, max_lines=8, placeholder="a red circle", elem_id="prompt"
        )
    choices = [*facts.class_names] or [str(number) for number in range(facts.num_classes)]
    return gr.Dropdown(
        choices, value=start.prompt or choices[0], label="Class", allow_custom_value=True, elem_id="prompt"
    )


def _tab_of(request: gr.Request) -> str:
    """What a tab of a browser is known by, until it is loaded again."""
    return str(request.session_hash)


def _fields(values: Sequence[Any]) -> Fields:
    prompt, size, steps, guidance, seed, images, *adapters = values
    return Fields(prompt, size, steps, guidance, seed, images, adapters)


def _updates(view: DrawView) -> list[Any]:
    html = [gr.skip() if part is None else part for part in (view.pictures, view.status, view.history)]
    return [*html, gr.Button(interactive=not view.is_drawing), gr.Button(interactive=view.is_drawing)]
