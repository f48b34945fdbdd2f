"""The pairs: trouble with kubectl, the API server, pods or the daemon, while a version turns bad.

A pair is one deployment of a new version, of two pods, onto a live one. In its bake the trouble
begins, then the version turns unhealthy, then the trouble is over, if it is of a kind that ends.
What was live before must have the traffic back soon after the moment when a patch became possible,
and at no time may the history say that the unhealthy version was confirmed.
"""

from __future__ import annotations

import json
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.fleet import Fleet, Member, fleet, is_ready
from tests.world import BIN, Object, eventually

RUN = "gitops-hook/run"
OUTAGE = 35.0  # seconds, of an API server or of a daemon
STUCK = 12.0  # ... in which every new kubectl never ends
ALREADY = 3.0  # ... until whoever waits for the API server does so; then the version turns
LIMIT = 3.0  # seconds from the moment when a patch became possible until traffic is back
# The cells measure wall time, on machines that may be shared with much else.
SLACK = 4.0


class Pair(NamedTuple):
    """A trouble and how the version turns unhealthy in it."""

    trouble: str
    sickness: str

    def __str__(self) -> str:
        return f"{self.trouble}-{self.sickness}"


# How a version turns unhealthy: what its pods are told, and when the cluster shows it.


def touchy(objects: dict[str, Object]) -> None:
    """Ask for two pods, whose readiness falls at the second failed probe."""
    spec = objects["Deployment"]["spec"]
    spec["replicas"] = 2
    spec["template"]["spec"]["containers"][0]["readinessProbe"]["failureThreshold"] = 2


def two_pods(objects: dict[str, Object]) -> None:
    """Ask for two pods, whose readiness does not fall in the time of a test."""
    touchy(objects)
    probe = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]
    probe["failureThreshold"] = 1000


def exited(app: Member, version: str) -> bool:
    """Whether the status of a pod of a version says that its container has ended."""
    statuses = [s for p in app.pods(version) for s in p["status"].get("containerStatuses") or []]
    states = [state for s in statuses for state in (s.get("state"), s.get("lastState"))]
    return any("terminated" in (state or {}) for state in states)


@dataclass(frozen=True)
class Sickness:
    """How a version turns unhealthy."""

    path: str
    shows: Callable[[Member, str], bool]
    change: Callable[[dict[str, Object]], None] = two_pods


SICKNESSES = {
    "ready-fails": Sickness("/turn-sick", lambda app, version: True),
    "exits": Sickness("/exit", exited),
    "endpoints-gone": Sickness(
        "/turn-unready", lambda app, version: not any(map(is_ready, app.pods(version))), touchy
    ),
}

# The troubles, each from its beginning to its end; in between the versions turn unhealthy.


@contextmanager
def api_hangs(apps: Fleet, _: Sequence[Attempt]) -> Iterator[None]:
    """Stop the API server."""
    began = time.monotonic()
    apps.cluster.freeze()
    try:
        time.sleep(ALREADY)
        yield
        time.sleep(max(0.0, began + OUTAGE - time.monotonic()))
    finally:
        apps.cluster.thaw()


@contextmanager
def api_refuses(apps: Fleet, _: Sequence[Attempt]) -> Iterator[None]:
    """Let the API server be gone."""
    began = time.monotonic()
    apps.cluster.down()
    try:
        time.sleep(ALREADY)
        yield
        time.sleep(max(0.0, began + OUTAGE - time.monotonic()))
    finally:
        apps.cluster.up()


@contextmanager
def kubectl_never_ends(apps: Fleet, _: Sequence[Attempt]) -> Iterator[None]:
    """Let every kubectl that is started meanwhile never end, not afterwards either."""
    stuck = apps.directory / "stuck"
    stuck.touch()
    try:
        time.sleep(ALREADY)
        yield
        time.sleep(STUCK)
    finally:
        stuck.unlink()


