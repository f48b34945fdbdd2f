"""The worker of a bake: what it does about a verdict, with threads and kubectl as they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import gitops_hook as hook
from tests.test_deploy_parts import OK, a_release, answering, history, ready_at, task, two_pods
from tests.world import eventually

ANSWER = OK + b"\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\n\r\n"
WELL = hook.PodHealth(2, 2)


@dataclass
class Baking:
    """A bake whose version answers as a test says; confirming it takes one call."""

    bake: hook.Bake
    traffic: hook.Traffic  # the urgent one
    parts: list[bytes]
    service: hook.Service
    confirm: Callable[[], object]
    reported: list[str]
    preview: hook.HealthCheck | None  # None for a bake that another process began

    def run(self) -> None:
        """Go through it to its end."""
        self.bake.run(self.service, self.preview)

    def turn_unhealthy(self) -> None:
        """Let the version answer as unhealthy from now on, and wait until this is seen."""
        self.parts[:] = [BUSY]
        eventually(lambda: self.bake.checks.failures > 0, 10, "it is unhealthy")


@pytest.fixture
def baking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Baking]:
    """A bake of half a second, whose endpoints have come."""
    parts = [ANSWER]
    with answering(parts) as port:
        doors = history(tmp_path, two_pods(2), two_pods(2), port=port).doors
        made = hook.Deployer(replace(doors, clock=hook.Clock(), stop=threading.Event()))
        deploy = replace(task().app.deploy, bake=0.5, rollout_timeout=2.0)
        run = replace(task(), app=replace(task().app, deploy=deploy))
        pods = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
        spec = {"replicas": 2, "template": {"spec": {"containers": [{"name": "web"}]}}}
        ports = [{"port": 80, "targetPort": port}]
        release = replace(a_release({"spec": spec}), service={"spec": {"ports": ports}})
        bake = hook.Bake(made.steady, made.urgent, run, release, pods)
        service = made.steady.live.read(run)
        assert service is not None
        one = Baking(bake, made.urgent.traffic, parts, service, lambda: None, [], ready_at(port))
        made.doors.reports.sinks.append(lambda transition: one.reported.append(transition.state))

        def confirm(_task: Any, _release: Any, proof: Callable[[], bool], **_: Any) -> bool:
            proven = proof()
            if proven:
                one.confirm()
            return proven

        there = hook.EndpointState(converged=True, reacted=True)
        monkeypatch.setattr(made.urgent.rollout, "preview", lambda *_: ready_at(port))
        monkeypatch.setattr(made.urgent.traffic, "endpoints_converge", lambda *_: True)
        monkeypatch.setattr(made.urgent.workloads, "endpoints", lambda *_: there)
        monkeypatch.setattr(made.steady.traffic, "confirm", confirm)
        yield one


def test_a_version_that_turns_unhealthy_after_its_confirmation_is_not_switched_back(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    baking.confirm = baking.turn_unhealthy
    monkeypatch.setattr(baking.traffic, "switch_back_if_worse", must_not_be_called)
    baking.run()
    assert baking.bake.look.confirmed_at is not None


def test_a_version_is_asked_for_health_from_the_start_whatever_the_api_server_does(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    baking.parts[:] = [BUSY]
    monkeypatch.setattr(baking.bake.urgent.rollout, "preview", refuse)
    monkeypatch.setattr(baking.traffic, "switch_back_if_worse", must_not_be_called)
    with pytest.raises(hook.StageError, match="UnhealthyAfterSwitch"):
        baking.run()


def refuse(*_: Any) -> None:
    raise hook.KubectlError(["get"], 1, "Unable to connect to the server")


def test_a_bake_that_another_process_began_looks_for_the_preview_service_first(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, baking.preview = baking.preview, None
    monkeypatch.setattr(hook, "REBAKE_SECONDS", 0.2)
    baking.run()
    assert baking.bake.look.preview == here
    assert baking.bake.judged_seconds_needed == 0.2
    assert baking.bake.look.confirmed_at is not None


def test_a_preview_service_that_was_changed_before_the_bake_is_pointed_at_the_version_again(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = baking.preview
    with answering([ANSWER]) as other:
        baking.preview = ready_at(other)
        baking.run()
    assert baking.bake.look.preview == here


@pytest.fixture
def misled(baking: Baking, monkeypatch: pytest.MonkeyPatch) -> Iterator[Baking]:
    """A bake through whose preview Service another answers; the version's own pods are healthy."""
    monkeypatch.setattr(baking.traffic, "switch_back_if_worse", lambda *_: None)
    with answering([BUSY]) as other:
        monkeypatch.setattr(baking.bake.urgent.rollout, "preview", lambda *_: ready_at(other))
        yield baking


