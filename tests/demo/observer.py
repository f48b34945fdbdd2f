"""What kubectl shows of the cluster, told line by line as it changes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.demo.owner import Commit
from tests.demo.setting import APP, BAKE, ask
from tests.standin.kubectl import Kubectl

Object = dict[str, Any]
Say = Callable[[str, str], None]
NOTE = "gitops-hook/"
RUN = "gitops-hook/run"
ENVIRONMENTS = ("staging", "production")
KINDS = "jobs.batch,deployments.apps,services,configmaps,endpointslices.discovery.k8s.io"
LOOK_SECONDS = 0.4


def noted(thing: Object, key: str) -> str:
    """An annotation of the daemon's; empty where there is none."""
    return str((thing["metadata"].get("annotations") or {}).get(NOTE + key, ""))


def parsed(thing: Object, key: str) -> Any:
    """The JSON in such an annotation; None where there is none."""
    text = noted(thing, key)
    return json.loads(text) if text else None


def run_of(thing: Object) -> str:
    """The run that an object belongs to."""
    return str((thing["metadata"].get("labels") or {}).get(RUN, ""))


def finished(job: Object) -> str:
    """Complete, Failed, or empty while it is neither."""
    for condition in job.get("status", {}).get("conditions") or []:
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return ""


@dataclass(frozen=True)
class Sight:
    """One look at the cluster."""

    objects: tuple[Object, ...] = ()

    def all(self, kind: str, namespace: str) -> list[Object]:
        """The objects of a kind in a namespace."""
        return [
            item
            for item in self.objects
            if item["kind"] == kind and item["metadata"]["namespace"] == namespace
        ]

    def job(self, stage: str, commit: Commit) -> Object | None:
        """The Job of a stage of a commit."""
        wanted = f"{APP}-{commit.sha[:8]}-"
        return next((j for j in self.all("Job", stage) if run_of(j).startswith(wanted)), None)

    def reason(self, job: Object) -> str:
        """Why the run of a Job ended, by the record of it; empty while it has not."""
        maps = [
            m for m in self.all("ConfigMap", "orchestration") if _name(m) == f"gitops-hook-{APP}"
        ]
        record = ((maps[0].get("data") or {}) if maps else {}).get(f"run-{run_of(job)}", "{}")
        return str(json.loads(record).get("reason", ""))

    def live(self, environment: str) -> Object | None:
        """The live Service."""
        services = self.all("Service", environment)
        return next((s for s in services if s["metadata"]["name"] == APP), None)

    def selector(self, environment: str) -> dict[str, str]:
        """What the live Service selects."""
        service = self.live(environment)
        return dict(service["spec"].get("selector") or {}) if service else {}

    def is_live(self, environment: str, commit: Commit) -> bool:
        """Whether the live Service selects this commit's run."""
        return self.selector(environment).get(RUN, "").startswith(f"{APP}-{commit.sha[:8]}-")

    def entry(self, environment: str, commit: Commit) -> Object:
        """What the live Service's history says of a commit; empty when nothing."""
        service = self.live(environment)
        history: list[Object] = (parsed(service, "history") if service else None) or []
        wanted = (entry for entry in history if entry.get("commit") == commit.sha)
        return next(wanted, {})

    def working(self, environment: str) -> str:
        """The run whose image all pods of the worker have; empty while they change."""
        deployments = self.all("Deployment", environment)
        images = {_image(d): run_of(d) for d in deployments if run_of(d)}
        workers = [d for d in deployments if not run_of(d)]
        return images.get(_image(workers[0]), "") if workers and is_complete(workers[0]) else ""

    def ready(self, environment: str) -> int:
        """How many endpoints of the live Service are ready."""
        return sum(
            bool(endpoint["conditions"].get("ready"))
            for item in self.all("EndpointSlice", environment)
            if item["metadata"]["labels"].get("kubernetes.io/service-name") == APP
            for endpoint in item.get("endpoints") or []
        )


