"""A delivery gets its one answer, in the order that security needs, whatever a client does."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import io
import json
import os
import resource
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
import requests

import gitops_hook as hook
from tests.deliveries import (
    CONFIG,
    HEAD,
    NAMES,
    NOW,
    PLAIN,
    TOKEN,
    Delivery,
    Receiver,
    Reply,
    config,
    payload,
    recorded,
    signed,
)  # fmt: skip
from tests.served import Served, serving
from tests.settings import loaded


@pytest.fixture
def receiver(tmp_path: Path) -> Receiver:
    return Receiver(tmp_path)


def refused(reply: Reply, status: int, reason: str) -> str:
    assert (reply.status, reply.json["status"], reply.json["reason"]) == (status, "refused", reason)
    return str(reply.json["text"])


class Untouchable(io.BytesIO):
    """A body that must not be read."""

    def read(self, *_: Any) -> bytes:
        raise AssertionError("the body was read")


# === Every kind of delivery ===

SHOP = hook.run_id("shop", "refs/heads/main", HEAD)
ANSWERS: dict[str, tuple[int, dict[str, Any]]] = {
    "gitlab-push-branch": (202, {"status": "accepted", "runs": [SHOP]}),
    "gitlab-push-branch-slash": (
        202,
        {
            "status": "accepted",
            "runs": [hook.run_id("shop", "refs/heads/feature/add-login/v2", HEAD)],
        },
    ),
    "gitlab-push-new-branch": (
        202,
        {"status": "accepted", "runs": [hook.run_id("shop", "refs/heads/release-2", HEAD)]},
    ),
    "gitlab-push-subgroup": (
        202,
        {"status": "accepted", "runs": [hook.run_id("api", "refs/heads/main", HEAD)]},
    ),
    "gitlab-push-delete-branch": (200, {"status": "ignored", "reason": "RefDeleted"}),
    "gitlab-tag-push": (200, {"status": "ignored", "reason": "TagPush"}),
    "gitlab-tag-delete": (200, {"status": "ignored", "reason": "TagPush"}),
    "gitlab-merge-request-open": (200, {"status": "ignored", "reason": "OtherEvent"}),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["signature", "token"])
def test_each_recorded_delivery_has_its_answer(tmp_path: Path, name: str, mode: str) -> None:
    receiver = Receiver(tmp_path, config(mode))
    reply = receiver.post(recorded(name))
    assert (reply.status, {k: v for k, v in reply.json.items() if k != "text"}) == ANSWERS[name]
    assert reply.headers["Content-Type"] == "application/json"
    assert [run.id for run in receiver.stored()] == reply.json.get("runs", [])


def test_an_accepted_push_is_stored_and_intake_is_woken(receiver: Receiver) -> None:
    delivery = recorded("gitlab-push-branch")
    assert not receiver.controller.spooled.is_set()
    receiver.post(delivery)
    assert receiver.controller.spooled.is_set()
    (run,) = receiver.stored()
    assert (run.app, run.ref, run.commit) == ("shop", "refs/heads/main", HEAD)
    assert (run.delivery, run.received) == (delivery.headers["webhook-id"], NOW)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"project": {"web_url": "https://gitlab.example.com/x/y"}, "repository": None},
            "UnknownP",
        ),
        ({"after": "0" * 40, "checkout_sha": None, "commits": []}, "RefDeleted"),
        ({"object_kind": "tag_push", "ref": "refs/tags/v1"}, "TagPush"),
        ({"object_kind": None, "event_name": "repository_update"}, "OtherEvent"),
        ({"object_kind": "note"}, "OtherEvent"),
    ],
)
def test_an_ignored_delivery_is_a_success_because_gitlab_disables_hooks_that_fail(
    receiver: Receiver, changes: dict[str, Any], reason: str
) -> None:
    reply = receiver.post(signed(payload(**changes)))
    assert (reply.status, reply.json["status"]) == (200, "ignored")
    assert reply.json["reason"].startswith(reason)
    assert receiver.stored() == []


def test_a_branch_that_nobody_wants_is_ignored(receiver: Receiver) -> None:
    body = json.loads(recorded("gitlab-push-subgroup").body) | {"ref": "refs/heads/other"}
    reply = receiver.post(signed(body))
    assert (reply.status, reply.json["status"]) == (200, "ignored")
    assert reply.json["reason"] == "OtherBranch"


def test_a_system_hook_is_a_push_like_any_other(receiver: Receiver) -> None:
    body = payload(object_kind=None, commits=[], user_username=None)
    del body["project"]["id"]
    delivery = signed(body)
    delivery.headers["X-Gitlab-Event"] = "System Hook"
    assert receiver.post(delivery).status == 202


def test_the_test_button_of_an_old_server_is_judged_by_its_body(receiver: Receiver) -> None:
    delivery = signed(payload(message=None))
    delivery.headers["X-Gitlab-Event"] = "Tag Push Hook"
    assert receiver.post(delivery).status == 202


@pytest.mark.parametrize("field", ["object_kind", "ref", "after", "project"])
def test_a_body_that_lacks_a_field_is_refused_with_its_name(receiver: Receiver, field: str) -> None:
    body = payload(**{field: None}, **({"event_name": None} if field == "object_kind" else {}))
    assert refused(receiver.post(signed(body)), 400, "Malformed") == f"{field}: missing"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b'{"oversize": true}'],
    ids=repr,
)
def test_a_signed_body_that_is_no_payload_is_malformed(receiver: Receiver, body: bytes) -> None:
    refused(receiver.post(signed(body)), 400, "Malformed")


def test_a_push_for_two_apps_is_stored_for_both(tmp_path: Path) -> None:
    url = "https://gitlab.example.com/example-group/demo-app"
    one = f"{{name: one, repository: {url}, deploy: {{environments: []}}}}"
    both = f"apps: [{one}, {one.replace('one', 'two')}]"
    receiver = Receiver(tmp_path, hook.load_config(both))
    reply = receiver.post(recorded("gitlab-push-branch"))
    assert reply.status == 202
    assert sorted(run.app for run in receiver.stored()) == ["one", "two"]


def test_nothing_is_started_and_nobody_is_asked_within_a_request(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the sender waits meanwhile")

    for where, name in ((subprocess, "Popen"), (socket, "create_connection"), (time, "sleep")):
        monkeypatch.setattr(where, name, never)
    for name in NAMES:
        assert receiver.post(recorded(name)).status == ANSWERS[name][0]


def test_an_answer_is_small_enough_for_gitlab_to_keep(receiver: Receiver) -> None:
    for name in NAMES:
        assert len(json.dumps(receiver.post(recorded(name)).json)) < 300
    long = signed(b"[" * 100_000), signed(payload(ref="x" * 100_000)), signed({"y" * 9000: 1})
    for delivery in long:
        assert len(json.dumps(receiver.post(delivery).json)) < 300


# === Once is enough ===


def test_a_delivery_that_comes_again_is_a_duplicate(receiver: Receiver) -> None:
    delivery = recorded("gitlab-push-branch")
    assert receiver.post(delivery).status == 202
    receiver.now += 600
    again = signed(delivery.body, at=receiver.now, name=delivery.headers["webhook-id"])
    reply = receiver.post(again)
    assert (reply.status, reply.json) == (200, {"status": "duplicate", "runs": [SHOP]})
    assert len(receiver.stored()) == 1


def test_a_redelivery_with_redacted_bytes_is_still_a_duplicate(receiver: Receiver) -> None:
    delivery = recorded("gitlab-push-branch")
    receiver.post(delivery)
    body = json.loads(delivery.body) | {"user_email": "[REDACTED]"}
    reply = receiver.post(signed(body, name=delivery.headers["webhook-id"]))
    assert (reply.status, reply.json["status"]) == (200, "duplicate")


def test_two_hooks_for_one_push_make_one_run(receiver: Receiver) -> None:
    first, second = (receiver.post(signed(payload())) for _ in range(2))
    assert first.json == second.json == {"status": "accepted", "runs": [SHOP]}
    assert {run.id for run in receiver.stored()} == {SHOP}


def test_a_delivery_of_two_apps_of_which_one_was_stored_is_accepted_for_the_other(
    tmp_path: Path,
) -> None:
    url = "https://gitlab.example.com/example-group/demo-app"
    one = f"{{name: one, repository: {url}, deploy: {{environments: []}}}}"
    both = hook.load_config(f"apps: [{one}, {one.replace('one', 'two')}]")
    receiver = Receiver(tmp_path, both)
    delivery = recorded("gitlab-push-branch")
    assert receiver.post(delivery).status == 202
    (_, (second, _)) = receiver.spool.read()
    second.unlink()
    (receiver.directory / "accepted").unlink()
    receiver.restart()
    runs = [run.id for run in receiver.stored()]
    answer = receiver.post(delivery)
    assert (answer.status, answer.json["status"]) == (202, "accepted")
    assert len(receiver.stored()) == 2
    assert len({*runs, *(run.id for run in receiver.stored())}) == 2
    assert receiver.post(delivery).json["status"] == "duplicate"


def test_after_a_restart_a_redelivery_is_a_duplicate(receiver: Receiver) -> None:
    receiver.post(recorded("gitlab-push-branch"))
    receiver.restart()
    reply = receiver.post(recorded("gitlab-push-branch"))
    assert reply.json == {"status": "duplicate", "runs": [SHOP]}
    assert [run.id for run in receiver.stored()] == [SHOP]


def test_without_webhook_id_the_idempotency_key_tells_a_duplicate(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path, config("token"))
    delivery = recorded("gitlab-push-branch")
    older = {k: v for k, v in delivery.headers.items() if not k.startswith("webhook-")}
    assert receiver.post(Delivery(older, delivery.body)).status == 202
    assert receiver.post(Delivery(older, delivery.body)).json["status"] == "duplicate"


@pytest.mark.parametrize("name", ["X-Gitlab-Event-UUID", "X-Gitlab-Webhook-UUID"])
def test_ids_that_are_not_of_the_delivery_tell_no_duplicate(tmp_path: Path, name: str) -> None:
    receiver = Receiver(tmp_path, config("token"))
    headers = {"Content-Type": "application/json", "X-Gitlab-Token": PLAIN, name: "the same"}
    for number in range(2):
        body = json.dumps(payload(ref=f"refs/heads/b{number}")).encode()
        assert receiver.post(Delivery(headers, body)).status == 202


def test_a_delivery_that_comes_again_is_a_duplicate_for_twenty_minutes(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path, config("token"))
    for later, word in ((0, "accepted"), (1200, "duplicate"), (1201, "accepted")):
        receiver.now = NOW + later
        assert receiver.post(recorded("gitlab-push-branch")).json["status"] == word


def test_remembered_deliveries_are_bounded_and_the_oldest_are_forgotten(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "DEDUPE_ENTRIES", 2)

    def said(name: str) -> str:
        return str(receiver.post(signed(payload(), name=name)).json["status"])

    assert [said(name) for name in "abc"] == ["accepted"] * 3
    assert [said(name) for name in "cba"] == ["duplicate", "duplicate", "accepted"]
    assert len(receiver.spool.accepted.times) == 2


def test_a_push_that_could_not_be_stored_is_no_duplicate_when_it_comes_again(
    tmp_path: Path,
) -> None:
    receiver = Receiver(tmp_path, config(spool=1))
    receiver.post(signed(payload(ref="refs/heads/first")))
    delivery = recorded("gitlab-push-branch")
    refused(receiver.post(delivery), 503, "SpoolFull")
    receiver.spool.done(receiver.spool.read()[0][0])
    assert receiver.post(delivery).status == 202


# === Who may ===


def without(delivery: Delivery, *names: str) -> Delivery:
    return Delivery({k: v for k, v in delivery.headers.items() if k not in names}, delivery.body)


def hub_headers(body: bytes) -> dict[str, str]:
    """What Gitea sends, and GitHub in part."""
    digest = hmac.digest(TOKEN.encode(), body, "sha256").hex()
    names = {"Delivery": "x", "Event": "push", "Signature": digest}
    return {
        f"X-{forge}-{k}": v for forge in ("Gitea", "GitHub", "Forgejo") for k, v in names.items()
    } | {
        "Content-Type": "application/json",
        "X-Hub-Signature-256": f"sha256={digest}",
    }


ATTACKS: dict[str, Callable[[], Delivery]] = {
    "nothing": lambda: Delivery({"Content-Type": "application/json"}, b"{}"),
    "an empty token, as if none were set": lambda: Delivery(
        {"Content-Type": "application/json", "X-Gitlab-Token": ""}, json.dumps(payload()).encode()
    ),
    "the leaked plain token without the signature": lambda: without(
        recorded("gitlab-push-branch"), "webhook-signature"
    ),
    "the leaked plain token without any of the new headers": lambda: without(
        recorded("gitlab-push-branch"), "webhook-signature", "webhook-id", "webhook-timestamp"
    ),
    "the signature of another delivery": lambda: Delivery(
        recorded("gitlab-push-branch").headers, recorded("gitlab-push-branch-slash").body
    ),
    "an old recording": lambda: signed(payload(), at=NOW - 301),
    "one from the future": lambda: signed(payload(), at=NOW + 301),
    "a key made of zeros": lambda: signed(
        payload(), token="whsec_" + base64.b64encode(bytes(32)).decode()
    ),
    "an empty signature": lambda: Delivery(
        recorded("gitlab-push-branch").headers | {"webhook-signature": ""}, b"{}"
    ),
    "a delivery of Gitea": lambda: Delivery(hub_headers(b"{}"), b"{}"),
    "a Gitea without a secret": lambda: Delivery(
        hub_headers(b"{}") | {"X-Hub-Signature-256": "sha256=", "X-Gitea-Signature": ""}, b"{}"
    ),
    "headers beyond ASCII": lambda: Delivery(
        recorded("gitlab-push-branch").headers
        | {"webhook-signature": "v1,\xe4\xf6", "webhook-id": "\xff"},
        b"{}",
    ),
    "a signature in drafts' fashion": lambda: Delivery(
        {"X-Gitlab-Signature": "sha256=" + hashlib.sha256(b"{}").hexdigest()}, b"{}"
    ),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_nobody_gets_in_with(receiver: Receiver, attack: Callable[[], Delivery]) -> None:
    text = refused(receiver.post(attack()), 401, "NotAuthentic")
    assert TOKEN[6:] not in text
    assert receiver.stored() == []


def test_with_plain_tokens_nobody_gets_in_by_a_signature(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path, config("token"))
    refused(
        receiver.post(without(recorded("gitlab-push-branch"), "X-Gitlab-Token")),
        401,
        "NotAuthentic",
    )


def test_a_hook_whose_url_was_changed_has_lost_its_token_and_is_refused(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path, config("token"))
    body = json.dumps(payload()).encode()
    refused(
        receiver.post(Delivery({"Content-Type": "application/json"}, body)), 401, "NotAuthentic"
    )


def test_a_relay_that_signs_the_article_s_way_is_believed_in_its_mode_only(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path, config("hmac"))
    body = json.dumps(payload()).encode()
    digest = hmac.digest(PLAIN.encode(), body, "sha256").hex()
    headers = {"Content-Type": "application/json", "X-Gitlab-Token": digest}
    assert receiver.post(Delivery(headers, body)).status == 202
    refused(receiver.post(Delivery(headers | {"X-Gitlab-Token": PLAIN}, body)), 401, "NotAuthentic")


def test_a_replay_within_the_five_minutes_changes_nothing(receiver: Receiver) -> None:
    delivery = recorded("gitlab-push-branch")
    receiver.post(delivery)
    receiver.now += 299
    assert receiver.post(delivery).json["status"] == "duplicate"
    receiver.now += 2
    refused(receiver.post(delivery), 401, "NotAuthentic")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n", " \n"], ids=repr)
@pytest.mark.parametrize("mode", ["signature", "token"])
def test_a_line_end_after_a_secret_is_no_part_of_it(tmp_path: Path, mode: str, end: str) -> None:
    receiver = Receiver(tmp_path, config(mode))
    for name, secret in (("webhook-signing-tokens", TOKEN), ("webhook-tokens", PLAIN)):
        (receiver.secrets / name).write_bytes(f"{secret}{end}".encode())
    assert receiver.post(recorded("gitlab-push-branch")).status == 202


def test_secrets_rotate_without_a_restart(receiver: Receiver) -> None:
    new = "whsec_" + base64.b64encode(b"n" * 32).decode()
    file = receiver.secrets / "webhook-signing-tokens"
    refused(receiver.post(signed(payload(), token=new)), 401, "NotAuthentic")
    file.write_text(f"{new}\n{TOKEN}\n", "utf-8")
    assert receiver.post(signed(payload(), token=new)).status == 202
    assert receiver.post(signed(payload())).status == 202
    file.write_text(f"{new}\n", "utf-8")
    refused(receiver.post(signed(payload())), 401, "NotAuthentic")


@pytest.mark.parametrize("content", [None, "", "whsec_short\n"])
def test_without_usable_secrets_nobody_gets_in_and_it_is_not_ready(
    receiver: Receiver, content: str | None
) -> None:
    file = receiver.secrets / "webhook-signing-tokens"
    file.unlink()
    if content is not None:
        file.write_text(content, "utf-8")
    refused(receiver.post(recorded("gitlab-push-branch")), 503, "NoSecrets")
    assert receiver.count("errors_total", where="secrets") == 1
    assert receiver.request("GET", "/readyz").status == 503


# === In this order ===


def test_method_comes_before_size(receiver: Receiver) -> None:
    big = {"CONTENT_LENGTH": str(10**12), "wsgi.input": Untouchable()}
    assert receiver.request("PUT", "/webhook", **big).status == 405


def test_size_comes_before_authenticity_and_before_reading(receiver: Receiver) -> None:
    limit = receiver.config.webhook.max_body
    big = {"CONTENT_LENGTH": str(limit + 1), "wsgi.input": Untouchable()}
    text = refused(receiver.post(Delivery({}, b""), **big), 413, "TooLarge")
    assert text == f"more than {limit} bytes"


def test_authenticity_comes_before_type_and_json(receiver: Receiver) -> None:
    for kind in ("", "text/plain", "application/json"):
        for body in (b"{", b"[" * 1_000_000, b"\xff"):
            refused(receiver.post(Delivery({"Content-Type": kind}, body)), 401, "NotAuthentic")


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json", "\xff"],
)
def test_a_signed_body_of_another_type_is_refused_before_it_is_parsed(
    receiver: Receiver, kind: str
) -> None:
    delivery = signed(urlencode({"payload": json.dumps(payload())}).encode())
    delivery.headers["Content-Type"] = kind
    refused(receiver.post(delivery), 415, "NotJson")


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", " application/json ;"]
)
def test_json_may_be_spelled_in_other_ways(receiver: Receiver, kind: str) -> None:
    delivery = recorded("gitlab-push-branch")
    assert (
        receiver.post(Delivery(delivery.headers | {"Content-Type": kind}, delivery.body)).status
        == 202
    )


@pytest.mark.parametrize("length", ["", None, "0"])
def test_a_body_without_a_length_is_empty(receiver: Receiver, length: str | None) -> None:
    delivery = signed(b"")
    lengths = {} if length is None else {"CONTENT_LENGTH": length}
    headers = {f"HTTP_{k.upper().replace('-', '_')}": v for k, v in delivery.headers.items()}
    headers["CONTENT_TYPE"] = headers.pop("HTTP_CONTENT_TYPE")
    body = io.BytesIO(b"never looked at")
    reply = receiver.request("POST", "/webhook", **headers, **lengths, **{"wsgi.input": body})
    assert "is not JSON" in refused(reply, 400, "Malformed")


def test_no_more_is_read_than_was_declared(receiver: Receiver) -> None:
    delivery = recorded("gitlab-push-branch")
    body = io.BytesIO(delivery.body + b"the next request")
    assert receiver.post(delivery, **{"wsgi.input": body}).status == 202
    assert body.read() == b"the next request"


def test_fewer_bytes_than_declared_are_not_authentic(receiver: Receiver) -> None:
    delivery = recorded("gitlab-push-branch")
    short = io.BytesIO(delivery.body[:-1])
    refused(receiver.post(delivery, **{"wsgi.input": short}), 401, "NotAuthentic")


# === Routes ===


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_another_method_on_webhook_is_refused_or_a_redirect_would_look_like_success(
    receiver: Receiver, method: str
) -> None:
    reply = receiver.request(method, "/webhook")
    assert refused(reply, 405, "MethodNotAllowed") == "only POST"
    assert reply.headers["Allow"] == "POST"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_are_read_only(receiver: Receiver, path: str) -> None:
    assert receiver.request("GET", path) == receiver.request("GET", path)
    assert receiver.request("GET", path).json == {"status": "ok"}
    reply = receiver.request("POST", path)
    assert (reply.status, reply.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize(
    "path", ["/", "", "/webhook/", "/Webhook", "/webhook/x", "/metrics", "/..", "/\xff"]
)
def test_everything_else_is_nowhere(receiver: Receiver, path: str) -> None:
    environ = {"SCRIPT_NAME": "/x"} if not path else {}
    refused(receiver.request("POST", path, **environ), 404, "NotFound")


def test_it_is_not_alive_when_a_thread_is_stuck(receiver: Receiver) -> None:
    receiver.late = ["controller", "intake"]
    reply = receiver.request("GET", "/healthz", app=receiver.app.admin())
    assert (reply.status, reply.json["status"]) == (503, "stuck: controller, intake")
    assert receiver.request("GET", "/readyz").status == 200
    receiver.late = []
    assert receiver.request("GET", "/healthz").status == 200


def test_it_is_not_ready_while_it_stops_but_still_takes_what_comes(receiver: Receiver) -> None:
    receiver.app.stopping.set()
    reply = receiver.request("GET", "/readyz", app=receiver.app.admin())
    assert (reply.status, reply.json) == (503, {"status": "stopping"})
    assert receiver.request("GET", "/healthz").status == 200
    assert receiver.post(recorded("gitlab-push-branch")).status == 202


def test_it_is_not_ready_when_it_cannot_store(receiver: Receiver) -> None:
    receiver.directory.rename(receiver.directory.with_name("gone"))
    probe = receiver.request("GET", "/readyz", app=receiver.app.admin())
    assert "No such file" in probe.json["status"]
    text = refused(receiver.post(recorded("gitlab-push-branch")), 503, "SpoolUnwritable")
    assert "No such file" in text
    receiver.directory.with_name("gone").rename(receiver.directory)
    assert receiver.request("GET", "/readyz").status == 200
    assert receiver.post(recorded("gitlab-push-branch")).status == 202


def test_strangers_learn_from_the_probes_that_something_is_wrong_but_not_what(
    receiver: Receiver,
) -> None:
    receiver.late = ["controller", "intake"]
    receiver.directory.rename(receiver.directory.with_name("gone"))
    with serving(receiver.app) as served:
        for path, word in (("/healthz", "stuck"), ("/readyz", "not ready")):
            answer = requests.get(f"{served.url}{path}", timeout=30)
            assert (answer.status_code, answer.json()) == (503, {"status": word})


def test_a_full_spool_refuses_pushes_but_still_answers_what_asks_for_nothing(
    tmp_path: Path,
) -> None:
    receiver = Receiver(tmp_path, config(spool=1))
    assert receiver.post(signed(payload())).status == 202
    text = refused(receiver.post(signed(payload())), 503, "SpoolFull")
    assert text == "1 pushes are waiting already"
    assert receiver.post(recorded("gitlab-tag-push")).status == 200


def test_an_app_whose_test_branches_are_pushed_endlessly_leaves_half_of_the_room_to_others(
    tmp_path: Path,
) -> None:
    blog = "{name: blog, repository: https://gitlab.example.com/example-group/blog.git, "
    entry = f"  - {blog}deploy: {{environments: []}}}}\nwebhook:"
    text = (CONFIG % ("signature", "5MiB", 20)).replace("webhook:", entry)
    receiver = Receiver(tmp_path, loaded(text))

    def push(ref: str, project: str = "demo-app") -> int:
        url = f"https://gitlab.example.com/example-group/{project}.git"
        body = payload(ref=f"refs/heads/{ref}", project={"git_http_url": url})
        return receiver.post(signed(body)).status

    assert [push(f"b{number}") for number in range(20)] == [202] * 9 + [503] * 11
    assert push("b1", "blog") == 202
    assert push("main") == 202
    receiver.restart()
    assert (push("b30"), push("b2", "blog")) == (503, 202)


# === What is said about it ===


def test_a_bug_is_a_500_that_tells_nothing_and_is_logged_and_counted(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.controller.heartbeats.late = lambda: 1 / 0
    reply = receiver.request("GET", "/healthz")
    assert (reply.status, reply.json) == (500, {"status": "error"})
    assert receiver.count("errors_total", where="request") == 1
    ((record),) = caplog.records
    assert (record.message, record.levelname) == ("request failed", "ERROR")
    assert record.exc_info
    assert receiver.post(recorded("gitlab-push-branch")).status == 202


def test_each_delivery_is_one_log_line_with_its_id_and_result(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gitops_hook")
    receiver.post(recorded("gitlab-push-branch"))
    receiver.post(Delivery({"webhook-id": "a\nb\x00\xff" + "x" * 500}, b"{}"))
    lines = [(r.levelname, r.__dict__["fields"]) for r in caplog.records]
    assert [level for level, _ in lines] == ["INFO", "WARNING"]
    assert lines[0][1]["result"] == "accepted"
    assert lines[0][1]["runs"] == [SHOP]
    assert lines[0][1]["delivery"] == recorded("gitlab-push-branch").headers["webhook-id"]
    assert lines[1][1]["status"] == 401
    assert lines[1][1]["delivery"] == ("a b \xff" + "x" * 500)[:97] + "..."


# === Through a real server ===


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    receiver = Receiver(tmp_path, config(max_body="4KiB"))
    with serving(receiver.app) as server:
        server.receiver = receiver  # type: ignore[attr-defined]
        yield server


def sized(size: int) -> Delivery:
    """A signed push to main whose body has exactly this many bytes."""
    body = json.dumps(payload(commits=[]) | {"filler": ""}).encode()
    return signed(body[:-2] + b"x" * (size - len(body)) + b'"}')


def test_a_real_delivery_is_answered_by_a_real_server(served: Served) -> None:
    answer = served.post(recorded("gitlab-push-branch"))
    assert (answer.status_code, answer.json()) == ANSWERS["gitlab-push-branch"]
    assert "Server" not in answer.headers


def test_the_server_takes_a_body_of_the_limit_and_refuses_one_byte_more(served: Served) -> None:
    assert served.post(sized(4096)).status_code == 202
    answer = served.post(sized(4097))
    assert (answer.status_code, answer.json()["reason"]) == (413, "TooLarge")
    assert served.post(recorded("gitlab-push-branch")).status_code == 202


def test_a_chunked_body_is_read_whole_and_bounded_as_well(served: Served) -> None:
    def chunks(delivery: Delivery) -> Any:
        return iter([delivery.body[:10], delivery.body[10:]])

    for size, status in ((4096, 202), (4097, 413)):
        delivery = sized(size)
        answer = requests.post(
            f"{served.url}/webhook", data=chunks(delivery), headers=delivery.headers, timeout=10
        )
        assert answer.status_code == status


def exchange(served: Served, request: bytes) -> int:
    """The status of the answer to raw bytes, 0 when the connection was just closed."""
    with served.connect() as raw:
        raw.sendall(request)
        answer = http.client.HTTPResponse(raw)
        try:
            answer.begin()
        except (http.client.HTTPException, ConnectionError):
            return 0
        return answer.status


POST = b"POST /webhook HTTP/1.1\r\nHost: x\r\n"
# With all that a delivery needs, though none of it is right: a body is read.
FORGED = POST + b"webhook-id: x\r\nwebhook-timestamp: 1\r\nwebhook-signature: v1,x\r\n"
CHUNKED = FORGED + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "statuses"),
    [
        (POST + b"Content-Length: 99999999999\r\n\r\n", {413}),
        (POST + b"Content-Length: 9000\r\n\r\n" + b"x" * 9000, {413}),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"2400\r\n" + b"x" * 0x2400, {401}),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n", {401}),
        (CHUNKED + b"2400\r\n" + b"x" * 0x2400, {413}),
        (CHUNKED + b"2400;" + b"x" * 0x2400, {413}),
        (CHUNKED + b"nonsense\r\n", {400}),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", {501}),
        (POST + b"Content-Length: -5\r\n\r\n", {400}),
        (POST + b"Content-Length: abc\r\n\r\n", {400}),
        (POST + b"Content-Length: 1e3\r\n\r\n", {400}),
        (POST + b"Content-Length: \xd9\xa3\r\n\r\n", {400}),
        (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", {413}),
        (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", {400}),
        (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
        (b"GET http://[x]y/healthz HTTP/1.1\r\nHost: x\r\n\r\n", {200, 400}),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", {400}),
        (POST + b"Content-Length: 0\r\n\r\n", {401}),
        (POST + b"\r\n", {401}),
        (POST + b"X: " + b"y" * 70_000 + b"\r\n\r\n", {431, 0}),
        (POST + b"".join(b"X%d: y\r\n" % n for n in range(8000)) + b"\r\n", {431, 0}),
        (POST + b"webhook-id: \xff\xfe\x00\r\n\r\n", {400, 401}),
        (POST + b"Bad Header\r\n\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", {400}),
        (b"GET /webhook HTTP/1.1\r\nHost: x\r\n\r\n", {405}),
        (b"POST //webhook HTTP/1.0\r\n\r\n", {401, 404}),
        (b"POST /%77ebhook HTTP/1.0\r\n\r\n", {401, 404}),
        (b"POST http://evil/webhook HTTP/1.0\r\n\r\n", {401, 404}),
    ],
    ids=lambda r: repr(r[-40:]) if isinstance(r, bytes) else str(r),
)
def test_a_client_that_lies_gets_an_answer_and_the_next_one_too(
    served: Served, request_: bytes, statuses: set[int]
) -> None:
    assert exchange(served, request_) in statuses
    assert served.post(recorded("gitlab-push-branch")).status_code == 202


def ended(raw: socket.socket, seconds: float) -> bool:
    """Whether the server closes a connection within so many seconds."""
    raw.settimeout(seconds)
    try:
        while raw.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def test_a_body_that_never_comes_is_waited_for_only_so_long(served: Served) -> None:
    served.hurry()
    with served.connect() as raw:
        raw.sendall(FORGED + b"Content-Length: 100\r\n\r\nhalf")
        assert ended(raw, 4)


def test_a_request_that_drips_is_ended_in_the_middle_of_its_dripping(served: Served) -> None:
    served.hurry()
    with served.connect() as raw:
        raw.sendall(FORGED + b"Content-Length: 4000\r\n\r\n")
        started = time.monotonic()
        raw.settimeout(0.02)
        while time.monotonic() - started < 8:
            try:
                raw.sendall(b"x")
                if raw.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert time.monotonic() - started < 8


def test_a_connection_that_is_used_again_and_again_is_not_ended(served: Served) -> None:
    served.hurry()
    with requests.Session() as session:
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            assert session.get(f"{served.url}/readyz", timeout=30).status_code == 200
        assert len(served.server.active_channels) == 1


# === What strangers cannot do ===


def replies(raw: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """The next so many answers on one connection, in order: status and body."""
    answers = []
    with raw.makefile("rb") as file:
        for _ in range(count):
            status = int(file.readline().split(b" ")[1])
            length = 0
            while line := file.readline().strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            answers.append((status, file.read(length)))
    return answers


def raw_request(delivery: Delivery, *more: str) -> bytes:
    """The bytes of a delivery's headers, without those that tell of its body."""
    lines = [*(f"{k}: {v}" for k, v in delivery.headers.items()), *more]
    return b"POST /webhook HTTP/1.1\r\nHost: x\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n"


