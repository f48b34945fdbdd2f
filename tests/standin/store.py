"""The objects of the stand-in cluster: versions, watches, deletion, ownership.

Objects are plain dictionaries in the API's JSON form. Everything that comes in or goes out is
copied, so that nobody changes a stored object by accident. Stored objects themselves are never
changed, only replaced: watches can hold on to them without copying.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partialmethod
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from tests.standin.admission import ClusterHooks
from tests.standin.errors import ApiError, already_exists, conflict, not_found
from tests.standin.resources import resource_of

__all__ = ["ApiError", "Event", "Hooks", "Store", "Subscription", "copy_json", "now"]

Object = dict[str, Any]
Objects = list[Object]
Placed = list[tuple[str, "Stored"]]
Some = list["Stored"]
Events = list["Event"]
Keys = list["Key"]
Key = tuple[str, str, str]
Json = TypeVar("Json")
Change = Callable[[Object], Object | None]

# What the API server uses for generated names: no vowels, nothing that reads like another letter.
NAME_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
# How long the content of a namespace outlives its deletion.
NAMESPACE_LASTS = 0.3
FOREGROUND = "foregroundDeletion"
# Fields that no writer may change once the object exists.
FIXED_METADATA = (
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "name",
    "namespace",
    "selfLink",
)


def _copy(value: Any) -> Any:
    kind = type(value)
    if kind is dict:
        return {key: _copy(item) for key, item in value.items()}
    if kind is list:
        return [_copy(item) for item in value]
    return value


def copy_json(value: Json) -> Json:
    """A deep copy of JSON data (five times faster than copy.deepcopy)."""
    copied: Json = _copy(value)
    return copied


def now(offset: float = 0.0) -> str:
    """The time in the API's form, to the second."""
    return (datetime.now(UTC) + timedelta(seconds=offset)).strftime("%Y-%m-%dT%H:%M:%SZ")


def random_suffix(length: int = 5) -> str:
    """The random end of a generated name."""
    return "".join(random.choices(NAME_ALPHABET, k=length))


class Stored:
    """One version of one object; never changed. `data` is its JSON, made at most once."""

    __slots__ = ("_data", "object")

    def __init__(self, value: Object) -> None:
        self.object = value
        self._data: bytes | None = None

    @property
    def data(self) -> bytes:
        """The object as JSON."""
        if self._data is None:
            self._data = json.dumps(self.object, separators=(",", ":")).encode()
        return self._data


@dataclass(frozen=True)
class Event:
    """One change: what it was before (None for ADDED) and what it is (or last was) now."""

    version: int
    type: str
    resource: str
    stored: Stored
    before: Stored | None


class Hooks(Protocol):
    """What the API server does around a write; everything runs under the store's lock."""

    def prepare(self, store: Store, resource: str, new: Object, old: Object | None) -> None:
        """Fill defaults and what admission sets, in place."""

    def check(self, store: Store, resource: str, new: Object, old: Object | None) -> None:
        """Raise ApiError where validation or admission refuses."""

    def written(self, store: Store, resource: str, new: Object | None, old: Object | None) -> None:
        """Called after each change (`new` is None when the object is gone)."""


class Subscription:
    """A stream of changes; get() waits for the next one."""

    def __init__(self, store: Store, resources: frozenset[str]) -> None:
        self._store = store
        self.resources = resources
        self.queue: SimpleQueue[Event | None] = SimpleQueue()
        self.closed = False

    def next_event(self, timeout: float | None = None) -> Event | None:
        """The next change as it is stored (do not modify), None after the time or the end."""
        if self.closed:
            return None
        try:
            return self.queue.get(timeout=timeout)
        except Empty:
            return None

    def get(self, timeout: float | None = None) -> tuple[str, Object] | None:
        """The next (type, object), or None when the time is over or the stream was closed."""
        event = self.next_event(timeout)
        return None if event is None else (event.type, copy_json(event.stored.object))

    def close(self) -> None:
        """End the stream; whoever waits in get() returns at once."""
        self._store.unsubscribe(self)
        self.closed = True
        self.queue.put(None)

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        while (item := self.get()) is not None:
            yield item