class Observer:
    """Looks with kubectl and tells what has changed since the last look."""

    def __init__(self, kubectl: Kubectl, say: Say) -> None:
        self._kubectl = kubectl
        self._say = say
        self._told: set[tuple[str, ...]] = set()
        self._live: dict[str, tuple[str, str]] = {}
        self._working: dict[str, str] = {}
        self.versions: dict[str, int] = {}
        self.sight = Sight()

    def expect(self, commit: Commit) -> None:
        """Know a commit by its version from now on."""
        self.versions[commit.sha[:8]] = commit.version

    def look(self) -> Sight:
        """Look once, tell what is new, and return what there is."""
        began = time.monotonic()
        printed = ask(self._kubectl, "get", KINDS, "--all-namespaces", "-o", "json")
        self.sight = Sight(tuple(json.loads(printed)["items"]))
        for job in self.sight.all("Job", "test"):
            self._tell_tests(job)
        for job in self.sight.all("Job", "build"):
            self._tell_build(job)
        for environment in ENVIRONMENTS:
            for deployment in self.sight.all("Deployment", environment):
                if run_of(deployment):
                    self._tell_rollout(environment, deployment)
            self._tell_service(environment)
            self._tell_worker(environment)
        time.sleep(max(0.0, LOOK_SECONDS - (time.monotonic() - began)))
        return self.sight

    def version(self, run: str) -> str:
        """`version 2` for the run of a commit that was announced."""
        return f"version {self.versions.get(run.removeprefix(f'{APP}-')[:8], '?')}"

    # Telling

    def _once(self, who: str, text: str, *key: str) -> None:
        if (who, *key) not in self._told:
            self._told.add((who, *key))
            self._say(who, text)

    def _tell_tests(self, job: Object) -> None:
        run, end = run_of(job), finished(job)
        if job.get("status", {}).get("active"):
            text = f"of {self.version(run)} run as Job {_name(job)}, a store beside them"
            self._once("tests", text, run, "run")
        summary = noted(job, "summary")
        if not end or not (summary or noted(job, "outcome")):
            return
        if end == "Complete":
            self._once("tests", f"green: {summary}", run, "end")
        elif reason := self.sight.reason(job):
            self._once("tests", f"{reason}: {summary}", run, "end")

    def _tell_build(self, job: Object) -> None:
        run = run_of(job)
        if digest := noted(job, "digest"):
            self._once("image", f"built (stand-in builder): {digest[:19]}…", run, "digest")
        elif finished(job) == "Failed":
            self._once("image", f"not built: {self.sight.reason(job)}", run, "end")

    def _tell_rollout(self, environment: str, deployment: Object) -> None:
        run, name = run_of(deployment), _name(deployment)
        wanted = deployment["spec"]["replicas"]
        status = deployment.get("status", {})
        one = wanted == 1
        text = f"{name}: {wanted} {'pod' if one else 'pods'} of {self.version(run)}"
        if wanted and status.get("updatedReplicas"):
            self._once(environment, f"{text} {'starts' if one else 'start'}", name, run, "start")
        if wanted and is_complete(deployment):
            self._once(
                environment, f"{text} {'is' if one else 'are'} available", name, run, "available"
            )

    def _tell_worker(self, environment: str) -> None:
        working = self.sight.working(environment)
        if working and self._working.get(environment) != working:
            self._working[environment] = working
            self._say(environment, f"the worker is of {self.version(working)}, too")

    def _tell_service(self, environment: str) -> None:
        service = self.sight.live(environment)
        if service is None:
            return
        selector = self.sight.selector(environment)
        colour, run = selector.get("version", ""), selector.get(RUN, "")
        before, self._live[environment] = self._live.get(environment), (colour, run)
        if before is None:
            self._say(environment, f"{colour}: {self.version(run)} is live, the first one")
        elif before != (colour, run):
            history = parsed(service, "history") or []
            left: Object = next((entry for entry in history if entry.get("run") == before[1]), {})
            back = left.get("outcome") == "switched-back"
            why = f", switched back: {left.get('reason')}: {left.get('detail')}" if back else ""
            text = f"{before[0]} → {colour}: {self.version(run)} is live{why}"
            self._say(environment, text)
        if until := noted(service, "bake-until"):
            self._once(environment, f"{self.version(run)} bakes for {BAKE} s", run, until)
        for entry in parsed(service, "history") or []:
            if entry.get("outcome") == "deployed":
                run = str(entry["run"])
                self._once(environment, f"{self.version(run)} is there to stay", run, "deployed")


def is_complete(deployment: Object) -> bool:
    """Whether all pods of a Deployment are available and as it wants them."""
    status = deployment.get("status", {})
    current = status.get("observedGeneration") == deployment["metadata"]["generation"]
    counts = {status.get(key) for key in ("replicas", "updatedReplicas", "availableReplicas")}
    return current and counts == {deployment["spec"]["replicas"]}


def _image(deployment: Object) -> str:
    return str(deployment["spec"]["template"]["spec"]["containers"][0]["image"])


def _name(thing: Object) -> str:
    return str(thing["metadata"]["name"])
