"""Wrong images, rollbacks, deployments, and switches under load."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from typing import Any

import gitops_hook as hook
from tests import services
from tests.bench.clients import Visit, visit
from tests.bench.observing import RUN, Recorder, Row, label, timed
from tests.fleet import MISSING_IMAGE, STAGE, Member, is_ready
from tests.services import NARROW, WIDE, Change, with_service
from tests.starting import argv_of, finding
from tests.world import Object, eventually

# What clients on kept connections lose on a busy machine, because the application ends at once when
# it is told to, is not the switch's doing.
PATIENT = "patient"


def deploy(app: Member, version: str, **release: Any) -> Object:
    """Deploy a version; the log line of the end, with what happened when."""
    commit = app.release(version, modes=PATIENT, **release)
    began = time.monotonic()
    run = app.push(commit)
    return {**app.fleet.ended(run, 120), "began": began}


def together(work: Callable[[Member], Any], apps: Sequence[Member]) -> list[Any]:
    """Do something for every app at the same time; what came of it."""
    with ThreadPoolExecutor(len(apps)) as pool:
        return [*pool.map(work, apps)]


def complete(job: Object) -> bool:
    """Whether a Job has succeeded."""
    conditions = job.get("status", {}).get("conditions") or []
    return any(c["type"] == "Complete" for c in conditions)


def rolled_out(deployment: Object) -> bool:
    """Whether a Deployment stands as wanted."""
    status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
    current = status.get("observedGeneration") == deployment["metadata"]["generation"]
    keys = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
    counts = {status.get(key) for key in keys}
    return current and counts == {wanted}


def own_time(app: Member, version: str) -> float:
    """Deploy a version; the seconds to its switch that were neither tests nor rollout."""
    with Recorder(app.fleet, "jobs", "deployments", "services") as recorder:
        ended = deploy(app, version)
        assert ended["outcome"] == "deployed", ended
        run, began = ended["run"], ended["began"]

        def at(kind: str, check: Callable[[Object], Any]) -> float:
            return recorder.first(kind, lambda thing: label(thing) == run and check(thing))

        released = at("Job", lambda job: not job["spec"].get("suspend"))
        tested = at("Job", complete)
        applied, stood = at("Deployment", bool), at("Deployment", rolled_out)
        mine = {"app": app.name, "run": run}
        switched = recorder.first("Service", lambda s: selects(s, **mine))
    return (released - began) + (applied - tested) + (switched - stood)


def selects(service: Object, app: str, run: str) -> bool:
    """Whether this is the live Service of an app, and a run is live."""
    return service["metadata"]["name"] == app and service["spec"]["selector"].get(RUN) == run


def ready_in(endpoints: Object) -> set[str]:
    """Return the pods that are ready endpoints in an EndpointSlice."""
    entries = endpoints.get("endpoints") or []
    return {e["targetRef"]["name"] for e in entries if e["conditions"].get("ready")}


def moved(recorder: Recorder, service: str, pods: set[str], since: float) -> float:
    """Wait until the endpoints of a Service are some of these pods only; when that was."""
    key = "kubernetes.io/service-name"

    def check(slices: Object) -> bool:
        ready = ready_in(slices)
        return label(slices, key) == service and bool(ready) and ready <= pods

    return recorder.first("EndpointSlice", check, since)


def names_of(pods: Sequence[Object]) -> set[str]:
    """Return the names of objects."""
    return {pod["metadata"]["name"] for pod in pods}


def roll_back(app: Member, target: str) -> tuple[float, float]:
    """Roll back to a version; seconds from the command, and from the patch, to the endpoints."""
    pods = app.pods(target)
    run, names = label(pods[0]), names_of(pods)
    with Recorder(app.fleet, "services", "endpointslices") as recorder:
        began = time.monotonic()
        done = app.fleet.command("rollback", app.name)
        assert done.returncode == 0, done
        patched = recorder.first("Service", lambda s: selects(s, app.name, run), began)
        there = moved(recorder, app.name, names, patched)
    return there - began, there - patched


def patch_alone(app: Member) -> float:
    """Switch a Service of nobody between the colours with kubectl; seconds to the endpoints."""
    selector = {"gitops-hook/app": app.name, "version": "blue"}
    ports = [{"port": 80, "targetPort": 8080}]
    service: Object = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "floor"}}
    service["spec"] = {"selector": selector, "ports": ports}
    here, pods, times = ("-n", app.namespace), app.pods(), []
    with Recorder(app.fleet, "endpointslices") as recorder:
        app.fleet.kubectl("create", *here, "-f", "-", stdin=json.dumps(service))
        for colour in ("blue", "green", "blue", "green"):
            began = time.monotonic()
            change = json.dumps({"spec": {"selector": {"version": colour}}})
            app.fleet.kubectl("patch", *here, "service", "floor", "-p", change)
            mine = names_of([pod for pod in pods if label(pod, "version") == colour])
            times.append(moved(recorder, "floor", mine, began if times else 0.0) - began)
        app.fleet.kubectl("delete", *here, "service", "floor")
    return statistics.median(times[1:])


def measure_deployments(apps: Sequence[Member]) -> Iterator[Row]:
    """A wrong image, a rollback, and what a deployment takes besides tests and rollout."""
    for version in ("1", "2"):
        ends = together(lambda app, v=version: deploy(app, v), apps)
        assert {end["outcome"] for end in ends} == {"deployed"}, ends
    together(lambda app: app.quiet(), apps)
    red = []
    for app in apps:
        end = deploy(app, "bad", image=MISSING_IMAGE)
        assert end["reason"] == "ImageNotFound", end
        red.append(time.monotonic() - end["began"])
    yield Row("wrong image: push to red with the reason", statistics.median(red), "s", 20.0)
    together(lambda app: app.quiet(), apps)
    argv = argv_of("--help")
    environ = {**os.environ, **finding()}
    python = statistics.median(
        timed(lambda: subprocess.run(argv, env=environ, check=True, capture_output=True))
        for _ in apps
    )
    floor = patch_alone(apps[0])
    for app in apps:
        eventually(lambda app=app: app.standing(app.idle()) == "1", 60, "version 1 stands")
    backs = [roll_back(app, "1") for app in apps]
    total, patch = (statistics.median(times) for times in zip(*backs, strict=True))
    yield Row("rollback: command to endpoints moved, all of it", total, "s", None, None, floor)
    yield Row("rollback: … without Python's start", total - python, "s", 0.5, None, floor)
    yield Row("rollback: patch seen to endpoints moved", patch, "s")
    together(lambda app: app.quiet(), apps)
    spent = statistics.median(own_time(app, "3") for app in apps)
    get = ("get", "service", apps[0].name, "-n", apps[0].namespace)
    calls = timed(lambda: [apps[0].fleet.kubectl(*get) for _ in range(10)])
    name = "push to live, minus tests, rollout and bake (floor: 10 kubectl calls)"
    yield Row(name, spent, "s", 2.5, None, calls)


def take_a_node_port(objects: dict[str, Object]) -> None:
    """Let a version want what is refused."""
    (web,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    web["ports"][0]["hostPort"] = 8080


def fetch(app: Member, commit: str) -> None:
    """Fetch the manifests of a commit, and nothing else."""
    git = hook.Git(app.fleet.secrets / hook.GIT_CREDENTIALS)
    with git.manifests(str(app.repository.bare), commit, "deploy"):
        pass


def measure_refusals(app: Member) -> Iterator[Row]:
    """Push what is refused to an app whose tests take very long."""
    red = []
    for number in range(5):
        end = deploy(app, f"refused-{number}", change=take_a_node_port)
        red.append(time.monotonic() - end["began"])
        assert (end["reason"], end["stage"]) == ("ManifestRefused", "staging"), end
    floor = statistics.median(timed(lambda: fetch(app, end["commit"])) for _ in range(5))
    name = "refused manifest: push to red while the tests run (floor: git alone)"
    yield Row(name, statistics.median(red), "s", 5.0, None, floor)


# Switches under load.


def switch(app: Member, version: str, sick: str, **release: Any) -> float:
    """Deploy a version, which stays or is told to be sick; seconds to switched back, or 0."""
    commit, back = app.release(version, modes=PATIENT, **release), 0.0
    run = app.push(commit)
    app.switched(run, 120)
    if sick:
        began, before = time.monotonic(), app.selector
        app.tell(version, sick)
        eventually(lambda: app.selector != before, 60, f"{run} is switched back")
        back = time.monotonic() - began
    outcome = app.fleet.ended(run, 120)["outcome"]
    assert outcome == ("switched-back" if sick else "deployed"), (run, outcome)
    return back


def settled(app: Member) -> bool:
    """Whether no pod of an app comes or goes."""
    pods = app.objects("pods").values()
    deployments = app.objects("deployments").values()
    # a worker's pods do not carry the label of the app
    own = [one for one in deployments if STAGE not in one["metadata"]["labels"]]
    wanted = sum(one["spec"]["replicas"] for one in own)
    return len(pods) == wanted == sum(is_ready(pod) for pod in pods)


@contextmanager
def visited(apps: Sequence[Member], clients: Pool) -> Iterator[list[Visit]]:
    """Have apps visited while the block runs; afterwards the list says what the visitors saw."""
    world, seen = apps[0].fleet, list[Visit]()
    stop = world.directory / f"stop-{time.monotonic_ns()}"
    hosts = {app.name: app.service()["spec"]["clusterIP"] for app in apps}
    visits = clients.apply_async(visit, (hosts, stop))
    try:
        yield seen
        together(lambda app: app.quiet(), apps)
        eventually(lambda: all(settled(app) for app in apps), 60, "the old pods are gone")
        time.sleep(1.0)  # in which every visitor has asked again
    finally:
        stop.touch()
    seen += visits.get(30)


def failed_requests(name: str, seen: Sequence[Visit], target: float | None = None) -> Iterator[Row]:
    """How many requests failed, on kept connections and on new ones; how, on stderr."""
    for keep, which in ((True, "kept-alive"), (False, "new")):
        failures = [reason for visit in seen if visit.keep is keep for reason in visit.failures]
        for reason in sorted({*failures})[:10]:
            print(f"failed: {failures.count(reason)} times {reason}, {which}", file=sys.stderr)
        yield Row(f"{name}: failed requests of {which} connections", len(failures), "", target)


@dataclass(frozen=True)
class Turn:
    """A switch of which every field of the Service has moved: how long it took to go back, if so.

    Wrong: what the Service was not like in the end.
    """

    back: float
    wrong: bool


# What gives a version of an app something beside it.
Beside = Callable[[Member, str], Change]


def both(one: Change, other: Change | None) -> Change:
    """Return a change that makes both, if there is another."""

    def change(objects: dict[str, Object]) -> None:
        one(objects)
        if other:
            other(objects)

    return change


def take_turns(app: Member, ways: Sequence[str], beside: Beside | None) -> list[Turn]:
    """Switch to version after version, each with the other Service; the sick ones go back."""
    turns = []
    live, other = WIDE, NARROW
    for number, sick in enumerate(ways):
        before = services.seen(app)
        version = f"load-{number}"
        change = both(with_service(other), beside(app, version) if beside else None)
        back = switch(app, version, sick, change=change)
        restored = services.seen(app) == before
        turns.append(Turn(back, wrong=not (restored if sick else services.holds(app, other))))
        if not sick:
            live, other = other, live
        app.quiet()
    return turns


def measure_load(
    apps: Sequence[Member], clients: Pool, count: int, beside: Beside | None = None
) -> Iterator[Row]:
    """Switch under load, every second time with a version that turns sick."""
    each = -(-count // len(apps))
    ways = ("", "/turn-sick")

    def go(app: Member) -> list[Turn]:
        turns = [ways[(n + apps.index(app)) % 2] for n in range(each)]
        return take_turns(app, turns, beside)

    with visited(apps, clients) as seen:
        turns = [turn for some in together(go, apps) for turn in some]
    backs = [turn.back for turn in turns if turn.back]
    live = {app.name: app.answer()["version"] for app in apps}
    wrong = sum(live[visit.app] != visit.version for visit in seen)
    name, asked = f"{each * len(apps)} switches", sum(visit.answered for visit in seen)
    name = f"{name} under load, {len(backs)} of them back"
    yield from failed_requests(name, seen, 0)
    yield Row(f"{name}: requests answered", asked, "", higher_is_better=True)
    yield Row(f"{name}: clients on the wrong version at the end", wrong, "", 0)
    yield Row(f"{name}: Services not as they were to be", sum(t.wrong for t in turns), "", 0)
    yield Row("sick to switched back", statistics.median(backs), "s")


def measure_switches(apps: Sequence[Member], clients: Pool, count: int) -> Iterator[Row]:
    """Switch under load, and then to versions that are bad in other ways."""
    yield from measure_load(apps, clients, count)
    yield from measure_bad(apps, clients, "whose pages also fail", "/turn-bad")
    yield from measure_bad(apps, clients, "that crash", "/exit")


def measure_bad(apps: Sequence[Member], clients: Pool, what: str, path: str) -> Iterator[Row]:
    """Switch under load to versions that cannot answer any more after the switch."""
    with visited(apps, clients) as seen:
        backs = together(lambda app: switch(app, path[1:], path), apps)
    live = {app.name: app.answer()["version"] for app in apps}
    wrong = sum(live[visit.app] != visit.version for visit in seen)
    name = f"{len(apps)} versions {what} under load after the switch"
    yield from failed_requests(name, seen)
    yield Row(f"{name}: clients on the wrong version at the end", wrong, "", 0)
    yield Row(f"{name}: told to be so to switched back", statistics.median(backs), "s")
