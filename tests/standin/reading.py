"""get, list and watch."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from tests.standin import tables
from tests.standin.asked import TRUE, Asked, reply
from tests.standin.errors import ApiError, bad_request, not_found
from tests.standin.faults import Fault, Faults
from tests.standin.httpd import Closed, Response
from tests.standin.resources import Resource
from tests.standin.selectors import Test, both, field_test, label_test
from tests.standin.store import Event, Store, Stored, Subscription

Object = dict[str, Any]
BOOKMARK_EVERY = 60.0
WATCH_LASTS = 1800.0


def selector_of(asked: Asked) -> Test | None:
    """The test for the label and field selectors of a request; None when it has neither."""
    labels, fields = asked.query.get("labelSelector"), asked.query.get("fieldSelector")
    return both(
        label_test(labels) if labels else None,
        field_test(asked.plural, fields) if fields else None,
    )


def _version(asked: Asked) -> int:
    text = asked.query.get("resourceVersion") or "0"
    if not text.isdigit():
        raise bad_request(f'Invalid value: "{text}": strconv.ParseUint: invalid syntax')
    return int(text)


def as_table(asked: Asked, objects: list[Object], version: int | str) -> Object:
    """The objects as the table that was asked for."""
    whole = asked.query.get("includeObject") == "Object"
    return tables.table(asked.plural, objects, str(version), whole=whole)


def get_object(store: Store, asked: Asked) -> Response:
    """One object, its status or its scale."""
    stored = store.find_stored(asked.plural, asked.namespace, asked.name)
    if stored is None:
        raise not_found(asked.plural, asked.name)
    if asked.subresource == "scale":
        return reply(scale_of(asked.plural, stored.object))
    if asked.as_table:
        version = stored.object["metadata"]["resourceVersion"]
        return reply(as_table(asked, [stored.object], version))
    return reply(stored.data)


def scale_of(plural: str, obj: Object) -> Object:
    """The Scale that stands for an object's number of replicas."""
    meta = obj["metadata"]
    selector = (obj["spec"].get("selector") or {}).get("matchLabels") or {}
    shown = ",".join(f"{key}={value}" for key, value in sorted(selector.items()))
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: meta[key] for key in kept},
        "spec": {"replicas": obj["spec"].get("replicas", 0)},
        "status": {"replicas": obj.get("status", {}).get("replicas", 0), "selector": shown},
    }


def list_objects(store: Store, asked: Asked, resource: Resource) -> Response:
    """Every object that the selectors let through, or the next `limit` of them.

    The pages of a list are of one moment: the rest is kept for whoever has the token.
    """
    if token := asked.query.get("continue"):
        if token not in store.pages:
            raise ApiError(410, "The provided continue parameter is too old to display a list.")
        found, version = store.pages.pop(token)
    else:
        found, version = store.snapshot(asked.plural, asked.namespace or None)
        test = selector_of(asked)
        if test is not None:
            found = [stored for stored in found if test(stored.object)]
    if asked.as_table:
        return reply(as_table(asked, [stored.object for stored in found], version))
    head: Object = {
        "kind": f"{resource.kind}List",
        "apiVersion": resource.api_version,
        "metadata": {"resourceVersion": str(version)},
    }
    limit = int(asked.query.get("limit") or 0)
    if 0 < limit < len(found):
        token = uuid.uuid4().hex
        store.pages[token] = found[limit:], version
        head["metadata"] |= {"continue": token, "remainingItemCount": len(found) - limit}
        found = found[:limit]
    start = json.dumps(head, separators=(",", ":")).encode()[:-1]
    return reply(start + b',"items":[' + b",".join(item.data for item in found) + b"]}")


