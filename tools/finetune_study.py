"""Fine-tunes the demo's model on styled scenes with several settings, and says what each has learned and kept.

    python tools/finetune_study.py imported --out runs/finetune_study              # every setting of SETTINGS
    python tools/finetune_study.py imported --out OUT --only lora16 full           # some of them

`imported` is an import of the model `demo`; data/finetune and data/finetune/held_out are packed from a folder of
styled scenes (docs/finetune.md). The start and the end of every setting draw the prompts of `demo-scenes` with the same
seeds. Style and scene score are read by image analysis; the differences from the start are over the same prompts. What
is done already is not done again. In OUT: runs/, drawn/, and study.md with the table of docs/finetune.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdance_scale.atomic_files import write_text
from bitdance_scale.checkpoint.step_names import CHECKPOINTS_DIR
from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.config.lora_schema import BACKBONE_TARGETS, HEAD_TARGETS
from bitdance_scale.errors import BitDanceError
from bitdance_scale.evaluation.benchmarks.demo_scenes import DemoScenes
from bitdance_scale.evaluation.metrics.catalogue import SCENES, STYLE
from bitdance_scale.evaluation.metrics.estimate import Estimate, differences, estimates
from bitdance_scale.evaluation.metrics.image_score import ImageScore
from bitdance_scale.evaluation.metrics.metric import OVERALL
from bitdance_scale.evaluation.metrics.score_file import read_scores, scores_path
from bitdance_scale.observe.metrics import EVALUATION_FILE, read_evaluations
from bitdance_scale.train.process import EXIT_COMPLETE

METRICS = (SCENES, STYLE)
CONFIG = "finetune_demo"
START = "start"
SIZE, SOLVER_STEPS, BATCH_SIZE = "64x64", 10, 25
SHOWN_PARTS = ("single_object", "colors", "counting", "position")
"""Parts of the scene score that the demo's model is good enough at to lose something."""


@dataclass(frozen=True)
class Setting:
    """A way to fine-tune.

    Attributes:
        name: of its run.
        title: what it is in words.
        overrides: settings that differ from finetune_demo.toml.
        steps: checkpoints whose pictures are scored beside the last one's.
    """

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()


SETTINGS = (
    Setting("lora16", "LoRA, rank 16, rate 2e-3"),
    Setting("lora4", "rank 4", ("lora.rank=4", "lora.alpha=4")),
    Setting("lora64", "rank 64", ("lora.rank=64", "lora.alpha=64")),
    Setting("slow", "rate 5e-4", ("optim.lr=5e-4",)),
    Setting("fast", "rate 8e-3", ("optim.lr=8e-3",)),
    Setting("full", "all weights, rate 5e-4", ("lora.rank=0", "optim.lr=5e-4")),
    Setting("head", "rank 16 beside the head alone", (f"lora.targets={json.dumps(HEAD_TARGETS)}",)),
    Setting("backbone", "rank 16 beside the backbone alone", (f"lora.targets={json.dumps(BACKBONE_TARGETS)}",)),
    Setting("short", "100 steps", ("run.steps=100", "optim.decay_steps=50")),
    Setting("long", "600 steps", ("run.steps=600", "checkpoint.keep=20"), (50, 100, 300)),
)
"""The first is the shipped configuration; each of the others says what it changes."""


@dataclass(frozen=True)
class Result:
    """What a model draws, and how its training went.

    Attributes:
        name: of the setting, or `START`.
        step: steps trained.
        scores: of its pictures, by name of the metric.
        held_out: flow loss at that step; None: not evaluated there.
        lowest: (step, flow loss) of the lowest evaluation up to it.
    """

    name: str
    step: int
    scores: Mapping[str, Sequence[ImageScore]]
    held_out: float | None
    lowest: tuple[int, float]


