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

from PIL import Image

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.evaluation.benchmarks.demo_scenes import CATEGORIES
from bitdance_scale.observe.overview import overview
from bitdance_scale.observe.run_record import RunRecord, read_run

MAX_PICTURE_PX = 1400

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .25em .8em; text-align: right; }
th { border-bottom: 1px solid #999; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) td { background: #f5f6f8; } img { max-width: 100%; } .note { color: #666; }
"""

HELD_OUT_NOTE = (
    '<p class="note">Held-out losses have fixed images, noise and uniform flow times. They compare with each other '
    "where two stages evaluate the same resolutions, and not with the training loss.</p>"
)
SCORE_NOTE = (
    '<p class="note">Share of pictures in which image analysis finds what the prompt asks for, by GenEval\'s rules; '
    "overall is the mean of the categories. <i>real</i>: drawn scenes encoded and decoded by the tokenizer, the most a "
    "model can reach. <i>exact</i>: nothing else is in the picture.</p>"
)


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
    runs = [read_run(stage.run) for stage in stages]
    stage_rows = [_stage_row(stage, run) for stage, run in zip(stages, runs, strict=True)]
    score_rows = [_score_row(score) for score in scores]
    parts = [
        "<h1>BitDance recipe on demo scenes</h1>",
        f"<p>{html.escape(_machine())}</p>",
        "<h2>Stages</h2>",
        _table(stage_rows),
        HELD_OUT_NOTE,
        _picture(Image.open(io.BytesIO(overview(runs, one_after_another=True))), "all stages, one after another"),
        "<h2>Scene score</h2>",
        _table(score_rows),
        SCORE_NOTE,
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
    write_text(path, page + "\n".join(parts) + "</html>\n")
    tables = {"stages": stage_rows, "scores": score_rows}
    write_text(path.with_suffix(".json"), json.dumps(tables, indent=1) + "\n")
    return path


def _stage_row(stage: StageReport, run: RunRecord) -> dict[str, object]:
    last = run.metrics[-max(1, len(run.metrics) // 20) :]
    row: dict[str, object] = {
        "stage": stage.title,
        "tokens a block": stage.config.vision.block_side**2,
        "steps": run.metrics[-1].step,
        "images": run.metrics[-1].images,
        "minutes": round(run.trained_s / 60, 1),
        "flow loss": round(sum(point.loss_vision for point in last) / len(last), 4),
        "text loss": round(sum(point.loss_text for point in last) / len(last), 4),
    }
    if run.evaluations:
        first, final = run.evaluations[0], run.evaluations[-1]
        row |= {"held out before": round(first.vision, 4), "held out after": round(final.vision, 4)}
        row |= {f"{side} px": round(loss, 4) for side, loss in final.vision_by_resolution.items()}
    return row


def _score_row(score: ScoredModel) -> dict[str, object]:
    summary = score.summary()
    shares = {category.replace("_", " "): summary["correct"][category] for category in CATEGORIES}
    ends = {"overall": summary["overall"], "exact": summary["exact"], "pictures": summary["num_pictures"]}
    return {"model": score.stage, "drawn": score.name.replace("_", " ")} | shares | ends


def _table(rows: Sequence[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(name, row.get(name)))}</td>" for name in columns) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    num_decimals = 1 if name == "minutes" else 3
    return f"{value:.{num_decimals}f}" if isinstance(value, float) else str(value)


def _picture_of(path: Path) -> str:
    """A picture file inlined, no larger than a page needs."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((MAX_PICTURE_PX, 4 * MAX_PICTURE_PX))
    return _picture(image, path.stem)


def _picture(image: Image.Image, description: str) -> str:
    buffer = io.BytesIO()
    # A quarter of a PNG, so that a page can be mailed or kept with the code.
    image.convert("RGB").save(buffer, "WEBP", quality=85, method=6)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/webp;base64,{encoded}"></p>'


def _machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _packages())
    return f"{platform.machine()}, Python {platform.python_version()}, {versions}"


def _packages() -> Iterable[str]:
    return ("bitdance_scale", "torch", "megatron-core", "deepspeed")
