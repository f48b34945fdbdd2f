"""What a GitLab costs that cannot be reached: nothing, as the reports wait and the runs do not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from tests.bench.observing import Row
from tests.bench.switches import own_time
from tests.gitlab_server import Trouble
from tests.test_commit_statuses import Place, gitlab_place
from tests.world import Object, eventually

QUICK: dict[str, Object] = {"shop": {"bake": "2s", "environments": ["production"]}}
REFUSED = 1000  # requests that fail: more than are sent while GitLab is away


def deploy(place: Place, version: str, *, away: bool) -> float:
    """Deploy a version while GitLab answers or does not; seconds besides tests and rollout."""
    place.gitlab.troubles = [Trouble(503) for _ in range(REFUSED * away)]
    try:
        seconds = own_time(place.apps["shop"], version)
    finally:
        place.gitlab.troubles = []
    place.apps["shop"].quiet()
    return seconds


def is_shown(place: Place, version: int) -> bool:
    """Whether GitLab has got to know of as many versions that each of them is live."""
    shown = place.gitlab.shown().get("gitops-hook/production", [])
    return shown == ["success"] * version


def measure_reports(directory: Path, rounds: int) -> Iterator[Row]:
    """Deploy by turns while GitLab answers and while it does not."""
    there: list[float] = []
    away: list[float] = []
    with gitlab_place(directory, QUICK) as place:
        deploy(place, "0", away=False)
        for number in range(1, 2 * rounds, 2):
            there.append(deploy(place, str(number), away=False))
            away.append(deploy(place, str(number + 1), away=True))
        eventually(lambda: is_shown(place, 2 * rounds + 1), 120, "GitLab shows every version")
    usual = statistics.median(there)
    name = "push to live while GitLab is away, minus tests and rollout (floor: while it answers)"
    yield Row(name, statistics.median(away), "s", 1.1 * usual, None, usual)
