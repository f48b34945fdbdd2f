"""A controller that has seen a lot, and the real server of the second port in front of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gitops_hook as hook
from gitops_hook import Outcome, Reason
from tests.idle_controller import FakeKubectl, idle_controller, synced
from tests.served import Served, serving
from tests.world import Object

NOW = 1_900_000_000.0  # seconds since the epoch: time stands still
MAIN = "refs/heads/main"
DIGEST = "sha256:" + "0" * 64
GREEN = "131 passed, 0 failed"
APPS = """
apps:
  - name: shop
    repository: https://gitlab.example.com/demo/shop.git
    build: {image: registry.example.com/demo/shop}
  - name: blog
    repository: https://gitlab.example.com/demo/blog.git
    build: {image: registry.example.com/demo/blog}
  - name: tools
    repository: /srv/git/tools.git
    build: {builder: none}
    deploy: {environments: []}
external_url: https://gitops.example.com
"""
LOG = """\
============================= test session starts ==============================
collected 133 items

tests/test_cart.py ..F....F
FAILED tests/test_cart.py::test_total - assert 3 == 2
FAILED tests/test_cart.py::test_voucher - KeyError: 'voucher'
2 failed, 131 passed in 4.21s
"""


class KeepingKubectl(FakeKubectl):
    """A cluster that also keeps logs, and counts the calls for them."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[str, dict[str, str]] = {}  # by run
        self.calls: list[str] = []
        self.failure: Exception | None = None

    def with_own_slot(self) -> hook.Kubectl:
        return self

    def list(
        self, resource: str, namespace: str, *filters: str, timeout: float = 30.0
    ) -> list[Object]:
        if resource != "configmaps":
            return super().list(resource, namespace, *filters, timeout=timeout)
        self.calls.append(f"{namespace} {filters[-1]} {timeout}")
        if self.failure:
            raise self.failure
        run = filters[-1].rpartition("=")[2]
        return [{"data": self.logs[run]}] if run in self.logs else []


class Gallery:
    """What a daemon has in memory, put there by a test, and the site that shows it."""

    def __init__(self, folder: Path, config: str = APPS) -> None:
        self.secrets = hook.Secrets(folder)
        self.controller = idle_controller(folder, config)
        self.context = self.controller.context
        self.kubectl = KeepingKubectl()
        self.context.kubectl = self.kubectl
        self.context.state.kubectl = self.kubectl
        self.context.clock.now = lambda: NOW
        synced(self.controller)
        for app in self.context.apps.values():
            self.context.state.read(app)
        config_of = self.context.config
        app = hook.WebhookApp(config_of, self.secrets, self.context.spool, self.controller)
        self.site = app.admin()
        self.logs = app.logs

    def states(self) -> dict[str, hook.AppState]:
        """What is recorded of each app."""
        return {name: self.context.state.last(app) for name, app in self.context.apps.items()}

    def get(self, path: str, method: str = "GET") -> tuple[str, dict[str, str], str]:
        """Status, headers and body of the answer to a request."""
        answer: list[Any] = []
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path}
        chunks = self.site(environ, lambda *args: answer.extend(args))  # type: ignore[arg-type]
        return answer[0], dict(answer[1]), b"".join(chunks).decode()

    def html(self, path: str) -> str:
        """The page at a path."""
        status, _, body = self.get(path)
        assert status == "200 OK", (path, status)
        return body

    def run(self, commit: str, ago: float, app: str = "shop", **more: Any) -> hook.Run:
        """A push that was received so many seconds ago."""
        ref = more.pop("ref", MAIN)
        commit = (commit + hashlib.sha256(commit.encode()).hexdigest())[:40]
        id_ = hook.run_id(app, ref, commit)
        return hook.Run(id=id_, app=app, ref=ref, commit=commit, received=NOW - ago, **more)

    def job(self, run: hook.Run, stage: str, state: str, ago: float, took: float = 0.0) -> Object:
        """Let a run have a Job that was unsuspended so long ago, and ended after so long."""
        app = self.context.apps[run.app]
        build = hook.test_job if stage == "test" else hook.build_job
        manifest = build(self.context.config, app, run)
        manifest["metadata"] |= {"resourceVersion": "1", "uid": f"{run.id}-{stage}"}
        result = {"test": GREEN, "build": DIGEST}[stage]
        kept = {hook.JOB_STAGES[stage].annotation: result} if state == "succeeded" else {}
        manifest["metadata"]["annotations"] |= kept
        manifest["spec"]["suspend"] = state == "suspended"
        condition = {"succeeded": "Complete", "failed": "Failed"}.get(state)
        ended = {"type": condition, "status": "True", "lastTransitionTime": stamp(NOW - ago + took)}
        conditions = [ended] if condition else []
        started = {} if state == "suspended" else {"startTime": stamp(NOW - ago)}
        manifest["status"] = {"conditions": conditions, **started}
        self.controller.informers.jobs[stage == "build"]._take("ADDED", manifest)
        return manifest

    def end(self, run: hook.Run, outcome: Outcome, reason: Reason = Reason.OK, **more: Any) -> None:
        """Let it be recorded how a run ended."""
        self.record(run, outcome=str(outcome), reason=str(reason), **more)

    def record(self, run: hook.Run, **more: Any) -> None:
        """Let a run be recorded."""
        entry = replace(hook.RunRecord.of(run), **more)
        self.context.state.write(self.context.apps[run.app], entry)

    def entry(self, run: hook.Run, colour: str, ago: float, **more: Any) -> Object:
        """A switch to a run, so long ago."""
        selector = {hook.LABEL_APP: run.app, hook.LABEL_RUN: run.id, "version": colour}
        words = {"run": run.id, "commit": run.commit, "colour": colour, "selector": selector}
        return {**words, "at": NOW - ago, "outcome": "deployed", **more}

    def live(self, app: str, environment: str, history: Sequence[Object], **more: Any) -> None:
        """Let an environment have a live Service with this history, newest first.

        `claim` and `bake_until` may say more of it.
        """
        selector = next(e["selector"] for e in history if e["outcome"] in ("", "deployed"))
        texts = {"history": json.dumps(history), "deploying": json.dumps(more.get("claim", {}))}
        texts["bake-until"] = json.dumps(more.get("bake_until", 0.0))
        annotations = {f"gitops-hook/{key}": text for key, text in texts.items()}
        meta = {"name": app, "resourceVersion": "1", "annotations": annotations}
        manifest = {"metadata": meta, "spec": {"selector": selector}}
        self.controller.informers.services[environment]._take("ADDED", manifest)


