"""The three kinds of patch that kubectl sends."""

from __future__ import annotations

import json
from typing import Any

from tests.standin.errors import ApiError, bad_request
from tests.standin.schema import Field, fields_of, type_name
from tests.standin.store import copy_json

_DIRECTIVES = ("$patch", "$retainKeys")
_ORDER = "$setElementOrder/"
_DELETE = "$deleteFromPrimitiveList/"
_LIST_MERGE = "merge"
_UNKNOWN = Field("any")


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: null deletes, objects merge, everything else replaces."""
    if not isinstance(patch, dict):
        return copy_json(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


# JSON patch


def json_patch(target: Any, operations: list[dict[str, Any]]) -> Any:
    """RFC 6902; ApiError 422 when a test fails or a path is not there."""
    document = {"": copy_json(target)}
    for operation in operations:
        _apply_operation(document, operation)
    return document[""]


def _refused() -> ApiError:
    return ApiError(422, "the server rejected our request due to an error in our request")


def _steps(path: str) -> list[str]:
    if path and not path.startswith("/"):
        raise _refused()
    return [step.replace("~1", "/").replace("~0", "~") for step in path.split("/")]


def _parent(document: Any, steps: list[str]) -> Any:
    here = document
    for step in steps[:-1]:
        here = _child(here, step)
    return here


def _child(here: Any, step: str) -> Any:
    try:
        return here[int(step)] if isinstance(here, list) else here[step]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise _refused() from error


def _put(parent: Any, step: str, value: Any) -> None:
    if isinstance(parent, list):
        place = len(parent) if step == "-" else int(step)
        if not 0 <= place <= len(parent):
            raise _refused()
        parent.insert(place, value)
    elif isinstance(parent, dict):
        parent[step] = value
    else:
        raise _refused()


def _drop(parent: Any, step: str) -> Any:
    value = _child(parent, step)
    del parent[int(step) if isinstance(parent, list) else step]
    return value


def _apply_operation(document: Any, operation: dict[str, Any]) -> None:
    kind = operation.get("op")
    steps = _steps(str(operation.get("path", "")))
    value = copy_json(operation.get("value"))
    if kind == "test":
        if _child(_parent(document, steps), steps[-1]) != value:
            raise _refused()
        return
    if kind in ("move", "copy"):
        source = _steps(str(operation.get("from", "")))
        holder = _parent(document, source)
        value = copy_json(_child(holder, source[-1]))
        if kind == "move":
            _drop(holder, source[-1])
        kind = "add"
    parent = _parent(document, steps)
    if kind == "remove":
        _drop(parent, steps[-1])
    elif kind == "replace":
        _child(parent, steps[-1])
        parent[int(steps[-1]) if isinstance(parent, list) else steps[-1]] = value
    elif kind == "add":
        _put(parent, steps[-1], value)
    else:
        raise bad_request(f"unexpected kind: {kind}")


# Strategic merge patch


def strategic_patch(resource: str, target: Any, patch: dict[str, Any]) -> Any:
    """Kubernetes' own merge: lists merge by key where the kind's schema says so."""
    return _merge_object(target, patch, type_name(resource))


def _merge_object(target: Any, patch: dict[str, Any], kind: str | None) -> Any:
    directive = patch.get("$patch")
    if directive == "replace":
        return {key: copy_json(value) for key, value in patch.items() if key != "$patch"}
    if directive == "delete":
        return {}
    if directive not in (None, "merge"):
        raise bad_request(f"Unknown patch type: {directive}")
    result = dict(target) if isinstance(target, dict) else {}
    if "$retainKeys" in patch:
        keep = patch["$retainKeys"]
        result = {key: value for key, value in result.items() if key in keep}
    known = fields_of(kind) if kind else {}
    for key, value in patch.items():
        rules = known.get(key.removeprefix(_ORDER), _UNKNOWN)
        if key.startswith(_DELETE):
            _delete_values(result, key.removeprefix(_DELETE), value)
        elif key.startswith(_ORDER):
            _order_field(result, patch, key, rules)
        elif key not in _DIRECTIVES:
            _merge_field(result, patch, key, rules)
    return result


def _merge_field(result: dict[str, Any], patch: dict[str, Any], key: str, rules: Field) -> None:
    value = patch[key]
    if value is None:
        result.pop(key, None)
    elif isinstance(value, dict):
        result[key] = _merge_object(result.get(key), value, rules.object_type)
    elif isinstance(value, list) and _LIST_MERGE in rules.strategy:
        order = patch.get(_ORDER + key)
        result[key] = _merge_list(result.get(key) or [], value, rules, order)
    else:
        result[key] = copy_json(value)


def _order_field(result: dict[str, Any], patch: dict[str, Any], key: str, rules: Field) -> None:
    """An order that stands alone: its list is not in the patch."""
    field = key.removeprefix(_ORDER)
    if field not in patch and result.get(field):
        result[field] = _ordered(result[field], patch[key], rules)


def _delete_values(result: dict[str, Any], key: str, values: list[Any]) -> None:
    left = [item for item in result.get(key) or [] if item not in values]
    if left:
        result[key] = left
    else:
        result.pop(key, None)


def _merge_list(current: list[Any], patch: list[Any], rules: Field, order: Any) -> list[Any]:
    if not rules.merge_key:
        merged = [*current, *(item for item in patch if item not in current)]
        return _ordered(merged, order, rules) if order else merged
    if any(isinstance(item, dict) and item.get("$patch") == "replace" for item in patch):
        return [copy_json(item) for item in patch if item.get("$patch") != "replace"]
    merged = [dict(item) for item in current]
    for item in patch:
        if rules.merge_key not in item:
            text = f"map: {json.dumps(item)} does not contain declared merge key: {rules.merge_key}"
            raise bad_request(text)
        place = _place(merged, rules.merge_key, item)
        if item.get("$patch") == "delete":
            if place is not None:
                del merged[place]
        elif place is None:
            merged.append(_merge_object({}, item, rules.element_type))
        else:
            merged[place] = _merge_object(merged[place], item, rules.element_type)
    return _ordered(merged, order, rules) if order else merged


def _place(items: list[Any], key: str, wanted: dict[str, Any]) -> int | None:
    for place, item in enumerate(items):
        if item.get(key) == wanted[key]:
            return place
    return None


def _ordered(items: list[Any], order: list[Any], rules: Field) -> list[Any]:
    """The listed elements in the listed order, others after the ones they stood behind."""

    def name(item: Any) -> Any:
        return item.get(rules.merge_key) if isinstance(item, dict) else item

    wanted = [name(item) for item in order]
    listed = sorted(
        (item for item in items if name(item) in wanted), key=lambda item: wanted.index(name(item))
    )
    result: list[Any] = list(listed)
    for place, item in enumerate(items):
        if name(item) in wanted:
            continue
        before = items[place - 1] if place else None
        result.insert(result.index(before) + 1 if before in result else 0, item)
    return result
