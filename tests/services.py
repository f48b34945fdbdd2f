"""Two Services that differ in every field that a switch carries, and what others see of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.fleet import Member
from tests.world import Object

OURS = "gitops-hook/"
NARROW: Object = {
    "labels": {"team": "a", "only-narrow": "1"},
    "annotations": {"example.com/note": "narrow", "example.com/only-narrow": "1"},
    "spec": {
        "ports": [
            {"name": "http", "port": 80, "targetPort": "http", "appProtocol": "http"},
            {"name": "admin", "port": 81, "targetPort": 8080},
        ],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
        "trafficDistribution": "PreferClose",
    },
}
WIDE: Object = {
    "labels": {"team": "b", "only-wide": "1"},
    "annotations": {"example.com/note": "wide", "example.com/only-wide": "1"},
    "spec": {
        "ports": [
            {"name": "http", "port": 80, "targetPort": 8080, "appProtocol": "kubernetes.io/h2c"},
            {"name": "metrics", "port": 82, "targetPort": "http"},
        ],
        "internalTrafficPolicy": "Local",
        "trafficDistribution": "PreferSameNode",
    },
}
Change = Callable[[dict[str, Object]], None]


def with_service(fields: Object, **spec: Any) -> Change:
    """Return a change that gives the Service labels, annotations and fields of its spec."""

    def change(objects: dict[str, Object]) -> None:
        service = objects["Service"]
        service["metadata"] |= {key: fields.get(key, {}) for key in ("labels", "annotations")}
        service["spec"] |= {**fields.get("spec", {}), **spec}

    return change


def seen(app: Member, name: str = "") -> Object:
    """Return what others see of a live Service: all but the selector and what is ours."""
    service = app.service(name)
    texts = {
        part: {k: v for k, v in service["metadata"][part].items() if not k.startswith(OURS)}
        for part in ("labels", "annotations")
    }
    return {**texts, **{k: v for k, v in service["spec"].items() if k != "selector"}}


def holds(app: Member, fields: Object) -> bool:
    """Whether a live Service has the labels, annotations and fields of its manifest."""
    service = seen(app)
    ports = [{k: v for k, v in p.items() if k != "protocol"} for p in service["ports"]]
    texts = all(fields[part].items() <= service[part].items() for part in ("labels", "annotations"))
    rest = {key: value for key, value in fields["spec"].items() if key != "ports"}
    same = {key: service.get(key) for key in rest} == rest
    return ports == fields["spec"]["ports"] and texts and same
