"""The fault table: the steps of a deployment across, kinds of trouble down, how each cell ends.

A cell is one deployment of a new version onto a live one, with trouble in one of its steps. Several
applications on one stand-in cluster go through the cells side by side, each its next when the last
is over. A cell finds an `old` version live, and the one `before` it standing beside it.
"""

from __future__ import annotations

import copy
import itertools
import json
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.fleet import Fleet, Member, Traffic, apply_service, fleet, is_ready, variable
from tests.services import Change
from tests.standin.faults import Fault
from tests.standin.images import not_found_text
from tests.world import eventually

RUN = "gitops-hook/run"
LANES = 8  # applications side by side
WORKING = "works"  # how the names of those begin that have a worker
WORKING_LANES = 4
# Seconds without an answer where there is only one pod, and it is lost.
GAP = 20.0

TABLE = """
            read   claim  record apply  wait   preview switch companions verify bake   confirm after
refuse      new    new    new    new    new    new     new    new        new    new    new     new
conflict    (a)    new    new    new    (a)    new     new    new        (a)    (a)    new     (a)
error       new    new    new    new    new    new     new    new        new    new    new     new
hang        new    new    new    new    new    new     new    new        new    new    new     new
hang-after  (b)    new    new    new    (b)    new     new    new        (b)    (b)    new     (b)
pod-dies    (c)    (c)    (c)    (c)    new    new     back   back       back   back   back    new
eviction    (c)    (c)    (c)    (c)    new    new     new    new        new    new    new     new
old-dies    new    new    new    new    new    new     new    new        new    new    new     new
old-sick    new    new    new    new    new    new     new    new        new    new    new     new
new-sick    (c)    (c)    (c)    (c)    (d)    smoke   back   back       back   back   (e)     (e)
slow-health (c)    (c)    (c)    (c)    (d)    smoke   back   back       back   back   (e)     (e)
smoke-fails (f)    (f)    (f)    (f)    (f)    smoke   (f)    (f)        (f)    (f)    (f)     (f)
evict-smoke (f)    (f)    (f)    (f)    (f)    new     (f)    (f)        (f)    (f)    (f)     (f)
edit        new    new    edited edited edited edited  edited left       left   left   left    kept
apply       new    new    new    new    new    new     new    new        new    new    new     new
recreate    new    new    new    new    new    new     new    new        new    new    new     new
rollback    before before before before before before  before undone     undone undone undone  later
killed      new    new    new    new    new    new     new    new        new    new    new     new
away        new    new    new    new    new    new     new    new        new    new    new     new
git-behind  new    new    new    new    new    new     new    new        new    new    new     new
pull-denied (g)    (g)    (g)    (g)    new    (g)     (g)    (g)        (g)    (g)    (g)     (g)
pull-hangs  (g)    (g)    (g)    (g)    new    (g)     (g)    (g)        (g)    (g)    (g)     (g)
quota-full  new    new    new    new    new    new     new    new        new    new    new     new
worker-dies (h)    (h)    (h)    (h)    (h)    (h)     (h)    worker     (h)    (h)    (h)     (h)
invalid     (h)    (h)    (h)    (h)    (h)    (h)     (h)    refused    (h)    (h)    (h)     (h)
"""
LEFT_OUT = {
    "(a)": "reading does not conflict",
    "(b)": "reading has no effect to time out after",
    "(c)": "the new version has no pods yet",
    "(d)": "a version that was never ready fails its rollout; it cannot turn",
    "(e)": "the bake is over: nobody watches any more, and people have `rollback`",
    "(g)": "images are pulled while the rollout is waited for",
    "(h)": "workers change after the switch, and what is refused is refused in one place",
    "(f)": "the smoke test is in the preview; elsewhere that is new-sick, or eviction",
}


class End(NamedTuple):
    """How a cell ends: the run, its outcome in the history, and who serves.

    `way` says which versions served one after the other, `beside` what stands in the other colour.
    """

    outcome: str
    reason: str
    entry: str
    way: str
    beside: str

    @property
    def serves(self) -> str:
        """The version that serves at the end."""
        return self.way.split()[-1]


