"""Time in the stand-in: durations of the API may pass faster than on a wall clock."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Clock:
    """`speed` divides what objects ask for (back-offs, grace periods, probe periods, deadlines);
    `tick` is the delay of the cluster's own work and is not divided."""

    speed: float = 1.0
    tick: float = 0.05

    def real(self, seconds: float) -> float:
        """How long a duration of the API's lasts here."""
        return seconds / self.speed


def parse_time(text: str) -> float:
    """Seconds since the epoch of a time in the API's form."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
