"""The names of a run's classes, kept in its folder: what its labels meant, whatever becomes of the class map."""

from __future__ import annotations

import itertools
from pathlib import Path

from bitdance_scale.atomic_files import write_text
from bitdance_scale.config.class_map import CLASSES_FILE, ClassLabels, ClassMap, read_class_map
from bitdance_scale.config.schema import ClassesSection
from bitdance_scale.errors import ConfigError


def keep_class_names(run_folder: Path, section: ClassesSection, *, is_resumed: bool) -> None:
    """Writes the names of `classes.map` to the folder of a run; a resumed run must have those that are there.

    Args:
        run_folder: of the run; made if absent.
        section: classes; without a map nothing is done.
        is_resumed: whether the run goes on from a checkpoint.

    Raises:
        ConfigError: the run was trained with other names or another order of them.
    """
    if not section.map:
        return
    names, path = ClassLabels(section).names, run_folder / CLASSES_FILE
    if not (is_resumed and path.exists()):
        write_text(path, ClassMap(names).text())
        return
    kept = read_class_map(path).names
    if kept != names:
        pairs = enumerate(itertools.zip_longest(kept, names))
        number, (old, new) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
        raise ConfigError(
            f"classes.map = {section.map!r}: class {number} is {_shown(new)}, and {_shown(old)} in {path}, with which "
            "this run has been trained: labels would mean other classes. Restore the map, or start a new run"
        )


def _shown(name: str | None) -> str:
    return "no class" if name is None else repr(name)
