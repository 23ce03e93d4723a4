"""Class labels: the captions of class-conditional runs, each the number or the name of a class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitdance_scale.config.class_map import ClassLabels
from bitdance_scale.config.schema import RunConfig
from bitdance_scale.data.captions import CaptionStatus
from bitdance_scale.data.index.index import Index
from bitdance_scale.errors import DataError

NUM_NAMED = 3
LONGEST_SHOWN = 40
_SAMPLES_AT_ONCE = 1 << 16


def check_labels(index: Index, config: RunConfig) -> None:
    """Reads every label of a data set, so that a wrong one is found before training and not in its middle.

    Args:
        index: the data set.
        config: a class-conditional run; `data.captions` says where the labels are, `classes` what they may be.

    Raises:
        ConfigError: the class map cannot be used.
        DataError: a sample has no label, or one that is no class; names the first few.
    """
    labels = ClassLabels(config.classes)
    for choice in config.data.captions:
        num_faults = 0
        first: list[str] = []
        for sample, found in _faults(index, choice.source, labels):
            num_faults += 1
            # Looking up names takes a while, and every sample may be at fault.
            if len(first) < NUM_NAMED:
                first.append(f"{index.name(sample)} of {index.shard_path(sample)}: {found}")
        if num_faults:
            others = f"; and {num_faults - NUM_NAMED} more" if num_faults > NUM_NAMED else ""
            raise DataError(
                f"data.captions: {num_faults} of {len(index)} samples have no usable label in {choice.source!r}: "
                f"{'; '.join(first)}{others}. The label of every sample must be {labels.rule}; correct the shards or "
                'classes.map, or name what has the label: a member [{source="cls"}], a field [{source="json:label"}] '
                'or a part of the key [{source="key_prefix"}]'
            )


def _faults(index: Index, source: str, labels: ClassLabels) -> Iterator[tuple[int, str]]:
    """(sample, what its label is) of every sample whose label is not one class."""
    sound: set[bytes] = set()
    for start in range(0, len(index), _SAMPLES_AT_ONCE):
        part = slice(start, min(start + _SAMPLES_AT_ONCE, len(index)))
        # There are few different labels: only a range with a wrong one is looked at sample by sample.
        new = index.distinct_texts(source, part) - sound
        wrong = {text for text in new if _number(text, labels) is None}
        sound |= new - wrong
        if wrong:
            yield from _faults_of(index, source, part, labels)


def _number(text: bytes, labels: ClassLabels) -> int | None:
    try:
        return labels.number(text.decode("utf-8"))
    except UnicodeDecodeError:
        return None


def _faults_of(index: Index, source: str, part: slice, labels: ClassLabels) -> Iterator[tuple[int, str]]:
    samples = np.arange(part.start, part.stop)
    statuses, texts = index.status(source, samples).tolist(), index.texts(source, samples)
    for sample, status, found in zip(samples.tolist(), statuses, texts, strict=True):
        if status != CaptionStatus.USABLE:
            yield sample, CaptionStatus(status).name.lower()
        elif len(found) > 1:
            yield sample, f"{len(found)} labels"
        elif labels.number(found[0]) is None:
            yield sample, repr(found[0][:LONGEST_SHOWN])
