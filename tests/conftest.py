"""What a failed test needs to be understood: the daemon's last words."""

from __future__ import annotations

import random
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.world import World

LINES = 60
# What takes minutes, because clusters, daemons and pods really run: `make cluster`. The rest is the
# quick suite, `make test`, but for the tests that are marked `cluster` one by one.
CLUSTER = {
    "test_apart",
    "test_bake",
    "test_clone",
    "test_colours",
    "test_companions",
    "test_commands",
    "test_commit_statuses",
    "test_controller",
    "test_deploy",
    "test_deployments",
    "test_events",
    "test_health_of_apps",
    "test_install",
    "test_live_service",
    "test_main",
    "test_make",
    "test_pains",
    "test_tries",
    "test_rbac",
    "test_refusals",
    "test_reports_of_tests",
    "test_services",
    "test_switched_service",
    "test_ways_to_end",
    "test_workers",
}
STANDIN = Path(__file__).parent / "standin"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run choose another order of the tests, and repeat it."""
    parser.addoption("--random-order-seed", type=int, help="the number that decides the order")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say how this order can be had again."""
    seed = config.getoption("random_order_seed")
    return None if seed is None else f"random order: --random-order-seed {seed}"


def pytest_configure() -> None:
    """Let what the tests start be interrupted, also where a script in the background runs them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what belongs to the slow suite; shuffle the files, and the tests in each of them."""
    for item in items:
        if item.path.stem in CLUSTER or item.path.is_relative_to(STANDIN):
            item.add_marker(pytest.mark.cluster)
    seed = config.getoption("random_order_seed")
    if seed is not None:
        draw = random.Random(seed)
        place = {path: draw.random() for path in sorted({item.path for item in items})}
        items.sort(key=lambda item: (place[item.path], draw.random()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of the log of every world that a failed test worked with."""
    report = yield
    if report.failed:
        known = {id(w): w for w in getattr(item, "funcargs", {}).values() if isinstance(w, World)}
        for world in (w for w in known.values() if w.log.exists()):
            last = world.log.read_text(errors="replace").splitlines()[-LINES:]
            report.sections.append(("the daemon's log", "\n".join(last)))
    return report