@dataclass
class Watch:
    """One watch over HTTP."""

    store: Store
    faults: Faults
    asked: Asked
    resource: Resource
    fault: Fault | None = None
    _rows: int = 0
    _test: Test | None = None

    def run(self) -> None:
        """Stream events until the time is over or the client leaves."""
        asked, connection = self.asked, self.asked.http.connection
        self._test = selector_of(asked)
        from_version = _version(asked)
        initial = asked.query.get("sendInitialEvents") in TRUE
        state = None if initial or not from_version else from_version
        try:
            with self.store.lock:
                subscription = self.store.subscribe(asked.plural, state)
                first = self.store.version
        except ApiError as error:
            self._refuse(error)
            return
        try:
            connection.on_gone(subscription.close)
            connection.begin_stream()
            self.faults.note(asked.logged(200))
            self._pump(subscription, first if initial else None)
        except Closed:
            return
        finally:
            connection.stop_watching()
            subscription.close()
        connection.end_stream()

    def _refuse(self, error: ApiError) -> None:
        """A version that is forgotten is told inside of the stream, as a real server does."""
        connection = self.asked.http.connection
        connection.begin_stream()
        connection.stop_watching()
        self.faults.note(self.asked.logged(error.code))
        self._send("ERROR", json.dumps(error.status(), separators=(",", ":")).encode())
        connection.end_stream()

    def _pump(self, subscription: Subscription, initial: int | None) -> None:
        lasts = float(self.asked.query.get("timeoutSeconds") or WATCH_LASTS)
        began = time.monotonic()
        silent_from = began + (self.fault.seconds or 0.0) if self.fault else None
        backlog = subscription.queue.qsize() if initial is not None else 0
        if initial is not None:
            for _ in range(backlog):
                self._deliver(subscription.next_event(0))
            self._bookmark(initial, initial_end=True)
        while (left := began + lasts - time.monotonic()) > 0:
            wait = min(left, BOOKMARK_EVERY)
            if silent_from is not None:
                wait = min(wait, max(0.0, silent_from - time.monotonic()))
            event = subscription.next_event(wait)
            if subscription.closed:
                raise Closed
            if silent_from is not None and time.monotonic() >= silent_from:
                self._fall_silent()
            if event is not None:
                self._deliver(event)
            elif wait >= BOOKMARK_EVERY:
                self._bookmark(self.store.version)

    def _fall_silent(self) -> None:
        """Stay open and say nothing, as a connection does that was dropped on its way."""
        if self.fault:
            self.faults.hang(self.asked.http.connection, self.fault, None)
        raise Closed

    def _deliver(self, event: Event | None) -> None:
        if event is None:
            return
        shown = self._shown(event)
        if shown is None:
            return
        kind, stored = shown
        data = stored.data
        if self.asked.as_table:
            version = stored.object["metadata"]["resourceVersion"]
            found = as_table(self.asked, [stored.object], version)
            if self._rows:
                found["columnDefinitions"] = None
            self._rows += 1
            data = json.dumps(found, separators=(",", ":")).encode()
        self._send(kind, data)

    def _shown(self, event: Event) -> tuple[str, Stored] | None:
        """What this watcher sees of a change: objects enter and leave a selection."""
        namespace = event.stored.object["metadata"].get("namespace", "")
        if self.asked.namespace and namespace != self.asked.namespace:
            return None
        if self._test is None:
            return event.type, event.stored
        now = event.type != "DELETED" and self._test(event.stored.object)
        before = event.before is not None and self._test(event.before.object)
        if now:
            return ("MODIFIED" if before else "ADDED"), event.stored
        return ("DELETED", event.stored) if before else None

    def _bookmark(self, version: int, *, initial_end: bool = False) -> None:
        if self.asked.query.get("allowWatchBookmarks") not in TRUE:
            return
        meta: Object = {"resourceVersion": str(version)}
        if initial_end:
            meta["annotations"] = {"k8s.io/initial-events-end": "true"}
        obj = {
            "kind": self.resource.kind,
            "apiVersion": self.resource.api_version,
            "metadata": meta,
        }
        self._send("BOOKMARK", json.dumps(obj, separators=(",", ":")).encode())

    def _send(self, kind: str, data: bytes) -> None:
        line = b'{"type":"' + kind.encode() + b'","object":' + data + b"}\n"
        self.asked.http.connection.write_chunk(line)
