"""Queues of things to look at again, now or later, each served by one thread."""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable

from tests.standin.errors import ApiError

log = logging.getLogger(__name__)

Key = tuple[str, str]
RETRY_SECONDS = 0.2


class WorkQueue:
    """Calls `handle(namespace, name)` for each key added; once, however often it was added.

    The handler returns after how many seconds it wants to see the same key again, or None. An
    ApiError (somebody else was faster) brings the key back soon.
    """

    def __init__(self, name: str, handle: Callable[[str, str], float | None]) -> None:
        self._handle = handle
        self._condition = threading.Condition()
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to handle keys."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the key in hand and end."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Handle this key after the delay, or earlier if that was asked for."""
        due = time.monotonic() + delay
        with self._condition:
            if self._due.get(key, due + 1) <= due:
                return
            self._due[key] = due
            heapq.heappush(self._heap, (due, key))
            self._condition.notify()

    def _run(self) -> None:
        while (key := self._next()) is not None:
            try:
                again = self._handle(*key)
            except ApiError as error:
                log.debug("%s/%s: %s", *key, error)
                again = RETRY_SECONDS
            except Exception:
                log.exception("controller failed at %s/%s", *key)
                again = None
            if again is not None:
                self.add(key, again)

    def _next(self) -> Key | None:
        with self._condition:
            while not self._stopping:
                while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
                    heapq.heappop(self._heap)
                if not self._heap:
                    self._condition.wait()
                    continue
                due, key = self._heap[0]
                wait = due - time.monotonic()
                if wait > 0:
                    self._condition.wait(wait)
                    continue
                heapq.heappop(self._heap)
                del self._due[key]
                return key
        return None
