"""Within a run garbage is collected when the run says so, and afterwards as before."""

from __future__ import annotations

import gc
import weakref

from bitdance_scale.train.run import _collected_between_steps


class Node:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_when_asked():
    assert gc.isenabled()
    with _collected_between_steps():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        lost = weakref.ref(Node())
        # Far more objects than those after which Python would collect.
        kept = [[number] for number in range(100_000)]
        assert lost() is not None and kept
        gc.collect()
        assert lost() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0