class Store:
    """A thread-safe object store with resource versions and a watch log.

    `allocate_ip` gives each new Service its cluster IP. Creating a namespace also makes its
    `default` ServiceAccount and `kube-root-ca.crt`; quota status is kept up to date here as well.
    """

    def __init__(
        self,
        *,
        allocate_ip: Callable[[], str] | None = None,
        hooks: Hooks | None = None,
        history: int = 5000,
    ) -> None:
        self.lock = threading.RLock()
        self.version = 1
        self._objects: dict[str, dict[tuple[str, str], Stored]] = {}
        self._log: deque[Event] = deque(maxlen=history)
        self._oldest = 1
        self._subscriptions: list[Subscription] = []
        self._dependents: dict[str, set[Key]] = {}
        self._gone: deque[str] = deque(maxlen=2000)
        self._event_names: dict[tuple[str, ...], str] = {}
        self.pages: dict[str, tuple[Some, int]] = {}  # of lists, what comes after a token
        self.allocate_ip = allocate_ip or _AddressPool().next
        if hooks is None:
            hooks = ClusterHooks()
        self.hooks = hooks
        for name in ("default", "kube-system"):
            self.create("namespaces", {"metadata": {"name": name}})

    # Reading

    def find_stored(self, resource: str, namespace: str | None, name: str) -> Stored | None:
        """The stored version itself, for reading only."""
        return self._objects.get(resource, {}).get((_scope(resource, namespace), name))

    def find(self, resource: str, namespace: str | None, name: str) -> Object | None:
        """A copy of the object, or None."""
        stored = self.find_stored(resource, namespace, name)
        return None if stored is None else copy_json(stored.object)

    def get(self, resource: str, namespace: str | None, name: str) -> Object:
        """A copy of the object; ApiError 404 when there is none."""
        found = self.find(resource, namespace, name)
        if found is None:
            raise not_found(resource, name)
        return found

    def snapshot(self, resource: str, namespace: str | None = None) -> tuple[Some, int]:
        """All stored versions in the order of their names (read only), and the store's version."""
        with self.lock:
            table = self._objects.get(resource, {})
            keys = sorted(key for key in table if not namespace or key[0] == namespace)
            return [table[key] for key in keys], self.version

    def list(
        self,
        resource: str,
        namespace: str | None = None,
        labels: dict[str, str] | None = None,
    ) -> Objects:
        """Copies of the objects of a namespace (None: of all) that carry all these labels."""
        stored, _ = self.snapshot(resource, namespace)
        wanted = (labels or {}).items()
        return [
            copy_json(item.object)
            for item in stored
            if wanted <= (item.object["metadata"].get("labels") or {}).items()
        ]

    def dependents(self, uid: str) -> Keys:
        """(resource, namespace, name) of everything that names this uid as an owner."""
        return sorted(self._dependents.get(uid, ()))

    # Writing

    def create(self, resource: str, obj: Object, *, dry_run: bool = False) -> Object:
        """Store a new object; ApiError 409 AlreadyExists, 403, 404 or 422 when refused."""
        new = copy_json(obj)
        with self.lock:
            self._begin(resource, new)
            self.hooks.prepare(self, resource, new, None)
            self.hooks.check(self, resource, new, None)
            meta = new["metadata"]
            key = (meta.get("namespace", ""), meta["name"])
            if key in self._objects.get(resource, {}):
                raise already_exists(resource, meta["name"])
            if dry_run:
                return new
            self._put("ADDED", resource, new, None)
            self._collect_ownerless(resource, new)
        return copy_json(new)

    def update(
        self,
        resource: str,
        namespace: str | None,
        name: str,
        change: Change,
        *,
        dry_run: bool = False,
        rules: bool = True,
    ) -> Object:
        """Read, change, write under the lock; the result as stored.

        `change` edits the copy it is given or returns another object. A resourceVersion that it
        sets must be the current one, else ApiError 409. Nothing changed: no event, no version.
        """
        with self.lock:
            old = self._require(resource, namespace, name)
            new = self._changed(resource, name, old, change)
            if rules:
                self.hooks.prepare(self, resource, new, old)
                if _spec(resource, new) != _spec(resource, old) and "generation" in old["metadata"]:
                    new["metadata"]["generation"] = old["metadata"]["generation"] + 1
            if new == old:
                return copy_json(old)
            if rules:
                self.hooks.check(self, resource, new, old)
            return copy_json(new) if dry_run else self._replace(resource, new, old)

    # as update(), for status, finalizers and bindings: no defaults, rules or generation
    update_status = partialmethod(update, rules=False)

    def delete(
        self,
        resource: str,
        namespace: str | None,
        name: str,
        grace: int | None = None,
        *,
        propagation: str = "Background",
    ) -> Object | None:
        """Delete; None when it is gone, else the object that still waits for its end.

        A pod on a node gets a deletionTimestamp and is left to the kubelet, which calls remove().
        Objects with finalizers wait for them. Dependents go with their owner, unless
        propagation is `Orphan`; `Foreground` keeps the owner until they are gone.
        """
        with self.lock:
            old = self._require(resource, namespace, name)
            if resource == "namespaces":
                return self._end_namespace(old)
            if propagation == "Orphan":
                self._orphan(old["metadata"]["uid"])
            wait = _grace_of(resource, old, grace)
            new = copy_json(old)
            if propagation == "Foreground" and self._dependents.get(old["metadata"]["uid"]):
                finalizers = new["metadata"].setdefault("finalizers", [])
                if FOREGROUND not in finalizers:
                    finalizers.append(FOREGROUND)
            if not wait and not new["metadata"].get("finalizers"):
                self._drop(resource, old)
                return None
            if not self._mark_deleted(resource, new, old, wait):
                return copy_json(old)
            if FOREGROUND in new["metadata"].get("finalizers", ()):
                self._delete_dependents(old["metadata"]["uid"])
            return self.find(resource, namespace, name)

    def remove(self, resource: str, namespace: str | None, name: str) -> None:
        """Take the object away now, whatever it waits for; nothing happens if it is gone."""
        with self.lock:
            stored = self.find_stored(resource, namespace, name)
            if stored is not None:
                self._drop(resource, stored.object)

    def evict(self, namespace: str, name: str) -> None:
        """What the eviction API does: mark the pod as disrupted, then delete it."""
        condition = {
            "lastProbeTime": None,
            "lastTransitionTime": now(),
            "message": "Eviction API: evicting",
            "reason": "EvictionByEvictionAPI",
            "status": "True",
            "type": "DisruptionTarget",
        }

        def change(pod: Object) -> None:
            conditions = pod.setdefault("status", {}).setdefault("conditions", [])
            if not any(item["type"] == "DisruptionTarget" for item in conditions):
                observed = pod["metadata"].get("generation", 1)
                conditions.append({**condition, "observedGeneration": observed})

        with self.lock:
            self.update_status("pods", namespace, name, change)
            self.delete("pods", namespace, name)

    # Watching

    def subscribe(
        self, resource: str | Iterable[str], from_version: int | None = None
    ) -> Subscription:
        """Changes of one resource (or several) from now on.

        With from_version: those after that version (ApiError 410 when the log is too short);
        without: first an ADDED for everything that is there.
        """
        names = frozenset([resource] if isinstance(resource, str) else resource)
        subscription = Subscription(self, names)
        with self.lock:
            for event in self._backlog(names, from_version):
                subscription.queue.put(event)
            self._subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop feeding a subscription."""
        with self.lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)

    def compact(self) -> None:
        """Forget the watch log, as etcd does in time: older versions then get 410."""
        with self.lock:
            self._log.clear()
            self._oldest = self.version

    # Events

    def record_event(
        self,
        involved: Object,
        kind_type: str,
        reason: str,
        message: str,
        component: str,
        *,
        field_path: str | None = None,
        host: str = "",
    ) -> None:
        """Store a v1 Event about an object; the same again only raises its count.

        Nothing is stored in a namespace that is going or gone.
        `field_path` is for a container (`spec.containers{name}`), `host` for the kubelet's node.
        """
        reference = _reference(involved, field_path)
        same = (
            reference.get("uid", ""),
            field_path or "",
            kind_type,
            reason,
            message,
            component,
        )
        namespace = reference.get("namespace") or "default"
        with self.lock:
            place = self.find_stored("namespaces", None, namespace)
            if place is None or "deletionTimestamp" in place.object["metadata"]:
                return
            name = self._event_names.get(same)
            if name and self.find_stored("events", namespace, name):
                self.update("events", namespace, name, _count_once_more)
                return
            event = _new_event(reference, kind_type, reason, message, component, host)
            event["metadata"]["namespace"] = namespace
            self._event_names[same] = event["metadata"]["name"]
            self.create("events", event)

    # Inside

    def _begin(self, resource: str, new: Object) -> None:
        found = resource_of(resource)
        new.setdefault("apiVersion", found.api_version)
        new.setdefault("kind", found.kind)
        meta = new.setdefault("metadata", {})
        if not found.namespaced:
            meta.pop("namespace", None)
        elif not meta.get("namespace"):
            meta["namespace"] = "default"
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = self._generate(resource, meta)
        meta["uid"] = str(uuid.uuid4())
        meta["creationTimestamp"] = now()
        for field in ("deletionTimestamp", "deletionGracePeriodSeconds", "resourceVersion"):
            meta.pop(field, None)
        if found.generation:
            meta["generation"] = 1

    def _generate(self, resource: str, meta: Object) -> str:
        table = self._objects.get(resource, {})
        while True:
            name = str(meta["generateName"])[:58] + random_suffix()
            if (meta.get("namespace", ""), name) not in table:
                return name

    def _require(self, resource: str, namespace: str | None, name: str) -> Object:
        stored = self.find_stored(resource, namespace, name)
        if stored is None:
            raise not_found(resource, name)
        return stored.object

    def _changed(self, resource: str, name: str, old: Object, change: Change) -> Object:
        new = copy_json(old)
        result = change(new)
        if result is not None:
            new = copy_json(result)
        meta, before = new.setdefault("metadata", {}), old["metadata"]
        asked = meta.get("resourceVersion")
        if asked and asked != before["resourceVersion"]:
            raise conflict(resource, name)
        if meta.get("uid", before["uid"]) != before["uid"]:
            raise conflict(
                resource,
                name,
                f"Precondition failed: UID in precondition: {meta['uid']}, "
                f"UID in object meta: {before['uid']}",
            )
        for field in FIXED_METADATA:
            if field in before:
                meta[field] = before[field]
            else:
                meta.pop(field, None)
        meta["resourceVersion"] = before["resourceVersion"]
        new["apiVersion"], new["kind"] = old["apiVersion"], old["kind"]
        return new

    def _replace(self, resource: str, new: Object, old: Object) -> Object:
        if _may_go(resource, new):
            self._drop(resource, new, old)
        else:
            self._put("MODIFIED", resource, new, old)
        return copy_json(new)

    def _put(self, kind: str, resource: str, new: Object, old: Object | None) -> None:
        meta = new["metadata"]
        self.version += 1
        meta["resourceVersion"] = str(self.version)
        table = self._objects.setdefault(resource, {})
        key = (meta.get("namespace", ""), meta["name"])
        before = table.get(key)
        stored = table[key] = Stored(copy_json(new))
        self._index(resource, key, old, new)
        self._announce(Event(self.version, kind, resource, stored, before))
        self.hooks.written(self, resource, stored.object, old)

    def _drop(self, resource: str, last: Object, old: Object | None = None) -> None:
        meta = last["metadata"]
        key = (meta.get("namespace", ""), meta["name"])
        before = self._objects[resource].pop(key)
        final = copy_json(last)
        self.version += 1
        final["metadata"]["resourceVersion"] = str(self.version)
        self._index(resource, key, old or last, None)
        self._gone.append(meta["uid"])
        self._announce(Event(self.version, "DELETED", resource, Stored(final), before))
        self.hooks.written(self, resource, None, final)
        self._delete_dependents(meta["uid"])
        self._finish_waiting(final)

    def _announce(self, event: Event) -> None:
        if len(self._log) == self._log.maxlen:
            self._oldest = self._log[0].version
        self._log.append(event)
        for subscription in self._subscriptions:
            if event.resource in subscription.resources:
                subscription.queue.put(event)

    def _backlog(self, names: frozenset[str], from_version: int | None) -> Events:
        if from_version is None:
            return [
                Event(self.version, "ADDED", name, stored, None)
                for name in sorted(names)
                for stored in self.snapshot(name)[0]
            ]
        if from_version < self._oldest:
            text = f"too old resource version: {from_version} ({self._oldest})"
            raise ApiError(410, text)
        return [
            event for event in self._log if event.version > from_version and event.resource in names
        ]

    def _index(
        self, resource: str, key: tuple[str, str], old: Object | None, new: Object | None
    ) -> None:
        before = {owner["uid"] for owner in _owners(old)}
        after = {owner["uid"] for owner in _owners(new)}
        for uid in before - after:
            self._dependents.get(uid, set()).discard((resource, *key))
            if not self._dependents.get(uid):
                self._dependents.pop(uid, None)
        for uid in after - before:
            self._dependents.setdefault(uid, set()).add((resource, *key))

    def _mark_deleted(self, resource: str, new: Object, old: Object, wait: int) -> bool:
        """Note the coming end; False when an end as near was noted before."""
        meta, before = new["metadata"], old["metadata"].get("deletionGracePeriodSeconds")
        if "deletionTimestamp" in meta and before is not None and before <= wait:
            return False
        meta["deletionTimestamp"] = now(wait)
        meta["deletionGracePeriodSeconds"] = wait
        if "generation" in meta and before is None:
            meta["generation"] += 1
        self._put("MODIFIED", resource, new, old)
        return True

    def _delete_dependents(self, uid: str) -> None:
        for resource, namespace, name in self.dependents(uid):
            stored = self.find_stored(resource, namespace, name)
            if stored is None or self._has_other_owner(stored.object, uid):
                continue
            self.delete(resource, namespace, name)

    def _has_other_owner(self, obj: Object, uid: str) -> bool:
        return any(owner["uid"] != uid and owner["uid"] not in self._gone for owner in _owners(obj))

    def _orphan(self, uid: str) -> None:
        def release(obj: Object) -> None:
            left = [owner for owner in _owners(obj) if owner["uid"] != uid]
            obj["metadata"]["ownerReferences"] = left
            if not left:
                del obj["metadata"]["ownerReferences"]

        for resource, namespace, name in self.dependents(uid):
            self.update_status(resource, namespace, name, release)

    def _collect_ownerless(self, resource: str, new: Object) -> None:
        """A controller may create for an owner that was deleted a moment ago."""
        owners = _owners(new)
        if owners and all(owner["uid"] in self._gone for owner in owners):
            self.delete(resource, new["metadata"].get("namespace"), new["metadata"]["name"])

    def _finish_waiting(self, gone: Object) -> None:
        """Let owners go that waited for this object, and a namespace that is empty now."""
        for owner in _owners(gone):
            if self._dependents.get(owner["uid"]):
                continue
            for waiting, stored in self._all():
                meta = stored.object["metadata"]
                if meta["uid"] == owner["uid"] and FOREGROUND in meta.get("finalizers", ()):
                    self.update_status(
                        waiting, meta.get("namespace"), meta["name"], _without_foreground
                    )
                    break
        namespace = gone["metadata"].get("namespace")
        stored_namespace = self.find_stored("namespaces", None, namespace or "")
        if stored_namespace and "deletionTimestamp" in stored_namespace.object["metadata"]:
            self._drop_empty_namespace(stored_namespace.object)

    def _all(self) -> Placed:
        return [
            (resource, stored)
            for resource, table in self._objects.items()
            for stored in table.values()
        ]

    def _end_namespace(self, old: Object) -> Object | None:
        """Mark it; its content goes a moment later, as the namespace controller does it."""
        name = old["metadata"]["name"]
        if "deletionTimestamp" not in old["metadata"]:
            new = copy_json(old)
            new["metadata"]["deletionTimestamp"] = now()
            new["status"] = {"phase": "Terminating"}
            self._put("MODIFIED", "namespaces", new, old)
            later = threading.Timer(NAMESPACE_LASTS, self._empty_namespace, (name,))
            later.daemon = True
            later.start()
        return self.find("namespaces", None, name)

    def _empty_namespace(self, name: str) -> None:
        with self.lock:
            for resource, stored in self._all():
                meta = stored.object["metadata"]
                if meta.get("namespace") == name and self.find_stored(resource, name, meta["name"]):
                    self.delete(resource, name, meta["name"])
            left = self.find_stored("namespaces", None, name)
            if left is not None:
                self._drop_empty_namespace(left.object)

    def _drop_empty_namespace(self, namespace: Object) -> bool:
        name = namespace["metadata"]["name"]
        if any(stored.object["metadata"].get("namespace") == name for _, stored in self._all()):
            return False
        if self.find_stored("namespaces", None, name):
            self._drop("namespaces", namespace)
        return True


class _AddressPool:
    """Cluster IPs for a store without a network."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def next(self) -> str:
        while True:
            address = f"10.96.{random.randint(0, 255)}.{random.randint(1, 254)}"
            if address not in self._used:
                self._used.add(address)
                return address


