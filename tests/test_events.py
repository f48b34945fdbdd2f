"""What `kubectl describe` shows: the real kubectl, against the stand-in's API server."""

from __future__ import annotations

import itertools
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gitops_hook as hook
from gitops_hook import State, Transition
from tests.idle_controller import HeldClock
from tests.standin.api import Api
from tests.standin.faults import Fault
from tests.standin.kubectl import find_kubectl
from tests.standin.store import Store
from tests.waiting import eventually
from tests.world import Object

CONFIG = hook.load_config("""
apps:
  - {name: shop, repository: /shop.git, build: {builder: none}, deploy: {service: front}}
  - {name: blog, repository: /blog.git, build: {builder: none}}
""")
RUN = hook.Run(id="shop-1-2", app="shop", ref="refs/heads/main", commit="a" * 40)
OLD = "shop-0-1"
SECRET = "glpat-aBcDeFgHiJkLmNoPqRsT"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("events")
    with Api(Store()) as api, pytest.MonkeyPatch.context() as patch:
        for name in ("test", "build", "staging", "production"):
            api.store.create("namespaces", {"metadata": {"name": name}})
        patch.setenv("KUBECONFIG", str(api.kubeconfig(home / "kubeconfig")))
        patch.setenv("HOME", str(home))
        for name, run in (("shop-blue", OLD), ("shop-green", RUN.id)):
            labels = {"version": name, hook.LABEL_RUN: run}
            pod = {"containers": [{"name": "web", "image": "web"}]}
            spec = {
                "selector": {"matchLabels": {"version": name}},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            }
            meta = {"name": name, "namespace": "staging", "labels": labels}
            api.store.create("deployments", {"metadata": meta, "spec": spec})
        spec = {"selector": {"version": "shop-green"}, "ports": [{"port": 80}]}
        meta = {"name": "front", "namespace": "staging"}
        api.store.create("services", {"metadata": meta, "spec": spec})
        job = hook.test_job(CONFIG, CONFIG.apps[0], RUN)
        api.store.create("jobs", job)
        yield api


class Sent(hook.Events):
    """Events of the objects above, by a clock that a test holds."""

    def __init__(self, api: Api, directory: Path) -> None:
        self.api = api
        (directory / "git-credentials").write_text(f"https://user:{SECRET}@git.example.com\n")
        kubectl = hook.Kubectl(hook.Metrics(), program=find_kubectl())
        super().__init__(CONFIG, kubectl, hook.Secrets(directory), HeldClock(), self.jobs)

    def jobs(self) -> dict[str, dict[str, hook.Job]]:
        manifest = self.api.store.find("jobs", "test", f"test-{RUN.id}")
        return {RUN.id: {"test": hook.Job(manifest)}} if manifest else {}

    def tell(self, state: State, **more: Any) -> None:
        """Report something, and wait until it is sent."""
        self.take(transition(state, **more))
        self.send_all()

    @property
    def failures(self) -> float:
        metrics = self.kubectl.metrics.registry
        name = "gitops_hook_reports_failed_total"
        return metrics.get_sample_value(name, {"sink": "events"}) or 0.0


TIMES = itertools.count(1_700_000_000)


def transition(state: State, **more: Any) -> Transition:
    values = {"run": RUN.id, "app": "shop", "environment": "staging", "at": float(next(TIMES))}
    return Transition(state=state, **{**values, **more})


@pytest.fixture
def events(api: Api, tmp_path: Path) -> Iterator[Sent]:
    yield Sent(api, tmp_path)
    api.faults.clear()
    for event in listed(api):
        meta = event["metadata"]
        api.store.remove("events", meta["namespace"], meta["name"])


def listed(api: Api, kind: str = "") -> list[Object]:
    """The Events about objects of a kind, oldest first."""
    every = [e for e in api.store.list("events") if kind in ("", e["involvedObject"]["kind"])]
    return sorted(every, key=lambda event: str(event["firstTimestamp"]))


def told(api: Api, kind: str) -> list[tuple[str, str, str]]:
    """Name, reason and type of what is told about objects of a kind."""
    named = [(e["involvedObject"]["name"], e["reason"], e["type"]) for e in listed(api, kind)]
    return [(name, reason, type_) for name, reason, type_ in named]


