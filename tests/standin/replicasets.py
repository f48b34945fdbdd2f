"""The ReplicaSet controller."""

from __future__ import annotations

import time
from typing import Any

from tests.standin.clock import Clock
from tests.standin.errors import ApiError
from tests.standin.owned import is_deleted, is_finished, is_ready, owned, phase, pod_from
from tests.standin.store import Store, now

Object = dict[str, Any]
COMPONENT = "replicaset-controller"
FIRST_RETRY = 0.1
LONGEST_RETRY = 60.0


class ReplicaSetController:
    """Keeps as many pods as a ReplicaSet asks for."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._ready_since: dict[str, float] = {}
        self._retries: dict[str, float] = {}

    def forget(self, uid: str) -> None:
        """The ReplicaSet or pod is gone."""
        self._ready_since.pop(uid, None)
        self._retries.pop(uid, None)

    def reconcile(self, namespace: str, name: str) -> float | None:
        """Bring the ReplicaSet one step on; when to look again."""
        stored = self._store.find_stored("replicasets", namespace, name)
        if stored is None:
            return None
        wanted = stored.object
        all_pods = owned(self._store, wanted, "pods")
        active = [pod for pod in all_pods if not is_finished(pod) and not is_deleted(pod)]
        terminating = sum(is_deleted(pod) and not is_finished(pod) for pod in all_pods)
        failure: str | None = None
        again: float | None = None
        if not is_deleted(wanted):
            failure, again = self._manage(wanted, active)
        waits = self._write(wanted, active, terminating, failure)
        times = [wait for wait in (again, waits) if wait is not None]
        return min(times) if times else None

    def _manage(self, wanted: Object, active: list[Object]) -> tuple[str | None, float | None]:
        """Create or delete pods; the text of a refusal, and when to try again."""
        missing = wanted["spec"].get("replicas", 1) - len(active)
        for _ in range(missing):
            pod = pod_from(wanted, wanted["spec"]["template"])
            try:
                created = self._store.create("pods", pod)
            except ApiError as error:
                self._tell(wanted, "Warning", "FailedCreate", f"Error creating: {error.message}")
                return error.message, self._retry(wanted)
            self._tell(
                wanted,
                "Normal",
                "SuccessfulCreate",
                f"Created pod: {created['metadata']['name']}",
            )
        self._retries.pop(wanted["metadata"]["uid"], None)
        if missing < 0:
            for pod in sorted(active, key=_worth)[:-missing]:
                meta = pod["metadata"]
                self._store.delete("pods", meta["namespace"], meta["name"])
                self._tell(wanted, "Normal", "SuccessfulDelete", f"Deleted pod: {meta['name']}")
        return None, None

    def _retry(self, wanted: Object) -> float:
        uid = wanted["metadata"]["uid"]
        seconds = self._retries.get(uid, FIRST_RETRY)
        self._retries[uid] = min(seconds * 2, LONGEST_RETRY)
        return self._clock.real(seconds)

    def _write(
        self, wanted: Object, active: list[Object], terminating: int, failure: str | None
    ) -> float | None:
        ready = [pod for pod in active if is_ready(pod)]
        available, wait = self._available(wanted, active)
        labels = (wanted["spec"]["template"].get("metadata") or {}).get("labels") or {}
        full = [
            pod for pod in active if labels.items() <= (pod["metadata"].get("labels") or {}).items()
        ]
        status: Object = {
            "availableReplicas": available,
            "fullyLabeledReplicas": len(full),
            "readyReplicas": len(ready),
        }
        status = {name: value for name, value in status.items() if value}
        status["observedGeneration"] = wanted["metadata"]["generation"]
        status["replicas"] = len(active)
        status["terminatingReplicas"] = terminating

        def change(stored: Object) -> None:
            conditions = _conditions(stored.get("status") or {}, failure)
            if stored["metadata"]["uid"] == wanted["metadata"]["uid"]:
                stored["status"] = status | ({"conditions": conditions} if conditions else {})

        meta = wanted["metadata"]
        self._store.update_status("replicasets", meta["namespace"], meta["name"], change)
        return wait

    def _available(self, wanted: Object, active: list[Object]) -> tuple[int, float | None]:
        """How many pods are ready for long enough, and when one more may be."""
        enough = self._clock.real(wanted["spec"].get("minReadySeconds", 0))
        count, waits, moment = 0, [], time.monotonic()
        for pod in active:
            uid = pod["metadata"]["uid"]
            if not is_ready(pod):
                self._ready_since.pop(uid, None)
                continue
            left = self._ready_since.setdefault(uid, moment) + enough - moment
            if left <= 0:
                count += 1
            else:
                waits.append(left)
        return count, min(waits) if waits else None

    def _tell(self, wanted: Object, kind: str, reason: str, text: str) -> None:
        self._store.record_event(wanted, kind, reason, text, COMPONENT)


def _worth(pod: Object) -> tuple[bool, bool, bool, int, int]:
    """Pods that are worth least come first: unbound, pending, unready, restarted, young."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return (
        bool(pod["spec"].get("nodeName")),
        phase(pod) == "Running",
        is_ready(pod),
        -sum(item["restartCount"] for item in statuses),
        -int(pod["metadata"]["resourceVersion"]),
    )


def _conditions(old: Object, failure: str | None) -> list[Object]:
    kept = [item for item in old.get("conditions") or [] if item["type"] != "ReplicaFailure"]
    before = [item for item in old.get("conditions") or [] if item["type"] == "ReplicaFailure"]
    if failure is None:
        return kept
    since = before[0]["lastTransitionTime"] if before else now()
    condition = {
        "lastTransitionTime": since,
        "message": failure,
        "reason": "FailedCreate",
        "status": "True",
        "type": "ReplicaFailure",
    }
    return [*kept, condition]
