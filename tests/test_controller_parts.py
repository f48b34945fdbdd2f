"""The controller's own judgement, without a cluster: what it remembers, and what it waits for."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gitops_hook as hook
from gitops_hook import Do, Outcome, Reason
from tests.world import Object, eventually

OLD, NEW = "a" * 40, "b" * 40
CONFIG = """
apps:
  - {name: shop, repository: https://git.example.com/demo/shop.git, build: {builder: none}}
"""


class Desk(hook.Kubectl):
    """A cluster that holds ConfigMaps, Jobs and Services, and notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__(hook.Metrics())
        self.objects: dict[tuple[str, str], Object] = {}
        self.filters: list[str] = []

    def get(self, resource: str, name: str, namespace: str) -> Object | None:
        return self.objects.get((resource, name))

    def list(self, resource: str, namespace: str, *filters: str) -> list[Object]:
        self.filters += filters[1:]
        kept = [o for o in self.objects.values() if o.get("kind") == "Job"]
        return [o for o in kept if resource == "jobs" and o["metadata"]["namespace"] == namespace]

    def create_each(
        self, objects: Sequence[Object], namespace: str
    ) -> dict[str, hook.KubectlError]:
        for made in objects:
            made["metadata"] |= {"resourceVersion": "1", "uid": "u"}
            self.objects["job", made["metadata"]["name"]] = made
        return {}

    def patch(self, resource: str, name: str, namespace: str, change: Object) -> Object:
        if resource == "job" and (resource, name) not in self.objects:
            raise hook.KubectlError(["kubectl"], 1, "Error from server (NotFound): no such Job")
        found = self.objects.setdefault((resource, name), {"data": {}})
        data = found.get("data", {})
        data.update(change.get("data", {}))
        for key in [k for k, v in data.items() if v is None]:
            del data[key]
        return found


class Watched(hook.Controller):
    """A controller whose looks at the runs are counted."""

    ticks = 0

    def reconcile(self) -> None:
        self.ticks += 1


def a_controller(
    directory: Path, kind: type[hook.Controller] = hook.Controller, config: str = CONFIG
) -> Any:
    git = SimpleNamespace(heads=lambda url: {})
    desk = Desk()
    doors = hook.Doors(
        kubectl=desk,
        git=git,  # type: ignore[arg-type]
        secrets=hook.Secrets(directory),
        clock=hook.Clock(),
        reports=hook.Reports(desk.metrics),
        stop=threading.Event(),
    )
    deployer = hook.Deployer(doors)
    spool = hook.Spool(directory / "spool", 100)
    spool.prepare()
    return kind(hook.load_config(config), deployer, spool)


@pytest.fixture
def controller(tmp_path: Path) -> Any:
    return a_controller(tmp_path)


def a_run(commit: str, ref: str = "refs/heads/main") -> hook.Run:
    return hook.Run(id=hook.run_id("shop", ref, commit), app="shop", ref=ref, commit=commit)


def catch_up(controller: Any, heads: dict[str, str]) -> None:
    """Let the heads be read, and compared with what was last seen."""
    controller.deployer.doors.git.heads = lambda url: heads
    controller.due["shop"] = 0.0
    controller.read_heads(controller.apps["shop"])


def seen(controller: Any) -> dict[str, tuple[str, str | None]]:
    """The last recorded push of each ref, and how it ended."""
    state = controller.state.read(controller.apps["shop"])
    runs = sorted(state.runs.values(), key=lambda record: record.received)
    return {record.ref: (record.commit, record.outcome or None) for record in runs}


def record(controller: Any, run: hook.Run, outcome: str = "") -> None:
    """Record a run, under way or ended."""
    ended = run.received if outcome else 0.0
    kept = replace(hook.RunRecord.of(run), outcome=str(outcome), ended=ended)
    controller.state.write(controller.apps["shop"], kept)


def rejected(controller: Any) -> list[str]:
    """The commits that are recorded as rejected."""
    return [*controller.state.read(controller.apps["shop"]).rejected]


def ends(outcome: Outcome) -> hook.Action:
    return hook.Action(Do.END, "test", Reason.OK, "", outcome)


# What it did


def test_what_was_done_is_not_done_again_on_the_same_ground_for_a_while() -> None:
    now = [0.0]
    once = hook.Cooldown(SimpleNamespace(monotonic=lambda: now[0]))  # type: ignore[arg-type]
    assert once.allows("run", "ground", 10.0)
    now[0] = 9.0
    assert not once.allows("run", "ground", 10.0)
    assert once.allows("another", "ground", 10.0)
    assert once.allows("run", "another ground", 10.0)
    now[0] = 20.0
    assert once.allows("run", "another ground", 10.0)


def test_the_services_of_environments_that_no_app_uses_are_not_watched(tmp_path: Path) -> None:
    spaces = "namespaces: {test: t, build: b, staging: s, production: p, unused: u}"
    watches = a_controller(tmp_path, config=CONFIG + spaces).services
    assert {name: watch.namespace for name, watch in watches.items()} == {
        "staging": "s",
        "production": "p",
    }


REFUSED = (
    'Error from server (Forbidden): error when creating "STDIN": configmaps "x" is forbidden: '
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("exceeded quota: small, requested: count/configmaps=1", "QuotaExceeded"),
        ("violates PodSecurity", "ManifestInvalid"),
        ('User "system:x" cannot create resource "configmaps" in API group ""', None),
        ("status unknown for quota: small", None),
        ("unable to create new content in namespace x because it is being terminated", None),
        ('violates "timed out, etcd"', "ManifestInvalid"),
        ('violates "User "system:x" cannot create resource "', "ManifestInvalid"),
        ('violates "exceeded quota: x"', "ManifestInvalid"),
        ("violates it\nexceeded quota: x", "ManifestInvalid"),
    ],
)
def test_a_refusal_ends_a_deployment_unless_it_is_nobody_s_fault_or_ours(
    controller: Any, monkeypatch: pytest.MonkeyPatch, said: str, reason: str | None
) -> None:
    def deploy(task: hook.Task) -> None:
        raise hook.KubectlError(["kubectl", "create"], 1, REFUSED + said)

    monkeypatch.setattr(controller.deployer, "deploy", deploy)
    there = {"metadata": {"name": "shop", "resourceVersion": "1"}, "spec": {}}
    controller.kubectl.objects["service", "shop"] = there
    task = controller.task(controller.apps["shop"], "staging", a_run(NEW))
    if reason is None:
        with pytest.raises(hook.KubectlError):
            controller.deploy(task, {})
    else:
        controller.deploy(task, {})
        ended = controller.state.read(controller.apps["shop"]).last("refs/heads/main")
        assert (ended.outcome, ended.reason) == ("failed", reason)


