"""From a push to a run: what is created, what is left out, and how begin and end are recorded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gitops_hook as hook
from gitops_hook import Outcome, Reason
from tests.idle_controller import (
    MAIN,
    NEW,
    OLD,
    TWO_APPS,
    a_job,
    a_manifest,
    a_run,
    add_job,
    an_empty_record,
    ends,
    idle_controller,
    job_names,
    last_record,
    live_service,
    record,
    recorded,
    refused,
    rejected,
    sample,
    shop,
    stored,
    synced,
)  # fmt: skip
from tests.world import Object


@pytest.fixture
def controller(tmp_path: Path) -> Any:
    return idle_controller(tmp_path)


def catch_up(controller: Any, heads: dict[str, str]) -> None:
    """Let the heads be read, and compared with what was last recorded."""
    controller.context.doors.git.heads = lambda url: heads
    controller.catch_up._due["shop"] = 0.0
    controller.catch_up.read_heads(shop(controller))


def store(controller: Any, *runs: hook.Run) -> None:
    controller.context.spool.store(runs)


# From the spool into the cluster


def test_what_one_app_has_recorded_neither_stops_nor_delays_another_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    synced(controller)
    controller.context.kubectl.objects["configmap", "gitops-hook-shop"] = an_empty_record()
    patch = controller.context.kubectl.patch

    def refuse(resource: str, name: str, namespace: str, change: Object) -> Object:
        if name == "gitops-hook-shop":
            raise refused('The ConfigMap "x" is invalid: Too long')
        return patch(resource, name, namespace, change)  # type: ignore[no-any-return]

    with monkeypatch.context() as patched:
        patched.setattr(controller.context.kubectl, "patch", refuse)
        store(controller, a_run(OLD), a_run(OLD, app="blog"))
        pause = controller.intake.admit_all()
        assert stored(controller) == [OLD]
        assert f"test-{a_run(OLD, app='blog').id}" in job_names(controller)
        assert 0 < pause < 10
        store(controller, a_run(NEW, app="blog"))
        controller.intake.admit_all()
        assert f"test-{a_run(NEW, app='blog').id}" in job_names(controller)
        waiting = {"what": "intake of shop"}
        assert sample(controller, "waiting", waiting) == 1
    controller.clock.time += 60
    controller.intake.admit_all()
    assert stored(controller) == []
    assert sample(controller, "waiting", waiting) == 0


def test_no_job_shows_a_secret_of_a_commits_title_or_of_who_pushed_it(
    controller: Any, tmp_path: Path
) -> None:
    (tmp_path / "webhook-tokens").write_text("correct horse\n")
    token = "glpat-0123456789abcdef"
    push = a_run(
        NEW, f"refs/heads/{token}", title=f"use {token}, not correct horse", by=f"bot:{token}"
    )
    synced(controller)
    controller.intake.admit(push.app, [push])
    (job,) = [o for o in controller.context.kubectl.objects.values() if o.get("kind") == "Job"]
    notes = job["metadata"]["annotations"]
    assert (notes["gitops-hook/title"], notes["gitops-hook/by"]) == ("use ***, not ***", "bot:***")
    again = hook.run_of_job(job)  # as a daemon reads it that was started anew
    assert (again.title, again.by) == ("use ***, not ***", "bot:***")
    assert (again.ref, again.commit, again.id) == (push.ref, NEW, push.id)


def test_a_disk_from_which_nothing_can_be_removed_holds_up_no_other_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    synced(controller)

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(controller.context.spool, "done", refuse)
    store(controller, a_run(OLD), a_run(OLD, app="blog"))
    controller.intake.admit_all()
    jobs = {f"test-{a_run(OLD, app=app).id}" for app in ("shop", "blog")}
    assert jobs <= {*job_names(controller)}


def test_a_new_push_of_an_app_that_waits_is_tried_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    synced(controller)
    tries: list[list[str]] = []

    def refuse(app: str, pushes: Sequence[hook.Run]) -> set[hook.Run]:
        if app == "shop":
            tries.append([run.commit for run in pushes])
            raise refused("Error from server (Forbidden): no")
        return {*pushes}

    monkeypatch.setattr(controller.intake, "admit", refuse)
    store(controller, a_run(OLD), a_run(OLD, app="blog"))
    controller.intake.admit_all()
    store(controller, a_run(NEW, app="blog"))
    controller.intake.admit_all()
    assert tries == [[OLD]]
    store(controller, a_run(NEW), a_run("c" * 40, app="blog"))
    controller.intake.admit_all()
    assert tries == [[OLD], [OLD, NEW]]


def test_a_cluster_that_is_away_is_asked_twice_and_not_for_each_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apps = [f"app{number}" for number in range(10)]
    entries = "".join(
        f"  - {{name: {a}, repository: https://g.example.com/{a}.git, build: {{builder: none}}}}\n"
        for a in apps
    )
    controller = idle_controller(tmp_path, f"apps:\n{entries}")
    questions: list[str] = []

    def lose(resource: str, name: str, namespace: str) -> None:
        questions.append(name)
        raise refused("", None)

    monkeypatch.setattr(controller.context.kubectl, "get", lose)
    store(controller, *(a_run(OLD, app=app) for app in apps))
    with pytest.raises(hook.KubectlError):
        controller.intake.admit_all()
    assert len(questions) == 2


def test_pushes_of_deploy_branches_get_their_jobs_before_a_heap_of_others(tmp_path: Path) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    synced(controller)
    controller.context.spool.max_files = 1000
    store(controller, *(a_run(f"{number:040x}", f"refs/heads/b{number}") for number in range(300)))
    store(controller, a_run(OLD, app="blog"))
    assert controller.intake.admit_all() == 0
    assert job_names(controller)[0] == f"test-{a_run(OLD, app='blog').id}"
    assert len(job_names(controller)) == 1 + hook.BATCH
    controller.intake.admit_all()
    assert stored(controller) == []


def test_of_very_many_pushes_that_are_only_tested_some_wait_and_none_that_is_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    synced(controller)
    controller.context.spool.max_files = 3000
    store(controller, *(a_run(f"{number:040x}", f"refs/heads/b{number}") for number in range(1100)))
    create = controller.context.kubectl.create_each

    def create_and_inform(objects: Sequence[Object], namespace: str) -> Object:
        refusals = create(objects, namespace)
        for manifest in objects:
            controller.informers.jobs[0]._take("ADDED", manifest)
        return refusals  # type: ignore[no-any-return]

    monkeypatch.setattr(controller.context.kubectl, "create_each", create_and_inform)
    while controller.intake.admit_all() == 0:
        pass
    assert len(job_names(controller)) == hook.TEST_JOBS
    assert len(stored(controller)) == 100
    store(controller, a_run(OLD))
    controller.intake.admit_all()
    assert f"test-{a_run(OLD).id}" in job_names(controller)
    pauses: list[float] = []
    controller.clock.thread_time = iter([1.0, 1.02]).__next__
    monkeypatch.setattr(controller.context.stop, "wait", pauses.append)
    controller.intake.admit_all()
    assert pauses[-1] == pytest.approx(0.18), (
        "reading what cannot be admitted takes a tenth of a core"
    )


def test_room_is_kept_in_the_spool_for_pushes_that_are_deployed(tmp_path: Path) -> None:
    spool = hook.Spool(tmp_path / "spool", 20)
    spool.prepare()
    for number in range(9):
        for app in ("shop", "blog"):
            spool.store([a_run(f"{number:040x}", app=app)], only_tested=True)
    with pytest.raises(hook.DeliveryError) as full:
        spool.store([a_run(OLD, app="api")], only_tested=True)
    assert full.value.code == "SpoolFull"
    spool.store([a_run(OLD)])


# What becomes of a Job that is to be created


def test_a_push_whose_run_is_under_way_needs_nothing_more(controller: Any) -> None:
    refusal = refused("Error from server (AlreadyExists): it is there")
    existing = [a_job(controller, "test", "active")]
    assert controller.intake.handle_create_result(a_run(OLD), refusal, existing)
    assert recorded(controller) == {}


@pytest.mark.parametrize(
    ("message", "done", "outcome"),
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
    controller: Any, message: str, *, done: bool, outcome: str | None
) -> None:
    refusal = refused(message) if message else None
    assert controller.intake.handle_create_result(a_run(NEW), refusal, []) is done
    assert recorded(controller) == ({MAIN: (NEW, outcome)} if outcome else {})


def test_a_run_that_ends_while_its_job_is_being_created_stays_ended(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_each = controller.context.kubectl.create_each

    def create(objects: Sequence[Object], namespace: str) -> dict[str, hook.KubectlError]:
        if objects[0]["kind"] == "Job":
            controller.context.recorder.finish(a_run(OLD), {}, ends(Outcome.SUPERSEDED))
        return create_each(objects, namespace)  # type: ignore[no-any-return]

    monkeypatch.setattr(controller.context.kubectl, "create_each", create)
    store(controller, a_run(OLD))
    controller.intake.admit_all()
    assert recorded(controller) == {MAIN: (OLD, "superseded")}


def test_a_run_that_goes_again_says_that_its_old_job_is_deleted_first(
    controller: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gitops_hook")
    kubectl = controller.context.kubectl
    create_each = kubectl.create_each
    name = f"test-{a_run(NEW).id}"
    old = a_manifest(controller, a_run(NEW))
    marks = {hook.ANNOTATION_OUTCOME: "failed", hook.ANNOTATION_ENDED: "1.0"}
    old["metadata"]["annotations"] |= marks

    def create(objects: Sequence[Object], namespace: str) -> dict[str, hook.KubectlError]:
        if objects[0]["kind"] != "Job" or ("job", name) not in kubectl.objects:
            return create_each(objects, namespace)  # type: ignore[no-any-return]
        text = f'Error from server (AlreadyExists): jobs.batch "{name}" already exists'
        return {name: refused(text)}

    def delete(resource: str, names: list[str], namespace: str) -> None:
        kubectl.objects[resource, names[0]]["metadata"]["deletionTimestamp"] = "now"

    monkeypatch.setattr(kubectl, "create_each", create)
    monkeypatch.setattr(kubectl, "delete", delete)
    kubectl.objects["job", name] = old
    store(controller, a_run(NEW, received=2.0))
    for _ in range(2):
        controller.intake.admit_all()
        assert stored(controller) == [NEW]
        controller.clock.time += 60
    del kubectl.objects["job", name]
    controller.intake.admit_all()
    assert [(line.levelname, line.message) for line in caplog.records] == [
        ("INFO", "an old Job is being deleted"),
        ("INFO", "an old Job is being deleted"),
        ("INFO", "run queued"),
    ]
    assert stored(controller) == []


REPORTS = {"red": "1 passed, 1 failed: t.x", "lost": f"{hook.LOST_REPORT}: its pod is gone"}


@pytest.mark.parametrize(
    ("jobs", "done", "deleted", "reopened"),
    [
        ([], False, [], []),
        ([("test", "active")], True, [], []),
        ([("test", "failed", 20.0)], False, ["test"], []),
        ([("test", "failed", 40.0)], True, [], []),
        ([("test", "succeeded", 20.0), ("build", "failed", 40.0)], True, [], []),
        ([("test", "succeeded"), ("build", "failed", 20.0)], True, ["build"], ["test"]),
        ([("test", "failed"), ("build", "succeeded", 20.0)], False, ["test", "build"], []),
        ([("test", "succeeded"), ("build", "succeeded", 20.0)], True, [], ["build", "test"]),
        ([("red", "succeeded", 20.0)], False, ["test"], []),
        ([("lost", "succeeded", 20.0)], False, ["test"], []),
        ([("red", "succeeded"), ("build", "failed", 20.0)], False, ["test", "build"], []),
    ],
    ids=[
        "gone", "under way", "red tests", "ended since the push", "its build ended since",
        "a red build", "tests made anew", "a deployment that failed",
        "a red report", "a report that is lost", "a red report and a build of before",
    ],
)  # fmt: skip
def test_a_run_that_is_pushed_again_goes_on_where_it_failed(
    controller: Any, jobs: Any, *, done: bool, deleted: list[str], reopened: list[str]
) -> None:
    deletions: list[str] = []
    patches: list[str] = []

    def delete(resource: str, names: Sequence[str], namespace: str) -> None:
        deletions.extend(name.partition("-")[0] for name in names)

    def patch(resource: str, name: str, namespace: str, change: Object) -> None:
        patches.append(name.partition("-")[0])
        assert change["metadata"]["annotations"] == {
            hook.ANNOTATION_OUTCOME: None,
            hook.ANNOTATION_ENDED: None,
            hook.ANNOTATION_REASON: None,
            hook.ANNOTATION_DETAIL: None,
            hook.ANNOTATION_RECEIVED: "30.000",
            hook.ANNOTATION_DELIVERY: "again",
            hook.ANNOTATION_BY: "lena",
        }
        assert change["spec"] == {"ttlSecondsAfterFinished": None}

    def a_job_with_report(kind: str, *state: Any) -> hook.Job:
        """A Job, also a test that ended with exit code 0 whose report is not green."""
        job = a_job(controller, "test" if kind in REPORTS else kind, *state)
        job.annotations |= {hook.ANNOTATION_SUMMARY: REPORTS[kind]} if kind in REPORTS else {}
        return job

    kubectl: Any = SimpleNamespace(delete=delete, patch=patch)
    run = a_run(OLD, received=30.0, delivery="again", by="lena")
    assert hook.reopen(kubectl, run, [a_job_with_report(*each) for each in jobs]) is done
    assert (deletions, patches) == (deleted, reopened)


def test_a_job_that_is_being_deleted_delays_no_push_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    synced(controller)
    kubectl = controller.context.kubectl
    create_each = kubectl.create_each
    old = a_manifest(controller, a_run(OLD), deletionTimestamp="now")
    name = old["metadata"]["name"]

    def create(objects: Sequence[Object], namespace: str) -> dict[str, hook.KubectlError]:
        others = [o for o in objects if o["metadata"]["name"] != name]
        create_each(others, namespace)
        text = f'Error from server (AlreadyExists): jobs.batch "{name}" already exists'
        return {} if len(others) == len(objects) else {name: refused(text)}

    def listed(resource: str, namespace: str, *filters: str) -> list[Object]:
        return [old] * (old["metadata"]["namespace"] == namespace)

    monkeypatch.setattr(kubectl, "create_each", create)
    monkeypatch.setattr(kubectl, "list", listed)
    kubectl.objects["job", name] = old
    other = a_run(OLD, app="blog")
    store(controller, a_run(OLD, received=2.0), a_run(NEW, received=3.0), other)
    controller.intake.admit_all()
    assert {f"test-{a_run(NEW).id}", f"test-{other.id}"} <= {*job_names(controller)}
    assert stored(controller) == [OLD]
    store(controller, a_run("c" * 40, received=4.0))
    controller.intake.admit_all()  # at once, though the one before is put off
    assert stored(controller) == [OLD]
    assert f"test-{a_run('c' * 40).id}" in job_names(controller)


def test_a_job_that_is_being_deleted_is_waited_for(controller: Any) -> None:
    leaving = a_job(controller, "build", "failed", 20.0, deletionTimestamp="")
    jobs = [a_job(controller, "test", "succeeded"), leaving]
    kubectl: Any = SimpleNamespace()
    assert not hook.reopen(kubectl, a_run(OLD, received=30.0), jobs)


# Which run a push is


@pytest.mark.parametrize("where", ["a Job", "a record", "a Job that was met"])
def test_a_push_whose_id_another_push_has_gets_a_longer_one(
    controller: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    synced(controller)
    push = a_run(NEW)
    other = replace(a_run(OLD, "refs/heads/other"), id=push.id)
    state = hook.AppState()
    if where == "a Job":
        controller.informers.jobs[0]._take("ADDED", a_manifest(controller, other))
    elif where == "a record":
        state.runs[other.id] = hook.RunRecord.of(other)
    else:
        refusal = refused("Error from server (AlreadyExists): it is there")
        existing = [hook.Job(a_manifest(controller, other))]
        assert not controller.intake.handle_create_result(push, refusal, existing)
    longer = hook.run_ids(*hook.run_key(push))[1]
    assert controller.intake.ids_of(shop(controller), state, [push]) == {push: longer}
    assert caplog.messages == ["two pushes have the same run id"]
    store(controller, push)
    if where != "a record":
        controller.intake.admit_all()
        assert job_names(controller) == [f"test-{longer}"]
        assert stored(controller) == []


def test_a_push_that_has_a_run_of_version_0_1_keeps_its_id(controller: Any) -> None:
    synced(controller)
    push = a_run(NEW)
    old = replace(push, id=hook.run_ids(*hook.run_key(push))[-1])
    controller.informers.jobs[0]._take("ADDED", a_manifest(controller, old))
    state = hook.AppState()
    assert controller.intake.ids_of(shop(controller), state, [push]) == {push: old.id}


@pytest.mark.parametrize(
    ("delivery", "later", "runs"),
    [
        ("first", 100, False),
        ("second", 100, True),
        ("first", 2000, True),
        (hook.CATCH_UP, 100, True),
    ],
    ids=["the same", "another", "the same after its time", "found by the catch-up"],
)
def test_a_delivery_that_is_replayed_after_a_restart_runs_nothing_again(
    tmp_path: Path, delivery: str, later: float, *, runs: bool
) -> None:
    controller = idle_controller(tmp_path)
    now = time.time()
    sent = hook.CATCH_UP if delivery == hook.CATCH_UP else "first"
    run = a_run(NEW, delivery=sent, received=now)
    store(controller, run)
    controller.intake.admit_all()
    controller.context.recorder.finish(run, {}, ends(Outcome.TESTED))
    del controller.context.kubectl.objects["job", f"test-{run.id}"]
    new = another_daemon(controller, tmp_path)
    store(new, a_run(NEW, delivery=delivery, received=now + later))
    new.intake.admit_all()
    assert stored(new) == []
    assert bool(job_names(new)) is runs


def another_daemon(controller: Any, directory: Path) -> Any:
    """A new daemon in the same cluster, after a pod whose spool is gone with it."""
    (directory / "new").mkdir()
    new = idle_controller(directory / "new")
    new.context.kubectl.objects = controller.context.kubectl.objects
    return new


# What is not to be deployed again


@pytest.mark.parametrize(
    ("outcome", "asks"),
    [("rolled-back", False), ("switched-back", False), ("deployed", True), ("", True)],
)
def test_a_commit_that_traffic_was_taken_from_stays_rejected_after_a_reinstallation(
    controller: Any, outcome: str, *, asks: bool
) -> None:
    left = {"run": "shop-new", "commit": NEW, "outcome": outcome}
    live = {"run": "shop-old", "commit": OLD, "outcome": "deployed", "live": True}
    controller.context.kubectl.objects["service", "shop"] = live_service(left, live)
    assert (recorded(controller), rejected(controller)) == ({}, [])
    catch_up(controller, {MAIN: NEW})
    assert stored(controller) == [NEW] * asks
    assert rejected(controller) == [NEW] * (not asks)
    store(controller, a_run(NEW))
    controller.intake.admit_all()
    assert (f"test-{a_run(NEW).id}" in job_names(controller)) is asks


@pytest.mark.parametrize("live", [True, False])
def test_of_a_commit_that_was_deployed_again_after_a_rollback_the_last_time_counts(
    controller: Any, *, live: bool
) -> None:
    again = {"run": "shop-new", "commit": NEW, "outcome": "deployed", "live": live}
    other = {"run": "shop-old", "commit": OLD, "outcome": "deployed", "live": not live}
    before = {"run": "shop-new", "commit": NEW, "outcome": "rolled-back", "selector": {"x": "y"}}
    controller.context.kubectl.objects["service", "shop"] = live_service(again, other, before)
    state = controller.context.state.read(shop(controller))
    needless = controller.intake.needless_commits(shop(controller), state)
    assert needless == {NEW if live else OLD: "AlreadyLive"}


# Heads that nobody announced, and heads that are older than the push


def test_a_head_from_before_the_last_push_is_no_news_for_as_long_as_git_may_lag(
    controller: Any,
) -> None:
    now = 1e9
    controller.clock.now = lambda: now
    record(controller, a_run(NEW, before=OLD, received=now), Outcome.TESTED)
    now += hook.HEAD_GRACE - 1
    catch_up(controller, {MAIN: OLD})
    assert (stored(controller), recorded(controller)) == ([], {MAIN: (NEW, "tested")})
    now += 2
    catch_up(controller, {MAIN: OLD})
    assert stored(controller) == [OLD]


def test_a_new_branch_that_git_does_not_show_yet_is_not_forgotten(controller: Any) -> None:
    now = 1e9
    controller.clock.now = lambda: now
    record(controller, a_run(NEW, "refs/heads/side", before="0" * 40, received=now))
    catch_up(controller, {MAIN: OLD})
    assert recorded(controller)["refs/heads/side"] == (NEW, None)


@pytest.mark.parametrize("spooled", [True, False])
def test_a_push_that_comes_while_git_is_asked_is_not_undone(
    controller: Any, *, spooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(controller, a_run("c" * 40), Outcome.TESTED)

    def heads(url: str) -> dict[str, str]:
        # two pushes: the commit before the last one is not the one that git showed
        store(controller, a_run(NEW, before="d" * 40, received=time.time()))
        if not spooled:
            controller.intake.admit_all()
        return {MAIN: OLD}

    monkeypatch.setattr(controller.context.doors.git, "heads", heads)
    controller.catch_up.read_heads(shop(controller))
    controller.intake.admit_all()
    assert stored(controller) == []
    assert recorded(controller) == {MAIN: (NEW, None)}


# Runs of which something is missing


def test_a_run_under_way_of_which_nothing_is_left_vanished(controller: Any) -> None:
    record(controller, a_run(OLD))
    catch_up(controller, {MAIN: OLD})
    last = last_record(controller)
    assert (last.outcome, last.reason) == ("failed", "Vanished")
    assert stored(controller) == []
    labels = {"app": "shop", "outcome": "failed", "stage": "test", "reason": "Vanished"}
    assert sample(controller, "runs_total", labels) == 1
    catch_up(controller, {MAIN: OLD})
    assert sample(controller, "runs_total", labels) == 1


@pytest.mark.parametrize("left", ["an outcome", "a Job", "a stored push"])
def test_a_run_of_which_something_is_left_did_not_vanish(controller: Any, left: str) -> None:
    outcome = str(Outcome.TESTED) if left == "an outcome" else ""
    record(controller, a_run(OLD), outcome)
    if left == "a Job":
        add_job(controller, a_run(OLD))
    if left == "a stored push":
        store(controller, a_run(OLD))
    catch_up(controller, {MAIN: OLD})
    assert recorded(controller) == {MAIN: (OLD, outcome or None)}


def test_a_run_that_never_had_a_job_begins_again_when_its_stored_push_is_lost(
    controller: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(objects: Sequence[Object], namespace: str) -> None:
        raise refused("Error from server (Forbidden): exceeded quota")

    store(controller, a_run(OLD))
    with monkeypatch.context() as patched:
        patched.setattr(controller.context.kubectl, "create_each", refuse)
        controller.intake.admit_all()
    new = another_daemon(controller, tmp_path)
    catch_up(new, {MAIN: OLD})
    assert [push.run.id for push in new.context.spool.read()] == [a_run(OLD).id]
    new.intake.admit_all()
    assert f"test-{a_run(OLD).id}" in job_names(new)
    assert recorded(new) == {MAIN: (OLD, None)}
    assert stored(new) == []


def test_a_run_whose_job_was_deleted_while_nobody_looked_vanished(
    controller: Any, tmp_path: Path
) -> None:
    store(controller, a_run(OLD))
    controller.intake.admit_all()
    del controller.context.kubectl.objects["job", f"test-{a_run(OLD).id}"]
    new = another_daemon(controller, tmp_path)
    catch_up(new, {MAIN: OLD})
    assert recorded(new) == {MAIN: (OLD, "failed")}
    assert stored(new) == []


# How runs end


def test_a_newer_push_stays_the_last_seen_when_the_older_run_ends_after_it(controller: Any) -> None:
    old = a_run(OLD, received=1.0)
    new = a_run(NEW, received=2.0)
    record(controller, old)
    record(controller, new)
    controller.context.recorder.finish(new, {}, ends(Outcome.TESTED))
    controller.context.recorder.finish(old, {}, ends(Outcome.TESTED))
    assert recorded(controller) == {MAIN: (NEW, "tested")}


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
    controller.context.recorder.finish(a_run(NEW), {}, hook.ends(Outcome.FAILED, reason, "", stage))
    assert rejected(controller) == [NEW] * rejects


# What is followed


def test_the_services_of_environments_that_no_app_uses_are_not_followed(tmp_path: Path) -> None:
    spaces = "namespaces: {test: t, build: b, staging: s, production: p, unused: u}"
    controller = idle_controller(tmp_path, TWO_APPS + spaces)
    informers = controller.informers.services
    assert {name: informer.namespace for name, informer in informers.items()} == {
        "staging": "s",
        "production": "p",
    }


def test_a_service_of_an_app_that_is_not_deployed_there_is_not_followed(tmp_path: Path) -> None:
    only_staging = "deploy: {environments: [staging]}, build: {builder: none}}"
    settings = TWO_APPS.rstrip().removesuffix("build: {builder: none}}") + only_staging
    informers = idle_controller(tmp_path, settings).informers.services
    manifest = live_service({"run": "blog-1", "live": True})
    manifest["metadata"]["name"] = "blog"
    for informer in informers.values():
        informer._take("ADDED", manifest)
    assert [name for name, informer in informers.items() if informer.items()] == ["staging"]


def test_a_job_of_ours_that_is_of_no_stage_is_no_part_of_its_run(controller: Any) -> None:
    run = a_run(NEW)
    add_job(controller, run)
    context = controller.context
    stray = a_manifest(controller, run, name="stray")
    stray["metadata"]["labels"][hook.LABEL_STAGE] = "release"
    context.kubectl.objects["job", "stray"] = stray
    (jobs,) = hook.jobs_of(context.kubectl, context.config, [run.id]).values()
    assert [job.stage for job in jobs] == ["test"]


# Circumstances and verdicts

TRIED_AGAIN = sorted(hook.PASSING_CIRCUMSTANCES)


def fail(controller: Any, run: hook.Run, reason: Reason, stage: str = "test", **more: Any) -> None:
    """Let a run that has its Job end for a reason."""
    jobs = controller.informers.jobs_by_run().get(run.id, {})
    end = hook.ends(Outcome.FAILED, reason, "why it ended", stage)
    controller.context.recorder.finish(run, jobs, end, **more)


def wait_for_try(controller: Any) -> None:
    """Let time go on until the next try is due, and the heads be read then."""
    then = last_record(controller).next_try + 0.1
    controller.clock.now = lambda: then
    controller.context.doors.git.heads = lambda url: {MAIN: NEW}
    controller.catch_up.read_heads(shop(controller))


@pytest.mark.parametrize("stage", ["test", "staging"])
@pytest.mark.parametrize("reason", TRIED_AGAIN)
def test_a_head_that_ended_by_a_circumstance_is_tried_again_by_itself(
    controller: Any, reason: Reason, stage: str
) -> None:
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), reason, stage)
    last = last_record(controller)
    assert (last.outcome, last.reason, last.tries) == ("failed", reason, 1)
    assert last.next_try - last.ended == pytest.approx(60, abs=0.01)
    assert rejected(controller) == []
    wait_for_try(controller)
    assert stored(controller) == [NEW]
    controller.intake.admit_all()
    assert job_names(controller) == [f"test-{a_run(NEW).id}"]
    last = last_record(controller)
    assert (last.outcome, last.tries, last.next_try) == ("", 1, 0.0)


@pytest.mark.parametrize("reason", sorted(hook.FINAL_CIRCUMSTANCES))
def test_what_someone_took_over_or_traffic_has_reached_is_not_tried_again_by_itself(
    controller: Any, reason: Reason
) -> None:
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), reason, "production")
    assert (last_or_none(controller), rejected(controller)) == (0.0, [])


def last_or_none(controller: Any) -> float:
    """When the push of the deploy branch is tried again, 0 for never."""
    record = controller.context.state.read(shop(controller)).find(MAIN, NEW)
    return float(record.next_try)


@pytest.mark.parametrize("reason", sorted(set(hook.VERDICTS) - {Reason.OK}))
def test_a_head_that_ended_by_a_verdict_is_not_tried_again(controller: Any, reason: Reason) -> None:
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), reason, "staging")
    assert last_record(controller).next_try == 0
    assert rejected(controller) == [NEW] * (reason is not Reason.REJECTED)
    year = time.time() + 365 * 86400
    controller.clock.now = lambda: year
    catch_up(controller, {MAIN: NEW})
    assert stored(controller) == []


def test_tries_come_after_1_5_15_and_60_minutes_and_end_after_a_day(controller: Any) -> None:
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), Reason.QUOTA_EXCEEDED, "production")
    begin = last_record(controller).ended
    minutes = []
    while last_record(controller).next_try:
        wait_for_try(controller)
        last = last_record(controller)
        minutes.append(round((controller.clock.now() - last.tried_since) / 60))
        controller.intake.admit_all()
        run = replace(a_run(NEW), received=controller.clock.now(), delivery=hook.NEXT_TRY)
        fail(controller, run, Reason.QUOTA_EXCEEDED, "production")
    assert minutes[:6] == [1, 6, 21, 81, 141, 201]
    assert minutes[-2] < 24 * 60 <= minutes[-1]
    last = last_record(controller)
    assert (last.outcome, last.reason, last.tried_since) == ("failed", "GaveUp", begin)
    assert last.detail == "QuotaExceeded: why it ended"
    catch_up(controller, {MAIN: NEW})
    assert stored(controller) == []


@pytest.mark.parametrize("delivery", [hook.RERUN, "7f0c"])
def test_a_person_who_pushes_or_reruns_a_commit_gives_it_all_its_tries(
    controller: Any, delivery: str
) -> None:
    synced(controller)
    now = time.time()
    for number in range(3):
        again = a_run(NEW, received=now + number, delivery=hook.NEXT_TRY if number else "first")
        controller.context.recorder.record_started(shop(controller), [again])
        controller.clock.now = lambda number=number: now + number + 0.5
        fail(controller, again, Reason.VANISHED)
    assert last_record(controller).tries == 3
    run = a_run(NEW, received=now + 9, delivery=delivery)
    controller.context.recorder.record_started(shop(controller), [run])
    assert (last_record(controller).tries, last_record(controller).next_try) == (0, 0.0)


def test_nothing_that_traffic_has_reached_is_tried_again_by_itself(controller: Any) -> None:
    synced(controller)
    run = a_run(NEW, received=time.time())
    fail(controller, run, Reason.BOTH_UNHEALTHY, "production", switched=True)
    last = last_record(controller)
    assert (last.reason, last.next_try) == ("BothUnhealthy", 0.0)


def test_the_end_of_a_try_that_a_killed_process_has_recorded_is_not_counted_twice(
    controller: Any,
) -> None:
    synced(controller)
    run = a_run(NEW, received=time.time())
    for _ in range(2):
        fail(controller, run, Reason.UNSCHEDULABLE, "staging")
    assert last_record(controller).tries == 1


@pytest.mark.parametrize("heads", [{MAIN: OLD}, {}], ids=["another head", "the branch is gone"])
def test_what_is_no_longer_the_head_is_superseded_and_not_tried(
    controller: Any, heads: dict[str, str]
) -> None:
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), Reason.CLONE_FAILED)
    then = last_record(controller).next_try + 1
    controller.clock.now = lambda: then
    controller.context.doors.git.heads = lambda url: heads
    controller.catch_up._due["shop"] = controller.clock.monotonic() + 60
    controller.catch_up.read_heads(shop(controller))
    assert stored(controller) == []
    record = controller.context.state.read(shop(controller)).find(MAIN, NEW)
    assert (record.outcome, record.reason, record.next_try) == ("superseded", "NotHead", 0.0)
    catch_up(controller, {MAIN: NEW})  # it is the head again
    assert stored(controller) == [NEW]


def test_a_test_branch_is_tried_again_too(controller: Any) -> None:
    synced(controller)
    ref = f"refs/heads/{'ö' * 300}name"
    run = a_run(NEW, ref, received=time.time())
    fail(controller, run, Reason.CLONE_FAILED)
    controller.context.doors.git.heads = lambda url: {ref: NEW, MAIN: OLD}
    record = controller.context.state.read(shop(controller)).find(ref, NEW)
    controller.clock.now = lambda: record.next_try + 0.1
    heads = hook.ReadHeads(
        asked=record.next_try, answered=controller.clock.monotonic(), commits={ref: NEW, MAIN: OLD}
    )
    controller.catch_up.start_tries(shop(controller), heads)
    (push,) = controller.context.spool.read()
    assert (push.run.ref, push.run.commit, push.run.id) == (ref, NEW, run.id)


SIDE = "refs/heads/side"


@pytest.mark.parametrize(
    ("heads", "newer", "expected"),
    [
        ({SIDE: NEW, MAIN: OLD}, False, "tried"),
        ({SIDE: NEW, MAIN: OLD}, True, "superseded"),
        ({SIDE: "c" * 40, MAIN: OLD}, False, "superseded"),
        ({SIDE: OLD, MAIN: OLD}, False, "waits"),
        ({MAIN: OLD}, False, "tried"),
        ({MAIN: OLD, "refs/heads/x": OLD}, False, "superseded"),
    ],
    ids=[
        "it is the head", "a newer push was announced", "another head", "the commit before",
        "only deploy branches are listed", "the branch is gone",
    ],
)  # fmt: skip
def test_a_test_branch_is_tried_again_unless_something_newer_is_known(
    controller: Any, heads: dict[str, str], expected: str, *, newer: bool
) -> None:
    synced(controller)
    run = a_run(NEW, SIDE, received=time.time(), before=OLD)
    fail(controller, run, Reason.CLONE_FAILED)
    if newer:
        record(controller, a_run("c" * 40, SIDE, received=time.time() + 1))
    then = controller.context.state.read(shop(controller)).find(SIDE, NEW).next_try + 0.1
    controller.clock.now = lambda: then
    asked = hook.ReadHeads(asked=then, answered=controller.clock.monotonic(), commits=heads)
    controller.catch_up.start_tries(shop(controller), asked)
    kept = controller.context.state.read(shop(controller)).find(SIDE, NEW)
    assert stored(controller) == [NEW] * (expected == "tried")
    assert (kept.outcome == "superseded") is (expected == "superseded")


def test_a_stored_push_of_another_app_stops_no_try(tmp_path: Path) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), Reason.CLONE_FAILED)
    store(controller, a_run(OLD, app="blog"))
    wait_for_try(controller)
    assert sorted(stored(controller)) == [OLD, NEW]


def test_a_build_without_a_digest_is_made_again_by_the_next_try(controller: Any) -> None:
    synced(controller)
    deletions: list[str] = []

    def delete(resource: str, names: Sequence[str], namespace: str) -> None:
        deletions.extend(names)

    kubectl: Any = SimpleNamespace(delete=delete, patch=lambda *_: None)
    jobs = [a_job(controller, "test", "succeeded"), a_job(controller, "build", "succeeded", 20.0)]
    del jobs[1].annotations[hook.ANNOTATION_DIGEST]
    assert hook.reopen(kubectl, a_run(OLD, received=30.0), jobs)
    assert deletions == [jobs[1].name]


def test_a_kill_between_record_and_jobs_keeps_the_tries(controller: Any) -> None:
    synced(controller)
    now = time.time()
    first = a_run(NEW, received=now)
    fail(controller, first, Reason.CLONE_FAILED)
    again = a_run(NEW, received=now + 70, delivery=hook.NEXT_TRY)
    controller.context.recorder.record_started(shop(controller), [again])
    controller.clock.now = lambda: now + 80
    fail(controller, first, Reason.CLONE_FAILED)  # its Jobs were not marked as ended
    assert last_record(controller).tries == 2


def test_a_run_that_was_rejected_while_it_waited_for_its_next_try_is_left_alone(
    controller: Any,
) -> None:
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), Reason.QUOTA_EXCEEDED, "staging")
    controller.context.state.reject(shop(controller), NEW, Reason.ROLLED_BACK)
    wait_for_try(controller)
    controller.intake.admit_all()
    assert (stored(controller), job_names(controller)) == ([], [])
    assert last_record(controller).next_try == 0
    controller.catch_up.read_heads(shop(controller))
    assert stored(controller) == []


def test_a_try_that_waits_in_the_spool_is_not_stored_again(controller: Any) -> None:
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), Reason.CLONE_FAILED)
    for _ in range(3):
        wait_for_try(controller)
    assert stored(controller) == [NEW]


def test_the_heads_are_read_when_the_next_try_is_due(controller: Any) -> None:
    synced(controller)
    controller.context.heads_wanted["shop"].clear()
    fail(controller, a_run(NEW, received=time.time()), Reason.CLONE_FAILED)
    assert controller.context.heads_wanted["shop"].is_set()
    ended = last_record(controller).ended
    controller.clock.now = lambda: ended
    controller.context.doors.git.heads = lambda url: {MAIN: NEW}
    assert controller.catch_up.read_heads(shop(controller)) == pytest.approx(60, abs=0.01)


def test_what_a_try_uses_again_is_kept_until_then(controller: Any) -> None:
    synced(controller)
    run = a_run(NEW, received=time.time())
    add_job(controller, run)
    changes: list[Object] = []
    patch = controller.context.kubectl.patch

    def note(resource: str, name: str, namespace: str, change: Object) -> Object:
        changes.append(change)
        return patch(resource, name, namespace, change)  # type: ignore[no-any-return]

    controller.context.kubectl.patch = note
    fail(controller, run, Reason.CLONE_FAILED)
    (lasting,) = [c["spec"]["ttlSecondsAfterFinished"] for c in changes if "spec" in c]
    assert lasting == hook.JOB_TTL + 60


@pytest.mark.parametrize("reason", [Reason.MANIFEST_REFUSED, Reason.SMOKE_FAILED])
def test_a_refused_manifest_is_looked_at_again_when_its_app_is_configured_anew(
    controller: Any, reason: Reason, tmp_path: Path
) -> None:
    synced(controller)
    fail(controller, a_run(NEW, received=time.time()), reason, "staging")
    catch_up(controller, {MAIN: NEW})
    assert stored(controller) == []
    app = shop(controller)
    controller.context.apps["shop"] = replace(app, deploy=replace(app.deploy, bake=1.0))
    catch_up(controller, {MAIN: NEW})
    again = reason is Reason.MANIFEST_REFUSED
    assert stored(controller) == [NEW] * again
    controller.intake.admit_all()
    assert job_names(controller) == [f"test-{a_run(NEW).id}"] * again
