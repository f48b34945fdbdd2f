"""A request, understood: who wants to do what to which object."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.standin import protobuf
from tests.standin.authz import Attributes, User
from tests.standin.errors import ApiError, bad_request
from tests.standin.faults import Request
from tests.standin.httpd import HttpRequest, Response
from tests.standin.resources import Resource, find_path
from tests.standin.selectors import field_requirements

Object = dict[str, Any]
TRUE = ("1", "true", "True")
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
# Below /namespaces/NAME these belong to the namespace itself.
_OF_NAMESPACES = ("status", "finalize")


@dataclass(frozen=True)
class Asked:
    """One request; for paths without a resource `plural` is empty."""

    http: HttpRequest
    user: User
    verb: str
    group: str = ""
    version: str = ""
    plural: str = ""
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    @property
    def query(self) -> dict[str, str]:
        """The query parameters."""
        return self.http.query

    @property
    def dry_run(self) -> bool:
        """Whether nothing shall be stored."""
        return bool(self.query.get("dryRun"))

    @property
    def as_table(self) -> bool:
        """Whether the client wants columns instead of objects."""
        return "as=Table" in self.http.headers.get("accept", "")

    @property
    def full_resource(self) -> str:
        """The plural with the subresource; `discovery` for paths without a resource."""
        if not self.plural:
            return "discovery"
        return f"{self.plural}/{self.subresource}" if self.subresource else self.plural

    @property
    def manager(self) -> str:
        """The name under which the client's changes are recorded."""
        agent = self.http.headers.get("user-agent", "unknown").partition("/")[0]
        return self.query.get("fieldManager") or agent

    @property
    def attributes(self) -> Attributes:
        """What RBAC is asked; a list of one name counts as that name."""
        name = self.name
        if not name and self.verb in ("list", "watch", "deletecollection"):
            for field, sign, value in field_requirements(self.query.get("fieldSelector", "")):
                if (field, sign) == ("metadata.name", "="):
                    name = value
        return Attributes(self.verb, self.group, self.full_resource, self.namespace, name)

    def logged(self, code: int, seconds: float = 0.0) -> Request:
        """The request as it stands in the log."""
        return Request(
            self.verb,
            self.full_resource,
            self.namespace,
            self.name,
            self.user.name,
            code,
            seconds,
            self.http.target,
            self.manager,
        )

    def served(self) -> Resource:
        """The resource; ApiError 404 when nothing is served at this path."""
        found = find_path(self.group, self.version, self.plural)
        known = found and (not self.subresource or self.subresource in found.subresources)
        if found is None or not known or (self.namespace and not found.namespaced):
            raise ApiError(404, "the server could not find the requested resource")
        return found

    def body(self) -> Object:
        """The JSON object that was sent ({} when nothing was)."""
        if not self.http.body:
            return {}
        if self.http.headers.get("content-type", "").startswith(protobuf.MEDIA_TYPE):
            return protobuf.read_object(self.http.body)
        try:
            value = json.loads(self.http.body)
        except ValueError as error:
            raise bad_request(f"couldn't get version/kind; json parse error: {error}") from error
        if not isinstance(value, dict):
            raise bad_request("the object provided is unrecognized (must be of type Object)")
        return value


def understand(http: HttpRequest, user: User) -> Asked:
    """What a request means by its path, method and query."""
    steps = [step for step in http.path.split("/") if step]
    group, version, rest = "", "", []
    if len(steps) > 2 and steps[0] == "api":
        version, rest = steps[1], steps[2:]
    elif len(steps) > 3 and steps[0] == "apis":
        group, version, rest = steps[1], steps[2], steps[3:]
    if not rest:
        return Asked(http, user, http.method.lower())
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in _OF_NAMESPACES:
        namespace, rest = rest[1], rest[2:]
    name = rest[1] if len(rest) > 1 else ""
    verb = _verb(http, name)
    return Asked(http, user, verb, group, version, rest[0], namespace, name, "/".join(rest[2:]))


def _verb(http: HttpRequest, name: str) -> str:
    if http.method == "GET":
        if http.query.get("watch") in TRUE:
            return "watch"
        return "get" if name else "list"
    if http.method == "DELETE" and not name:
        return "deletecollection"
    return _VERBS.get(http.method, http.method.lower())


def reply(
    value: Object | bytes, code: int = 200, warnings: tuple[str, ...] | list[str] = ()
) -> Response:
    """An answer with a JSON object, and warnings that kubectl prints."""
    body = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    headers = tuple(("Warning", f"299 - {json.dumps(text)}") for text in warnings)
    return Response(code, body + b"\n", headers=headers)


def refusal(error: ApiError) -> Response:
    """An answer that says no."""
    headers: tuple[tuple[str, str], ...] = ()
    if error.details.get("retryAfterSeconds"):
        headers = (("Retry-After", str(error.details["retryAfterSeconds"])),)
    return Response(error.code, json.dumps(error.status()).encode() + b"\n", headers=headers)
