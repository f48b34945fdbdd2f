"""The cluster's controllers, fed by one stream of changes."""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import Any

from tests.standin.clock import Clock
from tests.standin.companions import AUTOSCALER_SECONDS, AutoscalerController, BudgetController
from tests.standin.deployments import DeploymentController
from tests.standin.errors import ApiError
from tests.standin.jobs import TRACKING, JobController
from tests.standin.owned import controller_of
from tests.standin.replicasets import ReplicaSetController
from tests.standin.selectors import matches_selector
from tests.standin.slices import EndpointSliceController
from tests.standin.store import Event, Store
from tests.standin.workqueue import WorkQueue

log = logging.getLogger(__name__)

Object = dict[str, Any]
WATCHED = (
    "pods",
    "jobs",
    "replicasets",
    "deployments",
    "services",
    "poddisruptionbudgets",
    "horizontalpodautoscalers",
)
# How long a change of a pod or a selector takes to reach the slices, in seconds.
SLICE_DELAY = (0.03, 0.08)


class Controllers:
    """All controllers of one cluster; ownership, quota status and default accounts are the
    store's."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._jobs = JobController(store, clock)
        self._sets = ReplicaSetController(store, clock)
        self._deployments = DeploymentController(store, clock)
        slices = EndpointSliceController(store)
        budgets, scalers = BudgetController(store), AutoscalerController(store, clock)
        self._ended: dict[str, float] = {}
        self._queues = {
            "jobs": WorkQueue("job-controller", self._jobs.reconcile),
            "replicasets": WorkQueue("replicaset-controller", self._sets.reconcile),
            "deployments": WorkQueue("deployment-controller", self._deployments.reconcile),
            "slices": WorkQueue("endpointslice-controller", slices.reconcile),
            "poddisruptionbudgets": WorkQueue("disruption-controller", budgets.reconcile),
            "horizontalpodautoscalers": WorkQueue("autoscaler", scalers.reconcile),
            "ttl": WorkQueue("ttl-controller", self._expire),
        }
        self._subscription = store.subscribe(WATCHED)
        self._thread = threading.Thread(target=self._watch, name="controllers", daemon=True)

    def start(self) -> None:
        """Begin."""
        for queue in self._queues.values():
            queue.start()
        self._thread.start()

    def stop(self) -> None:
        """End all threads; the objects stay."""
        self._subscription.close()
        self._thread.join()
        for queue in self._queues.values():
            queue.stop()

    def _watch(self) -> None:
        while not self._subscription.closed:
            event = self._subscription.next_event()
            if event is not None:
                self._see(event)

    def _see(self, event: Event) -> None:
        obj = event.stored.object
        meta = obj["metadata"]
        key = (meta["namespace"], meta["name"])
        if event.type == "DELETED":
            self._forget(event.resource, meta["uid"])
        if event.resource == "pods":
            self._see_pod(event, obj)
        elif event.resource == "services":
            self._queues["slices"].add(key, self._slice_delay())
        elif event.resource == "horizontalpodautoscalers":
            if event.type == "ADDED":
                self._queues[event.resource].add(key, self._clock.real(AUTOSCALER_SECONDS))
        else:
            self._queues[event.resource].add(key)
            if event.resource == "jobs" and event.type != "DELETED":
                self._see_end(key, obj)
            owner = controller_of(obj)
            if event.resource == "replicasets" and owner is not None:
                self._queues["deployments"].add((meta["namespace"], owner["name"]))

    def _see_pod(self, event: Event, pod: Object) -> None:
        namespace = pod["metadata"]["namespace"]
        owner = controller_of(pod)
        if owner is not None and owner["kind"] == "ReplicaSet":
            self._queues["replicasets"].add((namespace, owner["name"]))
        elif owner is not None and owner["kind"] == "Job":
            new = event.type == "ADDED"
            self._queues["jobs"].add((namespace, owner["name"]), 0 if new else self._clock.tick)
            if self._is_orphan(pod, owner):
                self._queues["jobs"].add((namespace, owner["name"]))
        labels = [pod["metadata"].get("labels") or {}]
        if event.before is not None:
            labels.append(event.before.object["metadata"].get("labels") or {})
            if event.type == "MODIFIED" and not _matters(pod, event.before.object):
                return
        for stored in self._store.snapshot("poddisruptionbudgets", namespace)[0]:
            selector = stored.object["spec"].get("selector")
            if any(matches_selector(selector, item) for item in labels):
                key = (namespace, stored.object["metadata"]["name"])
                self._queues["poddisruptionbudgets"].add(key)
        for stored in self._store.snapshot("services", namespace)[0]:
            selector = (stored.object["spec"].get("selector") or {}).items()
            if selector and any(selector <= item.items() for item in labels):
                name = stored.object["metadata"]["name"]
                self._queues["slices"].add((namespace, name), self._slice_delay())

    def _is_orphan(self, pod: Object, owner: Object) -> bool:
        held = TRACKING in pod["metadata"].get("finalizers", ())
        namespace = pod["metadata"]["namespace"]
        return held and self._store.find_stored("jobs", namespace, owner["name"]) is None

    def _forget(self, resource: str, uid: str) -> None:
        self._ended.pop(uid, None)
        if resource == "jobs":
            self._jobs.forget(uid)
        elif resource in ("replicasets", "pods"):
            self._sets.forget(uid)
        elif resource == "deployments":
            self._deployments.forget(uid)

    def _slice_delay(self) -> float:
        return random.uniform(*SLICE_DELAY)

    # Finished Jobs

    def _see_end(self, key: tuple[str, str], job: Object) -> None:
        if _finished(job):
            self._ended.setdefault(job["metadata"]["uid"], time.monotonic())
            if "ttlSecondsAfterFinished" in job["spec"]:
                self._queues["ttl"].add(key)

    def _expire(self, namespace: str, name: str) -> float | None:
        """Delete a Job whose time to live is over; how long it may stay otherwise."""
        stored = self._store.find_stored("jobs", namespace, name)
        if stored is None or not _finished(stored.object):
            return None
        job = stored.object
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        ended = self._ended.get(job["metadata"]["uid"])
        if ttl is None or ended is None or "deletionTimestamp" in job["metadata"]:
            return None
        left = ended + self._clock.real(ttl) - time.monotonic()
        if left > 0:
            return left
        try:
            self._store.delete("jobs", namespace, name, propagation="Foreground")
        except ApiError as error:
            log.debug("job %s/%s: %s", namespace, name, error)
        return None


def _finished(job: Object) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(
        item["type"] in ("Complete", "Failed") and item["status"] == "True" for item in conditions
    )


def _matters(pod: Object, before: Object) -> bool:
    """Whether the change can be seen in an EndpointSlice."""

    def view(obj: Object) -> tuple[Any, ...]:
        status, meta = obj.get("status", {}), obj["metadata"]
        ready = [
            item["status"] for item in status.get("conditions") or [] if item["type"] == "Ready"
        ]
        deleted = "deletionTimestamp" in meta
        return status.get("podIP"), status.get("phase"), ready, deleted, meta.get("labels")

    return view(pod) != view(before)
