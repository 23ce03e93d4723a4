"""The page of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitdance_scale.errors import ConfigError
from bitdance_scale.evaluation import page
from bitdance_scale.evaluation.benchmarks.manifest import DRAWING_NAME, flat_values
from bitdance_scale.evaluation.metrics.estimate import Estimate
from bitdance_scale.evaluation.metrics.metric import OVERALL, Metric
from bitdance_scale.evaluation.report.comparison import Contrast, Pair, PromptScore, Result, Section
from bitdance_scale.evaluation.report.figures import draw_categories, draw_sweep
from bitdance_scale.evaluation.report.scored_folder import ScoredFolder
from bitdance_scale.evaluation.report.settings import (
    BLOCK_TOKENS,
    UNKNOWN,
    setting_text,
    setting_title,
    split_settings,
)
from bitdance_scale.evaluation.report.sweep import Sweep, panels_of
from bitdance_scale.evaluation.report.thumbnails import MAX_PICTURE_BYTES, PageFullError, Thumbnails
from bitdance_scale.wording import file_size

_NO_BENCHMARK = "images of no benchmark"
_MAX_SHOWN_IMAGES = 8
"""Of a prompt, on the page."""
_MAX_OPEN = 3
"""Drawings of a section whose pictures are shown without a click."""


def report_page(
    folders: Sequence[ScoredFolder], sections: Sequence[Section], sweeps: Sequence[Sweep], thumbnails: Thumbnails
) -> str:
    """The page, as HTML in one file.

    Args:
        folders: the drawings.
        sections: by benchmark and metric.
        sweeps: found among the drawings.
        thumbnails: reads their pictures.
    """
    names = list(dict.fromkeys(folder.name for folder in folders))
    parts = [*_summary(folders, sections)]
    for benchmark in dict.fromkeys(folder.benchmark for folder in folders):
        of_it = [folder for folder in folders if folder.benchmark == benchmark]
        parts += [page.heading(benchmark or _NO_BENCHMARK), *_drawings(of_it)]
        having = [section for section in sections if section.benchmark == benchmark]
        for section in having:
            parts += _values(section)
        for sweep in sweeps:
            if sweep.benchmark == benchmark:
                parts += _sweep(sweep, having)
        for section in having:
            parts += _pictures(section, thumbnails)
    if thumbnails.num_left_out:
        parts.append(
            page.paragraph(
                f"{thumbnails.num_left_out} images are left out, as the pictures of a page are at most "
                f"{file_size(MAX_PICTURE_BYTES)}; name fewer drawings, or a smaller --worst."
            )
        )
    return page.page(f"Scores of {', '.join(names)}", parts)


def _summary(folders: Sequence[ScoredFolder], sections: Sequence[Section]) -> Iterator[str]:
    """The overall values of all models, as Table 10 has them."""
    columns = [section for section in sections if section.categories]
    if not columns:
        return
    rows = []
    for name in dict.fromkeys(folder.name for folder in folders):
        tokens = dict.fromkeys(
            setting_text(BLOCK_TOKENS, folder.drawing.get(BLOCK_TOKENS)) for folder in folders if folder.name == name
        )
        cells = [_cell(section, name, OVERALL) for section in columns]
        rows.append([name, " or ".join(tokens), *cells])
    header = ["drawing", setting_title(BLOCK_TOKENS)]
    yield page.heading("Overall values")
    yield page.Table([*header, *(_title(section) for section in columns)], rows).html()
    yield page.paragraph("In brackets: intervals of 95 %, by the bootstrap over prompts within each category.")
    if all(len(section.results) == 1 for section in sections):
        yield page.paragraph(
            "No two drawings have scores of the same benchmark and metric: there is nothing to compare."
        )


def _title(section: Section) -> str:
    title = section.metric.title + (" (lower is better)" if section.metric.is_lower_better else "")
    # A metric of any benchmark says of which it is here.
    return title if section.metric.benchmarks else f"{title}, {section.benchmark or _NO_BENCHMARK}"


def _drawings(folders: Sequence[ScoredFolder]) -> Iterator[str]:
    """What the drawings of a benchmark were drawn with."""
    settings = split_settings([folder.drawing for folder in folders])
    header = ["drawing", "folder", *map(setting_title, settings.differing)]
    rows = [
        [folder.name, str(folder.root), *(setting_text(key, folder.drawing.get(key)) for key in settings.differing)]
        for folder in folders
    ]
    yield page.Table(header, rows).html()
    equal = {key: value for key, value in settings.equal.items() if key != "benchmark"}
    if equal:
        listed = "; ".join(f"{setting_title(key)} {setting_text(key, value)}" for key, value in equal.items())
        yield page.paragraph(f"{'The same in all' if len(folders) > 1 else 'Drawn with'}: {listed}.")
    notes = []
    for folder in folders:
        if not folder.drawing:
            notes.append(f"{folder.name}: {UNKNOWN} what it was drawn with, as there was no {DRAWING_NAME}.")
        elif not folder.has_manifest:
            notes.append(f"{folder.name}: its {DRAWING_NAME} is gone; settings are those that were scored.")
    if notes:
        yield page.listing(notes)


def _values(section: Section) -> Iterator[str]:
    """The tables and the picture of a metric."""
    yield page.heading(_title(section), 3)
    models = list(section.results)
    if section.categories:
        rows = [[name, *(_cell(section, model, name) for model in models)] for name in section.categories]
        yield page.Table(["category", *models], rows).html()
        values = {
            model: {name: value.estimate for name, value in result.values.items()}
            for model, result in section.results.items()
            if result.values
        }
        yield page.figure(draw_categories(values), f"{_title(section)} by category, as in the table")
    if section.figures:
        header = ["without intervals", *models]
        rows = [
            [name, *(_figure_text(result, name, section.metric) for result in section.results.values())]
            for name in section.figures
        ]
        yield page.Table(header, rows).html()
    yield from _differences(section)
    yield from _scorers(section)


def _figure_text(result: Result, name: str, metric: Metric) -> str:
    if name not in result.figures:
        return ""
    value = result.figures[name]
    return f"{value:.2f}" if metric.scale != 1 or abs(value) > 1 else f"{value:.4f}"


def _differences(section: Section) -> Iterator[str]:
    paired = [pair for pair in section.pairs if not pair.reasons]
    if paired:
        digits = _digits(section.metric)
        header = [f"minus {paired[0].baseline}, paired", *(pair.model for pair in paired)]
        categories = [name for name in section.categories if any(name in pair.differences for pair in paired)]
        rows = [[name, *(_difference_text(pair, name, digits) for pair in paired)] for name in categories]
        counts = [next(iter(pair.differences.values())) for pair in paired]
        rows.append(["prompts better", *(str(one.num_better) for one in counts)])
        rows.append(["prompts worse", *(str(one.num_worse) for one in counts)])
        rows.append(["prompts compared", *(str(one.num_prompts) for one in counts)])
        yield page.Table(header, rows).html()
        yield page.paragraph("Clear: the interval of 95 % leaves out zero, and a sign test over prompts has p < 0.05.")
    unpaired = [
        f"{pair.model} and {pair.baseline} are not paired: {'; '.join(pair.reasons)}."
        for pair in section.pairs
        if pair.reasons
    ]
    # Sets have no values of images that could be paired.
    if unpaired and section.categories:
        yield page.listing(unpaired)


def _difference_text(pair: Pair, category: str, digits: int) -> str:
    if category not in pair.differences:
        return ""
    found = pair.differences[category]
    return estimate_text(found.estimate, digits, "+") + (" clear" if found.is_clear else "")


def _scorers(section: Section) -> Iterator[str]:
    """What was scored with, and what the scorers say is to be known."""
    scorers = {name: flat_values(result.scores.scorer) for name, result in section.results.items()}
    settings = split_settings(list(scorers.values()))
    lines = []
    if settings.equal:
        told = ", ".join(f"{key} = {setting_text(key, one)}" for key, one in settings.equal.items())
        lines.append(f"Scored with {told}.")
    for name, scorer in scorers.items():
        if settings.differing:
            told = ", ".join(f"{key} = {setting_text(key, scorer.get(key))}" for key in settings.differing)
            lines.append(f"{name} was scored with {told}: values of different scorers do not compare.")
    notes: dict[str, list[str]] = {}
    for name, result in section.results.items():
        for note in result.scores.notes:
            notes.setdefault(note, []).append(name)
    for note, names in notes.items():
        lines.append(note if len(names) == len(scorers) else f"{', '.join(names)}: {note}")
    if lines:
        yield page.listing(lines)


def _sweep(sweep: Sweep, sections: Sequence[Section]) -> Iterator[str]:
    panels = panels_of(sweep, sections)
    if not panels:
        return
    yield page.heading(f"Over {setting_title(sweep.setting)}", 3)
    yield page.figure(draw_sweep(setting_title(sweep.setting), panels), f"values over {sweep.setting}")
    shown = [f"{line.label}: {', '.join(folder.name for _, folder in line.points)}" for line in sweep.lines]
    yield page.listing(shown)


def _pictures(section: Section, thumbnails: Thumbnails) -> Iterator[str]:
    """Prompts to look at: the worst of each drawing, and those in which drawings differ most."""
    if any(result.worst for result in section.results.values()):
        yield page.heading(f"{_title(section)}: pictures", 3)
    is_open = len(section.results) <= _MAX_OPEN
    for name, result in section.results.items():
        if result.worst:
            parts = [_prompt(result, prompt, thumbnails) for prompt in result.worst]
            yield page.folded(f"{name}: the {len(parts)} prompts of the lowest values", parts, is_open=is_open)
    for pair in section.pairs:
        if pair.contrasts:
            parts = [_contrast(section, pair, contrast, thumbnails) for contrast in pair.contrasts]
            summary = f"{pair.model} minus {pair.baseline}: the {len(parts)} prompts of the largest differences"
            yield page.folded(summary, parts, is_open=is_open)


def _contrast(section: Section, pair: Pair, contrast: Contrast, thumbnails: Thumbnails) -> str:
    """A prompt in the baseline and in another drawing, side by side."""
    sides = [
        page.column([page.paragraph(f"{name}: {prompt.value:.3g}"), _images(section.results[name], prompt, thumbnails)])
        for name, prompt in ((pair.baseline, contrast.baseline), (pair.model, contrast.model))
    ]
    prompt = contrast.model
    caption = f"{contrast.difference:+.3g}: {prompt.text} ({prompt.category}, {prompt.prompt_id})"
    return page.paragraph(caption) + page.row(sides)


def _prompt(result: Result, prompt: PromptScore, thumbnails: Thumbnails) -> str:
    caption = f"{prompt.value:.3g}: {prompt.text} ({prompt.category}, {prompt.prompt_id})"
    return page.paragraph(caption) + _images(result, prompt, thumbnails)


def _images(result: Result, prompt: PromptScore, thumbnails: Thumbnails) -> str:
    """The images of a prompt in a row, or why they are not shown; what was said of each below it."""
    captions = [f"{image.value:.3g}{': ' if image.reason else ''}{image.reason}" for image in prompt.images]
    captions = captions[:_MAX_SHOWN_IMAGES]
    try:
        found = thumbnails.for_page(result.folder, result.scores, prompt, _MAX_SHOWN_IMAGES)
    except PageFullError:
        return page.listing(["the page has no room for these pictures", *captions])
    except ConfigError as error:
        return page.listing([f"the pictures cannot be shown: {error}", *captions])
    figures = [page.captioned(one.content, one.media_type, text) for one, text in zip(found, captions, strict=True)]
    left_out = len(prompt.images) - len(found)
    more = page.paragraph(f"and {left_out} more images") if left_out else ""
    return page.row(figures) + more


def _cell(section: Section, model: str, category: str) -> str:
    result = section.results.get(model)
    if result is None or category not in result.values:
        return ""
    return estimate_text(result.values[category].estimate, _digits(section.metric))


def _digits(metric: Metric) -> int:
    """Decimals of values: a tenth of a percent of the scale, or less."""
    return 3 if metric.scale == 1 else 2


def estimate_text(estimate: Estimate, digits: int, sign: str = "") -> str:
    """A value with its interval, as "0.86 [0.84, 0.88]"."""
    # Adding 0 makes -0.0 positive.
    numbers = (round(number, digits) + 0.0 for number in (estimate.value, estimate.low, estimate.high))
    value, low, high = (format(number, f"{sign}.{digits}f") for number in numbers)
    return f"{value} [{low}, {high}]"
