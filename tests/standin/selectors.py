"""Label and field selectors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.standin.errors import bad_request

Object = dict[str, Any]
Test = Callable[[Object], bool]

_SET = re.compile(r"^(\S+)\s+(in|notin)\s*\(([^)]*)\)$")
_FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "pods": {
        "spec.nodeName": ("spec", "nodeName"),
        "spec.restartPolicy": ("spec", "restartPolicy"),
        "spec.schedulerName": ("spec", "schedulerName"),
        "spec.serviceAccountName": ("spec", "serviceAccountName"),
        "status.phase": ("status", "phase"),
        "status.podIP": ("status", "podIP"),
    },
    "jobs": {"status.successful": ("status", "succeeded")},
    "namespaces": {"status.phase": ("status", "phase")},
    "services": {"spec.clusterIP": ("spec", "clusterIP"), "spec.type": ("spec", "type")},
    "secrets": {"type": ("type",)},
    "replicasets": {"status.replicas": ("status", "replicas")},
    "events": {
        **{
            f"involvedObject.{field}": ("involvedObject", field)
            for field in (
                "kind",
                "namespace",
                "name",
                "uid",
                "apiVersion",
                "resourceVersion",
                "fieldPath",
            )
        },
        "reason": ("reason",),
        "reportingComponent": ("reportingComponent",),
        "source": ("source", "component"),
        "type": ("type",),
    },
}
_COMMON = {"metadata.name": ("metadata", "name"), "metadata.namespace": ("metadata", "namespace")}
# Numbers that are compared as text and are 0 when they are not set.
_COUNTS = frozenset({"status.successful", "status.replicas"})


def _split(text: str) -> list[str]:
    """The parts between the commas that are not inside parentheses."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _requirement(text: str) -> tuple[str, str, frozenset[str]]:
    found = _SET.match(text)
    if found:
        values = frozenset(item.strip() for item in found[3].split(","))
        return found[1], found[2], values
    for sign, operator in (("!=", "notin"), ("==", "in"), ("=", "in")):
        key, separator, value = text.partition(sign)
        if separator:
            return key.strip(), operator, frozenset({value.strip()})
    if text.startswith("!"):
        return text[1:].strip(), "absent", frozenset()
    if re.search(r"\s", text):
        raise bad_request(f"unable to parse requirement: found '{text.split()[1]}'")
    return text, "exists", frozenset()


def _holds(labels: dict[str, str], key: str, operator: str, values: frozenset[str]) -> bool:
    if operator == "in":
        return key in labels and labels[key] in values
    if operator == "notin":
        return labels.get(key) not in values
    return (key in labels) == (operator == "exists")


def label_test(text: str) -> Test:
    """Whether an object's labels satisfy a selector such as `a=b,c!=d,e in (f,g),h,!i`."""
    wanted = [_requirement(part) for part in _split(text)]

    def test(obj: Object) -> bool:
        labels = obj["metadata"].get("labels") or {}
        return all(_holds(labels, *requirement) for requirement in wanted)

    return test


def matches_selector(selector: Object | None, labels: dict[str, str]) -> bool:
    """Whether labels satisfy a LabelSelector (matchLabels and matchExpressions)."""
    if selector is None:
        return False
    if not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    operators = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "absent"}
    return all(
        _holds(
            labels,
            item["key"],
            operators[item["operator"]],
            frozenset(item.get("values") or ()),
        )
        for item in selector.get("matchExpressions") or ()
    )


def field_requirements(text: str) -> list[tuple[str, str, str]]:
    """(field, `=` or `!=`, value) for each part of a field selector."""
    found = []
    for part in _split(text):
        for sign in ("!=", "==", "="):
            key, separator, value = part.partition(sign)
            if separator:
                found.append((key, "!=" if sign == "!=" else "=", value))
                break
        else:
            raise bad_request(f"invalid selector: '{text}'; can't understand '{part}'")
    return found


def field_test(resource: str, text: str) -> Test:
    """Whether an object's fields satisfy a selector; ApiError 400 for a field not supported."""
    known = {**_COMMON, **_FIELDS.get(resource, {})}
    wanted = field_requirements(text)
    for key, _, _ in wanted:
        if key not in known:
            raise bad_request(f"field label not supported: {key}")

    def test(obj: Object) -> bool:
        return all(
            (_value(obj, known[key], key) == value) == (sign == "=") for key, sign, value in wanted
        )

    return test


def _value(obj: Object, path: tuple[str, ...], key: str) -> str:
    value: Any = obj
    for step in path:
        value = (value or {}).get(step)
    if value is None:
        return "0" if key in _COUNTS else ""
    return str(value)


def both(*tests: Test | None) -> Test | None:
    """One test out of several; None when none of them is given."""
    given = [test for test in tests if test is not None]
    if not given:
        return None
    return lambda obj: all(test(obj) for test in given)