ENDS = {
    "new": End("deployed", "Ok", "deployed", "old new", "old"),
    "back": End("switched-back", "UnhealthyAfterSwitch", "switched-back", "old new old", "nothing"),
    "worker": End("switched-back", "WorkerFailed", "switched-back", "old new old", "nothing"),
    "refused": End("failed", "ManifestInvalid", "none", "old", "before"),
    "smoke": End("failed", "SmokeFailed", "none", "old", "before"),
    "edited": End("failed", "SelectorChanged", "none", "old", "before"),
    "left": End("superseded", "SelectorChanged", "", "old new old", "new"),
    "kept": End("deployed", "Ok", "deployed", "old new old", "new"),
    "before": End("superseded", "ClaimLost", "none", "old before", "old"),
    "undone": End("rolled-back", "RolledBack", "rolled-back", "old new old", "new"),
    "later": End("deployed", "Ok", "rolled-back", "old new old", "new"),
}


class Cell(NamedTuple):
    """A step and the trouble in it."""

    trouble: str
    step: str
    end: str

    def __str__(self) -> str:
        return f"{self.trouble}-in-{self.step}"

    @property
    def has_worker(self) -> bool:
        """Whether the application has a worker, which most have not."""
        return self.step == "companions"


def cells() -> Iterator[Cell]:
    """Yield all cells of the table, those that are left out too."""
    head, *rows = (line.split() for line in TABLE.strip().splitlines())
    for trouble, *ends in rows:
        yield from (Cell(trouble, *both) for both in zip(head, ends, strict=True))


# Steps.


@dataclass(frozen=True)
class Step:
    """A step, by a call to the API that is its own once a line was logged."""

    verb: str
    resource: str
    name: str | None = None
    body: str | None = None
    path: str | None = None
    since: str = ""

    def call(self, app: Member, idle: str) -> dict[str, Any]:
        """Return the fields of a fault that meets this call of an application."""
        texts = {"name": self.name, "body_contains": self.body, "path_contains": self.path}
        filled = {k: v.format(app=app.name, idle=idle) for k, v in texts.items() if v is not None}
        return {"verb": self.verb, "resource": self.resource, "namespace": app.namespace, **filled}


STEPS = {
    # the pods of the live version, once its Service was read: Events read Deployments at any time
    "read": Step("list", "pods", path="app%3D{app}%2Cgitops-hook%2Frun%3D{app}-"),
    "claim": Step("patch", "services", "{app}", body="preparing"),
    "record": Step("create", "configmaps", body="{app}-release-"),
    "apply": Step("update", "deployments", "{app}-{idle}"),
    "wait": Step("watch", "deployments", path="metadata.name%3D{app}-{idle}"),
    "preview": Step("patch", "services", "{app}-preview"),
    "switch": Step("patch", "services", "{app}", body="baking"),
    "companions": Step("update", "deployments", "{app}-worker", since="claimed"),
    "verify": Step("list", "endpointslices", path="service-name%3D{app}&"),
    "bake": Step("get", "services", "{app}-preview", since="switched"),
    "confirm": Step("patch", "services", "{app}", body="draining"),
    "after": Step("list", "replicasets", path="{app}&", since="run ended"),
}

# Trouble.


@dataclass(frozen=True)
class Trouble:
    """Trouble: what the API does with the step's call, and what else happens meanwhile.

    `one` happens to one application, `everyone` to all at once: every such call of the daemon is
    held meanwhile, but not that of a person.
    """

    what: str
    call: str = "hang"
    times: int = 0  # calls that meet it; 0: as many as come until what happens has happened
    one: Callable[[Member, Versions], object] | None = None
    everyone: Callable[[Fleet, Sequence[Attempt]], None] | None = None
    later: Callable[[Attempt], object] | None = None  # what happens once the call goes on
    modes: str = ""
    worker: str = ""  # the modes of the new version's worker; "refused": a companion is invalid
    registry: str = ""  # what it does at first with the image of the new version
    hits: str = ""  # the version whose only pod is lost
    flickers: bool = False  # for a moment there is no Service, or one that reaches all versions


