"""The EndpointSlice controller: which pods stand behind a Service."""

from __future__ import annotations

from typing import Any

from tests.standin.owned import is_deleted, is_finished, is_ready, owned, owner_reference
from tests.standin.store import Store, now

Object = dict[str, Any]
MANAGER = "endpointslice-controller.k8s.io"
SERVICE_LABEL = "kubernetes.io/service-name"


class EndpointSliceController:
    """Keeps one slice for each Service that has a selector."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def reconcile(self, namespace: str, name: str) -> float | None:
        """Write the slice as the pods are now."""
        stored = self._store.find_stored("services", namespace, name)
        if stored is None or is_deleted(stored.object):
            return None
        service = stored.object
        selector = service["spec"].get("selector")
        if not selector:
            return None
        pods = [
            item.object
            for item in self._store.snapshot("pods", namespace)[0]
            if selector.items() <= (item.object["metadata"].get("labels") or {}).items()
            and item.object.get("status", {}).get("podIP")
            and not is_finished(item.object)
        ]
        endpoints = [_endpoint(pod) for pod in pods] or None
        ports = _ports(service, pods) if pods else None
        self._write(service, endpoints, ports)
        return None

    def _write(self, service: Object, endpoints: Any, ports: Any) -> None:
        meta = service["metadata"]
        slices = [
            item
            for item in owned(self._store, service, "endpointslices")
            if (item["metadata"].get("labels") or {}).get(SERVICE_LABEL) == meta["name"]
        ]
        if not slices:
            self._store.create("endpointslices", _slice(service, endpoints, ports))
            return

        def change(stored: Object) -> None:
            if stored.get("endpoints") == endpoints and stored.get("ports") == ports:
                return
            stored["endpoints"], stored["ports"] = endpoints, ports
            # Only pods (and the Service's birth) trigger a change, so none is noted without them.
            stored["metadata"].pop("annotations", None)
            if endpoints:
                stored["metadata"]["annotations"] = _trigger()

        found = slices[0]["metadata"]
        self._store.update("endpointslices", found["namespace"], found["name"], change)


def _trigger() -> dict[str, str]:
    return {"endpoints.kubernetes.io/last-change-trigger-time": now()}


def _slice(service: Object, endpoints: Any, ports: Any) -> Object:
    meta = service["metadata"]
    return {
        "addressType": "IPv4",
        "endpoints": endpoints,
        "metadata": {
            "annotations": _trigger(),
            "generateName": f"{meta['name']}-",
            "labels": {
                **(meta.get("labels") or {}),
                "endpointslice.kubernetes.io/managed-by": MANAGER,
                SERVICE_LABEL: meta["name"],
            },
            "namespace": meta["namespace"],
            "ownerReferences": [owner_reference(service)],
        },
        "ports": ports,
    }


def _endpoint(pod: Object) -> Object:
    meta, ready, ending = pod["metadata"], is_ready(pod), is_deleted(pod)
    return {
        "addresses": [pod["status"]["podIP"]],
        "conditions": {"ready": ready and not ending, "serving": ready, "terminating": ending},
        "nodeName": pod["spec"].get("nodeName", ""),
        "targetRef": {
            "kind": "Pod",
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
        },
    }


def _ports(service: Object, pods: list[Object]) -> list[Object]:
    """The Service's ports as numbers of the pods; names are looked up in the first that has them.

    Pods that give one name different numbers would need a slice each; that is not modelled.
    """
    found = []
    for port in service["spec"].get("ports") or []:
        target = port.get("targetPort", port["port"])
        number = target if isinstance(target, int) else _named(target, pods)
        if number is not None:
            protocol = port.get("protocol", "TCP")
            found.append({"name": port.get("name", ""), "port": number, "protocol": protocol})
    return found


def _named(name: str, pods: list[Object]) -> int | None:
    for pod in pods:
        for container in pod["spec"]["containers"]:
            for port in container.get("ports") or []:
                if port.get("name") == name:
                    return int(port["containerPort"])
    return int(name) if name.isdigit() else None
