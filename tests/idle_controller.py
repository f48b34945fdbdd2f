"""A controller without threads and without a cluster: a test takes each of its steps."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gitops_hook as hook
from gitops_hook import Do, Outcome, Reason
from tests.settings import loaded
from tests.world import Object

OLD = "a" * 40
NEW = "b" * 40
MAIN = "refs/heads/main"
CONFIG = """
apps:
  - {name: shop, repository: https://git.example.com/demo/shop.git, build: {builder: none}}
"""
TWO_APPS = f"""{CONFIG.rstrip()}
  - {{name: blog, repository: https://git.example.com/demo/blog.git, build: {{builder: none}}}}
"""


class HeldClock(hook.Clock):
    """A clock that a test holds; `now` goes on, unless a test holds that, too."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.monotonic: Any = lambda: self.time


class Stop(threading.Event):
    """What ends all waiting; a test that takes the steps of a controller itself never waits."""

    def __init__(self) -> None:
        super().__init__()
        self.stepping = threading.get_ident()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, but not in the thread of the test."""
        if threading.get_ident() == self.stepping and timeout is not None:
            return self.is_set()
        return super().wait(timeout)


class FakeKubectl(hook.Kubectl):
    """A cluster that holds ConfigMaps, Jobs and Services, and remembers what it is asked."""

    def __init__(self) -> None:
        super().__init__(hook.Metrics())
        self.objects: dict[tuple[str, str], Object] = {}
        self.filters: list[str] = []

    def get(self, resource: str, name: str, namespace: str) -> Object | None:
        return self.objects.get((resource, name))

    def list(
        self, resource: str, namespace: str, *filters: str, timeout: float = 30.0
    ) -> list[Object]:
        self.filters += filters[1:]
        jobs = [o for o in self.objects.values() if o.get("kind") == "Job"]
        return [o for o in jobs if resource == "jobs" and o["metadata"]["namespace"] == namespace]

    def create_each(
        self, objects: Sequence[Object], namespace: str
    ) -> dict[str, hook.KubectlError]:
        for item in objects:
            item["metadata"] |= {"resourceVersion": "1", "uid": "u"}
            self.objects[item["kind"].lower(), item["metadata"]["name"]] = item
        return {}

    def patch(self, resource: str, name: str, namespace: str, change: Object) -> Object:
        if resource == "job" and (resource, name) not in self.objects:
            raise refused("Error from server (NotFound): no such Job")
        patched = self.objects.setdefault((resource, name), {"data": {}})
        data = patched.get("data", {})
        data.update(change.get("data", {}))
        for key in [key for key, value in data.items() if value is None]:
            del data[key]
        return patched


def an_empty_record() -> Object:
    """The ConfigMap in which nothing is recorded of an app yet."""
    return {"metadata": {"resourceVersion": "1"}, "data": {}}


def refused(message: str, code: int | None = 1) -> hook.KubectlError:
    """A call of kubectl that failed with this message; code None: it did not end in time."""
    return hook.KubectlError(["kubectl"], code, message)


def idle_controller(directory: Path, config: str = CONFIG) -> Any:
    """A controller whose threads are not started, with a clock that a test holds.

    Nothing is refused of the manifests of any commit.
    """
    kubectl = FakeKubectl()
    doors = hook.Doors(
        kubectl=kubectl,
        git=SimpleNamespace(heads=lambda url: {}),  # type: ignore[arg-type]
        secrets=hook.Secrets(directory),
        clock=HeldClock(),
        reports=hook.Reports(kubectl.metrics),
        stop=Stop(),
    )
    spool = hook.Spool(directory / "spool", 100)
    spool.prepare()
    deployer = hook.Deployer(doors)
    deployer.manifest_faults = lambda tasks: {}  # type: ignore[method-assign]
    return hook.Controller(loaded(config), deployer, spool)


def synced(controller: Any) -> None:
    """Let every informer know all that is there."""
    for informer in controller.informers.all():
        informer.trouble = ""


def shop(controller: Any) -> hook.App:
    app: hook.App = controller.context.apps["shop"]
    return app


def a_run(commit: str, ref: str = MAIN, app: str = "shop", **more: Any) -> hook.Run:
    return hook.Run(id=hook.run_id(app, ref, commit), app=app, ref=ref, commit=commit, **more)


def a_manifest(controller: Any, run: hook.Run, stage: str = "test", **meta: Any) -> Object:
    """The Job of a run's stage as the cluster has it."""
    build = hook.test_job if stage == "test" else hook.build_job
    manifest = build(controller.context.config, shop(controller), run)
    manifest["metadata"] |= {"resourceVersion": "1", "uid": stage, **meta}
    return manifest


def a_job(
    controller: Any, stage: str, state: str, ended: float | None = None, **meta: Any
) -> hook.Job:
    """A Job of a run that was received at second 10, and may have ended."""
    manifest = a_manifest(controller, a_run(OLD, received=10.0), stage, **meta)
    if ended is not None:
        marks = {hook.ANNOTATION_OUTCOME: "failed", hook.ANNOTATION_ENDED: str(ended)}
        manifest["metadata"]["annotations"] |= marks
    if (stage, state) == ("build", "succeeded"):
        manifest["metadata"]["annotations"].setdefault(hook.ANNOTATION_DIGEST, "sha256:" + "0" * 64)
    manifest["spec"]["suspend"] = False
    condition = {"succeeded": "Complete", "failed": "Failed"}.get(state)
    conditions = [{"type": condition, "status": "True"}] if condition else []
    manifest["status"] = {"conditions": conditions}
    return hook.Job(manifest)


def add_job(controller: Any, run: hook.Run) -> hook.Informer[hook.Job]:
    """Let a run have its test Job, in the cluster and in an informer; return that."""
    manifest = a_manifest(controller, run)
    controller.context.kubectl.objects["job", manifest["metadata"]["name"]] = manifest
    informer: hook.Informer[hook.Job] = controller.informers.jobs[0]
    informer._take("ADDED", manifest)
    return informer


def delete_job(controller: Any) -> None:
    """Delete the only Job, in the cluster and in its informer."""
    informer: hook.Informer[hook.Job] = controller.informers.jobs[0]
    (name,) = [job.name for job in informer.items()]
    informer._take("DELETED", controller.context.kubectl.objects.pop(("job", name)))


def job_names(controller: Any) -> list[str]:
    """The names of the Jobs in the cluster, in the order in which they were created."""
    return [name for kind, name in controller.context.kubectl.objects if kind == "job"]


def record(controller: Any, run: hook.Run, outcome: str = "") -> None:
    """Record a run, under way or ended."""
    ended = run.received if outcome else 0.0
    entry = replace(hook.RunRecord.of(run), outcome=str(outcome), ended=ended)
    controller.context.state.write(shop(controller), entry)


def recorded(controller: Any) -> dict[str, tuple[str, str | None]]:
    """The last recorded push of each ref, and how it ended."""
    state = controller.context.state.read(shop(controller))
    records = sorted(state.runs.values(), key=lambda entry: entry.received)
    return {entry.ref: (entry.commit, entry.outcome or None) for entry in records}


def last_record(controller: Any) -> hook.RunRecord:
    """What is recorded of the last push of the deploy branch."""
    last: hook.RunRecord = controller.context.state.read(shop(controller)).last(MAIN)
    return last


def rejected(controller: Any) -> list[str]:
    """The commits that are recorded as rejected."""
    return [*controller.context.state.read(shop(controller)).rejected]


def stored(controller: Any) -> list[str]:
    """The commits of the pushes that wait for the cluster."""
    return [push.run.commit for push in controller.context.spool.read()]


def sample(controller: Any, metric: str, labels: Mapping[str, str]) -> float | None:
    """The value of a metric."""
    value: float | None
    value = controller.metrics.registry.get_sample_value(f"gitops_hook_{metric}", labels)
    return value


def ends(outcome: Outcome) -> hook.Action:
    return hook.Action(Do.END, "test", Reason.OK, "", outcome)


def live_service(*entries: Object) -> Object:
    """A live Service with this history, newest first, which selects the last entry marked live."""
    history = [{"selector": {hook.LABEL_RUN: e["run"]}, "at": 1.0, **e} for e in entries]
    (selector,) = [e["selector"] for e in history if e.get("live")]
    annotations = {hook.ANNOTATION_HISTORY: json.dumps(history)}
    meta = {"name": "shop", "resourceVersion": "1", "annotations": annotations}
    return {"metadata": meta, "spec": {"selector": selector}}