def _scope(resource: str, namespace: str | None) -> str:
    return (namespace or "default") if resource_of(resource).namespaced else ""


def _owners(obj: Object | None) -> Objects:
    return (obj or {}).get("metadata", {}).get("ownerReferences") or []


def _spec(resource: str, obj: Object) -> Any:
    """What counts for the generation: not what the scheduler binds."""
    if resource == "endpointslices":
        return (obj.get("endpoints"), obj.get("ports"))
    spec = obj.get("spec")
    if resource == "deployments":  # of all kinds only here, as the API server's strategy has it
        return (spec, obj["metadata"].get("annotations") or {})
    if resource == "pods" and isinstance(spec, dict):
        return {key: value for key, value in spec.items() if key != "nodeName"}
    return spec


def _grace_of(resource: str, obj: Object, asked: int | None) -> int:
    """How long the object stays after its deletion: only pods on a node do."""
    if resource != "pods" or not obj.get("spec", {}).get("nodeName"):
        return 0
    if obj.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    default = obj["spec"].get("terminationGracePeriodSeconds", 30)
    return int(default if asked is None else max(asked, 0))


def _may_go(resource: str, obj: Object) -> bool:
    meta = obj["metadata"]
    return (
        "deletionTimestamp" in meta
        and resource != "namespaces"
        and not meta.get("finalizers")
        and not meta.get("deletionGracePeriodSeconds")
    )


