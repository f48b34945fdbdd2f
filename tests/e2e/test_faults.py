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
from typing import Any

import pytest
import requests

from tests.fleet import Member, fleet, variable
from tests.world import Object, eventually

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
    "apply": Step("patch", "deployments", "{app}-{idle}"),
    "wait": Step("watch", "deployments", path="metadata.name%3D{app}-{idle}"),
    "preview": Step("patch", "services", "{app}-preview"),
    "switch": Step("patch", "services", "{app}", body="baking"),
    "verify": Step("list", "endpointslices", path="service-name%3D{app}&"),
    "conclude": Step("patch", "services", "{app}", body="draining"),
    "after": Step("list", "replicasets", path="{app}&"),
}
SENSELESS = {
    ("wait", "409"): "reading does not conflict",
    ("read", "409"): "reading does not conflict",
    ("verify", "409"): "reading does not conflict",
    ("after", "409"): "reading does not conflict",
    ("read", "hang-after"): "reading has no effect to time out after",
    ("wait", "hang-after"): "reading has no effect to time out after",
    ("verify", "hang-after"): "reading has no effect to time out after",
    ("after", "hang-after"): "reading has no effect to time out after",
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
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("action", CALLS)
def test_a_deployment_gets_over_trouble_with_the_api_in_any_step(
    api_trouble: Callable[[str, str], Observed], step: str, action: str
) -> None:
    if (step, action) in SENSELESS:
        assert STEPS[step].verb in ("get", "list", "watch")
        return
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
        **dict.fromkeys(("wait", "preview", "switch"), DEPLOYED),
        **dict.fromkeys(("verify", "bake"), BACK),
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
        **dict.fromkeys(
            ("read", "claim", "record", "apply", "wait", "preview"), ("superseded", "before")
        ),
        "switch": ("superseded", "before"),
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
    other: str = ""


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


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "step"), [(n, s) for n, row in EXPECTED.items() for s in row])
def test_whatever_happens_in_a_step_a_healthy_version_serves(
    mischief: dict[str, Any], name: str, step: str
) -> None:
    seen = mischief[name][step]
    assert isinstance(seen, Trouble), seen
    assert (seen.outcome, seen.serves, seen.claim) == (*EXPECTED[name][step], None)
    # with one replica, a pod that is taken away or dies leaves a gap that no switch can fill
    if name not in ("pod-dies", "eviction") or step not in ("verify", "bake"):
        assert not seen.failures
