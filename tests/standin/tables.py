"""The tables that a plain `kubectl get` prints."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
Cell = str | int
Rows = Callable[[Object], list[Cell]]


def _seconds_since(stamp: str | None, until: str | None = None) -> float | None:
    if not stamp:
        return None
    end = datetime.fromisoformat(until) if until else datetime.now(UTC)
    return max(0.0, (end - datetime.fromisoformat(stamp)).total_seconds())


def human(seconds: float | None) -> str:
    """A duration as kubectl shows it."""
    if seconds is None:
        return "<unknown>"
    whole = int(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes < 2:
        return f"{whole}s"
    if minutes < 10:
        return f"{minutes}m{whole % 60}s" if whole % 60 else f"{minutes}m"
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    return f"{days}d"


def age(obj: Object) -> str:
    """How long the object has existed."""
    return human(_seconds_since(obj["metadata"].get("creationTimestamp")))


def _container_reason(state: Object) -> str:
    if "waiting" in state:
        return str(state["waiting"].get("reason") or "")
    ended = state.get("terminated")
    if not ended:
        return ""
    if ended.get("reason"):
        return str(ended["reason"])
    signal = ended.get("signal")
    return f"Signal:{signal}" if signal else f"ExitCode:{ended.get('exitCode', 0)}"


def _init_reason(pod: Object, reason: str) -> tuple[str, bool]:
    """The status of pods whose init containers are not through, as kubectl words it."""
    specs = {item["name"]: item for item in pod["spec"].get("initContainers") or ()}
    statuses = pod.get("status", {}).get("initContainerStatuses") or ()
    for at, status in enumerate(statuses):
        state = status.get("state") or {}
        side_car = specs.get(status["name"], {}).get("restartPolicy") == "Always"
        ended = state.get("terminated")
        if (ended and ended.get("exitCode") == 0) or (side_car and status.get("started")):
            continue
        if ended:
            return f"Init:{_container_reason(state)}", True
        waiting = (state.get("waiting") or {}).get("reason")
        if waiting and waiting != "PodInitializing":
            return f"Init:{waiting}", True
        return f"Init:{at}/{len(specs)}", True
    return reason, False


def pod_status(pod: Object) -> str:
    """What stands in the STATUS column of a pod."""
    status = pod.get("status", {})
    reason = str(status.get("reason") or status.get("phase") or "Unknown")
    if any(
        item["type"] == "PodScheduled" and item.get("reason") == "SchedulingGated"
        for item in status.get("conditions") or ()
    ):
        reason = "SchedulingGated"
    reason, initialising = _init_reason(pod, reason)
    if not initialising:
        running = False
        for item in reversed(status.get("containerStatuses") or ()):
            state = item.get("state") or {}
            reason = _container_reason(state) or reason
            running = running or bool(item.get("ready") and "running" in state)
        if reason == "Completed" and running:
            reason = "Running" if _is_ready(pod) else "NotReady"
    if pod["metadata"].get("deletionTimestamp"):
        return "Unknown" if status.get("reason") == "NodeLost" else "Terminating"
    return reason


def _is_ready(pod: Object) -> bool:
    return any(
        item["type"] == "Ready" and item["status"] == "True"
        for item in pod.get("status", {}).get("conditions") or ()
    )


def _pod(pod: Object) -> list[Cell]:
    status = pod.get("status", {})
    items = status.get("containerStatuses") or []
    side_cars = [
        item["name"]
        for item in pod["spec"].get("initContainers") or ()
        if item.get("restartPolicy") == "Always"
    ]
    for item in status.get("initContainerStatuses") or ():
        if item["name"] in side_cars:
            items = [*items, item]
    total = len(pod["spec"].get("containers", ())) + len(side_cars)
    ready = sum(1 for item in items if item.get("ready"))
    restarts = sum(item.get("restartCount", 0) for item in items)
    ends = [
        item["lastState"]["terminated"].get("finishedAt")
        for item in items
        if (item.get("lastState") or {}).get("terminated")
    ]
    ago = f" ({human(_seconds_since(max(ends)))} ago)" if restarts and any(ends) else ""
    return [f"{ready}/{total}", pod_status(pod), f"{restarts}{ago}", age(pod)]


def _job(job: Object) -> list[Cell]:
    status, spec = job.get("status", {}), job["spec"]
    done = [item["type"] for item in status.get("conditions") or () if item["status"] == "True"]
    state = "Running"
    for name, shown in (
        ("Complete", "Complete"),
        ("Failed", "Failed"),
        ("Suspended", "Suspended"),
        ("FailureTarget", "FailureTarget"),
        ("SuccessCriteriaMet", "SuccessCriteriaMet"),
    ):
        if name in done:
            state = shown
            break
    if state == "Running" and job["metadata"].get("deletionTimestamp"):
        state = "Terminating"
    completions = spec.get("completions")
    if completions is None:
        parallel = spec.get("parallelism") or 0
        completions = f"1 of {parallel}" if parallel > 1 else "1"
    lasted = _seconds_since(status.get("startTime"), status.get("completionTime"))
    duration = human(lasted) if status.get("startTime") else ""
    return [state, f"{status.get('succeeded', 0)}/{completions}", duration, age(job)]


def _deployment(obj: Object) -> list[Cell]:
    status = obj.get("status", {})
    return [
        f"{status.get('readyReplicas', 0)}/{obj['spec'].get('replicas', 0)}",
        status.get("updatedReplicas", 0),
        status.get("availableReplicas", 0),
        age(obj),
    ]


def _replicaset(obj: Object) -> list[Cell]:
    status = obj.get("status", {})
    wanted = obj["spec"].get("replicas", 0)
    return [wanted, status.get("replicas", 0), status.get("readyReplicas", 0), age(obj)]


def _service(obj: Object) -> list[Cell]:
    spec = obj["spec"]
    ports = ",".join(
        f"{port['port']}:{port['nodePort']}/{port['protocol']}"
        if port.get("nodePort")
        else f"{port['port']}/{port.get('protocol', 'TCP')}"
        for port in spec.get("ports") or ()
    )
    external = ",".join(spec.get("externalIPs") or ())
    if not external:
        external = "<pending>" if spec.get("type") == "LoadBalancer" else "<none>"
    if spec.get("type") == "ExternalName":
        external = spec.get("externalName", "")
    address = spec.get("clusterIP") or "<none>"
    return [spec.get("type", "ClusterIP"), address, external, ports or "<none>", age(obj)]


def _event(obj: Object) -> list[Cell]:
    involved = obj.get("involvedObject", {})
    first = obj.get("firstTimestamp") or obj.get("eventTime")
    last = (obj.get("series") or {}).get("lastObservedTime") or obj.get("lastTimestamp") or first
    seen = human(_seconds_since(last))
    count = (obj.get("series") or {}).get("count") or obj.get("count") or 1
    if count > 1:
        seen = f"{seen} (x{count} over {human(_seconds_since(first))})"
    about = f"{involved.get('kind', '').lower()}/{involved.get('name', '')}"
    return [
        seen,
        obj.get("type", ""),
        obj.get("reason", ""),
        about,
        str(obj.get("message", "")).strip(),
    ]


def _endpointslice(obj: Object) -> list[Cell]:
    ports = ",".join(str(port.get("port", "*")) for port in obj.get("ports") or ()) or "<unset>"
    found = [item for end in obj.get("endpoints") or () for item in end["addresses"]]
    shown = ",".join(found[:3]) + (f" + {len(found) - 3} more..." if len(found) > 3 else "")
    return [obj.get("addressType", ""), ports, shown or "<unset>", age(obj)]


def _quota(obj: Object) -> list[Cell]:
    status = obj.get("status", {})
    hard, used = status.get("hard") or {}, status.get("used") or {}

    def shown(wanted: Callable[[str], bool]) -> str:
        return ", ".join(
            f"{name}: {used.get(name, '0')}/{hard[name]}" for name in sorted(hard) if wanted(name)
        )

    limits = shown(lambda name: name.startswith("limits."))
    return [shown(lambda name: not name.startswith("limits.")), limits, age(obj)]


def _ingress(obj: Object) -> list[Cell]:
    spec = obj.get("spec", {})
    hosts = [rule.get("host", "*") for rule in spec.get("rules") or ()] or ["*"]
    ports = "80, 443" if spec.get("tls") else "80"
    found = (obj.get("status", {}).get("loadBalancer") or {}).get("ingress") or ()
    address = ",".join(item.get("ip") or item.get("hostname", "") for item in found)
    shown = ",".join(hosts[:3]) + (f" + {len(hosts) - 3} more..." if len(hosts) > 3 else "")
    return [spec.get("ingressClassName") or "<none>", shown, address, ports, age(obj)]


def _binding(obj: Object) -> list[Cell]:
    reference = obj.get("roleRef", {})
    return [f"{reference.get('kind')}/{reference.get('name')}", age(obj)]


def _netpol(obj: Object) -> list[Cell]:
    labels = (obj.get("spec", {}).get("podSelector") or {}).get("matchLabels") or {}
    return [_pairs(labels), age(obj)]


def _node(obj: Object) -> list[Cell]:
    ready = any(
        item["type"] == "Ready" and item["status"] == "True"
        for item in obj.get("status", {}).get("conditions") or ()
    )
    version = (obj.get("status", {}).get("nodeInfo") or {}).get("kubeletVersion", "")
    return ["Ready" if ready else "NotReady", "<none>", age(obj), version]


def _images(obj: Object) -> list[Cell]:
    spec = obj["spec"]
    containers = spec["template"]["spec"]["containers"]
    names = ",".join(item["name"] for item in containers)
    images = ",".join(item["image"] for item in containers)
    labels = (spec.get("selector") or {}).get("matchLabels") or {}
    return [names, images, _pairs(labels)]


def _pairs(labels: Object) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items())) or "<none>"


def _where(pod: Object) -> list[Cell]:
    address = pod.get("status", {}).get("podIP") or "<none>"
    return [address, pod["spec"].get("nodeName") or "<none>", "<none>", "<none>"]


# What `-o wide` adds.
_WIDE: dict[str, tuple[tuple[str, ...], Rows]] = {
    "pods": (("IP", "Node", "Nominated Node", "Readiness Gates"), _where),
    "jobs": (("Containers", "Images", "Selector"), _images),
    "deployments": (("Containers", "Images", "Selector"), _images),
    "replicasets": (("Containers", "Images", "Selector"), _images),
    "services": (("Selector",), lambda obj: [_pairs(obj["spec"].get("selector") or {})]),
}
_WITHOUT_NAME = frozenset({"events"})
_TABLES: dict[str, tuple[tuple[str, ...], Rows]] = {
    "pods": (("Ready", "Status", "Restarts", "Age"), _pod),
    "jobs": (("Status", "Completions", "Duration", "Age"), _job),
    "deployments": (("Ready", "Up-to-date", "Available", "Age"), _deployment),
    "replicasets": (("Desired", "Current", "Ready", "Age"), _replicaset),
    "services": (("Type", "Cluster-IP", "External-IP", "Port(s)", "Age"), _service),
    "configmaps": (("Data", "Age"), lambda obj: [_count(obj, "data", "binaryData"), age(obj)]),
    "secrets": (
        ("Type", "Data", "Age"),
        lambda obj: [obj.get("type", "Opaque"), _count(obj, "data"), age(obj)],
    ),
    "serviceaccounts": (
        ("Secrets", "Age"),
        lambda obj: [_count(obj, "secrets"), age(obj)],
    ),
    "events": (("Last Seen", "Type", "Reason", "Object", "Message"), _event),
    "namespaces": (
        ("Status", "Age"),
        lambda obj: [obj.get("status", {}).get("phase", ""), age(obj)],
    ),
    "endpointslices": (("AddressType", "Ports", "Endpoints", "Age"), _endpointslice),
    "resourcequotas": (("Request", "Limit", "Age"), _quota),
    "limitranges": (
        ("Created At",),
        lambda obj: [obj["metadata"].get("creationTimestamp", "")],
    ),
    "roles": (("Created At",), lambda obj: [obj["metadata"].get("creationTimestamp", "")]),
    "clusterroles": (("Created At",), lambda obj: [obj["metadata"].get("creationTimestamp", "")]),
    "rolebindings": (("Role", "Age"), _binding),
    "clusterrolebindings": (("Role", "Age"), _binding),
    "ingresses": (("Class", "Hosts", "Address", "Ports", "Age"), _ingress),
    "networkpolicies": (("Pod-Selector", "Age"), _netpol),
    "nodes": (("Status", "Roles", "Age", "Version"), _node),
    "leases": (
        ("Holder", "Age"),
        lambda obj: [obj.get("spec", {}).get("holderIdentity", ""), age(obj)],
    ),
}


def _count(obj: Object, *fields: str) -> int:
    return sum(len(obj.get(field) or ()) for field in fields)


def table(resource: str, objects: list[Object], version: str, *, whole: bool) -> Object:
    """A meta.k8s.io/v1 Table of the objects; `whole` puts the objects themselves in the rows."""
    columns, cells = _TABLES.get(resource, (("Age",), lambda obj: [age(obj)]))
    more, extra = _WIDE.get(resource, ((), lambda _: []))
    named = resource not in _WITHOUT_NAME
    definitions = [_column(name) for name in (("Name", *columns) if named else columns)]
    definitions += [{**_column(name), "priority": 1} for name in more]
    rows = []
    for obj in objects:
        values = [*cells(obj), *extra(obj)]
        shown = obj if whole else _partial(obj)
        row = [obj["metadata"]["name"], *values] if named else values
        rows.append({"cells": row, "object": shown})
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": version},
        "columnDefinitions": definitions,
        "rows": rows,
    }


def _column(name: str) -> Object:
    style = "name" if name == "Name" else ""
    return {"name": name, "type": "string", "format": style, "description": name, "priority": 0}


def _partial(obj: Object) -> Object:
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": obj["metadata"],
    }
