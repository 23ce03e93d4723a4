"""What a tokenizer run shows of itself: held-out images over their reconstructions, and one page about the run."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bitdance_scale.atomic_files import write_bytes
from bitdance_scale.evaluation.pairs import Pairs, draw_pairs
from bitdance_scale.train.run_observer import OVERVIEW_FILE
from bitdance_scale.train.run_sinks import RunSinks
from bitdance_scale.train.tokenizer_evaluation import Reconstruction

logger = logging.getLogger(__name__)


def show_run(
    run_folder: Path,
    step: int,
    images: Mapping[tuple[int, int], np.ndarray],
    results: Mapping[tuple[int, int], Reconstruction],
    sinks: RunSinks,
) -> None:
    """Writes `reconstructions/step_N.png` and `overview.png`, and hands both to the sinks.

    A picture must not end a run: what goes wrong is logged.

    Args:
        run_folder: the run's folder.
        step: steps taken.
        images: held-out images by (height, width), uint8 [n, H, W, 3].
        results: their reconstructions.
        sinks: where pictures are shown.
    """
    # matplotlib takes a second to import, and only the rank that draws needs it.
    from bitdance_scale.observe.tokenizer_overview import PICTURES_FOLDER, read_tokenizer_run, tokenizer_overview

    rows = [
        Pairs(
            f"{height} x {width}",
            f"{results[height, width].psnr_db:.1f} dB",
            [*originals],
            [*results[height, width].decoded],
        )
        for (height, width), originals in images.items()
    ]
    picture, path = draw_pairs(rows), run_folder / PICTURES_FOLDER / f"step_{step:08d}.png"
    try:
        content = io.BytesIO()
        picture.save(content, format="png")
        write_bytes(path, content.getvalue())
        sinks.log_picture(step, "reconstructions", path)
        write_bytes(run_folder / OVERVIEW_FILE, tokenizer_overview(read_tokenizer_run(run_folder)))
        sinks.log_picture(step, "overview", run_folder / OVERVIEW_FILE)
    except Exception:  # A picture must not end a run.
        logger.warning("the pictures of step %d could not be made", step, exc_info=True)
