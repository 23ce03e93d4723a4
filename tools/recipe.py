"""Runs the stages one after another, exports each, scores what it draws, and writes a report of one page.

    python tools/recipe.py demo ct_demo sft_demo distill_demo --out runs/recipe
    python tools/recipe.py CONFIG... --out OUT --thorough     # also an untrained model, sampling steps and guidance

The configurations are runs of demo scenes in the order of the stages, each starting from the one before. What is done
already is not done again: a run that is complete, an export and a score of the same checkpoint. In OUT: a folder per
stage with its published model and scores, times.json, and report.html, which needs no other file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recipe_report import ScoredModel, StageReport, write_report
from score_scenes import ScoreRequest, make_score

from bitdance_scale.atomic_files import new_folder, write_text
from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.load import load_config
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.errors import BitDanceError, ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

STEPS, GUIDANCE = (10, 25, 50), (1.0, 2.0, 3.0, 5.0, 7.5)
USUAL_STEPS, USUAL_GUIDANCE = 25, 3.0
SCORING = "scores"
"""Name of the time that all scores took together."""


@dataclass(frozen=True)
class Job:
    """A score to be made.

    Attributes:
        stage: name of the stage's folder.
        side_px: side of the pictures.
        per_category: pictures of each category.
        steps: sampling steps per block.
        guidance: guidance scale.
        real: whether the pictures are real ones, encoded and decoded.
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

    @property
    def is_sweep(self) -> bool:
        """Whether it is drawn with other settings than the scores of the stages."""
        return not self.real and (self.steps, self.guidance) != (USUAL_STEPS, USUAL_GUIDANCE)

    def request(self, published: Path) -> ScoreRequest:
        """What is drawn and judged, with a published folder."""
        size_px = (self.side_px, self.side_px)
        return ScoreRequest(published, self.real, size_px, self.per_category, self.steps, self.guidance)


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
    every_side = sorted({side for sides in sides_px.values() for side in sides})
    # All have the same tokenizer. Larger blocks, as distillation makes them, would round the sides of pictures that are
    # not square, and bend their shapes.
    jobs += [Job(stages[0], side, per_category, real=True) for side in every_side]
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
        config = load_config(self.paths[number], overrides)
        folder, begun_s = run_folder(config), time.monotonic()
        before = _newest(folder)
        command = [sys.executable, "-m", "bitdance_scale.cli", "train", str(self.paths[number])]
        _run([*command, "--nproc", str(self.num_processes), *overrides])
        if _newest(folder) != before:
            self._add_time(folder.name, begun_s)
        return folder

    def train_untrained(self) -> Path:
        """A run of one step of warm-up, for a model that has learned nothing."""
        keep = ["run.steps=1", f"run.name={self.configs[0].run.name}_untrained", "optim.lr=1e-9"]
        keep += ["sample.every_steps=0", "evaluate.shards=[]", "evaluate.benchmarks=[]"]
        return self.train(0, keep)

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
        export_release(open_checkpoint(run), folder / "published")
        write_text(marker, json.dumps(source, indent=2) + "\n")

    def score(self, jobs: Sequence[Job]) -> None:
        """Makes the scores that are not there yet."""
        missing = [job for job in jobs if not self._is_scored(job)]
        if not missing:
            return
        begun_s = time.monotonic()
        # The longest first, so that no core waits for one at the end.
        missing.sort(key=lambda job: -job.per_category * job.side_px**2 * (1 if job.real else job.steps))
        score_side_by_side([(job, self.out / job.stage) for job in missing])
        self._add_time(SCORING, begun_s)

    def _is_scored(self, job: Job) -> bool:
        """Whether a score is there; one of another number of pictures, or of an earlier version, is removed."""
        out = self.out / job.stage / job.name
        if not (out / "score.json").is_file():
            return False
        score = json.loads((out / "score.json").read_text(encoding="utf-8"))
        if score["settings"]["per_category"] == job.per_category and "by_chance" in score:
            return True
        shutil.rmtree(out)
        return False

    def _add_time(self, name: str, begun_s: float) -> None:
        """Adds the time since `begun_s` to what a run, or all scores, took before."""
        path = self.out / "times.json"
        times = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        times[name] = round(times.get(name, 0.0) + time.monotonic() - begun_s, 1)
        write_text(path, json.dumps(times, indent=2) + "\n")

    def report(self, jobs: Sequence[Job], command: str) -> Path:
        """Writes report.html from what is there."""
        stages = [StageReport(config.run.stage, run_folder(config), config) for config in self.configs]
        scores = [ScoredModel(job.stage, self.out / job.stage / job.name, job.is_sweep) for job in jobs]
        times = json.loads((self.out / "times.json").read_text(encoding="utf-8"))
        return write_report(self.out / "report.html", stages, scores, times, command)


def score_side_by_side(tasks: Sequence[tuple[Job, Path]]) -> None:
    """Makes scores, one per core at a time, each in the folder of its stage. Processes are kept from score to score."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1), context) as pool:
        for (job, folder), summary in zip(tasks, pool.map(_score, *zip(*tasks, strict=True)), strict=True):
            print(f"\n{folder / job.name}\n{summary}", flush=True)


def _score(job: Job, folder: Path) -> str:
    """Makes one score in a process of its own; returns its summary."""
    with new_folder(folder / job.name) as writing:
        return make_score(job.request(folder / "published"), writing, keeps_pictures=False, shows_progress=False)


def run_folder(config: RunConfig) -> Path:
    """Where the run writes."""
    return Path(config.run.root) / config.run.name


def sides_of(config: RunConfig) -> list[int]:
    """Sides in pixels of the squares that a stage is scored at: its samples' first, then its largest resolution's."""
    largest = max(resolution.side_px for resolution in config.data.resolutions if resolution.share > 0)
    return list(dict.fromkeys([config.sample.size_px[0], largest]))


def _newest(run: Path) -> str | None:
    latest = run / "checkpoints" / "latest"
    return latest.read_text(encoding="utf-8").strip() if latest.is_file() else None


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise BitDanceError(f"exit status {done.returncode} of: {' '.join(command)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("configs", type=Path, nargs="+", help="configurations in the order of the stages")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="results (default: %(default)s)")
    parser.add_argument("--nproc", type=positive, default=2, help="processes of each run (default: %(default)s)")
    parser.add_argument(
        "--per-category", type=positive, default=10, help="pictures per category (default: %(default)s)"
    )
    parser.add_argument("--thorough", action="store_true", help="an untrained model and the sweeps as well")
    parser.add_argument(
        "--sweep-per-category", type=positive, default=20, help="the same in sweeps (default: %(default)s)"
    )
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "tools/recipe.py", *given])
    return run_command(parser, arguments, lambda options: _make(options, command))


def _make(options: argparse.Namespace, command: str) -> int:
    # One thread per process: the processes already take the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
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
    path = recipe.report(jobs, command)
    print(f"{path}: {(time.monotonic() - begun_s) / 60:.1f} minutes")
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(main())