def stamp(at: float) -> str:
    """A time as Kubernetes writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


@contextmanager
def on_show(folder: Path) -> Iterator[tuple[Gallery, Served]]:
    """A gallery in which everything there is to see hangs, behind a real server."""
    gallery = full_gallery(folder)
    with serving(gallery.site, max_body=0) as served:
        yield gallery, served


def full_gallery(folder: Path) -> Gallery:
    """Runs and environments in every state that a page shows."""
    gallery = Gallery(folder)
    first = gallery.run("1f0c9a2e", 86400.0 * 3, title="Put the shop online")
    second = gallery.run("7be4d013", 86400.0, title="Sort the cart by price")
    sick = gallery.run("c93a5f77", 7200.0, title="Cache the prices")
    baking = gallery.run("e2a81b64", 300.0, title="Cache the prices, and expire them")
    red = gallery.run("0d5c7e18", 900.0, ref="refs/heads/vouchers", title="Vouchers")
    queued = gallery.run("9a9b1c2d", 20.0, ref="refs/heads/fix/rounding")
    for run in (first, second):
        gallery.end(run, Outcome.DEPLOYED, stage="production", ended=run.received + 210)
    gallery.end(
        sick,
        Outcome.SWITCHED_BACK,
        Reason.UNHEALTHY_AFTER_SWITCH,
        stage="production",
        detail="/ready failed 3 times: status 503",
        ended=NOW - 6900,
    )
    gallery.end(
        red,
        Outcome.FAILED,
        Reason.TESTS_FAILED,
        stage="test",
        detail="131 passed, 2 failed: tests.test_cart.test_total, tests.test_cart.test_voucher",
        ended=NOW - 800,
    )
    gallery.kubectl.logs[red.id] = {f"test-{red.id}-x7k2p.tests": LOG}
    gallery.job(red, "test", "failed", 890, 80)
    gallery.job(baking, "test", "succeeded", 290, 61)
    gallery.job(baking, "build", "succeeded", 225, 48)
    gallery.job(queued, "test", "suspended", 0)
    shown = gallery.entry(sick, "green", 6990, outcome="switched-back")
    shown |= {"reason": "UnhealthyAfterSwitch", "detail": "/ready failed 3 times: status 503"}
    old = gallery.entry(first, "green", 86400.0 * 3 - 210, by="")
    live = gallery.entry(second, "blue", 86400.0 - 190)
    claim = {"phase": "baking", "run": baking.id, "colour": "green", "since": NOW - 120}
    new = gallery.entry(baking, "green", 40, outcome="")
    gallery.live("shop", "staging", [gallery.entry(baking, "green", 150), live, old])
    ends = NOW + 20
    gallery.live("shop", "production", [new, shown, live, old], claim=claim, bake_until=ends)
    hang_blog(gallery)
    return gallery


def hang_blog(gallery: Gallery) -> None:
    """An app that a person rolled back, and whose next version waits for a registry."""
    good = gallery.run("44d1a9b0", 86400.0 * 9, "blog", title="A new theme")
    left = gallery.run("b7720e5c", 86400.0 * 2, "blog", title="Comments")
    waits = gallery.run("5e61f3aa", 1500.0, "blog", title="Comments, moderated")
    gallery.end(good, Outcome.DEPLOYED, stage="production", ended=good.received + 150)
    gallery.end(
        left,
        Outcome.ROLLED_BACK,
        Reason.ROLLED_BACK,
        stage="production",
        detail="alice: comments are slow",
        ended=left.received + 7200,
    )
    gallery.end(
        waits,
        Outcome.FAILED,
        Reason.IMAGE_PULL_FAILED,
        stage="staging",
        detail="registry.example.com: connection refused",
        ended=NOW - 700,
        tries=2,
        next_try=NOW + 200,
    )
    old = gallery.entry(good, "blue", 86400.0 * 9 - 150)
    away = gallery.entry(left, "green", 86400.0 * 2 - 160, outcome="rolled-back")
    away |= {"reason": "RolledBack", "detail": "comments are slow", "by": "alice"}
    gallery.live("blog", "staging", [gallery.entry(left, "green", 86400.0 * 2 - 90), old])
    gallery.live("blog", "production", [away, old])