def described(*words: str) -> list[str]:
    """The lines that `kubectl describe` shows of Events: reason and message."""
    argv = [find_kubectl(), "describe", *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    _, _, rows = done.stdout.partition("\nEvents:")
    return re.findall(r"(?m)^ +(?:Normal|Warning) +(\w+ .*)$", rows)


def test_what_happens_to_a_run_is_told_on_service_deployment_and_job(
    api: Api, events: Sent
) -> None:
    events.tell(State.CLAIMED)
    assert told(api, "Service") == [("front", "Claimed", "Normal")]
    assert told(api, "Deployment") == [("shop-green", "Claimed", "Normal")]
    assert told(api, "Job") == [("test-shop-1-2", "Claimed", "Normal")]


def test_the_real_kubectl_describes_the_story_in_its_order(api: Api, events: Sent) -> None:
    events.tell(State.CLAIMED)
    events.tell(State.SWITCHED)
    events.tell(State.SWITCHED_BACK, reason="UnhealthyAfterSwitch", detail="status 503")
    told = [re.sub(r" +", " ", line) for line in described("service", "front", "-n", "staging")]
    ages = [re.sub(r"(\w+) \S+ gitops-hook (.*)", r"\1: \2", line) for line in told]
    assert ages == [
        "Claimed: Run shop-1-2 is being deployed.",
        "Switched: The traffic goes to run shop-1-2.",
        "SwitchedBack: The traffic went back from run shop-1-2: UnhealthyAfterSwitch: status 503",
    ]
    assert len(described("job", "test-shop-1-2", "-n", "test")) == 3
    assert len(described("deployment", "shop-green", "-n", "staging")) == 3
    assert described("deployment", "shop-blue", "-n", "staging") == []


@pytest.mark.parametrize("state", State)
def test_every_state_of_an_environment_is_told_or_has_no_event(
    api: Api, events: Sent, state: State
) -> None:
    silent = {State.QUEUED, State.ENDED}
    events.tell(state, by="changed by kubectl-edit", detail="it {is} so")
    reasons = {event["reason"] for event in listed(api)}
    assert len(reasons) == (state not in silent)
    assert all(re.fullmatch("([A-Z][a-z]+)+", reason) for reason in reasons)


@pytest.mark.parametrize(
    ("outcome", "reason", "shown"),
    [
        ("failed", "ManifestRefused", ("ManifestRefused", "Warning")),
        ("failed", "Odd words", ("Failed", "Warning")),
        ("deployed", "Ok", ("Deployed", "Normal")),
        ("switched-back", "UnhealthyAfterSwitch", None),  # which was told already
        ("superseded", "NotHead", ("Superseded", "Normal")),
        ("tested", "Ok", None),
    ],
)
def test_an_end_is_told_that_nothing_else_tells(
    api: Api, events: Sent, outcome: str, reason: str, shown: tuple[str, str] | None
) -> None:
    events.tell(State.ENDED, environment="", stage="staging", outcome=outcome, reason=reason)
    expected = {shown} if shown else set()
    assert {(e["reason"], e["type"]) for e in listed(api)} == expected
    kinds = {event["involvedObject"]["kind"] for event in listed(api)}
    assert kinds == ({"Service", "Deployment", "Job"} if shown else set())


def test_a_run_that_ends_by_its_tests_is_told_on_its_job_alone(api: Api, events: Sent) -> None:
    words = {"outcome": "failed", "reason": "TestsFailed", "detail": "1 failed"}
    events.tell(State.ENDED, environment="", stage="test", **words)
    assert told(api, "") == [("test-shop-1-2", "TestsFailed", "Warning")]
    (event,) = listed(api)
    assert event["message"] == "Run shop-1-2 has failed: 1 failed"


def test_an_event_has_all_that_a_cluster_and_its_readers_want(api: Api, events: Sent) -> None:
    events.tell(State.SWITCHED, at=1_700_000_000.9)
    (event,) = listed(api, "Service")
    service = api.store.find("services", "staging", "front")
    assert service
    assert event["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Service",
        "name": "front",
        "namespace": "staging",
        "uid": service["metadata"]["uid"],
    }
    assert event["metadata"]["namespace"] == "staging"
    assert event["reportingComponent"] == event["source"]["component"] == "gitops-hook"
    assert event["firstTimestamp"] == event["lastTimestamp"] == "2023-11-14T22:13:20Z"
    assert event["count"] == 1


def test_no_secret_and_no_endless_text_reaches_an_event(api: Api, events: Sent) -> None:
    events.tell(State.SWITCHED_BACK, detail=f"{SECRET}\n\x1b[31m" + "ü" * 5000)
    assert listed(api)
    for event in listed(api):
        message = event["message"]
        assert SECRET not in message
        assert "***" in message
        assert message.isprintable()
        assert len(message.encode()) <= hook.EVENT_BYTES < 1024


def test_the_same_is_told_once_however_often_it_is_sent(api: Api, events: Sent) -> None:
    switched = transition(State.SWITCHED)
    for _ in range(2):
        events.take(switched)
        events.send_all()
    assert len(listed(api, "Service")) == 1
    assert events.failures == 0
    events.tell(State.SWITCHED)
    assert len(listed(api, "Service")) == 2


def test_that_a_run_still_waits_for_the_same_is_told_every_five_minutes(
    api: Api, events: Sent
) -> None:
    waits = {"environment": "", "stage": "test", "reason": "QuotaExceeded"}
    clock: Any = events.clock
    for number in range(3):
        events.tell(State.WAITS, detail=f"used: {number}", **waits)
    assert told(api, "") == [("test-shop-1-2", "Waiting", "Normal")]
    events.tell(State.WAITS, **{**waits, "reason": "Unschedulable"})
    assert len(listed(api)) == 2
    clock.time += hook.REPEATED_SECONDS + 1
    events.tell(State.WAITS, **waits)
    assert len(listed(api)) == 3


def test_of_a_run_that_has_no_object_nothing_is_told(api: Api, events: Sent) -> None:
    events.tell(State.CLAIMED, app="blog", run="blog-1-2")
    events.tell(State.CLAIMED, app="gone", run="gone-1-2")
    assert listed(api) == []
    assert events.failures == 0


# Trouble


def test_while_the_api_server_is_away_events_wait_and_it_is_logged_once(
    api: Api, events: Sent, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    program = tmp_path / "kubectl"
    refusal = (
        "The connection to the server 127.0.0.1:1 was refused - did you specify the right host?"
    )
    program.write_text(f"#!/bin/sh\necho '{refusal}' >&2\nexit 1\n")
    program.chmod(0o755)
    events.kubectl.program = str(program)
    events.take(transition(State.CLAIMED))
    assert events.send_all() == hook.AGAIN_SECONDS
    events.take(transition(State.SWITCHED))
    assert events.send_all() == hook.AGAIN_SECONDS
    assert [line.message for line in caplog.records] == ["Events not created"]
    assert events.failures == 2
    events.kubectl.program = find_kubectl()
    assert events.send_all() == hook.UNCHANGED_SECONDS
    assert [reason for _, reason, _ in told(api, "Service")] == ["Claimed", "Switched"]
    api.faults.add(Fault("forbid", verb="create", resource="events", times=None))
    events.tell(State.CLAIMED)
    assert len(caplog.records) == 2


def test_what_is_refused_is_given_up_and_keeps_back_nothing_else(api: Api, events: Sent) -> None:
    here = {"verb": "create", "resource": "events", "namespace": "staging"}
    forbidden = api.faults.add(Fault("forbid", times=None, **here))
    events.tell(State.CLAIMED)
    assert told(api, "") == [("test-shop-1-2", "Claimed", "Normal")]
    assert events.failures == 1
    assert events.send_all() == hook.UNCHANGED_SECONDS
    api.faults.lift(forbidden)
    events.tell(State.SWITCHED)
    assert len(listed(api, "Service")) == 1


def test_whoever_reports_never_waits(api: Api, events: Sent) -> None:
    hangs = api.faults.add(Fault("hang", times=None))
    sender = threading.Thread(target=events.send_all)
    events.take(transition(State.CLAIMED))
    sender.start()
    eventually(lambda: api.faults.holds(hangs), 10, "the first one hangs")
    began = time.monotonic()
    for _ in range(2 * hook.EVENTS_QUEUED):
        events.take(transition(State.SWITCHED))
    assert time.monotonic() - began < 5
    assert events.failures == hook.EVENTS_QUEUED
    events.ended.set()
    api.faults.lift(hangs)
    sender.join(60)
    assert not sender.is_alive()
    assert told(api, "Service") == [("front", "Claimed", "Normal")]


def test_many_are_sent_in_few_calls(api: Api, events: Sent) -> None:
    for _ in range(30):
        events.take(transition(State.SWITCHED))
    events.send_all()
    assert len(listed(api, "Service")) == 30
    family = next(f for f in events.kubectl.metrics.kubectl.collect())
    calls = {s.labels["verb"]: s.value for s in family.samples if s.name.endswith("_total")}
    assert calls == {"get": 1, "create": 2}


def test_a_log_line_does_not_tell_what_a_run_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gitops_hook")
    sinks: list[Transition] = []
    reports = hook.Reports(hook.Metrics())
    reports.sinks.append(sinks.append)
    waits = replace(transition(State.WAITS), reason="QuotaExceeded")
    reports.emit(waits)
    assert sinks == [waits]
    assert not caplog.records
