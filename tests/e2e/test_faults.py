"""Every step of a deployment with every kind of trouble: where it ends, and who served meanwhile.

A table: the steps of a deployment down, trouble across. Each cell is one deployment of a version
onto a live one, with the trouble in that step; what must come out is stated for each cell. Cells
that make no sense are listed with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fleet import Fleet, Gate, Member, fleet, variable
from tests.world import Object, eventually, world

CALLS = ("refuse", "409", "500", "hang", "hang-after")
RUN = "gitops-hook/run"


@dataclass(frozen=True)
class Step:
    """A step of a deployment, by the call to the API that is its own."""

    verb: str
    resource: str
    name: str | None = None
    body: str | None = None
    path: str | None = None

    def matching(self, app: Member, idle: str) -> dict[str, Any]:
        """Return the fields of a fault that meets this call of an application."""
        names = {"app": app.name, "idle": idle}
        texts = {"name": self.name, "body_contains": self.body, "path_contains": self.path}
        filled = {k: v.format(**names) for k, v in texts.items() if v is not None}
        return {"verb": self.verb, "resource": self.resource, "namespace": app.namespace, **filled}


STEPS = {
    "read": Step("get", "deployments", "{app}-blue"),
    "claim": Step("patch", "services", "{app}", body="preparing"),
    "record": Step("create", "configmaps", body="{app}-release-"),
    "apply": Step("update", "deployments", "{app}-{idle}"),
    "wait": Step("watch", "deployments", path="metadata.name%3D{app}-{idle}"),
    "preview": Step("patch", "services", "{app}-preview"),
    "switch": Step("patch", "services", "{app}", body="baking"),
    "verify": Step("list", "endpointslices", path="service-name%3D{app}&"),
    "conclude": Step("patch", "services", "{app}", body="draining"),
    "after": Step("list", "replicasets", path="{app}&"),
}
READING = [name for name, step in STEPS.items() if step.verb in ("get", "list", "watch")]
SENSELESS = {
    **{(step, "409"): "reading does not conflict" for step in READING},
    **{(step, "hang-after"): "reading has no effect to time out after" for step in READING},
}


@dataclass
class Observed:
    """What came out of one cell."""

    trouble: str = ""
    outcome: str = ""
    reason: str = ""
    live: str = ""
    idle: str = ""
    tests: int = 0
    switches: list[str] = field(default_factory=list)
    claim: Any = None
    history: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def look(self, app: Member, run: str) -> None:
        """Look at what is there when all is quiet."""
        lines = app.fleet.said("run ended", run=run)
        self.outcome, self.reason = lines[-1]["outcome"], lines[-1]["reason"]
        self.live, self.claim = str(app.answer()["version"]), app.note("deploying")
        self.idle = app.standing(app.idle())
        self.history = [str(e.get("outcome", "")) for e in app.note("history")]
        self.tests = app.fleet.created(f"test-{run}")


def settled(app: Member, run: str, old: str, seconds: float = 150.0) -> None:
    """Wait until a run has ended, nothing is claimed, and the colour beside it stands."""
    app.fleet.ended(run, seconds)
    app.quiet(seconds)
    eventually(lambda: app.standing(app.idle()) == old, 40, f"{app.name}: {old} stands beside")


# Trouble with the API: whatever it is, the deployment succeeds once it is over.


@pytest.fixture(scope="module")
def api_trouble(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Observed]:
    """Return a look-up of what came out of a cell; a row of the table is run at first need."""
    rows: dict[str, dict[str, Observed]] = {}

    def cell(step: str, action: str) -> Observed:
        if action not in rows:
            wanted = [s for s in STEPS if (s, action) not in SENSELESS]
            directory = tmp_path_factory.mktemp(f"api-{action}")
            names = {f"{s}-x": {"bake": "1s"} for s in wanted}
            limits = {"max_running": 8, "kubectl": 32}
            with fleet(directory, names, limits=limits) as apps, ThreadPoolExecutor(16) as pool:
                found = pool.map(lambda s: api_cell(apps[f"{s}-x"], STEPS[s], action), wanted)
                rows[action] = dict(zip(wanted, found, strict=True))
        return rows[action][step]

    return cell


def api_cell(app: Member, step: Step, action: str) -> Observed:
    """Deploy two versions, then a third with trouble in one call."""
    seen = Observed()
    try:
        for version in ("v1", "v2"):
            assert app.deployed(version, 90)["outcome"] == "deployed"
            app.quiet()
        times = 2 if action in ("refuse", "409", "500") else 1
        app.stands("blue", "v1")
        fault = app.fleet.fault(action, **step.matching(app, "blue"), times=times)
        with app.traffic(0.2) as traffic:
            run = app.go("v3")
            settled(app, run, "v2")
        assert app.fleet.cluster.faults.met(fault), f"no call met {fault}"
        app.fleet.cluster.faults.lift(fault)
        seen.failures, seen.switches = traffic.failures, traffic.versions
        seen.look(app, run)
    except AssertionError as wrong:
        seen.trouble = str(wrong)
    return seen


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("action", "step"), [(a, s) for a in CALLS for s in STEPS if (s, a) not in SENSELESS]
)
def test_a_deployment_gets_over_trouble_with_the_api_in_any_step(
    api_trouble: Callable[[str, str], Observed], action: str, step: str
) -> None:
    seen = api_trouble(step, action)
    assert not seen.trouble
    assert (seen.outcome, seen.live, seen.idle, seen.claim) == ("deployed", "v3", "v2", None)
    assert (seen.failures, seen.switches, seen.tests) == ([], ["v2", "v3"], 1)
    assert seen.history == ["deployed", "deployed", "deployed"]


# Trouble with pods, people and the daemon itself: each step is held while it happens.


def kill_new(app: Member, old: str, new: str) -> None:
    """Kill the containers of the new version."""
    for pod in app.pods(new):
        app.fleet.cluster.kill_container(app.namespace, pod["metadata"]["name"], "web")


def evict_new(app: Member, old: str, new: str) -> None:
    """Take the pods of the new version away, as a node that is drained does."""
    for pod in app.pods(new):
        app.fleet.cluster.evict(app.namespace, pod["metadata"]["name"])


def sicken_old(app: Member, old: str, new: str) -> None:
    """Let the health path of the old version fail."""
    app.tell(old, "/turn-sick")


def sicken_new(app: Member, old: str, new: str) -> None:
    """Let the health path of the new version fail."""
    app.tell(new, "/turn-sick")


def edit_service(app: Member, old: str, new: str) -> None:
    """Let a person point the live Service at all pods of the old version's colour."""
    deployments = app.objects("deployments")
    colour = next(c for c in ("blue", "green") if version_in(deployments, app, c) == old)
    selector = {"gitops-hook/app": app.name, "version": colour, RUN: None}
    patch = json.dumps({"spec": {"selector": selector}})
    where = ("service", app.name, "-n", app.namespace, "--type=merge")
    done = app.fleet.kubectl("patch", *where, "-p", patch, "--field-manager=kubectl-edit")
    assert done.code == 0, done


