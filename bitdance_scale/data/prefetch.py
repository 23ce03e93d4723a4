"""Work done ahead of its use, in one thread."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Makes items number `first`, `first + 1`, .. in a thread of its own, a bounded number of them ahead.

    Args:
        make: makes the item of a number; called in the thread.
        first: number of the first item.
        num_ahead: the most items made and not yet taken; at least 1.
    """

    def __init__(self, make: Callable[[int], Item], first: int, num_ahead: int) -> None:
        self._make = make
        self._first = first
        self._slots = threading.Semaphore(num_ahead)
        self._items: queue.SimpleQueue[Item | BaseException] = queue.SimpleQueue()
        self._is_closed = threading.Event()
        self._failure: BaseException | None = None
        # A daemon, so that a program that ends without closing the loader is not held up by it.
        self._thread = threading.Thread(target=self._run, name="data-planner", daemon=True)
        self._thread.start()

    def take(self) -> Item:
        """The next item, when it is made; raises what `make` raised, again at every later call."""
        if self._is_closed.is_set():
            raise ValueError("the loader is closed")
        if self._failure is None:
            item = self._items.get()
            if not isinstance(item, BaseException):
                self._slots.release()
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """Stops the thread and waits for it; an item being made is finished first."""
        self._is_closed.set()
        self._slots.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            for number in itertools.count(self._first):
                self._slots.acquire()
                if self._is_closed.is_set():
                    return
                self._items.put(self._make(number))
        except BaseException as error:  # noqa: BLE001  # The consumer raises it; the thread must not end silently.
            self._items.put(error)
