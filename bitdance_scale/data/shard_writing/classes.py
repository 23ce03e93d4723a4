"""Pictures with their classes, from a folder or a tar per class, in a mixed order.

A shard that holds one class alone would be a poor piece of a stream, so the pictures come in a fixed permutation of the
listing. They are read where they lie, and only one at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from bitdance_scale.config.class_map import ClassMap, read_class_map
from bitdance_scale.data.plan.permutation import Permutation
from bitdance_scale.data.shard_writing.source import PictureSource, SourcePicture, digest_of
from bitdance_scale.errors import DataError
from bitdance_scale.wording import first_few

_ORDER_KEY = (0,)


class NamedPictures(PictureSource, Protocol):
    """A source that can be read at any place and knows its names.

    Attributes:
        names: path of each picture, with slashes.
    """

    names: list[str]


class PicturesOfClasses:
    """The pictures of a source with the numbers of their classes (a `PictureSource`).

    A class is the first folder of a name. Its number is its rank among the sorted names, or that of the map.

    Args:
        path: the source, for messages.
        kind: what it is, in words.
        source: the pictures.
        class_names: all classes that it has, with pictures or without.
        map_path: the class map; None: the sorted names.

    Attributes:
        classes: the names of all classes, in order of their numbers.
        num_empty: classes of the map without a picture.

    Raises:
        ConfigError: the map cannot be used.
        DataError: a picture has no class, or the map lacks a class; without a map, also a class without pictures, whose
            number would shift the others when it is filled or removed.
    """

    def __init__(
        self, path: Path, kind: str, source: NamedPictures, class_names: Sequence[str], map_path: Path | None
    ) -> None:
        self.kind, self._source, self.left_out = kind, source, source.left_out
        beside = [name for name in source.names if "/" not in name]
        if beside:
            raise DataError(
                f"{path}: {len(beside)} pictures lie beside the folders of classes, and so have no class "
                f"({first_few(beside)}); move them into the folder of their class, or elsewhere"
            )
        of_pictures = [name.partition("/")[0] for name in source.names]
        filled = set(of_pictures)
        self.classes = _class_map(path, class_names, filled, map_path)
        self.num_empty = len(self.classes.names) - len(filled)
        labels = np.array([self.classes.numbers[name] for name in of_pictures], np.int64)
        count = len(labels)
        self._order = Permutation(count, _ORDER_KEY)(np.arange(count)) if count else np.zeros(0, np.int64)
        self._labels = labels[self._order]
        self.num_bytes = source.num_bytes[self._order]
        self.digest = digest_of([source.digest, *self.classes.names])

    def can_start_at(self, position: int) -> bool:
        """Anywhere."""
        return True

    def pictures(self, start: int, stop: int) -> Iterator[SourcePicture]:
        """The pictures from `start` to `stop`."""
        for place, label in zip(self._order[start:stop].tolist(), self._labels[start:stop].tolist(), strict=True):
            for picture in self._source.pictures(place, place + 1):
                yield replace(picture, label=label)

    def without_caption(self) -> Iterator[str]:
        """Of the source, in its order."""
        return self._source.without_caption()


def _class_map(path: Path, class_names: Sequence[str], filled: set[str], map_path: Path | None) -> ClassMap:
    if map_path is not None:
        classes = read_class_map(map_path)
        lacking = sorted(filled - set(classes.numbers))
        if lacking:
            raise DataError(
                f"{map_path}: lacks {len(lacking)} of the {len(filled)} classes of {path} ({first_few(lacking)}); add "
                "them to the map, or remove their pictures"
            )
        return classes
    empty = sorted(set(class_names) - filled)
    if empty and filled:
        raise DataError(
            f"{path}: {len(empty)} classes hold no pictures ({first_few(empty)}), and would take numbers from the "
            "others; fill or remove them, or number the classes with --class-map FILE"
        )
    try:
        return ClassMap(sorted(filled))
    except ValueError as error:
        raise DataError(f"{path}: {error}; --class-map FILE numbers classes in another order") from error
