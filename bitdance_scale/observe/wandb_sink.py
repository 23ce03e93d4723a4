"""Logs metrics and pictures to Weights & Biases; the only module that imports wandb.

wandb takes seconds to import, so the constructor imports it: only the rank that logs waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from PIL import Image

from bitdance_scale.config.schema import ObserveSection
from bitdance_scale.errors import ConfigError
from bitdance_scale.observe.metric_sink import IMAGES, STEP, SUMMARIES, panel_values
from bitdance_scale.observe.metrics import StepRecord

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]

DEFAULT_KEY_HOST = "api.wandb.ai"
# Training waits for the server only at the start; later, wandb buffers and retries by itself.
INIT_TIMEOUT_S = 30.0
# And at the end, when all ranks wait for the one that uploads.
FINISH_TIMEOUT_S = 60.0


class WandbSink:
    """A W&B run in `<run_folder>/wandb`, on the one rank that logs.

    Without a network or a key the run is offline; `wandb sync` on its folder uploads it later. A resumed run keeps its
    id. Offline, every start makes a folder of its own: sync the oldest first, then the later ones with
    `wandb sync --append`. It never asks at the terminal, and offline it does not touch the network.

    After the start nothing of W&B is an error: where its service, a process that the system may end, is gone, or the
    server takes no data at the end, a warning says so and how to upload them later.

    Args:
        section: project and mode. `auto` follows WANDB_MODE if it is set; otherwise it is online if an API key is
            configured and the server answers, and offline if not.
        run_folder: the run's folder; its name is the name of the W&B run.
        config: the resolved configuration, nested by section.
        run_id: id of the W&B run, the same for every start of this run.
        summaries: section of panels -> what the table of runs shows of its metrics: `last`, `min` or `max`. Every
            section that is logged is in it.

    Attributes:
        mode: the mode in effect.

    Raises:
        ConfigError: the mode is `online`, but there is no API key, or the server does not accept the run.
    """

    def __init__(
        self,
        section: ObserveSection,
        run_folder: Path,
        config: Mapping[str, object],
        run_id: str,
        summaries: Mapping[str, str] = SUMMARIES,
    ) -> None:
        self._run: wandb.Run | None = None
        self._folder = run_folder / "wandb"
        self._summaries = summaries
        self.mode: Mode = "disabled"
        if section.wandb_mode == "disabled":
            return
        # By default wandb reports its own errors to its makers, even from offline runs.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self.mode = choose_mode(section.wandb_mode, wandb.setup().settings)
        if self.mode == "disabled":
            return
        (run_folder / "wandb").mkdir(parents=True, exist_ok=True)
        try:
            self._run = self._start(section, run_folder, config, run_id)
        except wandb.Error as error:
            if section.wandb_mode != "auto" or self.mode == "offline":
                raise ConfigError(
                    f"observe.wandb_mode = {section.wandb_mode}: W&B refused the run ({error}); check the API key, the "
                    f"project {section.wandb_project!r} and the network, or set observe.wandb_mode=offline"
                ) from error
            logger.warning("W&B could not go online (%s); this run is logged offline", error)
            self.mode = "offline"
            # wandb's service process still holds the id of the run that it could not start.
            wandb.teardown()
            self._run = self._start(section, run_folder, config, run_id)
        self._folder = Path(self._run.dir).parent
        where = self._run.url if self.mode == "online" else self._folder
        logger.info("W&B run %s (%s): %s", run_id, self.mode, where)

    def log(self, record: StepRecord, panels: Mapping[str, str], images: int | None = None) -> None:
        """Adds a record at its step; W&B drops steps that its run has already.

        Args:
            record: what is known of the step.
            panels: field or property of the record -> name in W&B, as in `STEP_PANELS`.
            images: images seen so far, another x-axis, where the record has no such field.
        """
        if self._run is not None:
            x_axis = {} if images is None else {IMAGES: images}
            with self._served():
                self._run.log(panel_values(record, panels) | x_axis, step=record.step)

    def log_image(self, step: int, name: str, path: Path, caption: str) -> None:
        """Adds a picture file under `name`."""
        if self._run is None:
            return
        import wandb

        with self._served():
            self._run.log({name: wandb.Image(str(path), caption=caption)}, step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Adds a table under `name`; its pictures are kept in the run's folder until they are uploaded.

        Args:
            name: of the table.
            columns: their names.
            rows: a cell for each column: text, a number, a truth value, a picture or None.
        """
        if self._run is None:
            return
        import wandb

        data = [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
        # wandb copies what it has to upload into a folder of the user's, which another machine may not have.
        with self._served(), _environment("WANDB_DATA_DIR", str(self._folder)):
            self._run.log({name: wandb.Table(columns=list(columns), data=data)})

    def finish(self) -> None:
        """Waits until everything is written or uploaded, for `FINISH_TIMEOUT_S` at most, and closes the run."""
        if self._run is None:
            return
        with self._served():
            try:
                self._run.finish()
            except TimeoutError:
                logger.warning(
                    "W&B has not taken all data within %.0f s; they are on the disk, and `wandb sync %s` uploads them",
                    FINISH_TIMEOUT_S,
                    self._folder,
                )
        self._run = None

    @contextlib.contextmanager
    def _served(self) -> Iterator[None]:
        """Where the block finds W&B's service gone, it is warned of, and nothing is logged from then on."""
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            yield
        except (ConnectionError, HandleAbandonedError, MailboxClosedError) as error:
            self._run = None
            logger.warning(
                "W&B's service has ended (%s), perhaps for want of memory; nothing more goes to W&B until the next "
                "start, and nothing else changes. `wandb sync %s` uploads what it had written",
                type(error).__name__,
                self._folder,
            )

    def _start(self, section: ObserveSection, run_folder: Path, config: Mapping[str, object], run_id: str) -> wandb.Run:
        """Starts the run in `self.mode`, with everything off that wandb captures besides the metrics."""
        import wandb

        run = wandb.init(
            project=section.wandb_project,
            name=run_folder.name,
            id=run_id,
            # Offline, wandb would only warn that it cannot look up the id.
            resume="allow" if self.mode == "online" else None,
            dir=run_folder,
            mode=self.mode,
            config=dict(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric(STEP, hidden=True)
        for name, summary in self._summaries.items():
            run.define_metric(f"{name}/*", step_metric=STEP, summary=summary)
        return run


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable of the environment for a while, if the user has not set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def choose_mode(setting: str, wandb_settings: wandb.Settings) -> Mode:
    """The mode in effect for a value of `observe.wandb_mode`.

    Raises:
        ConfigError: the value is `online`, but no API key is configured.
    """
    if setting == "offline":
        return "offline"
    has_key = _has_credentials(wandb_settings)
    if setting == "online":
        # wandb would ask for a key at the terminal.
        if not has_key:
            raise ConfigError(
                "observe.wandb_mode = online: no W&B API key is configured; set WANDB_API_KEY, run `wandb login`, or "
                "set observe.wandb_mode=auto"
            )
        return "online"
    if wandb_settings.mode == "offline" or wandb_settings.mode == "disabled":
        return wandb_settings.mode
    return "online" if has_key else "offline"


def _has_credentials(wandb_settings: wandb.Settings) -> bool:
    """Whether wandb will find a key in the environment, its settings files or netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or wandb_settings.api_key:
        return True
    hosts = {urlsplit(wandb_settings.base_url).netloc}
    # Keys for the public server are stored under this name, whatever its address.
    if "WANDB_BASE_URL" not in os.environ:
        hosts.add(DEFAULT_KEY_HOST)
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            entries = netrc.netrc(os.path.expanduser(candidate)).hosts
        except (OSError, netrc.NetrcParseError):
            # The file is absent or unreadable: wandb would find no key in it either.
            continue
        if hosts & entries.keys():
            return True
    return False
