"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# Tests name the seconds that a quiet machine would need at the very most. Others share theirs.
BUSY = 3.0


def eventually(check: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """Return the first true result of a check within a deadline; fails with the last result.

    The deadline is three times as long as is said: machines may be busy.
    """
    until = time.monotonic() + BUSY * seconds
    while True:
        result = check()
        if result:
            return result
        if time.monotonic() > until:
            raise AssertionError(
                f"not within {BUSY * seconds:.0f} s: {what or check} (last: {result!r})"
            )
        time.sleep(0.02)
