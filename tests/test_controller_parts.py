"""The controller's own judgement, without a cluster: what it remembers, and what it waits for."""

from __future__ import annotations

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
    delete_job,
    ends,
    idle_controller,
    last_record,
    live_service,
    recorded,
    refused,
    sample,
    shop,
    stored,
    synced,
)  # fmt: skip
from tests.world import Object, eventually

SIDE = "refs/heads/side"
VANISHED = {"app": "shop", "outcome": "failed", "stage": "test", "reason": "Vanished"}


@pytest.fixture
def controller(tmp_path: Path) -> Any:
    return idle_controller(tmp_path)


def executed(controller: Any, monkeypatch: pytest.MonkeyPatch) -> list[hook.Observation]:
    """Let steps not be executed; return what they were decided on, as they come."""
    observations: list[hook.Observation] = []

    def execute(step: hook.Step) -> None:
        observations.append(step.observed)

    monkeypatch.setattr(controller.runs, "execute", execute)
    return observations


# Threads


def test_a_step_that_fails_is_reported_and_taken_again_after_a_pause(
    controller: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gitops_hook")
    controller.supervisor.retry = hook.Retry(hook.Clock())
    times: list[float] = []

    def step() -> float:
        times.append(time.monotonic())
        if len(times) == 1:
            raise hook.HookError("not yet")
        return 60.0

    event = controller.spooled
    controller.supervisor.repeat("intake", "it waits", step, event)
    eventually(lambda: len(times) == 2)
    assert times[1] - times[0] > 0.6
    assert [line.message for line in caplog.records] == ["it waits", "recovered"]
    event.set()
    eventually(lambda: len(times) == 3)
    assert controller.heartbeats.late() == []
    controller.shut_down(5)
    threads = controller.supervisor._threads
    eventually(lambda: not any(thread.is_alive() for thread in threads.values()))


def test_a_thread_that_waits_says_so_now_and_then_and_when_it_has_recovered(
    controller: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gitops_hook")
    controller.supervisor.retry = hook.Retry(hook.Clock(), (0.0,) * 5)
    event = controller.spooled
    steps = [0]

    def step() -> float:
        steps[0] += 1
        if steps[0] <= 32:
            raise hook.HookError(str(steps[0]))
        return 60.0

    controller.supervisor.repeat("intake", "it waits", step, event)
    eventually(lambda: steps[0] == 33)
    event.set()
    eventually(lambda: steps[0] == 34)
    controller.shut_down(5)
    lines: list[Any] = caplog.records
    reports = [(line.levelname, line.message, line.fields.get("detail")) for line in lines]
    failures = [("WARNING", "it waits", n) for n in ("1", "2", "3", "4", "5", "11", "21", "31")]
    assert reports == [*failures, ("INFO", "recovered", None)]


def test_that_there_can_be_no_more_threads_is_an_error_like_others(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    synced(controller)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(hook.HookError):
            start_worker(controller, lambda: None)
    assert not busy(controller)


# Workers


def start_worker(controller: Any, step: Callable[[], None], run: hook.Run | None = None) -> None:
    run = run or a_run(OLD)
    task = hook.task_of(controller.context.config, shop(controller), "staging", run)
    controller.workers.start("worker", task, step, run.received)


def busy(controller: Any, run: hook.Run | None = None) -> frozenset[str]:
    environments: frozenset[str] = controller.workers.busy(run or a_run(OLD))
    return environments


def test_an_environment_has_one_worker_at_a_time_and_is_free_after_it(controller: Any) -> None:
    go = threading.Event()
    steps: list[int] = []

    def step() -> None:
        steps.append(1)
        go.wait(10)

    start_worker(controller, step)
    start_worker(controller, step)
    assert busy(controller) == {"staging"}
    go.set()
    eventually(lambda: not busy(controller))
    assert steps == [1]
    start_worker(controller, step)
    eventually(lambda: steps == [1, 1])


@pytest.mark.parametrize("wrong", [hook.HookError("lost"), RuntimeError("a bug")])
def test_a_worker_that_failed_leaves_its_environment_alone_for_a_second_and_no_longer(
    controller: Any, wrong: Exception
) -> None:
    def step() -> None:
        raise wrong

    start_worker(controller, step)
    eventually(controller.context.wake.is_set)
    assert busy(controller) == {"staging"}
    controller.clock.time += 0.6
    assert busy(controller) == {"staging"}
    controller.clock.time += 0.8
    assert not busy(controller)


def test_a_newer_push_does_not_wait_for_the_next_try_of_an_older_one(controller: Any) -> None:
    old = a_run(OLD, received=1.0)
    new = a_run(NEW, received=2.0)
    steps: list[str] = []

    def fail(commit: str) -> None:
        steps.append(commit)
        raise hook.HookError("lost")

    def start(run: hook.Run) -> None:
        controller.context.wake.clear()
        start_worker(controller, partial(fail, run.commit), run)
        controller.context.wake.wait(1 if len(steps) < 2 else 0.1)

    start(old)
    assert busy(controller, old) == {"staging"}
    assert not busy(controller, new)
    start(new)
    assert busy(controller, new) == busy(controller, old) == {"staging"}
    for run in (old, new):
        start(run)
    assert steps == [OLD, NEW]


FORBIDDEN = (
    'Error from server (Forbidden): error when creating "STDIN": configmaps "x" is forbidden: '
)


@pytest.mark.parametrize(
    ("message", "reason"),
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
    controller: Any, monkeypatch: pytest.MonkeyPatch, message: str, reason: str | None
) -> None:
    def deploy(task: hook.Task) -> None:
        raise hook.KubectlError(["kubectl", "create"], 1, FORBIDDEN + message)

    monkeypatch.setattr(controller.context.deployer, "deploy", deploy)
    service = {"metadata": {"name": "shop", "resourceVersion": "1"}, "spec": {}}
    controller.context.kubectl.objects["service", "shop"] = service
    task = hook.task_of(controller.context.config, shop(controller), "staging", a_run(NEW))
    if reason is None:
        with pytest.raises(hook.KubectlError):
            controller.workers.deploy(task, {})
    else:
        controller.workers.deploy(task, {})
        last = controller.context.state.read(shop(controller)).last(MAIN)
        assert (last.outcome, last.reason) == ("failed", reason)


# What is observed


def test_nothing_is_decided_while_an_informer_of_jobs_or_pods_is_not_up_to_date(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def look() -> list[hook.Run]:
        looks.append(1)
        return []

    monkeypatch.setattr(controller.runs, "reconcile", look)
    controller.reconcile()
    assert looks == []
    synced(controller)
    controller.informers.pods[1].trouble = "connection refused"
    controller.reconcile()
    assert looks == []
    controller.informers.pods[1].trouble = ""
    controller.reconcile()
    assert looks == [1]


def test_an_environment_that_cannot_be_seen_is_left_alone(controller: Any) -> None:
    add_job(controller, a_run(OLD))

    def busy_environments() -> frozenset[str]:
        (jobs,) = controller.informers.jobs_by_run().values()
        environments: frozenset[str] = controller.runs.observe(jobs, [], newer=False).busy
        return environments

    assert busy_environments() == {"staging", "production"}
    synced(controller)
    controller.informers.services["production"].trouble = "connection refused"
    assert busy_environments() == {"production"}


@pytest.mark.parametrize(("uid", "own"), [("this", True), ("before", False)])
def test_a_pod_left_by_a_deleted_job_of_the_same_name_does_not_count(
    controller: Any, monkeypatch: pytest.MonkeyPatch, uid: str, *, own: bool
) -> None:
    job = a_manifest(controller, a_run(OLD), uid="this")
    job["spec"]["suspend"] = False
    job["status"] = {"startTime": "2020-01-01T00:00:00Z"}
    labels = {
        "batch.kubernetes.io/job-name": job["metadata"]["name"],
        "batch.kubernetes.io/controller-uid": uid,
        hook.LABEL_RUN: a_run(OLD).id,
    }
    state = {"waiting": {"reason": "InvalidImageName"}}
    pod = {
        "metadata": {"name": "pod", "resourceVersion": "1", "labels": labels},
        "spec": {},
        "status": {"containerStatuses": [{"name": "test-runner", "state": state}]},
    }
    logs: list[str] = []

    def keep(app: str, run: str, pods: Sequence[hook.Pod], namespace: str) -> None:
        logs.extend(pod.name for pod in pods)

    monkeypatch.setattr(controller.context.recorder.logs, "keep", keep)
    controller.context.kubectl.objects["job", job["metadata"]["name"]] = job
    controller.informers.jobs[0]._take("ADDED", job)
    controller.informers.pods[0]._take("ADDED", pod)
    observations = executed(controller, monkeypatch)
    controller.runs.reconcile()
    (observed,) = observations
    assert [p.name for p in observed.pods] == ["pod"] * own
    assert bool(observed.fatal_problem) is own
    controller.runs.wait_for_pod(observed.jobs["test"], observed)
    events = [f for f in controller.context.kubectl.filters if "involvedObject" in f]
    assert events == ["involvedObject.uid=this,reason=FailedCreate"] * (not own)
    end = hook.ends(Outcome.FAILED, Reason.VANISHED, "", "test")
    controller.context.recorder.finish(observed.run, observed.jobs, end)
    eventually(lambda: logs == ["pod"] * own)


def unsuspended(
    controller: Any, *pods: Object, events: Sequence[Object] = (), started: bool = True
) -> hook.Job:
    """Let a Job run for a minute, with these pods and Events; return it as it is after a look."""
    job = a_manifest(controller, a_run(OLD), uid="this")
    job["spec"]["suspend"] = False
    since = stamp(controller.context.clock.now() - 60)
    job["status"] = {"startTime": since} if started else {}
    kubectl = controller.context.kubectl
    kubectl.objects["job", job["metadata"]["name"]] = job
    kubectl.list = lambda resource, *_: list(events) if resource == "events" else []
    kubectl.patch = lambda _, name, namespace, change: annotated(job, change)
    controller.informers.jobs[0]._take("ADDED", job)
    for pod in pods:
        controller.informers.pods[0]._take("ADDED", pod)
    for _ in range(2):  # the first one reads the Events
        controller.clock.time += 10.0
        controller.runs.reconcile()
    (found,) = controller.informers.jobs[0].items()
    return found


def annotated(job: Object, change: Object) -> Object:
    """Merge annotations into a Job, as the API server would."""
    meta = job["metadata"]
    notes = {**meta["annotations"], **change["metadata"]["annotations"]}
    meta["annotations"] = {k: v for k, v in notes.items() if v is not None}
    meta["resourceVersion"] = str(int(meta["resourceVersion"]) + 1)
    return job


def a_test_pod(*states: Object, **status: Any) -> Object:
    """A pod of the Job above, with its containers in these states."""
    entries = [{"name": f"c{n}", "state": state, "ready": True} for n, state in enumerate(states)]
    labels = {"batch.kubernetes.io/controller-uid": "this", hook.LABEL_RUN: a_run(OLD).id}
    meta = {"name": "pod", "resourceVersion": "1", "labels": labels}
    return {"metadata": meta, "spec": {}, "status": {"containerStatuses": entries, **status}}


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


FULL = "0/1 nodes are available: 1 Insufficient cpu."
CLAIMLESS = '0/1 nodes are available: persistentvolumeclaim "pip-cache" not found. not found'
OVER = 'pods "x" is forbidden: exceeded quota: q, requested: pods=1, used: pods=4, limited: pods=4'
CREATING: Object = {"waiting": {"reason": "PodInitializing"}}


def held_back(message: str) -> Object:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    return a_test_pod(conditions=[{**condition, "message": message}])


@pytest.mark.parametrize(
    ("pods", "events", "reason", "said"),
    [
        ([held_back(FULL)], [], "Unschedulable", FULL),
        ([held_back(CLAIMLESS)], [], "VolumeUnavailable", "pip-cache"),
        ([a_test_pod(CREATING)], [("FailedMount", 'secret "s" not found')],
            "VolumeUnavailable", 'secret "s" not found'),
        ([a_test_pod(CREATING)], [("Pulling", 'Pulling image "x:1"')],
            "NeverStarted", 'Pulling image "x:1"'),
        ([a_test_pod({"waiting": {"reason": "ErrImagePull", "message": "connection refused"}})],
            [("Failed", "connection refused")], "ImagePullFailed", "connection refused"),
        ([], [("FailedCreate", OVER)], "QuotaExceeded", OVER),
        ([a_test_pod({"running": {}})], [], "", ""),
        ([], [], "", ""),
    ],
    ids=["full cluster", "missing claim", "missing Secret", "silent registry", "registry away",
         "full quota", "it runs", "no Event yet"],
)  # fmt: skip
def test_what_an_unsuspended_job_waits_for_is_annotated_in_the_clusters_own_words(
    controller: Any, pods: list[Object], events: list[tuple[str, str]], reason: str, said: str
) -> None:
    about = {"name": "pod"}
    listed = [{"involvedObject": about, "reason": r, "message": m, "type": "Warning"}
              for r, m in events]  # fmt: skip
    job = unsuspended(controller, *pods, events=listed)
    assert job.annotations.get(hook.ANNOTATION_REASON, "") == reason
    assert said in job.annotations.get(hook.ANNOTATION_DETAIL, "")
    assert controller.clock.time < 1000.0 + 30.0
    if pods:  # what is over is not shown any more
        running = a_test_pod({"running": {}})
        running["metadata"]["resourceVersion"] = "2"
        controller.informers.pods[0]._take("MODIFIED", running)
        controller.clock.time += 10.0
        controller.runs.reconcile()
        (job,) = controller.informers.jobs[0].items()
        assert hook.ANNOTATION_REASON not in job.annotations


def test_no_events_are_read_of_a_job_of_which_no_start_is_seen_yet(controller: Any) -> None:
    event = {"reason": "FailedCreate", "message": OVER, "type": "Warning"}
    job = unsuspended(controller, events=[event], started=False)
    assert hook.ANNOTATION_REASON not in job.annotations


def test_a_job_that_requests_more_than_its_quota_ever_allows_ends_at_once_and_frees_its_slot(
    controller: Any,
) -> None:
    ended: list[hook.Action] = []
    controller.context.recorder.finish = lambda run, jobs, end, **more: ended.append(end)
    message = OVER.replace("pods=1", "pods=5")
    event = {"reason": "FailedCreate", "message": message, "type": "Warning"}
    unsuspended(controller, events=[event])
    assert [(end.outcome, end.reason, end.detail) for end in ended[:1]] == [
        (Outcome.FAILED, Reason.QUOTA_EXCEEDED, message)
    ]


def test_a_run_that_ended_during_a_look_is_not_begun_again_by_that_look(controller: Any) -> None:
    job = a_manifest(controller, a_run(OLD))
    job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    informer = controller.informers.jobs[0]
    informer._take("ADDED", job)
    ended = {"gitops-hook/outcome": "superseded", "gitops-hook/ended-at": str(time.time())}
    meta = {**job["metadata"], "resourceVersion": "2"}
    meta["annotations"] = {**meta["annotations"], **ended}
    informer.learn({**job, "metadata": meta})
    observed = controller.runs.observe({"test": hook.Job(job)}, [], newer=False)
    assert hook.decide(observed).do is Do.NOTHING


# What an earlier process or an earlier try has left


def test_a_run_that_was_rejected_before_a_crash_keeps_the_reason_of_its_end(
    controller: Any,
) -> None:
    run = a_run(NEW, received=time.time())
    end = hook.ends(Outcome.SWITCHED_BACK, Reason.UNHEALTHY_AFTER_SWITCH, "it was", "production")
    controller.context.recorder.finish(run, {}, end)
    task = hook.task_of(controller.context.config, shop(controller), "production", run)
    assert controller.workers._end_of_deployment(task) == end


def test_a_live_version_is_watched_on_although_another_environment_rejected_its_commit(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(NEW, received=time.time())
    controller.context.state.reject(shop(controller), NEW, "RolledBack")
    task = hook.task_of(controller.context.config, shop(controller), "production", run)
    deployed: list[hook.Task] = []
    monkeypatch.setattr(controller.context.deployer, "deploy", deployed.append)
    end = controller.workers._end_of_deployment(task)
    assert (end.reason, deployed) == (Reason.REJECTED, [])
    live = {"run": run.id, "commit": NEW, "outcome": "", "live": True}
    controller.context.kubectl.objects["service", "shop"] = live_service(live)
    assert controller.workers._end_of_deployment(task) is None
    assert deployed == [task]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [("switched-back", "AnsweredSlowly"), ("paused", "UnhealthyAfterSwitch")],
    ids=["reason", "outcome"],
)
def test_an_end_that_a_newer_version_recorded_in_words_of_its_own_is_a_rejection(
    controller: Any, outcome: str, reason: str
) -> None:
    run = a_run(NEW, received=time.time())
    end = hook.ends(Outcome.SWITCHED_BACK, Reason.UNHEALTHY_AFTER_SWITCH, "it was", "production")
    controller.context.recorder.finish(run, {}, end)
    state = controller.context.state
    record = replace(state.read(shop(controller)).runs[run.id], outcome=outcome, reason=reason)
    state.write(shop(controller), record)
    task = hook.task_of(controller.context.config, shop(controller), "production", run)
    stopped = controller.workers._end_of_deployment(task)
    assert (stopped.outcome, stopped.reason) == (Outcome.FAILED, Reason.REJECTED)


@pytest.mark.parametrize("ended", [20.0, None], ids=["of an earlier try", "of this try"])
def test_a_build_counts_as_made_again_only_within_one_try(
    controller: Any, ended: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[Object] = []
    kubectl = controller.context.kubectl
    monkeypatch.setattr(kubectl, "run", lambda *args, **more: "")
    monkeypatch.setattr(kubectl, "create", lambda objects, namespace: created.extend(objects))
    jobs = {
        "test": a_job(controller, "test", "succeeded"),
        "build": a_job(controller, "build", "succeeded", ended),
    }
    observed = controller.runs.observe(jobs, [], newer=False)
    controller.runs.build(observed)
    (job,) = created
    assert (hook.ANNOTATION_REMADE in job["metadata"]["annotations"]) is (ended is None)


# Manifests that are read beside the tests


def read_by(controller: Any, answers: Sequence[Any]) -> list[str]:
    """Let the reading of manifests answer in turn, an error by raising it; return what is read."""
    commits: list[str] = []

    def manifest_faults(tasks: Sequence[hook.Task]) -> Any:
        commits.append(tasks[0].run.commit)
        answer = answers[min(len(commits), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    controller.context.deployer.manifest_faults = manifest_faults
    return commits


def look_until_read(controller: Any) -> None:
    """Look at the runs, and wait until no manifests are read any more."""
    controller.runs.reconcile()
    eventually(lambda: not controller.workers._running, what="nothing is read")


FAULTS = {"staging": [hook.Fault("one"), hook.Fault("two")], "production": [hook.Fault("two")]}


def test_manifests_are_read_once_for_each_run_and_forgotten_with_it(controller: Any) -> None:
    commits = read_by(controller, [{}])
    add_job(controller, a_run(NEW))
    for _ in range(4):
        look_until_read(controller)
    assert commits == [NEW]
    assert recorded(controller) == {}
    delete_job(controller)
    controller.runs.jobs.clear()
    controller.runs.reconcile()
    assert controller.runs.reader.reading(a_run(NEW)) == hook.Reading()


def test_what_is_refused_of_any_environment_ends_the_run_and_rejects_its_commit(
    controller: Any,
) -> None:
    commits = read_by(controller, [FAULTS])
    add_job(controller, a_run(NEW, received=time.time()))
    look_until_read(controller)
    assert recorded(controller) == {}
    controller.runs.reconcile()
    record = last_record(controller)
    assert (record.outcome, record.reason, record.stage) == ("failed", "ManifestRefused", "staging")
    assert record.detail == "staging: one\ntwo"
    state = controller.context.state.read(shop(controller))
    assert state.rejected[NEW].config == hook.config_hash(shop(controller))
    assert commits == [NEW]


@pytest.mark.parametrize(
    "away", [hook.GitError(["git"], 128, "no route"), refused("connection refused"), OSError("no")]
)
def test_while_manifests_cannot_be_read_nothing_is_decided_and_they_are_read_again(
    controller: Any, away: Exception
) -> None:
    commits = read_by(controller, [away, away, FAULTS])
    add_job(controller, a_run(NEW, received=time.time()))
    for reads in (1, 2, 3):
        look_until_read(controller)
        look_until_read(controller)  # its next try is not due yet
        assert len(commits) == reads
        assert bool(recorded(controller)) is (reads > 2)
        controller.clock.time += 10.0


def test_the_end_that_a_killed_process_has_recorded_is_taken_without_reading(
    controller: Any,
) -> None:
    commits = read_by(controller, [{}])
    run = a_run(NEW, received=time.time())
    end = hook.fails(Reason.MANIFEST_REFUSED, "one\ntwo", "staging")
    controller.context.recorder.finish(run, {}, end)
    before = last_record(controller)
    add_job(controller, run)
    look_until_read(controller)
    assert controller.runs.reader.reading(run) == hook.Reading(done=True, end=end)
    controller.runs.reconcile()
    assert last_record(controller) == before
    assert commits == []


def test_only_a_few_manifests_are_read_at_a_time(controller: Any) -> None:
    go = threading.Event()
    started: list[str] = []

    def manifest_faults(tasks: Sequence[hook.Task]) -> dict[str, Sequence[hook.Fault]]:
        started.append(tasks[0].app.name)
        assert go.wait(30)
        return {}

    controller.context.deployer.manifest_faults = manifest_faults
    app = shop(controller)
    names = [f"app-{number}" for number in range(hook.READ_AT_ONCE + 2)]
    controller.context.apps |= {name: replace(app, name=name) for name in names}
    steps = []
    for name in names:
        observed: Any = SimpleNamespace(app=replace(app, name=name), run=a_run(NEW, app=name))
        steps.append(hook.Step(observed, hook.Action(Do.WAIT, "test")))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hook, "reads_manifests", lambda observed, action: True)
        controller.runs.reader.start_all(steps)
        eventually(lambda: len(started) == hook.READ_AT_ONCE)
        controller.runs.reader.start_all(steps)
        assert len(controller.workers._running) == hook.READ_AT_ONCE
        go.set()
        eventually(lambda: not controller.workers._running)
    assert sorted(started) == names[: hook.READ_AT_ONCE]


# Jobs that are gone


def test_many_jobs_that_expired_cost_no_call_and_many_lost_ones_one_reading(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    get = controller.context.kubectl.get
    controller.context.kubectl.objects["configmap", "gitops-hook-shop"] = an_empty_record()

    def count(resource: str, name: str, namespace: str) -> Object | None:
        calls.append(name)
        return get(resource, name, namespace)  # type: ignore[no-any-return]

    monkeypatch.setattr(controller.context.kubectl, "get", count)
    for number in range(200):
        job = a_job(controller, "test", "failed", 20.0, name=f"test-{number}")
        controller.runs.jobs[job.name] = job
    controller.runs.reconcile()
    assert (calls, controller.runs.jobs) == ([], {})
    for number in range(200):
        job = a_job(controller, "test", "active", name=f"test-{number}")
        controller.runs.jobs[job.name] = job
    controller.runs.reconcile()
    assert (calls, controller.runs.jobs) == (["gitops-hook-shop"], {})


@pytest.mark.parametrize("finished", [9.0, 11.0])
def test_a_job_is_counted_once_however_often_its_run_is_opened_again(
    controller: Any, finished: float
) -> None:
    run = a_run(OLD, received=10.0)
    manifest = a_manifest(controller, run)
    manifest["spec"]["suspend"] = False
    manifest["status"] = {
        "startTime": "1970-01-01T00:00:05Z",
        "completionTime": f"1970-01-01T00:00:{finished:02.0f}Z",
        "conditions": [
            {"type": "Complete", "status": "True",
             "lastTransitionTime": f"1970-01-01T00:00:{finished:02.0f}Z"},
        ],
    }  # fmt: skip
    controller.context.kubectl.objects["job", manifest["metadata"]["name"]] = manifest
    job = hook.Job(manifest)
    assert (job.unsuspended, job.finished) == (5.0, finished)
    controller.context.recorder.finish(run, {"test": job}, ends(Outcome.TESTED))
    labels = {"app": "shop", "stage": "test", "result": "succeeded"}
    assert sample(controller, "stage_seconds_count", labels) == (1 if finished > 10 else None)


def test_a_deleted_job_is_recorded_again_after_a_failure_and_then_no_more(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_job(controller, a_run(OLD, SIDE))
    controller.runs.reconcile()
    delete_job(controller)

    def lose(resource: str, name: str, namespace: str) -> None:
        raise refused("timed out", None)

    with monkeypatch.context() as patched:
        patched.setattr(controller.context.kubectl, "get", lose)
        controller.runs.reconcile()
    assert recorded(controller) == {}
    for _ in range(2):
        controller.clock.time += 2.0
        controller.runs.reconcile()
        assert recorded(controller) == {SIDE: (OLD, "failed")}
        assert sample(controller, "runs_total", VANISHED) == 1


def test_a_job_that_goes_after_its_run_has_ended_is_not_recorded_again(controller: Any) -> None:
    add_job(controller, a_run(OLD, SIDE))
    controller.runs.reconcile()
    controller.context.recorder.finish(a_run(OLD, SIDE), {}, ends(Outcome.TESTED))
    delete_job(controller)
    controller.runs.reconcile()
    assert recorded(controller) == {SIDE: (OLD, "tested")}
    assert sample(controller, "runs_total", VANISHED) is None


@pytest.mark.parametrize(
    ("lost", "left", "jobs_of_end"),
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
    controller: Any, lost: Any, left: Any, jobs_of_end: list[str] | None
) -> None:
    ended: list[Any] = []
    controller.context.recorder.finish = lambda run, jobs, end, **more: ended.append(
        ([*jobs], end.stage, end.reason)
    )
    jobs = {left[0]: a_job(controller, *left)} if left else {}
    controller.runs.end_vanished(a_job(controller, *lost), jobs, controller.context.state.read)
    expected = [] if jobs_of_end is None else [(jobs_of_end, lost[0], Reason.VANISHED)]
    assert ended == expected


def test_one_vanished_job_that_cannot_be_recorded_holds_back_no_other_run(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_job(controller, a_run(OLD, SIDE))
    controller.runs.reconcile()
    delete_job(controller)
    add_job(controller, a_run(NEW, "refs/heads/x"))

    def refuse(app: hook.App, *records: Any, **more: Any) -> None:
        raise refused("Error from server (Forbidden): no")

    monkeypatch.setattr(controller.context.state, "write", refuse)
    observations = executed(controller, monkeypatch)
    controller.runs.reconcile()
    assert [observed.run.commit for observed in observations] == [NEW]


def test_a_job_that_is_deleted_during_a_look_is_missed_in_the_next(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_job(controller, a_run(OLD, SIDE))
    jobs_by_run = controller.informers.jobs_by_run

    def delete_meanwhile() -> Object:
        runs: Object = jobs_by_run()
        delete_job(controller)
        return runs

    with monkeypatch.context() as patched:
        patched.setattr(controller.informers, "jobs_by_run", delete_meanwhile)
        controller.runs.reconcile()
    controller.runs.reconcile()
    assert recorded(controller) == {SIDE: (OLD, "failed")}


# Steps that fail, and steps that are many


def test_a_step_that_fails_again_and_again_is_reported_now_and_then_and_shown_all_the_time(
    controller: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_job(controller, a_run(OLD, SIDE))
    synced(controller)
    broken = False
    tries: list[float] = []
    shown: set[float | None] = set()

    def execute(step: hook.Step) -> None:
        tries.append(controller.clock.time)
        if broken:
            raise refused("connection refused")

    def look(seconds: int) -> int:
        """Look every second; return how often a failure was reported."""
        before = len(caplog.records)
        for _ in range(seconds):
            controller.clock.time += 1
            controller.reconcile()
            shown.add(sample(controller, "waiting", {"what": "a step"}))
        return len(caplog.records) - before

    monkeypatch.setattr(controller.runs, "execute", execute)
    assert (look(1), shown) == (0, {0})
    broken = True
    shown.clear()
    tries.clear()
    assert look(600) < 10
    assert shown == {1}
    assert 600 / 40 < len(tries) < 40
    broken = False
    look(40)
    assert sample(controller, "waiting", {"what": "a step"}) == 0


def test_a_changed_object_lets_a_run_that_waits_be_tried_at_once(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    informer = add_job(controller, a_run(OLD, SIDE))
    tries: list[str] = []

    def execute(step: hook.Step) -> None:
        tries.append(step.observed.run.commit)
        if step.observed.run.commit == OLD:
            raise refused("connection refused")

    monkeypatch.setattr(controller.runs, "execute", execute)
    controller.runs.reconcile()
    add_job(controller, a_run(NEW, "refs/heads/x"))
    controller.runs.reconcile()
    assert tries == [OLD, NEW]
    informer._take("MODIFIED", a_manifest(controller, a_run(OLD, SIDE), resourceVersion="2"))
    controller.runs.reconcile()
    assert sorted(tries) == [OLD, OLD, NEW, NEW]


def test_a_run_that_ends_while_it_waits_for_its_next_try_is_shown_no_longer(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(step: hook.Step) -> None:
        raise refused("connection refused")

    informer = add_job(controller, a_run(OLD, SIDE))
    monkeypatch.setattr(controller.runs, "execute", execute)
    controller.runs.reconcile()
    assert controller.context.retry.failing()
    ended = {hook.ANNOTATION_OUTCOME: "tested", hook.ANNOTATION_ENDED: str(time.time())}
    manifest = a_manifest(controller, a_run(OLD, SIDE), resourceVersion="2")
    manifest["metadata"]["annotations"] |= ended
    informer._take("MODIFIED", manifest)
    controller.runs.reconcile()
    assert not controller.context.retry.failing()


def a_step(run: hook.Run, action: hook.Action) -> hook.Step:
    jobs = {"test": SimpleNamespace(version=1)}
    observed: Any = SimpleNamespace(run=run, jobs=jobs, pods=())
    return hook.Step(observed, action)


def test_environments_are_taken_up_before_all_other_steps(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Do] = []
    monkeypatch.setattr(controller.runs, "execute", lambda step: done.append(step.action.do))
    actions = [hook.Action(do, "test") for do in (Do.UNSUSPEND, Do.DEPLOY, Do.ANNOTATE, Do.DEPLOY)]
    runs = [a_run(f"{number:040x}") for number in range(len(actions))]
    controller.runs.execute_all(map(a_step, runs, actions))
    assert done == [Do.DEPLOY, Do.DEPLOY, Do.UNSUSPEND, Do.ANNOTATE]


def test_the_ends_of_very_many_tests_hold_back_nothing_that_is_deployed(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[str] = []

    def execute(step: hook.Step) -> None:
        commits.append(step.observed.run.commit)
        controller.clock.time += 0.3

    monkeypatch.setattr(controller.runs, "execute", execute)
    runs = [a_run(f"{number:040x}", f"refs/heads/b{number}") for number in range(100)]
    steps = [a_step(run, ends(Outcome.SUPERSEDED)) for run in runs]
    steps.append(a_step(a_run(NEW), hook.Action(Do.UNSUSPEND, "test")))
    controller.runs.execute_all(steps)
    assert commits[0] == NEW
    assert 1 < len(commits) < 20
    assert controller.context.wake.is_set()


def test_a_run_that_waits_for_git_shows_what_git_said_last(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotated: list[Object] = []
    questions: list[str] = []

    def annotate(job: hook.Job, annotations: dict[str, str | None]) -> None:
        job.annotations.update({k: v for k, v in annotations.items() if v is not None})
        annotated.append(annotations)

    def fail(url: str) -> None:
        questions.append(f"refused after {len(questions)} ms")
        error = f"{questions[-1]}, password=hunter2"
        raise hook.GitError(["git", "ls-remote", url], 128, error)

    add_job(controller, a_run(NEW))
    controller.supervisor.retry = hook.Retry(hook.Clock(), (0.1,))
    monkeypatch.setattr(controller.informers, "annotate", annotate)
    monkeypatch.setattr(controller.context.doors.git, "heads", fail)
    controller.runs.reconcile()
    read = partial(controller.catch_up.read_heads, shop(controller))
    wanted = controller.context.heads_wanted["shop"]
    controller.supervisor.repeat("heads of shop", "catch-up waits", read, wanted)
    eventually(lambda: controller.runs.reconcile() and len(questions) > 3)
    controller.shut_down(5)
    assert {entry[hook.ANNOTATION_REASON] for entry in annotated} == {"GitError"}
    bare, full = (entry[hook.ANNOTATION_DETAIL] for entry in annotated)
    assert bare == "for the head of the branch"
    assert full.startswith("for the head of the branch; git ls-remote https://git.example.com/")
    assert re.search(r"refused after \d ms", full)
    assert "hunter2" not in full
    assert stored(controller) == []


# What others did to the live Service


def look_at(controller: Any, service: Object) -> None:
    """Let the informer of production have the live Service, and the controller look."""
    informer = controller.informers.services["production"]
    version = 1 + max([item.version for item in informer.items()], default=0)
    service["metadata"]["resourceVersion"] = str(version)
    informer._items = {"shop": hook.Service(service)}
    controller.services.reconcile([])


def rolled_back_lines(caplog: pytest.LogCaptureFixture) -> list[Object]:
    lines = [line for line in caplog.records if line.message == "rolled back"]
    fields = [{"level": line.levelname, **getattr(line, "fields", {})} for line in lines]
    return [{key: value for key, value in line.items() if value} for line in fields]


OLD_ENTRY: Object = {"run": "shop-old", "outcome": "deployed", "at": 1.0}
NEW_ENTRY: Object = {"run": "shop-new", "outcome": "deployed", "at": 2.0}
LEFT: Object = {**NEW_ENTRY, "outcome": "rolled-back", "detail": "it is ugly"}
UNHEALTHY: Object = {"run": "shop-unhealthy", "outcome": "switched-back", "at": 3.0}


@pytest.mark.parametrize("newest", [[], [UNHEALTHY]], ids=["newest", "below-an-unhealthy-one"])
def test_a_rollback_from_elsewhere_is_reported_and_counted_once(
    controller: Any, caplog: pytest.LogCaptureFixture, newest: list[Object]
) -> None:
    look_at(controller, live_service(*newest, {**NEW_ENTRY, "live": True}, OLD_ENTRY))
    for _ in range(2):
        look_at(controller, live_service(*newest, LEFT, {**OLD_ENTRY, "live": True}))
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
    assert sample(controller, "switches_total", labels) == 1


@pytest.mark.parametrize("was", ["the target", "what was left, gone back to by hand"])
def test_neither_a_rollback_of_before_the_start_nor_the_next_version_is_a_rollback(
    controller: Any, caplog: pytest.LogCaptureFixture, was: str
) -> None:
    old = was == "the target"
    look_at(controller, live_service({**LEFT, "live": not old}, {**OLD_ENTRY, "live": old}))
    again = {**OLD_ENTRY, "run": "shop-again", "outcome": "", "live": True}
    look_at(controller, live_service(again, LEFT, OLD_ENTRY))
    assert rolled_back_lines(caplog) == []


@pytest.mark.parametrize("before", [True, False])
def test_a_selector_that_no_history_knows_is_drift_also_at_first_sight(
    controller: Any, monkeypatch: pytest.MonkeyPatch, *, before: bool
) -> None:
    change = {"manager": "someone"}
    live = controller.context.deployer.steady.live
    monkeypatch.setattr(live, "last_change", lambda task: change)
    if before:
        look_at(controller, live_service(LEFT, {**OLD_ENTRY, "live": True}))
    drifted = live_service(LEFT, {**OLD_ENTRY, "live": True})
    drifted["spec"]["selector"] = {"app": "shop"}
    controller.context.kubectl.objects["service", "shop"] = drifted
    labels = {"app": "shop", "environment": "production"}
    for _ in range(2):
        controller.clock.time += 60  # for the cooldown
        look_at(controller, drifted)
        eventually(lambda: sample(controller, "selector_drift_total", labels) == 1)


def test_what_is_live_of_an_app_is_recorded_although_that_of_another_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    written: list[str] = []

    def write(app: hook.App, *records: Any, **more: Any) -> None:
        if app.name == "shop":
            raise refused("Error from server (Forbidden): no")
        written.append(app.name)

    monkeypatch.setattr(controller.context.state, "write", write)
    entry = {"run": "a-run", "outcome": "deployed", "live": True}
    manifests = {name: live_service(entry) for name in ("shop", "blog")}
    for name, manifest in manifests.items():
        manifest["metadata"]["name"] = name
    services = {name: hook.Service(manifest) for name, manifest in manifests.items()}
    controller.informers.services["production"]._items = services
    for _ in range(10):
        controller.clock.time += hook.LOOK_SECONDS + 0.1
        controller.services.reconcile([])
    assert written == ["blog"]


def of_many_pushes(controller: Any, number: int, before: str) -> None:
    """Let an app have many Jobs of commits that are not the head, and another app one that is."""
    now = controller.clock.now()
    received = now - hook.AGAIN_SECONDS - 1
    moved = [a_run(f"{n + 1:040x}", before=before, received=received) for n in range(number)]
    pushes = [*moved, a_run("e" * 40, app="blog", received=received)]
    for push in pushes:
        job = hook.test_job(controller.context.config, controller.context.apps[push.app], push)
        controller.context.kubectl.create_each([job], "test")
        controller.informers.jobs[0]._take("ADDED", job)
    for app, commit in (("shop", "c" * 40), ("blog", "e" * 40)):
        at = controller.clock.monotonic()
        heads = hook.ReadHeads(asked=now, answered=at, commits={"refs/heads/main": commit})
        controller.catch_up.heads[app] = heads


@pytest.mark.parametrize("before", ["", "c" * 40], ids=["not the head", "head not shown yet"])
def test_many_pushes_of_one_app_hold_up_no_run_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    controller = idle_controller(tmp_path, TWO_APPS)
    synced(controller)
    of_many_pushes(controller, 300, before)
    calls: list[str] = []
    patch = controller.context.kubectl.patch

    def slow_patch(resource: str, name: str, *args: Any) -> Any:
        controller.clock.time += 0.1
        calls.append(name)
        return patch(resource, name, *args)

    monkeypatch.setattr(controller.context.kubectl, "patch", slow_patch)
    began = controller.clock.monotonic()
    controller.reconcile()
    assert calls[0].startswith("test-blog-"), "it is released first"
    assert controller.clock.monotonic() - began < 2 * hook.LOOK_SECONDS
    assert 5 < len(calls) < 50
    assert controller.context.wake.is_set(), "the others are next"