class Versions(NamedTuple):
    """The versions of a cell."""

    before: str
    old: str
    new: str

    def word(self, version: str) -> str:
        """Return which of them a version is, or itself."""
        return dict(zip(self, self._fields, strict=True)).get(version, version)


def kill_pods(app: Member, version: str) -> None:
    """Kill the containers of a version, and see them not ready."""
    for pod in app.pods(version):
        app.fleet.cluster.kill_container(app.namespace, pod["metadata"]["name"], "web")
    eventually(lambda: not any(is_ready(p) for p in app.pods(version)), 5, "no pod is ready")


def tell(app: Member, version: str, path: str) -> None:
    """Send a request to the pods of a version, which may only now become ready."""
    eventually(lambda: app.tell(version, path), 40, f"a ready pod of {version} hears of {path}")


def evict_pods(app: Member, version: str) -> None:
    """Take the pods of a version away, as a node that is drained does."""
    for pod in app.pods(version):
        app.fleet.cluster.evict(app.namespace, pod["metadata"]["name"])


def evict_in_smoke_test(app: Member, versions: Versions) -> None:
    """Evict the new pods once they were asked, and let those that replace them be healthy."""

    def asked() -> bool:
        return any(answer["refused"] for answer in app.tell(versions.new))

    eventually(asked, 60, "the new pods are asked for their health")
    gone = {pod["metadata"]["name"] for pod in app.pods(versions.new)}
    evict_pods(app, versions.new)

    def replaced() -> bool:
        ready = {p["metadata"]["name"] for p in app.pods(versions.new) if is_ready(p)}
        return bool(ready - gone)

    eventually(replaced, 30, "other pods are ready in their place")
    app.tell(versions.new, "/turn-well")


def edit_service(app: Member, versions: Versions) -> None:
    """Let a person point the live Service at all pods of the old version's colour."""
    colour = next(c for c in ("blue", "green") if asked_for(app, c) == versions.old)
    selector = {"gitops-hook/app": app.name, "version": colour, RUN: None}
    patch = json.dumps({"spec": {"selector": selector}})
    where = ("service", app.name, "-n", app.namespace, "--type=merge")
    done = app.fleet.kubectl("patch", *where, "-p", patch, "--field-manager=kubectl-edit")
    assert done.code == 0, done
    eventually(lambda: app.answer()["version"] == versions.old, 10, "the old version serves")


def recreate_service(app: Member) -> None:
    """Let a person delete the Service and apply it again, and see it name a run again."""
    apply_service(app, anew=True)
    eventually(lambda: RUN in app.selector, 20, "the selector is put back")


def asked_for(app: Member, colour: str) -> str:
    """Return the version that a colour's Deployment asks for, or nothing."""
    found = app.objects("deployments").get(f"{app.name}-{colour}")
    return variable(found["spec"]["template"], "VERSION") if found else ""


def roll_back(app: Member, _: Versions) -> None:
    """Call `rollback`, as a person does whose patience is over, and who has an account."""
    done = app.fleet.command("rollback", app.name, administrator=True)
    assert done.returncode == 0, done


HANG = 75.0  # seconds in which a registry says nothing
FULL = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}}


def show_old_head(app: Member, versions: Versions) -> None:
    """Let the git server show the commit before the push again, as one of several that lags."""
    git = app.repository.git
    before = git("rev-parse", "HEAD~1")
    git("update-ref", "refs/heads/main", before, where=app.repository.bare)


def show_head_again(attempt: Attempt) -> None:
    """Let the git server show the push again, once its absence was met or did not matter."""
    app = attempt.app

    def met() -> bool:
        lines = [line for line in app.fleet.logged() if line.get("run") == attempt.run]
        behind = "does not show the push yet"
        past = {"switched", "run ended"} & {line["msg"] for line in lines}
        return bool(past) or any(behind in str(line.get("detail")) for line in lines)

    eventually(met, 60, "the daemon meets the old head, or has switched")
    head = app.repository.git("rev-parse", "HEAD")
    app.repository.git("update-ref", "refs/heads/main", head, where=app.repository.bare)