@pytest.mark.parametrize("length", ["Content-Length: 4000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"], ids=["", "expect"])
@pytest.mark.parametrize(
    ("mode", "headers"),
    [
        ("signature", ""),
        ("signature", "webhook-id: x\r\nwebhook-timestamp: 1\r\n"),
        ("signature", "webhook-id: x\r\nwebhook-timestamp: 1\r\nwebhook-signature: \r\n"),
        ("signature", f"X-Gitlab-Token: {PLAIN}\r\n"),
        ("token", "webhook-id: x\r\nwebhook-timestamp: 1\r\nwebhook-signature: v1,x\r\n"),
        ("hmac", "X-Gitlab-Token:\r\n"),
    ],
)
def test_without_the_headers_of_its_mode_a_request_is_refused_before_its_body(
    tmp_path: Path, mode: str, headers: str, expect: str, length: str
) -> None:
    with serving(Receiver(tmp_path, config(mode)).app) as served, served.connect() as raw:
        raw.sendall(POST + f"{headers}{expect}{length}\r\n\r\n".encode())
        ((status, body),) = replies(raw, 1)
        assert (status, json.loads(body)["reason"]) == (401, "NotAuthentic")
        assert json.loads(body)["text"].endswith(": required")
        assert raw.recv(1) == b""


