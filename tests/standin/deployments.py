"""The Deployment controller."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.standin.clock import Clock
from tests.standin.owned import (
    REPLICA_SET_HASH,
    is_deleted,
    is_finished,
    owned,
    owner_reference,
    share,
)
from tests.standin.store import NAME_ALPHABET, Store, copy_json, now

Object = dict[str, Any]
COMPONENT = "deployment-controller"
PREFIX = "deployment.kubernetes.io/"
REVISION = PREFIX + "revision"
OWN_ANNOTATIONS = (
    REVISION,
    PREFIX + "revision-history",
    PREFIX + "desired-replicas",
    PREFIX + "max-replicas",
    "kubectl.kubernetes.io/last-applied-configuration",
)


class DeploymentController:
    """Rolls Deployments out."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._progress: dict[str, float] = {}

    def forget(self, uid: str) -> None:
        """The Deployment is gone."""
        self._progress.pop(uid, None)

    def reconcile(self, namespace: str, name: str) -> float | None:
        """Bring the Deployment one step on; when to look again."""
        stored = self._store.find_stored("deployments", namespace, name)
        if stored is None or is_deleted(stored.object):
            return None
        return _Rollout(self._store, self._clock, self._progress, stored.object).run()


class _Rollout:
    """One look at one Deployment."""

    def __init__(
        self, store: Store, clock: Clock, progress: dict[str, float], deployment: Object
    ) -> None:
        self.store = store
        self.clock = clock
        self.progress = progress
        self.deployment = deployment
        self.meta = deployment["metadata"]
        self.spec = deployment["spec"]
        self.wanted = int(self.spec.get("replicas", 1))
        self.recreate = (self.spec.get("strategy") or {}).get("type") == "Recreate"
        self.max_surge, self.max_unavailable = self._margins()
        sets = owned(store, deployment, "replicasets")
        self.sets = sorted(sets, key=lambda item: int(_revision(item)))
        self.new = self._find_new()

    @property
    def old(self) -> list[Object]:
        """All ReplicaSets but the current one, oldest first."""
        return [item for item in self.sets if self.new is None or not _same(item, self.new)]

    def run(self) -> float | None:
        """One step: new ReplicaSet, scale up, scale down, or clean up; then the status."""
        if self.spec.get("paused"):
            return self._sync()
        if self.recreate and self._old_pods_left():
            return self._sync()
        created = self._ensure_new()
        if not self.recreate and not created:
            if self._scale_up() or self._scale_down():
                return self._sync()
        elif self.recreate and not created:
            self._scale(self.new, self.wanted)
        elif created and not self.recreate:
            self._scale_down()
        if _complete(self.deployment, self.deployment.get("status") or {}):
            self._clean_up()
        return self._sync()

    # ReplicaSets

    def _margins(self) -> tuple[int, int]:
        if self.recreate:
            return 0, self.wanted
        rolling = (self.spec.get("strategy") or {}).get("rollingUpdate") or {}
        surge = share(rolling.get("maxSurge", "25%"), self.wanted, up=True)
        unavailable = share(rolling.get("maxUnavailable", "25%"), self.wanted, up=False)
        if surge == 0 and unavailable == 0:
            unavailable = 1
        return surge, min(unavailable, self.wanted)

    def _find_new(self) -> Object | None:
        template = self.spec["template"]
        for item in self.sets:
            other = copy_json(item["spec"]["template"])
            other.get("metadata", {}).get("labels", {}).pop(REPLICA_SET_HASH, None)
            if _bare(other) == _bare(template):
                return item
        return None

    def _ensure_new(self) -> bool:
        """Make or adopt the ReplicaSet of the present template; True if it was made now."""
        latest = max((int(_revision(item)) for item in self.old), default=0) + 1
        if self.new is None:
            self._create_new(latest)
            return True
        if int(_revision(self.new)) < latest:
            self._adopt(latest)
        self._annotate_new()
        if (self.meta.get("annotations") or {}).get(REVISION) != _revision(self.new):
            name = self.new["metadata"]["name"]
            self._note_revision("FoundNewReplicaSet", f'Found new replica set "{name}"')
        return False

    def _create_new(self, revision: int) -> None:
        template = copy_json(self.spec["template"])
        digest = _hash(template)
        template.setdefault("metadata", {}).setdefault("labels", {})[REPLICA_SET_HASH] = digest
        selector = copy_json(self.spec["selector"])
        selector.setdefault("matchLabels", {})[REPLICA_SET_HASH] = digest
        count = self._room_for_new(0)
        name = f"{self.meta['name']}-{digest}"
        spec = {"replicas": count, "selector": selector, "template": template}
        if self.spec.get("minReadySeconds"):
            spec["minReadySeconds"] = self.spec["minReadySeconds"]
        new = {
            "metadata": {
                "name": name,
                "namespace": self.meta["namespace"],
                "labels": dict(template["metadata"]["labels"]),
                "annotations": self._annotations(str(revision)),
                "ownerReferences": [owner_reference(self.deployment)],
            },
            "spec": spec,
            "status": {"replicas": 0},
        }
        self.new = self.store.create("replicasets", new)
        self.sets.append(self.new)
        if count:
            self._tell(f"Scaled up replica set {name} from 0 to {count}")
        self._note_revision("NewReplicaSetCreated", f'Created new replica set "{name}"')

    def _annotations(self, revision: str) -> dict[str, str]:
        given = self.meta.get("annotations") or {}
        return {
            **{key: value for key, value in given.items() if key not in OWN_ANNOTATIONS},
            PREFIX + "desired-replicas": str(self.wanted),
            PREFIX + "max-replicas": str(self.wanted + self.max_surge),
            REVISION: revision,
        }

    def _adopt(self, revision: int) -> None:
        """An older ReplicaSet has the template that is wanted again."""

        def change(stored: Object) -> None:
            notes = stored["metadata"].setdefault("annotations", {})
            history = [notes.get(PREFIX + "revision-history", ""), notes.get(REVISION, "")]
            notes[PREFIX + "revision-history"] = ",".join(item for item in history if item)
            notes[REVISION] = str(revision)

        self._change_new(change)

    def _annotate_new(self) -> None:
        assert self.new is not None
        wanted = self._annotations(_revision(self.new))

        def change(stored: Object) -> None:
            stored["metadata"].setdefault("annotations", {}).update(wanted)
            if "minReadySeconds" in self.spec:
                stored["spec"]["minReadySeconds"] = self.spec["minReadySeconds"]

        self._change_new(change)

    def _change_new(self, change: Any) -> None:
        assert self.new is not None
        name = self.new["metadata"]["name"]
        changed = self.store.update("replicasets", self.meta["namespace"], name, change)
        self.sets = [changed if _same(item, changed) else item for item in self.sets]
        self.new = changed

    def _note_revision(self, reason: str, text: str) -> None:
        revision = _revision(self.new)

        def change(stored: Object) -> None:
            stored["metadata"].setdefault("annotations", {})[REVISION] = revision
            status = stored.setdefault("status", {})
            if "progressDeadlineSeconds" in self.spec:
                _set(status, "Progressing", "True", reason, text)

        self.progress[self.meta["uid"]] = time.monotonic()
        self.deployment = self.store.update_status(
            "deployments", self.meta["namespace"], self.meta["name"], change
        )
        self.meta = self.deployment["metadata"]

    # Scaling

    def _total(self) -> int:
        return sum(item["spec"]["replicas"] for item in self.sets)

    def _room_for_new(self, has: int) -> int:
        if self.recreate:
            return self.wanted
        room = self.wanted + self.max_surge - self._total()
        return has + max(min(room, self.wanted - has), 0)

    def _scale_up(self) -> bool:
        assert self.new is not None
        has = self.new["spec"]["replicas"]
        if has == self.wanted:
            return False
        return self._scale(self.new, min(self._room_for_new(has), self.wanted))

    def _scale_down(self) -> bool:
        """Take old pods away, broken ones first, as far as availability allows."""
        assert self.new is not None
        old = [item for item in self.old if item["spec"]["replicas"]]
        if not old:
            return False
        least = self.wanted - self.max_unavailable
        unavailable = self.new["spec"]["replicas"] - _available(self.new)
        budget = self._total() - least - unavailable
        if budget <= 0:
            return False
        cleaned = 0
        for item in list(old):
            replicas = item["spec"]["replicas"]
            broken = min(budget - cleaned, replicas - _available(item))
            if broken > 0 and self._scale(item, replicas - broken):
                cleaned += broken
        spare = sum(_available(item) for item in self.sets) - least
        removed = 0
        for item in self.old:
            replicas = item["spec"]["replicas"]
            count = min(replicas, spare - removed)
            if replicas and count > 0 and self._scale(item, replicas - count):
                removed += count
        return bool(cleaned or removed)

    def _old_pods_left(self) -> bool:
        """Recreate: whether anything old still runs, after asking it to end."""
        for item in self.old:
            self._scale(item, 0)
        return any(
            not is_finished(pod) for item in self.old for pod in owned(self.store, item, "pods")
        )

    def _scale(self, item: Object | None, count: int) -> bool:
        assert item is not None
        before, name = item["spec"]["replicas"], item["metadata"]["name"]
        if before == count:
            return False

        def change(stored: Object) -> None:
            stored["spec"]["replicas"] = count
            notes = stored["metadata"].setdefault("annotations", {})
            notes[PREFIX + "desired-replicas"] = str(self.wanted)
            notes[PREFIX + "max-replicas"] = str(self.wanted + self.max_surge)

        changed = self.store.update("replicasets", self.meta["namespace"], name, change)
        self.sets = [changed if _same(other, item) else other for other in self.sets]
        if self.new is not None and _same(self.new, item):
            self.new = changed
        direction = "up" if count > before else "down"
        self._tell(f"Scaled {direction} replica set {name} from {before} to {count}")
        return True

    def _clean_up(self) -> None:
        """Forget old ReplicaSets beyond the history limit."""
        limit = self.spec.get("revisionHistoryLimit", 10)
        empty = [
            item
            for item in self.old
            if not item["spec"]["replicas"]
            and not (item.get("status") or {}).get("replicas")
            and not is_deleted(item)
        ]
        for item in empty[: max(len(self.old) - limit, 0)]:
            self.store.delete("replicasets", self.meta["namespace"], item["metadata"]["name"])

    # Status

    def _sync(self) -> float | None:
        """Write the status; how long until the progress deadline, if that runs."""
        old = self.deployment.get("status") or {}
        status = self._numbers(old)
        self._availability(status)
        self._replica_failure(status)
        again = self._progressing(status, old)

        def change(stored: Object) -> None:
            if stored["metadata"]["uid"] == self.meta["uid"]:
                stored["status"] = status

        self.store.update_status("deployments", self.meta["namespace"], self.meta["name"], change)
        return again

    def _numbers(self, old: Object) -> Object:
        statuses = [item.get("status") or {} for item in self.sets]
        replicas = sum(item.get("replicas", 0) for item in statuses)
        ready = sum(item.get("readyReplicas", 0) for item in statuses)
        available = sum(item.get("availableReplicas", 0) for item in statuses)
        updated = ((self.new or {}).get("status") or {}).get("replicas", 0)
        status: Object = {
            "availableReplicas": available,
            "conditions": copy_json(old.get("conditions") or []),
            "observedGeneration": self.meta["generation"],
            "readyReplicas": ready,
            "replicas": replicas,
            "unavailableReplicas": max(self._total() - available, 0),
            "updatedReplicas": updated,
        }
        status = {name: value for name, value in status.items() if value}
        status["terminatingReplicas"] = sum(item.get("terminatingReplicas", 0) for item in statuses)
        return status

    def _availability(self, status: Object) -> None:
        if status.get("availableReplicas", 0) >= self.wanted - self.max_unavailable:
            text = "Deployment has minimum availability."
            _set(status, "Available", "True", "MinimumReplicasAvailable", text)
        else:
            text = "Deployment does not have minimum availability."
            _set(status, "Available", "False", "MinimumReplicasUnavailable", text)

    def _replica_failure(self, status: Object) -> None:
        found = [
            condition
            for item in [self.new, *self.old]
            for condition in ((item or {}).get("status") or {}).get("conditions") or []
            if condition["type"] == "ReplicaFailure"
        ]
        if found:
            _set(status, "ReplicaFailure", "True", found[0]["reason"], found[0]["message"])
        else:
            kept = [
                item for item in status.get("conditions", []) if item["type"] != "ReplicaFailure"
            ]
            status["conditions"] = kept

    def _progressing(self, status: Object, old: Object) -> float | None:
        deadline = self.spec.get("progressDeadlineSeconds")
        if deadline is None or self.new is None:
            return None
        uid, name = self.meta["uid"], self.new["metadata"]["name"]
        current = _condition(status, "Progressing")
        reason = current["reason"] if current else ""
        whole = status.get("replicas", 0) == status.get("updatedReplicas", 0)
        if whole and reason == "NewReplicaSetAvailable":
            return None
        since = self.progress.setdefault(uid, time.monotonic())
        if _complete(self.deployment, status):
            text = f'ReplicaSet "{name}" has successfully progressed.'
            _set(status, "Progressing", "True", "NewReplicaSetAvailable", text)
            return None
        if _advanced(old, status):
            text = f'ReplicaSet "{name}" is progressing.'
            _set(status, "Progressing", "True", "ReplicaSetUpdated", text, refresh=True)
            self.progress[uid] = since = time.monotonic()
        left = since + self.clock.real(deadline) - time.monotonic()
        if reason in ("NewReplicaSetAvailable", "ProgressDeadlineExceeded") and not _advanced(
            old, status
        ):
            return None
        if left > 0:
            return left
        text = f'ReplicaSet "{name}" has timed out progressing.'
        _set(status, "Progressing", "False", "ProgressDeadlineExceeded", text)
        return None

    def _tell(self, text: str) -> None:
        self.store.record_event(self.deployment, "Normal", "ScalingReplicaSet", text, COMPONENT)


