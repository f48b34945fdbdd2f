"""Switches under load with commits that change every field of the Service that a switch carries."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.bench.switches import measure_load
from tests.fleet import fleet


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [pytest.param(4, marks=pytest.mark.short), 50])
def test_no_request_fails_while_traffic_and_every_field_of_the_service_move_there_and_back(
    tmp_path: Path, count: int
) -> None:
    names = ["ann", "bob", "cal", "dan"][: max(2, count // 12)]
    with get_context("spawn").Pool(1) as clients, fleet(tmp_path, names, speed=1.0) as world:
        apps = [world[name] for name in names]
        for app in apps:
            assert app.deployed("first", 120, modes="patient")["outcome"] == "deployed"
            app.quiet()
        rows = [*measure_load(apps, clients, count)]
    assert {row.name: row.ours for row in rows if row.target == 0 and row.ours} == {}
    assert sum(row.target == 0 for row in rows) == 4
