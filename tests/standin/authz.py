"""Who asks, and what RBAC in the store lets them do."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.standin.errors import ApiError, forbidden
from tests.standin.resources import find_path
from tests.standin.store import Store

MASTERS = "system:masters"
ACCOUNT_PREFIX = "system:serviceaccount:"
DISCOVERY_PATHS = (
    "/.well-known/openid-configuration",
    "/api",
    "/api/*",
    "/apis",
    "/apis/*",
    "/healthz",
    "/livez",
    "/openapi",
    "/openapi/*",
    "/readyz",
    "/version",
    "/version/",
)
# What every account may do without any binding (system:basic-user).
BASIC_RULES: tuple[dict[str, list[str]], ...] = (
    {
        "verbs": ["create"],
        "apiGroups": ["authentication.k8s.io"],
        "resources": ["selfsubjectreviews"],
    },
    {
        "verbs": ["create"],
        "apiGroups": ["authorization.k8s.io"],
        "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
    },
)


@dataclass(frozen=True)
class User:
    """An authenticated user."""

    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""

    @property
    def is_master(self) -> bool:
        """Whether RBAC is not asked at all."""
        return MASTERS in self.groups


def account_user(namespace: str, name: str) -> User:
    """The user that a service account is."""
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}")
    return User(f"{ACCOUNT_PREFIX}{namespace}:{name}", (*groups, "system:authenticated"))


def user_named(name: str, groups: tuple[str, ...] = ()) -> User:
    """The user that is impersonated under this name."""
    if name.startswith(ACCOUNT_PREFIX):
        namespace, _, account = name.removeprefix(ACCOUNT_PREFIX).partition(":")
        return account_user(namespace, account)
    return User(name, (*groups, "system:authenticated"))


@dataclass(frozen=True)
class Attributes:
    """What is asked for; `resource` carries a subresource after a slash."""

    verb: str
    group: str
    resource: str
    namespace: str = ""
    name: str = ""


@dataclass
class Tokens:
    """Bearer tokens and whose they are."""

    _users: dict[str, User] = field(default_factory=dict)
    _accounts: dict[str, str] = field(default_factory=dict)

    def add(self, user: User, token: str | None = None) -> str:
        """A token for this user."""
        token = token or secrets.token_urlsafe(24)
        self._users[token] = user
        return token

    def of_account(self, namespace: str, name: str) -> str:
        """The token of a service account, always the same one."""
        key = f"{namespace}/{name}"
        if key not in self._accounts:
            self._accounts[key] = self.add(account_user(namespace, name))
        return self._accounts[key]

    def revoke(self, token: str) -> None:
        """Make a token worthless, as an expired one is."""
        self._users.pop(token, None)

    def user(self, token: str) -> User | None:
        """Whose token this is."""
        return self._users.get(token)


class Authorizer:
    """RBAC over the Roles and bindings in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def rules(self, user: User, namespace: str) -> Iterator[dict[str, Any]]:
        """Every rule that holds for the user in that namespace ('' = at the cluster scope)."""
        if user.is_master:
            yield {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
            return
        yield from BASIC_RULES
        for binding in self._bindings(namespace):
            if any(_is_subject(user, item, binding) for item in binding.get("subjects") or ()):
                yield from self._role_rules(binding)

    def allows(self, user: User, asked: Attributes) -> bool:
        """Whether the user may do that."""
        return any(_covers(rule, asked) for rule in self.rules(user, asked.namespace))

    def demand(self, user: User, asked: Attributes, version: str = "v1") -> None:
        """Nothing when allowed; ApiError 403 in the API server's words when not."""
        if self.allows(user, asked):
            return
        where = (
            f'in the namespace "{asked.namespace}"' if asked.namespace else ("at the cluster scope")
        )
        plural = asked.resource.partition("/")[0]
        text = (
            f'User "{user.name}" cannot {asked.verb} resource "{asked.resource}" '
            f'in API group "{asked.group}" {where}'
        )
        if find_path(asked.group, version, plural) is None:
            full = f"{plural}.{asked.group}" if asked.group else plural
            raise ApiError(403, f"{full} is forbidden: {text}")
        raise forbidden(plural, asked.name, text)

    def _bindings(self, namespace: str) -> Iterator[dict[str, Any]]:
        for stored in self._store.snapshot("clusterrolebindings")[0]:
            yield stored.object
        if namespace:
            for stored in self._store.snapshot("rolebindings", namespace)[0]:
                yield stored.object

    def _role_rules(self, binding: dict[str, Any]) -> list[dict[str, Any]]:
        reference = binding["roleRef"]
        if reference["kind"] == "Role":
            namespace = binding["metadata"].get("namespace")
            found = self._store.find_stored("roles", namespace, reference["name"])
        else:
            found = self._store.find_stored("clusterroles", None, reference["name"])
        if found is not None:
            return found.object.get("rules") or []
        return _BUILT_IN.get(reference["name"], []) if reference["kind"] == "ClusterRole" else []


_ANY = {"apiGroups": ["*"], "resources": ["*"]}
_READ = ["get", "list", "watch"]
_BUILT_IN: dict[str, list[dict[str, Any]]] = {
    "cluster-admin": [{**_ANY, "verbs": ["*"]}],
    "admin": [{**_ANY, "verbs": ["*"]}],
    "view": [{**_ANY, "verbs": _READ}],
}


def _is_subject(user: User, subject: dict[str, Any], binding: dict[str, Any]) -> bool:
    kind, name = subject.get("kind"), subject.get("name", "")
    if kind == "ServiceAccount":
        namespace = subject.get("namespace") or binding["metadata"].get("namespace", "")
        return user.name == f"{ACCOUNT_PREFIX}{namespace}:{name}"
    if kind == "Group":
        return name in user.groups
    return kind == "User" and user.name == name


def _covers(rule: dict[str, Any], asked: Attributes) -> bool:
    verbs, groups = rule.get("verbs") or (), rule.get("apiGroups") or ()
    if asked.verb not in verbs and "*" not in verbs:
        return False
    if asked.group not in groups and "*" not in groups:
        return False
    names = rule.get("resourceNames") or ()
    if names and asked.name not in names:
        return False
    resources = rule.get("resources") or ()
    sub = asked.resource.partition("/")[2]
    return asked.resource in resources or "*" in resources or bool(sub and f"*/{sub}" in resources)