def waiting_reasons(app: Member, version: str) -> set[str]:
    """Return for what the containers of a version wait."""
    statuses = (c for p in app.pods(version) for c in p["status"].get("containerStatuses") or [])
    return {(c["state"].get("waiting") or {}).get("reason", "") for c in statuses}


def refuse_pull_once(app: Member, versions: Versions) -> None:
    """Let the registry have the image only after it has refused it once."""
    image = own_image(app, versions.new)
    eventually(
        lambda: waiting_reasons(app, versions.new) & {"ErrImagePull", "ImagePullBackOff"},
        30, "the pull is refused",
    )  # fmt: skip
    app.fleet.cluster.images.break_pull(image, None)


def hang_pull(app: Member, versions: Versions) -> None:
    """Let the registry not answer for as long as it takes to lose patience."""
    image = own_image(app, versions.new)
    eventually(lambda: waiting_reasons(app, versions.new), 30, "the image is pulled")
    time.sleep(HANG)
    app.fleet.cluster.images.hold_pull(image, held=False)


def own_image(app: Member, version: str) -> str:
    """Return an image of a version alone, so that it is pulled anew."""
    digest = app.fleet.image.partition("@")[2]
    return f"registry.example.com/demo/{version}@{digest}"


def fill_quota(apps: Fleet, attempts: Sequence[Attempt]) -> None:
    """Let no pod be created in production until those who would are refused."""
    # less than is used, yet enough for the one that is requested: waiting is not pointless
    text = json.dumps({**FULL, "spec": {"hard": {"pods": "1"}}})
    assert apps.kubectl("apply", "-n", "production", "-f", "-", stdin=text).code == 0
    try:
        for attempt in attempts:
            attempt.lift()
        places = [*STEPS]
        for attempt in attempts:
            if places.index(attempt.step_name) <= places.index("apply"):
                eventually(partial(is_refused, attempt), 30, "its pods are refused")
    finally:
        assert apps.kubectl("delete", "resourcequota", "full", "-n", "production").code == 0


def is_refused(attempt: Attempt) -> bool:
    """Whether the cluster refuses to create the pods of an attempt's new version."""
    deployments = attempt.app.objects("deployments").values()
    conditions = [c for d in deployments for c in (d.get("status") or {}).get("conditions") or []]
    return any((c["type"], c["status"]) == ("ReplicaFailure", "True") for c in conditions)


def kill_daemon(apps: Fleet, attempts: Sequence[Attempt]) -> None:
    """Kill the daemon, and start it again once nothing of it is left."""
    apps.kill()
    for attempt in attempts:
        attempt.lift()
    apps.start()


def take_api_away(apps: Fleet, attempts: Sequence[Attempt]) -> None:
    """Let the API server be gone until the daemon has noticed, and a while longer."""
    lost = len(apps.said("watch lost"))
    apps.cluster.down()
    try:
        for attempt in attempts:
            attempt.lift()
        eventually(lambda: len(apps.said("watch lost")) > lost, 30, "the daemon notices")
        time.sleep(2)
    finally:
        apps.cluster.up()


