"""Runs the stages one after another, exports each, scores what it draws, and writes a report of one page.

    python tools/recipe.py demo ct_demo sft_demo distill_demo --out runs/recipe
    python tools/recipe.py CONFIG... --out OUT --thorough     # also an untrained model, sampling steps and guidance

The configurations are runs of demo scenes in the order of the stages, each starting from the one before. What is done
already is not done again: a run that is complete, an export and a score of the same checkpoint. In OUT: a folder per
stage with its published model and scores, and report.html, which needs no other file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recipe_report import ScoredModel, StageReport, write_report

from bitdance_scale.atomic_files import new_folder, write_text
from bitdance_scale.cli.command import CommandParser, run_command
from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

TOOLS = Path(__file__).resolve().parent
STEPS, GUIDANCE = (10, 25, 50), (1.0, 2.0, 3.0, 5.0, 7.5)
USUAL_STEPS, USUAL_GUIDANCE = 25, 3.0


@dataclass(frozen=True)
class Job:
    """A score to be made.

    Attributes:
        stage: name of the stage's folder.
        side_px: side of the pictures.
        steps: sampling steps per block.
        guidance: guidance scale.
        real: whether the pictures are real ones, encoded and decoded.
        per_category: pictures of each category.
    """

    stage: str
    side_px: int
    per_category: int
    steps: int = USUAL_STEPS
    guidance: float = USUAL_GUIDANCE
    real: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        if self.real:
            return f"real_{self.side_px}px"
        return f"{self.side_px}px_{self.steps}steps_guidance{self.guidance:g}"


def plan_jobs(
    stages: Sequence[str], sides_px: dict[str, list[int]], per_category: int, sweep_per_category: int | None
) -> list[Job]:
    """The scores of a recipe: every stage at its sides, the tokenizer's limit, and the sweeps.

    Args:
        stages: names in order, of which `untrained` may be one.
        sides_px: sides that each stage is scored at.
        per_category: pictures of each category.
        sweep_per_category: the same where sampling steps and guidance of the last two stages are swept; None: no
            sweeps.
    """
    jobs = [Job(stage, side, per_category) for stage in stages for side in sides_px[stage]]
    last = stages[-1]
    every_side = sorted({side for sides in sides_px.values() for side in sides})
    jobs += [Job(last, side, per_category, real=True) for side in every_side]
    if sweep_per_category is not None:
        for stage in stages[-2:]:
            side = sides_px[stage][0]
            jobs += [Job(stage, side, sweep_per_category, steps=steps) for steps in STEPS]
            jobs += [Job(stage, side, sweep_per_category, guidance=guidance) for guidance in GUIDANCE]
    found: dict[tuple[str, str], Job] = {}
    for job in jobs:
        # What is a score anyway is not made again with the sweep's number of pictures.
        found.setdefault((job.stage, job.name), job)
    return list(found.values())


class Recipe:
    """A sequence of stages and its results.

    Args:
        configs: one configuration file per stage.
        out: folder of the results.
        num_processes: of each training run.

    Raises:
        ConfigError: a configuration is not valid, or does not start from the one before.
    """

    def __init__(self, configs: Sequence[Path], out: Path, num_processes: int) -> None:
        self.paths = list(configs)
        self.configs = [load_config(path) for path in configs]
        for before, config, path in zip(self.configs, self.configs[1:], self.paths[1:], strict=False):
            if Path(config.run.start_from) != run_folder(before):
                raise ConfigError(
                    f"{path}: run.start_from = {config.run.start_from!r}: must be {str(run_folder(before))!r}, the run "
                    "of the configuration before it"
                )
        names = [config.run.stage for config in self.configs]
        if len(set(names)) < len(names):
            raise ConfigError(f"the configurations are of the stages {', '.join(names)}: each may come once")
        self.out, self.num_processes = out, num_processes

    def train(self, number: int, overrides: Sequence[str] = ()) -> Path:
        """Runs a stage to its end and returns its folder."""
        config = self.configs[number]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={self.num_processes}", STAGES[config.run.stage].entry_point]
        _run([*command, str(self.paths[number]), *overrides], TOOLS.parent)
        return run_folder(config)

    def train_untrained(self) -> Path:
        """A run of one step of warm-up, for a model that has learned nothing."""
        config = self.configs[0]
        folder = Path(config.run.root) / f"{config.run.name}_untrained"
        keep = ["run.steps=1", f"run.name={folder.name}", "optim.lr=1e-9", "sample.every_steps=0"]
        keep += ["evaluate.shards=[]", "evaluate.benchmarks=[]"]
        self.train(0, keep)
        return folder

    def export(self, stage: str, run: Path) -> None:
        """Writes the published folder of a run's newest checkpoint, unless that is there."""
        folder = self.out / stage
        folder.mkdir(parents=True, exist_ok=True)
        source = {
            "run": str(run),
            "run_id": (run / "run_id.txt").read_text(encoding="utf-8").strip(),
            "checkpoint": _newest(run),
        }
        marker = folder / "source.json"
        if (
            marker.is_file()
            and json.loads(marker.read_text(encoding="utf-8")) == source
            and (folder / "published").is_dir()
        ):
            return
        shutil.rmtree(folder)
        folder.mkdir()
        _run([sys.executable, str(TOOLS / "convert_to_hf.py"), str(run), str(folder / "published")])
        write_text(marker, json.dumps(source, indent=2) + "\n")

    def score(self, jobs: Sequence[Job]) -> None:
        """Makes the scores that are not there yet, one per core at a time."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._score, jobs))

    def _score(self, job: Job) -> None:
        folder = self.out / job.stage
        out = folder / job.name
        if (out / "score.json").is_file():
            if (
                json.loads((out / "score.json").read_text(encoding="utf-8"))["settings"]["per_category"]
                == job.per_category
            ):
                return
            shutil.rmtree(out)
        command = [sys.executable, str(TOOLS / "score_scenes.py"), str(folder / "published")]
        command += ["--size", f"{job.side_px}x{job.side_px}", "--steps", str(job.steps)]
        command += ["--guidance", str(job.guidance), "--per-category", str(job.per_category), "--no-pictures"]
        with new_folder(out) as writing:
            _run([*command, "--out", str(writing), *(["--real"] if job.real else [])])

    def report(self, jobs: Sequence[Job]) -> Path:
        """Writes report.html from what is there."""
        stages = [
            StageReport(config.run.stage, STAGES[config.run.stage].title, run_folder(config), config)
            for config in self.configs
        ]
        scores = [ScoredModel(job.stage, job.name, self.out / job.stage / job.name) for job in jobs]
        return write_report(self.out / "report.html", stages, scores)


def run_folder(config: RunConfig) -> Path:
    """Where the run writes."""
    return Path(config.run.root) / config.run.name


def sides_of(config: RunConfig) -> list[int]:
    """Sides in pixels of the squares that a stage is scored at: its samples' first, then its largest resolution's."""
    largest = max(resolution.side_px for resolution in config.data.resolutions if resolution.share > 0)
    return list(dict.fromkeys([config.sample.size_px[0], largest]))


def _newest(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise BitDanceError(f"exit status {done.returncode} of: {' '.join(command)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("configs", type=Path, nargs="+", help="configurations in the order of the stages")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="results (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="processes of each run (default: %(default)s)")
    parser.add_argument("--per-category", type=int, default=10, help="pictures per category (default: %(default)s)")
    parser.add_argument("--thorough", action="store_true", help="an untrained model and the sweeps as well")
    parser.add_argument("--sweep-per-category", type=int, default=20, help="the same in sweeps (default: %(default)s)")
    return run_command(parser, arguments, _make)


def _make(options: argparse.Namespace) -> int:
    begun_s = time.monotonic()
    recipe = Recipe(options.configs, options.out, options.nproc)
    names, sides = [], {}
    if options.thorough:
        names.append("untrained")
        sides["untrained"] = sides_of(recipe.configs[0])[:1]
        recipe.export("untrained", recipe.train_untrained())
    for number, config in enumerate(recipe.configs):
        names.append(config.run.stage)
        # The largest pictures take longest; two stages are enough to compare blocks of 16 and 64 tokens at them.
        is_early = number < len(recipe.configs) - 2
        sides[config.run.stage] = sides_of(config)[: 1 if is_early else None]
        recipe.export(config.run.stage, recipe.train(number))
    sweep_per_category = options.sweep_per_category if options.thorough else None
    jobs = plan_jobs(names, sides, options.per_category, sweep_per_category)
    recipe.score(jobs)
    path = recipe.report(jobs)
    print(f"{path}: {(time.monotonic() - begun_s) / 60:.1f} minutes")
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(main())
