"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(check: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """Return the first true result of a check within a deadline; fails with the last result."""
    until = time.monotonic() + seconds
    while True:
        result = check()
        if result:
            return result
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s: {what or check} (last: {result!r})")
        time.sleep(0.02)
