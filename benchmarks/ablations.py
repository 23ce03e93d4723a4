"""Ablations on demo scenes: variants of one stage, trained alike and evaluated under the same conditions.

    PYTHONPATH=. python benchmarks/ablations.py pretraining --steps 800 --seeds 1 2
    PYTHONPATH=. python benchmarks/ablations.py distillation --steps 100 --teacher runs/sft_demo
    PYTHONPATH=. python benchmarks/ablations.py pretraining --steps 600 --seeds 1 2 3 --only "bit-wise head"

Every variant trains as under `torchrun pipelines/..`, from the demo's configuration with the overrides below, for as
many steps and about as many tokens as the others, with a rate that falls to the last step, and its pictures of the
configuration's benchmark are scored at the end. Then its weights are evaluated without bit flips, on the same held-out
images, resolutions, noise and flow times as every other variant, so that only the weights make the losses differ; the
bit-wise head has no flow loss. It prints a table in Markdown, and JSON; ratios are to the first variant of the same
seed. `make demo-data` draws the images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import run_ranks

from bitdance_scale.config.load import load_config
from bitdance_scale.config.training_stages import STAGES
from bitdance_scale.observe.benchmark_scores import read_scores_of_run
from bitdance_scale.observe.metrics import EVALUATION_FILE, Evaluation, read_evaluations

ONLY_64_PX = "data.resolutions=[{side_px=64, share=1, buckets_px=[[64, 64], [64, 96], [64, 128]]}]"
BIT_WISE = "head.kind=bitwise"
JUDGED_IMAGES = 200
"""Held-out images of the last evaluation: all that the demo has."""
SCORE = "score: "
"""Begins the columns that are shares of pictures."""
QUIET = ("observe.wandb_mode=disabled", "sample.every_steps=0")


@dataclass(frozen=True)
class Study:
    """Variants of one stage.

    Attributes:
        config: name of the configuration that all of them change.
        variants: name -> overrides; the others are compared with the first.
    """

    config: str
    variants: dict[str, tuple[str, ...]]


STUDIES = {
    "pretraining": Study(
        "demo",
        {
            "as configured": (),
            "no text loss": ("loss.text_weight=0",),
            "no bit flips": ("vision.flip_max=0",),
            "one draw of noise": ("head.diff_batch_mul=1",),
            "times as published": ("head.time_shift=1",),
            "constant rate": ("optim.decay_steps=0",),
            "bit-wise head": (BIT_WISE, "head.diff_batch_mul=1"),
            "fully causal mask": ("model.mask=causal",),
            "raster order": ("vision.order=raster",),
            # An image of 64 px has about as many tokens as one of the mix.
            "64 px alone": (ONLY_64_PX,),
        },
    ),
    "distillation": Study(
        "distill_demo",
        {
            "new queries: repeat": ("run.new_queries=repeat",),
            "new queries: mean": ("run.new_queries=mean",),
            "new queries: noise": ("run.new_queries=noise",),
        },
    ),
}


def train(config: str, folder: Path, overrides: Sequence[str], num_processes: int) -> Path:
    """Trains a configuration to its end as the run `folder`, from where it stopped if it has begun."""
    entry_point = STAGES[load_config(config, [f"run.name={folder.name}"]).run.stage].entry_point
    run = [f"run.root={folder.parent}", f"run.name={folder.name}"]
    run_ranks(num_processes, entry_point, [config, *run, *QUIET, *overrides])
    return folder


def judge(config: str, run: Path, variant: Sequence[str], num_processes: int) -> Evaluation:
    """Held-out losses of a run's weights under the conditions of `config`, without bit flips.

    They are the losses before the first step of a new run that starts from these weights. Only the settings of the
    model and the order of its tokens are the variant's.
    """
    overrides = [*(setting for setting in variant if setting.startswith(("model.", "vision.order=")))]
    overrides += ["evaluate.benchmarks=[]"]
    overrides += [f"run.start_from={run}", "run.start_from_any=true", "run.steps=1", "optim.lr=1e-12"]
    overrides += [f"evaluate.images={JUDGED_IMAGES}"]
    judged = train(config, run.with_name(f"{run.name}_judged"), [*overrides, "vision.flip_max=0"], num_processes)
    return read_evaluations(judged / EVALUATION_FILE)[0]


def scores(run: Path) -> dict[str, float]:
    """What a run scored last, by column; nothing if it has no benchmark."""
    found = read_scores_of_run(run)
    return {f"{SCORE}{name}": value for name, value in found[-1].values.items()} if found else {}


def run_study(study: Study, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant and seed."""
    rows: list[dict[str, Any]] = []
    falling = options.steps - load_config(study.config).optim.warmup_steps
    for seed in options.seeds:
        for number, (name, overrides) in enumerate(study.variants.items()):
            # The first is what the others are compared with.
            if number and options.only and name not in options.only:
                continue
            common = [f"run.steps={options.steps}", f"run.seed={seed}", f"evaluate.every_steps={options.steps}"]
            common += [f"optim.decay_steps={falling}"]
            if options.teacher is not None:
                common += [f"run.start_from={options.teacher}"]
            folder = options.root / f"{options.study}_{number}_seed{seed}"
            train(study.config, folder, [*common, *options.set, *overrides], options.nproc)
            rows.append({"variant": name, "seed": seed} | scores(folder))
            if BIT_WISE not in overrides:
                found = judge(study.config, folder, overrides, options.nproc)
                losses = {f"{side} px": loss for side, loss in found.vision_by_resolution.items()}
                rows[-1] |= {"flow": found.vision} | losses | {"text": found.text}
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds; of losses the ratio to the first variant, of scores the range over the seeds."""
    columns = [name for name in rows[0] if name not in ("variant", "seed")]
    first = {row["seed"]: row for row in rows if row["variant"] == rows[0]["variant"]}
    lines = [f"| variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        cells = [_cell(column, [row[column] for row in own if column in row], own, first) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(column: str, values: list[float], own: list[dict[str, Any]], first: dict[int, dict[str, Any]]) -> str:
    """A mean with, in brackets, what it is over the seeds or against the first variant."""
    if not values:
        return ""
    if column.startswith(SCORE):
        return f"{statistics.fmean(values):.3f} ({min(values):.2f} to {max(values):.2f})"
    ratios = [row[column] / first[row["seed"]][column] for row in own]
    spread = f", {min(ratios):.3f} to {max(ratios):.3f}" if len(ratios) > 1 else ""
    return f"{statistics.fmean(values):.4f} ({statistics.fmean(ratios):.3f}{spread})"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps of every variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of weights, data order and noise")
    parser.add_argument("--teacher", type=Path, help="run that distillation starts from, if not the demo's")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="variants beside the first (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="settings of all runs")
    parser.add_argument("--root", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--nproc", type=int, default=2, help="processes of each run (default: %(default)s)")
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(STUDIES[options.study].variants)
    if unknown:
        known = ", ".join(STUDIES[options.study].variants)
        parser.error(f"--only {sorted(unknown)[0]}: no variant of {options.study}; name some of {known}")
    rows = run_study(STUDIES[options.study], options)
    print(f"\n{table(rows)}\n")
    print(json.dumps({"study": options.study, "steps": options.steps, "rows": rows}))


if __name__ == "__main__":
    main()
