"""create, update, patch and delete."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.standin import admission
from tests.standin.asked import Asked, reply
from tests.standin.defaults import apply_defaults
from tests.standin.errors import ApiError, bad_request, conflict, not_found
from tests.standin.httpd import Response
from tests.standin.managed import note_manager
from tests.standin.patching import json_patch, merge_patch, strategic_patch
from tests.standin.reading import scale_of, selector_of
from tests.standin.resources import Resource
from tests.standin.schema import decode, strict_error, unknown_text
from tests.standin.store import Store, copy_json

Object = dict[str, Any]
# DELETE answers with the object itself for these, with a Status for the others.
_RETURNED = frozenset({"pods", "services", "serviceaccounts", "persistentvolumeclaims"})
_ORPHAN_WARNING = (
    "child pods are preserved by default when jobs are deleted; set "
    "propagationPolicy=Background to remove them or set propagationPolicy=Orphan to suppress "
    "this warning"
)


def _decoded(asked: Asked, value: Object, warnings: list[str]) -> Object:
    """The object as the server understands it; what it does not know is an error or a warning."""
    clean, unknown = decode(asked.plural, value)
    mode = asked.query.get("fieldValidation", "Warn")
    if unknown and mode == "Strict":
        raise strict_error(asked.plural, unknown)
    if unknown and mode == "Warn":
        warnings += [unknown_text([path]) for path in unknown]
    apply_defaults(asked.plural, clean)
    return clean


def _check_identity(asked: Asked, resource: Resource, body: Object) -> None:
    version, kind = body.get("apiVersion"), body.get("kind")
    if not kind or not version:
        what = "Object 'Kind' is missing" if not kind else "Object 'apiVersion' is missing"
        raise bad_request(f"{what} in '{json.dumps(body, separators=(',', ':'))}'")
    if (version, kind) != (resource.api_version, resource.kind):
        raise bad_request(
            f"the API version in the data ({version}) does not match the expected API version "
            f"({resource.api_version})"
        )
    meta = body.setdefault("metadata", {}) or {}
    if not isinstance(meta, dict):
        raise bad_request("metadata must be an object")
    named = meta.get("namespace")
    if resource.namespaced and named and named != asked.namespace:
        raise bad_request(
            "the namespace of the provided object does not match the namespace sent on the request"
        )
    if asked.name and meta.get("name") and meta["name"] != asked.name:
        raise bad_request(
            f"the name of the object ({meta['name']}) does not match the name on the URL "
            f"({asked.name})"
        )


def create(store: Store, asked: Asked, resource: Resource) -> Response:
    """POST: a new object."""
    body = asked.body()
    _check_identity(asked, resource, body)
    warnings: list[str] = []
    new = _decoded(asked, body, warnings)
    meta = new["metadata"] = new.get("metadata") or {}
    if resource.namespaced:
        meta["namespace"] = asked.namespace
    if not meta.get("name") and not meta.get("generateName"):
        admission.refuse_nameless(asked.plural)
    meta.pop("managedFields", None)
    if "status" in resource.subresources:
        new.pop("status", None)
        apply_defaults(asked.plural, new)
    note_manager(asked.plural, _without_status(new), None, asked.manager)
    created = store.create(asked.plural, new, dry_run=asked.dry_run)
    warnings += _admission_warnings(store, asked, created)
    return reply(created, 201, warnings)


def _without_status(obj: Object) -> Object:
    """The same object (metadata shared) without its status."""
    return {key: value for key, value in obj.items() if key != "status"}


def _settle(asked: Asked, resource: Resource, new: Object, old: Object) -> Object:
    """Keep what this writer may not touch, and note who wrote."""
    new["metadata"].pop("managedFields", None)
    if asked.subresource == "status":
        status = new.get("status")
        new = copy_json(old)
        new["status"] = status
    elif "status" in resource.subresources:
        new["status"] = copy_json(old.get("status"))
    if new.get("status") is None:
        new.pop("status", None)
    mine, theirs = new, old
    if asked.subresource != "status" and "status" in resource.subresources:
        mine, theirs = _without_status(new), _without_status(old)
    note_manager(asked.plural, mine, theirs, asked.manager, asked.subresource)
    return new


def _write(store: Store, asked: Asked, change: Callable[[Object], Object]) -> Object:
    write = store.update_status if asked.subresource == "status" else store.update
    return write(asked.plural, asked.namespace, asked.name, change, dry_run=asked.dry_run)


def _admission_warnings(store: Store, asked: Asked, obj: Object) -> list[str]:
    return [] if asked.subresource else admission.warnings(store, asked.plural, obj)


def update(store: Store, asked: Asked, resource: Resource) -> Response:
    """PUT: the whole object anew."""
    body = asked.body()
    if asked.subresource == "scale":
        return _set_scale(store, asked, lambda _: body)
    _check_identity(asked, resource, body)
    warnings: list[str] = []
    new = _decoded(asked, body, warnings)

    def change(old: Object) -> Object:
        return _settle(asked, resource, copy_json(new), old)

    updated = _write(store, asked, change)
    return reply(updated, 200, [*warnings, *_admission_warnings(store, asked, updated)])


def _patcher(asked: Asked) -> Callable[[Object], Object]:
    kind = asked.http.headers.get("content-type", "").partition(";")[0]
    try:
        patch = json.loads(asked.http.body)
    except ValueError as error:
        raise bad_request(f"error decoding patch: {error}") from error
    if kind == "application/json-patch+json":
        return lambda old: json_patch(old, patch)
    if kind == "application/merge-patch+json":
        return lambda old: merge_patch(old, patch)
    if kind == "application/strategic-merge-patch+json":
        return lambda old: strategic_patch(asked.plural, old, patch)
    raise ApiError(
        415,
        "the body of the request was in an unknown format - accepted media types include: "
        "application/json-patch+json, application/merge-patch+json, "
        "application/strategic-merge-patch+json",
    )


def patch(store: Store, asked: Asked, resource: Resource) -> Response:
    """PATCH: a merge, strategic merge or JSON patch."""
    apply = _patcher(asked)
    if asked.subresource == "scale":
        return _set_scale(store, asked, apply)
    warnings: list[str] = []

    def change(old: Object) -> Object:
        patched = apply(old)
        clean, unknown = decode(asked.plural, patched)
        if unknown and asked.query.get("fieldValidation") == "Strict":
            raise _strict_patch_error(asked, unknown)
        if unknown and asked.query.get("fieldValidation", "Warn") == "Warn":
            warnings.extend(unknown_text([path]) for path in unknown)
        apply_defaults(asked.plural, clean)
        return _settle(asked, resource, clean, old)

    patched = _write(store, asked, change)
    return reply(patched, 200, [*warnings, *_admission_warnings(store, asked, patched)])


def _strict_patch_error(asked: Asked, unknown: list[str]) -> ApiError:
    text = (
        f"Invalid value: {json.dumps(asked.http.body.decode())}: "
        f"strict decoding error: {unknown_text(unknown)}"
    )
    cause = {"reason": "FieldValueInvalid", "message": text, "field": "patch"}
    return ApiError(422, f' "" is invalid: patch: {text}', details={"causes": [cause]})


def _set_scale(store: Store, asked: Asked, apply: Callable[[Object], Object]) -> Response:
    def change(old: Object) -> Object:
        scale = apply(scale_of(asked.plural, old))
        asked_version = scale.get("metadata", {}).get("resourceVersion")
        if asked_version and asked_version != old["metadata"]["resourceVersion"]:
            raise conflict(asked.plural, asked.name)
        new = copy_json(old)
        new["spec"]["replicas"] = scale.get("spec", {}).get("replicas", 0)
        note_manager(
            asked.plural, _without_status(new), _without_status(old), asked.manager, "scale"
        )
        return new

    updated = store.update(asked.plural, asked.namespace, asked.name, change, dry_run=asked.dry_run)
    return reply(scale_of(asked.plural, updated))


def evict(store: Store, asked: Asked) -> Response:
    """POST pods/eviction."""
    if store.find_stored("pods", asked.namespace, asked.name) is None:
        raise not_found("pods", asked.name)
    if not asked.dry_run:
        store.evict(asked.namespace, asked.name)
    return reply(_success(201), 201)


def _success(code: int | None = None, details: Object | None = None) -> Object:
    status: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    if details:
        status["details"] = details
    if code:
        status["code"] = code
    return status


def _check_preconditions(asked: Asked, obj: Object, options: Object) -> None:
    wanted = options.get("preconditions") or {}
    for field, title in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
        has = obj["metadata"][field]
        if wanted.get(field) and wanted[field] != has:
            raise conflict(
                asked.plural,
                obj["metadata"]["name"],
                f"Precondition failed: {title} in precondition: {wanted[field]}, "
                f"{title} in object meta: {has}",
            )


def _options(asked: Asked) -> tuple[Object, int | None, str, list[str]]:
    options = asked.body()
    grace = options.get("gracePeriodSeconds", asked.query.get("gracePeriodSeconds"))
    policy = options.get("propagationPolicy") or asked.query.get("propagationPolicy")
    warnings = []
    if not policy and asked.plural == "jobs" and options.get("orphanDependents") is None:
        policy = "Orphan"
        warnings.append(_ORPHAN_WARNING)
    if options.get("orphanDependents"):
        policy = "Orphan"
    return options, None if grace is None else int(grace), policy or "Background", warnings


def delete(store: Store, asked: Asked, resource: Resource) -> Response:
    """DELETE of one object."""
    options, grace, policy, warnings = _options(asked)
    with store.lock:
        old = store.get(asked.plural, asked.namespace, asked.name)
        _check_preconditions(asked, old, options)
        left: Object | None = old
        if not asked.dry_run and not options.get("dryRun"):
            left = store.delete(
                asked.plural, asked.namespace, asked.name, grace, propagation=policy
            )
    if left is not None or asked.plural in _RETURNED:
        return reply(left or old, 200, warnings)
    details: Object = {"name": asked.name}
    if resource.group:
        details["group"] = resource.group
    details |= {"kind": asked.plural, "uid": old["metadata"]["uid"]}
    return reply(_success(details=details), 200, warnings)


def delete_collection(store: Store, asked: Asked, resource: Resource) -> Response:
    """DELETE of everything that the selectors let through."""
    _, grace, policy, warnings = _options(asked)
    found, version = store.snapshot(asked.plural, asked.namespace or None)
    test = selector_of(asked)
    items = [item.object for item in found if test is None or test(item.object)]
    for item in [] if asked.dry_run else items:
        meta = item["metadata"]
        if store.find_stored(asked.plural, meta.get("namespace"), meta["name"]):
            store.delete(
                asked.plural, meta.get("namespace"), meta["name"], grace, propagation=policy
            )
    listed = {
        "kind": f"{resource.kind}List",
        "apiVersion": resource.api_version,
        "metadata": {"resourceVersion": str(version)},
        "items": items,
    }
    return reply(listed, 200, warnings)
