"""What GitLab sends, from data/deliveries/, and a receiver that is called without a network."""

from __future__ import annotations

import http
import io
import json
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import gitops_hook as hook
from tests.settings import loaded

DATA = Path(__file__).resolve().parent / "data" / "deliveries"
SECRETS = json.loads((DATA / "secrets.json").read_text("utf-8"))
TOKEN: str = SECRETS["gitlab_signing_token"]
PLAIN: str = SECRETS["gitlab_secret_token"]
NOW = 1760000000.0  # the fixtures were signed then, each a second after the other
NAMES = sorted(
    p.stem for p in DATA.glob("*.json") if p.name.count(".") == 1 and p.stem != "secrets"
)
HEAD = "da1560886d4f094c3e6c9ef40349f7d38b5d27d7"

CONFIG = """
apps:
  - name: shop
    repository: https://gitlab.example.com/example-group/demo-app.git
    deploy: {environments: []}
  - name: api
    repository: https://gitlab.example.com/example-group/platform/backend/api
    test_branches: []
    deploy: {environments: []}
webhook: {verify: %s, max_body: %s}
limits: {spool_files: %d}
"""


class Delivery(NamedTuple):
    headers: dict[str, str]
    body: bytes


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    json: dict[str, Any]


def config(verify: str = "signature", max_body: str = "5MiB", spool: int = 300) -> hook.Config:
    return loaded(CONFIG % (verify, max_body, spool))


def recorded(name: str) -> Delivery:
    """A delivery as GitLab sent it."""
    headers = json.loads((DATA / f"{name}.headers.json").read_text("utf-8"))
    return Delivery(headers, (DATA / f"{name}.json").read_bytes())


def lower(headers: dict[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def signed(body: bytes | Any, *, token: str = TOKEN, at: float = NOW, name: str = "") -> Delivery:
    """A delivery with the headers of GitLab for any body."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    name = name or str(uuid.uuid4())
    key, stamp = hook.decode_signing_token(token.encode(), 1), str(int(at))
    signature = hook.sign(key, name.encode(), stamp.encode(), body).decode()
    headers = {"Content-Type": "application/json", "webhook-id": name}
    headers |= {"webhook-timestamp": stamp, "webhook-signature": signature}
    return Delivery(headers, body)


def payload(**changes: Any) -> dict[str, Any]:
    """The body of a push to main, with other fields; None takes one away."""
    fields = {**json.loads(recorded("gitlab-push-branch").body), **changes}
    return {key: value for key, value in fields.items() if value is not None}


class Receiver:
    """The application with a real spool and real secrets; time stands still."""

    def __init__(self, folder: Path, settings: hook.Config | None = None) -> None:
        self.now = NOW
        self.late: list[str] = []
        self.metrics = hook.Metrics()
        self.config = settings or config()
        self.controller = SimpleNamespace(
            context=SimpleNamespace(config=self.config, kubectl=hook.Kubectl(self.metrics)),
            metrics=self.metrics,
            clock=SimpleNamespace(now=lambda: self.now),
            spooled=threading.Event(),
            heartbeats=SimpleNamespace(late=lambda: self.late),
        )
        self.directory, self.secrets = folder / "spool", folder / "secrets"
        self.secrets.mkdir()
        (self.secrets / "webhook-signing-tokens").write_text(f"{TOKEN}\n", "utf-8")
        (self.secrets / "webhook-tokens").write_text(f"{PLAIN}\n", "utf-8")
        self.app = self.restart()

    def restart(self) -> hook.WebhookApp:
        """The application as it is after a restart: what is in memory only is gone."""
        controller: Any = self.controller
        self.spool = hook.Spool(self.directory, self.config.limits.spool_files)
        self.spool.prepare()
        self.app = hook.WebhookApp(self.config, hook.Secrets(self.secrets), self.spool, controller)
        return self.app

    def request(self, method: str, path: str, **environ: Any) -> Reply:
        """One request, checked to keep to the WSGI protocol on both sides unless told otherwise."""
        answer: dict[str, Any] = {}
        checked, app = environ.pop("checked", True), environ.pop("app", self.app)

        def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> Any:
            answer.update(status=status, headers=headers)
            return lambda data: None

        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            **environ,
        }
        setup_testing_defaults(environ)
        chunks: Any = (validator(app) if checked else app)(environ, start_response)
        body = b"".join(chunks)
        getattr(chunks, "close", list)()
        code, phrase = answer["status"].split(" ", 1)
        assert http.HTTPStatus(int(code)).phrase == phrase
        return Reply(int(code), dict(answer["headers"]), json.loads(body))

    def post(self, delivery: Delivery, **environ: Any) -> Reply:
        headers = lower(delivery.headers)
        kind = headers.pop("content-type", "")
        fields = {f"HTTP_{name.upper().replace('-', '_')}": v for name, v in headers.items()}
        fields |= {"CONTENT_TYPE": kind, "CONTENT_LENGTH": str(len(delivery.body))}
        body = io.BytesIO(delivery.body)
        return self.request("POST", "/webhook", **{**fields, "wsgi.input": body, **environ})

    def stored(self) -> list[hook.Run]:
        return [run for _, run in self.spool.read()]

    def count(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"gitops_hook_{metric}", labels) or 0.0
