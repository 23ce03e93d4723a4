"""Class labels: the captions of class-conditional runs, each the number of a class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index.index import Index
from bitdance_scale.data.index.report import chunks
from bitdance_scale.errors import DataError
from bitdance_scale.sequence.condition import is_label
from bitdance_scale.wording import first_few


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
        faults = [
            fault
            for part in chunks(len(index))
            for fault in _faults(index, choice.source, part, config.classes.num_classes)
        ]
        if faults:
            raise DataError(
                f"data.captions: {len(faults)} of {len(index)} samples have no usable label in {choice.source!r}: "
                f"{first_few(faults)}. Every sample must have the number of its class, 0 to "
                f"{config.classes.num_classes - 1} (classes.num_classes = {config.classes.num_classes}), as text; "
                "correct the shards, or name the member or field that has it, such as "
                '[{source="cls"}]'
            )


def _faults(index: Index, source: str, part: slice, num_classes: int) -> Iterator[str]:
    """What is wrong with the labels of some samples, one message each."""
    samples = np.arange(part.start, part.stop)
    statuses = index.status(source, part)
    for sample, status, texts in zip(samples.tolist(), statuses.tolist(), index.texts(source, samples), strict=True):
        if status != CaptionStatus.USABLE:
            found = CaptionStatus(status).name.lower()
        elif len(texts) > 1:
            found = f"{len(texts)} labels"
        elif is_label(texts[0], num_classes):
            continue
        else:
            found = repr(texts[0])
        yield f"{index.name(sample)} of {index.shard_path(sample)}: {found}"
