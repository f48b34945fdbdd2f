"""Measuring which lines of the program the tests run (`make coverage`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from coverage import Coverage

# What a process must know to be measured with the tests that start it; empty unless this run is
# measured. Environments that tests put together themselves include it.
MEASURING = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}


@contextmanager
def at_full_speed() -> Iterator[None]:
    """Measure nothing while the block runs, because a limit of processor time is tested there."""
    measured = Coverage.current() if MEASURING else None
    if measured:
        measured.stop()
    try:
        yield
    finally:
        if measured:
            measured.start()
