"""The little of protocol buffers that kubectl insists on.

Its typed clients (`auth can-i`, `create service`, `create configmap` and the like) send protocol
buffers and take JSON back; its own validation of lists wants OpenAPI v2 in that form.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import cache
from typing import Any

from tests.standin.errors import ApiError
from tests.standin.resources import RESOURCES
from tests.standin.schema import Field, all_types, fields_of, type_name

Object = dict[str, Any]
MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
OPENAPI_V2 = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
_MAGIC = b"k8s\0"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# message -> field number -> (JSON name, type); `[` repeated, `{` a map of strings.
_MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    "ObjectMeta": {
        1: ("name", "string"),
        2: ("generateName", "string"),
        3: ("namespace", "string"),
        6: ("resourceVersion", "string"),
        11: ("labels", "{string"),
        12: ("annotations", "{string"),
        14: ("finalizers", "[string"),
    },
    "SelfSubjectAccessReview": {1: ("metadata", "ObjectMeta"), 2: ("spec", "AccessSpec")},
    "AccessSpec": {
        1: ("resourceAttributes", "ResourceAttributes"),
        2: ("nonResourceAttributes", "NonResourceAttributes"),
    },
    "ResourceAttributes": {
        1: ("namespace", "string"),
        2: ("verb", "string"),
        3: ("group", "string"),
        4: ("version", "string"),
        5: ("resource", "string"),
        6: ("subresource", "string"),
        7: ("name", "string"),
    },
    "NonResourceAttributes": {1: ("path", "string"), 2: ("verb", "string")},
    "SelfSubjectRulesReview": {1: ("metadata", "ObjectMeta"), 2: ("spec", "RulesSpec")},
    "RulesSpec": {1: ("namespace", "string")},
    "SelfSubjectReview": {1: ("metadata", "ObjectMeta")},
    "Namespace": {1: ("metadata", "ObjectMeta")},
    "ServiceAccount": {1: ("metadata", "ObjectMeta")},
    "ConfigMap": {
        1: ("metadata", "ObjectMeta"),
        2: ("data", "{string"),
        3: ("binaryData", "{bytes"),
        4: ("immutable", "bool"),
    },
    "Secret": {
        1: ("metadata", "ObjectMeta"),
        2: ("data", "{bytes"),
        3: ("type", "string"),
        4: ("stringData", "{string"),
        5: ("immutable", "bool"),
    },
    "Service": {1: ("metadata", "ObjectMeta"), 2: ("spec", "ServiceSpec")},
    "ServiceSpec": {
        1: ("ports", "[ServicePort"),
        2: ("selector", "{string"),
        3: ("clusterIP", "string"),
        4: ("type", "string"),
        10: ("externalName", "string"),
    },
    "ServicePort": {
        1: ("name", "string"),
        2: ("protocol", "string"),
        3: ("port", "int"),
        4: ("targetPort", "IntOrString"),
        5: ("nodePort", "int"),
    },
    "IntOrString": {1: ("type", "int"), 2: ("intVal", "int"), 3: ("strVal", "string")},
    "Deployment": {1: ("metadata", "ObjectMeta"), 2: ("spec", "DeploymentSpec")},
    "DeploymentSpec": {
        1: ("replicas", "int"),
        2: ("selector", "LabelSelector"),
        3: ("template", "PodTemplateSpec"),
    },
    "LabelSelector": {1: ("matchLabels", "{string")},
    "PodTemplateSpec": {1: ("metadata", "ObjectMeta"), 2: ("spec", "PodSpec")},
    "PodSpec": {2: ("containers", "[Container"), 3: ("restartPolicy", "string")},
    "Container": {
        1: ("name", "string"),
        2: ("image", "string"),
        3: ("command", "[string"),
        4: ("args", "[string"),
        6: ("ports", "[ContainerPort"),
    },
    "ContainerPort": {3: ("containerPort", "int"), 4: ("protocol", "string")},
    "Job": {1: ("metadata", "ObjectMeta"), 2: ("spec", "JobSpec")},
    "JobSpec": {6: ("template", "PodTemplateSpec")},
    "Role": {1: ("metadata", "ObjectMeta"), 2: ("rules", "[PolicyRule")},
    "ClusterRole": {1: ("metadata", "ObjectMeta"), 2: ("rules", "[PolicyRule")},
    "PolicyRule": {
        1: ("verbs", "[string"),
        2: ("apiGroups", "[string"),
        3: ("resources", "[string"),
        4: ("resourceNames", "[string"),
        5: ("nonResourceURLs", "[string"),
    },
    "RoleBinding": {
        1: ("metadata", "ObjectMeta"),
        2: ("subjects", "[Subject"),
        3: ("roleRef", "RoleRef"),
    },
    "ClusterRoleBinding": {
        1: ("metadata", "ObjectMeta"),
        2: ("subjects", "[Subject"),
        3: ("roleRef", "RoleRef"),
    },
    "Subject": {
        1: ("kind", "string"),
        2: ("apiGroup", "string"),
        3: ("name", "string"),
        4: ("namespace", "string"),
    },
    "RoleRef": {1: ("apiGroup", "string"), 2: ("kind", "string"), 3: ("name", "string")},
    "DeleteOptions": {1: ("gracePeriodSeconds", "int"), 4: ("propagationPolicy", "string")},
}


# Reading


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif wire == _BYTES:
            length, at = _varint(data, at)
            yield number, data[at : at + length]
            at += length
        else:
            at += 8 if wire == _FIXED64 else 4


def _value(value: int | bytes, word: str) -> Any:
    if isinstance(value, int):
        if word == "bool":
            return bool(value)
        return value - (1 << 64) if value >= 1 << 63 else value
    if word == "string":
        return value.decode()
    if word == "bytes":
        return base64.b64encode(value).decode()
    return _message(value, word)


def _message(data: bytes, name: str) -> Any:
    known = _MESSAGES[name]
    result: Object = {}
    for number, raw in _fields(data):
        if number not in known:
            continue
        field, word = known[number]
        if word.startswith("["):
            result.setdefault(field, []).append(_value(raw, word[1:]))
        elif word.startswith("{") and isinstance(raw, bytes):
            entry = dict(_fields(raw))
            key = _value(entry.get(1, b""), "string")
            result.setdefault(field, {})[key] = _value(entry.get(2, b""), word[1:])
        else:
            result[field] = _value(raw, word)
    if name == "IntOrString":
        return result.get("strVal", "") if result.get("type") else result.get("intVal", 0)
    return _without_empty(result)


def _without_empty(value: Object) -> Object:
    """Protocol buffers of Kubernetes write fields that are not set as empty ones."""
    return {key: item for key, item in value.items() if item not in ("", 0, {}, [])}


def read_object(body: bytes) -> Object:
    """The JSON form of an object sent in protocol buffers; ApiError 415 for other kinds."""
    envelope = dict(_fields(body.removeprefix(_MAGIC)))
    kind_of = dict(_fields(_as_bytes(envelope.get(1))))
    version, kind = _as_bytes(kind_of.get(1)).decode(), _as_bytes(kind_of.get(2)).decode()
    if kind not in _MESSAGES:
        raise ApiError(415, f"the stand-in does not read protocol buffers of kind {kind}")
    return {"apiVersion": version, "kind": kind, **_message(_as_bytes(envelope.get(2)), kind)}


def _as_bytes(value: int | bytes | None) -> bytes:
    return value if isinstance(value, bytes) else b""


# Writing: OpenAPI v2, with the numbers of gnostic's OpenAPIv2.proto


def _number(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _part(number: int, data: bytes | str) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return _number(number << 3 | _BYTES) + _number(len(raw)) + raw


def _named(name: str, value: bytes) -> bytes:
    return _part(1, _part(1, name) + _part(2, value))


_REF, _FORMAT, _ADDITIONAL, _TYPE, _ITEMS, _PROPERTIES, _EXTENSION = 1, 2, 21, 22, 23, 25, 31
_SCALARS = {
    "string": ("string", ""),
    "bool": ("boolean", ""),
    "int32": ("integer", "int32"),
    "int64": ("integer", "int64"),
    "float64": ("number", "double"),
    "quantity": ("string", ""),
    "intstr": ("string", "int-or-string"),
}


def _extension(name: str, value: str) -> bytes:
    return _part(_EXTENSION, _part(1, name) + _part(2, _part(2, value)))


def _full_name(name: str) -> str:
    start = "io.k8s.apimachinery.pkg." if name.startswith(("apis.", "runtime.")) else "io.k8s.api."
    return start + name


def _schema(word: str) -> bytes:
    if word.startswith("@"):
        return _part(_REF, f"#/definitions/{_full_name(word[1:])}")
    if word.startswith("["):
        items = _part(_ITEMS, _part(1, _schema(word[1:])))
        return _part(_TYPE, _part(1, "array")) + items
    if word.startswith("{"):
        values = _part(_ADDITIONAL, _part(1, _schema(word[1:])))
        return _part(_TYPE, _part(1, "object")) + values
    if word == "any":
        return _part(_TYPE, _part(1, "object"))
    kind, form = _SCALARS[word]
    return (_part(_FORMAT, form) if form else b"") + _part(_TYPE, _part(1, kind))


def _field_schema(field: Field) -> bytes:
    found = _schema(field.type)
    if field.strategy:
        found += _extension("x-kubernetes-patch-strategy", field.strategy)
    if field.merge_key:
        found += _extension("x-kubernetes-patch-merge-key", field.merge_key)
    return found


@cache
def openapi_v2() -> bytes:
    """The OpenAPI v2 document: every kind served, its fields and how they merge."""
    kinds = {
        type_name(item.name): f"- group: '{item.group}'\n  version: {item.version}\n  "
        f"kind: {item.kind}\n"
        for item in RESOURCES
    }
    definitions = b""
    for name in all_types():
        fields = b"".join(
            _named(field, _field_schema(rules)) for field, rules in fields_of(name).items()
        )
        schema = _part(_TYPE, _part(1, "object")) + _part(_PROPERTIES, fields)
        if name in kinds:
            schema += _extension("x-kubernetes-group-version-kind", kinds[name])
        definitions += _named(_full_name(name), schema)
    return _part(1, "2.0") + _part(9, definitions)
