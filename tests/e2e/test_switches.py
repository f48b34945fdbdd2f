"""Switches under load with commits that change every field of the Service that a switch carries."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.bench.switches import Beside, measure_load
from tests.fleet import fleet
from tests.test_companions import stands_whole, with_worker


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [pytest.param(4, marks=pytest.mark.short), 50])
def test_no_request_fails_while_traffic_and_every_field_of_the_service_move_there_and_back(
    tmp_path: Path, count: int
) -> None:
    switch_under_load(tmp_path, count)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [pytest.param(4, marks=pytest.mark.short), 50])
def test_no_request_fails_while_all_that_stands_beside_an_app_follows(
    tmp_path: Path, count: int
) -> None:
    switch_under_load(tmp_path, count, with_worker)


def switch_under_load(directory: Path, count: int, beside: Beside | None = None) -> None:
    """Switch so many times under load; fail for each request that failed."""
    names = ["ann", "bob", "cal", "dan"][: max(2, count // 12)]
    with get_context("spawn").Pool(1) as clients, fleet(directory, names, speed=1.0) as world:
        apps = [world[name] for name in names]
        for app in apps:
            change = beside(app, "first") if beside else None
            first = app.deployed("first", 120, modes="patient", change=change)
            assert first["outcome"] == "deployed"
            app.quiet()
        rows = [*measure_load(apps, clients, count, beside)]
        for app in apps if beside else ():
            stands_whole(app, app.answer()["version"])
    assert {row.name: row.ours for row in rows if row.target == 0 and row.ours} == {}
    assert sum(row.target == 0 for row in rows) == 4
