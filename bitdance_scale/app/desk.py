"""What the page does when somebody draws, stops, or goes back to an earlier drawing; it knows nothing of gradio."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bitdance_scale.app import fragments
from bitdance_scale.app.drawing import Progress, Studio
from bitdance_scale.app.history import Entry, Picture, PictureFolder, Visitor, Visitors
from bitdance_scale.app.settings import DrawSettings, Fields, png_of, read_fields, shown_size
from bitdance_scale.errors import BitDanceError

DEFAULT_MAX_IMAGES = 8
_NAME_CHARACTERS = 40


@dataclass(frozen=True)
class DrawView:
    """What the page shows; None: as before.

    Attributes:
        pictures, status, history: HTML.
        is_drawing: whether a drawing of this visitor is under way.
    """

    pictures: str | None = None
    status: str | None = None
    history: str | None = None
    is_drawing: bool = False


@dataclass(frozen=True)
class Restored:
    """An earlier drawing.

    Attributes:
        fields: as they were.
        pictures: HTML.
        status: HTML.
    """

    fields: Fields
    pictures: str
    status: str


class Desk:
    """Where drawings are asked for.

    Args:
        studio: draws.
        folder: of pictures.
        max_images: most pictures that are drawn together.
    """

    def __init__(self, studio: Studio, folder: PictureFolder, max_images: int = DEFAULT_MAX_IMAGES) -> None:
        self.facts, self.max_images = studio.drawer.facts, max_images
        self._studio, self._folder = studio, folder
        self._visitors = Visitors(folder)
        # Of every tab with a drawing under way: what asks it to stop.
        self._under_way: dict[str, threading.Event] = {}

    def welcome(self, visitor_id: str | None) -> tuple[str, str]:
        """Somebody opens the page: their id, and their history as HTML."""
        visitor = self._visitors.welcome(visitor_id)
        return visitor.id, fragments.history(visitor.entries)

    def draw(self, visitor_id: str | None, tab_id: str, fields: Fields) -> Iterator[DrawView]:
        """Draws what the fields ask for; what is wrong with them is said in the status.

        Args:
            visitor_id: from `welcome`.
            tab_id: of the tab of the visitor's browser; each has one drawing at a time.
            fields: of the page.
        """
        try:
            settings = read_fields(fields, self.facts, self.max_images)
        except BitDanceError as error:
            yield DrawView(status=fragments.problem(str(error)))
            return
        stop = threading.Event()
        if self._under_way.setdefault(tab_id, stop) is not stop:
            yield DrawView(status=fragments.problem("A drawing is under way here: wait for it, or stop it"))
            return
        try:
            yield DrawView(status=fragments.note("Starting"), is_drawing=True)
            yield from self._follow(self._visitors.welcome(visitor_id), settings, stop)
        finally:
            stop.set()
            if self._under_way.get(tab_id) is stop:
                del self._under_way[tab_id]

    def stop(self, tab_id: str) -> None:
        """Asks the drawing of a tab to stop after the block."""
        stop = self._under_way.get(tab_id)
        if stop is not None:
            stop.set()

    def leave(self, tab_id: str) -> None:
        """A tab is closed, or loaded again: nobody looks at its drawing any more."""
        self.stop(tab_id)
        self._under_way.pop(tab_id, None)

    def restore(self, visitor_id: str | None, entry_id: int) -> Restored | None:
        """An earlier drawing of the visitor; None: it is not kept any more."""
        entry = self._visitors.welcome(visitor_id).find(entry_id)
        if entry is None:
            return None
        settings = entry.settings
        fields = Fields(
            settings.prompt,
            shown_size(settings.size_px),
            settings.steps,
            settings.guidance,
            settings.seed,
            settings.images,
            [*settings.adapters.values()],
        )
        return Restored(fields, _finished(entry), fragments.note("An earlier drawing, with its settings in the fields"))

    def _follow(self, visitor: Visitor, settings: DrawSettings, stop: threading.Event) -> Iterator[DrawView]:
        last = Progress()
        try:
            for last in self._studio.draw(settings, stop):
                if not last.is_finished:
                    yield self._growing(settings, last)
        except BitDanceError as error:
            yield DrawView(status=fragments.problem(str(error)))
            return
        except Exception as error:  # noqa: BLE001  # The page goes on; the error is in the log.
            failed = f"The drawing failed ({type(error).__name__}: {error}); the terminal says more"
            yield DrawView(status=fragments.problem(failed))
            return
        if not last.is_finished:
            where = f"after block {last.num_drawn} of {last.num_blocks}" if last.num_drawn else "before the first block"
            yield DrawView(status=fragments.note(f"Stopped {where}"))
            return
        try:
            written = self._write(settings, last.images)
        except OSError as error:
            lost = (
                f"The pictures cannot be kept ({error.strerror or error}): see that {self._folder.path} is there and "
                "has room, and draw them again"
            )
            yield DrawView(_unsaved(settings, last.images), fragments.problem(lost))
            return
        entry = visitor.add(settings, written, last.seconds)
        pictures = "1 picture" if settings.images == 1 else f"{settings.images} pictures"
        yield DrawView(
            _finished(entry),
            fragments.note(f"{pictures} in {last.seconds:.1f} s"),
            fragments.history(visitor.entries),
        )

    def _growing(self, settings: DrawSettings, progress: Progress) -> DrawView:
        if progress.num_ahead:
            return DrawView(status=fragments.waiting(progress.num_ahead), is_drawing=True)
        status = fragments.progress(progress.num_drawn, progress.num_blocks, progress.seconds)
        if not progress.images:
            return DrawView(status=status, is_drawing=True)
        return DrawView(_unsaved(settings, progress.images), status, is_drawing=True)

    def _write(self, settings: DrawSettings, images: Sequence[np.ndarray]) -> list[Picture]:
        """Writes the pictures of a drawing.

        Raises:
            OSError: one cannot be written; none is left then.
        """
        words = "_".join(re.findall(r"\w+", settings.prompt))[:_NAME_CHARACTERS] or "picture"
        written: list[Picture] = []
        try:
            for number, (image, seed) in enumerate(zip(images, settings.seeds, strict=True)):
                file = self._folder.add(png_of(image, settings.record(self.facts, number)))
                written.append(Picture(file, f"{words}_seed{seed}.png", seed))
        except OSError:
            self._folder.remove([picture.file for picture in written])
            raise
        return written


def _unsaved(settings: DrawSettings, images: Sequence[np.ndarray]) -> str:
    shown = [
        fragments.ShownPicture(fragments.preview_source(image), seed)
        for image, seed in zip(images, settings.seeds, strict=True)
    ]
    return fragments.pictures(shown, settings)


def _finished(entry: Entry) -> str:
    shown = [
        fragments.ShownPicture(f"{fragments.PICTURES_PATH}/{picture.file}", picture.seed, picture.download_name)
        for picture in entry.pictures
    ]
    return fragments.pictures(shown, entry.settings)
