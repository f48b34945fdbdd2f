"""The API server: requests in, objects and refusals out."""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
from dataclasses import replace
from pathlib import Path

import trustme

from tests.standin import discovery, protobuf, writing
from tests.standin.asked import Asked, refusal, reply, understand
from tests.standin.authz import Attributes, Authorizer, Tokens, User, user_named
from tests.standin.errors import ApiError, conflict, forbidden
from tests.standin.faults import Fault, Faults
from tests.standin.httpd import MAX_BODY, Closed, HttpRequest, HttpServer, Response
from tests.standin.logs import LogSource, serve_log
from tests.standin.reading import Watch, get_object, list_objects
from tests.standin.resources import Resource
from tests.standin.reviews import review
from tests.standin.store import Store

LOG = logging.getLogger(__name__)
ADMIN = User("admin", ("system:masters", "system:authenticated"), "admin")
_ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))
_REVIEWS = ("authentication.k8s.io", "authorization.k8s.io")
_HEALTH = ("/healthz", "/livez", "/readyz")


class Api:
    """A Kubernetes API server on a loopback port, over a Store.

    `log_source` (namespace, pod, container, previous, tail) -> bytes answers pods/log.
    """

    def __init__(
        self, store: Store, faults: Faults | None = None, *, host: str = "127.0.0.1"
    ) -> None:
        self.store = store
        self.faults = faults or Faults()
        self.tokens = Tokens()
        self.admin_token = self.tokens.add(ADMIN)
        self.authorizer = Authorizer(store)
        self.log_source: LogSource | None = None
        authority = trustme.CA()
        self.ca_pem = authority.cert_pem.bytes()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(host, "localhost", "kubernetes.default.svc").configure_cert(context)
        self._server = HttpServer(context, self._handle, host)

    # Life

    def start(self) -> Api:
        """Listen on a port that the system chooses."""
        self._server.start()
        return self

    def stop(self) -> None:
        """End every connection and thread."""
        self.faults.clear()
        self._server.stop()

    def down(self) -> None:
        """Refuse connections, as a crashed API server does; the store stays as it is."""
        self._server.down()

    def up(self) -> None:
        """Come back on the same port."""
        self._server.up()

    def freeze(self) -> None:
        """Accept connections and answer nothing, streams too, as a stopped API server does."""
        self._server.going.clear()

    def thaw(self) -> None:
        """Go on, first of all with what was asked meanwhile."""
        self._server.going.set()

    def __enter__(self) -> Api:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port."""
        return self._server.port

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://{self._server.host}:{self.port}"

    def kubeconfig(self, path: Path, account: str | None = None, namespace: str = "") -> Path:
        """Write a kubeconfig: cluster-admin, or the service account `NAMESPACE/NAME`."""
        token = self.admin_token
        if account:
            owner, _, name = account.partition("/")
            token = self.tokens.of_account(owner, name)
        authority = path.with_name(f"{path.name}.ca.crt")
        _put(authority, self.ca_pem)
        context = {"cluster": "standin", "user": "user"}
        if namespace:
            context["namespace"] = namespace
        cluster = {"server": self.url, "certificate-authority": str(authority)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "standin", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "standin", "context": context}],
            "current-context": "standin",
        }
        _put(path, json.dumps(config, indent=1).encode())
        return path

    # One request

    def _handle(self, http: HttpRequest) -> Response | None:
        began = time.monotonic()
        asked, fault = understand(http, _ANONYMOUS), None
        try:
            asked = replace(asked, user=self._user(http))
            fault = self.faults.take(asked.logged(0), http.body)
            if fault is not None:
                self._suffer(fault, asked)
            response = self._answer(asked, fault)
        except ApiError as error:
            response = refusal(error)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            LOG.exception("%s %s", http.method, http.target)
            response = refusal(ApiError(500, f"Internal error occurred: {error!r}"))
        if fault is not None and fault.action == "hang-after":
            self._hang(fault, asked)
        if response is not None:
            self.faults.note(asked.logged(response.code, time.monotonic() - began))
        return response

    def _user(self, http: HttpRequest) -> User:
        scheme, _, token = http.headers.get("authorization", "").partition(" ")
        if not token:
            return _ANONYMOUS
        user = self.tokens.user(token.strip()) if scheme.lower() == "bearer" else None
        if user is None:
            raise ApiError(401, "Unauthorized")
        wanted = http.headers.get("impersonate-user")
        if not wanted:
            return user
        self.authorizer.demand(user, Attributes("impersonate", "", "users", "", wanted))
        groups = http.headers.get("impersonate-group", "")
        return user_named(wanted, (groups,) if groups else ())

    def _suffer(self, fault: Fault, asked: Asked) -> None:
        """What the fault does before the work; nothing for those that act later."""
        action = fault.action
        if action == "refuse":
            self.faults.note(asked.logged(0))
            raise Closed
        if action == "hang":
            self._hang(fault, asked)
        elif action == "409":
            raise conflict(asked.plural or "pods", asked.name)
        elif action == "429":
            wait = 1 if fault.seconds is None else int(fault.seconds)
            details = {"retryAfterSeconds": wait} if wait else {}
            text = "Too many requests, please try again later."
            raise ApiError(429, text, details=details)
        elif action == "500":
            raise ApiError(500, "Internal error occurred: told to fail by a fault")
        elif action == "forbid":
            text = f'User "{asked.user.name}" cannot {asked.verb} resource "{asked.full_resource}"'
            raise forbidden(asked.plural or "pods", asked.name, text)

    def _hang(self, fault: Fault, asked: Asked) -> None:
        self.faults.note(asked.logged(0))
        self.faults.hang(asked.http.connection, fault, fault.seconds)

    def _answer(self, asked: Asked, fault: Fault | None) -> Response | None:
        if len(asked.http.body) > MAX_BODY:
            raise ApiError(413, f"Request entity too large: limit is {MAX_BODY}")
        if not asked.plural:
            return self._about(asked)
        self.authorizer.demand(asked.user, asked.attributes)
        resource = asked.served()
        if asked.group in _REVIEWS and asked.verb == "create":
            return review(self.authorizer, asked)
        if asked.verb in ("get", "list", "watch"):
            return self._read(asked, resource, fault)
        return self._write(asked, resource)

    def _read(self, asked: Asked, resource: Resource, fault: Fault | None) -> Response | None:
        if asked.verb == "list":
            return list_objects(self.store, asked, resource)
        if asked.verb == "watch":
            silent = fault if fault and fault.action == "drop-watch" else None
            Watch(self.store, self.faults, asked, resource, silent).run()
            return None
        if asked.subresource == "log":
            return serve_log(self.store, asked, self.log_source)
        return get_object(self.store, asked)

    def _write(self, asked: Asked, resource: Resource) -> Response:
        if asked.subresource == "eviction":
            return writing.evict(self.store, asked)
        if asked.verb == "create":
            return writing.create(self.store, asked, resource)
        if asked.verb == "update":
            return writing.update(self.store, asked, resource)
        if asked.verb == "patch":
            return writing.patch(self.store, asked, resource)
        if asked.verb == "delete":
            return writing.delete(self.store, asked, resource)
        if asked.verb == "deletecollection":
            return writing.delete_collection(self.store, asked, resource)
        raise ApiError(405, "the server does not allow this method on the requested resource")

    def _about(self, asked: Asked) -> Response:
        path = asked.http.path.rstrip("/") or "/"
        if asked.user is _ANONYMOUS and not path.startswith(("/version", *_HEALTH)):
            text = f'forbidden: User "{_ANONYMOUS.name}" cannot get path "{path}"'
            raise ApiError(403, text)
        if path in ("/api", "/apis"):
            if "as=APIGroupDiscoveryList" in asked.http.headers.get("accept", ""):
                body = reply(discovery.aggregated(path)).body
                return Response(200, body, discovery.AGGREGATED)
            plain = discovery.api_versions(f"{self._server.host}:{self.port}")
            return reply(plain if path == "/api" else discovery.api_groups())
        if path == "/version":
            return reply(json.dumps(discovery.VERSION, indent=2).encode())
        if path in _HEALTH:
            return Response(200, b"ok", "text/plain")
        return self._described(path)

    @staticmethod
    def _described(path: str) -> Response:
        if path == "/openapi/v3":
            return reply(discovery.openapi_index())
        if path == "/openapi/v2":
            return Response(200, protobuf.openapi_v2(), protobuf.OPENAPI_V2)
        steps = path.strip("/").split("/")
        found: dict[str, object] | None = None
        if path.startswith("/openapi/v3/"):
            document = discovery.openapi(path.removeprefix("/openapi/v3/"))
            if document is not None:
                return Response(200, document, headers=discovery.immutable())
        elif steps[0] == "api" and len(steps) == 2:
            found = discovery.resource_list("", steps[1])
        elif steps[0] == "apis" and len(steps) == 3:
            found = discovery.resource_list(steps[1], steps[2])
        if found is not None:
            return reply(found)
        raise ApiError(404, "the server could not find the requested resource")


def _put(path: Path, content: bytes) -> None:
    """Replace a file in one step: a kubectl of another thread may be reading it."""
    new = path.with_name(f".{path.name}.{threading.get_ident()}")
    new.touch(0o600)
    new.write_bytes(content)
    new.replace(path)