TROUBLES = {
    "refuse": Trouble("the connection is closed without an answer", "refuse", 2),
    "conflict": Trouble("the API server says Conflict", "409", 2),
    "error": Trouble("the API server says InternalError", "500", 2),
    "hang": Trouble("the call is never answered", "hang", 1),
    "hang-after": Trouble("the call is done, but never answered", "hang-after", 1),
    "pod-dies": Trouble("the new pods die", one=lambda app, v: kill_pods(app, v.new), hits="new"),
    "eviction": Trouble(
        "the new pods are evicted", one=lambda app, v: evict_pods(app, v.new), hits="new"
    ),
    "old-dies": Trouble("the old pods die", one=lambda app, v: kill_pods(app, v.old), hits="old"),
    "old-sick": Trouble(
        "the old version's health path fails",
        one=lambda app, v: tell(app, v.old, "/turn-sick"),
        hits="old",  # it is not ready then, and the new version not yet there
    ),
    "new-sick": Trouble(
        "the new version's health path fails", one=lambda app, v: tell(app, v.new, "/turn-sick")
    ),
    "slow-health": Trouble(
        "the new version's health path sends a byte every 0.7 s",
        one=lambda app, v: tell(app, v.new, "/turn-slow"),
    ),
    "smoke-fails": Trouble("the smoke test fails", call="", modes="smoke-fails"),
    "evict-smoke": Trouble(
        "the new pods are evicted during the smoke test",
        call="",
        one=evict_in_smoke_test,
        modes="smoke-waits",
    ),
    "edit": Trouble("someone edits the live Service", one=edit_service),
    "apply": Trouble(
        "someone applies the Service of the repository", one=lambda app, _: apply_service(app)
    ),
    "recreate": Trouble(
        "someone deletes the Service and applies it again",
        one=lambda app, _: recreate_service(app),
        flickers=True,
    ),
    "rollback": Trouble("`rollback` is called", one=roll_back),
    "killed": Trouble("the daemon is killed and started again", everyone=kill_daemon),
    "away": Trouble("the API server is away for a while", everyone=take_api_away),
    "git-behind": Trouble(
        "the git server shows the commit before again for a while",
        one=show_old_head,
        later=show_head_again,
    ),
    "pull-denied": Trouble(
        "the registry refuses the image once", "", one=refuse_pull_once, registry="refuses"
    ),
    "pull-hangs": Trouble(
        f"the registry says nothing for {HANG:.0f} s", "", one=hang_pull, registry="hangs"
    ),
    "quota-full": Trouble("the quota is full for a while", everyone=fill_quota),
    "worker-dies": Trouble("the new worker crashes", "", worker="crash-at-start"),
    "invalid": Trouble("what stands beside the app is invalid", "", worker="refused"),
}

# What comes of a cell.


@dataclass
class Seen:
    """What came out of a cell, in the words of the table."""

    outcome: str = ""
    reason: str = ""
    serves: str = ""
    beside: str = ""
    way: str = ""
    gap: float = 0.0
    failures: list[str] = field(default_factory=list)
    claim: Any = None
    tested: int = 0
    entry: str = "none"
    working: str = ""  # the version of the worker, where there is one
    log: list[str] = field(default_factory=list)

    def differences(self, cell: Cell) -> list[str]:
        """Return what is not as the table has it, a line each."""
        end = ENDS[cell.end]
        names = ("outcome", "reason", "serves", "beside")
        pairs = {name: (getattr(end, name), getattr(self, name)) for name in names}
        pairs["claim"] = (None, self.claim)
        pairs["version of the worker"] = (end.serves * cell.has_worker, self.working)
        pairs["test Jobs made"] = (1, self.tested)
        pairs["outcome in the history"] = (end.entry, self.entry)
        told = [f"{k}: expected {e}, seen {s}" for k, (e, s) in pairs.items() if e != s]
        return [*told, *self.traffic_differences(cell, end.way.split())]

    def traffic_differences(self, cell: Cell, way: list[str]) -> list[str]:
        """Return what clients saw that they should not have."""
        rest, seen, told = iter(way), self.way.split(), []
        ends_right = seen[:1] == way[:1] and seen[-1:] == way[-1:]
        loose = TROUBLES[cell.trouble].flickers
        if not (ends_right and (loose or all(version in rest for version in seen))):
            told.append(f"versions that served: expected {' '.join(way)}, seen {self.way}")
        place, switch = [*STEPS].index(cell.step), [*STEPS].index("switch")
        serving = {"old": place <= switch, "new": place >= switch, "": False}
        allowed = GAP if loose or serving[TROUBLES[cell.trouble].hits] else 0.0
        if self.failures and self.gap > allowed:
            many = f"{len(self.failures)} requests in {self.gap:.1f} s"
            told.append(f"failed requests: expected {allowed:.0f} s at most, seen {many}:")
            told += [f"    {line}" for line in sorted({*self.failures})[:5]]
        return told


