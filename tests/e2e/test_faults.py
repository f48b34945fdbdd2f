"""Every step of a deployment with every kind of trouble: where it ends, and who served meanwhile.

The table is in tests/e2e/table.py. `-m short` takes one cell of each kind of trouble.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.table import ENDS, LEFT_OUT, STEPS, TROUBLES, Cell, cells, go_through_all, report
from tests.fleet import Fleet, Gate, fleet
from tests.world import Object, eventually, world

ALL = [*cells()]
SHORT = {
    "refuse": "claim",
    "conflict": "switch",
    "error": "apply",
    "hang": "verify",
    "hang-after": "switch",
    "pod-dies": "bake",
    "eviction": "verify",
    "old-dies": "confirm",
    "old-sick": "switch",
    "new-sick": "bake",
    "slow-health": "bake",
    "smoke-fails": "preview",
    "evict-smoke": "preview",
    "edit": "switch",
    "apply": "bake",
    "recreate": "bake",
    "rollback": "wait",
    "killed": "apply",
    "away": "preview",
    "git-behind": "claim",
    "pull-denied": "wait",
    "pull-hangs": "wait",
    "quota-full": "apply",
    "worker-dies": "companions",
    "invalid": "companions",
}
MARKED = [
    pytest.param(c, id=str(c), marks=[pytest.mark.short] if SHORT[c.trouble] == c.step else [])
    for c in ALL
    if c.end in ENDS
]


def test_every_step_meets_every_trouble_or_is_left_out_for_a_reason() -> None:
    assert {(c.trouble, c.step) for c in ALL} == {(t, s) for t in TROUBLES for s in STEPS}
    assert {c.end for c in ALL} == ENDS.keys() | LEFT_OUT.keys()
    assert {(c.trouble, c.step) for c in ALL if c.end in ENDS} >= SHORT.items()


@pytest.fixture(scope="module")
def table(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Cell, str]:
    """Return what is wrong with each cell that is asked for; all are gone through at once."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    asked = [item.callspec.params for item in items if hasattr(item, "callspec")]
    wanted = [params["cell"] for params in asked if "cell" in params]
    results = go_through_all(tmp_path_factory.mktemp("table"), wanted)
    return {c: r if isinstance(r, str) else report(c, r) for c, r in results.items()}


@pytest.mark.timeout(3600)  # of the first, for all of them are gone through at once
@pytest.mark.parametrize("cell", MARKED)
def test_a_deployment_ends_as_stated_and_a_healthy_version_serves(
    table: dict[Cell, str], cell: Cell
) -> None:
    if wrong := table[cell]:
        pytest.fail(wrong, pytrace=False)


# The daemon killed elsewhere than in a step of a deployment.


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One application whose tests can be held, and which has versions to go back to."""
    directory = tmp_path_factory.mktemp("killed")
    gate = Gate(directory / "gate")
    names: dict[str, Object] = {
        "shop": {"bake": "2s"},
        "gated": {"bake": "1s", "test": gate.command},
    }
    with fleet(directory, names) as apps:
        for version in ("v1", "v2"):
            assert apps["shop"].deployed(version)["outcome"] == "deployed"
        apps["shop"].quiet()
        yield apps


def test_a_daemon_killed_while_tests_run_ends_the_run_as_if_undisturbed(killed: Fleet) -> None:
    gated = killed["gated"]
    run = gated.go("v1")
    found = eventually(lambda: killed.jobs().get(f"test-{run}"), what="the Job is there")
    eventually(
        lambda: not killed.jobs()[f"test-{run}"]["spec"].get("suspend"), what="its tests run"
    )
    killed.kill()
    (killed.directory / "gate" / "pass").mkdir()
    killed.start()
    assert killed.ended(run)["outcome"] == "deployed"
    assert killed.created(found["metadata"]["name"]) == 1


def test_a_daemon_killed_after_switching_back_still_writes_why_and_rejects(killed: Fleet) -> None:
    shop, old = killed["shop"], killed["shop"].answer()["version"]
    shop.quiet()
    with shop.traffic(0.1) as traffic:
        run = shop.go("sick")
        shop.switched(run)
        shop.tell("sick", "/turn-sick")
        # how it ended is recorded before anything else that tells how the run ended
        with killed.held("patch", "configmaps", name="gitops-hook-shop"):
            killed.kill()
        killed.start()
        ended = killed.ended(run)
        shop.quiet()
    assert (ended["outcome"], ended["reason"]) == ("switched-back", "UnhealthyAfterSwitch")
    assert (traffic.failures, traffic.versions) == ([], [old, "sick", old])
    eventually(lambda: not shop.pods("sick"), 20, "the sick pods are gone")
    found = killed.cluster.store.get("configmaps", "orchestration", "gitops-hook-shop")["data"]
    assert f"rejected-{shop.repository.git('rev-parse', 'HEAD')}" in found


def test_a_daemon_killed_while_the_image_is_built_builds_it_once(tmp_path: Path) -> None:
    with world(tmp_path) as one:
        one.start()
        run = one.push(one.repository.release("v1"))
        built = eventually(lambda: one.cluster.store.find("jobs", "build", f"build-{run}"), 30)
        one.kill()
        one.start()
        assert one.ended(run)["outcome"] == "deployed"
        assert one.answer()["version"] == "v1"
        again = one.cluster.store.get("jobs", "build", f"build-{run}")
        assert again["metadata"]["uid"] == built["metadata"]["uid"]