def _without_foreground(obj: Object) -> None:
    left = [item for item in obj["metadata"]["finalizers"] if item != FOREGROUND]
    obj["metadata"]["finalizers"] = left
    if not left:
        del obj["metadata"]["finalizers"]


def _reference(involved: Object, field_path: str | None) -> Object:
    meta = involved.get("metadata", {})
    found = {
        "apiVersion": involved.get("apiVersion"),
        "fieldPath": field_path,
        "kind": involved.get("kind"),
        "name": meta.get("name"),
        "namespace": meta.get("namespace"),
        "resourceVersion": meta.get("resourceVersion"),
        "uid": meta.get("uid"),
    }
    return {key: value for key, value in found.items() if value}


def _new_event(
    reference: Object, kind_type: str, reason: str, message: str, component: str, host: str
) -> Object:
    stamp = time.time_ns()
    event: Object = {
        "metadata": {"name": f"{reference.get('name', 'cluster')}.{stamp:x}"},
        "involvedObject": reference,
        "reason": reason,
        "message": message,
        "type": kind_type,
        "reportingComponent": component,
    }
    if component == "default-scheduler":
        micro = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        action = "Binding" if reason == "Scheduled" else "Scheduling"
        times: Object = {"action": action, "eventTime": micro, "firstTimestamp": None}
        node = host or "vm"
        times |= {"lastTimestamp": None, "reportingInstance": f"{component}-{node}", "source": {}}
        return {**event, **times}
    source = {"component": component, "host": host} if host else {"component": component}
    times = {"count": 1, "eventTime": None, "firstTimestamp": now(), "lastTimestamp": now()}
    return {**event, **times, "reportingInstance": host, "source": source}


def _count_once_more(event: Object) -> None:
    if "count" in event:
        event["count"] += 1
        event["lastTimestamp"] = now()
    else:
        series = event.setdefault("series", {"count": 1})
        series["count"] += 1
        series["lastObservedTime"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
