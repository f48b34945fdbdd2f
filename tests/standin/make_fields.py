"""Write fields.json: the fields of every kind served, with their types and how lists merge.

Run as `python -m tests.standin.make_fields` after a change of the served Kubernetes version; the
source is the JSON schemas that the kubernetes-validate package carries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]

from tests.standin.resources import RESOURCES

VERSION = "v1.36.0-local-strict"
OUTPUT = Path(__file__).with_name("fields.json")
PREFIX = "#/$defs/"
QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
INT_OR_STRING = "io.k8s.apimachinery.pkg.util.intstr.IntOrString"
SCALARS = {"string": "string", "boolean": "bool", "number": "float64"}


def load_definitions() -> dict[str, Any]:
    """The definitions of the bundled schemas by their full names."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / VERSION
    definitions: dict[str, Any] = json.loads((folder / "_definitions.json").read_text())["$defs"]
    return definitions


def short(name: str) -> str:
    """The name under which a type stands in fields.json."""
    return name.removeprefix("io.k8s.api.").removeprefix("io.k8s.apimachinery.pkg.")


def type_of(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A type as one word: a scalar, `@Type`, `[element` or `{value`."""
    reference = schema.get("$ref", "").removeprefix(PREFIX)
    if reference == QUANTITY:
        return "quantity"
    if reference == INT_OR_STRING:
        return "intstr"
    if reference:
        target = definitions[reference]
        return "@" + short(reference) if "properties" in target else type_of(target, definitions)
    kinds = schema.get("type", [])
    kind = next((item for item in [kinds, *kinds] if item in _KINDS), "any")
    if kind == "array":
        return "[" + type_of(schema["items"], definitions)
    if kind == "object":
        values = schema.get("additionalProperties")
        return "{" + type_of(values, definitions) if isinstance(values, dict) else "any"
    if kind == "integer":
        return str(schema.get("format", "int64"))
    return SCALARS.get(kind, "any")


_KINDS = ("string", "boolean", "number", "integer", "array", "object")


def field_of(schema: dict[str, Any], definitions: dict[str, Any]) -> str | list[Any]:
    """The type, with the merge rules beside it where there are any."""
    rules = {
        "merge": schema.get("x-kubernetes-patch-merge-key"),
        "strategy": schema.get("x-kubernetes-patch-strategy"),
        "keys": schema.get("x-kubernetes-list-map-keys"),
        "list": schema.get("x-kubernetes-list-type"),
        "map": schema.get("x-kubernetes-map-type"),
    }
    found = {key: value for key, value in rules.items() if value}
    kind = type_of(schema, definitions)
    target = definitions.get(schema.get("$ref", "").removeprefix(PREFIX), {})
    if target.get("x-kubernetes-map-type") == "atomic":
        found["map"] = "atomic"
    return [kind, found] if found else kind


def collect() -> dict[str, Any]:
    """Everything that fields.json holds."""
    definitions = load_definitions()
    by_kind = {
        (item["group"], item["version"], item["kind"]): name
        for name, schema in definitions.items()
        for item in schema.get("x-kubernetes-group-version-kind", ())
        if len(schema["x-kubernetes-group-version-kind"]) == 1
    }
    kinds: dict[str, str] = {}
    waiting: list[str] = []
    for resource in RESOURCES:
        full = by_kind[(resource.group, resource.version, resource.kind)]
        kinds[resource.name] = short(full)
        waiting.append(full)
    full_names = {short(name): name for name in definitions}
    types: dict[str, Any] = {}
    while waiting:
        name = waiting.pop()
        if short(name) in types:
            continue
        fields = {
            field: field_of(schema, definitions)
            for field, schema in definitions[name].get("properties", {}).items()
        }
        types[short(name)] = fields
        for field in fields.values():
            word = field if isinstance(field, str) else field[0]
            if "@" in word:
                waiting.append(full_names[word.split("@")[1]])
    return {"kinds": kinds, "types": dict(sorted(types.items()))}


def main() -> None:
    """Write the file, one type a line."""
    found = collect()
    lines = [
        f"  {json.dumps(name)}: {json.dumps(fields, separators=(',', ':'))}"
        for name, fields in found["types"].items()
    ]
    kinds = json.dumps(found["kinds"], indent=1)
    OUTPUT.write_text(f'{{"kinds": {kinds},\n"types": {{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main()