def test_a_preview_service_that_was_changed_in_the_bake_is_repaired(
    misled: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = misled.preview
    monkeypatch.setattr(misled.bake.urgent.rollout, "try_preview", lambda *_: here)
    monkeypatch.setattr(misled.bake, "settings", replace(misled.bake.settings, rollout_timeout=20))
    misled.run()
    assert misled.bake.look.preview == here
    assert misled.reported == []


@pytest.mark.parametrize("failed", ["someone-else's", "not-answered"])
def test_a_preview_service_that_cannot_be_repaired_ends_no_bake_and_hides_no_pods(
    misled: Baking, monkeypatch: pytest.MonkeyPatch, failed: str
) -> None:
    tries = []

    def fail(*_: Any) -> None:
        tries.append(misled.bake.look.read_at)
        if failed == "not-answered":
            refuse()
        raise hook.StageError(hook.Reason.ADOPTION_REFUSED, "it belongs to someone else")

    def give_up(*_: Any, **__: Any) -> None:
        raise hook.StageError(hook.Reason.UNJUDGED, "it could not be judged")

    monkeypatch.setattr(hook, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(misled.bake.urgent.rollout, "try_preview", fail)
    monkeypatch.setattr(misled.traffic, "compare_versions", give_up)
    with pytest.raises(hook.StageError, match="it could not be judged"):
        misled.run()
    assert misled.bake.look.read_at >= tries[-1] > tries[0], "pods are read in between"


def test_a_preview_service_is_not_suspected_while_pods_are_taken_away(
    misled: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def give_up(*_: Any, **__: Any) -> None:
        raise hook.StageError(hook.Reason.UNJUDGED, "it could not be judged")

    monkeypatch.setattr(hook, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(misled.bake.urgent.workloads, "size", lambda *_: 3)
    monkeypatch.setattr(misled.bake.urgent.rollout, "try_preview", lambda *_: tries.append(1))
    monkeypatch.setattr(misled.traffic, "compare_versions", give_up)
    with pytest.raises(hook.StageError, match="it could not be judged"):
        misled.run()
    assert misled.bake.excused
    assert tries == []


def must_not_be_called(*_: Any) -> None:
    raise hook.StageError(hook.Reason.UNHEALTHY_AFTER_SWITCH, "it is unhealthy")


def test_a_version_that_turned_unhealthy_while_its_confirmation_hung_is_switched_back(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = threading.Event()

    def hang() -> None:
        baking.turn_unhealthy()
        assert left.wait(20)

    def switch_back(*_: Any) -> None:
        left.set()
        raise hook.StageError(hook.Reason.UNHEALTHY_AFTER_SWITCH, "it is unhealthy")

    baking.confirm = hang
    monkeypatch.setattr(baking.traffic, "switch_back_if_worse", switch_back)
    with pytest.raises(hook.StageError, match="UnhealthyAfterSwitch"):
        baking.run()


def test_a_bake_whose_endpoints_do_not_come_ends_with_that_reason(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baking.traffic, "endpoints_converge", lambda *_: False)
    with pytest.raises(hook.StageError, match="EndpointsMissing"):
        baking.run()


def alike(baking: Baking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both versions be as healthy, and the new one impossible to judge."""
    versions = hook.Versions(hook.HistoryEntry(run="shop-old"), WELL, WELL)
    monkeypatch.setattr(baking.traffic, "compare_versions", lambda *_, **__: versions)
    monkeypatch.setattr(hook, "pods_taken_away", lambda *_: True)


def test_a_version_is_said_to_stay_unjudged_only_when_that_is_confirmed(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike(baking, monkeypatch)
    before: list[str] = []
    baking.confirm = lambda: before.extend(baking.reported)
    baking.run()
    assert before == []
    assert baking.reported == [hook.State.UNJUDGED]


def test_a_version_that_can_neither_be_judged_nor_confirmed_ends_unjudged(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike(baking, monkeypatch)
    monkeypatch.setattr(baking.bake.steady.traffic, "confirm", lambda *_, **__: False)
    with pytest.raises(hook.StageError, match=r"^Unjudged: health could not"):
        baking.run()
    assert baking.reported == []


def test_a_version_is_confirmed_however_slow_the_api_server_is(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = baking.bake.urgent.live.read

    def slowly(run: hook.Task) -> hook.Service | None:
        time.sleep(0.4)
        return read(run)

    monkeypatch.setattr(hook, "FRESH_SECONDS", 0.5)
    monkeypatch.setattr(baking.bake.urgent.live, "read", slowly)
    baking.bake.judged_seconds_needed = 0.0
    baking.run()
    assert baking.bake.look.confirmed_at is not None
    assert hook.State.UNJUDGED not in baking.reported


def test_the_pods_are_asked_again_as_soon_as_another_check_fails(
    baking: Baking, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = ["", "", "it hangs"]
    asked: list[int] = []

    def ask(*_: Any) -> list[str]:
        asked.append(baking.bake.checks.failures)
        return [word for word in [refusals.pop(0)] if word]

    monkeypatch.setattr(hook, "refusals_of", ask)
    monkeypatch.setattr(baking.traffic, "switch_back_if_worse", must_not_be_called)
    baking.bake.settings = replace(baking.bake.settings, rollout_timeout=60.0)
    baking.bake.judged_seconds_needed = 60.0
    baking.parts[:] = [BUSY]
    monkeypatch.setattr(baking.bake.urgent.workloads, "size", lambda *_: 3)  # one is missing
    with pytest.raises(hook.StageError, match="UnhealthyAfterSwitch"):
        baking.run()
    assert len(asked) == 3
    assert asked[2] - asked[0] <= 4