@contextmanager
def pod_missing(apps: Fleet, attempts: Sequence[Attempt]) -> Iterator[None]:
    """Evict a pod of each version, while a quota refuses another in its place."""
    meta = {"name": "full", "namespace": "production"}
    apps.cluster.store.create("resourcequotas", {"metadata": meta, "spec": {"hard": {"pods": "0"}}})
    try:
        for attempt in attempts:
            app, version = attempt.app, attempt.version
            evicted = app.pods(version)[0]["metadata"]["name"]
            apps.cluster.evict("production", evicted)
        for attempt in attempts:
            eventually(lambda a=attempt: len(a.app.pods(a.version)) == 1, 10, "one pod is left")
        yield
        for attempt in attempts:
            attempt.back.wait(60)
    finally:
        apps.cluster.store.delete("resourcequotas", "production", "full")


@contextmanager
def informer_lost(apps: Fleet, attempts: Sequence[Attempt]) -> Iterator[None]:
    """Let no watch of pods tell anything; it was armed before the version was pushed."""
    yield
    for attempt in attempts:
        attempt.back.wait(60)


@contextmanager
def daemon_killed(apps: Fleet, _: Sequence[Attempt]) -> Iterator[None]:
    """Kill the daemon, and start it again."""
    apps.kill()
    yield
    apps.start()


@contextmanager
def daemon_stopped(apps: Fleet, _: Sequence[Attempt]) -> Iterator[None]:
    """Stop the daemon and its kubectl processes, as a container that is paused."""
    began = time.monotonic()
    apps.signal(signal.SIGSTOP)
    try:
        time.sleep(ALREADY)
        yield
        time.sleep(max(0.0, began + OUTAGE - time.monotonic()))
    finally:
        apps.signal(signal.SIGCONT)


TROUBLES = {
    "api-hangs": api_hangs,
    "api-refuses": api_refuses,
    "kubectl-never-ends": kubectl_never_ends,
    "pod-missing": pod_missing,
    "informer-lost": informer_lost,
    "daemon-killed": daemon_killed,
    "daemon-stopped": daemon_stopped,
}
AT_ONCE = ("pod-missing", "informer-lost")  # a patch is possible all the time
PAIRS = [Pair(trouble, sickness) for trouble in TROUBLES for sickness in SICKNESSES]

# Going through them.


@dataclass
class Attempt:
    """One pair that an application goes through."""

    pair: Pair
    app: Member
    old: str = ""
    run: str = ""
    possible: float = 0.0
    seconds: float = -1.0  # from then until the traffic was back
    back: threading.Event = field(default_factory=threading.Event)
    outcomes: set[str] = field(default_factory=set)
    ended: Object = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The version that turns unhealthy."""
        return str(self.pair)

    @property
    def sickness(self) -> Sickness:
        """How it does."""
        return SICKNESSES[self.pair.sickness]

    def begin(self) -> None:
        """Bring the version into its bake."""
        self.app.quiet(60)
        if self.app.answer()["version"] != "healthy":  # after a pair that did not end as it should
            self.app.deployed("healthy", 120, change=two_pods)
        self.old = self.app.selector[RUN]
        self.run = self.app.go(self.version, change=self.sickness.change)
        self.app.switched(self.run, 90)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Note every outcome that the history tells of the run, and when traffic is back."""
        store, name = self.app.fleet.cluster.store, self.app.name
        changes = store.subscribe(("services",))
        until = time.monotonic() + 150
        while not self.ended and time.monotonic() < until:
            event = changes.get(0.2)
            if event is None or event[1]["metadata"]["name"] != name:
                continue
            notes = event[1]["metadata"].get("annotations") or {}
            history = json.loads(notes.get("gitops-hook/history", "[]"))
            self.outcomes |= {e["outcome"] for e in history if e["run"] == self.run}
            if event[1]["spec"]["selector"].get(RUN) == self.old and not self.back.is_set():
                self.seconds = time.monotonic()
                self.back.set()
        store.unsubscribe(changes)

    def turn(self) -> None:
        """Let the version turn unhealthy, and see it."""
        self.app.tell(self.version, self.sickness.path)
        shows = self.sickness.shows
        eventually(lambda: shows(self.app, self.version), 30, "the version is unhealthy")
        self.possible = time.monotonic()

    def end(self) -> str:
        """Wait for the end; return what is wrong with it, or nothing."""
        try:
            return self.wrong()
        except AssertionError as late:
            return str(late)

    def wrong(self) -> str:
        """Wait for the end; return what is not as it should be."""
        if not self.back.wait(60):
            return f"traffic is not back; outcomes: {self.outcomes}"
        self.seconds = max(0.0, self.seconds - self.possible)
        self.ended = self.app.fleet.ended(self.run, 60)
        eventually(lambda: self.app.answer()["version"] == "healthy", 30, "the healthy one serves")
        told = []
        if self.seconds > LIMIT * SLACK:
            told.append(f"traffic was back after {self.seconds:.1f} s, not {LIMIT:.0f}")
        if self.outcomes - {"", "switched-back"}:
            told.append(f"the history told of these outcomes: {self.outcomes}")
        if self.ended["outcome"] != "switched-back":
            told.append(f"the run ended {self.ended}")
        return "; ".join(told)


