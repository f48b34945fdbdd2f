"""The API's own schemas, in which no unknown field is valid; each of their files is read once.

`kubernetes_validate.validate` does the same, and reads two megabytes for each object.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

Object = dict[str, Any]
FOLDER = f"kubernetes-json-schema/v{kubernetes_validate.latest_version()}-local-strict"


@cache
def document(name: str) -> Object:
    """A file of the schemas."""
    file = resources.files("kubernetes_validate") / FOLDER / f"{name}.json"
    content: Object = json.loads(file.read_text())
    return content


def require_valid(thing: Object) -> None:
    """Raise jsonschema's ValidationError where an object is not as its schema says."""
    version = re.sub(r"\.[^/]*", "", thing["apiVersion"], count=1).replace("/", "-")
    validator(f"{thing['kind'].lower()}-{version}").validate(thing)


@cache
def validator(name: str) -> Any:
    """What compares objects of one kind with their schema."""
    registry = Resource.from_contents(document(name)) @ definitions()
    return Draft202012Validator(document(name), registry=registry)


@cache
def definitions() -> Any:
    """What the schemas of all kinds refer to."""
    return Resource.from_contents(document("_definitions")) @ Registry()
