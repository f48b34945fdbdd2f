"""Rows of the table, and what is needed to fill them: times, and changes in the cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.fleet import Fleet
from tests.world import Object, eventually

RUN = "gitops-hook/run"


@dataclass(frozen=True)
class Row:
    """One line of the table; the floor is what cannot be avoided: kubectl, or the disk, alone."""

    name: str
    ours: float
    unit: str
    target: float | None = None
    baseline: float | None = None
    floor: float | None = None
    higher_is_better: bool = False


class Recorder:
    """Every change of some resources, with the time it was seen."""

    def __init__(self, world: Fleet, *resources: str) -> None:
        self._store = world.cluster.store
        self._changes = self._store.subscribe(resources)
        self.seen: list[tuple[float, str, Object]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)

    def _record(self) -> None:
        while not self._ended.is_set():
            if event := self._changes.get(0.1):
                self.seen.append((time.monotonic(), *event))

    def first(self, kind: str, check: Callable[[Object], Any], since: float = 0.0) -> float:
        """Wait for the first object of a kind, seen since a time, that passes a check; its time."""

        def found() -> float:
            mine = ((at, o) for at, _, o in list(self.seen) if at >= since and o["kind"] == kind)
            return next((at for at, thing in mine if check(thing)), 0.0)

        return float(eventually(found, 120, f"a {kind} as wanted"))

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._store.unsubscribe(self._changes)


def label(thing: Object, key: str = RUN) -> str:
    """Return a label of an object."""
    return str((thing["metadata"].get("labels") or {}).get(key, ""))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def timed(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began