def report(cell: Cell, seen: Seen) -> str:
    """Return what is wrong with a cell, or nothing."""
    if not (told := seen.differences(cell)):
        return ""
    lines = [f"step {cell.step}, trouble: {TROUBLES[cell.trouble].what}", *told]
    return "\n".join([*lines, "what the daemon said of it:", *seen.log])


# Going through a cell.


class Attempt:
    """One cell that an application goes through: begin, then what happens, then the end."""

    def __init__(self, cell: Cell, app: Member) -> None:
        self.cell, self.app = cell, app
        self.step_name = cell.step
        self.step, self.trouble = STEPS[cell.step], TROUBLES[cell.trouble]
        self.fault: Fault | None = None
        self.open = ExitStack()
        self.run, self.versions = "", Versions("", "", "")
        self.traffic: Traffic

    def begin(self) -> None:
        """Push a new version and wait until it is in the step and meets its trouble."""
        app, fresh = self.app, len(self.app.fleet.said("run ended"))
        before, old = prepared(app)
        self.versions = Versions(before, old, f"{self.cell}-{fresh}")
        self.traffic = self.open.enter_context(app.traffic(0.2))
        call = self.step.call(app, app.idle())
        if not self.step.since:
            self.arm(call)
        image = self.image() if self.trouble.registry else ""
        change = with_worker(app, self.versions.new, self.trouble.worker)
        more = {"modes": self.trouble.modes, "image": image, "change": change}
        commit = app.release(self.versions.new, **more)
        before = app.repository.git("rev-parse", f"{commit}~1")
        self.run = app.push(commit, before=before)
        if self.step.since and self.trouble.call:
            said = app.fleet.said
            eventually(lambda: said(self.step.since, run=self.run), 60, f"{self.step.since!r}")
            self.arm(call)
        if fault := self.fault:
            faults = app.fleet.cluster.faults
            reached = faults.met if self.trouble.times else faults.holds
            eventually(lambda: reached(fault), 60, f"the daemon makes this call: {call}")

    def image(self) -> str:
        """Return an image of the new version alone, and let its registry misbehave."""
        images = self.app.fleet.cluster.images
        source, start = self.app.fleet.directory / "image", ["python", "server.py"]
        name = own_image(self.app, self.versions.new).partition("@")[0]
        images.add(f"{name}:1", source, cmd=start, workdir="/app")
        image = own_image(self.app, self.versions.new)
        if self.trouble.registry == "hangs":
            images.hold_pull(image, held=True)
        else:
            images.break_pull(image, not_found_text(image))
        return image

    def arm(self, call: dict[str, Any]) -> None:
        """Let the trouble with the step's call begin."""
        if self.trouble.call:
            # as a rule each call: one that is repeated without an answer must not slip through
            times = self.trouble.times or None
            fault = self.app.fleet.fault(self.trouble.call, times=times, **call)
            self.fault = fault
            self.open.callback(self.app.fleet.cluster.faults.lift, fault)

    def lift(self) -> None:
        """Let the calls go on that were held."""
        if self.fault and not self.trouble.times:
            self.app.fleet.cluster.faults.lift(self.fault)

    def end(self) -> Seen:
        """Wait until nothing is left to do; return what came out."""
        app, seen = self.app, Seen()
        ended = app.fleet.ended(self.run, 120)
        seen.outcome, seen.reason = ended["outcome"], ended["reason"]
        app.quiet(60)
        word, count = self.versions.word, len(self.traffic.seen)
        eventually(lambda: len(self.traffic.seen) > count, 15, "clients get answers")
        with suppress(AssertionError):  # the proxies hear of the last change of endpoints later
            serves = ENDS[self.cell.end].serves
            eventually(lambda: word(self.traffic.versions[-1]) == serves, 15)
        self.open.close()
        wanted = ENDS[self.cell.end].beside
        with suppress(AssertionError):
            eventually(lambda: word(beside(app)) == wanted, 60)
        seen.beside, seen.serves = word(beside(app)), word(self.traffic.versions[-1])
        if self.cell.has_worker:
            with suppress(AssertionError):
                eventually(lambda: word(working(app)) == ENDS[self.cell.end].serves, 60)
            seen.working = word(working(app))
        seen.way = " ".join(word(version) for version in self.traffic.versions)
        seen.failures, seen.claim = self.traffic.failures, app.note("deploying")
        times = [at for at, _ in self.traffic.seen]
        seen.gap = max((b - a for a, b in itertools.pairwise(times)), default=0.0)
        seen.tested = app.fleet.created(f"test-{self.run}")
        mine = [e["outcome"] for e in app.note("history") if e["run"] == self.run]
        seen.entry = ", ".join(mine) if mine else "none"
        seen.log = [json.dumps(e) for e in app.fleet.logged() if e.get("run") == self.run][-30:]
        return seen


