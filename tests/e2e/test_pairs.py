"""An unhealthy version in its bake, together with other trouble: traffic goes back in each pair.

The pairs are in tests/e2e/pairs.py. `-m short` takes some of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.pairs import (
    ALREADY,
    LIMIT,
    OUTAGE,
    PAIRS,
    SICKNESSES,
    SLACK,
    TROUBLES,
    Pair,
    Results,
    go_through_all,
)
from tests.fleet import fleet
from tests.world import eventually

STOPS = 2.0  # seconds after the switch, when the API server stops; the test holds at any other, too

SHORT = {
    Pair("daemon-stopped", "ready-fails"),
    Pair("pod-missing", "ready-fails"),
    Pair("kubectl-never-ends", "exits"),
    Pair("daemon-killed", "endpoints-gone"),
}
MARKED = [
    pytest.param(p, id=str(p), marks=[pytest.mark.short] if p in SHORT else []) for p in PAIRS
]


def test_every_trouble_meets_every_way_to_turn_unhealthy() -> None:
    assert {*PAIRS} == {Pair(t, s) for t in TROUBLES for s in SICKNESSES}
    assert len(PAIRS) == 21
    assert set(PAIRS) > SHORT


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return what came of each pair that is asked for; those of a trouble are side by side."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    asked = [item.callspec.params for item in items if hasattr(item, "callspec")]
    wanted = [params["pair"] for params in asked if "pair" in params]
    return go_through_all(tmp_path_factory.mktemp("pairs"), wanted)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("pair", MARKED)
def test_traffic_is_back_soon_after_it_can_be_and_the_unhealthy_version_never_confirmed(
    pairs: Results, pair: Pair, record_property: Callable[[str, object], None]
) -> None:
    record_property("seconds", pairs[pair].seconds)
    if wrong := pairs[pair].wrong:
        pytest.fail(wrong, pytrace=False)


@pytest.mark.short
@pytest.mark.timeout(300)
def test_a_bake_that_would_have_been_over_while_the_api_server_was_stopped_is_not(
    tmp_path: Path,
) -> None:
    with fleet(tmp_path, {"shop": {"bake": "8s"}}) as apps:
        shop = apps["shop"]
        assert shop.deployed("healthy")["outcome"] == "deployed"
        shop.quiet()
        run = shop.go("sick")
        shop.switched(run)
        time.sleep(STOPS)
        apps.cluster.freeze()
        time.sleep(ALREADY)
        shop.tell("sick", "/turn-sick")
        time.sleep(OUTAGE - ALREADY)
        apps.cluster.thaw()
        old = shop.note("history")[1]["selector"]
        eventually(lambda: shop.selector == old, LIMIT * SLACK, "traffic is back")
        ended = apps.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("switched-back", "UnhealthyAfterSwitch")
