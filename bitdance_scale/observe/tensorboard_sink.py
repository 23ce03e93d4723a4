"""Writes metrics and pictures for TensorBoard; the only module that imports it.

It is an optional dependency, and takes a second to import: the constructor imports it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bitdance_scale.atomic_files import write_bytes
from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.metric_sink import panel_values
from bitdance_scale.observe.metrics import StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_DIR = "tensorboard"
_ROOM_BYTES = 2**18

logger = logging.getLogger(__name__)


class TensorboardSink:
    """Event files in `<run_folder>/tensorboard`, on the one rank that logs. The names are those in W&B.

    Every start writes a file of its own. TensorBoard hides what earlier files hold of steps after the checkpoint that
    the run goes on from, so that no step is shown twice. Where a file cannot be written, the points of that time are
    missing and a new file is begun.

    Args:
        run_folder: the run's folder.
        resumed_step: step of the checkpoint the run goes on from, 0 for a fresh start.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, run_folder: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"observe.tensorboard = true: the package tensorboard cannot be imported ({error}); install it with "
                "`pip install tensorboard`, or set observe.tensorboard=false"
            ) from error
        self._make_writer = SummaryWriter
        self._folder = run_folder / TENSORBOARD_DIR
        # A fresh start evaluates at step 0 once more.
        self._first_step = resumed_step + 1 if resumed_step else 0
        self._writer: SummaryWriter | None = self._open()
        logger.info("TensorBoard: tensorboard --logdir %s", self._folder)

    def log(self, record: StepRecord, panels: Mapping[str, str], images: int | None = None) -> None:
        """Adds a record at its step, as `MetricSink.log`; TensorBoard has no other x-axis, so `images` is not used.

        Raises:
            OSError: of the file system; the record is left out.
        """
        with self._writing(record.step) as writer:
            for name, value in panel_values(record, panels).items():
                writer.add_scalar(name, value, record.step)

    def log_image(self, step: int, name: str, path: Path, caption: str) -> None:
        """Adds a picture file under `name`; TensorBoard shows its step, so `caption` is not used. Errors as `log`."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        with self._writing(step) as writer:
            writer.add_image(name, pixels, step, dataformats="HWC")

    def finish(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _open(self) -> SummaryWriter:
        return self._make_writer(str(self._folder), purge_step=self._first_step)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[SummaryWriter]:
        """The writer; after the block everything is in the file."""
        if self._writer is None:
            # Its thread prints a traceback where it finds no room: see first whether there is.
            probe = self._folder / "room"
            write_bytes(probe, bytes(_ROOM_BYTES), is_durable=False)
            probe.unlink()
            self._writer = self._open()
        try:
            yield self._writer
            self._writer.flush()
        except OSError:
            # Its thread has ended with the error. The next file goes on from here.
            self._writer, self._first_step = None, step
            raise