def prepared(app: Member) -> tuple[str, str]:
    """See to it that a version is live and an earlier one is a rollback target; return (it, live).

    What the cell before left is used if it is good for that; else versions are deployed.
    """
    app.quiet(60)
    if app.service():
        app.tell("", "/turn-well")
    for _ in range(3):
        with suppress(AssertionError):
            if len(proven(app)) == 2:
                eventually(lambda: all(map(app.standing, proven(app))), 20)
                live, idle = (app.standing(colour) for colour in proven(app))
                return idle, live
        version = f"fresh-{len(app.fleet.said('run ended'))}"
        ended = app.deployed(version, 120, change=with_worker(app, version))
        assert ended["outcome"] == "deployed", ended
        app.quiet(60)
    raise AssertionError(f"{app.name}: two versions do not stand; history: {app.note('history')}")


def with_worker(app: Member, version: str, modes: str = "") -> Change | None:
    """Return what gives a version a worker, where its application has one."""
    if not app.name.startswith(WORKING):
        return None

    def change(objects: dict[str, Any]) -> None:
        worker = copy.deepcopy(objects["Deployment"])
        worker["metadata"]["name"] = f"{app.name}-worker"
        labels = {"app": f"{app.name}-worker"}
        worker["spec"]["selector"] = {"matchLabels": labels}
        template = worker["spec"]["template"]
        template["metadata"]["labels"] = labels
        template["spec"]["terminationGracePeriodSeconds"] = 1
        (container,) = template["spec"]["containers"]
        container["env"] = [
            {"name": "VERSION", "value": version},
            {"name": "MODES", "value": modes.replace("refused", "")},
        ]
        objects["worker"] = worker
        if modes == "refused":
            one = {"name": "night", "image": app.fleet.image}
            pod = {"restartPolicy": "Never", "containers": [one]}
            job = {"spec": {"template": {"spec": pod}}}
            objects["night"] = {
                "apiVersion": "batch/v1",
                "kind": "CronJob",
                "metadata": {"name": f"{app.name}-night"},
                "spec": {"schedule": "nonsense", "jobTemplate": job},
            }

    return change


def working(app: Member) -> str:
    """Return the versions of a worker's ready pods."""
    pods = app.fleet.cluster.store.list("pods", app.namespace)
    own = [p for p in pods if p["metadata"]["labels"].get("app") == f"{app.name}-worker"]
    stays = [p for p in own if "deletionTimestamp" not in p["metadata"] and is_ready(p)]
    return " ".join(sorted({variable(p, "VERSION") for p in stays}))


def proven(app: Member) -> list[str]:
    """Return the live colour and, if `rollback` would go there by one patch, the other one."""
    found = app.objects("deployments")
    good = [e for e in app.note("history") or [] if e["outcome"] == "deployed"][:2]
    there = [found.get(f"{app.name}-{entry['colour']}") or {} for entry in good]
    runs = [(one.get("metadata") or {}).get("labels", {}).get(RUN) for one in there]
    live = bool(good) and good[0]["selector"] == app.selector
    stands = runs == [e["run"] for e in good]
    return [e["colour"] for e in good] if live and stands else []


