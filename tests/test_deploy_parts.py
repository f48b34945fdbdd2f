"""Pieces of a deployment that need no cluster: what is concluded from what kubectl says."""

from __future__ import annotations

import copy
import json
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

import gitops_hook as hook
from tests.idle_controller import Stop
from tests.settings import loaded
from tests.world import eventually

Object = dict[str, Any]
EARLY, LATE = "2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z"
SWITCHED = hook.epoch("2020-01-01T12:00:00Z")
OLD, NEW = {"gitops-hook/run": "shop-old"}, {"gitops-hook/run": "shop-new"}
APP = "name: shop, repository: /srv/shop.git, build: {image: registry/shop}"
CONFIG = f"apps: [{{{APP}, deploy: {{health: {{path: /ready}}}}}}]"


class Seconds(hook.Clock):
    """A clock on which a second goes by with each look at it."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.monotonic = self.tick  # type: ignore[method-assign, assignment]

    def tick(self) -> float:
        self.at += 1.0
        return self.at


def named(name: str) -> Object:
    return {"metadata": {"name": name}, "spec": {}, "status": {}}


def slices(*pods: str) -> Object:
    """The EndpointSlice of a Service with these ready pods."""
    ready = {"conditions": {"ready": True}, "addresses": ["10.0.0.1"]}
    endpoints = [{**ready, "targetRef": {"kind": "Pod", "name": pod}} for pod in pods]
    return {"items": [{**named("shop-x"), "endpoints": endpoints}]}


def ready_pod(name: str, created: str = EARLY) -> Object:
    condition = {"type": "Ready", "status": "True"}
    meta = {"name": name, "resourceVersion": "1", "creationTimestamp": created}
    spec = {"containers": [{"name": "web"}]}
    return {"metadata": meta, "spec": spec, "status": {"conditions": [condition]}}


def deployer(folder: Path, looks: list[Object]) -> hook.Deployer:
    """A deployer whose kubectl answers each look at the endpoints with the next of these."""
    live = {"metadata": {"name": "shop", "resourceVersion": "1"}, "spec": {"selector": NEW}}
    pods = {"items": [ready_pod("shop-new-1"), ready_pod("shop-new-2")]}
    (folder / "pods").write_text(json.dumps(pods))
    (folder / "service").write_text(json.dumps(live))
    for number, look in enumerate(looks):
        (folder / f"look{number}").write_text(json.dumps(look))
    script = folder / "kubectl"
    script.write_text(
        f"""#!/bin/sh
cd '{folder}'
case "$*" in
*endpointslices*) echo >> asked; n=$(wc -l < asked); last={len(looks) - 1}
  cat "look$((n > last ? last : n))" ;;
