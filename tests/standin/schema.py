"""The fields of every kind served: strict decoding, and which lists merge by which key."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.standin.errors import ApiError, bad_request
from tests.standin.quantities import canonical
from tests.standin.resources import resource_of

FIELDS_FILE = Path(__file__).with_name("fields.json")
# Timestamps that are written as null when they are not set.
KEPT_NULLS = frozenset({"lastProbeTime", "eventTime", "firstTimestamp", "lastTimestamp"})
_JSON_NAMES = {bool: "bool", int: "number", float: "number", str: "string", list: "array"}
# Written to the microsecond, and refused when they are not.
MICRO_TIMES = frozenset({"renewTime", "acquireTime"})
_MICRO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")
_MICRO_LAYOUT = "2006-01-02T15:04:05.000000Z07:00"
_INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}


@dataclass(frozen=True)
class Field:
    """A field: its type as one word (see make_fields.py) and how it merges."""

    type: str
    merge_key: str = ""
    strategy: str = ""
    keys: tuple[str, ...] = ()
    list_type: str = ""
    atomic: bool = False

    @property
    def element_type(self) -> str | None:
        """The object type of a list's elements."""
        return self.type[2:] if self.type.startswith("[@") else None

    @property
    def object_type(self) -> str | None:
        """The object type of the field itself."""
        return self.type[1:] if self.type.startswith("@") else None


@cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIELDS_FILE.read_text())
    return found


@cache
def fields_of(kind: str) -> dict[str, Field]:
    """The fields of a type by their names."""
    return {name: _field(spec) for name, spec in _file()["types"].get(kind, {}).items()}


def _field(spec: str | list[Any]) -> Field:
    if isinstance(spec, str):
        return Field(spec)
    word, rules = spec
    return Field(
        word,
        rules.get("merge", ""),
        rules.get("strategy", ""),
        tuple(rules.get("keys", ())),
        rules.get("list", ""),
        rules.get("map") == "atomic" or rules.get("list") == "atomic",
    )


def type_name(resource: str) -> str:
    """The type of a resource's objects."""
    name: str = _file()["kinds"][resource]
    return name


def all_types() -> list[str]:
    """The names of all types."""
    return list(_file()["types"])


class _Decoder:
    """Reads an object as the API server would: types checked, unknown fields noted and left out."""

    def __init__(self) -> None:
        self.unknown: list[str] = []

    def object(self, value: dict[str, Any], kind: str, path: str) -> dict[str, Any]:
        known = fields_of(kind)
        result: dict[str, Any] = {}
        for key, item in value.items():
            here = f"{path}.{key}" if path else key
            found = known.get(key)
            if found is None:
                self.unknown.append(here)
            elif item is None:
                if key in KEPT_NULLS:
                    result[key] = None
            else:
                result[key] = self.value(item, found.type, here, kind)
                _check_spelling(kind, key, result[key])
        return result

    def value(self, value: Any, word: str, path: str, owner: str) -> Any:
        if word == "any":
            return value
        head = word[0]
        if head == "@":
            self._expect(value, dict, path, owner, word)
            return self.object(value, word[1:], path)
        if head == "[":
            self._expect(value, list, path, owner, word)
            items = enumerate(value)
            return [self.value(item, word[1:], f"{path}[{at}]", owner) for at, item in items]
        if head == "{":
            self._expect(value, dict, path, owner, word)
            found = value.items()
            if word == "{string":
                found = [(key, "" if item is None else item) for key, item in found]
            return {key: self.value(item, word[1:], path, owner) for key, item in found}
        return self.scalar(value, word, path, owner)

    def scalar(self, value: Any, word: str, path: str, owner: str) -> Any:
        if word == "quantity":
            return _quantity(value, path, owner)
        if word == "intstr":
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise self._mismatch(value, path, owner, "intstr.IntOrString")
            return value
        if word in _INTEGERS:
            low, high = _INTEGERS[word]
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise self._mismatch(value, path, owner, word)
            return value
        wanted: Any = {"string": str, "bool": bool, "float64": (int, float)}[word]
        self._expect(value, wanted, path, owner, word)
        return value

    def _expect(self, value: Any, wanted: Any, path: str, owner: str, word: str) -> None:
        if not isinstance(value, wanted):
            raise self._mismatch(value, path, owner, word)

    @staticmethod
    def _mismatch(value: Any, path: str, owner: str, word: str) -> ApiError:
        got = _JSON_NAMES.get(type(value), "object")
        if got == "number" and word in ("int32", "int64"):
            got = f"number {value}"
        struct = owner.rpartition(".")[2]
        field = re.sub(r"\[\d+\]", "", path)
        return bad_request(
            f"json: cannot unmarshal {got} into Go struct field {struct}.{field} "
            f"of type {_go_type(word)}"
        )


def _check_spelling(kind: str, field: str, value: Any) -> None:
    """ApiError 400 for texts that the server parses while it decodes."""
    if field in MICRO_TIMES and not _MICRO.fullmatch(value):
        raise bad_request(
            f'parsing time "{value}" as "{_MICRO_LAYOUT}": cannot parse "{value[19:]}" as ".000000"'
        )
    if kind == "core.v1.Secret" and field == "data":
        for text in value.values():
            wrong = re.search(r"[^A-Za-z0-9+/=\r\n]", text)
            if wrong or len(text) % 4:
                at = wrong.start() if wrong else len(text) - len(text) % 4
                raise bad_request(f"illegal base64 data at input byte {at}")


def _go_type(word: str) -> str:
    if word.startswith("@"):
        return word[1:].removeprefix("apis.").replace("core.", "")
    if word.startswith("["):
        return "[]" + _go_type(word[1:])
    return "map[string]" + _go_type(word[1:]) if word.startswith("{") else word


def _quantity(value: Any, path: str, owner: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _Decoder._mismatch(value, path, owner, "resource.Quantity")
    try:
        return canonical(str(value))
    except ValueError as error:
        raise bad_request(
            "quantities must match the regular expression "
            "'^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
        ) from error


def decode(resource: str, value: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The object without unknown fields, and their paths; ApiError 400 for wrong types."""
    decoder = _Decoder()
    found = resource_of(resource)
    try:
        result = decoder.object(value, type_name(resource), "")
    except ApiError as error:
        raise bad_request(
            f'{found.kind} in version "{found.version}" cannot be handled as a {found.kind}: '
            f"{error.message}"
        ) from error
    return result, decoder.unknown


def strict_error(resource: str, unknown: list[str]) -> ApiError:
    """What a request with unknown fields gets under strict field validation."""
    found = resource_of(resource)
    return bad_request(
        f'{found.kind} in version "{found.version}" cannot be handled as a {found.kind}: '
        f"strict decoding error: {unknown_text(unknown)}"
    )


def unknown_text(unknown: list[str]) -> str:
    """How unknown fields stand in messages."""
    return ", ".join(f'unknown field "{path}"' for path in unknown)
