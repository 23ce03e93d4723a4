"""Class labels: the captions of class-conditional runs, each the number of a class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitdance_scale.config.schema import ClassesSection, RunConfig
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.report import chunks
from bitdance_scale.errors import DataError

NUM_NAMED = 3
LONGEST_SHOWN = 40


def check_labels(index: Index, config: RunConfig) -> None:
    """Reads every label of a data set, so that a wrong one is found before training and not in its middle.

    Args:
        index: the data set.
        config: a class-conditional run; `data.captions` says where the labels are, `classes.num_classes` how many
            classes there are.

    Raises:
        DataError: a sample has no label, or one that is no class; names the first few.
    """
    for choice in config.data.captions:
        num_faults = 0
        first: list[str] = []
        for sample, found in _faults(index, choice.source, config.classes):
            num_faults += 1
            # Looking up names takes a while, and every sample may be at fault.
            if len(first) < NUM_NAMED:
                first.append(f"{index.name(sample)} of {index.shard_path(sample)}: {found}")
        if num_faults:
            others = f"; and {num_faults - NUM_NAMED} more" if num_faults > NUM_NAMED else ""
            raise DataError(
                f"data.captions: {num_faults} of {len(index)} samples have no usable label in {choice.source!r}: "
                f"{'; '.join(first)}{others}. Every sample must have the number of its class, 0 to "
                f"{config.classes.num_classes - 1} (classes.num_classes = {config.classes.num_classes}), as text; "
                'correct the shards, or name the member or field that has it, such as [{source="cls"}]'
            )


def _faults(index: Index, source: str, classes: ClassesSection) -> Iterator[tuple[int, str]]:
    """(sample, what its label is) of every sample whose label is not one class."""
    for part in chunks(len(index)):
        samples = np.arange(part.start, part.stop)
        texts = index.texts(source, samples)
        for sample, status, found in zip(samples.tolist(), index.status(source, part).tolist(), texts, strict=True):
            if status != CaptionStatus.USABLE:
                yield sample, CaptionStatus(status).name.lower()
            elif len(found) > 1:
                yield sample, f"{len(found)} labels"
            elif not classes.has(found[0]):
                yield sample, repr(found[0][:LONGEST_SHOWN])
