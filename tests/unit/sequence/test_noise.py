"""The counter-based generator: its streams stay what they were, and no two of them are alike."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from bitdance_scale.sequence.noise import Purpose, generator

LARGEST = 2**31 - 1


def test_draws_of_earlier_versions_are_the_same() -> None:
    """The digest is of the version that had these three purposes alone; numpy's Philox without a counter agrees."""
    digest = hashlib.sha256()
    for seed, step, key in ((0, 0, 0), (LARGEST, LARGEST, 2**63 - 1), (7, 123456, 98765)):
        for purpose in (Purpose.TRAIN, Purpose.EVALUATE, Purpose.SAMPLE_IMAGE):
            found = generator(seed, purpose, step, key).random(64)
            words = np.array([(seed << 33) | (step << 2) | int(purpose), key], dtype=np.uint64)
            np.testing.assert_array_equal(found, np.random.Generator(np.random.Philox(key=words)).random(64))
            digest.update(found.tobytes())
    assert digest.hexdigest() == "8f51e2611569564bdc8840d13dfe918f852729223d00c791e39188e2ad62e757"
    assert [int(purpose) for purpose in list(Purpose)[:3]] == [1, 2, 3]


def test_streams_of_different_keys_are_different() -> None:
    numbers = (0, 1, LARGEST)
    keys = list(itertools.product(numbers, Purpose, numbers, (0, 1, 2**63 - 1)))
    first = {generator(*key).random(2).tobytes() for key in keys}
    assert len(first) == len(keys)
