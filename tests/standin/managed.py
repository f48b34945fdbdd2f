"""metadata.managedFields: which client last set which field."""

from __future__ import annotations

import json
from typing import Any

from tests.standin.schema import Field, fields_of, type_name
from tests.standin.store import now

Object = dict[str, Any]
Path = tuple[str, ...]

# Set by the server, so nobody's.
_UNMANAGED = frozenset(
    {
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "resourceVersion",
        "managedFields",
        "selfLink",
        "generateName",
    }
)


def _paths(obj: Object, kind: str, at: Path, found: dict[Path, Any], *, top: bool = False) -> None:
    known = fields_of(kind)
    for name, value in obj.items():
        if top and name in ("apiVersion", "kind"):
            continue
        if at == ("f:metadata",) and name in _UNMANAGED:
            continue
        _value_paths(value, known.get(name, Field("any")), (*at, f"f:{name}"), found)


def _value_paths(value: Any, rules: Field, at: Path, found: dict[Path, Any]) -> None:
    if isinstance(value, dict) and value and not rules.atomic:
        if rules.object_type:
            _paths(value, rules.object_type, at, found)
            return
        found[(*at, ".")] = None
        for key, item in value.items():
            found[(*at, f"f:{key}")] = item
    elif isinstance(value, list) and rules.list_type == "map" and rules.element_type:
        found[(*at, ".")] = None
        for item in value:
            key = {name: item[name] for name in rules.keys if name in item}
            here = (*at, "k:" + json.dumps(key, separators=(",", ":"), sort_keys=True))
            found[(*here, ".")] = None
            _paths(item, rules.element_type, here, found)
    elif isinstance(value, list) and rules.list_type == "set":
        found[(*at, ".")] = None
        for item in value:
            found[(*at, "v:" + json.dumps(item))] = None
    else:
        found[at] = value


def field_paths(resource: str, obj: Object) -> dict[Path, Any]:
    """Every field of an object that can be owned, with its value."""
    found: dict[Path, Any] = {}
    _paths(obj, type_name(resource), (), found, top=True)
    return found


def _tree(paths: set[Path]) -> Object:
    root: Object = {}
    for path in sorted(paths):
        here = root
        for step in path:
            here = here.setdefault(step, {})
    return root


def _flat(tree: Object, at: Path, found: set[Path]) -> set[Path]:
    for step, below in tree.items():
        if below:
            _flat(below, (*at, step), found)
        else:
            found.add((*at, step))
    return found


def note_manager(
    resource: str, new: Object, old: Object | None, manager: str, subresource: str = ""
) -> None:
    """Record in `new` what this manager has changed since `old`."""
    after = field_paths(resource, new)
    before = field_paths(resource, old) if old else {}
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    removed = before.keys() - after.keys()
    entries = list((old or {}).get("metadata", {}).get("managedFields") or ())
    if not changed and not removed:
        if entries:
            new["metadata"]["managedFields"] = entries
        return
    kept, own = _without(entries, changed | removed, (manager, subresource))
    fields = (own - removed) | changed
    if fields:
        kept.append(_entry(new["apiVersion"], manager, subresource, fields))
    new["metadata"]["managedFields"] = kept


def _without(
    entries: list[Object], taken: set[Path], mine: tuple[str, str]
) -> tuple[list[Object], set[Path]]:
    """The others' entries without the fields taken from them, and one's own fields so far."""
    kept: list[Object] = []
    own: set[Path] = set()
    for entry in entries:
        fields = _flat(entry.get("fieldsV1") or {}, (), set())
        if (entry["manager"], entry.get("subresource", "")) == mine:
            own |= fields
        elif fields - taken:
            left = fields - taken
            kept.append(entry if left == fields else {**entry, "fieldsV1": _tree(left)})
    return kept, own


def _entry(api_version: str, manager: str, subresource: str, fields: set[Path]) -> Object:
    entry: Object = {
        "manager": manager,
        "operation": "Update",
        "apiVersion": api_version,
        "time": now(),
        "fieldsType": "FieldsV1",
        "fieldsV1": _tree(fields),
    }
    if subresource:
        entry["subresource"] = subresource
    return entry
