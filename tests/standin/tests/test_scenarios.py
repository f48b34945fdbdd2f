"""The stand-in tells the same stories as the recorded cluster.

Each file in data/watch/ holds the watch events of one scenario on a real cluster, thinned to what
is compared. The same objects run here, five times as fast, and the sequences of conditions, phases,
reasons and events must be the same. Names, addresses, times and counts are masked, and how two
components' events interleave is not compared: that differs from run to run on the real one too.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.standin.cluster import Cluster
from tests.standin.errors import ApiError
from tests.standin.store import Subscription

Object = dict[str, Any]
Entry = tuple[str, Object]

DATA = Path(__file__).parents[2] / "data" / "watch"
SPEED = 5
PATIENCE = 30.0
RESOURCES = (
    "jobs",
    "pods",
    "deployments",
    "replicasets",
    "events",
    "endpointslices",
    "poddisruptionbudgets",
    "horizontalpodautoscalers",
)
KUBECTL = Path(sys.executable).with_name("kubectl")
QUOTA = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "test-quota"},
    "spec": {
        "hard": {
            "limits.cpu": "4",
            "limits.memory": "8Gi",
            "pods": "10",
            "requests.cpu": "2",
            "requests.memory": "4Gi",
        }
    },
}
QUOTED = ("job-quota-exceeded", "job-quota-no-resources", "job-request-above-quota")
# These tests end a moment after their service has died twice; five times as fast that would be a
# matter of milliseconds.
SLOWER_TESTS = {"job-service-dies-during-tests": ("sleep 10;", "sleep 15;")}
# The whole node is closed in this one: it begins before the others.
CORDONED = "job-node-comes-later"
# The Deployments of the recordings were changed one after the other.
SERIES = {
    "my-app": ("deploy-succeeds", "deploy-bad-image", "deploy-crash-loop", "deploy-never-ready"),
    "shop": (
        "service-switched",
        "deploy-restarted",
        "deploy-missing-configmap",
        "deploy-init-fails",
        "deploy-sick-later",
    ),
    "late": ("deploy-image-comes-later",),
    "away": ("deploy-registry-away",),
    "tls": ("deploy-missing-secret-mount",),
    "web": ("companions-follow",),
}
# The calls of the recording that made the companions: two colours, the companions of one, then
# those of the other. How the Deployments fare beside them is a matter of milliseconds there.
COMPANIONS = (191, 192, 193, 197)
REGISTRY = "registry.test:5000"
LATE_IMAGE = f"{REGISTRY}/late:1795978979"
AWAY_IMAGE = f"{REGISTRY}/away:1795979315"
NOT_MODELLED: dict[str, str] = {}
SET_NAME = re.compile(
    r"\b([a-z-]+-(?:blue|green)|late|away|tls)-[a-z0-9]{7,10}(-[a-z0-9]{5})?(?![a-z0-9])"
)
SELECTORS: tuple[dict[str, str], ...] = (
    {"gitops-hook/app": "shop", "version": "green", "gitops-hook/run": "r2"},
    {"gitops-hook/app": "shop", "version": "blue", "gitops-hook/run": "r9"},
    {"gitops-hook/app": "shop", "version": "blue", "gitops-hook/run": "r1"},
)


def recording(scenario: str, resource: str) -> list[Entry]:
    """The recorded (type, object) of one resource."""
    path = DATA / f"{scenario}.{resource}.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["type"], line["object"]) for line in lines]


def recorded_resources(scenario: str) -> list[str]:
    """Which resources were watched in a scenario."""
    return sorted(path.name.split(".")[1] for path in DATA.glob(f"{scenario}.*.jsonl"))


SCENARIOS = sorted({path.name.split(".")[0] for path in DATA.glob("*.jsonl")})
JOBS = [name for name in SCENARIOS if name.startswith("job-")]
CASES = [
    (scenario, resource)
    for scenario in SCENARIOS
    for resource in recorded_resources(scenario)
    if resource != "services"
]


class Recorder:
    """Everything that the store tells, from its beginning."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._changed = threading.Condition()
        self._entries: list[Entry] = []
        self._times: list[float] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for kind, obj in self._subscription:
            with self._changed:
                self._entries.append((kind, obj))
                self._times.append(time.monotonic())
                self._changed.notify_all()

    def stop(self) -> None:
        """Hear no more."""
        self._subscription.close()
        self._thread.join()

    def mark(self) -> int:
        """The present end of the record."""
        with self._changed:
            return len(self._entries)

    def read(
        self, namespace: str, kind: str, start: int = 0, end: int | None = None
    ) -> list[Entry]:
        """What was told of one kind in one namespace."""
        with self._changed:
            return [
                (how, obj)
                for how, obj in self._entries[start:end]
                if obj["kind"] == kind and obj["metadata"].get("namespace") == namespace
            ]

    def moments(self, namespace: str, text: str) -> list[float]:
        """When Events with this text in reason or message were told, in seconds."""
        with self._changed:
            return [
                at
                for at, (_, obj) in zip(self._times, self._entries, strict=True)
                if obj["kind"] == "Event"
                and obj["metadata"]["namespace"] == namespace
                and text in (obj["reason"], obj["message"])
            ]

    def wait(self, fulfilled: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Whether that came to be true in time."""
        deadline = time.monotonic() + seconds
        while not fulfilled():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with self._changed:
                self._changed.wait(min(left, 0.2))
        return True


# What is compared


def masked(text: str) -> str:
    """A message without what is different in every run."""
    text = text.removeprefix("(combined from similar events): ")
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}", "UID", text)
    text = re.sub(r"\d+\.\d+\.\d+\.\d+", "IP", text)
    text = SET_NAME.sub(r"\1-*", text)
    text = re.sub(r"\b((?:test|svc)-[a-z0-9]+)-[a-z0-9]{5}(?![a-z0-9])", r"\1-*", text)
    text = re.sub(r"\b(assigned|for pod) [a-z-]+/", r"\1 NS/", text)
    text = re.sub(r" in [\dm.s]+ \([\dm.s]+ including waiting\)", " in SOME TIME", text)
    return re.sub(r"(-\*)_[a-z-]+\(", r"\1_NS(", text)


def unrepeated(items: list[Any]) -> list[Any]:
    """The sequence without direct repetitions."""
    return [item for index, item in enumerate(items) if index == 0 or item != items[index - 1]]


def conditions(obj: Object) -> tuple[tuple[str, ...], ...]:
    """An object's conditions in a fixed order."""
    found = obj.get("status", {}).get("conditions") or []
    return tuple(
        sorted(
            (item["type"], item["status"], item.get("reason", ""), masked(item.get("message", "")))
            for item in found
        )
    )


def container(item: Object) -> tuple[Any, ...]:
    """What is compared of a container status."""
    kind, state = next(iter(item["state"].items()))
    last: Object = next(iter(item["lastState"].values()), {})
    return (
        item["name"],
        kind,
        state.get("reason"),
        state.get("exitCode"),
        masked(state.get("message", "")),
        last.get("reason"),
        item["restartCount"],
    )


def pod_view(obj: Object) -> tuple[Any, ...]:
    """What is compared of a pod."""
    status = obj["status"]
    groups = [status.get(kind) or [] for kind in ("initContainerStatuses", "containerStatuses")]
    waits = [
        (item["reason"], item["message"])
        for item in status.get("conditions") or []
        if item["type"] == "PodScheduled" and item["status"] == "False"
    ]
    why = (*waits, status.get("reason"), status.get("message"))
    return status.get("phase"), why, *(container(item) for group in groups for item in group)


def ending_view(obj: Object) -> tuple[Any, ...]:
    """The same without how often its containers were restarted."""
    phase, _, *containers = pod_view(obj)
    return phase, *(item[:-1] for item in containers)


def stories(entries: list[Entry], view: Callable[[Object], Any]) -> list[list[Any]]:
    """What each object went through, objects in the order in which they appear."""
    found: dict[str, list[Any]] = {}
    for kind, obj in entries:
        story = found.setdefault(obj["metadata"]["name"], [])
        story.append("DELETED" if kind == "DELETED" else view(obj))
    return [unrepeated(story) for story in found.values()]


def pod_stories(entries: list[Entry]) -> list[list[Any]]:
    """The stories of pods that are new, and of those whose deletion begins here."""
    new = {obj["metadata"]["name"] for kind, obj in entries if kind == "ADDED"}
    ending = {
        obj["metadata"]["name"]
        for _, obj in entries
        if "deletionTimestamp" in obj["metadata"] and obj["status"].get("observedGeneration") == 1
    } - new
    # What a pod was doing, and how often, when it was deleted depends on the moment.
    last = [
        (kind, obj)
        for kind, obj in entries
        if obj["metadata"]["name"] in ending and obj["status"].get("observedGeneration") == 2
    ]
    begun = [(kind, obj) for kind, obj in entries if obj["metadata"]["name"] in new]
    return sorted(stories(begun, pod_view) + stories(last, ending_view), key=str)


def event_stories(entries: list[Entry]) -> list[list[Any]]:
    """What was told about each object, in the order of first appearance.

    A probe that fails while a server starts is a matter of milliseconds: `Unhealthy` is left out.
    Of pods that were there before, only their end belongs to the scenario.
    """
    found: dict[str, list[Any]] = {}
    new = {item["involvedObject"]["name"] for _, item in entries if item["reason"] == "Scheduled"}
    for _, event in entries:
        about = event["involvedObject"]
        former = about["kind"] == "Pod" and about["name"] not in new
        if event["reason"] == "Unhealthy" or (former and event["reason"] != "Killing"):
            continue
        told = (event["type"], event["reason"], about.get("fieldPath"), masked(event["message"]))
        story = found.setdefault(f"{about['kind']}/{about['name']}", [])
        if told not in story:
            story.append(told)
    return sorted(found.values(), key=str)


def slice_view(obj: Object) -> Any:
    """What is compared of an EndpointSlice."""
    endpoints = sorted(
        (masked(item["targetRef"]["name"]), tuple(sorted(item["conditions"].items())))
        for item in obj.get("endpoints") or []
    )
    return endpoints, obj.get("ports")


def budget_view(obj: Object) -> Any:
    """What is compared of a PodDisruptionBudget: not each pod on its way to being ready."""
    names = ("desiredHealthy", "disruptionsAllowed", "expectedPods", "observedGeneration")
    numbers = [obj["status"].get(name) for name in names]
    return obj["spec"]["selector"], numbers, conditions(obj)


def autoscaler_view(obj: Object) -> Any:
    """What is compared of a HorizontalPodAutoscaler."""
    numbers = [obj["status"].get(name) for name in ("currentReplicas", "desiredReplicas")]
    return obj["spec"]["scaleTargetRef"], numbers, conditions(obj)


def first_appearances(told: list[list[Any]]) -> list[list[Any]]:
    """Each story with every state only where it was first reached."""
    return [list(dict.fromkeys(story)) for story in told]


def condition_stories(entries: list[Entry]) -> list[list[Any]]:
    """The stories of objects in their conditions."""
    return stories(entries, conditions)


def replica_stories(entries: list[Entry]) -> list[list[Any]]:
    """The stories of ReplicaSets in wanted and actual numbers of pods."""

    def view(obj: Object) -> tuple[int, int]:
        return obj["spec"]["replicas"], obj["status"]["replicas"]

    found = stories(entries, view)
    # A set that was there before and does not change yet has not begun its story.
    begun = [story[1:] if story[0][0] == story[0][1] else story for story in found]
    return sorted(begun, key=str)


STORIES: dict[str, tuple[str, Callable[[list[Entry]], list[list[Any]]]]] = {
    "jobs": ("Job", condition_stories),
    "pods": ("Pod", pod_stories),
    "deployments": ("Deployment", condition_stories),
    "replicasets": ("ReplicaSet", replica_stories),
    "events": ("Event", event_stories),
    "endpointslices": ("EndpointSlice", lambda entries: stories(entries, slice_view)),
    "poddisruptionbudgets": (
        "PodDisruptionBudget",
        lambda entries: stories(entries, budget_view),
    ),
    "horizontalpodautoscalers": (
        "HorizontalPodAutoscaler",
        lambda entries: stories(entries, autoscaler_view),
    ),
}


def plain(scenario: str, resource: str, told: list[list[Any]]) -> list[list[Any]]:
    """Stories without what depends on the pace of two that go on side by side.

    Those are two pods that crash on their own, and the tests and the service of one pod.
    """
    if (scenario, resource) == ("deploy-sick-later", "deployments"):
        return first_appearances(told)
    if (scenario, resource) == ("job-service-dies-during-tests", "pods"):
        return [part for story in told for part in apart(story)]
    return told


def apart(story: list[Any]) -> list[list[Any]]:
    """What a pod and each of its containers went through, each for itself."""
    length = max((len(view) for view in story), default=0)
    whole = [view for view in story if len(view) == length]
    return [unrepeated([view[at] for view in whole]) for at in range(length)]


def recorded_stories(scenario: str, resource: str) -> list[list[Any]]:
    """What the recording tells."""
    return plain(scenario, resource, STORIES[resource][1](recording(scenario, resource)))


def begins_with(ours: list[list[Any]], recorded: list[list[Any]]) -> bool:
    """Whether each recorded story is the beginning of one of ours, and no other is there."""
    return len(ours) == len(recorded) and all(
        mine[: len(theirs)] == theirs for mine, theirs in zip(ours, recorded, strict=True)
    )


# Running the scenarios


@dataclass
class Run:
    """A scenario as it went here: where, and from which moment of the record to which."""

    namespace: str
    start: int = 0
    end: int | None = None
    begun: threading.Event = field(default_factory=threading.Event)
    trouble: str = ""


class Theatre:
    """Plays all scenarios on one cluster: Jobs side by side, each series in its order."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.recorder = Recorder(cluster.store.subscribe(RESOURCES))
        self.runs: dict[str, Run] = {name: Run(name) for name in JOBS}
        self.runs |= {name: Run(place) for place, names in SERIES.items() for name in names}
        self._threads = [threading.Thread(target=self._series, args=(name,)) for name in SERIES]
        beside = [name for name in JOBS if name != CORDONED]
        self._threads += [threading.Thread(target=self._job, args=(name,)) for name in beside]

    def start(self) -> None:
        """Begin everything."""
        for namespace in [*JOBS, *SERIES]:
            self.cluster.store.create("namespaces", {"metadata": {"name": namespace}})
        for namespace in QUOTED:
            quota = {**QUOTA, "metadata": {**QUOTA["metadata"], "namespace": namespace}}  # type: ignore[dict-item]
            self.cluster.load(quota)
        images = self.cluster.images
        images.base(f"{REGISTRY}/python:*")
        images.add(AWAY_IMAGE)
        images.hold_pull(AWAY_IMAGE, held=True)
        self.cluster.cordon()
        self._job(CORDONED)
        self.cluster.load(_filler("job-quota-exceeded"))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the plays and the record."""
        for thread in self._threads:
            thread.join()
        self.recorder.stop()

    def ours(self, scenario: str, resource: str) -> list[list[Any]]:
        """The stories that were told here so far."""
        run = self.runs[scenario]
        kind, tell = STORIES[resource]
        entries = self.recorder.read(run.namespace, kind, run.start, run.end)
        return plain(scenario, resource, tell(_about(scenario, entries)))

    def is_told(self, scenario: str, resource: str) -> bool:
        """Whether everything recorded has happened here."""
        return begins_with(self.ours(scenario, resource), recorded_stories(scenario, resource))

    def finish(self, scenario: str) -> None:
        """Wait until a scenario has told all, or its time is over."""
        for resource in recorded_resources(scenario):
            if resource in STORIES:
                self.recorder.wait(lambda resource=resource: self.is_told(scenario, resource))  # type: ignore[misc]

    def _job(self, scenario: str) -> None:
        run = self.runs[scenario]
        for kind, obj in recording(scenario, "jobs"):
            if kind == "ADDED":
                text = json.dumps(obj["spec"]).replace(*SLOWER_TESTS.get(scenario, ("", "")))
                job = {"metadata": {}, "spec": _hastened(json.loads(text))}
                job["metadata"] = {"name": obj["metadata"]["name"], "namespace": scenario}
                self.cluster.store.create("jobs", job)
        run.begun.set()
        if action := ACTIONS.get(scenario):
            action(self, run)

    def _series(self, place: str) -> None:
        try:
            self._play(place)
        except (subprocess.SubprocessError, ApiError) as error:
            text = f"{error} {getattr(error, 'stderr', '')}"
            for scenario in SERIES[place]:
                run = self.runs[scenario]
                if not run.end:
                    run.trouble = text
                    run.begun.set()

    def _play(self, place: str) -> None:
        if place == "shop":
            self._shop()
        for scenario in SERIES[place]:
            run = self.runs[scenario]
            run.start = self.recorder.mark()
            run.begun.set()
            if scenario == "deploy-restarted":
                self.kubectl(place, "rollout", "restart", "deployment/shop-green")
            elif scenario == "service-switched":
                self._switch(place)
            elif scenario == "companions-follow":
                self._accompany(place)
            else:
                kind, before = recording(scenario, "deployments")[0]
                if kind == "MODIFIED":
                    self._settle(run, before)
                applied = before["applied"]
                applied["metadata"]["namespace"] = place
                applied["spec"]["template"]["spec"] = _hastened(applied["spec"]["template"]["spec"])
                self.kubectl(place, "apply", "-f", "-", text=json.dumps(applied))
            if action := ACTIONS.get(scenario):
                action(self, run)
            self.finish(scenario)
            run.end = self.recorder.mark()

    def _settle(self, run: Run, before: Object) -> None:
        """Wait until the Deployment is as it was when it was changed in the recording."""
        name, wanted = before["metadata"]["name"], conditions(before)

        def settled() -> bool:
            found = self.cluster.store.get("deployments", run.namespace, name)
            return conditions(found) == wanted and not any(
                "running" in item["state"] and not item["ready"]
                for pod in self.cluster.store.list("pods", run.namespace)
                for item in pod["status"].get("containerStatuses") or []
            )

        self.recorder.wait(settled)
        run.start = self.recorder.mark()

    def _shop(self) -> None:
        """What was there before the recorded changes: two colours and a Service."""
        applied = recording("deploy-restarted", "deployments")[0][1]["applied"]
        applied["metadata"]["namespace"] = "shop"
        green = json.dumps(applied)
        blue = green.replace("green", "blue").replace('"r2"', '"r1"')
        for text in (green, blue):
            self.kubectl("shop", "apply", "-f", "-", text=text)
        ports = [{"port": 80, "targetPort": 8080}]
        spec = {"ports": ports, "selector": SELECTORS[-1]}
        meta = {"name": "shop", "namespace": "shop"}
        self.cluster.store.create("services", {"metadata": meta, "spec": spec})
        for colour in ("blue", "green"):
            self.kubectl("shop", "rollout", "status", f"deployment/shop-{colour}", "--timeout=20s")
        self.recorder.wait(lambda: self._ready_endpoints() == 2)

    def _ready_endpoints(self) -> int:
        slices = self.recorder.read("shop", "EndpointSlice")
        if not slices:
            return 0
        return sum(item["conditions"]["ready"] for item in slices[-1][1]["endpoints"] or [])

    def _switch(self, place: str) -> None:
        for number, selector in enumerate(SELECTORS, 1):

            def change(service: Object, selector: Object = selector) -> None:
                service["spec"]["selector"] = dict(selector)

            self.cluster.store.update("services", place, "shop", change)
            self.recorder.wait(
                lambda number=number: any(  # type: ignore[misc]
                    len(story) >= number
                    for story in self.ours("service-switched", "endpointslices")
                )
            )

    def _accompany(self, place: str) -> None:
        """Two colours, companions of the first; and when both are ready, of the second."""
        lines = (DATA.parent / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
        calls = [json.loads(lines[at])["stdin"] for at in COMPANIONS]
        blue, green, first, second = (
            text.replace('"namespace": "production"', f'"namespace": "{place}"') for text in calls
        )
        # The budget is there before the pods are ready.
        later = '"readinessProbe": {"initialDelaySeconds": 10, '
        for text in (blue, green):
            slow = text.replace('"readinessProbe": {', later)
            self.kubectl(place, "apply", "-f", "-", text=slow)
        self.kubectl(place, "apply", "-f", "-", text=first)
        for colour in ("blue", "green"):
            self.kubectl(place, "rollout", "status", f"deployment/web-{colour}", "--timeout=20s")
        self.recorder.wait(
            lambda: any(
                budget["status"]["disruptionsAllowed"]
                for _, budget in self.recorder.read(place, "PodDisruptionBudget")
            )
        )
        self.kubectl(place, "apply", "-f", "-", text=second)

    def kubectl(self, namespace: str, *arguments: str, text: str = "") -> None:
        """Run the real kubectl."""
        config = str(self.cluster.kubeconfig())
        cache = str(self.cluster.directory / "cache")
        subprocess.run(
            [
                str(KUBECTL),
                f"--kubeconfig={config}",
                f"--cache-dir={cache}",
                f"-n={namespace}",
                *arguments,
            ],
            input=text,
            text=True,
            check=True,
            capture_output=True,
            timeout=60,
            env={**os.environ, "HOME": str(self.cluster.directory)},
        )


def _about(scenario: str, entries: list[Entry]) -> list[Entry]:
    """Only what the recordings were thinned to: the scenario's own objects."""
    prefix = {"deploy-succeeds": "my-app"}.get(scenario, "")
    hidden = ("filler", "shop-blue")
    if scenario == "companions-follow":
        # Its Events were thinned to those about the companions themselves.
        entries = [
            (kind, obj)
            for kind, obj in entries
            if obj.get("involvedObject", {}).get("kind") in (None, "HorizontalPodAutoscaler")
        ]

    def name(obj: Object) -> str:
        return str((obj.get("involvedObject") or obj["metadata"])["name"])

    return [
        (kind, obj)
        for kind, obj in entries
        if name(obj).startswith(prefix) and not name(obj).startswith(hidden)
    ]


def _hastened(spec: Object) -> Object:
    """The spec as a user wrote it, with the times in its commands as fast as the cluster."""
    text = json.dumps(spec)
    pattern = r"\b(sleep|timeout) (\d+)"
    text = re.sub(pattern, lambda found: f"{found[1]} {int(found[2]) / SPEED:g}", text)
    new: Object = json.loads(text)
    new.pop("selector", None)
    labels = new.get("template", {}).get("metadata", {}).get("labels", {})
    for label in list(labels):
        if "controller-uid" in label or "job-name" in label:
            del labels[label]
    return new


def _filler(namespace: str) -> Object:
    """A pod that uses the 50m of the quota that another Job's pod used in the recording."""
    resources = {
        "requests": {"cpu": "50m", "memory": "32Mi"},
        "limits": {"cpu": "500m", "memory": "64Mi"},
    }
    main = {"name": "main", "image": "busybox:1", "command": ["sleep", "600"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "filler", "namespace": namespace},
        "spec": {"containers": [{**main, "resources": resources}]},
    }


def _running_pod(theatre: Theatre, run: Run) -> str:
    """The name of the scenario's pod, once it runs."""
    name = ""

    def runs() -> bool:
        nonlocal name
        for _, pod in theatre.recorder.read(run.namespace, "Pod"):
            if pod["status"].get("phase") == "Running":
                name = pod["metadata"]["name"]
        return bool(name)

    theatre.recorder.wait(runs)
    return name


def _delete_job(theatre: Theatre, run: Run) -> None:
    _running_pod(theatre, run)
    theatre.cluster.store.delete("jobs", run.namespace, "test-del")


def _evict(theatre: Theatre, run: Run) -> None:
    theatre.cluster.evict(run.namespace, _running_pod(theatre, run))


def _release(theatre: Theatre, run: Run) -> None:
    def change(job: Object) -> None:
        job["spec"]["suspend"] = False

    theatre.recorder.wait(
        lambda: any(
            item["type"] == "Suspended"
            for _, job in theatre.recorder.read(run.namespace, "Job")
            for item in job["status"].get("conditions") or []
        )
    )
    theatre.cluster.store.update("jobs", run.namespace, "test-susp", change)


def _uncordon(theatre: Theatre, run: Run) -> None:
    theatre.recorder.wait(
        lambda: any(
            event["reason"] == "FailedScheduling"
            for _, event in theatre.recorder.read(run.namespace, "Event")
        )
    )
    theatre.cluster.cordon(False)


def _refusals(theatre: Theatre, place: str) -> int:
    """How often a pull was refused so far."""
    return max(
        (
            event["count"]
            for _, event in theatre.recorder.read(place, "Event")
            if event["message"] == "Error: ErrImagePull"
        ),
        default=0,
    )


def _push_image(theatre: Theatre, run: Run) -> None:
    theatre.recorder.wait(lambda: _refusals(theatre, run.namespace) == 2)
    theatre.cluster.images.add(LATE_IMAGE)


def _answer(theatre: Theatre, _: Run) -> None:
    # Another registry refuses twice in the meantime, which takes 13 seconds of the cluster's time.
    theatre.recorder.wait(lambda: _refusals(theatre, "late") == 2)
    theatre.cluster.images.hold_pull(AWAY_IMAGE, held=False)


ACTIONS: dict[str, Callable[[Theatre, Run], None]] = {
    CORDONED: _uncordon,
    "deploy-image-comes-later": _push_image,
    "deploy-registry-away": _answer,
    "job-deleted-while-running": _delete_job,
    "job-evicted-then-succeeds": _evict,
    "job-suspended-then-released": _release,
}


@pytest.fixture(scope="module")
def theatre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theatre]:
    """All scenarios, playing."""
    with Cluster(tmp_path_factory.mktemp("cluster"), speed=SPEED) as cluster:
        playing = Theatre(cluster)
        playing.start()
        yield playing
        playing.stop()


@pytest.mark.parametrize(("scenario", "resource"), CASES)
def test_scenario_goes_as_recorded(theatre: Theatre, scenario: str, resource: str) -> None:
    assert theatre.runs[scenario].begun.wait(2 * PATIENCE)
    assert not theatre.runs[scenario].trouble
    theatre.recorder.wait(lambda: theatre.is_told(scenario, resource))
    recorded = recorded_stories(scenario, resource)
    ours = theatre.ours(scenario, resource)
    cut = [mine[: len(theirs)] for mine, theirs in zip(ours, recorded, strict=False)]
    assert cut + ours[len(recorded) :] == recorded


@pytest.mark.parametrize(
    ("scenario", "place", "text"),
    [
        ("job-secret-missing", "job-secret-missing", "FailedMount"),
        ("job-request-above-quota", "job-request-above-quota", "FailedCreate"),
        ("deploy-image-comes-later", "late", "Error: ErrImagePull"),
        ("deploy-image-comes-later", "late", "Pulling"),
        ("job-service-crashes", "job-service-crashes", "Started"),
    ],
)
def test_what_is_tried_again_has_the_recorded_distances(
    theatre: Theatre, scenario: str, place: str, text: str
) -> None:
    recorded = [
        json.loads(line)["at"]
        for line in (DATA / f"{scenario}.events.jsonl").read_text(encoding="utf-8").splitlines()
        if text in line
    ]
    theatre.recorder.wait(lambda: len(theatre.recorder.moments(place, text)) >= len(recorded))
    ours = [at * SPEED for at in theatre.recorder.moments(place, text)[: len(recorded)]]
    assert len(ours) == len(recorded) > 1
    late = SPEED * 0.5  # what a busy machine may add to one of two moments
    for wanted, seen in zip(distances(recorded), distances(ours), strict=True):
        assert wanted / 2 - late <= seen, (text, wanted, seen)
    assert ours[-1] - ours[0] <= 3 * (recorded[-1] - recorded[0]) + 10


def distances(times: list[float]) -> list[float]:
    """From each moment to the next."""
    return [after - before for before, after in itertools.pairwise(times)]


def test_every_recorded_scenario_is_played_or_listed_with_a_reason() -> None:
    played = {*JOBS, *(name for names in SERIES.values() for name in names)}
    assert played.isdisjoint(NOT_MODELLED)
    assert played | NOT_MODELLED.keys() == set(SCENARIOS)
    assert all(NOT_MODELLED.values())
