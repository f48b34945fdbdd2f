"""Every field of the API's schemas is kept by rendering, set as the table says, or refused.

A field that a newer Kubernetes brings is among them as soon as the schemas are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import pytest

from gitops_hook import MIN_READY_SECONDS, App, Placement, StageError, render
from tests.schemas import document
from tests.test_app_manifests import (
    BUILT,
    IMAGE,
    RUN,
    Manifest,
    Object,
    app_of,
    checked_objects,
    objects,
)

SCHEMAS = {"Deployment": "deployment-apps-v1", "Service": "service-v1", "ConfigMap": "configmap-v1"}
LIST = "[]"
# What rendering reads must have a sense, and so must what is compared with the environment.
VALUES = {"namespace": "production", "targetPort": "http"}
SHAPELESS = "not well formed"
# What rendering sets, by field: `Pod` stands for the template, and `*` for anything in between.
# Every other field is as the commit has it. The README has this table.
SET_FIELDS = {
    "Deployment.metadata.name": "`APP-blue` or `APP-green`",
    "*.metadata.namespace": "the namespace of the environment",
    "*.metadata.labels": "yours, `gitops-hook/*`, `app.kubernetes.io/managed-by` and the colour",
    "*.metadata.annotations": "yours and `gitops-hook/*`",
    "Deployment.spec.selector": "`gitops-hook/app` and the colour",
    "Deployment.spec.replicas": (
        "as many as the live version has, if you say nothing or have an autoscaler"
    ),
    "Deployment.spec.progressDeadlineSeconds": (
        "the longest of yours, `deploy.rollout_timeout` and 20 s for each replica"
    ),
    "Deployment.spec.paused": "`false`",
    "Deployment.spec.minReadySeconds": f"{MIN_READY_SECONDS} if you say nothing",
    "Deployment.spec.revisionHistoryLimit": "3 if you say nothing",
    "Deployment.spec.strategy": "`maxSurge: 1` and `maxUnavailable: 0` if you say nothing",
    "Pod.metadata.labels": (
        "yours, those of the Deployment's selector and `gitops-hook/run`; "
        "`app.kubernetes.io/managed-by` if you say nothing; the colour is `version`, or "
        "`gitops-hook/colour` if you use `version`"
    ),
    "Pod.spec.containers.image": (
        "the built image, by digest, for `build.image` and for the app's name; "
        "for the image of the app's only container, if its pod names neither"
    ),
    "Pod.spec.containers.readinessProbe": "`deploy.health.path`, if set and you say nothing",
    "Pod.spec.containers.lifecycle.preStop": "a sleep of 5 s if you say nothing",
    "Pod.spec.*.configMap*.name": "the name of the ConfigMap's copy",
    "Pod.spec.topologySpreadConstraints.labelSelector.matchLabels": (
        "yours and the colour, if it selects the app's pods"
    ),
    "Pod.spec.affinity.podAntiAffinity.*.labelSelector.matchLabels": (
        "the same; of a required term `gitops-hook/app` too, and it must select the app's pods"
    ),
    "Service.spec.selector": "`gitops-hook/app`, `gitops-hook/run` and the colour",
    "ConfigMap.metadata.name": "yours with a hash of the content",
    "ConfigMap.immutable": "`true`",
}

Path = tuple[str, ...]


def resolved(schema: Object) -> Object:
    """A schema, or what it refers to."""
    while "$ref" in schema:
        schema = document("_definitions")["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def children(schema: Object) -> dict[str, Object]:
    """What may stand below a field: by its name, or as an element of a list."""
    schema = resolved(schema)
    below = {LIST: schema["items"]} if "items" in schema else {}
    return {**below, **schema.get("properties", {})}


def paths(schema: Object, path: Path) -> Iterator[Path]:
    """Every field that a schema describes."""
    yield path
    for name, child in children(schema).items():
        yield from paths(child, (*path, name))


def sample(schema: Object) -> Any:
    """A value that says something: what must be in it, or else its first field."""
    schema = resolved(schema)
    kinds = schema.get("type") or "string"
    kind = kinds if isinstance(kinds, str) else kinds[0]
    if kind == "array":
        return [sample(schema["items"])]
    if kind == "object" and schema.get("properties"):
        below: Object = schema["properties"]
        # every container needs an image, although its schema does not say so
        needed = {*schema.get("required", ()), *({"image"} & below.keys())} or {min(below)}
        return {name: sample(below[name]) for name in needed}
    if kind == "object":
        return {"key": sample(schema.get("additionalProperties") or {"type": "string"})}
    return {"integer": 7, "number": 7, "boolean": True}.get(kind, "x")


def merged(one: Any, other: Any) -> Any:
    """Mappings with the keys of both; of any other values, the second."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    return {**one, **{key: merged(one.get(key), value) for key, value in other.items()}}


