"""What a failed test needs to be understood: the daemon's last words."""

from __future__ import annotations

import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.world import World

LINES = 60
# What takes minutes, because clusters, daemons and pods really run: `make cluster`. The rest is the
# quick suite: `make test`.
CLUSTER = {
    "test_commands",
    "test_controller",
    "test_deploy",
    "test_deployments",
    "test_install",
    "test_live_service",
    "test_make",
    "test_pains",
    "test_rbac",
}
STANDIN = Path(__file__).parent / "standin"


def pytest_configure() -> None:
    """Let what the tests start be interrupted, also where a script in the background runs them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what belongs to the slow suite."""
    for item in items:
        if item.path.stem in CLUSTER or item.path.is_relative_to(STANDIN):
            item.add_marker(pytest.mark.cluster)


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