def test_whoever_sends_a_body_that_nobody_wants_can_still_read_the_answer(tmp_path: Path) -> None:
    big = b"x" * 3_000_000
    with serving(Receiver(tmp_path).app, max_body=2**20) as served:
        for _ in range(10):
            with served.connect() as raw:
                raw.sendall(POST + b"Content-Length: 3000000\r\n\r\n" + big)
                ((status, _),) = replies(raw, 1)
                assert status == 401
        answer = requests.post(f"{served.url}/webhook", data=b"x" * 9_000_000, timeout=10)
        assert (answer.status_code, answer.json()["reason"]) == (413, "TooLarge")


@pytest.mark.parametrize("first", [0, 1, 100, 3000, 20_000])
def test_a_body_can_be_sent_on_after_its_answer_however_much_came_with_the_headers(
    tmp_path: Path, first: int
) -> None:
    with serving(Receiver(tmp_path).app, max_body=2**20) as served, served.connect() as raw:
        raw.sendall(POST + b"Content-Length: 3000000\r\n\r\n" + b"x" * first)
        select.select([raw], [], [], 10)
        raw.sendall(b"x" * (3_000_000 - first))
        ((status, _),) = replies(raw, 1)
        assert status == 401
        assert raw.recv(1) == b""


def test_a_body_that_is_left_alone_is_no_second_request(served: Served) -> None:
    inner = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
    with served.connect() as raw:
        raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(inner) + inner)
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_sender_that_waits_for_100_continue_gets_it(served: Served) -> None:
    delivery = recorded("gitlab-push-branch")
    length = f"Content-Length: {len(delivery.body)}"
    with served.connect() as raw:
        raw.sendall(raw_request(delivery, "Expect: 100-continue", length))
        assert raw.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        raw.sendall(delivery.body)
        assert replies(raw, 1)[0][0] == 202
        raw.sendall(FORGED + b"Expect: 100-continue\r\nContent-Length: 0\r\n\r\n")
        assert replies(raw, 1)[0][0] == 401


