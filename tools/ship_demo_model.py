"""Puts the model of a run into the package, as what `demo` means where a model is named (`bitdance sample demo`).

    python tools/ship_demo_model.py runs/sft_demo

The folder of the demo's tokenizers becomes a published folder: beside them come the weights in bfloat16, their
configurations, and provenance.json with what was trained, at which commit, and the scene score of these very files. The
run must have the autoencoder of that folder, so that it is there once. The files may take 6 MB together, without the
tokenizers of training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkout import Commit, find_commit
from score_scenes import ScoreRequest, make_score

import bitdance_scale
from bitdance_scale.atomic_files import write_bytes, write_text
from bitdance_scale.checkpoint.conversion_folder import REPORT_NAME
from bitdance_scale.checkpoint.export_card import starts_of
from bitdance_scale.checkpoint.export_release import Export, export_release, open_checkpoint
from bitdance_scale.checkpoint.run_checkpoint import read_run_section
from bitdance_scale.cli.command import CommandParser, positive, run_command
from bitdance_scale.config.shipped import ASSETS
from bitdance_scale.errors import ConfigError
from bitdance_scale.generate.sampling_file import read_sampling
from bitdance_scale.model.published_names import Part
from bitdance_scale.observe.run_record import read_run
from bitdance_scale.sharing.card import SAMPLES_NAME
from bitdance_scale.sharing.licences import CARD_NAME, LICENCE_NAME
from bitdance_scale.train.process import EXIT_COMPLETE
from bitdance_scale.vision.weights import CONFIG_NAME, WEIGHTS_NAME, weights_digest
from bitdance_scale.weight_files import read_json
from bitdance_scale.wording import file_size

MAX_BYTES = 6_000_000
PROVENANCE_NAME = "provenance.json"
# The autoencoder is there already, and the package has one licence and one documentation.
LEFT_OUT = {WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, LICENCE_NAME, SAMPLES_NAME, REPORT_NAME}


def open_run(run: Path, assets: Path) -> Export:
    """The newest checkpoint of a run, checked against the autoencoder of the folder that it goes to.

    Raises:
        BitDanceError: there is none, or it is damaged.
        ConfigError: it is of no finished text-to-image run, or of one with another autoencoder.
    """
    export = open_checkpoint(run, dtypes=dict.fromkeys(Part, "bfloat16"))
    if export.run is None or not export.run.is_finished or not export.network.model.parts.has_text:
        raise ConfigError(f"{run}: is no finished text-to-image run; name one, such as runs/sft_demo")
    if weights_digest(export.network.vision.weights_path) != weights_digest(assets / WEIGHTS_NAME):
        raise ConfigError(
            f"{run}: its autoencoder, {export.network.vision.weights}, is not that of {assets}; train with "
            f"vision.weights=asset:{assets.name}/{WEIGHTS_NAME}"
        )
    return export


def model_files(published: Path) -> list[Path]:
    """The files of an export that go into the package.

    Raises:
        ConfigError: they take too much room.
    """
    files = sorted(path for path in published.iterdir() if path.name not in LEFT_OUT)
    num_bytes = sum(path.stat().st_size for path in files)
    if num_bytes > MAX_BYTES:
        raise ConfigError(
            f"{published}: {file_size(num_bytes)}, more than {file_size(MAX_BYTES)}; train a smaller model"
        )
    return files


def score(published: Path, per_category: int, out: Path) -> dict[str, Any]:
    """The scene score of a published folder with its own settings, as score.json has it; written to `out`."""
    sampling = read_sampling(published)
    assert sampling is not None, "every export of a run has them"
    request = ScoreRequest(published, False, sampling.size_px, per_category, sampling.num_steps, sampling.guidance)
    print(make_score(request, out, keeps_pictures=False))
    return read_json(out / "score.json")


def provenance(export: Export, commit: Commit, scores: Mapping[str, object]) -> dict[str, Any]:
    """What the files were made of."""
    assert export.run is not None, "it was checked when the run was opened"
    record = read_run(export.path.parents[1])
    return {
        "run": export.run.name,
        "stage": export.run.stage,
        "steps": export.run.step,
        "images": record.metrics[-1].images,
        "minutes": round(record.trained_s / 60, 1),
        "seed": read_run_section(export.path)["seed"],
        "weights": export.stated_weights,
        "started_from": list(starts_of(export.path, None)),
        "config_sha256": export.config_sha256,
        "autoencoder_sha256": weights_digest(export.network.vision.weights_path),
        "version": bitdance_scale.__version__,
        "commit": commit.sha,
        "has_changes": commit.has_changes,
        "scene_score": dict(scores),
    }


def install(files: Sequence[Path], assets: Path, content: Mapping[str, Any]) -> None:
    """Replaces the model in the folder of the tokenizers."""
    for path in files:
        write_bytes(assets / path.name, path.read_bytes())
    write_text(assets / PROVENANCE_NAME, json.dumps(content, indent=1) + "\n")


def _run(options: argparse.Namespace) -> int:
    if not (options.assets / WEIGHTS_NAME).is_file():
        raise ConfigError(f"--assets {options.assets}: has no {WEIGHTS_NAME}; name the folder of the demo's tokenizers")
    commit = find_commit()
    if commit is None:
        raise ConfigError("git does not say the commit of this checkout, which provenance.json names; use a clone")
    export = open_run(options.run, options.assets)
    with tempfile.TemporaryDirectory() as folder:
        published = Path(folder) / "published"
        export_release(export, published)
        files = model_files(published)
        if read_json(published / CONFIG_NAME) != read_json(options.assets / CONFIG_NAME):
            raise ConfigError(f"{options.assets / CONFIG_NAME}: gives other sizes than the run's autoencoder has")
        shutil.copyfile(options.assets / WEIGHTS_NAME, published / WEIGHTS_NAME)
        scores = score(published, options.per_category, Path(folder) / "scores")
        content = provenance(export, commit, scores)
        install(files, options.assets, content)
        num_bytes = sum(path.stat().st_size for path in files)
    if commit.has_changes:
        print("warning: the checkout differs from its commit, which provenance.json says", file=sys.stderr)
    print(f"{options.assets}: the model of {export.run}, {file_size(num_bytes)} beside the tokenizers")
    return EXIT_COMPLETE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of the demo")
    parser.add_argument("--per-category", type=positive, default=50, help="pictures scored (default: %(default)s)")
    parser.add_argument(
        "--assets", type=Path, default=ASSETS / "demo", help="folder to put it in (default: the package's)"
    )
    return run_command(parser, arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
