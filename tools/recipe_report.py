"""The report of a recipe: one HTML page with everything in it, pictures included."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from scene_prompts import CATEGORIES

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.observe.metrics import EVALUATION_FILE, METRICS_FILE, Evaluation, StepMetrics, read_metrics

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9722b", "#2f8f4e", "#7a7a7a"
MAX_PICTURE_PX = 1400

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .25em .8em; text-align: right; }
th { border-bottom: 1px solid #999; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f5f6f8; } img { max-width: 100%; } .note { color: #666; }
"""


@dataclass(frozen=True)
class StageReport:
    """A stage that was run: its name, title, run folder and configuration."""

    name: str
    title: str
    run: Path
    config: RunConfig


@dataclass(frozen=True)
class ScoredModel:
    """A score: the stage, what it was drawn with, and the folder that `score_scenes.py` wrote."""

    stage: str
    name: str
    folder: Path

    def summary(self) -> dict[str, object]:
        """Its score.json."""
        return json.loads((self.folder / "score.json").read_text(encoding="utf-8"))


def write_report(path: Path, stages: Sequence[StageReport], scores: Sequence[ScoredModel]) -> Path:
    """Writes the page and returns its path; the tables go as JSON to a file of the same name beside it."""
    metrics = {stage.name: read_metrics(stage.run / METRICS_FILE) for stage in stages}
    evaluations = {stage.name: read_evaluations(stage.run / EVALUATION_FILE) for stage in stages}
    stage_rows = [_stage_row(stage, metrics[stage.name], evaluations[stage.name]) for stage in stages]
    score_rows = [_score_row(score) for score in scores]
    parts = [
        "<h1>BitDance recipe on demo scenes</h1>",
        f"<p>{html.escape(_machine())}</p>",
        "<h2>Stages</h2>",
        _table(stage_rows),
        '<p class="note">Held-out losses have fixed images, noise and uniform flow times; they compare with each other '
        "where two stages evaluate the same resolutions, and not with the training loss.</p>",
        _picture(_curves(stages, metrics, evaluations), "losses of all stages"),
        "<h2>Scene score</h2>",
        _table(score_rows),
        '<p class="note">Share of pictures in which image analysis finds what the prompt asks for, by GenEval\'s rules; '
        "overall is the mean of the categories. <i>real</i> are drawn scenes through the tokenizer: the most a model "
        "can get. <i>exact</i>: and nothing else is in the picture.</p>",
    ]
    for stage in stages:
        grids = sorted((stage.run / "samples").glob("step_*.png"))
        if grids:
            parts += [f"<h2>Samples after {html.escape(stage.title)}</h2>", _picture_of(grids[-1])]
    for stage in stages[-2:]:
        of_stage = [score for score in scores if score.stage == stage.name and not score.name.startswith("real")]
        if of_stage:
            heading = f"Scored pictures after {stage.title}: {of_stage[0].name}"
            parts += [f"<h2>{html.escape(heading)}</h2>", _picture_of(of_stage[0].folder / "grid.png")]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>BitDance recipe</title><style>{STYLE}</style>'
    path.write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")
    tables = {"stages": stage_rows, "scores": score_rows}
    path.with_suffix(".json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return path


def read_evaluations(path: Path) -> list[Evaluation]:
    """The held-out losses of a run; none where it made none."""
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for record in records:
        record["vision_by_class"] = {int(side): loss for side, loss in record["vision_by_class"].items()}
    return [Evaluation(**record) for record in records]


def _stage_row(
    stage: StageReport, metrics: Sequence[StepMetrics], evaluations: Sequence[Evaluation]
) -> dict[str, object]:
    last = metrics[-max(1, len(metrics) // 20) :]
    row: dict[str, object] = {
        "stage": stage.title,
        "tokens a block": stage.config.vision.block_side**2,
        "steps": metrics[-1].step,
        "images": metrics[-1].images,
        "minutes": round(sum(point.step_s for point in metrics) / 60, 1),
        "flow loss": round(sum(point.loss_vision for point in last) / len(last), 4),
        "text loss": round(sum(point.loss_text for point in last) / len(last), 4),
    }
    for name, evaluation in zip(("held out before", "held out after"), _ends(evaluations), strict=False):
        row[name] = round(evaluation.vision, 4)
        if name.endswith("after"):
            row |= {f"{side} px": round(loss, 4) for side, loss in evaluation.vision_by_class.items()}
    return row


def _ends(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    return [evaluations[0], evaluations[-1]] if evaluations else []


def _score_row(score: ScoredModel) -> dict[str, object]:
    summary = score.summary()
    shares = {category.replace("_", " "): summary["correct"][category] for category in CATEGORIES}
    ends = {"overall": summary["overall"], "exact": summary["overall_exact"], "pictures": summary["num_pictures"]}
    return {"model": score.stage, "drawn": score.name.replace("_", " ")} | shares | ends


def _table(rows: Sequence[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(name)))}</td>" for name in columns) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) and value < 10 else str(value)


def _curves(
    stages: Sequence[StageReport],
    metrics: dict[str, list[StepMetrics]],
    evaluations: dict[str, list[Evaluation]],
) -> bytes:
    """A PNG: flow loss and text loss while training, and the held-out flow loss, the stages one after another."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    flow_axes, text_axes, held_out_axes = figure.subplots(1, 3)
    begin = 0
    sides = sorted({side for found in evaluations.values() for point in found for side in point.vision_by_class})
    colors = dict(zip(sides, (BLUE, ORANGE, GREEN, GREY) * len(sides), strict=False))
    for stage in stages:
        points = metrics[stage.name]
        images = [begin + point.images for point in points]
        for axes, name, color in ((flow_axes, "loss_vision", BLUE), (text_axes, "loss_text", GREEN)):
            axes.plot(images, _smoothed([getattr(point, name) for point in points]), color=color, linewidth=1)
        images_per_step = points[-1].images / points[-1].step
        for side in sides:
            found = [(p.step, p.vision_by_class[side]) for p in evaluations[stage.name] if side in p.vision_by_class]
            # Before the first step of pretraining the loss is of another size.
            found = [(step, loss) for step, loss in found if step or stage is not stages[0]]
            if found:
                at = [begin + step * images_per_step for step, _ in found]
                held_out_axes.plot(at, [loss for _, loss in found], "o-", markersize=3, color=colors[side])
        for axes in (flow_axes, text_axes, held_out_axes):
            axes.axvline(begin, color=GREY, linewidth=0.5, linestyle=":")
        flow_axes.text(begin, 0.99, f" {stage.name}", fontsize=8, va="top", transform=flow_axes.get_xaxis_transform())
        begin += points[-1].images
    titles = ("Flow loss, training", "Text cross-entropy, training", "Flow loss, held out")
    for axes, title in zip((flow_axes, text_axes, held_out_axes), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("images")
        axes.set_yscale("log")
        axes.grid(alpha=0.25, which="both")
    for side in sides:
        held_out_axes.plot([], [], "o-", markersize=3, color=colors[side], label=f"{side} px")
    if sides:
        held_out_axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean of up to the last fortieth of the values."""
    width = max(1, len(values) // 40)
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def _picture_of(path: Path) -> str:
    """A picture file inlined, no larger than a page needs."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((MAX_PICTURE_PX, 4 * MAX_PICTURE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _picture(buffer.getvalue(), path.stem)


def _picture(png: bytes, description: str) -> str:
    encoded = base64.b64encode(png).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}"></p>'


def _machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _packages())
    return f"{platform.machine()}, Python {platform.python_version()}, {versions}"


def _packages() -> Iterable[str]:
    return ("bitdance_scale", "torch", "megatron-core", "deepspeed")