@pytest.mark.parametrize("length", ["x", "5, 5", "-1", "5\r\nContent-Length: 5", "9" * 5000])
def test_a_sender_that_waits_for_100_continue_gets_the_answer_to_a_length_that_is_none(
    served: Served, length: str
) -> None:
    with served.connect() as raw:
        head = f"Expect: 100-continue\r\nContent-Length: {length}\r\n\r\n"
        raw.sendall(FORGED + head.encode())
        assert replies(raw, 1)[0][0] == 400
        assert raw.recv(1) == b""


def test_an_answer_to_head_has_no_body_that_could_be_read_as_the_next_answer(
    served: Served,
) -> None:
    for path, status in (("/webhook", 405), ("/nowhere", 404), ("/readyz", 405)):
        with served.connect() as raw:
            raw.sendall(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            head = raw.recv(4096)
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            with raw.makefile("rb") as file:
                second = file.read()
        assert head.startswith(b"HTTP/1.1 %d " % status)
        length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        assert length > 0
        assert head.endswith(b"\r\n\r\n")
        assert (b"\r\nAllow: " in head) is (status == 405)
        assert second.startswith(b"HTTP/1.1 ")


# What the daemon itself calls pushes that GitLab did not announce; 0.1.0 did so without a blank.
OWN = [name.strip() for name in hook.UNANNOUNCED if name]


@pytest.mark.parametrize("mode", ["signature", "token", "hmac"])
@pytest.mark.parametrize("own", OWN)
def test_no_sender_can_call_a_delivery_as_the_daemon_calls_its_own_runs(
    tmp_path: Path, own: str, mode: str
) -> None:
    receiver = Receiver(tmp_path, config(mode))
    name = "webhook-id" if mode == "signature" else "Idempotency-Key"
    with serving(receiver.app) as served:
        for number, text in enumerate((own, f" {own}", f"\xa0{own}")):
            body = json.dumps(payload(ref=f"refs/heads/b{number}", commits=[])).encode()
            digest = hmac.digest(PLAIN.encode(), body, "sha256").hex()
            delivery = signed(body, name=text.strip(" "))
            kept = {k: v for k, v in delivery.headers.items() if k != "webhook-id"}
            kept |= {"X-Gitlab-Token": PLAIN if mode == "token" else digest}
            with served.connect() as raw:
                lines = [*(f"{k}: {v}" for k, v in kept.items()), f"Content-Length: {len(body)}"]
                head = "\r\n".join(["POST /webhook HTTP/1.1", *lines, f"{name}: {text}", "", ""])
                raw.sendall(head.encode("latin-1") + body)
                assert replies(raw, 1)[0][0] in ((202, 401) if text[0] == "\xa0" else (202,))
    assert {run.delivery for run in receiver.stored()} == {own}
    assert own not in hook.UNANNOUNCED


def test_a_push_that_an_older_version_stored_is_not_taken_for_the_daemons_own(
    receiver: Receiver,
) -> None:
    receiver.post(recorded("gitlab-push-branch"))
    (path,) = receiver.directory.glob("*.json")
    record = json.loads(path.read_text("utf-8"))
    for own in OWN:
        path.write_text(json.dumps(record | {"delivery": own}), "utf-8")
        receiver.restart()
        (run,) = receiver.stored()
        assert run.delivery == own
        assert run.delivery not in hook.UNANNOUNCED


def test_requests_sent_without_waiting_are_answered_in_order_and_bounded(served: Served) -> None:
    delivery = recorded("gitlab-push-branch")
    request = raw_request(delivery, f"Content-Length: {len(delivery.body)}") + delivery.body
    with served.connect() as raw:
        raw.sendall(request + b"GET /readyz HTTP/1.1\r\n\r\n" + request)
        answers = replies(raw, 3)
        assert [status for status, _ in answers] == [202, 200, 200]
        assert json.loads(answers[2][1])["status"] == "duplicate"
    with served.connect() as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 300)
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    assert answer.count(b"HTTP/1.1 404 ") == 16
    assert answer.count(b" 400 Bad Request") == 1