def beside(app: Member) -> str:
    """Return the version that stands in the colour that is not live, or what is there instead."""
    name = f"{app.name}-{app.idle()}"
    found = app.objects("deployments").get(name)
    if not found or not found["spec"]["replicas"]:
        return "nothing"
    mine = [p for p in app.pods() if p["metadata"]["labels"]["version"] == app.idle()]
    states = [json.dumps(pod.get("status", {}).get("containerStatuses")) for pod in mine]
    return app.standing(app.idle()) or f"not ready: {found.get('status')} {' '.join(states)}"


def go_through(cell: Cell, app: Member) -> Seen | str:
    """Go through a cell that concerns one application only."""
    attempt = Attempt(cell, app)
    with attempt.open:
        try:
            attempt.begin()
            if attempt.trouble.one:
                attempt.trouble.one(app, attempt.versions)
            attempt.lift()
            if attempt.trouble.later:
                attempt.trouble.later(attempt)
            return attempt.end()
        except Exception:  # noqa: BLE001 - whatever it is, it is what came of the cell
            return failed(attempt)


def failed(attempt: Attempt) -> str:
    """Return why a cell could not be gone through."""
    lines = [e for e in attempt.app.fleet.logged() if e.get("run") == attempt.run]
    told = [traceback.format_exc(limit=-3), *(json.dumps(line) for line in lines[-30:])]
    return "\n".join([f"step {attempt.cell.step}, trouble: {attempt.trouble.what}", *told])


def go_together(group: Sequence[Cell], apps: Sequence[Member], pool: ThreadPoolExecutor) -> Results:
    """Go through cells in which one thing happens to all at once."""
    attempts = [Attempt(cell, app) for cell, app in zip(group, apps, strict=False)]
    results: Results = {}

    def each(work: Callable[[Attempt], Any]) -> None:
        def one(attempt: Attempt) -> Any:
            try:
                return work(attempt)
            except Exception:  # noqa: BLE001 - whatever it is, it is what came of the cell
                attempt.open.close()
                return failed(attempt)

        going = [a for a in attempts if not isinstance(results.get(a.cell), str)]
        found = pool.map(one, going)
        results.update({a.cell: came for a, came in zip(going, found, strict=True)})

    each(Attempt.begin)
    happens = attempts[0].trouble.everyone
    assert happens
    happens(apps[0].fleet, attempts)
    each(Attempt.end)
    return results


Results = dict[Cell, Any]


def go_through_all(directory: Path, wanted: Sequence[Cell]) -> Results:
    """Go through cells, as many at once as there are applications; return what came of each."""
    lanes = min(LANES, -(-len(wanted) // 3))
    patient = {"bake": "3s", "rollout_timeout": "120s"}
    names = {f"lane-{n}x": patient for n in range(lanes)}
    names |= {f"{WORKING}-{n}x": patient for n in range(WORKING_LANES)}
    limits = {"max_running": 2 * len(names), "kubectl": 40}
    with (
        fleet(directory, names, limits=limits) as made,
        ThreadPoolExecutor(len(names)) as pool,
    ):
        results: Results = {}
        for has_worker in (True, False):
            apps = [a for a in made.apps.values() if a.name.startswith(WORKING) == has_worker]
            own = [cell for cell in wanted if cell.has_worker == has_worker]
            results |= go_through_in(apps, own, pool)
    return results


def go_through_in(
    apps: Sequence[Member], wanted: Sequence[Cell], pool: ThreadPoolExecutor
) -> Results:
    """Go through cells in some applications."""
    results: Results = {}
    for trouble in (name for name, each in TROUBLES.items() if each.everyone):
        row = [cell for cell in wanted if cell.trouble == trouble]
        for start in range(0, len(row), len(apps)):
            results |= go_together(row[start : start + len(apps)], apps, pool)
    free: queue.SimpleQueue[Member] = queue.SimpleQueue()
    for app in apps:
        free.put(app)

    def next_one(cell: Cell) -> Seen | str:
        app = free.get()
        try:
            return go_through(cell, app)
        finally:
            free.put(app)

    rest = [cell for cell in wanted if cell not in results]
    rest.sort(key=lambda cell: not cell.trouble.startswith("hang"))  # what waits longest first
    return results | dict(zip(rest, pool.map(next_one, rest), strict=True))
