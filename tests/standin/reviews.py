"""What a client may ask about its own rights."""

from __future__ import annotations

from typing import Any

from tests.standin.asked import Asked, reply
from tests.standin.authz import Attributes, Authorizer, user_named
from tests.standin.httpd import Response
from tests.standin.store import now

Object = dict[str, Any]
_DISCOVERY = ("/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*")
_VERSION = ("/readyz", "/version", "/version/")
_PUBLIC = ("/healthz", "/livez", *_VERSION)
_ISSUER = (
    "/.well-known",
    "/.well-known/*",
    "/.well-known/openid-configuration",
    "/.well-known/openid-configuration/",
    "/openid/v1/jwks",
    "/openid/v1/jwks/",
)


def review(authorizer: Authorizer, asked: Asked) -> Response:
    """Answer one of the review resources."""
    body = asked.body()
    meta = {**(body.get("metadata") or {}), "creationTimestamp": None}
    answer: Object = {**body, "metadata": meta}
    spec = body.get("spec") or {}
    if asked.plural == "selfsubjectreviews":
        info: Object = {"username": asked.user.name}
        if asked.user.uid:
            info["uid"] = asked.user.uid
        info["groups"] = list(asked.user.groups)
        meta["creationTimestamp"] = now()
        answer["status"] = {"userInfo": info}
    elif asked.plural == "selfsubjectrulesreviews":
        answer["status"] = _rules(authorizer, asked, spec.get("namespace", ""))
    else:
        user = asked.user
        if asked.plural == "subjectaccessreviews":
            user = user_named(spec.get("user", ""), tuple(spec.get("groups") or ()))
        wanted = spec.get("resourceAttributes")
        allowed = authorizer.allows(user, _attributes(wanted)) if wanted else True
        answer["status"] = {"allowed": allowed}
        if not allowed:
            answer["status"]["reason"] = ""
    return reply(answer, 201)


def _attributes(wanted: Object) -> Attributes:
    resource = wanted.get("resource", "")
    if wanted.get("subresource"):
        resource += f"/{wanted['subresource']}"
    return Attributes(
        wanted.get("verb", ""),
        wanted.get("group", ""),
        resource,
        wanted.get("namespace", ""),
        wanted.get("name", ""),
    )


def _rules(authorizer: Authorizer, asked: Asked, namespace: str) -> Object:
    resources = [
        {
            "verbs": rule["verbs"],
            "apiGroups": rule.get("apiGroups", []),
            "resources": rule.get("resources", []),
            **({"resourceNames": rule["resourceNames"]} if rule.get("resourceNames") else {}),
        }
        for rule in authorizer.rules(asked.user, namespace)
    ]
    paths = [[*_DISCOVERY, *_VERSION], [*_PUBLIC], [*_ISSUER]]
    if asked.user.is_master:
        paths = [["*"], *paths]
    other = [
        {"verbs": ["*"] if group == ["*"] else ["get"], "nonResourceURLs": group} for group in paths
    ]
    return {"resourceRules": resources, "nonResourceRules": other, "incomplete": False}
