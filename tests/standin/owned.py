"""What controllers read of the objects they own."""

from __future__ import annotations

import math
from typing import Any

from tests.standin.store import Store, copy_json

Object = dict[str, Any]
REPLICA_SET_HASH = "pod-template-hash"


def controller_of(obj: Object) -> Object | None:
    """The owner reference of the object's controller, or None."""
    for owner in obj["metadata"].get("ownerReferences") or []:
        if owner.get("controller"):
            return dict(owner)
    return None


def owned(store: Store, owner: Object, resource: str) -> list[Object]:
    """Objects of that resource that this one controls (read only), by name."""
    uid = owner["metadata"]["uid"]
    found = []
    for kind, namespace, name in store.dependents(uid):
        stored = store.find_stored(kind, namespace, name) if kind == resource else None
        if stored is None:
            continue
        controller = controller_of(stored.object)
        if controller is not None and controller["uid"] == uid:
            found.append(stored.object)
    return found


def owner_reference(owner: Object) -> Object:
    """A reference that makes this object the controller of another."""
    return {
        "apiVersion": owner["apiVersion"],
        "blockOwnerDeletion": True,
        "controller": True,
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
    }


def pod_from(owner: Object, template: Object, **metadata: Any) -> Object:
    """A new pod of this owner's template."""
    meta = template.get("metadata") or {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            **{key: copy_json(meta[key]) for key in ("labels", "annotations") if meta.get(key)},
            "generateName": f"{owner['metadata']['name']}-",
            "namespace": owner["metadata"]["namespace"],
            "ownerReferences": [owner_reference(owner)],
            **metadata,
        },
        "spec": copy_json(template["spec"]),
    }


def is_ready(pod: Object) -> bool:
    """Whether the pod's Ready condition holds."""
    return any(
        item["type"] == "Ready" and item["status"] == "True"
        for item in pod.get("status", {}).get("conditions") or []
    )


def is_deleted(obj: Object) -> bool:
    """Whether its deletion has begun."""
    return "deletionTimestamp" in obj["metadata"]


def phase(pod: Object) -> str:
    """The pod's phase."""
    return str(pod.get("status", {}).get("phase", "Pending"))


def is_finished(pod: Object) -> bool:
    """Whether the pod has come to its end."""
    return phase(pod) in ("Succeeded", "Failed")


def share(value: int | str, total: int, *, up: bool) -> int:
    """A number, or a percentage of the total, rounded."""
    if isinstance(value, str) and value.endswith("%"):
        part = total * int(value[:-1]) / 100
        return math.ceil(part) if up else math.floor(part)
    return int(value)