class Result(NamedTuple):
    """What came of a pair: what is wrong, and how long traffic took from when it could move."""

    wrong: str
    seconds: float


@contextmanager
def silent_pods(apps: Fleet, trouble: str) -> Iterator[None]:
    """Let watches of pods be silent from their beginning, where that is the trouble."""
    if trouble != "informer-lost":
        yield
        return
    where = {"namespace": "production", "times": None, "seconds": 0.0}
    fault = apps.fault("drop-watch", "watch", "pods", **where)
    try:
        yield
    finally:
        apps.cluster.faults.lift(fault)


def go_through(apps: Fleet, pairs: Sequence[Pair], pool: ThreadPoolExecutor) -> Results:
    """Go through the pairs of one trouble side by side."""
    trouble = pairs[0].trouble
    attempts = [Attempt(p, a) for p, a in zip(pairs, apps.apps.values(), strict=False)]
    with silent_pods(apps, trouble):
        list(pool.map(Attempt.begin, attempts))
        with TROUBLES[trouble](apps, attempts):
            list(pool.map(Attempt.turn, attempts))
        over = time.monotonic()
        for attempt in attempts:
            attempt.possible = attempt.possible if trouble in AT_ONCE else over
        wrong = list(pool.map(Attempt.end, attempts))
    runs = {attempt.run for attempt in attempts}
    lines = [json.dumps(line) for line in apps.logged() if line.get("run") in runs]
    said = "\n".join(["", "what the daemon said:", *lines[-60:]])
    found = zip(attempts, wrong, strict=True)
    return {a.pair: Result(text and text + said, a.seconds) for a, text in found}


Results = dict[Pair, Result]


def go_through_all(directory: Path, wanted: Sequence[Pair]) -> Results:
    """Go through pairs, those of one trouble together; return what came of each."""
    settings = {"bake": "20s", "rollout_timeout": "120s"}
    names: dict[str, Object] = {f"pair-{n}x": settings for n in range(len(SICKNESSES))}
    results: Results = {}
    with fleet(directory, names) as apps, ThreadPoolExecutor(len(names)) as pool:
        apps.kill()
        apps.path = f"{sticky_kubectl(directory)}:{apps.path}"
        apps.start()
        first = pool.map(
            lambda app: app.deployed("healthy", 120, change=two_pods), apps.apps.values()
        )
        assert {ended["outcome"] for ended in first} == {"deployed"}
        for trouble in TROUBLES:
            if row := [pair for pair in wanted if pair.trouble == trouble]:
                results |= go_through(apps, row, pool)
    return results


def sticky_kubectl(directory: Path) -> Path:
    """Return a folder with a kubectl that never ends if it starts while a file is there."""
    folder = directory / "sticky"
    folder.mkdir()
    stuck, real = (shlex.quote(str(path)) for path in (directory / "stuck", BIN / "kubectl"))
    script = f'#!/bin/sh\n[ ! -e {stuck} ] || exec sleep 1000\nexec {real} "$@"\n'
    (folder / "kubectl").write_text(script)
    (folder / "kubectl").chmod(0o755)
    return folder