# What is recorded


def test_a_newer_push_stays_the_last_seen_when_the_older_run_ends_after_it(controller: Any) -> None:
    old, new = (replace(a_run(c), received=at) for c, at in ((OLD, 1.0), (NEW, 2.0)))
    record(controller, old)
    record(controller, new)
    controller.finish(new, {}, ends(Outcome.TESTED))
    controller.finish(old, {}, ends(Outcome.TESTED))
    assert seen(controller) == {"refs/heads/main": (NEW, "tested")}


@pytest.mark.parametrize(
    ("stage", "reason", "rejects"),
    [
        ("production", Reason.CRASH_LOOP, True),
        ("staging", Reason.MANIFEST_INVALID, True),
        ("production", Reason.BOTH_UNHEALTHY, False),
        ("production", Reason.QUOTA_EXCEEDED, False),
        ("staging", Reason.UNSCHEDULABLE, False),
        ("test", Reason.TESTS_FAILED, False),
    ],
)
def test_a_commit_is_rejected_for_what_a_deployment_says_against_it_alone(
    controller: Any, stage: str, reason: Reason, *, rejects: bool
) -> None:
    controller.finish(a_run(NEW), {}, hook.ends(Outcome.FAILED, reason, "", stage))
    assert rejected(controller) == [NEW] * rejects


def test_a_run_under_way_of_which_nothing_is_left_vanished(controller: Any) -> None:
    record(controller, a_run(OLD))
    catch_up(controller, {"refs/heads/main": OLD})
    ended = controller.state.read(controller.apps["shop"]).last("refs/heads/main")
    assert (ended.outcome, ended.reason) == ("failed", "Vanished")
    assert controller.spool.read() == []
    labels = {"app": "shop", "outcome": "failed", "stage": "test", "reason": "Vanished"}
    registry = controller.metrics.registry
    assert registry.get_sample_value("gitops_hook_runs_total", labels) == 1
    catch_up(controller, {"refs/heads/main": OLD})
    assert registry.get_sample_value("gitops_hook_runs_total", labels) == 1


def live_service(*entries: Object) -> Object:
    """A live Service with this history, newest first, which selects the last entry marked live."""
    told = [{"selector": {hook.LABEL_RUN: e["run"]}, "at": 1.0, **e} for e in entries]
    (live,) = [e["selector"] for e in told if e.get("live")]
    notes = {hook.ANNOTATION_HISTORY: json.dumps(told)}
    meta = {"name": "shop", "resourceVersion": "1", "annotations": notes}
    return {"metadata": meta, "spec": {"selector": live}}


@pytest.mark.parametrize(
    ("outcome", "asks"),
    [("rolled-back", False), ("switched-back", False), ("deployed", True), ("", True)],
)
def test_a_commit_that_traffic_was_taken_from_stays_rejected_after_a_reinstallation(
    controller: Any, outcome: str, *, asks: bool
) -> None:
    gone = {"run": "shop-new", "commit": NEW, "outcome": outcome}
    stays = {"run": "shop-old", "commit": OLD, "outcome": "deployed", "live": True}
    controller.kubectl.objects["service", "shop"] = live_service(gone, stays)
    assert (seen(controller), rejected(controller)) == ({}, [])
    catch_up(controller, {"refs/heads/main": NEW})
    assert stored(controller) == [NEW] * asks
    assert rejected(controller) == [NEW] * (not asks)
    controller.spool.store([a_run(NEW)])
    controller.intake()
    assert (("job", f"test-{a_run(NEW).id}") in controller.kubectl.objects) is asks


@pytest.mark.parametrize("live", [True, False])
def test_of_a_commit_that_was_deployed_again_after_a_rollback_the_last_time_counts(
    controller: Any, *, live: bool
) -> None:
    again = {"run": "shop-new", "commit": NEW, "outcome": "deployed", "live": live}
    other = {"run": "shop-old", "commit": OLD, "outcome": "deployed", "live": not live}
    before = {"run": "shop-new", "commit": NEW, "outcome": "rolled-back", "selector": {"x": "y"}}
    controller.kubectl.objects["service", "shop"] = live_service(again, other, before)
    app = controller.apps["shop"]
    needless = controller.needless(app, controller.state.read(app))
    assert needless == {NEW if live else OLD: "AlreadyLive"}


@pytest.mark.parametrize("left", ["an outcome", "a Job", "a stored push"])
def test_a_run_of_which_something_is_left_did_not_vanish(controller: Any, left: str) -> None:
    run = a_run(OLD)
    ended = str(Outcome.TESTED) if left == "an outcome" else ""
    record(controller, run, ended)
    if left == "a Job":
        job = hook.test_job(controller.config, controller.apps["shop"], run)
        job["metadata"] |= {"resourceVersion": "1", "uid": "u"}
        controller.kubectl.objects["job", job["metadata"]["name"]] = job
    if left == "a stored push":
        controller.spool.store([run])
    catch_up(controller, {"refs/heads/main": OLD})
    assert seen(controller) == {"refs/heads/main": (OLD, ended or None)}


def after_a_loss(controller: Any, tmp_path: Path) -> Any:
    """A new daemon, in the same cluster, of a pod whose spool is gone with it."""
    (tmp_path / "new").mkdir()
    new = a_controller(tmp_path / "new")
    new.kubectl.objects = controller.kubectl.objects
    catch_up(new, {"refs/heads/main": OLD})
    return new


