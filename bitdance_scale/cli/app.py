"""Opens a page in the browser to draw with a model, and to watch a training run.

    bitdance app demo                        # the small model that comes with the package
    bitdance app MODEL                       # a published folder, a run, a checkpoint or an import
    bitdance app published --size 64x64 --guidance 3
    bitdance app published --adapter style   # with a field for how much of the adapters acts
    bitdance app runs/demo                   # draws with its newest checkpoint, and shows its curves and samples
    bitdance app --run runs/demo             # the run alone, before it has a checkpoint

Pictures grow block by block. Each is saved with its settings in the PNG; earlier drawings of a browser are kept until
the command ends. The page is served to this machine alone unless --host says otherwise, and asks nothing of any other.
docs/app.md says more.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitdance_scale.cli.command import CommandParser, add_adapter_argument, positive, run_command
from bitdance_scale.config.shipped_models import model_path
from bitdance_scale.errors import ConfigError
from bitdance_scale.train.process import EXIT_COMPLETE

if TYPE_CHECKING:
    from bitdance_scale.app.settings import Fields
    from bitdance_scale.generate.drawer import ModelFacts

_DTYPES = ("float32", "bfloat16")
_CONFIG_FILE = "config.toml"


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandParser(prog, __doc__)
    parser.add_argument(
        "model", type=model_path, nargs="?", metavar="MODEL", help="published folder, run, checkpoint, import; or demo"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings of a run, such as its files"
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run folder to watch (default: MODEL, if it is one)")
    add_adapter_argument(parser)
    parser.add_argument("--config", metavar="CONFIG", help="configuration that gives an import the settings of a run")
    parser.add_argument("--size", metavar="HxW", help="at first, in pixels (default: the model's)")
    parser.add_argument("--steps", type=positive, help="sampling steps per block at first (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale at first, 1 for none (default: the model's)")
    parser.add_argument("--max-images", type=positive, default=8, metavar="N", help="drawn together (default: 8)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of a published folder: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", help="of a published folder (default: cuda where there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="0 for any that is free (default: 7860)")
    return run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    # Imported late: torch takes seconds, and a refused option should not wait for it.
    from bitdance_scale.app.server import bind, check_gradio

    run = options.run
    if options.model is None and run is None:
        raise ConfigError(
            "MODEL is missing: name a published folder, a run or a checkpoint, or a run to watch with --run"
        )
    if run is None and (options.model / _CONFIG_FILE).is_file() and (options.model / "checkpoints").is_dir():
        run = options.model
    if run is not None and not run.is_dir():
        raise ConfigError(f"--run {run}: no such folder; name a run folder, such as runs/demo")
    check_gradio()
    with contextlib.ExitStack() as opened:
        bound = opened.enter_context(bind(options.host, options.port))

        from bitdance_scale.app.desk import Desk
        from bitdance_scale.app.drawing import Studio
        from bitdance_scale.app.history import PictureFolder
        from bitdance_scale.app.run_watch import RunWatch
        from bitdance_scale.app.server import serve
        from bitdance_scale.train.drawer import find_model

        folder = opened.enter_context(PictureFolder())
        desk = start = None
        if options.model is not None:
            model = find_model(
                options.model,
                dtype=options.dtype,
                device=options.device,
                overrides=options.overrides,
                config_name=options.config,
                adapters=options.adapter,
            )
            drawer = opened.enter_context(model.load())
            start = _first_fields(options, drawer.facts)
            desk = Desk(Studio(drawer), folder, options.max_images)
        serve(bound, options.host, folder, desk, start, None if run is None else RunWatch(run))
    return EXIT_COMPLETE


def _first_fields(options: argparse.Namespace, facts: ModelFacts) -> Fields:
    from bitdance_scale.app.settings import Fields, parse_page_size, shown_size

    size = facts.sizes_px[0] if options.size is None else parse_page_size(options.size, facts)
    return Fields(
        prompt="",
        size=shown_size(size),
        steps=options.steps or facts.steps,
        guidance=facts.guidance if options.guidance is None else options.guidance,
        seed=0,
        images=1,
        adapters=[*facts.adapters.values()],
    )