*configmaps*) echo '{{"items": []}}' ;;
*pods*) cat pods ;;
*service/*deployment/*) echo '{{"items": ['; cat service; echo ']}}' ;;
*deployment*) cat deployment ;;
*) cat service ;;
esac
"""
    )
    script.chmod(0o755)
    kubectl = hook.Kubectl(hook.Metrics(), program=str(script))
    secrets = hook.Secrets(folder)
    return hook.Deployer(doors(kubectl, secrets, hook.Git(folder / "none")))


def doors(kubectl: hook.Kubectl, secrets: hook.Secrets, git: hook.Git) -> hook.Doors:
    return hook.Doors(
        kubectl=kubectl,
        git=git,
        secrets=secrets,
        clock=Seconds(),
        reports=hook.Reports(kubectl.metrics),
        stop=Stop(),
    )


def task() -> hook.Task:
    """The new run on its way to production."""
    app = loaded(CONFIG).apps[0]
    run = hook.Run(id="shop-new", app="shop", ref="refs/heads/main", commit="a" * 40)
    return hook.Task(app=app, environment="production", namespace="production", run=run)


@pytest.mark.parametrize(
    ("looks", "arrives"),
    {
        "the pods wanted, at once": ([slices("shop-new-1", "shop-new-2")], True),
        "late, since nobody acted on the switch": (
            [*[slices("shop-old-1")] * 15, slices("shop-new-1", "shop-new-2")],
            True,
        ),
        "late, since there is no slice yet": (
            [*[{"items": []}] * 15, slices("shop-new-1", "shop-new-2")],
            True,
        ),
        "too late, since some had come": (
            [*[slices("shop-new-1")] * 15, slices("shop-new-1", "shop-new-2")],
            False,
        ),
        "too late, since nobody was served": (
            [*[slices()] * 15, slices("shop-new-1", "shop-new-2")],
            False,
        ),
        "too late, since old ones stayed": (
            [*[slices("shop-old-1", "shop-new-1", "shop-new-2")] * 15, slices("shop-new-1")],
            False,
        ),
    }.values(),
    ids=["at-once", "nobody-acted", "no-slice", "some-came", "nobody-served", "old-ones-stayed"],
)
def test_endpoints_that_did_not_move_at_all_are_given_more_time_than_those_that_did(
    tmp_path: Path, looks: list[Object], *, arrives: bool
) -> None:
    assert (
        deployer(tmp_path, looks).steady.traffic.endpoints_converge(task(), NEW, 2, SWITCHED)
        is arrives
    )


def test_endpoints_are_as_many_as_an_autoscaler_wants_by_now(tmp_path: Path) -> None:
    made = deployer(tmp_path, [slices("shop-new-1")])
    smaller = {"metadata": {"name": "shop-green"}, "spec": {"replicas": 1}}
    (tmp_path / "deployment").write_text(json.dumps(smaller))
    assert made.steady.traffic.endpoints_converge(task(), NEW, 2, SWITCHED)


@pytest.mark.parametrize(
    ("taken", "created", "arrives"),
    [(True, EARLY, True), (False, LATE, True), (False, EARLY, False)],
    ids=["taken-away", "replaced", "its-own-fault"],
)
def test_a_pod_that_the_cluster_takes_away_after_the_switch_is_not_waited_for(
    tmp_path: Path, created: str, *, taken: bool, arrives: bool
) -> None:
    made, other = deployer(tmp_path, [slices("shop-new-1")]), ready_pod("shop-new-2", created)
    other["metadata"] |= {"deletionTimestamp": LATE} if taken else {}
    (tmp_path / "pods").write_text(json.dumps({"items": [ready_pod("shop-new-1"), other]}))
    assert made.steady.traffic.endpoints_converge(task(), NEW, 2, SWITCHED) is arrives


def test_endpoints_of_a_service_that_was_switched_away_are_not_waited_for(tmp_path: Path) -> None:
    made = deployer(tmp_path, [slices("shop-old-1")])
    away = {"metadata": {"name": "shop", "resourceVersion": "2"}, "spec": {"selector": OLD}}
    (tmp_path / "service").write_text(json.dumps(away))
    with pytest.raises(hook.SupersededError, match="SelectorChanged"):
        made.steady.traffic.endpoints_converge(task(), NEW, 2, SWITCHED)


@pytest.mark.parametrize(("observed", "told"), [(1, []), (2, ["QuotaExceeded"])])
def test_what_a_deployment_said_of_the_version_before_is_not_held_against_the_new_one(
    tmp_path: Path, observed: int, told: list[str]
) -> None:
    made = deployer(tmp_path, [])
    failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: small"}
    status = {"observedGeneration": observed, "conditions": [failure]}
    standing = {"metadata": {"name": "shop-blue", "generation": 2}, "status": status}
    (tmp_path / "deployment").write_text(json.dumps(standing))
    names = ("run", "commit", "image", "colour")
    values: Object = {**dict.fromkeys(names, ""), "selector": NEW, "configmaps": [], "service": {}}
    release = hook.Release(**values, deployment=standing)
    pods = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
    watch = hook.RolloutWatch(made.doors, task(), release, pods)
    assert [str(s.reason) for s in watch.observe()] == told


def a_release(deployment: Object) -> hook.Release:
    names = ("run", "commit", "image", "colour")
    values: Object = {**dict.fromkeys(names, ""), "selector": NEW, "configmaps": [], "service": {}}
    return hook.Release(**{**values, "run": "shop-new"}, deployment=deployment)


def pod_without_image(run: str) -> Object:
    state = {"waiting": {"reason": "InvalidImageName", "message": "x"}}
    meta = {"name": f"{run}-1", "resourceVersion": "1", "labels": {hook.LABEL_RUN: run}}
    statuses = [{"name": "web", "ready": False, "state": state}]
    return {"metadata": meta, "spec": {}, "status": {"containerStatuses": statuses}}


def test_a_rollout_is_judged_by_the_pods_of_its_own_run(tmp_path: Path) -> None:
    made = deployer(tmp_path, [])
    (tmp_path / "deployment").write_text(json.dumps(named("shop-blue")))
    release = a_release(named("shop-blue"))
    pods = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
    watch = hook.RolloutWatch(made.doors, task(), release, pods)
    pods._take("ADDED", pod_without_image("shop-old"))
    assert watch.observe() == []
    watch.look()
    assert watch.lateness("late").reason is hook.Reason.PODS_NOT_CREATED
    pods._take("ADDED", pod_without_image("shop-new"))
    (symptom,) = watch.observe()
    assert symptom.reason is hook.Reason.MANIFEST_INVALID
    assert watch.lateness("late").reason is hook.Reason.MANIFEST_INVALID
    with pytest.raises(hook.StageError, match=r"^ManifestInvalid: "):
        watch.look()


def waiting_pod(state: Object, *, ready: bool = False) -> Object:
    """A pod of the new run whose only container is in this state."""
    pod = pod_without_image("shop-new")
    pod["status"]["containerStatuses"] = [{"name": "web", "ready": ready, "state": state}]
    return pod


def told_event(reason: str, message: str, kind: str = "Warning") -> Object:
    about = {"kind": "Pod", "name": "shop-new-1"}
    times = {"lastTimestamp": LATE, "firstTimestamp": EARLY, "count": 3}
    return {"involvedObject": about, "reason": reason, "message": message, "type": kind, **times}


CREATING: Object = {"waiting": {"reason": "ContainerCreating"}}
CONFIG_ERROR = {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}
AWAY = {"reason": "ErrImagePull", "message": "dial tcp: connection refused"}


@pytest.mark.parametrize(
    ("state", "events", "reason", "said"),
    [
        (CREATING, [], "NeverStarted", "container web of shop-new-1 is not started"),
        (CREATING, [told_event("Pulling", 'Pulling image "x"', "Normal")],
            "NeverStarted", 'is not started: Pulling image "x"'),
        (CREATING, [told_event("FailedMount", 'secret "tls" not found')],
            "VolumeUnavailable", 'is not started: secret "tls" not found'),
        (CREATING, [told_event("FailedCreatePodSandBox", "no more addresses")],
            "NeverStarted", "no more addresses"),
        ({"waiting": CONFIG_ERROR}, [], "ContainerConfigError", 'secret "x" not found'),
        ({"waiting": AWAY}, [], "ImagePullFailed", "connection refused"),
        ({"running": {}}, [], "NeverReady", "1 of 2 pods ready; container web of"),
        ({"running": {}}, [told_event("Unhealthy", "Readiness probe failed: 503")],
            "NeverReady", "1 of 2 pods ready; container web of shop-new-1 is not ready: Readiness"),
    ],
    ids=["silence", "silent registry", "missing Secret", "no sandbox", "missing Secret in env",
         "registry away", "not ready", "not ready, and why"],
)  # fmt: skip
def test_a_rollout_that_is_late_ends_with_what_it_waited_for_and_a_verdict_only_if_it_ran(
    tmp_path: Path, state: Object, events: list[Object], reason: str, said: str
) -> None:
    made = deployer(tmp_path, [])
    (tmp_path / "deployment").write_text(json.dumps(named("shop-blue")))
    script = tmp_path / "kubectl"
    (tmp_path / "events").write_text(json.dumps({"items": events}))
    script.write_text(script.read_text().replace("*pods*)", "*events*) cat events ;;\n*pods*)"))
    pods = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
    pods._take("ADDED", waiting_pod(state))
    watch = hook.RolloutWatch(made.doors, task(), a_release(named("shop-blue")), pods)
    watch.look()
    made.doors.clock.at += 1000.0  # type: ignore[attr-defined]
    watch.look()
    end = watch.lateness("1 of 2 pods ready")
    assert (str(end.reason), said in end.detail) == (reason, True), end
    assert end.reason.is_verdict is ("running" in state)


def test_what_a_rollout_waits_for_is_shown_on_the_runs_job_when_it_changes_and_not_at_the_end(
    tmp_path: Path,
) -> None:
    made = deployer(tmp_path, [])
    (tmp_path / "deployment").write_text(json.dumps(named("shop-blue")))
    script = tmp_path / "kubectl"
    shown = tmp_path / "shown"
    script.write_text(script.read_text().replace(
        'case "$*" in', f'case "$*" in\n*patch*job/build-1*) cat >> {shown}; echo >> {shown};'
        ' echo "{}" ;;\n*events*) exit 1 ;;'
    ))  # fmt: skip
    job = hook.test_job(loaded(CONFIG), task().app, task().run)
    job["metadata"] |= {"name": "build-1", "uid": "u", "resourceVersion": "1"}
    pods = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
    own = replace(task(), job=hook.Job(job))
    watch = hook.RolloutWatch(made.doors, own, a_release(named("shop-blue")), pods)
    clock: Any = made.doors.clock

    def look(state: Object) -> None:
        pods._take("ADDED", waiting_pod(state, ready="running" in state))
        for _ in range(3):
            clock.at += hook.EVENTS_SECONDS
            watch.look()

    look({"waiting": AWAY})
    look({"waiting": CONFIG_ERROR})
    look({"running": {}})
    look({"waiting": AWAY})
    watch.end()
    lines = [json.loads(line)["metadata"]["annotations"] for line in shown.read_text().split("\n")
             if line]  # fmt: skip
    assert [line[hook.ANNOTATION_REASON] for line in lines] == [
        "ImagePullFailed", "ContainerConfigError", None, "ImagePullFailed", None,
    ]  # fmt: skip
    assert "connection refused" in lines[0][hook.ANNOTATION_DETAIL]
    assert lines[-1] == {hook.ANNOTATION_REASON: None, hook.ANNOTATION_DETAIL: None}


def test_a_rollout_that_waits_ends_when_its_branch_has_moved_on_and_not_when_git_is_away(
    tmp_path: Path,
) -> None:
    made = deployer(tmp_path, [])
    (tmp_path / "deployment").write_text(json.dumps(named("shop-blue")))
    pods = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
    pods._take("ADDED", waiting_pod({"waiting": AWAY}))
    heads: list[Any] = [hook.GitError(("git",), 1, "no route"), {"refs/heads/main": "b" * 40}]

    def answer(url: str) -> Any:
        head = heads[0]
        if isinstance(head, Exception):
            raise head
        return head

    made.doors.git.heads = answer  # type: ignore[method-assign]
    watch = hook.RolloutWatch(made.doors, task(), a_release(named("shop-blue")), pods)
    clock: Any = made.doors.clock

    def ask() -> None:
        clock.at += hook.HEAD_FRESH
        watch.look()
        assert watch.asking is not None
        watch.asking.join()

    ask()
    watch.look()
    heads.pop(0)

    def ask_again() -> None:
        ask()
        watch.look()

    with pytest.raises(hook.SupersededError, match=r"^NotHead: "):
        ask_again()


@pytest.mark.parametrize(
    ("carried", "raised", "said"),
    [
        ("shop-old", hook.HookError, "deleted or replaced meanwhile"),
        ("shop-new", hook.StageError, "0 of 0 pods ready"),
    ],
    ids=["replaced", "scaled-to-nothing"],
)
def test_a_rollout_that_cannot_end_well_any_more_is_not_waited_for(
    tmp_path: Path, carried: str, raised: type[Exception], said: str
) -> None:
    made = deployer(tmp_path, [])
    meta = {"name": "shop-blue", "generation": 2, "labels": {hook.LABEL_RUN: carried}}
    spec = {"replicas": 0, "progressDeadlineSeconds": 600}
    standing = {"metadata": meta, "spec": spec, "status": {"observedGeneration": 2}}
    (tmp_path / "deployment").write_text(json.dumps(standing))
    (tmp_path / "pods").write_text('{"items": []}')
    pods = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
    with pytest.raises(raised, match=said):
        made.steady.rollout.wait(task(), a_release(standing), pods)
    assert made.doors.clock.monotonic() < 1000 + 10 * hook.VERIFY_SECONDS


def two_pods(ready: int) -> list[Object]:
    """Two pods, so many of them ready."""
    pods = [ready_pod("one"), ready_pod("other")]
    for pod in pods[ready:]:
        pod["status"]["conditions"][0]["status"] = "False"
    return pods


def history(
    folder: Path, old: list[Object] | None, new: list[Object], port: int = 8080
) -> hook.Deployer:
    """A deployer of which the new version is live, with these pods of it and of the one before."""
    made = deployer(folder, [slices()])
    template = {"spec": {"containers": [{"name": "web"}]}}
    deployment: Object = {"metadata": {}, "spec": {"replicas": 2, "template": template}}
    ports = [{"port": 80, "targetPort": port}]
    common: Object = {"ports": ports, "replicas": 2, "at": SWITCHED, "release": "record"}
    entries = [
        {**common, "run": "shop-new", "selector": NEW, "outcome": ""},
        {**common, "run": "shop-old", "selector": OLD, "outcome": "deployed"},
    ]
    notes = {hook.ANNOTATION_HISTORY: json.dumps(entries if old else entries[:1])}
    notes |= {hook.ANNOTATION_PREVIOUS: json.dumps(OLD)} if old else {}
    live = {"metadata": {"name": "shop", "resourceVersion": "1", "annotations": notes}}
    texts = {
        "service": {**live, "spec": {"selector": NEW}},
        "deployment": deployment,
        "record": a_release(deployment).configmap("shop"),
        "old": {"items": old},
        "new": {"items": new},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    script = folder / "kubectl"
    cases = """case "$*" in
*delete*) echo > done ;;
*configmap*) cat record ;;
*pods*shop-old*) cat old ;;
*pods*shop-new*) cat new ;;
*patch*) cat > done; cat service ;;"""
    script.write_text(script.read_text().replace('case "$*" in', cases))
    return made


@pytest.mark.parametrize(("age", "confirmed"), [(5.0, False), (5000.0, True)])
def test_a_rollback_that_only_began_ends_no_bake(
    tmp_path: Path, age: float, *, confirmed: bool
) -> None:
    made = history(tmp_path, two_pods(2), two_pods(2))
    service = json.loads((tmp_path / "service").read_text())
    claim = replace(
        made.steady.claims.new("shop-old", "blue", hook.Phase.ROLLBACK),
        since=made.doors.clock.now() - age,
    )
    service["metadata"]["annotations"][hook.ANNOTATION_CLAIM] = json.dumps(claim.to_json())
    (tmp_path / "service").write_text(json.dumps(service))
    release = replace(a_release({}), service={"spec": {}})
    if confirmed:
        made.steady.traffic.confirm(task(), release)
    else:
        with pytest.raises(hook.HookError, match="a rollback is under way"):
            made.steady.traffic.confirm(task(), release)
    assert (tmp_path / "done").exists() is confirmed


def test_a_confirmation_whose_answer_was_lost_needs_no_other_proof(tmp_path: Path) -> None:
    made = history(tmp_path, two_pods(2), two_pods(2))
    service = json.loads((tmp_path / "service").read_text())
    notes = service["metadata"]["annotations"]
    entries = json.loads(notes[hook.ANNOTATION_HISTORY])
    entries[0]["outcome"] = "deployed"
    notes[hook.ANNOTATION_HISTORY] = json.dumps(entries)
    (tmp_path / "service").write_text(json.dumps(service))
    assert made.steady.traffic.confirm(task(), a_release({}), lambda: False)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("old", "new", "back"),
    [(2, 1, True), (2, 2, True), (1, 2, False), (0, 0, False), (None, 1, False), (None, 0, True)],
    ids=["better", "as-good", "worse", "nothing", "first-that-serves", "first-that-does-not"],
)
def test_missing_endpoints_send_traffic_back_only_to_a_version_that_is_as_well(
    tmp_path: Path, old: int | None, new: int, *, back: bool
) -> None:
    made = history(tmp_path, None if old is None else two_pods(old), two_pods(new))
    release = a_release({"metadata": {}, "spec": {"replicas": 2}})
    with pytest.raises(
        hook.StageError, match="^EndpointsMissing: " if back else "^BothUnhealthy: "
    ):
        made.steady.traffic.verify(task(), release, SWITCHED)
    assert (tmp_path / "done").exists() is back


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("binaryData", {"release": "c2hvcA=="}),
        ("immutable", False),
        ("data", {"more": "x"}),
        ("metadata.name", "shop-release-00000000"),
        ("metadata.labels", {hook.LABEL_APP: "other", hook.LABEL_STAGE: "release"}),
    ],
    ids=["content", "immutable", "more", "name", "labels"],
)
def test_a_release_record_that_is_not_as_it_was_written_is_not_used(
    tmp_path: Path, key: str, value: Any
) -> None:
    made = history(tmp_path, None, [])
    assert made.steady.live.release(task(), "record").run == "shop-new"
    record = json.loads((tmp_path / "record").read_text())
    target = record["metadata"] if "." in key else record
    target[key.rpartition(".")[2]] = value
    (tmp_path / "record").write_text(json.dumps(record))
    with pytest.raises(hook.StageError, match="release record record was changed, or is not"):
        made.steady.live.release(task(), "record")


def test_labels_that_a_policy_adds_to_a_record_do_no_harm(tmp_path: Path) -> None:
    made = history(tmp_path, None, [])
    record = json.loads((tmp_path / "record").read_text())
    record["metadata"]["labels"] |= {"velero.io/restore-name": "x", "owner": "somebody"}
    (tmp_path / "record").write_text(json.dumps(record))
    assert made.steady.live.release(task(), "record").run == "shop-new"


def switches_back(made: hook.Deployer) -> float | None:
    """Let traffic be taken back; return how often that was counted."""
    ended = (hook.Outcome.SWITCHED_BACK, hook.Reason.UNHEALTHY_AFTER_SWITCH, "it is sick")
    labels = {"app": "shop", "environment": "production", "direction": "back"}
    with suppress(hook.RunError):
        made.steady.traffic.switch_back(task(), *ended)
    return made.doors.kubectl.metrics.registry.get_sample_value(
        "gitops_hook_switches_total", labels
    )


def test_a_switch_back_is_counted_only_when_it_was_one(tmp_path: Path) -> None:
    for name in ("done", "first", "other"):
        (tmp_path / name).mkdir()
    made = history(tmp_path / "done", two_pods(2), [])
    assert switches_back(made) == 1
    assert switches_back(history(tmp_path / "first", None, [])) is None
    assert (tmp_path / "first" / "done").exists(), "the first Service is removed"
    other = history(tmp_path / "other", two_pods(2), [])
    live = json.loads((tmp_path / "other" / "service").read_text())
    live["spec"]["selector"] = OLD
    (tmp_path / "other" / "service").write_text(json.dumps(live))
    assert switches_back(other) is None
    assert not (tmp_path / "other" / "done").exists()


def test_nothing_is_read_twice_before_traffic_is_switched_back(tmp_path: Path) -> None:
    made = history(tmp_path, two_pods(2), [])
    script = tmp_path / "kubectl"
    record = 'echo "$*" >> commands\ncase "$*" in'
    script.write_text(script.read_text().replace('case "$*" in', record, 1))
    assert switches_back(made) == 1
    commands = (tmp_path / "commands").read_text().splitlines()
    assert sum("service" in command and "patch" not in command for command in commands) == 1
    assert "patch" in commands[-1]


def test_a_smoke_test_returns_where_the_preview_service_is_at_its_end(tmp_path: Path) -> None:
    pods = two_pods(2)
    for pod in pods:
        pod["status"]["podIP"] = "127.0.0.1"
    with answering([OK + b"\r\n"]) as port, socket.create_server(("127.0.0.1", 0)) as deleted:
        gone = ready_at(deleted.getsockname()[1])
        deleted.close()
        made = history(tmp_path, two_pods(2), pods)
        labels = {hook.LABEL_MANAGED: hook.MANAGER, hook.LABEL_APP: "shop"}
        preview: Object = {"metadata": {"name": "shop-preview", "labels": labels}}
        preview["spec"] = {"selector": NEW, "clusterIP": "127.0.0.1"}
        (tmp_path / "service").write_text(json.dumps(preview))
        spec = {"replicas": 2, "template": {"spec": {"containers": [{"name": "web"}]}}}
        ports = [{"port": port, "targetPort": port}]
        release = replace(a_release({"spec": spec}), service={"spec": {"ports": ports}})
        informer = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
        asked = made.steady.rollout.smoke_test(task(), release, informer, gone)
    assert (asked.host, asked.port) == ("127.0.0.1", port)


def test_a_step_before_the_switch_is_not_tried_for_ever_once_the_branch_has_another_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = deployer(tmp_path, [])
    refused = "echo 'Unable to connect: connection refused' >&2; exit 1"
    script = tmp_path / "kubectl"
    script.write_text(f"#!/bin/sh\n{refused}\n")
    monkeypatch.setattr(hook.Doors, "pause", lambda doors, seconds: None)
    heads: list[dict[str, str]] = [{"refs/heads/main": "b" * 40}, {"refs/heads/main": "a" * 40}]
    monkeypatch.setattr(made.doors.git, "heads", lambda url: heads.pop())
    with pytest.raises(hook.SupersededError, match="another head"):
        made.steady.claims.take(task(), a_release({"metadata": {}, "spec": {}}))
    assert heads == []


OTHERS = loaded(f"apps: [{{{APP}}}, {{{APP.replace('shop', 'blog')}}}]").apps[1:]


@pytest.mark.parametrize(
    ("answer", "ends_as"),
    {
        "it may not be read": (
            "echo 'Error from server (Forbidden): services \"blog\" is forbidden' >&2; exit 1",
            "Forbidden",
        ),
        "nobody knows why it failed": ("echo 'error: what is that' >&2; exit 1", "Unknown"),
        "it is larger than kubectl may print": (f"kill -{int(signal.SIGXFSZ)} $$", ""),
    }.values(),
    ids=["no-right", "unknown", "too-large"],
)
@pytest.mark.parametrize("place", ["*service*", "*deployments*"], ids=["live-service", "workers"])
def test_only_what_is_too_large_is_not_compared_with_pods_and_that_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, answer: str, ends_as: str
) -> None:
    made = deployer(tmp_path, [])
    script = tmp_path / "kubectl"
    nothing = """echo '{"kind": "DeploymentList", "items": []}'"""
    script.write_text(
        f"""#!/bin/sh
case "$*" in
{place}) {answer} ;;
*deployments*) {nothing} ;;
esac
"""
    )
    labels = hook.PodLabels(made.doors)
    release = a_release({"kind": "Deployment", **named("shop-blue")})
    if ends_as:
        with pytest.raises(hook.KubectlError) as raised:
            labels.require_apart(task(), release, OTHERS)
        assert raised.value.kind == ends_as
    else:
        labels.require_apart(task(), release, OTHERS)
    logged = [one for one in caplog.messages if "not compared with others" in one]
    assert len(logged) == (0 if ends_as else 1)


def take_back(operations: hook.Operations, health: hook.PodHealth | None) -> str:
    """Return why traffic was taken back, or had to stay; "" when the verdict was dropped."""
    try:
        operations.traffic.switch_back_if_worse(task(), "it is sick", health)
    except hook.StageError as ended:
        return str(ended.reason)
    return ""


@pytest.mark.parametrize(
    ("old", "well", "wanted", "verdict"),
    [
        (2, 2, 3, "UnhealthyAfterSwitch"),
        (1, 1, 2, "BothUnhealthy"),
        (2, 1, 2, "UnhealthyAfterSwitch"),
    ],
    ids=["more-were-wanted", "equal", "fewer"],
)
def test_a_crash_sends_traffic_back_to_where_a_larger_share_is_well(
    tmp_path: Path, old: int, well: int, wanted: int, verdict: str
) -> None:
    made = history(tmp_path, two_pods(old), [])
    assert take_back(made.steady, hook.PodHealth(well, wanted)) == verdict


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((200, 200), (503, 503), "UnhealthyAfterSwitch"),
        ((200, 200), (200, 503), "UnhealthyAfterSwitch"),
        ((200, 503), (200, 503), ""),
        ((200, 200), (200, 200), ""),
        ((200,) * 6, (200,) * 6, ""),
        ((200, 200, 503), (200, 200, 200, 503), ""),
        ((503, 503), (503, 503), "BothUnhealthy"),
        (None, (200, 503), "BothUnhealthy"),
        (None, (200, 200), ""),
    ],
    ids=[
        *("sick", "half", "lost-machine", "over", "larger-now", "a-better-share", "both"),
        *("first", "first-over"),
    ],
)
def test_failed_health_checks_count_by_the_word_of_each_pod_of_both_versions(
    tmp_path: Path, old: tuple[int, ...] | None, new: tuple[int, ...], verdict: str
) -> None:
    pods: dict[str, list[Object]] = {"old": [], "new": []}
    with ExitStack() as servers:
        port = 0
        for net, (name, answers) in enumerate((("old", old or ()), ("new", new))):
            for number, status in enumerate(answers):
                pod, host = ready_pod(f"{name}-{number}"), f"127.9.{net}.{number + 1}"
                pod["status"]["podIP"] = host
                pods[name].append(pod)
                words = f"HTTP/1.1 {status} Said\r\n\r\n".encode()
                port = servers.enter_context(answering([words], host, port))
        made = history(tmp_path, pods["old"] or None, pods["new"], port=port)
        assert take_back(made.steady, None) == verdict


def test_a_version_before_that_answers_slowly_is_gone_back_to(tmp_path: Path) -> None:
    old, new = ready_pod("old-1"), ready_pod("new-1")
    old["status"]["podIP"], new["status"]["podIP"] = "127.9.0.1", "127.9.1.1"
    slow = [b"HTTP/1.1 200 OK\r\n", b"\r\n"]
    sick = [b"HTTP/1.1 503 No\r\n\r\n"]
    with ExitStack() as servers:
        port = servers.enter_context(answering(slow, "127.9.0.1", 0, hook.IMPATIENCE + 0.3))
        servers.enter_context(answering(sick, "127.9.1.1", port))
        made = history(tmp_path, [old], [new], port=port)
        file = tmp_path / "deployment"
        file.write_text(file.read_text().replace('"replicas": 2', '"replicas": 1'))
        assert take_back(made.steady, None) == "UnhealthyAfterSwitch"


@contextmanager
def answering(
    parts: list[bytes], host: str = "127.0.0.1", port: int = 0, pause: float = 0.0
) -> Iterator[int]:
    """A server that sends these parts to whoever asks, then says nothing more; its port."""
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(4096)
            for part in parts:
                connection.sendall(part)
                if over.wait(pause):
                    return
            over.wait(30)

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server((host, port)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def ready_at(port: int) -> hook.HealthCheck:
    return hook.HealthCheck(host="127.0.0.1", port=port, path="/ready?a=b")


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n"
SLOW = "no whole answer within 1 s"


@pytest.mark.parametrize(
    ("parts", "pause", "refusal"),
    {
        "healthy": ([OK + b"\r\n"], 0.0, None),
        "another place": (
            [b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\n\r\n"],
            0.0,
            None,
        ),
        "plain line ends": ([b"HTTP/1.0 204 None\n\n"], 0.0, None),
        "a body that goes on for ever": ([OK + b"\r\n", *[b"x" * 1000] * 1000], 0.0, None),
        "in two parts": ([OK, b"\r\n"], 0.1, None),
        "failing": ([b"HTTP/1.1 503 Busy\r\n\r\n"], 0.0, "status 503"),
        "only for now": ([b"HTTP/1.1 100 Continue\r\n\r\n"], 0.0, "status 100"),
        "nothing": ([], 0.0, SLOW),
        "headers without an end": ([OK], 0.0, SLOW),
        "a byte now and then": ([OK, *[b"x"] * 100], 0.3, SLOW),
        "more headers than anyone needs": (
            [OK, *[b"x: y\r\n" * 1000] * 100],
            0.0,
            "not an HTTP answer",
        ),
        "not HTTP": ([b"SSH-2.0-x\r\n\r\n"], 0.0, "not an HTTP answer"),
        "no status": ([b"HTTP/1.1 2000 OK\r\n\r\n"], 0.0, "not an HTTP answer"),
    }.values(),
)
def test_a_health_check_ends_in_time_whatever_is_sent(
    parts: list[bytes], pause: float, refusal: str | None
) -> None:
    with answering(parts, pause=pause) as port:
        began = time.monotonic()
        answer = hook.health_refusal(ready_at(port), 1.0)
        assert time.monotonic() - began < 5
        assert answer == refusal


def test_a_health_check_says_why_nothing_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert hook.health_refusal(ready_at(port)) == "ConnectionRefusedError"


def test_a_process_without_files_learns_nothing_about_health() -> None:
    with answering([OK + b"\r\n"]) as port:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                hook.health_refusal(ready_at(port))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_traffic_is_taken_back_while_other_calls_take_all_their_places_and_one_hangs(
    tmp_path: Path,
) -> None:
    made = history(tmp_path, two_pods(2), [])
    script = tmp_path / "kubectl"
    # every call of another hangs, and so does the first one of this
    hangs = """case "$*" in
*elsewhere*) echo >> others; until [ -e end ]; do sleep 0.05; done ;;
*pods*shop-old*) if mkdir hung; then exec sleep 600; fi; cat old ;;"""
    script.write_text(script.read_text().replace('case "$*" in', hangs, 1))
    with ThreadPoolExecutor(8) as others:
        [others.submit(made.doors.kubectl.run, "get", "elsewhere") for _ in range(8)]
        taken = tmp_path / "others"
        eventually(lambda: taken.exists() and taken.read_text().count("\n") == 8, 20)
        began = time.monotonic()
        verdict = take_back(made.urgent, hook.PodHealth(0, 2))
        took = time.monotonic() - began
        (tmp_path / "end").touch()
    assert (verdict, (tmp_path / "done").exists()) == ("UnhealthyAfterSwitch", True)
    assert took < 10, "and not after the 30 seconds of one call"


def test_a_rollout_is_not_waited_for_when_the_daemon_is_to_stop(tmp_path: Path) -> None:
    made = deployer(tmp_path, [])
    script = tmp_path / "kubectl"
    hangs = 'case "$*" in\n*rollout*) exec sleep 100 ;;'
    script.write_text(script.read_text().replace('case "$*" in', hangs))
    meta, spec = {"name": "shop-blue"}, {"replicas": 1, "progressDeadlineSeconds": 600}
    standing = {"metadata": meta, "spec": spec}
    (tmp_path / "deployment").write_text(json.dumps(standing))
    pods = hook.Informer(made.doors.kubectl, "pods", "production", hook.Pod, "")
    made.doors.stop.set()
    with pytest.raises(InterruptedError):
        made.steady.rollout.wait(task(), a_release(standing), pods)


# What objects say

ALL_TWO = dict.fromkeys(["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"], 2)


@pytest.mark.parametrize(
    ("status", "ready", "proof"),
    [
        ({**ALL_TWO, "observedGeneration": 7}, 2, True),
        ({**ALL_TWO, "observedGeneration": 8}, 3, True),
        ({**ALL_TWO, "observedGeneration": 6}, 2, False),
        ({**ALL_TWO, "observedGeneration": 7}, 1, False),
        ({**ALL_TWO, "observedGeneration": 7, "replicas": 3}, 2, False),
        ({**ALL_TWO, "observedGeneration": 7, "updatedReplicas": 1}, 2, False),
        ({**ALL_TWO, "observedGeneration": 7, "readyReplicas": 1}, 2, False),
        ({**ALL_TWO, "observedGeneration": 7, "availableReplicas": 1}, 2, False),
        (None, 2, False),
    ],
    ids=[
        "all", "more-than-all", "status-of-before", "pods-not-ready", "an-old-one-left",
        "not-all-new", "not-all-ready", "not-all-for-long-enough", "no-status",
    ],
)  # fmt: skip
def test_a_rollout_is_proven_by_every_count_of_its_status_and_by_its_pods(
    status: Object | None, ready: int, *, proof: bool
) -> None:
    found = {"metadata": {"generation": 7}, "spec": {"replicas": 2}, "status": status}
    assert hook.rolled_out(found, ready) is proof


@pytest.mark.parametrize(
    ("wanted", "missing", "proof"), [(1, "", True), (1, "readyReplicas", False), (0, "", False)]
)
def test_a_count_that_is_left_out_is_none_and_no_pods_prove_nothing(
    wanted: int, missing: str, *, proof: bool
) -> None:
    status = {**dict.fromkeys(ALL_TWO, wanted), "observedGeneration": 7}
    status.pop(missing, None)
    found = {"metadata": {"generation": 7}, "spec": {"replicas": wanted}, "status": status}
    assert hook.rolled_out(found, wanted) is proof


def test_an_endpoint_is_ready_unless_it_says_that_it_is_not() -> None:
    def endpoint(name: str, conditions: Object | None) -> Object:
        return {
            "addresses": [f"ip of {name}"],
            "targetRef": {"name": name},
            "conditions": conditions,
        }

    told = [endpoint("a", {"ready": True}), endpoint("b", {"ready": False}), endpoint("c", None)]
    other = [{"addresses": ["10.0.0.4"]}]
    found = [{"endpoints": told}, {"endpoints": None}, {"endpoints": other}]
    assert hook.ready_endpoints(found) == {"a", "c", "10.0.0.4"}


def test_a_rollback_marks_all_that_came_after_its_target_and_had_not_failed() -> None:
    def entry(run: str, outcome: str, at: float) -> hook.HistoryEntry:
        return hook.HistoryEntry(selector={"run": run}, run=run, outcome=outcome, at=at)

    failed, newer, same = entry("c", "failed", 5), entry("b", "deployed", 4), entry("a", "", 3)
    target, older = entry("a", "deployed", 2), entry("z", "deployed", 1)
    goal = hook.Goal(target, replace(target, colour="green"), overwritten=False)
    history = [failed, newer, same, target, older]
    after = hook.rolled_back(history, goal, "it is slow")
    gone = {"outcome": "rolled-back", "reason": "RolledBack", "detail": "it is slow"}
    marked = [replace(e, **gone) for e in (newer, same)]
    assert after == [failed, *marked, goal.entry, older]
    with pytest.raises(hook.RefusedError, match="changed meanwhile"):
        hook.rolled_back([failed, newer], goal, "")


def test_a_release_in_another_colour_is_another_deployment_of_the_same_run() -> None:
    labels = {"app": "x", "version": "blue", hook.LABEL_RUN: "shop-new"}
    template = {"metadata": {"labels": dict(labels)}}
    spec = {"replicas": 1, "selector": {"matchLabels": {"version": "blue"}}, "template": template}
    meta = {"name": "shop-blue", "labels": dict(labels)}
    release = a_release({"metadata": meta, "spec": spec})
    before = copy.deepcopy(release)
    made = hook.recoloured(release, task().app, "green", 3)
    assert release == before
    assert (made.run, made.colour, made.wanted) == ("shop-new", "green", 3)
    assert made.selector == {**NEW, "version": "green"}
    assert made.deployment["metadata"] == {
        "name": "shop-green",
        "labels": {**labels, "version": "green"},
    }
    assert made.deployment["spec"]["selector"] == {"matchLabels": {"version": "green"}}
    assert made.deployment["spec"]["template"]["metadata"]["labels"]["version"] == "green"


def a_pod(name: str, created: int, *containers: Object, ready: bool = False) -> hook.Pod:
    meta = {"name": name, "resourceVersion": "1"}
    meta["creationTimestamp"] = f"2026-01-01T00:00:{created}Z"
    status = {"conditions": [{"type": "Ready", "status": str(ready)}]}
    spec = {"initContainers": [{"name": "car", "restartPolicy": "Always"}]}
    inits = [{"name": "car", "ready": False}]
    status |= {"initContainerStatuses": inits, "containerStatuses": list(containers)}
    return hook.Pod({"metadata": meta, "spec": spec, "status": status})


def test_the_last_words_are_those_of_the_newest_pod_that_is_not_ready() -> None:
    running, pulling = {"running": {}}, {"waiting": {"reason": "ImagePullBackOff"}}
    well = {"name": "log", "ready": True, "state": running}
    sick = {**well, "name": "web", "ready": False}
    before = {"terminated": {"exitCode": 3}}
    pods = [
        a_pod("old", 10, sick),
        a_pod("new", 20, well, sick, {**sick, "name": "last"}),
        a_pod("well", 30, {"name": "web", "ready": True, "lastState": before}, ready=True),
    ]

    def told(pods: list[hook.Pod]) -> list[str]:
        return [f"{s.container.name} of {s.pod.name}" for s in hook.speakers(pods)]

    assert told(pods) == ["web of new", "last of new"]
    assert told(pods[2:]) == ["web of well"]
    assert told([a_pod("calm", 40, well, ready=True), pods[2]]) == ["web of well"]
    assert told([a_pod("calm", 40, well, ready=True)]) == ["log of calm"]  # a test that hangs
    assert told([a_pod("never", 40, {"name": "web", "ready": False, "state": pulling})]) == []
    assert told([]) == []


class Shelf(hook.Kubectl):
    """A cluster that has the log of every container, and holds ConfigMaps."""

    def __init__(self, log: str = "", *, fails: bool = False) -> None:
        super().__init__(hook.Metrics())
        self.log, self.fails, self.kept = log, fails, dict[str, Object]()

    def logs(self, pod: str, container: str, namespace: str, *, previous: bool = False) -> str:
        return self.log.format(pod=pod, container=container)

    def list(self, resource: str, namespace: str, *filters: str) -> list[Object]:
        if self.fails:
            raise hook.KubectlError(["kubectl", "get"], None, "")
        terms = dict(term.split("=") for term in filters[1].split(","))
        return [o for o in self.kept.values() if terms.items() <= o["metadata"]["labels"].items()]

    def delete(self, resource: str, names: Iterable[str], namespace: str) -> None:
        for name in names:
            del self.kept[name]

    def create(self, objects: Sequence[Object], namespace: str) -> None:
        for made in objects:
            stamp = datetime.fromtimestamp(1000.0 + len(self.kept), UTC).isoformat()
            made["metadata"]["creationTimestamp"] = stamp
            assert made["metadata"]["name"] not in self.kept
            self.kept[made["metadata"]["name"]] = made


FAILED: Object = {"name": "web", "ready": False, "state": {"terminated": {"exitCode": 1}}}


def tails(shelf: Shelf, folder: Path, now: float = 1000.0) -> hook.LogTails:
    clock = Seconds()
    clock.now = lambda: now  # type: ignore[method-assign]
    return hook.LogTails(shelf, hook.Secrets(folder), clock)


def test_of_a_long_log_the_end_is_kept_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "webhook-tokens").write_text("hunter2-hunter2\n")
    noise = "\u20ac\x00\x1b " * 30_000
    shelf = Shelf(noise + "hunter2-hunter2 and\npassword=hunter2\nthe end of {container}")
    pods = [a_pod("new", 20, FAILED, {**FAILED, "name": "other"})]
    tails(shelf, tmp_path).keep("shop", "shop-1", pods, "production")
    (kept,) = shelf.kept.values()
    assert [*kept["data"]] == ["new.web", "new.other"]
    for key, text in kept["data"].items():
        assert text.endswith(f"*** and\npassword=***\nthe end of {key.partition('.')[2]}")
        assert 20_000 < len(text.encode()) <= 32_768
    assert "hunter2" not in json.dumps(kept)


def test_a_termination_message_is_kept_with_the_log_unless_it_is_of_it(tmp_path: Path) -> None:
    words = {**FAILED, "state": {"terminated": {"exitCode": 1, "message": "token=abc: no"}}}
    for log, text in (("a line", "a line\ntoken=*** no"), ("token=abc: no", "token=*** no")):
        shelf = Shelf(log)
        tails(shelf, tmp_path).keep("shop", "shop-1", [a_pod("new", 20, words)], "production")
        assert shelf.kept["log-shop-1"]["data"] == {"new.web": text}


def test_where_nothing_was_printed_nothing_is_kept(tmp_path: Path) -> None:
    shelf = Shelf()
    tails(shelf, tmp_path).keep("shop", "shop-1", [a_pod("new", 20, FAILED)], "production")
    assert not shelf.kept


def test_twenty_logs_of_an_app_are_kept_for_a_day(tmp_path: Path) -> None:
    shelf, pods = Shelf("words"), [a_pod("new", 20, FAILED)]
    shelf.kept["other"] = {**labelled("other", "twin"), "data": {}}
    shelf.kept["release"] = {**labelled("release", "shop", stage="release"), "data": {}}
    for number in range(30):
        tails(shelf, tmp_path).keep("shop", f"shop-{number}", pods, "production")
    names = [*shelf.kept][2:]
    assert names == [f"log-shop-{number}" for number in range(10, 30)]
    tails(shelf, tmp_path).keep("shop", "shop-29", pods, "production")  # it failed again
    assert [*shelf.kept][-1] == "log-shop-29"
    app = loaded(CONFIG).apps[0]
    spaces = dict.fromkeys(("test", "build", "staging", "production"), "production")
    tails(shelf, tmp_path, now=80_000.0).delete_expired(app, spaces)
    assert "log-shop-28" in shelf.kept
    tails(shelf, tmp_path, now=88_000.0).delete_expired(app, spaces)
    assert [*shelf.kept] == ["other", "release"]


def labelled(name: str, app: str, stage: str = "log") -> Object:
    labels = {hook.LABEL_MANAGED: hook.MANAGER, hook.LABEL_APP: app, hook.LABEL_STAGE: stage}
    return {"metadata": {"name": name, "labels": labels, "creationTimestamp": EARLY}}


def test_logs_of_pods_that_shall_not_be_kept_any_more_go(tmp_path: Path) -> None:
    shelf = Shelf("words")
    tails(shelf, tmp_path).keep("shop", "shop-1", [a_pod("new", 20, FAILED)], "production")
    text = CONFIG.replace("deploy: {", "deploy: {log_tails: false, ")
    spaces = dict.fromkeys(("test", "build"), "test")
    app = loaded(text).apps[0]
    tails(shelf, tmp_path).delete_expired(
        app, {**spaces, "staging": "s", "production": "production"}
    )
    assert not shelf.kept


def test_a_log_that_cannot_be_kept_is_said_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs = tails(Shelf("secret words", fails=True), tmp_path)
    pods = [a_pod("new", 20, FAILED)]
    logs.start(partial(logs.keep, "shop", "shop-1", pods, "production"), 20)
    assert [r.message for r in caplog.records] == ["logs not kept"]
    assert "secret words" not in str(caplog.records[0].__dict__)


def test_a_log_that_does_not_come_holds_up_neither_a_deployment_nor_another_call(
    tmp_path: Path,
) -> None:
    made = deployer(tmp_path, [])
    script = tmp_path / "kubectl"
    wait = 'case "$*" in\n*logs*) touch asked; until test -e go; do sleep 0.1; done ;;'
    script.write_text(script.read_text().replace('case "$*" in', wait))
    kubectl = hook.Kubectl(hook.Metrics(), 1, str(script))
    made = hook.Deployer(doors(kubectl, made.doors.secrets, made.doors.git))
    threads = threading.active_count()
    made.steady.rollout.keep_logs(task(), [a_pod("new", 20, FAILED)])
    assert (tmp_path / "asked").exists()
    assert made.steady.live.read(task()) is not None
    (tmp_path / "go").touch()
    eventually(lambda: threading.active_count() == threads, 20)


def ended_pod(name: str, phase: str = "Failed", **meta: str) -> Object:
    pod = ready_pod(name)
    pod["metadata"] |= {**meta, "labels": {}}
    return {**pod, "status": {"phase": phase}}


def test_what_was_adopted_is_as_large_as_its_pods_that_stay(tmp_path: Path) -> None:
    made, foreign = deployer(tmp_path, []), {"app": "shop"}
    meta = {"name": "shop", "resourceVersion": "1"}
    live = {"kind": "Service", "metadata": meta, "spec": {"selector": foreign}}
    (tmp_path / "service").write_text(json.dumps(live))
    serving = [ready_pod("a"), ready_pod("b")]
    for pod in serving:
        pod["metadata"]["labels"] = foreign
    gone = [ended_pod("c"), ended_pod("d", "Succeeded"), ended_pod("e", deletionTimestamp=LATE)]
    (tmp_path / "pods").write_text(json.dumps({"items": [*serving, *gone]}))
    assert made.steady.claims.idle_colour_and_size(task()) == hook.Placement("blue", 2)


@pytest.mark.parametrize(
    "pods",
    [[ended_pod("a")], [ended_pod("a", "", deletionTimestamp=LATE)], []],
    ids=["evicted", "stuck", "none"],
)
def test_the_selector_of_an_adopted_service_waits_for_no_pod_that_has_ended_or_is_to_end(
    tmp_path: Path, pods: list[Object]
) -> None:
    assert widens(tmp_path, pods)


def test_the_selector_of_an_adopted_service_waits_for_pods_that_could_get_traffic(
    tmp_path: Path,
) -> None:
    with pytest.raises(hook.HookError, match="not gone yet"):
        widens(tmp_path, [ready_pod("a")])


def widens(folder: Path, pods: list[Object]) -> bool:
    """Whether an adopted Service gets its own selector back while there are these pods of ours."""
    made, narrow = deployer(folder, []), {"app": "shop", "pod-template-hash": "1"}
    entry = {"run": "", "outcome": "adopted", "selector": narrow, "was": {"app": "shop"}}
    notes = {hook.ANNOTATION_HISTORY: json.dumps([entry])}
    meta = {"name": "shop", "resourceVersion": "1", "annotations": notes}
    (folder / "service").write_text(json.dumps({"metadata": meta, "spec": {"selector": narrow}}))
    (folder / "deployment").write_text(json.dumps({"items": [{"spec": {"replicas": 0}}]}))
    (folder / "pods").write_text(json.dumps({"items": pods}))
    script = folder / "kubectl"
    patched = 'case "$*" in\n*patch*) cat > patched; cat service ;;'
    script.write_text(script.read_text().replace('case "$*" in', patched))
    made.steady.claims.put(task(), hook.Claim())
    change = json.loads((folder / "patched").read_text())
    history = json.loads(change["metadata"]["annotations"][hook.ANNOTATION_HISTORY])
    assert history[0]["selector"] == {"app": "shop"}
    wanted = {"app": "shop", "pod-template-hash": None}
    return bool(change["spec"]["selector"] == wanted)


# What a rollback and a failed first deployment leave


def recorded_calls(folder: Path, cases: str) -> Path:
    """Let the kubectl of a folder write down its calls, and answer some of them otherwise."""
    script = folder / "kubectl"
    calls = folder / "calls"
    recording = f"""echo "$*" >> calls
case "$*" in
{cases}"""
    script.write_text(script.read_text().replace('case "$*" in', recording, 1))
    return calls


@pytest.mark.parametrize(
    "meta",
    [
        '{"labels": {"app.kubernetes.io/managed-by": "x"}}',
        json.dumps({"labels": hook.companion_labels("blog")}),
        '{"labels": {}}',
        "{}",
    ],
)
def test_the_preview_service_of_someone_else_outlives_a_failed_first_deployment(
    tmp_path: Path, meta: str
) -> None:
    made = deployer(tmp_path, [])
    calls = recorded_calls(
        tmp_path,
        f"""*get*service/shop-preview*) echo '{{"metadata": {meta}}}' ;;
*get*service/shop*) ;;
*get*deployments*) echo '{{"items": []}}' ;;
*get*configmap*) echo '{{"items": []}}' ;;""",
    )
    made.collect_garbage(task())
    lines = calls.read_text().split("\n")
    assert any("get service/shop-preview" in line for line in lines)
    assert not [line for line in lines if "delete" in line and "preview" in line]


def test_a_record_goes_when_its_name_is_only_a_part_of_another_one_that_is_in_use(
    tmp_path: Path,
) -> None:
    made = deployer(tmp_path, [])
    entry = {"run": "shop-new", "selector": NEW, "release": "shop-release-1", "outcome": "deployed"}
    notes = {hook.ANNOTATION_HISTORY: json.dumps([entry])}
    meta = {"name": "shop", "resourceVersion": "1", "annotations": notes}
    (tmp_path / "service").write_text(json.dumps({"metadata": meta, "spec": {"selector": NEW}}))
    pod = {"volumes": [{"name": "v", "configMap": {"name": "my-settings-1"}}]}
    deployment = {"metadata": {"name": "shop-blue"}, "spec": {"template": {"spec": pod}}}
    (tmp_path / "deployment").write_text(json.dumps({"items": [deployment]}))
    container = {"envFrom": [{"configMapRef": {"name": "before-1"}}]}
    (tmp_path / "sets").write_text(json.dumps({"items": [{"spec": {"containers": [container]}}]}))
    names = ["shop-release-1", "shop-release", "my-settings-1", "settings-1", "before-1", "before"]
    (tmp_path / "names").write_text("".join(f"{name}   1   1d\n" for name in names))
    calls = recorded_calls(
        tmp_path, "*get*configmaps*--no-headers*) cat names ;;\n*replicasets*) cat sets ;;"
    )
    made.collect_garbage(task())
    (deleted,) = [line for line in calls.read_text().split("\n") if "delete" in line]
    words = [word.partition("/")[2] for word in deleted.split() if word.startswith("configmap/")]
    assert words == ["before", "settings-1", "shop-release"]


def test_a_copy_that_only_an_older_worker_names_stays_and_only_this_app_is_looked_at(
    tmp_path: Path,
) -> None:
    made = deployer(tmp_path, [])
    notes = {hook.ANNOTATION_HISTORY: json.dumps([{"run": "shop-new", "selector": NEW}])}
    meta = {"name": "shop", "resourceVersion": "1", "annotations": notes}
    (tmp_path / "service").write_text(json.dumps({"metadata": meta, "spec": {"selector": NEW}}))
    workers = [
        {
            "metadata": {"name": name, "labels": hook.companion_labels("shop")},
            "spec": {"selector": {"matchLabels": labels}},
        }
        for name, labels in (("mail", {"app": "mail"}), ("bills", {"app": "mail"}))
    ]
    front = {"metadata": {"name": "shop-blue", "labels": {"gitops-hook/app": "shop"}}}
    (tmp_path / "deployment").write_text(json.dumps({"items": [front, *workers]}))
    container = {"envFrom": [{"configMapRef": {"name": "before-1"}}]}
    (tmp_path / "sets").write_text(json.dumps({"items": [{"spec": {"containers": [container]}}]}))
    (tmp_path / "names").write_text("before-1   1   1d\nbefore-2   1   1d\n")
    calls = recorded_calls(
        tmp_path,
        """*get*configmaps*--no-headers*) cat names ;;
*replicasets*=gitops-hook%2Fworker%2Capp%3Dmail*) cat sets ;;
*replicasets*) echo '{"items": []}' ;;""",
    )
    made.collect_garbage(task())
    lines = calls.read_text().split("\n")
    queries = [line.partition("labelSelector=")[2] for line in lines if "replicasets" in line]
    asked = [unquote(query.partition("&")[0]) for query in queries]
    assert asked == ["gitops-hook/app=shop", "gitops-hook/worker,app=mail"]
    (deleted,) = [line for line in lines if "delete" in line]
    assert "configmap/before-2" in deleted
    assert "before-1" not in deleted


NAMELESS: Object = {"metadata": {"name": "shop", "resourceVersion": "1"}, "spec": {}}


def test_a_rollback_rejects_what_it_left_also_when_the_target_cannot_be_restored_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(tmp_path, two_pods(2), two_pods(2))
    rollback = hook.Rollback(made.steady)
    service = made.steady.live.read(task())
    assert service is not None
    left = replace(service.live, commit="a" * 40)
    service.history = [left, *service.history[1:]]
    target = service.history[1]
    switched = replace_claim(service, "shop-release")
    rejected: list[Any] = []
    monkeypatch.setattr(made.steady.claims, "put", lambda *_: service)
    monkeypatch.setattr(rollback, "ready_goal", lambda *_: hook.Goal(target, target, True))
    monkeypatch.setattr(rollback, "switch", lambda *_: switched)
    monkeypatch.setattr(made.state, "write", lambda app, *records, **_: rejected.extend(records))

    def fail(*_: Any) -> None:
        raise hook.KubectlError(["kubectl", "replace"], None, "")

    monkeypatch.setattr(rollback.rollout, "restore", fail)
    assert rollback.run(task(), service, target, "it is slow") == target
    assert [(r.commit, r.reason) for r in rejected] == [("a" * 40, "it is slow")]


def replace_claim(service: hook.Service, release: str) -> hook.Service:
    """A Service with the claim of a rollback that has something to restore."""
    other = copy.copy(service)
    other.claim = hook.Claim(phase="rollback", run="shop-old", restore=release)
    return other


def test_a_first_deployment_that_was_removed_is_not_remembered_by_an_informer_that_lags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = history(tmp_path, None, two_pods(0))
    live = json.loads((tmp_path / "service").read_text())
    live["metadata"]["uid"] = "of-the-removed-one"
    monkeypatch.setattr(made.state, "write", lambda *_, **__: None)
    made.steady.live.remove(task(), hook.Service(live))
    made.steady.live.remember(task(), hook.Service(live))
    assert made.remembered.in_order == {}
    live["metadata"]["uid"] = "of-the-next-one"
    made.steady.live.remember(task(), hook.Service(live))
    assert [s.uid for s in made.remembered.in_order.values()] == ["of-the-next-one"]


def test_a_release_that_becomes_larger_has_more_time_to_roll_out() -> None:
    meta = {"name": "shop-blue", "labels": {}}
    template = {"metadata": {"labels": {}}}
    spec = {
        "replicas": 1, "minReadySeconds": 10, "progressDeadlineSeconds": 300,
        "selector": {"matchLabels": {}}, "template": template,
    }  # fmt: skip
    release = a_release({"metadata": meta, "spec": spec})
    deadlines = [
        hook.recoloured(release, task().app, "green", size).deployment["spec"][
            "progressDeadlineSeconds"
        ]
        for size in (1, 15, 100)
    ]
    assert deadlines == [300, 300, 2000]


def drained(
    folder: Path, spec: Object, since: float, retain: str = "full", *, due: bool = True
) -> list[Object]:
    """Drain a colour with a Deployment, if it is due; return how that is changed."""
    made = deployer(folder, [])
    name = {"name": "shop-blue", "resourceVersion": "1"}
    spec = {**spec, "selector": {"matchLabels": {"gitops-hook/app": "shop"}}}
    (folder / "deployment").write_text(json.dumps({"metadata": name, "spec": spec}))
    script = folder / "kubectl"
    noted = 'case "$*" in\n*patch*) cat > patch; cat deployment; exit ;;\n'
    script.write_text(script.read_text().replace('case "$*" in\n', noted))
    app = loaded(CONFIG.replace("deploy: {", f"deploy: {{retain: {retain}, ")).apps[0]
    made.steady.workloads.drain(replace(task(), app=app), "shop-blue", since, lambda: due)
    if not (folder / "patch").exists():
        return []
    change: Object = json.loads((folder / "patch").read_text())
    assert change["metadata"] == {"resourceVersion": "1"}
    return [change["spec"]]


@pytest.mark.parametrize(("size", "after"), [(2, 2), (8, 5)], ids=["smaller", "larger"])
def test_a_drained_colour_retains_no_more_pods_than_it_has(
    tmp_path: Path, size: int, after: int
) -> None:
    calls = drained(tmp_path, {"replicas": size}, SWITCHED, "5")
    assert calls == [{"replicas": after}]


@pytest.mark.parametrize(
    ("replicas", "restarted", "calls"),
    [(2, None, 1), (2, EARLY, 1), (2, LATE, 0), (0, None, 0)],
    ids=["never", "for-an-earlier-switch", "for-this-one", "without-pods"],
)
def test_a_drained_colour_is_restarted_once(
    tmp_path: Path, replicas: int, restarted: str | None, calls: int
) -> None:
    notes = {"annotations": {hook.RESTARTED: restarted} if restarted else {}}
    spec = {"replicas": replicas, "template": {"metadata": notes}}
    changes = drained(tmp_path, spec, SWITCHED)
    stamps = [c["template"]["metadata"]["annotations"][hook.RESTARTED] for c in changes]
    assert len(stamps) == calls
    assert all(hook.epoch(stamp) for stamp in stamps)


@pytest.mark.parametrize("retain", ["full", "0"])
def test_a_colour_is_not_drained_that_somebody_took_the_traffic_back_to(
    tmp_path: Path, retain: str
) -> None:
    assert not drained(tmp_path, {"replicas": 2}, SWITCHED, retain, due=False)


def objects_of(text: str) -> hook.AppObjects:
    configmaps = {"settings": {"data": {"text": text}}}
    return hook.AppObjects(deployment={}, service={}, configmaps=configmaps, ignored=[])


def test_what_was_read_of_the_last_commits_is_kept_by_app_environment_and_commit() -> None:
    last = hook.LastObjects()
    commits = [replace(task(), run=replace(task().run, commit=f"{n:040x}")) for n in range(20)]
    for number, each in enumerate(commits):
        last.keep(each, objects_of(f"{number}"))
    kept = [last.get(each) for each in commits]
    assert kept[: -last.KEPT] == [None] * (len(commits) - last.KEPT)
    assert kept[-1] == objects_of("19")
    assert last.get(replace(commits[-1], environment="staging")) is None


def test_large_objects_are_read_again_and_not_kept() -> None:
    last = hook.LastObjects()
    last.keep(task(), objects_of("small"))
    assert last.get(task()) == objects_of("small")
    last.keep(task(), objects_of("x" * last.BYTES))
    assert last.get(task()) is None


# === Writes that somebody else's claim forbids ===


def claimed(run: str, phase: hook.Phase, since: float = 5.0) -> hook.Service:
    """A live Service with a claim of this run."""
    text = json.dumps(hook.Claim(run=run, colour="blue", phase=phase, since=since).to_json())
    meta = {"name": "shop", "resourceVersion": "1", "annotations": {hook.ANNOTATION_CLAIM: text}}
    return hook.Service({"metadata": meta, "spec": {"selector": {"x": "y"}}})


LABEL = "gitops-hook/app"


class OneDeployment:
    """A cluster with one Deployment, which knows what is written to it."""

    def __init__(self, owner: str = "shop") -> None:
        self.owner = owner
        self.writes: list[str] = []

    def get(self, _resource: str, name: str, namespace: str) -> Object:
        meta = {"name": name, "namespace": namespace, "resourceVersion": "7"}
        return {"metadata": meta, "spec": {"selector": {"matchLabels": {LABEL: self.owner}}}}

    def delete_exactly(self, _api: str, _resource: str, current: Object) -> None:
        self.writes.append(f"delete {current['metadata']['resourceVersion']}")

    def patch(self, _resource: str, _name: str, _namespace: str, change: Object) -> None:
        self.writes.append(f"patch {change['metadata']['resourceVersion']}")


@pytest.mark.parametrize(
    ("now", "writes"),
    [
        (claimed("shop-new", hook.Phase.PREPARING), ["delete 7"]),
        (claimed("shop-other", hook.Phase.ROLLBACK), []),
        (None, []),
    ],
    ids=["the-same", "another", "gone"],
)
def test_what_a_failed_deployment_left_is_deleted_only_under_its_claim(
    now: hook.Service | None, writes: list[str]
) -> None:
    cluster = OneDeployment()
    rollout: Any = SimpleNamespace(kubectl=cluster, live=SimpleNamespace(read=lambda _: now))
    before = claimed("shop-new", hook.Phase.PREPARING)
    hook.Rollout.delete_overwritten(rollout, task(), "shop-blue", before)
    assert cluster.writes == writes


@pytest.mark.parametrize(("due", "writes"), [(True, ["patch 7"]), (False, [])])
def test_a_version_that_was_left_is_scaled_down_only_while_that_is_due(
    *, due: bool, writes: list[str]
) -> None:
    cluster = OneDeployment()
    door: Any = SimpleNamespace(kubectl=cluster, clock=hook.Clock())
    hook.Workloads(door).scale(task(), "shop-blue", 0, lambda: due)
    assert cluster.writes == writes


def test_a_deployment_of_another_app_in_a_colour_is_neither_changed_nor_deleted() -> None:
    cluster = OneDeployment("blog")
    door: Any = SimpleNamespace(kubectl=cluster, clock=hook.Clock())
    workloads = hook.Workloads(door)
    workloads.scale(task(), "shop-blue", 0)
    workloads.drain(task(), "shop-blue", 0.0)
    workloads.unpause(task(), "shop-blue")
    before = claimed("shop-new", hook.Phase.PREPARING)
    rollout: Any = SimpleNamespace(kubectl=cluster, live=SimpleNamespace(read=lambda _: before))
    hook.Rollout.delete_overwritten(rollout, task(), "shop-blue", before)
    assert cluster.writes == []


@pytest.mark.parametrize("taker", ["", "shop-other"])
def test_a_rollback_takes_no_claim_that_came_since_it_looked(taker: str) -> None:
    seen = claimed("shop-old", hook.Phase.DRAINING)
    own = hook.Claim(run="shop-new", colour="blue", phase=hook.Phase.ROLLBACK, since=9.0)
    stands = claimed(taker, hook.Phase.PREPARING) if taker else seen
    put: list[hook.Claim] = []

    def write(*_: Any) -> hook.Service:
        raise hook.KubectlError(["kubectl"], 1, "Error from server (Conflict): it was changed")

    def put_claim(_: Any, claim: hook.Claim, expected: hook.Claim) -> hook.Service:
        if stands.claim != expected:
            return stands
        put.append(claim)
        return claimed(claim.run, hook.Phase.ROLLBACK, 9.0)

    parts = {"live": SimpleNamespace(write=write), "claims": SimpleNamespace(put=put_claim)}
    command: Any = SimpleNamespace(**parts)
    if taker:
        with pytest.raises(hook.RefusedError, match="shop-other has changed production meanwhile"):
            hook.Rollback.claim(command, task(), seen, own)
        assert put == []
    else:
        assert hook.Rollback.claim(command, task(), seen, own).claim == own
        assert put == [own]
