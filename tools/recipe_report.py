"""The report of a recipe: one HTML page with everything in it, pictures included."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkout import find_commit
from PIL import Image

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.resuming import settings
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.evaluation import page
from bitdance_scale.evaluation.metrics.catalogue import SCENES
from bitdance_scale.evaluation.metrics.estimate import Estimate, differences, estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.report.figures import draw_categories, draw_sweep
from bitdance_scale.evaluation.report.report_page import estimate_text
from bitdance_scale.evaluation.report.sweep import Curve
from bitdance_scale.observe.overview import PanelPicture, panel_pictures
from bitdance_scale.observe.run_record import RunRecord, read_run
from bitdance_scale.observe.sample_grids import newest_samples

MAX_PICTURE_PX = 1400
SHEET_COLUMNS = 2
NUM_FIRST_PANELS = 4
"""The losses; the other panels are behind a click."""
MAX_SHOWN_VALUE = 40
ROUGH_COLUMNS = ("minutes", "steps", "all else", "guidance")
"""Of which a decimal, or none, is enough."""
PACKAGES = ("bitdance_scale", "torch", "megatron-core", "deepspeed")

HELD_OUT_NOTE = (
    "Held-out losses have fixed images, noise and uniform flow times. They compare where two stages evaluate the same "
    "sizes and draw blocks of the same size, and not with the training loss. Minutes are those of the steps."
)
SCORE_NOTE = (
    "Share of pictures in which image analysis finds what the prompt asks for, by GenEval's rules; overall is the mean "
    "of the categories. Prompts are in no data set. Real scenes are drawn ones, encoded and decoded by the tokenizer: "
    "the most that a model can reach. Exact: nothing else is in the picture. Intervals are of 95 %."
)
CHANCE_NOTE = (
    "By chance: the same pictures, each judged by all the other prompts of its category. A model that draws such "
    "scenes and does not read its prompts would score that."
)


@dataclass(frozen=True)
class StageReport:
    """A stage that was run: its name in `STAGES`, run folder and configuration."""

    name: str
    run: Path
    config: RunConfig

    @property
    def label(self) -> str:
        """What the whole page calls it."""
        return stage_label(self.name)


@dataclass(frozen=True)
class ScoredModel:
    """A score.

    Attributes:
        stage: whose model drew, or `untrained`.
        folder: what `score_scenes.py` wrote.
        is_sweep: whether it was drawn with other steps or another guidance than the scores of the stages.
    """

    stage: str
    folder: Path
    is_sweep: bool = False

    def summary(self) -> dict[str, Any]:
        """Its score.json."""
        content: dict[str, Any] = json.loads((self.folder / "score.json").read_text(encoding="utf-8"))
        return content

    @property
    def settings(self) -> dict[str, Any]:
        """With what it was drawn."""
        found: dict[str, Any] = self.summary()["settings"]
        return found

    @property
    def side_px(self) -> int:
        """Side of its pictures."""
        return int(self.settings["size"].partition("x")[0])

    @property
    def label(self) -> str:
        """What the page calls it, beside the side of its pictures."""
        return "real scenes" if self.settings["real"] else stage_label(self.stage)

    def values(self) -> dict[str, Estimate]:
        """Share of right pictures: overall, and by category."""
        found = estimates(self.pictures(), SCENES.combine)
        return {name.replace("_", " "): value for name, value in found.items()}

    def pictures(self) -> list[ImageScore]:
        """What was found for each picture."""
        lines = (self.folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return [
            ImageScore(str(line["number"]), 0, line["category"], line["score"], {line["category"]: (line["score"], 1)})
            for line in found
        ]


def stage_label(name: str) -> str:
    """The label of a stage; an untrained model is called so."""
    return STAGES[name].label if name in STAGES else name


def write_report(
    path: Path, stages: Sequence[StageReport], scores: Sequence[ScoredModel], times: Mapping[str, float], command: str
) -> Path:
    """Writes the page and returns its path; the tables go as JSON to a file of the same name beside it.

    Args:
        path: of the page.
        stages: in order.
        scores: those of the stages first.
        times: seconds by name of a run, and of all `scores` together.
        command: that made all this.
    """
    runs = [dataclasses.replace(read_run(stage.run), name=stage.label) for stage in stages]
    main = [score for score in scores if not score.is_sweep]
    stage_rows = [_stage_row(stage, run) for stage, run in zip(stages, runs, strict=True)]
    score_rows = [_score_row(score) for score in main]
    parts = [
        page.heading("Stages"),
        _table(stage_rows),
        page.paragraph(HELD_OUT_NOTE),
        page.heading("Scene scores"),
        _table(score_rows),
        *_differences(stages, main),
        page.paragraph(f"{SCORE_NOTE} {_drawn_with(main)}"),
        page.folded("By chance", [_table([_chance_row(score) for score in main]), page.paragraph(CHANCE_NOTE)]),
        _score_figure(stages, main),
        *_sweeps(main, [score for score in scores if score.is_sweep]),
        page.heading("Curves"),
        *_curves(runs),
        *_pictures(stages, main),
        page.heading("Machine, command and settings"),
        page.listing([f"{name}: {text}" for name, text in _made_with(command)]),
        _table(_time_rows(stages, runs, times)),
        page.paragraph("All else: start, evaluation, pictures and saving."),
        page.folded("Settings", [_settings_table(stages)]),
        page.folded("Runs and files", [_files_table(stages, scores)]),
    ]
    write_text(path, page.page("BitDance: the stages on demo scenes", parts))
    tables = {"stages": stage_rows, "scores": [_score_row(score) for score in scores], "times": dict(times)}
    write_text(path.with_suffix(".json"), json.dumps(tables, indent=1) + "\n")
    return path


def _stage_row(stage: StageReport, run: RunRecord) -> dict[str, object]:
    sides = ", ".join(str(resolution.side_px) for resolution in stage.config.data.resolutions)
    weights = ":".join(str(resolution.share) for resolution in stage.config.data.resolutions)
    row: dict[str, object] = {
        "stage": stage.label,
        "tokens a block": stage.config.vision.block_side**2,
        "px (shares)": f"{sides} ({weights})",
        "steps": run.metrics[-1].step,
        "images": run.metrics[-1].images,
        "minutes": round(run.trained_s / 60, 1),
    }
    if run.evaluations:
        row |= {
            "held-out flow loss before": round(run.evaluations[0].vision, 4),
            "after": round(run.evaluations[-1].vision, 4),
        }
    return row


def _score_row(score: ScoredModel) -> dict[str, object]:
    summary = score.summary()
    drawn_with = {key: score.settings[key] for key in ("steps", "guidance")} if score.is_sweep else {}
    values = {name: value for name, value in score.values().items() if name != OVERALL}
    return {
        "model": score.label,
        "px": score.side_px,
        **drawn_with,
        **{name: round(value.value, 3) for name, value in values.items()},
        "overall": summary["overall"],
        "interval": summary["interval"],
        "exact": summary["exact"],
        "pictures": summary["num_pictures"],
    }


def _chance_row(score: ScoredModel) -> dict[str, object]:
    shares = score.summary()["by_chance"]
    return {"model": score.label, "px": score.side_px} | {name.replace("_", " "): shares[name] for name in shares}


def _drawn_with(scores: Sequence[ScoredModel]) -> str:
    """The sampling steps and the guidance that all scores of stages have."""
    found = {(one.settings["steps"], one.settings["guidance"]) for one in scores if not one.settings["real"]}
    return " ".join(
        f"Drawn with {steps} sampling steps a block and guidance {guidance:g}." for steps, guidance in found
    )


def _differences(stages: Sequence[StageReport], scores: Sequence[ScoredModel]) -> Iterator[str]:
    """The last stage minus the one before it, on the same prompts at the same size."""
    for side_px in sorted({score.side_px for score in scores}):
        of_size = {score.stage: score for score in scores if score.side_px == side_px and not score.settings["real"]}
        pair = [of_size.get(stage.name) for stage in stages[-2:]]
        found = [score.pictures() for score in pair if score is not None]
        if len(found) < 2 or not all(found):
            continue
        overall = differences(*found, SCENES.combine)[OVERALL]
        names = f"{stages[-1].label} minus {stages[-2].label} at {side_px} px"
        interval = f"{estimate_text(overall.estimate, 3, '+')}, paired, over {overall.num_prompts} prompts"
        # Without a difference there is nothing to resample.
        differs = overall.num_better or overall.num_worse
        yield page.paragraph(f"{names}: {interval if differs else f'none on any of {overall.num_prompts} prompts'}.")


def _score_figure(stages: Sequence[StageReport], scores: Sequence[ScoredModel]) -> str:
    names = [stage.name for stage in stages]
    shown = [score for score in scores if score.stage in names and not score.settings["real"]]
    values = {f"{score.label}, {score.side_px} px": score.values() for score in shown}
    return page.figure(draw_categories(values), "scores of the stages by category, as in the table")


def _sweeps(main: Sequence[ScoredModel], swept: Sequence[ScoredModel]) -> Iterator[str]:
    """How scores depend on sampling steps and guidance: a figure of each, with the numbers behind a click."""
    if not swept:
        return
    yield page.heading("Sampling steps and guidance")
    for name, other, title in (
        ("steps", "guidance", "sampling steps per block"),
        ("guidance", "steps", "guidance scale"),
    ):
        curves = []
        for base in main:
            lines = [score for score in (base, *swept) if _is_on_line(score, base, other)]
            lines.sort(key=lambda score: score.settings.get(name, 0))
            if len(lines) > 1:
                label = f"{base.label}, {base.side_px} px"
                positions = [score.settings[name] for score in lines]
                curves.append(Curve(label, positions, [score.values()[OVERALL] for score in lines]))
        yield page.figure(draw_sweep(title, {"overall score": curves}), f"overall score over {title}")
    yield page.folded("Numbers", [_table([_score_row(score) for score in swept])])


def _is_on_line(score: ScoredModel, base: ScoredModel, same: str) -> bool:
    """Whether a score is of the model and size of another that is not of real scenes, with one setting the same."""
    if base.settings["real"] or score.settings["real"]:
        return False
    is_same_model = (score.stage, score.side_px) == (base.stage, base.side_px)
    return is_same_model and score.settings[same] == base.settings[same]


def _curves(runs: Sequence[RunRecord]) -> Iterator[str]:
    panels = panel_pictures(runs, one_after_another=True)
    begins = ", ".join(run.name for run in runs[1:])
    yield page.paragraph(f"The stages in a row; dotted lines: where {begins} begin. Faint: the logged steps.")
    yield _picture(_sheet(panels[:NUM_FIRST_PANELS]), "losses of all stages, one after another")
    rest = _picture(_sheet(panels[NUM_FIRST_PANELS:]), "optimiser, speed, data and scores of all stages")
    yield page.folded("Gradient norm, learning rate, speed, waiting, memory, images, scores while training", [rest])


def _sheet(panels: Sequence[PanelPicture]) -> Image.Image:
    """Panels in rows, each at its own size."""
    width = max(panel.pixels.shape[1] for panel in panels)
    height = max(panel.pixels.shape[0] for panel in panels)
    num_rows = -(-len(panels) // SHEET_COLUMNS)
    sheet = np.full((num_rows * height, SHEET_COLUMNS * width, 3), 255, np.uint8)
    for number, panel in enumerate(panels):
        top, left = number // SHEET_COLUMNS * height, number % SHEET_COLUMNS * width
        sheet[top : top + panel.pixels.shape[0], left : left + panel.pixels.shape[1]] = panel.pixels
    return Image.fromarray(sheet)


def _pictures(stages: Sequence[StageReport], scores: Sequence[ScoredModel]) -> Iterator[str]:
    yield page.heading("Pictures")
    for stage in stages:
        grid = newest_samples(stage.run)
        if grid is not None:
            sample = stage.config.sample
            drawn_with = f"{sample.num_steps} sampling steps, guidance {sample.guidance:g}"
            yield page.heading(f"After {stage.label}", 3)
            yield page.paragraph(f"The prompts of the configuration, {drawn_with}.")
            yield _picture_of(grid)
    for score in scores:
        grid = score.folder / "grid.png"
        if score.stage in [stage.name for stage in stages[-2:]] and not score.settings["real"] and grid.is_file():
            title = f"Scored pictures after {score.label}, {score.side_px} px: the first of each category"
            yield page.folded(title, [_picture_of(grid)])


def _made_with(command: str) -> Iterator[tuple[str, str]]:
    """What a reader needs to repeat it: (name, text) each."""
    yield "command", command
    commit = find_commit()
    if commit is not None:
        yield "commit", str(commit)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "processor", f"{_processor()}, {cores} cores"
    if torch.cuda.is_available():
        yield "GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield "versions", f"Python {platform.python_version()}, {versions}"


def _processor() -> str:
    """Its name, where the system says it, and its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]} ({platform.machine()})"