def version_in(deployments: dict[str, Object], app: Member, colour: str) -> str:
    """Return the version that a colour's Deployment asks for."""
    found = deployments.get(f"{app.name}-{colour}")
    return variable(found["spec"]["template"], "VERSION") if found else ""


def roll_back(app: Member, old: str, new: str) -> None:
    """Call `rollback`, as a person does whose patience is over."""
    done = app.fleet.command("rollback", app.name)
    assert done.returncode == 0, done


Mischief = Callable[[Member, str, str], None]
MISCHIEF: dict[str, Mischief] = {
    "pod-dies": kill_new,
    "eviction": evict_new,
    "old-sick": sicken_old,
    "new-sick": sicken_new,
    "edit": edit_service,
    "rollback": roll_back,
}
HELD = ("read", "claim", "record", "apply", "wait", "preview", "switch", "verify", "bake")
DEPLOYED, BACK = ("deployed", "new"), ("switched-back", "old")
# What comes out: the outcome, and which version serves: the new, the old, or the one before that.
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "pod-dies": {
        **dict.fromkeys(("wait", "preview"), DEPLOYED),
        **dict.fromkeys(("switch", "verify", "bake"), BACK),
    },
    "eviction": dict.fromkeys(("wait", "preview", "switch", "verify", "bake"), DEPLOYED),
    "old-sick": dict.fromkeys(HELD, DEPLOYED),
    "new-sick": {"preview": ("failed", "old"), **dict.fromkeys(("switch", "verify", "bake"), BACK)},
    "edit": {
        **dict.fromkeys(("read", "claim"), DEPLOYED),
        **dict.fromkeys(("record", "apply", "wait", "preview", "switch"), ("failed", "old")),
        **dict.fromkeys(("verify", "bake"), ("superseded", "old")),
    },
    "rollback": {
        **dict.fromkeys(HELD[:7], ("superseded", "before")),
        **dict.fromkeys(("verify", "bake"), ("rolled-back", "old")),
    },
}


@dataclass
class Trouble:
    """What came out of a cell with a version, and which ones it could have been."""

    outcome: str
    reason: str
    serves: str
    failures: list[str]
    claim: Any = None