class Study:
    """A fine-tuning study.

    Args:
        imported: the model that is fine-tuned.
        out: folder of the results.
        num_processes: of a training run.
        overrides: settings of all runs.
    """

    def __init__(self, imported: Path, out: Path, num_processes: int, overrides: Sequence[str] = ()) -> None:
        self.imported, self.out, self.num_processes, self.overrides = imported, out, num_processes, overrides

    def start(self, run: Path) -> Result:
        """What the model draws before; its held-out loss is that of a run that has started from it."""
        held_out = _held_out(run)[0]
        return Result(START, 0, self._scores(START, self.imported, ("--config", "demo")), held_out, (0, held_out))

    def train(self, setting: Setting) -> Path:
        """Trains with a setting, unless that is done; returns the run's folder."""
        run = self.out / "runs" / setting.name
        settings = [f"run.name={setting.name}", f"run.root={run.parent}", f"run.start_from={self.imported}"]
        train = ["train", CONFIG, "--nproc", str(self.num_processes), "evaluate.benchmarks=[]"]
        _bitdance(*train, *settings, *setting.overrides, *self.overrides)
        return run

    def results(self, setting: Setting) -> list[Result]:
        """What the trained model draws, in order of steps."""
        run = self.train(setting)
        held_out = _held_out(run)
        last = max(held_out)
        found = []
        for step in (*setting.steps, last):
            model = run if step == last else run / CHECKPOINTS_DIR / f"step_{step:08d}"
            name = setting.name if step == last else f"{setting.name}_{step}"
            lowest = min((loss, at) for at, loss in held_out.items() if at <= step)
            found.append(Result(setting.name, step, self._scores(name, model), held_out.get(step), lowest[::-1]))
        return found

    def _scores(self, name: str, model: Path, options: Sequence[str] = ()) -> dict[str, Sequence[ImageScore]]:
        drawn = self.out / "drawn" / name
        solving = ["--size", SIZE, "--steps", str(SOLVER_STEPS), "--batch-size", str(BATCH_SIZE), "--name", name]
        _bitdance("evaluate", "draw", DemoScenes.name, str(model), "--out", str(drawn), *solving, *options)
        metrics = [metric.name for metric in METRICS]
        _bitdance("evaluate", "score", str(drawn), "--metric", *metrics)
        return {name: read_scores(scores_path(drawn, name)).images for name in metrics}


def _held_out(run: Path) -> dict[int, float]:
    return {line.step: line.vision for line in read_evaluations(run / EVALUATION_FILE)}


def _bitdance(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run([sys.executable, "-m", "bitdance_scale.cli", *arguments], env=environment, check=False)
    if done.returncode:
        raise BitDanceError(f"exit status {done.returncode} of: bitdance {' '.join(arguments)}")


def table(start: Result, results: Sequence[Result]) -> str:
    """The results in Markdown: values with their 95 % intervals, and what changed of the prompts that are right."""
    names = ("style", "scene score", *(name.replace("_", " ") for name in SHOWN_PARTS), "change of the scene score")
    lines = [
        f"| model | steps | held-out loss (lowest, at step) | {' | '.join(names)} |",
        "|---" * (len(names) + 3) + "|",
    ]
    titles = {setting.name: setting.title for setting in SETTINGS} | {START: "the start"}
    for result in (start, *results):
        style = estimates(result.scores[STYLE.name], STYLE.combine)[OVERALL]
        scenes = estimates(result.scores[SCENES.name], SCENES.combine)
        change = differences(start.scores[SCENES.name], result.scores[SCENES.name], SCENES.combine)[OVERALL]
        loss = "" if result.held_out is None else f"{result.held_out:.3f}"
        cells = [titles[result.name], str(result.step), f"{loss} ({result.lowest[1]:.3f}, {result.lowest[0]})"]
        cells += [_shown(style), _shown(scenes[OVERALL]), *(_shown(scenes[part]) for part in SHOWN_PARTS)]
        cells.append("" if result is start else _shown(change.estimate, "+.2f"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(found: Estimate, form: str = ".2f") -> str:
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("imported", type=Path, help="import that is fine-tuned")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_study"), help="results (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="processes of each run (default: %(default)s)")
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="settings (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="settings of all runs")
    return run_command(parser, arguments, _study)


def _study(options: argparse.Namespace) -> int:
    study = Study(options.imported, options.out, options.nproc, options.set)
    chosen = [setting for setting in SETTINGS if setting.name in options.only]
    start = study.start(study.train(chosen[0]))
    results: list[Result] = []
    for setting in chosen:
        results += study.results(setting)
        # After each, so that a study that is stopped has what it has found.
        write_text(options.out / "study.md", table(start, results))
    print((options.out / "study.md").read_text(encoding="utf-8"))
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(main())