def _same(one: Object, other: Object) -> bool:
    return bool(one["metadata"]["uid"] == other["metadata"]["uid"])


def _revision(item: Object | None) -> str:
    notes = (item or {}).get("metadata", {}).get("annotations") or {}
    return str(notes.get(REVISION, "0"))


def _available(item: Object) -> int:
    return int((item.get("status") or {}).get("availableReplicas", 0))


def _bare(template: Object) -> Object:
    """A template without empty parts, for comparing."""
    meta = {key: value for key, value in (template.get("metadata") or {}).items() if value}
    return {"metadata": meta, "spec": template["spec"]}


def _hash(template: Object) -> str:
    """A pod-template-hash; Go's own one is over a Go structure, so this is another number."""
    value = 2166136261
    for byte in json.dumps(_bare(template), sort_keys=True).encode():
        value = (value * 16777619 & 0xFFFFFFFF) ^ byte
    return "".join(NAME_ALPHABET[ord(digit) % len(NAME_ALPHABET)] for digit in str(value))


def _condition(status: Object, kind: str) -> Object | None:
    for item in status.get("conditions") or []:
        if item["type"] == kind:
            return dict(item)
    return None


def _set(
    status: Object, kind: str, state: str, reason: str, text: str, *, refresh: bool = False
) -> None:
    """As the controller does: a condition that changes moves to the end of the list."""
    current = _condition(status, kind)
    same = current and current["status"] == state and current["reason"] == reason
    if same and not (refresh or (current and current["message"] != text)):
        return
    changed = {
        "lastTransitionTime": now(),
        "lastUpdateTime": now(),
        "message": text,
        "reason": reason,
        "status": state,
        "type": kind,
    }
    if current and current["status"] == state:
        changed["lastTransitionTime"] = current["lastTransitionTime"]
    others = [item for item in status.get("conditions") or [] if item["type"] != kind]
    status["conditions"] = [*others, changed]


def _complete(deployment: Object, status: Object) -> bool:
    wanted = deployment["spec"].get("replicas", 1)
    return bool(
        status.get("updatedReplicas", 0) == wanted
        and status.get("replicas", 0) == wanted
        and status.get("availableReplicas", 0) == wanted
        and status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    )


def _advanced(old: Object, new: Object) -> bool:
    def left(status: Object) -> int:
        return int(status.get("replicas", 0)) - int(status.get("updatedReplicas", 0))

    return (
        new.get("updatedReplicas", 0) > old.get("updatedReplicas", 0)
        or left(new) < left(old)
        or new.get("readyReplicas", 0) > old.get("readyReplicas", 0)
        or new.get("availableReplicas", 0) > old.get("availableReplicas", 0)
    )