@pytest.fixture(scope="module")
def mischief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Run all columns at once, each a chain of deployments of one application."""
    names: dict[str, Object] = {name: {"bake": "3s"} for name in MISCHIEF}
    directory = tmp_path_factory.mktemp("mischief")
    limits = {"max_running": 8, "kubectl": 32}
    with fleet(directory, names, limits=limits) as apps, ThreadPoolExecutor(len(names)) as pool:
        columns = {name: pool.submit(column, apps[name], name) for name in names}
        yield {name: each.result() for name, each in columns.items()}


def column(app: Member, name: str) -> dict[str, Trouble | str]:
    """Return what came out of every cell of a column; a text where a cell could not be run."""
    found: dict[str, Trouble | str] = {}
    for step in EXPECTED[name]:
        try:
            found[step] = trouble_cell(app, MISCHIEF[name], step)
        except (AssertionError, KeyError, requests.RequestException) as wrong:
            found[step] = str(wrong)
    return found


def trouble_cell(app: Member, mischief: Mischief, step: str) -> Trouble:
    """Bring two fresh versions up, then a third with mischief in one step."""
    versions = [f"{step}-{n}" for n in (1, 2, 3)]
    before, old, new = versions
    for version in (before, old):
        ended = app.deployed(version, 90)
        assert ended["outcome"] == "deployed", ended
        app.quiet()
    app.stands(app.idle(), before, 30)
    idle = app.idle()
    with app.traffic(0.1) as traffic:
        if step == "bake":
            run = app.go(new)
            app.switched(run)
            mischief(app, old, new)
        else:
            run = app.go(new)
            with app.fleet.held(**STEPS[step].matching(app, idle)):
                mischief(app, old, new)
        ended = app.fleet.ended(run, 120)
        app.quiet()
    serves = {new: "new", old: "old", before: "before"}[str(app.answer()["version"])]
    return Trouble(
        ended["outcome"], ended["reason"], serves, traffic.failures, app.note("deploying")
    )


NO_PODS = "the new version has no pods yet"
LEFT_OUT = {
    **{(name, s): NO_PODS for name in ("pod-dies", "eviction", "new-sick") for s in HELD[:4]},
    (
        "new-sick",
        "wait",
    ): "a version that was never well is a rollout that fails, not one that turns",
}


def test_every_cell_is_in_the_table_or_left_out_for_a_reason() -> None:
    cells = {(name, step) for name in MISCHIEF for step in HELD}
    stated = {(name, step) for name, row in EXPECTED.items() for step in row}
    assert stated | LEFT_OUT.keys() == cells
    assert not stated & LEFT_OUT.keys()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "step"), [(n, s) for n, row in EXPECTED.items() for s in row])
def test_whatever_happens_in_a_step_a_healthy_version_serves(
    mischief: dict[str, Any], name: str, step: str
) -> None:
    seen = mischief[name][step]
    assert isinstance(seen, Trouble), seen
    assert (seen.outcome, seen.serves, seen.claim) == (*EXPECTED[name][step], None)
    # with one replica, a pod that dies or is taken away leaves a gap until the next one is ready
    if name not in ("pod-dies", "eviction") or step not in ("switch", "verify", "bake"):
        assert not seen.failures


# The daemon killed in each step: after its restart, the end state of an undisturbed run.


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


@pytest.mark.parametrize("step", STEPS)
def test_a_daemon_killed_in_a_step_ends_the_run_as_if_undisturbed(killed: Fleet, step: str) -> None:
    shop, old = killed["shop"], killed["shop"].answer()["version"]
    idle = shop.idle()
    shop.stands(idle, version_in(shop.objects("deployments"), shop, idle), 30)
    with shop.traffic(0.1) as traffic:
        run = shop.go(f"kill-{step}")
        with killed.held(**STEPS[step].matching(shop, idle)):
            killed.kill()
        killed.start()
        assert killed.ended(run)["outcome"] == "deployed"
        shop.quiet()
        shop.stands(shop.idle(), str(old), 30)
    assert (traffic.failures, traffic.versions) == ([], [old, f"kill-{step}"])
    assert killed.created(f"test-{run}") == 1
    assert [e["run"] for e in shop.note("history")].count(run) == 1


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
        # the ledger is written before anything else that tells how the run ended
        with killed.held("patch", "configmaps", name="gitops-hook-shop"):
            killed.kill()
        killed.start()
        ended = killed.ended(run)
        shop.quiet()
    assert (ended["outcome"], ended["reason"]) == ("switched-back", "SickAfterSwitch")
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


# The API server away for a while.


@pytest.mark.parametrize("step", ["wait", "preview", "bake"])
def test_an_api_server_that_is_away_for_a_while_delays_a_deployment(
    killed: Fleet, step: str
) -> None:
    shop, old = killed["shop"], killed["shop"].answer()["version"]
    shop.quiet()
    with shop.traffic(0.1) as traffic:
        run = shop.go(f"away-{step}")
        if step == "bake":
            shop.switched(run)
            killed.cluster.down()
        else:
            with killed.held(**STEPS[step].matching(shop, shop.idle())):
                killed.cluster.down()
        try:
            lost = len(killed.said("watch lost"))
            eventually(lambda: len(killed.said("watch lost")) > lost, 30, "the daemon notices")
        finally:
            killed.cluster.up()
        assert killed.ended(run, 120)["outcome"] == "deployed"
        shop.quiet()
    assert (traffic.failures, traffic.versions) == ([], [old, f"away-{step}"])