def _time_rows(
    stages: Sequence[StageReport], runs: Sequence[RunRecord], times: Mapping[str, float]
) -> list[dict[str, object]]:
    """Minutes of each stage and of the scores; what a run takes beside its steps is apart."""
    rows: list[dict[str, object]] = []
    for stage, run in zip(stages, runs, strict=True):
        whole = times.get(stage.run.name)
        rest = None if whole is None else round(max(0.0, whole - run.trained_s) / 60, 1)
        rows.append({"minutes of": stage.label, "steps": round(run.trained_s / 60, 1), "all else": rest})
    return [*rows, {"minutes of": "all scores", "all else": round(times.get("scores", 0.0) / 60, 1)}]


def _settings_table(stages: Sequence[StageReport]) -> str:
    """The settings that are no defaults, and where a later stage differs from the one before it."""
    columns = [{name: value for name, value, _ in settings(stage.config)} for stage in stages]
    defaults = {name: default for name, _, default in settings(stages[0].config)}
    rows = []
    for name, first in columns[0].items():
        changed = [after[name] != before[name] for before, after in pairwise(columns)]
        if first == defaults[name] and not any(changed):
            continue
        cells = [_value(column[name]) if is_new else "" for column, is_new in zip(columns[1:], changed, strict=True)]
        default = "" if defaults[name] is dataclasses.MISSING else _value(defaults[name])
        rows.append([name, default, _value(first), *cells])
    return page.Table(["setting", "default", *(stage.label for stage in stages)], rows).html()


def _value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN_VALUE else f"{text[: MAX_SHOWN_VALUE - 3]}..."


def _files_table(stages: Sequence[StageReport], scores: Sequence[ScoredModel]) -> str:
    rows = [[stage.label, "run", str(stage.run)] for stage in stages]
    rows += [[score.label, "score", str(score.folder)] for score in scores]
    return page.Table(["stage", "what", "folder"], rows).html()


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return page.Table(columns, [[_cell(name, row.get(name)) for name in columns] for row in rows]).html()


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " to ".join(f"{bound:.3f}" for bound in value)
    if isinstance(value, float):
        return f"{value:g}" if name in ROUGH_COLUMNS else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _picture_of(path: Path) -> str:
    """A picture file inlined, no larger than a page needs."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((MAX_PICTURE_PX, 4 * MAX_PICTURE_PX))
    return _picture(image, path.stem)


def _picture(image: Image.Image, description: str) -> str:
    buffer = io.BytesIO()
    # A quarter of a PNG, so that a page can be mailed or kept with the code.
    image.convert("RGB").save(buffer, "WEBP", quality=85, method=6)
    return page.figure(buffer.getvalue(), description, "image/webp")