def test_a_run_that_never_had_a_job_begins_again_when_its_stored_push_is_lost(
    controller: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(objects: Sequence[Object], namespace: str) -> None:
        raise hook.KubectlError(["kubectl"], 1, "Error from server (Forbidden): exceeded quota")

    controller.spool.store([a_run(OLD)])
    with monkeypatch.context() as patched:
        patched.setattr(controller.kubectl, "create_each", refuse)
        with pytest.raises(hook.KubectlError):
            controller.intake()
    new = after_a_loss(controller, tmp_path)
    assert [run.id for _, run in new.spool.read()] == [a_run(OLD).id]
    new.intake()
    assert ("job", f"test-{a_run(OLD).id}") in new.kubectl.objects
    assert seen(new) == {"refs/heads/main": (OLD, None)}
    assert new.spool.read() == []


def test_a_run_whose_job_was_deleted_while_nobody_looked_vanished(
    controller: Any, tmp_path: Path
) -> None:
    controller.spool.store([a_run(OLD)])
    controller.intake()
    del controller.kubectl.objects["job", f"test-{a_run(OLD).id}"]
    new = after_a_loss(controller, tmp_path)
    assert seen(new) == {"refs/heads/main": (OLD, "failed")}
    assert new.spool.read() == []


def test_a_run_that_ends_while_its_job_is_being_created_stays_ended(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(objects: Sequence[Object], namespace: str) -> dict[str, hook.KubectlError]:
        controller.finish(a_run(OLD), {}, ends(Outcome.SUPERSEDED))
        return {}

    monkeypatch.setattr(controller.kubectl, "create_each", create)
    controller.spool.store([a_run(OLD)])
    controller.intake()
    assert seen(controller) == {"refs/heads/main": (OLD, "superseded")}


def test_a_run_that_goes_again_says_that_its_old_job_is_deleted_first(
    controller: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gitops_hook")
    run, desk, now = replace(a_run(NEW), received=2.0), controller.kubectl, [0.0]
    controller.clock.monotonic = lambda: now[0]
    name = f"test-{run.id}"
    old = hook.test_job(controller.config, controller.apps["shop"], a_run(NEW))
    notes = {hook.ANNOTATION_OUTCOME: "failed", hook.ANNOTATION_ENDED: "1.0"}
    old["metadata"] |= {"resourceVersion": "1", "uid": "old"}
    old["metadata"]["annotations"] |= notes
    made = desk.create_each

    def create(objects: Sequence[Object], namespace: str) -> dict[str, hook.KubectlError]:
        if ("job", name) not in desk.objects:
            return made(objects, namespace)  # type: ignore[no-any-return]
        text = f'Error from server (AlreadyExists): jobs.batch "{name}" already exists'
        return {name: hook.KubectlError(["kubectl", "create"], 1, text)}

    def delete(resource: str, names: list[str], namespace: str) -> None:
        desk.objects[resource, names[0]]["metadata"]["deletionTimestamp"] = "now"

    monkeypatch.setattr(desk, "create_each", create)
    monkeypatch.setattr(desk, "delete", delete)
    desk.objects["job", name] = old
    controller.spool.store([run])
    for _ in range(2):
        controller.intake()
        assert stored(controller) == [NEW]
        now[0] += 60
    del desk.objects["job", name]
    controller.intake()
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "an old Job is being deleted"),
        ("INFO", "an old Job is being deleted"),
        ("INFO", "run queued"),
    ]
    assert stored(controller) == []


def a_mirrored_job(controller: Any) -> hook.Informer[hook.Job]:
    """Let a run of a side branch have its Job, in the cluster and in a mirror; return that."""
    job = hook.test_job(controller.config, controller.apps["shop"], a_run(OLD, "refs/heads/side"))
    controller.kubectl.create_each([job], "test")
    watch: hook.Informer[hook.Job] = controller.jobs[0]
    watch._take("ADDED", job)
    return watch


def delete(controller: Any, watch: hook.Informer[hook.Job]) -> None:
    """Delete the only Job; its mirror is told."""
    (name,) = [j.name for j in watch.items()]
    watch._take("DELETED", controller.kubectl.objects.pop(("job", name)))


def test_a_deleted_job_is_told_again_after_a_failure_and_then_no_more(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = a_mirrored_job(controller)
    controller.reconcile()
    delete(controller, watch)

    def lose(resource: str, name: str, namespace: str) -> None:
        raise hook.KubectlError(["kubectl"], None, "timed out")

    with monkeypatch.context() as patched:
        patched.setattr(controller.kubectl, "get", lose)
        controller.reconcile()
    assert seen(controller) == {}
    labels = {"app": "shop", "outcome": "failed", "stage": "test", "reason": "Vanished"}
    for _ in range(2):
        controller.reconcile()
        assert seen(controller) == {"refs/heads/side": (OLD, "failed")}
        ended = controller.metrics.registry.get_sample_value("gitops_hook_runs_total", labels)
        assert ended == 1


def test_a_job_that_goes_after_its_run_has_ended_is_not_told_again(controller: Any) -> None:
    watch = a_mirrored_job(controller)
    controller.reconcile()
    controller.finish(a_run(OLD, "refs/heads/side"), {}, ends(Outcome.TESTED))
    delete(controller, watch)
    controller.reconcile()
    assert seen(controller) == {"refs/heads/side": (OLD, "tested")}
    labels = {"app": "shop", "outcome": "failed", "stage": "test", "reason": "Vanished"}
    assert controller.metrics.registry.get_sample_value("gitops_hook_runs_total", labels) is None


def a_seen_job(
    controller: Any, stage: str, state: str, ended: float | None = None, **meta: Any
) -> hook.Job:
    """A Job of a run that was received at second 10, and may have ended."""
    make = hook.test_job if stage == "test" else hook.build_job
    found = make(controller.config, controller.apps["shop"], replace(a_run(OLD), received=10.0))
    found["metadata"] |= {"resourceVersion": "1", "uid": stage, **meta}
    if ended is not None:
        told = {hook.ANNOTATION_OUTCOME: "failed", hook.ANNOTATION_ENDED: str(ended)}
        found["metadata"]["annotations"] |= told
    found["spec"]["suspend"] = False
    done = {"succeeded": "Complete", "failed": "Failed"}.get(state)
    found["status"] = {"conditions": [{"type": done, "status": "True"}] if done else []}
    return hook.Job(found)


@pytest.mark.parametrize(
    ("lost", "left", "told"),
    [
        (("test", "active"), None, ["test"]),
        (("test", "succeeded"), None, ["test"]),
        (("build", "active"), ("test", "succeeded"), ["test"]),
        (("build", "succeeded"), ("test", "succeeded"), None),
        (("test", "succeeded"), ("build", "active"), None),
        (("test", "active"), ("build", "failed", 5.0), ["build"]),
        (("build", "failed", 5.0), ("test", "active"), None),
        (("build", "failed", 20.0), ("test", "succeeded"), None),
        (("test", "succeeded"), ("build", "failed", 20.0), None),
    ],
    ids=[
        "its tests", "its green tests", "its build", "a build that can be made once more",
        "tests that are built",
        "its tests beside a build of before", "a build of before", "the build that it ended in",
        "its tests after its build ended it",
    ],
)  # fmt: skip
def test_a_run_vanishes_with_a_job_that_it_still_needs(
    controller: Any, lost: Any, left: Any, told: list[str] | None
) -> None:
    ended: list[Any] = []
    controller.finish = lambda run, jobs, why: ended.append(([*jobs], why.stage, why.reason))
    there = {left[0]: a_seen_job(controller, *left)} if left else {}
    controller.end_vanished(a_seen_job(controller, *lost), there)
    assert ended == ([] if told is None else [(told, lost[0], Reason.VANISHED)])


@pytest.mark.parametrize(
    ("jobs", "dealt", "deleted", "opened"),
    [
        ([], False, [], []),
        ([("test", "active")], True, [], []),
        ([("test", "failed", 20.0)], False, ["test"], []),
        ([("test", "failed", 40.0)], True, [], []),
        ([("test", "succeeded", 20.0), ("build", "failed", 40.0)], True, [], []),
        ([("test", "succeeded"), ("build", "failed", 20.0)], True, ["build"], ["test"]),
        ([("test", "failed"), ("build", "succeeded", 20.0)], False, ["test", "build"], []),
        ([("test", "succeeded"), ("build", "succeeded", 20.0)], True, [], ["build", "test"]),
    ],
    ids=[
        "gone", "under way", "red tests", "ended since the push", "its build ended since",
        "a red build", "tests made anew", "a deployment that failed",
    ],
)  # fmt: skip
def test_a_run_that_is_pushed_again_goes_on_where_it_failed(
    controller: Any, jobs: Any, dealt: bool, deleted: list[str], opened: list[str]
) -> None:
    gone, patched = list[str](), list[str]()

    def delete(resource: str, names: Sequence[str], namespace: str) -> None:
        gone.extend(name.partition("-")[0] for name in names)

    def patch(resource: str, name: str, namespace: str, change: Object) -> None:
        patched.append(name.partition("-")[0])
        notes = change["metadata"]["annotations"]
        assert {notes[k] for k in (hook.ANNOTATION_OUTCOME, hook.ANNOTATION_ENDED)} == {None}
        assert {notes[k] for k in (hook.ANNOTATION_REASON, hook.ANNOTATION_DETAIL)} == {None}
        assert (notes[hook.ANNOTATION_RECEIVED], notes[hook.ANNOTATION_DELIVERY]) == (
            "30.000",
            "again",
        )
        assert change["spec"] == {"ttlSecondsAfterFinished": None}

    kubectl: Any = SimpleNamespace(delete=delete, patch=patch)
    run = replace(a_run(OLD), received=30.0, delivery="again")
    found = [a_seen_job(controller, *each) for each in jobs]
    assert hook.reopen(kubectl, run, found) is dealt
    assert (gone, patched) == (deleted, opened)


def test_a_job_that_is_being_deleted_is_waited_for(controller: Any) -> None:
    leaving = a_seen_job(controller, "build", "failed", 20.0, deletionTimestamp="")
    jobs, kubectl = [a_seen_job(controller, "test", "succeeded"), leaving], SimpleNamespace()
    assert not hook.reopen(kubectl, replace(a_run(OLD), received=30.0), jobs)  # type: ignore[arg-type]


def test_a_push_whose_run_is_under_way_needs_nothing_more(controller: Any) -> None:
    refusal = hook.KubectlError(["kubectl"], 1, "Error from server (AlreadyExists): it is there")
    assert controller.handle_create_result(
        a_run(OLD), refusal, [a_seen_job(controller, "test", "active")]
    )
    assert seen(controller) == {}


@pytest.mark.parametrize(
    ("said", "dealt", "outcome"),
    [
        ("", True, None),
        ('The Job "test-x" is invalid: spec: no', True, "failed"),
        ('admission webhook "policy" denied the request: no', True, "failed"),
        ("Error from server (BadRequest): no", True, "failed"),
        ("Error from server (Forbidden): exceeded quota", False, None),
        ("Error from server (AlreadyExists): and was gone the moment after", False, None),
        ("connection refused", False, None),
    ],
    ids=["created", "invalid", "denied", "bad", "forbidden", "gone-since", "unreachable"],
)
def test_a_push_whose_job_is_refused_for_good_has_failed_and_any_other_waits(
    controller: Any, said: str, dealt: bool, outcome: str | None
) -> None:
    refusal = hook.KubectlError(["kubectl"], 1, said) if said else None
    assert controller.handle_create_result(a_run(NEW), refusal, None) is dealt
    assert seen(controller) == ({"refs/heads/main": (NEW, outcome)} if outcome else {})


def test_one_vanished_job_that_cannot_be_written_down_holds_back_no_other_run(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, acted = a_mirrored_job(controller), []
    controller.reconcile()
    delete(controller, watch)
    other = hook.test_job(controller.config, controller.apps["shop"], a_run(NEW, "refs/heads/x"))
    controller.kubectl.create_each([other], "test")
    watch._take("ADDED", other)

    def refuse(app: hook.App, *records: Any, **more: Any) -> None:
        raise hook.KubectlError(["kubectl"], 1, "Error from server (Forbidden): no")

    monkeypatch.setattr(controller.state, "write", refuse)
    monkeypatch.setattr(controller, "execute", lambda view, action: acted.append(view.run.commit))
    controller.reconcile()
    assert acted == [NEW]


def test_a_step_that_fails_again_and_again_is_said_once_in_five_minutes_and_shown_all_the_time(
    controller: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, port = [1e6], iter(range(40000, 50000))
    controller.clock.monotonic = lambda: now[0]
    a_mirrored_job(controller)
    synced(controller)
    lost = [f"read tcp 10.0.0.1:{{}}->10.0.0.2:443: no {what}" for what in ("way", "answer")]

    def fail(view: hook.Observation, action: hook.Action) -> None:
        # each look is a second, and every fifth takes the step
        if troubles and now[0] % 5 == 0:
            raise hook.KubectlError(["kubectl"], 1, troubles[0].format(next(port)))

    def look(seconds: int) -> int:
        """Look every second; return how often trouble was said and whether it is always shown."""
        before = len(caplog.records)
        for _ in range(seconds):
            now[0] += 1
            controller.control()
            shown.add(waits("a step"))
        return len(caplog.records) - before

    def waits(what: str) -> float | None:
        labels = {"what": what}
        return controller.metrics.registry.get_sample_value("gitops_hook_waiting", labels)  # type: ignore[no-any-return]

    monkeypatch.setattr(controller, "execute", fail)
    shown: set[float | None] = set()
    troubles: list[str] = []
    assert (look(1), shown) == (0, {0})
    troubles = lost[:1]
    assert look(5) == 1
    shown.clear()
    assert (look(290), shown) == (0, {1})
    assert look(10) == 1
    troubles = lost[1:]
    assert (look(5), shown) == (1, {1})
    troubles = []
    look(30)
    assert waits("a step") == 0


def test_a_job_that_is_deleted_during_a_look_is_missed_in_the_next(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, grouped = a_mirrored_job(controller), controller.grouped

    def deleted_meanwhile() -> Object:
        runs: Object = grouped()
        delete(controller, watch)
        return runs

    with monkeypatch.context() as patched:
        patched.setattr(controller, "grouped", deleted_meanwhile)
        controller.reconcile()
    controller.reconcile()
    assert seen(controller) == {"refs/heads/side": (OLD, "failed")}


# Heads that are older than the push


def stored(controller: Any) -> list[str]:
    """The commits of the pushes that wait for the cluster."""
    return [run.commit for _, run in controller.spool.read()]


def test_a_head_from_before_the_last_push_is_no_news_for_as_long_as_git_may_lag(
    controller: Any,
) -> None:
    now = 1e9
    controller.clock.now = lambda: now
    run = replace(a_run(NEW), before=OLD, received=now)
    record(controller, run, Outcome.TESTED)
    now += hook.HEAD_GRACE - 1
    catch_up(controller, {"refs/heads/main": OLD})
    assert (stored(controller), seen(controller)) == ([], {"refs/heads/main": (NEW, "tested")})
    now += 2
    catch_up(controller, {"refs/heads/main": OLD})
    assert stored(controller) == [OLD]


def test_a_new_branch_that_git_does_not_show_yet_is_not_forgotten(controller: Any) -> None:
    now = 1e9
    controller.clock.now = lambda: now
    run = replace(a_run(NEW, "refs/heads/side"), before="0" * 40, received=now)
    record(controller, run)
    catch_up(controller, {"refs/heads/main": OLD})
    assert seen(controller)["refs/heads/side"] == (NEW, None)


@pytest.mark.parametrize("spooled", [True, False])
def test_a_push_that_comes_while_git_is_asked_is_not_undone(
    controller: Any, spooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(controller, a_run("c" * 40), Outcome.TESTED)

    def heads(url: str) -> dict[str, str]:
        # two pushes: the commit before the last one is not the one that git showed
        run = replace(a_run(NEW), before="d" * 40, received=time.time())
        controller.spool.store([run])
        if not spooled:
            controller.intake()
        return {"refs/heads/main": OLD}

    monkeypatch.setattr(controller.deployer.doors.git, "heads", heads)
    controller.read_heads(controller.apps["shop"])
    controller.intake()
    assert stored(controller) == []
    assert seen(controller) == {"refs/heads/main": (NEW, None)}


# From the spool into the cluster


TWO_APPS = """
apps:
  - {name: shop, repository: https://git.example.com/demo/shop.git, build: {builder: none}}
  - {name: blog, repository: https://git.example.com/demo/blog.git, build: {builder: none}}
"""


def a_push(app: str, commit: str, ref: str = "refs/heads/main", **more: Any) -> hook.Run:
    return hook.Run(id=hook.run_id(app, ref, commit), app=app, ref=ref, commit=commit, **more)


def jobs_made(controller: Any) -> list[str]:
    """The names of the Jobs in the cluster, in the order in which they were made."""
    return [name for kind, name in controller.kubectl.objects if kind == "job"]


def test_what_one_app_has_recorded_neither_stops_nor_delays_another_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = a_controller(tmp_path, config=TWO_APPS)
    synced(controller)
    patch, now = controller.kubectl.patch, [0.0]
    controller.clock.monotonic = lambda: now[0]

    def refuse(resource: str, name: str, namespace: str, change: Object) -> Object:
        if name == "gitops-hook-shop":
            raise hook.KubectlError(["kubectl"], 1, 'The ConfigMap "x" is invalid: Too long')
        return patch(resource, name, namespace, change)  # type: ignore[no-any-return]

    with monkeypatch.context() as patched:
        patched.setattr(controller.kubectl, "patch", refuse)
        controller.spool.store([a_push("shop", OLD), a_push("blog", OLD)])
        pause = controller.intake()
        assert stored(controller) == [OLD]
        assert f"test-{a_push('blog', OLD).id}" in jobs_made(controller)
        assert 0 < pause < 10
        controller.spool.store([a_push("blog", NEW)])
        controller.intake()
        assert f"test-{a_push('blog', NEW).id}" in jobs_made(controller)
        waits = {"what": "intake of shop"}
        registry = controller.metrics.registry
        assert registry.get_sample_value("gitops_hook_waiting", waits) == 1
    now[0] += 60
    controller.intake()
    assert stored(controller) == []
    assert registry.get_sample_value("gitops_hook_waiting", waits) == 0


def test_what_is_live_of_an_app_is_recorded_although_that_of_another_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, now, wrote = a_controller(tmp_path, config=TWO_APPS), [0.0], list[str]()
    controller.clock.monotonic = lambda: now[0]

    def write(app: hook.App, *records: Any, **more: Any) -> None:
        if app.name == "shop":
            raise hook.KubectlError(["kubectl"], 1, "Error from server (Forbidden): no")
        wrote.append(app.name)

    monkeypatch.setattr(controller.state, "write", write)
    entry = {"run": "a-run", "outcome": "deployed", "live": True}
    for _ in range(10):
        now[0] += hook.LOOK_SECONDS + 0.1
        for app in controller.apps.values():
            run = hook.Run(id="", app=app.name, ref="", commit="")
            task = controller.task(app, "production", run)
            with controller.contain_errors(run):
                controller.reconcile_service(task, hook.Service(live_service(entry)))
    assert wrote == ["blog"]


def test_a_cluster_that_is_away_is_asked_twice_and_not_for_each_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apps = [f"app{n}" for n in range(10)]
    entries = "".join(
        f"  - {{name: {a}, repository: https://g.example.com/{a}.git, build: {{builder: none}}}}\n"
        for a in apps
    )
    controller, asked = a_controller(tmp_path, config=f"apps:\n{entries}"), []

    def lose(resource: str, name: str, namespace: str) -> None:
        asked.append(name)
        raise hook.KubectlError(["kubectl"], None, "")

    monkeypatch.setattr(controller.kubectl, "get", lose)
    controller.spool.store([a_push(a, OLD) for a in apps])
    with pytest.raises(hook.KubectlError):
        controller.intake()
    assert len(asked) == 2


def test_pushes_of_deploy_branches_get_their_jobs_before_a_heap_of_others(
    tmp_path: Path,
) -> None:
    controller = a_controller(tmp_path, config=TWO_APPS)
    synced(controller)
    controller.spool.max_files = 1000
    controller.spool.store([a_push("shop", f"{n:040x}", f"refs/heads/b{n}") for n in range(300)])
    controller.spool.store([a_push("blog", OLD)])
    assert controller.intake() == 0
    assert jobs_made(controller)[0] == f"test-{a_push('blog', OLD).id}"
    assert len(jobs_made(controller)) == 1 + hook.BATCH
    controller.intake()
    assert stored(controller) == []


def test_of_very_many_pushes_that_are_only_tested_some_wait_and_none_that_is_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = a_controller(tmp_path, config=TWO_APPS)
    synced(controller)
    controller.spool.max_files = 3000
    many = [a_push("shop", f"{n:040x}", f"refs/heads/b{n}") for n in range(1100)]
    controller.spool.store(many)
    create = controller.kubectl.create_each

    def create_and_tell(objects: Sequence[Object], namespace: str) -> Object:
        refused = create(objects, namespace)
        for made in objects:
            controller.jobs[0]._take("ADDED", made)
        return refused  # type: ignore[no-any-return]

    monkeypatch.setattr(controller.kubectl, "create_each", create_and_tell)
    while controller.intake() == 0:
        pass
    assert len(jobs_made(controller)) == hook.TEST_JOBS
    assert len(stored(controller)) == 100
    controller.spool.store([a_push("shop", OLD)])
    controller.intake()
    assert f"test-{a_push('shop', OLD).id}" in jobs_made(controller)


def test_room_is_kept_in_the_spool_for_pushes_that_are_deployed(tmp_path: Path) -> None:
    spool = hook.Spool(tmp_path / "spool", 20)
    spool.prepare()
    for number in range(18):
        spool.store([a_run(f"{number:040x}")], spare=2)
    with pytest.raises(hook.DeliveryError) as full:
        spool.store([a_run(OLD)], spare=2)
    assert full.value.code == "SpoolFull"
    spool.store([a_run(OLD)])


def test_the_ends_of_very_many_tests_hold_back_nothing_that_is_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, now, acted = a_controller(tmp_path), [0.0], list[str]()
    controller.clock.monotonic = lambda: now[0]

    def act(view: Any, action: hook.Action) -> None:
        acted.append(view.run.commit)
        now[0] += 0.3

    monkeypatch.setattr(controller, "execute", act)
    ended = [SimpleNamespace(run=a_run(f"{n:040x}", f"refs/heads/b{n}")) for n in range(100)]
    steps = [(view, ends(Outcome.SUPERSEDED)) for view in ended]
    steps.append((SimpleNamespace(run=a_run(NEW)), hook.Action(Do.UNSUSPEND, "test")))
    controller.execute_all(steps)
    assert acted[0] == NEW
    assert 1 < len(acted) < 20
    assert controller.wake.is_set()


@pytest.mark.parametrize("where", ["a Job", "a record", "a Job that was met"])
def test_a_push_whose_id_another_push_has_gets_a_longer_one(
    controller: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    synced(controller)
    push, app = a_run(NEW), controller.apps["shop"]
    taken = replace(a_run(OLD, "refs/heads/other"), id=push.id)
    state = hook.AppState({}, {}, {}, "", {})
    if where == "a Job":
        job = hook.test_job(controller.config, app, taken)
        job["metadata"] |= {"resourceVersion": "1", "uid": "u"}
        controller.jobs[0]._take("ADDED", job)
    elif where == "a record":
        state.runs[taken.id] = hook.RunRecord.of(taken)
    else:
        refusal = hook.KubectlError(
            ["kubectl"], 1, "Error from server (AlreadyExists): it is there"
        )
        made = hook.test_job(controller.config, app, taken)
        made["metadata"] |= {"resourceVersion": "1", "uid": "u"}
        assert not controller.handle_create_result(push, refusal, [hook.Job(made)])
    assert [*controller.identified(app, state, [push])] == [
        (push, hook.run_ids(*hook.run_key(push))[1])
    ]
    assert caplog.messages == ["two pushes have the same run id"]
    controller.spool.store([push])
    if where != "a record":
        controller.intake()
        assert jobs_made(controller) == [f"test-{hook.run_ids(*hook.run_key(push))[1]}"]
        assert stored(controller) == []


def test_a_push_that_has_a_run_of_version_0_1_keeps_its_id(controller: Any) -> None:
    synced(controller)
    push, app = a_run(NEW), controller.apps["shop"]
    old = replace(push, id=hook.run_ids(*hook.run_key(push))[-1])
    job = hook.test_job(controller.config, app, old)
    job["metadata"] |= {"resourceVersion": "1", "uid": "u"}
    controller.jobs[0]._take("ADDED", job)
    state = hook.AppState({}, {}, {}, "", {})
    assert [*controller.identified(app, state, [push])] == [(push, old.id)]


@pytest.mark.parametrize(
    ("delivery", "later", "runs"),
    [("first", 100, False), ("second", 100, True), ("first", 2000, True), ("catch-up", 100, True)],
    ids=["the same", "another", "the same after its time", "found by the catch-up"],
)
def test_a_delivery_that_is_replayed_after_a_restart_runs_nothing_again(
    tmp_path: Path, delivery: str, later: float, runs: bool
) -> None:
    controller = a_controller(tmp_path)
    now = time.time()
    sent = "catch-up" if delivery == "catch-up" else "first"
    run = replace(a_run(NEW), delivery=sent, received=now)
    controller.spool.store([run])
    controller.intake()
    controller.finish(run, {}, ends(Outcome.TESTED))
    del controller.kubectl.objects["job", f"test-{a_run(NEW).id}"]
    (tmp_path / "new").mkdir()
    new = a_controller(tmp_path / "new")
    new.kubectl.objects = controller.kubectl.objects
    new.spool.store([replace(a_run(NEW), delivery=delivery, received=now + later)])
    new.intake()
    assert stored(new) == []
    assert bool(jobs_made(new)) is runs


# What it waits for


def synced(controller: Any) -> None:
    """Let every mirror know all that is there."""
    for watch in controller.informers():
        watch.trouble = ""


def test_nothing_is_decided_while_a_mirror_of_jobs_or_pods_is_not_up_to_date(
    tmp_path: Path,
) -> None:
    controller = a_controller(tmp_path, Watched)
    controller.control()
    assert controller.ticks == 0
    synced(controller)
    controller.pods[1].trouble = "connection refused"
    controller.control()
    assert controller.ticks == 0
    controller.pods[1].trouble = ""
    controller.control()
    assert controller.ticks == 1


def test_an_environment_that_cannot_be_seen_is_left_alone(controller: Any) -> None:
    assert controller.busy("shop") == {"staging", "production"}
    synced(controller)
    controller.services["production"].trouble = "connection refused"
    assert controller.busy("shop") == {"production"}


def worker(controller: Any, body: Callable[[], None]) -> None:
    task = controller.task(controller.apps["shop"], "staging", a_run(OLD))
    controller.start_worker(task, body)


def test_an_environment_has_one_worker_at_a_time_and_is_free_after_it(controller: Any) -> None:
    synced(controller)
    go, started = threading.Event(), []

    def body() -> None:
        started.append(1)
        go.wait(10)

    worker(controller, body)
    worker(controller, body)
    assert controller.busy("shop") == {"staging"}
    go.set()
    eventually(lambda: not controller.busy("shop"))
    assert started == [1]
    worker(controller, body)
    eventually(lambda: started == [1, 1])


@pytest.mark.parametrize("wrong", [hook.HookError("lost"), RuntimeError("a bug")])
def test_a_worker_that_failed_leaves_its_environment_alone_for_a_second_and_no_longer(
    controller: Any, wrong: Exception
) -> None:
    synced(controller)

    def body() -> None:
        raise wrong

    worker(controller, body)
    eventually(controller.wake.is_set)
    began = time.monotonic()
    assert controller.busy("shop") == {"staging"}
    eventually(lambda: not controller.busy("shop"))
    assert 0.5 < time.monotonic() - began < 3


def test_a_step_that_fails_is_said_and_taken_again_after_a_pause(
    controller: Any, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[float] = []

    def step() -> float:
        taken.append(time.monotonic())
        if len(taken) == 1:
            raise hook.HookError("not yet")
        return 60.0

    event = threading.Event()
    controller.repeat("intake", "it waits", step, event)
    eventually(lambda: len(taken) == 2)
    assert taken[1] - taken[0] > 0.6
    assert [r.message for r in caplog.records] == ["it waits"]
    event.set()
    eventually(lambda: len(taken) == 3)
    assert controller.heartbeats.late() == []
    controller.shut_down(5)
    event.set()
    eventually(lambda: not any(t.is_alive() for t in controller.threads.values()))


# What others did to the live Service


def look_at(controller: Any, service: Object) -> None:
    """Let the mirror of production tell of the live Service, and the controller look."""
    controller.services["production"]._items = {"shop": hook.Service(service)}
    controller.reconcile_services([])


def rolled_back_lines(caplog: pytest.LogCaptureFixture) -> list[Object]:
    said = [r for r in caplog.records if r.message == "rolled back"]
    return [{"level": r.levelname, **getattr(r, "fields", {})} for r in said]


OLD_ENTRY: Object = {"run": "shop-old", "outcome": "deployed", "at": 1.0}
NEW_ENTRY: Object = {"run": "shop-new", "outcome": "deployed", "at": 2.0}
GONE: Object = {**NEW_ENTRY, "outcome": "rolled-back", "detail": "it is ugly"}
SICK: Object = {"run": "shop-sick", "outcome": "switched-back", "at": 3.0}


@pytest.mark.parametrize("newest", [[], [SICK]], ids=["newest", "below-a-sick-one"])
def test_a_rollback_from_elsewhere_is_said_and_counted_once(
    controller: Any, caplog: pytest.LogCaptureFixture, newest: list[Object]
) -> None:
    look_at(controller, live_service(*newest, {**NEW_ENTRY, "live": True}, OLD_ENTRY))
    for _ in range(2):
        look_at(controller, live_service(*newest, GONE, {**OLD_ENTRY, "live": True}))
    (line,) = rolled_back_lines(caplog)
    assert line == {
        "level": "WARNING",
        "run": "shop-new",
        "live": "shop-old",
        "app": "shop",
        "environment": "production",
        "detail": "it is ugly",
    }
    labels = {"app": "shop", "environment": "production", "direction": "rollback"}
    registry = controller.metrics.registry
    assert registry.get_sample_value("gitops_hook_switches_total", labels) == 1


@pytest.mark.parametrize("was", ["the target", "what was left, gone back to by hand"])
def test_neither_a_rollback_of_before_the_start_nor_the_next_version_is_a_rollback(
    controller: Any, caplog: pytest.LogCaptureFixture, was: str
) -> None:
    old = was == "the target"
    look_at(controller, live_service({**GONE, "live": not old}, {**OLD_ENTRY, "live": old}))
    again = {**OLD_ENTRY, "run": "shop-again", "outcome": "", "live": True}
    look_at(controller, live_service(again, GONE, OLD_ENTRY))
    assert rolled_back_lines(caplog) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_selector_that_no_history_knows_is_drift_also_at_first_sight(
    controller: Any, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    monkeypatch.setattr(
        controller.deployer.steady.live, "last_change", lambda task: {"manager": "someone"}
    )
    if known:
        look_at(controller, live_service(GONE, {**OLD_ENTRY, "live": True}))
    drifted = live_service(GONE, {**OLD_ENTRY, "live": True})
    drifted["spec"]["selector"] = {"app": "shop"}
    controller.kubectl.objects["service", "shop"] = drifted
    labels = {"app": "shop", "environment": "production"}
    registry = controller.metrics.registry
    seen = partial(registry.get_sample_value, "gitops_hook_selector_drift_total", labels)
    for _ in range(2):
        controller.cooldown = hook.Cooldown(controller.clock)  # as if some time had passed
        look_at(controller, drifted)
        eventually(lambda: seen() == 1)


def test_a_thread_that_waits_says_so_now_and_then_and_when_it_goes_on(
    controller: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gitops_hook")
    monkeypatch.setattr(hook, "DELAYS", (0.0,) * len(hook.DELAYS))
    monkeypatch.setattr(controller.stop, "wait", lambda seconds: False)
    taken, event = [0], threading.Event()

    def step() -> float:
        taken[0] += 1
        if taken[0] <= 32:
            raise hook.HookError(str(taken[0]))
        return 60.0

    controller.repeat("intake", "it waits", step, event)
    eventually(lambda: taken[0] == 33)
    event.set()
    eventually(lambda: taken[0] == 34)
    controller.shut_down(5)
    event.set()
    said = [(r.levelname, r.message, r.fields.get("detail")) for r in caplog.records]  # type: ignore[attr-defined]
    complaints = [("WARNING", "it waits", n) for n in ("1", "2", "3", "4", "5", "11", "21", "31")]
    assert said == [*complaints, ("INFO", "goes on again", None)]


def test_a_run_that_waits_for_git_shows_what_git_said_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = a_controller(tmp_path)
    job = hook.test_job(controller.config, controller.apps["shop"], a_run(NEW))
    controller.kubectl.create_each([job], "test")
    controller.jobs[0]._take("ADDED", job)
    notes: list[Object] = []

    def note(found: hook.Job, told: dict[str, str | None]) -> None:
        found.annotations.update({k: v for k, v in told.items() if v is not None})
        notes.append(told)

    def fail(url: str) -> None:
        asked.append(f"refused after {len(asked)} ms")
        raise hook.GitError(["git", "ls-remote", url], 128, f"{asked[-1]}, password=hunter2")

    asked: list[str] = []
    monkeypatch.setattr(hook, "DELAYS", (0.1,))
    monkeypatch.setattr(controller, "annotate", note)
    monkeypatch.setattr(controller.deployer.doors.git, "heads", fail)
    controller.reconcile()
    step = partial(controller.read_heads, controller.apps["shop"])
    controller.repeat("heads of shop", "catch-up waits", step, controller.asked["shop"])
    eventually(lambda: controller.reconcile() or len(asked) > 3)
    controller.shut_down(5)
    assert {told[hook.ANNOTATION_REASON] for told in notes} == {"GitError"}
    bare, full = (told[hook.ANNOTATION_DETAIL] for told in notes)
    assert bare == "for the head of the branch"
    assert full.startswith("for the head of the branch; git ls-remote https://git.example.com/")
    assert re.search(r"refused after \d ms", full)
    assert "hunter2" not in full


# Whose pods those are


class Seen(hook.Controller):
    """A controller that only looks at its runs."""

    looked: hook.Observation

    def execute(self, view: hook.Observation, action: hook.Action) -> None:
        self.looked = view


@pytest.mark.parametrize(("uid", "own"), [("this", True), ("before", False)])
def test_a_pod_left_by_a_deleted_job_of_the_same_name_does_not_count(
    tmp_path: Path, uid: str, own: bool
) -> None:
    controller = a_controller(tmp_path, Seen)
    job = hook.test_job(controller.config, controller.apps["shop"], a_run(OLD))
    job["metadata"] |= {"resourceVersion": "1", "uid": "this"}
    job["spec"]["suspend"], job["status"] = False, {"startTime": "2020-01-01T00:00:00Z"}
    labels = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    labels |= {"batch.kubernetes.io/controller-uid": uid, hook.LABEL_RUN: a_run(OLD).id}
    state = {"waiting": {"reason": "InvalidImageName"}}
    pod = {
        "metadata": {"name": "pod", "resourceVersion": "1", "labels": labels},
        "spec": {},
        "status": {"containerStatuses": [{"name": "test-runner", "state": state}]},
    }
    logs: list[str] = []
    controller.kubectl.objects["job", job["metadata"]["name"]] = job
    controller.deployer.steady.rollout.logs.keep = lambda _app, _run, pods, _: logs.extend(
        p.name for p in pods
    )
    controller.jobs[0]._take("ADDED", job)
    controller.pods[0]._take("ADDED", pod)
    controller.reconcile()
    view = controller.looked
    assert [p.name for p in view.pods] == ["pod"] * own
    assert bool(view.fatal_problem) is own
    asked = [f for f in controller.kubectl.filters if "involvedObject" in f]
    assert asked == ["involvedObject.uid=this,reason=FailedCreate"] * (not own)
    controller.finish(view.run, view.jobs, hook.ends(Outcome.FAILED, Reason.VANISHED, "", "test"))
    eventually(lambda: logs == ["pod"] * own)


def test_a_run_that_ended_during_a_look_is_not_begun_again_by_that_look(controller: Any) -> None:
    run = a_run(OLD)
    found = hook.test_job(controller.config, controller.apps["shop"], run)
    found["metadata"] |= {"resourceVersion": "1", "uid": "this"}
    found["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    controller.jobs[0]._take("ADDED", found)
    controller.trackers[run.id] = hook.ProblemTracker()
    at_the_beginning = {"test": hook.Job(found)}
    ended = {"gitops-hook/outcome": "superseded", "gitops-hook/ended-at": str(time.time())}
    meta = {**found["metadata"], "resourceVersion": "2"}
    meta["annotations"] = {**meta["annotations"], **ended}
    controller.jobs[0].learn({**found, "metadata": meta})
    view = controller.observe(at_the_beginning, [], newer=False)
    assert hook.decide(view).do is Do.NOTHING
