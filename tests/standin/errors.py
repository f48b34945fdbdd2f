"""What an API server says when it refuses."""

from __future__ import annotations

from typing import Any

from tests.standin.resources import resource_of

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    406: "NotAcceptable",
    409: "Conflict",
    410: "Expired",
    413: "RequestEntityTooLarge",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class ApiError(Exception):
    """A refusal; becomes a metav1.Status with the same code, reason, message and details."""

    def __init__(
        self,
        code: int,
        message: str,
        *,
        reason: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = REASONS.get(code, "") if reason is None else reason
        self.message = message
        self.details = details or {}

    def status(self) -> dict[str, Any]:
        """The metav1.Status object that a client receives."""
        body: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
        }
        if self.reason:
            body["reason"] = self.reason
        if self.details:
            body["details"] = self.details
        body["code"] = self.code
        return body


def _details(resource: str, name: str) -> dict[str, Any]:
    found = resource_of(resource)
    details: dict[str, Any] = {"name": name} if name else {}
    if found.group:
        details["group"] = found.group
    details["kind"] = resource
    return details


def not_found(resource: str, name: str) -> ApiError:
    """404: there is no such object."""
    full = resource_of(resource).qualified
    return ApiError(404, f'{full} "{name}" not found', details=_details(resource, name))


def already_exists(resource: str, name: str) -> ApiError:
    """409: an object of that name is there already."""
    full = resource_of(resource).qualified
    return ApiError(
        409,
        f'{full} "{name}" already exists',
        reason="AlreadyExists",
        details=_details(resource, name),
    )


def conflict(resource: str, name: str, why: str | None = None) -> ApiError:
    """409: the object is not the one that the writer has read."""
    full = resource_of(resource).qualified
    text = why or (
        "the object has been modified; please apply your changes to the latest version "
        "and try again"
    )
    return ApiError(
        409,
        f'Operation cannot be fulfilled on {full} "{name}": {text}',
        details=_details(resource, name),
    )


def forbidden(resource: str, name: str, why: str) -> ApiError:
    """403: authorisation or admission does not let this happen."""
    full = resource_of(resource).qualified
    subject = f'{full} "{name}"' if name else full
    return ApiError(403, f"{subject} is forbidden: {why}", details=_details(resource, name))


def invalid(resource: str, name: str, causes: list[tuple[str, str, str]]) -> ApiError:
    """422: the object breaks rules; causes are (field, reason, message) in the order found."""
    found = resource_of(resource)
    texts = [f"{field}: {message}" for field, _, message in causes]
    joined = texts[0] if len(texts) == 1 else "[" + ", ".join(texts) + "]"
    kind = f"{found.kind}.{found.group}" if found.group else found.kind
    details: dict[str, Any] = {"name": name}
    if found.group:
        details["group"] = found.group
    details["kind"] = found.kind
    details["causes"] = [
        {"reason": reason, "message": message, "field": field} for field, reason, message in causes
    ]
    return ApiError(422, f'{kind} "{name}" is invalid: {joined}', details=details)


def bad_request(message: str) -> ApiError:
    """400: the request itself cannot be understood."""
    return ApiError(400, message)


def gone(version: int, oldest: int) -> ApiError:
    """410: the watch log does not reach back that far."""
    return ApiError(410, f"too old resource version: {version} ({oldest})")