def test_a_few_empty_lines_between_requests_are_ignored_and_many_end_the_connection(
    served: Served,
) -> None:
    empty, asking = b"\r\n\r\n", b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
    with served.connect() as raw:
        for _ in range(4):
            raw.sendall(empty * hook.EMPTY_REQUESTS + asking)
            assert replies(raw, 1)[0][0] == 200
        raw.sendall(empty * (hook.EMPTY_REQUESTS + 1) + asking)
        assert replies(raw, 1)[0][0] == 400
        assert raw.recv(1) == b""
    for parts in (1, 8):  # however they arrive
        with served.connect() as raw:
            for _ in range(parts):
                raw.sendall(empty * (2048 // parts))
            assert replies(raw, 1)[0][0] == 400
            assert raw.recv(1) == b""


def test_headers_have_less_time_than_a_body(served: Served) -> None:
    assert hook.ARRIVAL["headers"] == 5
    assert hook.ARRIVAL["body"] == 20
    served.hurry(body=60.0, more=60.0)
    with served.connect() as body, served.connect() as used:
        body.sendall(FORGED + b"Content-Length: 100\r\n\r\nhalf")
        used.sendall(b"GET /readyz HTTP/1.1\r\n\r\n")
        assert replies(used, 1)[0][0] == 200
        used.sendall(b"GET")
        with ExitStack() as opened:
            late = [opened.enter_context(served.connect()) for _ in range(3)]
            for raw, beginning in zip(late, (b"", b"P", FORGED), strict=True):
                raw.sendall(beginning)
            assert all(ended(raw, 8) for raw in (*late, used))
        assert not ended(body, 0.1)


def test_when_there_are_too_many_the_one_that_waits_longest_gives_way(served: Served) -> None:
    served.server.most = 3
    with ExitStack() as opened:
        first, second, third = (opened.enter_context(served.connect()) for _ in range(3))
        for raw in (first, second, third):
            raw.sendall(b"GET /readyz HTTP/1.1\r\n\r\n")
            assert replies(raw, 1)[0][0] == 200
        served.quiet()
        second.sendall(POST)
        first.sendall(b"GET /readyz HTTP/1.1\r\n\r\n")  # the others wait longer now
        assert replies(first, 1)[0][0] == 200
        served.quiet()
        fourth = opened.enter_context(served.connect())
        with ThreadPoolExecutor(4) as pool:
            gone = [*pool.map(lambda raw: ended(raw, 1), (third, first, second, fourth))]
        assert gone == [True, False, False, False]
        assert served.post(recorded("gitlab-push-branch")).status_code == 202
        assert ended(second, 8)


def test_of_too_many_bodies_the_oldest_unfinished_ones_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "HELD_BYTES", 1_000_000)
    with serving(Receiver(tmp_path).app, max_body=2**20) as served, ExitStack() as opened:
        idle = opened.enter_context(served.connect())
        senders = []
        for _ in range(8):
            raw = opened.enter_context(served.connect())
            raw.sendall(FORGED + b"Content-Length: 400000\r\n\r\n" + b"x" * 300_000)
            senders.append(raw)
            before = time.monotonic()
            while sum(c.held for c in [*served.server.active_channels.values()]) > 1_000_000:
                assert time.monotonic() - before < 8
        assert [ended(raw, 1) for raw in senders[:4]] == [True] * 4
        assert not ended(senders[7], 0.2)
        assert not ended(idle, 0.1)
        assert served.post(recorded("gitlab-push-branch")).status_code == 202


def pages(size: int) -> hook.Site:
    """A site with a page of so many bytes, and a path that answers four requests at a time."""
    meeting = threading.Barrier(hook.SERVER["threads"])
    page = hook.Answer(200, hook.Html("x" * size))
    site = hook.Site(hook.Metrics())
    site.routes = {
        "/page": hook.Route("GET", lambda _: page),
        "/meet": hook.Route("GET", lambda _: hook.Answer(200, {"status": str(meeting.wait(20))})),
    }
    return site


PAGE = b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n"


def never_read(served: Served, asks: bytes) -> socket.socket:
    """A connection that asks and takes in as little of the answers as it can."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", served.port))
    raw.sendall(asks)
    return raw


def at_rest(served: Served, count: int) -> None:
    """Wait until so many connections have more to get, and nothing was sent for a while."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        channels = [*served.server.active_channels.values()]
        latest = max((c.last_activity for c in channels), default=time.time())
        if sum(c.total_outbufs_len > 0 for c in channels) == count and time.time() > latest + 1:
            return
    raise AssertionError("something is sent all the time")


def all_threads_are_free(served: Served) -> bool:
    """Whether as many requests as there are threads are answered at the same time."""
    asked = [f"{served.url}/meet"] * hook.SERVER["threads"]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [*pool.map(lambda url: requests.get(url, timeout=30), asked)]
    return {answer.status_code for answer in answers} == {200}


def none_left(served: Served, seconds: float) -> bool:
    """Whether the server has closed all connections within so many seconds."""
    until = time.monotonic() + seconds
    while served.server.active_channels and time.monotonic() < until:
        pass
    return not served.server.active_channels


def test_clients_that_ask_for_many_pages_and_read_none_hold_no_thread() -> None:
    with serving(pages(1_600_000)) as served:
        with ExitStack() as opened:
            for _ in range(hook.SERVER["threads"]):
                opened.enter_context(never_read(served, PAGE * hook.REQUESTS_AT_ONCE))
            at_rest(served, hook.SERVER["threads"])
            assert all_threads_are_free(served)
        assert none_left(served, 20)
        assert all_threads_are_free(served)


def test_a_client_that_reads_no_answer_is_closed_in_time() -> None:
    with serving(pages(1_600_000)) as served:
        served.hurry()
        with never_read(served, PAGE * hook.REQUESTS_AT_ONCE):
            assert none_left(served, 20)
        assert all_threads_are_free(served)


def test_a_client_that_reads_slowly_gets_all_its_pages() -> None:
    size, count = 1_600_000, 5
    with serving(pages(size)) as served:
        served.hurry(more=3.0)
        began = time.monotonic()
        last = PAGE.replace(b"Host", b"Connection: close\r\nHost")
        with never_read(served, PAGE * (count - 1) + last) as raw:
            raw.settimeout(20)
            answers = bytearray()
            while part := raw.recv(65536):
                answers += part
                time.sleep(len(part) / 2_000_000)
        assert none_left(served, 20)
        assert answers.count(b"HTTP/1.1 200 OK") == count
        assert answers.count(b"x" * size) == count
        assert time.monotonic() - began > 3


def test_of_too_much_that_nobody_reads_the_oldest_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 10_000_000  # the system takes four of them at most
    monkeypatch.setattr(hook, "HELD_BYTES", 11_000_000)
    with serving(pages(size)) as served:
        served.hurry(headers=300.0, more=300.0)  # nothing is late
        with never_read(served, PAGE) as first:
            at_rest(served, 1)
            (oldest,) = served.server.active_channels.values()
            with never_read(served, PAGE) as second:
                until = time.monotonic() + 20
                while oldest.connected and time.monotonic() < until:
                    pass
                assert len(replies(first, 1)[0][1]) < size
                assert len(replies(second, 1)[0][1]) == size
        assert none_left(served, 20)


HEAVY = {
    "blanks": b"GET / HTTP/1.1\r\na:" + b" " * 15_000 + b"\x00\r\n\r\n",
    "tabs": b"GET / HTTP/1.1\r\na:" + b"\t" * 60_000 + b"\x00\r\n\r\n",
    "folded blanks": b"GET / HTTP/1.1\r\na:" + b"\r\n        " * 1500 + b"\x00\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 3900 + b"\r\n",
    "a long address": b"GET a://" + b"1" * 10_000 + b" HTTP/1.1\r\n\r\n",
    "an address of digits": b"GET a://" + b"1" * 2000 + b" HTTP/9\r\n\r\n",
    "chunks of one byte": CHUNKED + b"1\r\nx\r\n" * 10_000,
    "an endless chunk's name": CHUNKED + b"1;" + b"x" * 60_000,
    "an endless end": CHUNKED + b"0\r\n" + b"x" * 60_000,
}


@pytest.mark.parametrize("heavy", HEAVY.values(), ids=HEAVY)
def test_what_would_take_long_to_understand_is_refused(tmp_path: Path, heavy: bytes) -> None:
    with serving(Receiver(tmp_path).app, max_body=2**20) as served, ExitStack() as opened:
        for _ in range(20):
            raw = opened.enter_context(served.connect())
            raw.sendall(heavy)
        ((status, _),) = replies(raw, 1)
        assert status in (400, 431)
        assert served.post(recorded("gitlab-push-branch")).status_code == 202


def test_urgent_data_ends_a_connection_and_keeps_nobody_busy(served: Served) -> None:
    with served.connect() as raw:
        raw.send(b"x", socket.MSG_OOB)
        assert ended(raw, 3)


def test_two_hundred_slow_clients_keep_no_delivery_waiting(served: Served) -> None:
    beginnings = [b"P", FORGED, FORGED + b"Content-Length: 100\r\n\r\nhalf"]
    slow = []
    try:
        for number in range(200):
            raw = served.connect()
            slow.append(raw)
            raw.sendall(beginnings[number % 3])
        started = time.monotonic()
        assert served.post(recorded("gitlab-push-branch")).status_code == 202
        assert time.monotonic() - started < 4  # the slow ones are closed after 5
    finally:
        for raw in slow:
            raw.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """So many open files that the next ones have numbers that select does not know."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, before[1]), before[1]))
    with ExitStack() as opened:
        for _ in range(1024):
            opened.enter_context(Path(os.devnull).open())
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_with_a_thousand_open_files_still_answers(
    many_files: None, served: Served
) -> None:
    assert served.post(recorded("gitlab-push-branch")).status_code == 202


def test_fifty_senders_at_once_are_all_answered_and_all_stored(served: Served) -> None:
    deliveries = [signed(payload(ref=f"refs/heads/b{n}", commits=[])) for n in range(100)]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(served.post, deliveries))
    assert {a.status_code for a in answers} == {202}
    stored = served.receiver.stored()  # type: ignore[attr-defined]
    assert {r.branch for r in stored} == {f"b{n}" for n in range(100)}


# === The second port ===


def test_the_second_port_has_metrics_and_probes_and_takes_no_deliveries(receiver: Receiver) -> None:
    receiver.metrics.errors.labels("request").inc()
    with serving(receiver.app.admin(), max_body=0) as served:
        answer = requests.get(f"{served.url}/metrics", timeout=30)
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert 'gitops_hook_errors_total{where="request"} 1.0' in answer.text
        for path in ("/healthz", "/readyz"):
            answer = requests.get(f"{served.url}{path}", timeout=30)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        for path in ("/webhook", "/metrics/", "/favicon.ico", "/apps", "/apps/shop/x", "/x/shop"):
            assert requests.get(f"{served.url}{path}", timeout=30).status_code == 404
        assert served.post(recorded("gitlab-push-branch")).status_code == 404
        assert requests.post(f"{served.url}/metrics", timeout=30).status_code == 405
    assert receiver.stored() == []
    assert not [s for s in receiver.metrics.deliveries.collect()[0].samples if s.value]


def test_it_is_not_alive_when_the_loop_of_the_first_port_stands_still(receiver: Receiver) -> None:
    now = [100.0]
    clock: Any = SimpleNamespace(monotonic=lambda: now[0])
    pulses = receiver.controller.heartbeats = hook.Heartbeats(clock)
    beat = partial(pulses.beat, "first port", hook.LOOP_SECONDS)
    held = threading.Event()

    def health() -> tuple[int, Any]:
        answer = requests.get(f"{admin.url}/healthz", timeout=30)
        return answer.status_code, answer.json()["status"]

    with serving(receiver.app, beat=beat) as first, serving(receiver.app.admin()) as admin:
        first.server.adj.asyncore_loop_timeout = 0.05
        try:
            for _ in range(5):  # when nobody asks it the loop goes on as well
                now[0] += hook.LOOP_SECONDS
                assert requests.get(f"{first.url}/healthz", timeout=30).status_code == 200
                assert health() == (200, "ok")
            first.server.trigger.pull_trigger(partial(held.wait, 30))
            first.server.trigger.pull_trigger()
            until = time.monotonic() + 10
            while health()[0] == 200 and time.monotonic() < until:
                now[0] += hook.LOOP_SECONDS
            assert health() == (503, "stuck: first port")
        finally:
            held.set()
        until = time.monotonic() + 10
        while health()[0] != 200 and time.monotonic() < until:
            pass
        assert health() == (200, "ok")


def test_a_place_that_is_taken_is_an_error_that_names_it(served: Served) -> None:
    taken = f"127.0.0.1:{served.port}"
    with pytest.raises(hook.ConfigError, match=f"cannot listen on '{taken}': .*in use"):
        hook.Server(served.receiver.app, taken, 10)  # type: ignore[attr-defined]


def test_a_name_with_two_addresses_is_listened_to_on_one() -> None:
    with_name = hook.Server(hook.Site(hook.Metrics()), "localhost:0", 10)
    assert int(with_name.effective_port) > 0
    with_name.task_dispatcher.shutdown()
    with_name.close()