def put(target: Any, schema: Object, path: Path) -> None:
    """Set the field at the end of a path, and what must stand beside it, to a sample."""
    name, *rest = path
    child = children(schema)[name]
    if name == LIST:
        target[:] = target or [sample(child)]
        if rest:
            put(target[0], child, tuple(rest))
    elif not rest:
        target[name] = merged(target.get(name), VALUES.get(name, sample(child)))
    else:
        needed = "required" in resolved(child)
        empty: Any = [] if rest[0] == LIST else sample(child) if needed else {}
        put(target.setdefault(name, empty), child, tuple(rest))


def folder() -> list[Object]:
    """Manifests in which everything that rendering can set is set."""
    items = objects()
    items[0]["metadata"]["namespace"] = "production"
    items[0]["spec"].pop("replicas", None)
    pod = items[0]["spec"]["template"]["spec"]
    pod["containers"][0].pop("readinessProbe", None)
    pod["initContainers"] = [{"name": "init", "image": IMAGE}]
    term = {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "shop"}}}
    pod["topologySpreadConstraints"] = [term]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    pod["affinity"] = copy.deepcopy({"podAntiAffinity": required})
    return items


def differences(written: Any, rendered: Any, path: str) -> Iterator[str]:
    """The paths of what rendering has added, changed or left out."""
    if isinstance(written or rendered, dict):
        for key in {**(written or {}), **(rendered or {})}:
            one, other = (side.get(key) if side else None for side in (written, rendered))
            yield from differences(one, other, f"{path}.{key}")
    elif isinstance(written, list) and isinstance(rendered, list) and len(written) == len(rendered):
        for one, other in zip(written, rendered, strict=True):
            yield from differences(one, other, path)
    elif written != rendered:
        yield path.replace("Deployment.spec.template.", "Pod.").replace("initCont", "cont")


@cache
def entries(path: str) -> set[str]:
    """The entries of the table that are about a field, or about what it stands in."""
    words = path.split(".")
    parents = [".".join(words[:end]) for end in range(1, len(words) + 1)]
    return {entry for entry in SET_FIELDS for p in parents if fnmatchcase(p, entry)}


@cache
def shop() -> App:
    """The app whose manifests these are."""
    return app_of(deploy={"health": {"path": "/ready"}})


def changes(items: list[Object]) -> list[str] | None:
    """What rendering changes of manifests; None where they are refused with a word about why."""
    app = shop()
    manifests = [Manifest(f"app.yaml: {item['kind']}", item) for item in copy.deepcopy(items)]
    try:
        checked = checked_objects(app, "production", manifests)
        release = render(app, RUN, BUILT, Placement("green", 3), checked)
    except StageError as failed:
        return [failed.detail] if SHAPELESS in failed.detail else None
    # a ConfigMap with a name that no pod has stands beside the app
    beside = release.companions_for(app.name)
    rendered = (release.deployment, release.service, *release.configmaps, *beside)
    pairs = zip(items, rendered, strict=True)
    return [d for one, other in pairs for d in differences(one, other, one["kind"])]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_field_of_the_api_is_kept_set_by_the_table_or_refused(kind: str) -> None:
    schema = document(SCHEMAS[kind])
    place = [*SCHEMAS].index(kind)
    unlisted = dict[str, list[str]]()
    count = 0
    for path in paths(schema, ()):
        items = folder()
        if not path:
            continue
        put(items[place], schema, path)
        count += 1
        if lost := [d for d in changes(items) or () if not entries(d)]:
            unlisted[".".join(path)] = lost
    assert unlisted == {}
    assert count > {"Deployment": 1000, "Service": 60, "ConfigMap": 20}[kind]


def test_every_entry_of_the_table_is_about_something_that_rendering_sets() -> None:
    used = {entry for path in changes(folder()) or () for entry in entries(path)}
    assert used == SET_FIELDS.keys()
