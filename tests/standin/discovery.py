"""What the API server tells about itself: groups, resources, version, OpenAPI."""

from __future__ import annotations

import hashlib
import json
import time
from email.utils import formatdate
from functools import cache
from typing import Any

from tests.standin.resources import RESOURCES, Resource

VERSION = {
    "major": "1",
    "minor": "36",
    "emulationMajor": "1",
    "emulationMinor": "36",
    "minCompatibilityMajor": "1",
    "minCompatibilityMinor": "35",
    "gitVersion": "v1.36.2",
    "gitCommit": "$Format:%H$",
    "gitTreeState": "",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "go1.27.3",
    "compiler": "gc",
    "platform": "linux/amd64",
}
AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
_SUBRESOURCE_KINDS = {
    "scale": ("autoscaling", "v1", "Scale"),
    "eviction": ("policy", "v1", "Eviction"),
    "binding": ("", "v1", "Binding"),
}
_SUBRESOURCE_VERBS = {"log": ["get"], "eviction": ["create"], "binding": ["create"]}


@cache
def groups() -> dict[str, list[str]]:
    """The versions of each named group, in the order in which they are listed."""
    found: dict[str, list[str]] = {}
    for resource in RESOURCES:
        if resource.group and resource.version not in found.setdefault(resource.group, []):
            found[resource.group].append(resource.version)
    return found


def api_versions(address: str) -> dict[str, Any]:
    """The answer to /api."""
    where = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": where}


def api_groups() -> dict[str, Any]:
    """The answer to /apis."""
    listed = [_group(name, versions) for name, versions in groups().items()]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}


def _group(name: str, versions: list[str]) -> dict[str, Any]:
    found = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": found, "preferredVersion": found[0]}


def resource_list(group: str, version: str) -> dict[str, Any] | None:
    """The answer to /api/v1 or /apis/GROUP/VERSION; None when nothing is served there."""
    served = [item for item in RESOURCES if (item.group, item.version) == (group, version)]
    if not served:
        return None
    listed = [entry for item in served for entry in _entries(item)]
    full = f"{group}/{version}" if group else version
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": full,
        "resources": listed,
    }


def _entries(resource: Resource) -> list[dict[str, Any]]:
    main: dict[str, Any] = {
        "name": resource.name,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": list(resource.verbs),
    }
    if resource.short:
        main["shortNames"] = list(resource.short)
    if resource.in_all:
        main["categories"] = ["all"]
    return [main, *(_subresource(resource, name) for name in resource.subresources)]


def _subresource(resource: Resource, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": f"{resource.name}/{name}",
        "singularName": "",
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": _SUBRESOURCE_VERBS.get(name, ["get", "patch", "update"]),
    }
    if name in _SUBRESOURCE_KINDS:
        group, version, kind = _SUBRESOURCE_KINDS[name]
        entry |= {"group": group, "version": version, "kind": kind}
    return entry


def aggregated(path: str) -> dict[str, Any]:
    """The answer to /api or /apis in the aggregated form that kubectl asks for first."""
    wanted = {"": ["v1"]} if path == "/api" else groups()
    items = [
        {
            "metadata": {"name": name, "creationTimestamp": None} if name else {},
            "versions": [_aggregated_version(name, version) for version in versions],
        }
        for name, versions in wanted.items()
    ]
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": items,
    }


def _aggregated_version(group: str, version: str) -> dict[str, Any]:
    served = [item for item in RESOURCES if (item.group, item.version) == (group, version)]
    resources = []
    for item in served:
        entry: dict[str, Any] = {
            "resource": item.name,
            "responseKind": {"group": item.group, "version": item.version, "kind": item.kind},
            "scope": "Namespaced" if item.namespaced else "Cluster",
            "singularResource": item.kind.lower(),
            "verbs": list(item.verbs),
        }
        if item.short:
            entry["shortNames"] = list(item.short)
        if item.in_all:
            entry["categories"] = ["all"]
        if item.subresources:
            entry["subresources"] = [_aggregated_sub(item, name) for name in item.subresources]
        resources.append(entry)
    return {"version": version, "resources": resources, "freshness": "Current"}


def _aggregated_sub(resource: Resource, name: str) -> dict[str, Any]:
    own = (resource.group, resource.version, resource.kind)
    group, version, kind = _SUBRESOURCE_KINDS.get(name, own)
    return {
        "subresource": name,
        "responseKind": {"group": group, "version": version, "kind": kind},
        "verbs": _SUBRESOURCE_VERBS.get(name, ["get", "patch", "update"]),
    }


def immutable() -> tuple[tuple[str, str], ...]:
    """Headers of a document that never changes under its URL, so that kubectl keeps it on disk."""
    return (
        ("Cache-Control", "public, immutable"),
        ("Date", formatdate(usegmt=True)),
        ("Expires", formatdate(time.time() + 365 * 86400, usegmt=True)),
    )


@cache
def openapi_index() -> dict[str, Any]:
    """The answer to /openapi/v3."""
    paths = ["api/v1", *(f"apis/{name}/{found[0]}" for name, found in groups().items())]
    found = {}
    for path in paths:
        digest = hashlib.sha256(openapi(path) or b"").hexdigest().upper()
        found[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={digest}"}
    return {"paths": found}


@cache
def openapi(path: str) -> bytes | None:
    """The OpenAPI document of one group and version.

    It says only what kubectl looks up before it sends something: which operations take
    fieldValidation. How kinds merge kubectl knows by itself.
    """
    group, _, version = path.removeprefix("apis/").rpartition("/")
    group = "" if path == "api/v1" else group
    found: dict[str, Any] = {}
    for resource in RESOURCES:
        if (resource.group, resource.version) == (group, version):
            found |= _paths(resource, f"/{path}")
    if not found:
        return None
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return json.dumps({"openapi": "3.0.0", "info": info, "paths": found}).encode()


def _paths(resource: Resource, root: str) -> dict[str, Any]:
    query = [
        {"in": "query", "name": name, "schema": {"type": "string", "uniqueItems": True}}
        for name in ("dryRun", "fieldManager", "fieldValidation")
    ]
    kind = {"group": resource.group, "kind": resource.kind, "version": resource.version}
    operation = {
        "parameters": query,
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-group-version-kind": kind,
    }
    place = f"{root}/namespaces/{{namespace}}" if resource.namespaced else root
    return {
        f"{place}/{resource.name}": {
            "post": {**operation, "x-kubernetes-action": "post"},
        },
        f"{place}/{resource.name}/{{name}}": {
            "patch": {**operation, "x-kubernetes-action": "patch"},
            "put": {**operation, "x-kubernetes-action": "put"},
        },
    }
