"""What a run does next, decided from what is observed alone: tables and recorded clusters.

data/mirror/ holds the watches of a real cluster, scenario by scenario,
    thinned to what is looked at.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import gitops_hook as hook
from gitops_hook import Do, Outcome, Reason

Object = dict[str, Any]
DATA = Path(__file__).parent / "data" / "mirror"
A, B = "a" * 40, "b" * 40
DIGEST = "sha256:" + "d" * 64
SUMMARY = "2 passed, 1 failed: t.test_x"
# What kaniko prints, as its users have reported it.
AWAY = 'creating push check transport failed: Get "https://r/v2/": connect: connection refused'
NOT_PUSHED = "error pushing image: failed to push to destination r/x:1: unsupported status code 504"
GREEN = {hook.ANNOTATION_SUMMARY: "3 passed, 0 failed"}
NO_REPORT = {hook.ANNOTATION_SUMMARY: hook.NO_REPORT}
UNREAD = "the test report has 100 MiB; at most 10 MiB are read"
LOST = "the result of the tests is lost: its pod is gone"
NOW = 1_000_000.0
UNHEALTHY = (Outcome.SWITCHED_BACK, Reason.UNHEALTHY_AFTER_SWITCH)
EXCEEDED = {hook.ANNOTATION_DETAIL: "exceeded quota: test-quota"}
CONFIG = """
apps:
  - name: shop
    repository: https://gitlab.example.com/demo/shop.git
    build: {image: registry.example.com/demo/shop}
  - name: plain
    repository: https://gitlab.example.com/demo/plain.git
    build: {builder: none}
  - name: tested
    repository: https://gitlab.example.com/demo/tested.git
    build: {image: registry.example.com/demo/tested}
    deploy: {environments: []}
images: {hook: "registry.example.com/hook:1"}
"""
LOADED = hook.load_config(CONFIG)


# === A world in words ===


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def a_run(app: str = "shop", ref: str = "refs/heads/main", **more: Any) -> hook.Run:
    run = hook.run_id(app, ref, A)
    return hook.Run(
        **{"id": run, "app": app, "ref": ref, "commit": A, "received": NOW - 60, **more}
    )


def app_of(run: hook.Run) -> hook.App:
    return next(a for a in LOADED.apps if a.name == run.app)


def a_job(
    stage: str, state: str = "active", *, run: hook.Run | None = None, since: float = 10.0,
    notes: Mapping[str, str] | None = None, reason: str = "", **meta: Any,
) -> hook.Job:  # fmt: skip
    """A Job as the cluster would have it: made by the program, with a status since some seconds."""
    run = run or a_run()
    make = hook.test_job if stage == "test" else hook.build_job
    found = make(LOADED, app_of(run), run)
    uid = f"uid of {found['metadata']['name']}"
    told = {"uid": uid, "resourceVersion": "7", "creationTimestamp": stamp(NOW - since)}
    found["metadata"] |= {**told, **meta}
    found["metadata"]["annotations"] |= notes or {}
    found["spec"]["suspend"] = state == "suspended"
    ended = {"succeeded": "Complete", "failed": "Failed"}.get(state)
    condition = {"type": ended, "status": "True", "lastTransitionTime": stamp(NOW - since)}
    found["status"] = {} if state == "suspended" else {"startTime": stamp(NOW - since)}
    found["status"]["conditions"] = [{**condition, "reason": reason}] if ended else []
    return hook.Job(found)


def terminated(code: int, message: str = "", reason: str = "", at: float = NOW - 5) -> Object:
    reason = reason or ("Error" if code else "Completed")
    ended = {"exitCode": code, "reason": reason, "message": message, "finishedAt": stamp(at)}
    return {"terminated": ended}


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


RUNNING: Object = {"running": {"startedAt": stamp(NOW - 9)}}


def entry(
    name: str,
    state: Object,
    last: Object | None = None,
    restarts: int = 0,
    ready: bool | None = None,
) -> Object:
    ready = "running" in state if ready is None else ready
    last = last or {}
    return {
        "name": name,
        "state": state,
        "lastState": last,
        "restartCount": restarts,
        "ready": ready,
    }


def a_pod(
    job: str = "", *, states: Mapping[str, Object] | None = None, apps: list[Object] | None = None,
    inits: list[Object] | None = None, started: float = 9.0, created: float | None = None,
    name: str = "pod-1", ready: bool = False, fell: float | None = None, **more: Any,
) -> hook.Pod:  # fmt: skip
    """A pod as the cluster would have it; `started` seconds ago, unready since `fell` seconds."""
    states = states or {}
    if inits is None:
        inits = [entry(n, s) for n, s in states.items() if n in ("clone", "results")]
    if apps is None:
        apps = [entry(n, s) for n, s in states.items() if n not in ("clone", "results")]
    since = started if fell is None else fell
    conditions = [
        {"type": "Ready", "status": str(ready), "lastTransitionTime": stamp(NOW - since)},
        *more.pop("conditions", []),
    ]
    begun = {"startTime": stamp(NOW - started)} if started else {}
    meta = {
        "name": name,
        "resourceVersion": "1",
        "creationTimestamp": stamp(NOW - (created or started)),
    }
    meta["labels"] = {
        "batch.kubernetes.io/controller-uid": more.pop("uid", job and f"uid of {job}"),
        "batch.kubernetes.io/job-name": job,
        "gitops-hook/run": more.pop("run", a_run().id),
    }
    meta |= more.pop("meta", {})
    status = {"conditions": conditions, "initContainerStatuses": inits, "containerStatuses": apps}
    spec = {"initContainers": [{"name": "results", "restartPolicy": "Always"}, {"name": "clone"}]}
    return hook.Pod({"metadata": meta, "spec": spec, "status": {**status, **begun, **more}})


DISRUPTED = {"type": "DisruptionTarget", "status": "True"}
TEST, BUILD = f"test-{a_run().id}", f"build-{a_run().id}"


def history_entry(outcome: str, *, run: str = "", ago: float = 5, **more: Any) -> Object:
    run = run or a_run().id
    selector = {
        "gitops-hook/app": "shop",
        "version": more.get("colour", "blue"),
        "gitops-hook/run": run,
    }
    return {"run": run, "outcome": outcome, "at": NOW - ago, "selector": selector, **more}


def a_service(live: str, *history: Object, colour: str = "blue") -> hook.Service:
    selector = {"gitops-hook/app": "shop", "version": colour, "gitops-hook/run": live}
    notes = {"gitops-hook/history": json.dumps(history)}
    meta = {"name": "shop", "resourceVersion": "3", "annotations": notes}
    return hook.Service({"metadata": meta, "spec": {"selector": selector}})


def a_view(*jobs: hook.Job, **changes: Any) -> hook.Observation:
    run = jobs[0].run if jobs else a_run()
    given: Object = {
        "app": app_of(run), "run": run, "jobs": {j.stage: j for j in jobs}, "pods": (),
        "services": {}, "head": "same", "newer": False, "fatal_problem": None,
        "busy": frozenset(), "now": NOW, "queue_timeout": 3600.0,
    }  # fmt: skip
    return hook.Observation(**given | changes)


# === The live version ===


@pytest.mark.parametrize(
    ("reached", "put_backs", "drift"),
    [
        ({"r2"}, 0, hook.Drift.KEPT),
        ({"r1"}, 0, hook.Drift.MOVED),
        ({"r1", "r2"}, 0, hook.Drift.WIDENED),
        ({"r1", "r2", "r3"}, 2, hook.Drift.WIDENED),
        ({"r1", "r2"}, 3, hook.Drift.CONTESTED),
        ({"r1", "r3"}, 0, hook.Drift.ELSEWHERE),
        ({"r2", ""}, 0, hook.Drift.ELSEWHERE),
        ({""}, 0, hook.Drift.ELSEWHERE),
        (set(), 9, hook.Drift.ELSEWHERE),
    ],
)
def test_only_a_selector_that_reaches_another_version_beside_the_live_one_is_put_back(
    reached: set[str], put_backs: int, drift: hook.Drift
) -> None:
    assert hook.drift_of("r2", reached, put_backs) is drift


def test_a_pod_of_another_app_is_of_no_run() -> None:
    pods = [a_pod(run="r1"), a_pod(run="r2")]
    pods[0].labels["gitops-hook/app"] = "shop"
    assert hook.runs_of("shop", pods) == {"r1", ""}


def records(*entries: Object) -> list[hook.HistoryEntry]:
    return [hook.HistoryEntry.from_json(e) for e in entries]


def test_whoever_points_a_service_at_an_older_version_leaves_the_newer_ones() -> None:
    bad, old, older = records(*(history_entry("deployed", run=r) for r in ("r3", "r2", "r1")))
    first, left, last = hook.history_after_move([bad, old, older], old, "kubectl-edit", 7.0)
    assert first == replace(old, by="kubectl-edit", at=7.0)
    assert (left.outcome, left.reason) == ("deployed", "SelectorChanged")
    assert last == older
    (sick,) = records(history_entry("switched-back", run="r4", reason="UnhealthyAfterSwitch"))
    assert hook.history_after_move([sick, old], sick, "x", 7.0)[0].outcome == ""
    assert len(hook.history_after_move([old] * 10, bad, "x", 7.0)) == 10


def test_what_may_be_gone_back_to_stays_in_a_history_of_any_number_of_failures() -> None:
    live, before, older = (
        hook.HistoryEntry(selector={"run": n}, run=n, outcome="deployed", at=a)
        for n, a in (("live", 3.0), ("before", 2.0), ("older", 1.0))
    )
    history = [live, before, older]
    for number in range(30):
        failed = hook.HistoryEntry(selector={"run": f"r{number}"}, run=f"r{number}", at=9.0)
        history = hook.bounded_history([failed, *history], live)
        history[0] = replace(failed, outcome="switched-back", reason="UnhealthyAfterSwitch")
    assert [entry.run for entry in history[-2:]] == ["live", "before"]
    assert [entry.run for entry in history[:-2]] == [f"r{n}" for n in range(29, 21, -1)]
    unproven = replace(live, outcome="")
    failures = [replace(failed, run=f"x{n}") for n in range(10)]
    history = hook.bounded_history([*failures, unproven, before, older], unproven)
    assert [entry.run for entry in history[-3:]] == ["live", "before", "older"]


@pytest.mark.parametrize(
    ("live", "to", "goes", "says"),
    [
        ("r3", 1, "r2", ""),
        ("r3", 2, "r1", ""),
        ("r3", 3, "", "only 2 proven versions"),
        ("r3", "r1", "r1", ""),
        ("r3", "r4", "r4", ""),
        ("r3", "r3", "", "r3 is what is live"),
        ("r3", "r9", "", "'r9' is no run of the history: r4, r3, r2, r1"),
        ("", 1, "", "what is live is not known.*--to RUN, of: r4, r3, r2, r1"),
        ("", "r2", "r2", ""),
        ("r9", 1, "r3", ""),
    ],
)
def test_a_rollback_never_goes_to_what_it_leaves_and_asks_where_that_is_not_known(
    live: str, to: int | str, goes: str, says: str
) -> None:
    proven = [history_entry("deployed", run=r) for r in ("r3", "r2", "r1")]
    service = a_service(live, history_entry("switched-back", run="r4"), *proven)
    if says:
        with pytest.raises(hook.RefusedError, match=says):
            hook.rollback_entry(service, to)
    else:
        found = hook.rollback_entry(service, to)
        assert (found.run, found.outcome) == (goes, "deployed")


# === States and actions ===


def a_claimed_service(since: float) -> hook.Service:
    """The live Service of an app in which the run is being deployed since a time."""
    claim = {"phase": "preparing", "run": a_run().id, "since": since}
    notes = {"gitops-hook/deploying": json.dumps(claim)}
    meta = {"name": "shop", "resourceVersion": "3", "annotations": notes}
    return hook.Service({"metadata": meta, "spec": {"selector": {"app": "shop"}}})


OTHER = a_run(ref="refs/heads/topic/x")
PLAIN, TESTED = a_run("plain"), a_run("tested")
DONE, BUILT = (
    a_job("test", "succeeded", notes=NO_REPORT),
    a_job("build", "succeeded", notes={hook.ANNOTATION_DIGEST: DIGEST}),
)
LIVE = a_service(a_run().id, history_entry("deployed"))
SINCE = a_service("shop-other", history_entry("deployed", run="shop-other", colour="green"))
ENDED = {hook.ANNOTATION_OUTCOME: "failed", hook.ANNOTATION_ENDED: f"{NOW - 5}"}
BEFORE = {
    hook.ANNOTATION_OUTCOME: "failed",
    hook.ANNOTATION_ENDED: f"{NOW - 100}",
}  # before it was received
DOOMED = hook.PodProblem("k", Reason.IMAGE_NOT_FOUND, "image: not found", proof=hook.AT_ONCE)
SILENT = hook.PodProblem("k", Reason.NEVER_STARTED, 'Pulling image "x:1"', proof=hook.UNPROVEN)
NO_CLAIM = hook.PodProblem(
    "k", Reason.VOLUME_UNAVAILABLE, 'claim "pip-cache" not found', proof=hook.UNPROVEN
)


def ended(stage: str, uid: str = "", **states: Object) -> tuple[hook.Pod, ...]:
    names = {"main": "test-runner" if stage == "test" else "kaniko"}
    job = TEST if stage == "test" else BUILD
    of = {"uid": uid} if uid else {}
    return (a_pod(job, states={names.get(k, k): v for k, v in states.items()}, **of),)


Case = tuple[hook.Observation, Do, str, Any, str]
ACTIONS: dict[str, Case] = {
    # before a Job runs
    "nothing is there": (a_view(), Do.NOTHING, "", Reason.OK, ""),
    "a queued run is released": (
        a_view(a_job("test", "suspended")), Do.UNSUSPEND, "test", Reason.OK, ""),
    "git does not answer, and no place is free": (
        a_view(a_job("test", "suspended", since=9999), head="unknown", slot=False),
        Do.ASK_HEAD, "test", Reason.GIT_ERROR, "head"),
    "no place is free": (
        a_view(a_job("test", "suspended"), slot=False), Do.WAIT, "test", Reason.OK, "free slot"),
    "no place was free for too long": (
        a_view(a_job("test", "suspended", since=3601), slot=False),
        Do.END, "test", (Outcome.FAILED, Reason.QUEUE_TIMEOUT), "no free slot"),
    "a place is free after too long": (
        a_view(a_job("test", "suspended", since=9999)), Do.UNSUSPEND, "test", Reason.OK, ""),
    "a push that was stored for hours while the cluster was down": (
        a_view(a_job("test", "suspended", run=a_run(received=NOW - 9999)), slot=False),
        Do.WAIT, "test", Reason.OK, "free slot"),
    "git does not answer": (
        a_view(a_job("test", "suspended"), head="unknown"), Do.ASK_HEAD, "test", Reason.GIT_ERROR,
            "head"),
    "git does not answer for hours": (
        a_view(a_job("test", "suspended", since=9999), head="unknown"),
        Do.ASK_HEAD, "test", Reason.GIT_ERROR, "head"),
    "the branch moved on before release": (
        a_view(a_job("test", "suspended"), head="newer", slot=False),
        Do.END, "test", (Outcome.SUPERSEDED, Reason.NOT_HEAD), "pushed again"),
    "a deploy branch is judged by git, not by deliveries": (
        a_view(a_job("test", "suspended"), newer=True), Do.UNSUSPEND, "test", Reason.OK, ""),
    "a test branch was pushed again": (
        a_view(a_job("test", "suspended", run=OTHER), newer=True),
        Do.END, "test", (Outcome.SUPERSEDED, Reason.NOT_HEAD), ""),
    "a test branch needs no git": (
        a_view(a_job("test", "suspended", run=OTHER), head="unknown"),
        Do.UNSUSPEND, "test", Reason.OK, ""),
    "a test branch's head is nobody's business": (
        a_view(a_job("test", "suspended", run=OTHER), head="newer"),
        Do.UNSUSPEND, "test", Reason.OK, ""),
    "a test branch pushed again after release runs on": (
        a_view(a_job("test", run=OTHER), newer=True), Do.WAIT, "test", Reason.OK, "for its pod"),
    "a Job is being deleted": (
        a_view(a_job("test", deletionTimestamp=stamp(NOW))),
        Do.WAIT, "test", Reason.OK, "being deleted"),
    "a build Job is being deleted": (
        a_view(DONE, a_job("build", "succeeded", deletionTimestamp=stamp(NOW))),
        Do.WAIT, "build", Reason.OK, "being deleted"),
    # a test Job
    "its pod is not there yet": (a_view(a_job("test")), Do.WAIT, "test", Reason.OK, "for its pod"),
    "its pod waits for quota": (
        a_view(a_job("test", since=600, notes=EXCEEDED)),
        Do.WAIT, "test", Reason.OK, "exceeded quota: test-quota"),
    "its pod waited for quota too long": (
        a_view(a_job("test", since=3601, notes=EXCEEDED)),
        Do.END, "test", (Outcome.FAILED, Reason.QUEUE_TIMEOUT), "exceeded quota"),
    "no pod could start in time": (
        a_view(a_job("test", since=3601)),
        Do.END, "test", (Outcome.FAILED, Reason.QUEUE_TIMEOUT), "no pod"),
    "its pod runs": (
        a_view(a_job("test", since=5000), pods=(a_pod(TEST, started=899),)),
        Do.WAIT, "test", Reason.OK, "its pod runs"),
    "the tests take too long": (
        a_view(a_job("test", since=901), pods=(a_pod(TEST, started=901),)),
        Do.END, "test", (Outcome.FAILED, Reason.TIMEOUT), "900 s"),
    "a registry was silent for the whole time of the tests": (
        a_view(a_job("test", since=901), pods=(a_pod(TEST, started=901),), holdup=SILENT),
        Do.END, "test", (Outcome.FAILED, Reason.NEVER_STARTED), "Pulling image"),
    "a registry is silent": (
        a_view(a_job("test", since=899), pods=(a_pod(TEST, started=899),), holdup=SILENT),
        Do.WAIT, "test", Reason.OK, ""),
    "a claim was missing for the whole time of the queue": (
        a_view(a_job("test", since=3601), pods=(a_pod(TEST, started=0, created=9),),
            holdup=NO_CLAIM),
        Do.END, "test", (Outcome.FAILED, Reason.VOLUME_UNAVAILABLE), "pip-cache"),
    "no room in the cluster is no time of the tests": (
        a_view(a_job("test", since=3599), pods=(a_pod(TEST, started=0, created=9),),
            holdup=NO_CLAIM),
        Do.WAIT, "test", Reason.OK, ""),
    "waiting for quota is no time of the tests": (
        a_view(a_job("test", since=3000), pods=(a_pod(TEST, started=30),)),
        Do.WAIT, "test", Reason.OK, "runs"),
    "an evicted pod's time does not count for the next one": (
        a_view(a_job("test", since=1000), pods=(
            a_pod(TEST, name="old", started=950, conditions=[DISRUPTED]),
            a_pod(TEST, name="new", started=20))),
        Do.WAIT, "test", Reason.OK, "runs"),
    "a second pod has its own time": (
        a_view(a_job("test", since=1000), pods=(
            a_pod(TEST, name="old", started=950), a_pod(TEST, name="new", started=20))),
        Do.WAIT, "test", Reason.OK, "runs"),
    "what a container waits for are no last words": (
        a_view(a_job("test"), pods=ended("test", results=waiting("ErrImagePull", "no such host"))),
        Do.WAIT, "test", Reason.OK, "runs"),
    "another Job's pod says nothing": (
        a_view(a_job("test", since=30), pods=(a_pod("test-other", started=5000),)),
        Do.WAIT, "test", Reason.OK, "for its pod"),
    "a pod of a deleted Job of the same name says nothing": (
        a_view(a_job("test", since=30), pods=(a_pod(TEST, started=5000, uid="before"),)),
        Do.WAIT, "test", Reason.OK, "for its pod"),
    "the report of a deleted Job is not its successor's": (
        a_view(a_job("test"), pods=ended("test", "before", results=terminated(0, SUMMARY))),
        Do.WAIT, "test", Reason.OK, "for its pod"),
    "the digest of a deleted build is not its successor's": (
        a_view(DONE, a_job("build"), pods=ended("build", "before", main=terminated(0, DIGEST))),
        Do.WAIT, "build", Reason.OK, "for its pod"),
    "a pod that cannot heal": (
        a_view(a_job("test"), fatal_problem=DOOMED),
        Do.END, "test", (Outcome.FAILED, Reason.IMAGE_NOT_FOUND), "not found"),
    "a pod that cannot heal behind a Job that passed": (
        a_view(a_job("test", "succeeded", run=OTHER, notes=NO_REPORT), fatal_problem=DOOMED),
        Do.END, "test", (Outcome.TESTED, Reason.OK), ""),
    "the report is kept while the Job still ends": (
        a_view(a_job("test"), pods=ended("test", main=terminated(1), results=terminated(0,
            SUMMARY))),
        Do.ANNOTATE, "test", Reason.OK, SUMMARY),
    "the report is kept before a failure is told": (
        a_view(a_job("test", "failed"),
            pods=ended("test", main=terminated(1), results=terminated(0, SUMMARY))),
        Do.ANNOTATE, "test", Reason.OK, SUMMARY),
    "the report of an evicted pod is not the tests'": (
        a_view(a_job("test"), pods=(a_pod(TEST, states={"results": terminated(0, SUMMARY)},
            reason="Evicted"),)),
        Do.WAIT, "test", Reason.OK, ""),
    "tests failed, with a report": (
        a_view(a_job("test", "failed", notes={hook.ANNOTATION_SUMMARY: SUMMARY}),
            pods=ended("test", main=terminated(1))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "2 passed, 1 failed: t.test_x"),
    "tests failed, without a report": (
        a_view(a_job("test", "failed"), pods=ended("test", main=terminated(4))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 4"),
    "the side-car failed, too, and nobody asks": (
        a_view(a_job("test", "failed"), pods=ended("test", main=terminated(2),
            results=terminated(9))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 2"),
    "tests failed, and their report is clean": (
        a_view(a_job("test", "failed", notes=GREEN), pods=ended("test", main=terminated(3))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED),
        "^3 passed, 0 failed, but exit code 3$"),
    "tests failed, and their report was not read": (
        a_view(a_job("test", "failed", notes={hook.ANNOTATION_SUMMARY: UNREAD}),
            pods=ended("test", main=terminated(3))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), f"^exit code 3; {UNREAD}$"),
    "tests failed, and left no report": (
        a_view(a_job("test", "failed", notes=NO_REPORT), pods=ended("test", main=terminated(3))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "^exit code 3$"),
    "tests failed, and their pod is gone with the exit code": (
        a_view(a_job("test", "failed", reason="PodFailurePolicy", since=60, notes=GREEN)),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "^3 passed, 0 failed, but .*no res"),
    # tests that ended with exit code 0
    "a red report is kept though the tests exit with 0": (
        a_view(a_job("test", "succeeded"), pods=ended("test", main=terminated(0),
            results=terminated(0, SUMMARY))),
        Do.ANNOTATE, "test", Reason.OK, f"^{SUMMARY}$"),
    "a red report speaks though the tests exit with 0": (
        a_view(a_job("test", "succeeded", notes={hook.ANNOTATION_SUMMARY: SUMMARY})),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), f"^exit code 0, but {SUMMARY}$"),
    "a red report of a test branch": (
        a_view(a_job("test", "succeeded", run=OTHER, notes={hook.ANNOTATION_SUMMARY: SUMMARY})),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 0, but 2 passed"),
    "a red report of an app without a builder": (
        a_view(a_job("test", "succeeded", run=PLAIN, notes={hook.ANNOTATION_SUMMARY: SUMMARY})),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 0, but 2 passed"),
    "a red report beside a build that an older version began": (
        a_view(a_job("test", "succeeded", notes={hook.ANNOTATION_SUMMARY: SUMMARY}), BUILT),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 0, but 2 passed"),
    "a red report of what an older version is deploying": (
        a_view(a_job("test", "succeeded", notes={hook.ANNOTATION_SUMMARY: SUMMARY}), BUILT,
            services={"staging": a_claimed_service(NOW - 5)}),
        Do.DEPLOY, "staging", Reason.OK, ""),
    "a red report of what was deployed before it was pushed again": (
        a_view(a_job("test", "succeeded", notes={hook.ANNOTATION_SUMMARY: SUMMARY}), BUILT,
            services={"staging": a_claimed_service(NOW - 65)}),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 0, but 2 passed"),
    "a report that was not read speaks, too": (
        a_view(a_job("test", "succeeded", notes={hook.ANNOTATION_SUMMARY: UNREAD})),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), f"^exit code 0, but {UNREAD}$"),
    "a summary of an unknown kind is not green": (
        a_view(a_job("test", "succeeded", notes={hook.ANNOTATION_SUMMARY: "3 passed, 0 failed!"})),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 0, but"),
    "that there is no report need not be kept before the run goes on": (
        a_view(a_job("test", "succeeded"), pods=ended("test", main=terminated(0),
            results=terminated(0, hook.NO_REPORT))),
        Do.BUILD, "build", Reason.OK, ""),
    "the side-car of an older version left no word where there was no report": (
        a_view(a_job("test", "succeeded"), pods=ended("test", main=terminated(0),
            results=terminated(0))),
        Do.BUILD, "build", Reason.OK, ""),
    "no word of the side-car while the Job still ends": (
        a_view(a_job("test"), pods=ended("test", main=terminated(0), results=terminated(0))),
        Do.WAIT, "test", Reason.OK, "its pod runs"),
    "the side-car of a pod whose tests never began has seen no report": (
        a_view(a_job("test"), pods=ended("test", clone=terminated(1),
            results=terminated(0, hook.NO_REPORT))),
        Do.WAIT, "test", Reason.OK, "its pod runs"),
    "the side-car was killed before it could read a report": (
        a_view(a_job("test", "succeeded"), pods=ended("test", main=terminated(0),
            results=terminated(137))),
        Do.ANNOTATE, "test", Reason.OK, "lost: container results ended with exit code 137"),
    "the pod's watch is behind that of a Job which succeeded": (
        a_view(a_job("test", "succeeded", since=3)), Do.WAIT, "test", Reason.OK, "report"),
    "the pod of tests is gone before anybody read what it left": (
        a_view(a_job("test", "succeeded", since=60)), Do.ANNOTATE, "test", Reason.OK, f"^{LOST}$"),
    "what tests said is lost": (
        a_view(a_job("test", "succeeded", since=60, notes={hook.ANNOTATION_SUMMARY: LOST})),
        Do.END, "test", (Outcome.FAILED, Reason.VANISHED), f"^{LOST}$"),
    "the pod of tests is gone whose build an older version began": (
        a_view(a_job("test", "succeeded", since=60), a_job("build")),
        Do.WAIT, "build", Reason.OK, "for its pod"),
    "the pod of tests is gone of what an older version has deployed to staging": (
        a_view(a_job("test", "succeeded", run=PLAIN, since=60), services={
            "staging": a_service(PLAIN.id, history_entry("deployed", run=PLAIN.id))}),
        Do.DEPLOY, "production", Reason.OK, ""),
    "the pod of tests is gone of what an older version is deploying": (
        a_view(a_job("test", "succeeded", since=60),
            services={"staging": a_claimed_service(NOW - 5)}),
        Do.BUILD, "build", Reason.OK, ""),
    "the pod of tests is gone of what was deployed before it was pushed again": (
        a_view(a_job("test", "succeeded", run=PLAIN, since=60), services={
            "staging": a_service(PLAIN.id, history_entry("deployed", run=PLAIN.id, ago=99))}),
        Do.ANNOTATE, "test", Reason.OK, f"^{LOST}$"),
    "a red report of what an older version has deployed to staging": (
        a_view(a_job("test", "succeeded", run=PLAIN, notes={hook.ANNOTATION_SUMMARY: SUMMARY}),
            services={"staging": a_service(PLAIN.id, history_entry("deployed", run=PLAIN.id))}),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 0, but 2 passed"),
    "the pod of tests is gone, beside a build of before": (
        a_view(a_job("test", "succeeded", since=60), a_job("build", "failed", notes=ENDED)),
        Do.NOTHING, "", Reason.OK, ""),
    "green tests without a report of a run that was live after them go again": (
        a_view(a_job("test", "succeeded", since=90), services={"staging": a_service("other",
            history_entry("rolled-back", ago=50))},
            run=a_run(received=NOW - 20)),
        Do.BUILD, "build", Reason.OK, ""),
    "what a run was before its tests were made anew does not tell of these": (
        a_view(a_job("test", "succeeded", since=40), services={"staging": a_service("other",
            history_entry("rolled-back", ago=50))},
            run=a_run(received=NOW - 45)),
        Do.ANNOTATE, "test", Reason.OK, f"^{LOST}$"),
    "the pod of tests made anew is gone, beside a build of before": (
        a_view(a_job("test", "succeeded", since=60), a_job("build", "failed", notes=BEFORE)),
        Do.ANNOTATE, "test", Reason.OK, f"^{LOST}$"),
    "a second pod's red report counts after a first pod's green one": (
        a_view(a_job("test", "succeeded", notes=GREEN), pods=(
            a_pod(TEST, name="first", started=90, states={"test-runner": terminated(0),
                "results": terminated(0, "3 passed, 0 failed")}),
            a_pod(TEST, name="second", started=20, states={"test-runner": terminated(0),
                "results": terminated(0, SUMMARY)}))),
        Do.ANNOTATE, "test", Reason.OK, f"^{SUMMARY}$"),
    "a first pod's red report counts after a second pod's green one": (
        a_view(a_job("test", "succeeded"), pods=(
            a_pod(TEST, name="first", started=90, states={"test-runner": terminated(0),
                "results": terminated(0, SUMMARY)}),
            a_pod(TEST, name="second", started=20, states={"test-runner": terminated(0),
                "results": terminated(0, "3 passed, 0 failed")}))),
        Do.ANNOTATE, "test", Reason.OK, f"^{SUMMARY}$"),
    "a first pod whose report is lost says nothing against a second one": (
        a_view(a_job("test", "succeeded"), pods=(
            a_pod(TEST, name="first", started=90, states={"test-runner": terminated(0),
                "results": terminated(137)}),
            a_pod(TEST, name="second", started=20, states={"test-runner": terminated(0),
                "results": terminated(0, "3 passed, 0 failed")}))),
        Do.ANNOTATE, "test", Reason.OK, "^3 passed, 0 failed$"),
    "a red report that is kept stays": (
        a_view(a_job("test", "succeeded", notes={hook.ANNOTATION_SUMMARY: SUMMARY}),
            pods=ended("test", main=terminated(0), results=terminated(0, "1 passed, 1 failed"))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), SUMMARY),
    # what still runs
    "a proxy that a mesh added runs after green tests": (
        a_view(a_job("test", since=901), pods=(a_pod(TEST, started=901, states={
            "results": RUNNING, "test-runner": terminated(0), "istio-proxy": RUNNING}),)),
        Do.END, "test", (Outcome.FAILED, Reason.TIMEOUT),
        "^container istio-proxy still runs after 900 s$"),
    "two proxies run after green tests": (
        a_view(a_job("test", since=901), pods=(a_pod(TEST, started=901, states={
            "results": RUNNING, "test-runner": terminated(0), "proxy": RUNNING,
            "agent": RUNNING}),)),
        Do.END, "test", (Outcome.FAILED, Reason.TIMEOUT),
        "^containers proxy, agent still run after 900 s$"),
    "the tests run beside a proxy": (
        a_view(a_job("test", since=901), pods=(a_pod(TEST, started=901, states={
            "results": RUNNING, "istio-proxy": RUNNING, "test-runner": RUNNING}),)),
        Do.END, "test", (Outcome.FAILED, Reason.TIMEOUT),
        "^container test-runner still runs after 900 s$"),
    "the clone takes too long": (
        a_view(a_job("test", since=901), pods=(a_pod(TEST, started=901, states={
            "results": RUNNING, "clone": RUNNING,
            "test-runner": waiting("PodInitializing")}),)),
        Do.END, "test", (Outcome.FAILED, Reason.TIMEOUT), "^container clone still runs after"),
    "the backstop ended a Job whose tests were over": (
        a_view(a_job("test", "failed", reason="DeadlineExceeded"), pods=(
            a_pod(TEST, states={"test-runner": terminated(0, at=NOW - 60),
                "istio-proxy": terminated(143)}, meta={"deletionTimestamp": stamp(NOW)}),)),
        Do.END, "test", (Outcome.FAILED, Reason.TIMEOUT),
        "^the Job's deadline passed: container istio-proxy still runs$"),
    "the tests were killed for their memory": (
        a_view(a_job("test", "failed"), pods=ended("test", main=terminated(137,
            reason="OOMKilled"))),
        Do.END, "test", (Outcome.FAILED, Reason.OUT_OF_MEMORY), "memory"),
    "the commit could not be fetched": (
        a_view(a_job("test", "failed"), pods=ended("test", clone=terminated(1,
            "git fetch: not our ref"))),
        Do.END, "test", (Outcome.FAILED, Reason.CLONE_FAILED), "not our ref"),
    "the commit has what nobody has decided on": (
        a_view(a_job("test", "failed"), pods=ended("test", clone=terminated(3,
            "The commit has submodules (x)."))),
        Do.END, "test", (Outcome.FAILED, Reason.CLONE_REFUSED), "has submodules"),
    "the build's commit has what nobody has decided on": (
        a_view(a_job("build", "failed"), pods=ended("build", clone=terminated(3, "files in LFS"))),
        Do.END, "build", (Outcome.FAILED, Reason.CLONE_REFUSED), "files in LFS"),
    "tests that end like a refusal": (
        a_view(a_job("test", "failed"), pods=ended("test", main=terminated(3))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 3"),
    "the clone left no word": (
        a_view(a_job("test", "failed"), pods=ended("test", clone=terminated(128))),
        Do.END, "test", (Outcome.FAILED, Reason.CLONE_FAILED), "exit code 128"),
    "the newest pod tells": (
        a_view(a_job("test", "failed"), pods=(
            a_pod(TEST, name="first", started=90, states={"clone": terminated(1, "no answer")}),
            a_pod(TEST, name="second", started=20, states={"test-runner": terminated(3)}))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 3"),
    "the machine went away under the tests": (
        a_view(a_job("test", "failed", since=60),
            pods=ended("test", main=terminated(137, reason="ContainerStatusUnknown"))),
        Do.END, "test", (Outcome.FAILED, Reason.VANISHED), "no result"),
    "the machine was restarted under the tests": (
        a_view(a_job("test", "failed", reason="PodFailurePolicy", since=60),
            pods=ended("test", main=terminated(255, reason="Unknown"))),
        Do.END, "test", (Outcome.FAILED, Reason.VANISHED), "no result"),
    "the pod of the tests is being deleted by hand": (
        a_view(a_job("test", "failed", reason="PodFailurePolicy", since=60), pods=(
            a_pod(TEST, states={"test-runner": terminated(143)},
                meta={"deletionTimestamp": stamp(NOW)}),)),
        Do.END, "test", (Outcome.FAILED, Reason.VANISHED), "no result"),
    "tests have failed, and the watch does not show the end of the side-car yet": (
        a_view(a_job("test", "failed", since=2), pods=ended("test", results=RUNNING,
            main=terminated(1))),
        Do.WAIT, "test", Reason.OK, "the test report"),
    "tests have failed, and the end of the side-car never shows": (
        a_view(a_job("test", "failed", since=60), pods=ended("test", results=RUNNING,
            main=terminated(1))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 1"),
    "the backstop ended the Job": (
        a_view(a_job("test", "failed", reason="DeadlineExceeded")),
        Do.END, "test", (Outcome.FAILED, Reason.TIMEOUT), "deadline"),
    "the backstop killed the tests": (
        a_view(a_job("test", "failed", reason="DeadlineExceeded"), pods=(
            a_pod(TEST, states={"test-runner": terminated(137)},
                meta={"deletionTimestamp": stamp(NOW)}),)),
        Do.END, "test", (Outcome.FAILED, Reason.TIMEOUT),
        "^the Job's deadline passed: container test-runner still runs$"),
    "a Job has failed and its pod's watch is behind": (
        a_view(a_job("test", "failed", reason="PodFailurePolicy", since=2)),
        Do.WAIT, "test", Reason.OK, "last words"),
    "a Job has failed by its policy and its pod is gone": (
        a_view(a_job("test", "failed", reason="PodFailurePolicy", since=60)),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "no result"),
    "a Job has failed and all its pods are gone": (
        a_view(a_job("test", "failed", reason="BackoffLimitExceeded", since=60)),
        Do.END, "test", (Outcome.FAILED, Reason.VANISHED), "BackoffLimitExceeded"),
    "a Job has failed while its image was never there": (
        a_view(a_job("test", "failed", reason="DeadlineExceeded"), fatal_problem=DOOMED),
        Do.END, "test", (Outcome.FAILED, Reason.IMAGE_NOT_FOUND), "not found"),
    # after green tests
    "a test branch is green": (
        a_view(a_job("test", "succeeded", run=OTHER, notes=GREEN)),
        Do.END, "test", (Outcome.TESTED, Reason.OK), "^3 passed, 0 failed$"),
    "a test branch is green, without a report": (
        a_view(a_job("test", "succeeded", run=OTHER, notes=NO_REPORT)),
        Do.END, "test", (Outcome.TESTED, Reason.OK), "^$"),
    "an app without environments is only tested": (
        a_view(a_job("test", "succeeded", run=TESTED, notes=GREEN)),
        Do.END, "test", (Outcome.TESTED, Reason.OK), ""),
    "green tests are built": (a_view(DONE), Do.BUILD, "build", Reason.OK, ""),
    "a build waits for a place": (
        a_view(DONE, slot=False), Do.WAIT, "build", Reason.OK, "free slot"),
    "a build waits for git": (
        a_view(DONE, head="unknown"), Do.ASK_HEAD, "build", Reason.GIT_ERROR, "head"),
    "nothing is built of a branch that moved on": (
        a_view(DONE, head="newer"), Do.END, "build", (Outcome.SUPERSEDED, Reason.NOT_HEAD), ""),
    "without a builder there is nothing to build": (
        a_view(a_job("test", "succeeded", run=PLAIN, notes=GREEN)),
        Do.DEPLOY, "staging", Reason.OK, ""),
    "a build runs": (a_view(DONE, a_job("build")), Do.WAIT, "build", Reason.OK, "for its pod"),
    "a suspended build is released": (
        a_view(DONE, a_job("build", "suspended")), Do.UNSUSPEND, "build", Reason.OK, ""),
    "a build takes too long": (
        a_view(DONE, a_job("build"), pods=(a_pod(BUILD, started=1201),)),
        Do.END, "build", (Outcome.FAILED, Reason.TIMEOUT), "1200 s"),
    "a build failed, and what it printed is not told": (
        a_view(DONE, a_job("build", "failed"), pods=ended("build", main=terminated(1, "no FROM"))),
        Do.END, "build", (Outcome.FAILED, Reason.BUILD_FAILED), "exit code 1"),
    "a registry did not take what was built": (
        a_view(DONE, a_job("build", "failed"),
            pods=ended("build", main=terminated(1, f"INFO[0001] COPY\n{NOT_PUSHED}\n<html>\n"))),
        Do.END, "build", (Outcome.FAILED, Reason.REGISTRY_UNAVAILABLE), "could not be pushed"),
    "a build that could not be started is told in the runtime's words": (
        a_view(DONE, a_job("build", "failed"),
            pods=ended("build", main=terminated(128, "no such file", "StartError"))),
        Do.END, "build", (Outcome.FAILED, Reason.BUILD_FAILED), "no such file"),
    "a build failed after a green report": (
        a_view(a_job("test", "succeeded", notes=GREEN), a_job("build",
            "failed"),
            pods=ended("build", main=terminated(1))),
        Do.END, "build", (Outcome.FAILED, Reason.BUILD_FAILED), "exit code 1"),
    "a build's pods vanished after a green report": (
        a_view(a_job("test", "succeeded", notes=GREEN), a_job("build",
            "failed", since=60)),
        Do.END, "build", (Outcome.FAILED, Reason.VANISHED), "no result"),
    "a digest is kept": (
        a_view(DONE, a_job("build", "succeeded"), pods=ended("build", main=terminated(0,
            DIGEST + "\n"))),
        Do.ANNOTATE, "build", Reason.OK, DIGEST),
    "a digest is kept while the Job still ends": (
        a_view(DONE, a_job("build"), pods=ended("build", main=terminated(0, DIGEST))),
        Do.ANNOTATE, "build", Reason.OK, DIGEST),
    "last words that are no digest": (
        a_view(DONE, a_job("build", "succeeded", since=60), pods=ended("build",
            main=terminated(0, "sha256:1"))),
        Do.BUILD, "build", Reason.OK, ""),
    "a build is complete and its pod's watch is behind": (
        a_view(DONE, a_job("build", "succeeded", since=3)), Do.WAIT, "build", Reason.OK, "digest"),
    "a digest is lost": (
        a_view(DONE, a_job("build", "succeeded", since=60)), Do.BUILD, "build", Reason.OK, ""),
    "a digest is lost and no place is free": (
        a_view(DONE, a_job("build", "succeeded", since=60), slot=False),
        Do.WAIT, "build", Reason.OK, "free slot"),
    "a digest is lost twice": (
        a_view(DONE, a_job("build", "succeeded", since=60, notes={hook.ANNOTATION_REMADE: "1"})),
        Do.END, "build", (Outcome.FAILED, Reason.NO_DIGEST), "twice"),
    "the test Job has gone by its time to live": (
        a_view(BUILT), Do.DEPLOY, "staging", Reason.OK, ""),
    "a test Job made anew beside a build is not left behind": (
        a_view(a_job("test", "suspended"), BUILT), Do.UNSUSPEND, "test", Reason.OK, ""),
    # into the environments
    "the first environment": (a_view(DONE, BUILT), Do.DEPLOY, "staging", Reason.OK, ""),
    "an environment is busy": (
        a_view(DONE, BUILT, busy=frozenset({"staging"})), Do.WAIT, "staging", Reason.OK, "changed"),
    "git does not answer before an environment": (
        a_view(DONE, BUILT, head="unknown"), Do.ASK_HEAD, "staging", Reason.GIT_ERROR, "head"),
    "the branch moved on before an environment": (
        a_view(DONE, BUILT, head="newer"),
        Do.END, "staging", (Outcome.SUPERSEDED, Reason.NOT_HEAD), ""),
    "the second environment": (
        a_view(DONE, BUILT, services={"staging": LIVE, "production": SINCE}),
        Do.DEPLOY, "production", Reason.OK, ""),
    "the branch moved on between environments": (
        a_view(DONE, BUILT, services={"staging": LIVE}, head="newer"),
        Do.END, "production", (Outcome.SUPERSEDED, Reason.NOT_HEAD), ""),
    "live in staging, and someone works there": (
        a_view(DONE, BUILT, services={"staging": LIVE}, busy=frozenset({"staging"})),
        Do.DEPLOY, "production", Reason.OK, ""),
    "live in all": (
        a_view(DONE, BUILT, services={"staging": LIVE, "production": LIVE}, head="newer"),
        Do.END, "production", (Outcome.DEPLOYED, Reason.OK), ""),
    "live in all, and its test Job has gone by its time to live": (
        a_view(BUILT, services={"staging": LIVE, "production": LIVE}),
        Do.END, "production", (Outcome.DEPLOYED, Reason.OK), ""),
    "switched, not yet concluded, and git does not answer": (
        a_view(DONE, BUILT, head="unknown", services={"staging": a_service(a_run().id,
            history_entry(""))}),
        Do.DEPLOY, "staging", Reason.OK, ""),
    "switched, not yet concluded, and the branch moved on": (
        a_view(DONE, BUILT, head="newer", services={"staging": a_service(a_run().id,
            history_entry(""))}),
        Do.DEPLOY, "staging", Reason.OK, ""),
    "switched, and its history is broken": (
        a_view(DONE, BUILT, head="newer", services={"staging": a_service(a_run().id)}),
        Do.DEPLOY, "staging", Reason.OK, ""),
    "live from an earlier delivery of the same commit": (
        a_view(DONE, BUILT, services={"staging": a_service(a_run().id, history_entry("deployed",
            ago=9999))}),
        Do.DEPLOY, "production", Reason.OK, ""),
    "taken back after this delivery": (
        a_view(DONE, BUILT, services={"staging": LIVE, "production": a_service("shop-other",
            history_entry("deployed", run="shop-other", colour="green"),
            history_entry("switched-back", reason="UnhealthyAfterSwitch", detail="exit code 3"))}),
        Do.END, "production", UNHEALTHY, "exit code 3"),
    "taken back before this delivery": (
        a_view(DONE, BUILT, services={"staging": a_service("shop-other",
            history_entry("deployed", run="shop-other"), history_entry("switched-back", ago=100))}),
        Do.DEPLOY, "staging", Reason.OK, ""),
    "rolled back by a person after this delivery": (
        a_view(DONE, BUILT, services={"staging": a_service("shop-other",
            history_entry("rolled-back", reason="RolledBack"))}),
        Do.END, "staging", (Outcome.ROLLED_BACK, Reason.ROLLED_BACK), ""),
    "failed at its endpoints after this delivery": (
        a_view(DONE, BUILT, services={"staging": a_service("shop-other",
            history_entry("failed", reason="EndpointsMissing"))}),
        Do.END, "staging", (Outcome.FAILED, Reason.ENDPOINTS_MISSING), ""),
    "taken back for a reason that nobody knows": (
        a_view(DONE, BUILT, services={"staging": a_service("shop-other",
            history_entry("switched-back", reason="Moon"))}),
        Do.END, "staging", (Outcome.SWITCHED_BACK, Reason.UNHEALTHY_AFTER_SWITCH), ""),
    "taken back, and the worker still writes it down": (
        a_view(DONE, BUILT, busy=frozenset({"staging"}),
            services={"staging": a_service("shop-other",
            history_entry("switched-back"))}),
        Do.WAIT, "staging", Reason.OK, "changed"),
    "taken back, delivered again and switched to again": (
        a_view(DONE, BUILT, services={"staging": a_service(a_run().id,
            history_entry("", ago=2), history_entry("switched-back", ago=100))}),
        Do.DEPLOY, "staging", Reason.OK, ""),
    # after its end
    "a run that has ended": (
        a_view(a_job("test", "failed", notes=ENDED)), Do.NOTHING, "", Reason.OK, ""),
    "a run that has ended, told by its last Job": (
        a_view(DONE, a_job("build", "failed", notes=ENDED)), Do.NOTHING, "", Reason.OK, ""),
    "a run that has ended and whose test Job has gone by its time to live": (
        a_view(a_job("build", "failed", notes=ENDED)), Do.NOTHING, "", Reason.OK, ""),
    "a run that has ended and whose Job is being deleted": (
        a_view(a_job("test", notes=ENDED, deletionTimestamp=stamp(NOW))),
        Do.NOTHING, "", Reason.OK, ""),
    "an end that was not written on the last Job is written once more": (
        a_view(a_job("test", "succeeded", notes=ENDED), a_job("build", "failed", since=60)),
        Do.END, "build", (Outcome.FAILED, Reason.VANISHED), ""),
    # opened again, its last Job first
    "opened again as far as its build": (
        a_view(a_job("test", "succeeded", run=a_run(received=NOW - 200), notes=BEFORE), BUILT,
            run=a_run()),
        Do.DEPLOY, "staging", Reason.OK, ""),
    # opened again, when only the build of the time before is left
    "opened again beside a failed build of before": (
        a_view(a_job("test", "suspended"), a_job("build", "failed", notes=BEFORE)),
        Do.UNSUSPEND, "test", Reason.OK, ""),
    "opened again beside a green build of before": (
        a_view(a_job("test"), a_job("build", "succeeded", notes={hook.ANNOTATION_DIGEST: DIGEST,
            **BEFORE})),
        Do.WAIT, "test", Reason.OK, "for its pod"),
    "a failed build of before is made anew": (
        a_view(DONE, a_job("build", "failed", notes=BEFORE)), Do.BUILD, "build", Reason.OK, ""),
    "a green build of before is made anew, its time to live runs": (
        a_view(DONE, a_job("build", "succeeded", notes={hook.ANNOTATION_DIGEST: DIGEST, **BEFORE})),
        Do.BUILD, "build", Reason.OK, ""),
    "a build of before that is being deleted is made anew": (
        a_view(DONE, a_job("build", notes=BEFORE, deletionTimestamp=stamp(NOW))),
        Do.BUILD, "build", Reason.OK, ""),
    "a build of before waits for a place": (
        a_view(DONE, a_job("build", "failed", notes=BEFORE), slot=False),
        Do.WAIT, "build", Reason.OK, "free slot"),
    "the tests fail beside a build of before": (
        a_view(a_job("test", "failed"), a_job("build", "failed", notes=BEFORE),
            pods=ended("test", main=terminated(1))),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), "exit code 1"),
}  # fmt: skip

REFUSAL = hook.fails(Reason.MANIFEST_REFUSED, "no host ports", "production")
REFUSED = {"reading": hook.Reading(done=True, end=REFUSAL)}
UNDER_WAY = {"reading": hook.Reading(under_way=True)}
CLAIMED = {"staging": a_claimed_service(NOW - 5)}
BY_MANIFESTS = (Outcome.FAILED, Reason.MANIFEST_REFUSED)
ACTIONS |= {
    "the manifests of a queued run are refused": (
        a_view(a_job("test", "suspended"), slot=False, **REFUSED),
        Do.END, "production", BY_MANIFESTS, "no host ports"),
    "manifests are refused while git does not answer": (
        a_view(a_job("test", "suspended"), head="unknown", **REFUSED),
        Do.END, "production", BY_MANIFESTS, ""),
    "manifests are refused while the tests run": (
        a_view(a_job("test"), **REFUSED), Do.END, "production", BY_MANIFESTS, "no host ports"),
    "manifests are refused that a test branch has": (
        a_view(a_job("test", "succeeded", run=OTHER, notes=GREEN), **REFUSED),
        Do.END, "test", (Outcome.TESTED, Reason.OK), ""),
    "tests failed before the manifests were refused": (
        a_view(a_job("test", "failed"), pods=ended("test", main=terminated(1)), **REFUSED),
        Do.END, "test", (Outcome.FAILED, Reason.TESTS_FAILED), ""),
    "manifests are refused before the build": (
        a_view(DONE, **REFUSED), Do.END, "production", BY_MANIFESTS, ""),
    "manifests are refused while the build runs": (
        a_view(DONE, a_job("build"), **REFUSED), Do.END, "production", BY_MANIFESTS, ""),
    "manifests are refused before anything is deployed": (
        a_view(DONE, BUILT, **REFUSED), Do.END, "production", BY_MANIFESTS, ""),
    "a deployment that has begun is not stopped half-way by manifests": (
        a_view(DONE, BUILT, services=CLAIMED, **REFUSED), Do.DEPLOY, "staging", Reason.OK, ""),
    "what is live in staging is not stopped by the manifests of production": (
        a_view(DONE, BUILT, services={"staging": a_service(a_run().id, history_entry("deployed"))},
            **REFUSED),
        Do.DEPLOY, "production", Reason.OK, ""),
    "an environment that a worker changes is left to it": (
        a_view(DONE, BUILT, busy=frozenset({"staging"}), **REFUSED),
        Do.WAIT, "staging", Reason.OK, "being changed"),
    "manifests of a run that has ended are refused": (
        a_view(a_job("test", notes=ENDED), **REFUSED), Do.NOTHING, "", Reason.OK, ""),
    "manifests are read while the tests run": (
        a_view(a_job("test"), **UNDER_WAY), Do.WAIT, "test", Reason.OK, "for its pod"),
    "manifests are read while the build may start": (
        a_view(DONE, **UNDER_WAY), Do.BUILD, "build", Reason.OK, ""),
    "manifests are read when all is ready to be deployed": (
        a_view(DONE, BUILT, **UNDER_WAY), Do.WAIT, "staging", Reason.OK, "manifests to be read"),
    "manifests that nothing is refused of": (
        a_view(DONE, BUILT, reading=hook.Reading(done=True)),
        Do.DEPLOY, "staging", Reason.OK, ""),
}  # fmt: skip


@pytest.mark.parametrize(
    ("printed", "trouble"),
    [
        (NOT_PUSHED, "could not be pushed"),
        ("error pushing image: failed to push to destination r/x:1: UNAUTHORIZED: no", "pushed"),
        (f"error checking push permissions -- make sure {AWAY}", "could not be pushed"),
        (f"error building image: {AWAY}", "could not be pulled"),
        ("error building image: GET https://r/v2/x: unsupported status code 503;", "pulled"),
        ("error building image: GET https://r/v2/x: TOOMANYREQUESTS: slow down", "pulled"),
        ("error building image: Get https://r/v2/: dial tcp 1.2.3.4:443: i/o timeout", "pulled"),
        ("error building image: GET https://r/v2/x: MANIFEST_UNKNOWN: no such tag", ""),
        ("error building image: UNAUTHORIZED: authentication required", ""),
        (f"error building image: failed to execute command: exit status 7: {AWAY}", ""),
        (f"{NOT_PUSHED}\nerror building image: failed to execute command: exit status 1", ""),
        (f"curl: {AWAY}", ""),
        ("error building image: failed to get fileinfo for /src/timed-out: lstat: no such", ""),
        ("error building image: dockerfile parse error line 3: unknown instruction: TIMEOUT", ""),
        ('error building image: resolving "timeout": no such tag', ""),
        ("", ""),
    ],
)
def test_only_what_no_dockerfile_can_help_is_the_registrys_fault(
    printed: str, trouble: str
) -> None:
    seen = hook.registry_trouble(f"INFO[0000] Retrieving image\n{printed}\n")
    assert trouble in seen
    assert bool(seen) is bool(trouble)


@pytest.mark.parametrize(
    ("view", "reads"),
    [
        (a_view(a_job("test", "suspended")), True),
        (a_view(a_job("test", "suspended"), slot=False), True),
        (a_view(a_job("test"), head="unknown"), True),
        (a_view(DONE, a_job("build")), True),
        (a_view(a_job("test"), newer=True), True),
        (a_view(a_job("test"), newer=True, head="unknown"), False),
        (a_view(a_job("test"), head="newer"), False),
        (a_view(a_job("test"), **UNDER_WAY), False),
        (a_view(a_job("test"), reading=hook.Reading(done=True)), False),
        (a_view(DONE, BUILT), False),
        (a_view(a_job("test", run=OTHER)), False),
        (a_view(a_job("test", run=a_run("tested"))), False),
        (a_view(a_job("test", "failed"), pods=ended("test", main=terminated(1))), False),
        (a_view(a_job("test", notes=ENDED)), False),
        (a_view(), False),
    ],
    ids=[
        "it is queued", "it waits for a slot", "its tests run", "it is built",
        "git shows it, whatever was pushed", "it was pushed again", "it is outdated",
        "they are read", "they were read", "it is deployed, which reads them",
        "it is only tested", "its app is deployed nowhere", "its tests failed", "it has ended",
        "it has no Job",
    ],
)  # fmt: skip
def test_manifests_are_read_once_beside_the_tests_of_what_may_be_deployed(
    view: hook.Observation, *, reads: bool
) -> None:
    assert hook.reads_manifests(view, hook.decide(view)) is reads


def faults(*texts: str, invalid: bool = False) -> list[hook.Fault]:
    reason = Reason.MANIFEST_INVALID if invalid else Reason.MANIFEST_REFUSED
    return [hook.Fault(text, reason) for text in texts]


@pytest.mark.parametrize(
    ("staging", "production", "stage", "reason", "detail"),
    [
        ([], [], "", "", ""),
        (faults("a", "b"), faults("b", "a"), "staging", "ManifestRefused", "a\nb"),
        ([], faults("a"), "production", "ManifestRefused", "production: a"),
        (faults("a", "b"), faults("b", "c"), "staging", "ManifestRefused",
            "staging: a\nb\nproduction: c"),
        (faults("a", invalid=True), [], "staging", "ManifestInvalid", "staging: a"),
        (faults("a", invalid=True), faults("b"), "staging", "ManifestRefused",
            "staging: a\nproduction: b"),
    ],
)  # fmt: skip
def test_what_all_environments_refuse_is_said_once(
    staging: list[hook.Fault], production: list[hook.Fault], stage: str, reason: str, detail: str
) -> None:
    end = hook.end_by_faults({"staging": staging, "production": production})
    if not detail:
        assert end is None
    else:
        assert end == hook.fails(Reason(reason), detail, stage)


@pytest.mark.parametrize("state", ACTIONS)
def test_each_state_has_its_next_step(state: str) -> None:
    view, do, stage, expected, detail = ACTIONS[state]
    action = hook.decide(view)
    outcome, reason = expected if isinstance(expected, tuple) else (None, expected)
    assert (action.do, action.stage, action.outcome, action.reason) == (do, stage, outcome, reason)
    assert re.search(detail, action.detail)


def test_every_step_and_every_outcome_is_in_the_table() -> None:
    decided = [hook.decide(view) for view, *_ in ACTIONS.values()]
    assert {action.do for action in decided} == set(Do)
    assert {action.outcome for action in decided} == {None, *Outcome}


def test_deciding_twice_gives_the_same() -> None:
    for view, *_ in ACTIONS.values():
        assert hook.decide(view) == hook.decide(view)


# === What git says ===

ZERO = "0" * 40


@pytest.mark.parametrize(
    ("heads", "age", "run", "word"),
    [
        ({"refs/heads/main": A}, 0, {}, "same"),
        ({"refs/heads/main": B}, 0, {}, "newer"),
        ({}, 0, {}, "newer"),
        (None, 0, {}, "unknown"),
        ({"refs/heads/main": A}, 11, {}, "unknown"),
        ({"refs/heads/main": B}, 0, {"before": B, "received": NOW - 5}, "unknown"),
        ({"refs/heads/main": B}, 0, {"before": B, "received": NOW - 301}, "newer"),
        ({"refs/heads/main": B}, 0, {"before": "c" * 40, "received": NOW - 5}, "newer"),
        ({}, 0, {"before": B, "received": NOW - 5}, "newer"),
        ({}, 0, {"before": ZERO, "received": NOW - 5}, "unknown"),
        ({}, 0, {"before": ZERO, "received": NOW - 301}, "newer"),
        ({"refs/heads/main": A}, 0, {"before": A, "received": NOW - 5}, "same"),
        ({"refs/heads/other": A}, 0, {"before": B}, "newer"),
    ],
    ids=[
        "head", "other head", "branch gone", "git silent", "too old", "server lags behind its push",
        "server lags too long", "pushed again at once", "deleted at once",
        "new branch not shown yet", "new branch never shown",
        "pushed again unchanged", "another branch",
    ],
)  # fmt: skip
def test_what_git_says_about_a_run(
    heads: dict[str, str] | None, age: float, run: Object, word: str
) -> None:
    assert hook.head_of(a_run(**run), heads, age, NOW) == word


C = "c" * 40


@pytest.mark.parametrize(
    ("before", "age", "word"),
    [
        ({C: B}, 3.0, "unknown"),
        ({C: B}, 299.0, "unknown"),
        ({C: B}, 301.0, "newer"),
        ({}, 3.0, "newer"),
        ({C: "d" * 40, "d" * 40: B}, 3.0, "unknown"),
        ({C: "d" * 40, "d" * 40: C}, 3.0, "newer"),
    ],
    ids=[
        "two pushes", "long behind", "too long behind", "a commit that nobody announced",
        "three pushes", "pushes in a circle",
    ],
)  # fmt: skip
def test_a_server_that_shows_a_commit_from_before_several_pushes_is_behind(
    before: dict[str, str], age: float, word: str
) -> None:
    run = a_run(before=C, received=NOW - age)
    older = hook.commits_before(run, before)
    assert hook.head_of(run, {"refs/heads/main": B}, 0, NOW, older) == word


# === Reasons ===


@pytest.mark.parametrize("reason", hook.Reason)
def test_each_reason_is_a_verdict_or_a_circumstance_and_has_one_sentence_of_advice(
    reason: hook.Reason,
) -> None:
    tables = (hook.VERDICTS, hook.PASSING_CIRCUMSTANCES, hook.FINAL_CIRCUMSTANCES)
    assert sum(reason in table for table in tables) == 1
    assert reason.is_verdict is (reason in hook.VERDICTS)
    assert re.fullmatch(r"[A-Z][^!?]+\.", reason.advice)
    assert reason.advice.count(". ") == 0
    assert len(reason.advice.split()) <= 25


def test_no_reason_is_missing_from_the_tables_and_none_is_there_that_does_not_exist() -> None:
    assert hook.VERDICTS.keys() | hook.CIRCUMSTANCES.keys() == set(hook.Reason)


# === Slots ===


def pushed(words: str) -> list[hook.Run]:
    """Runs by words: the app, in capitals for its deploy branch, and when it was pushed."""
    return [
        hook.Run(id=word, app=word[0].lower(), ref=word[0], commit="", received=float(word[-1]))
        for word in words.split()
    ]


def granted_slots(
    wanted: list[hook.Run], running: list[hook.Run], served: dict[str, float], limit: int
) -> set[str]:
    """The runs that get a slot, if the refs in capitals are the deploy branches."""
    return hook.grant_slots(wanted, running, served, limit, lambda run: run.ref.isupper())


@pytest.mark.parametrize(
    ("wanted", "running", "limit", "served", "granted"),
    [
        ("", "", 4, {}, ""),
        ("a1 a2", "", 4, {}, "a1 a2"),
        ("a1 a2 a3 a4 a5", "", 4, {}, "a5 a4 a3"),
        ("A1 A2 A3 A4 A5", "", 4, {}, "A5 A4 A3 A2"),
        ("a9 a8 a7 a6 B1", "", 4, {}, "B1 a9 a8 a7"),
        ("a9 a8 B1", "a1 a2 a3", 4, {}, "B1"),
        ("a9", "a1 a2 a3", 4, {}, ""),
        ("a9 a8 b1", "", 2, {"a": 5.0}, "b1"),
        ("a9 a8 b1", "", 2, {"b": 5.0}, "a9"),
        ("a9 B1", "", 1, {}, "B1"),
        ("a9", "", 1, {}, "a9"),
        ("a9 a8 a7 a6 b1", "", 5, {"b": 9.0}, "a9 b1 a8 a7"),
        ("A9 A8 A7 B1", "", 4, {"b": 9.0}, "A9 B1 A8 A7"),
        ("A9 A8 B1", "A2 A3 A4", 4, {}, "B1"),
        ("A9 a8 b7 B6", "", 2, {}, "A9 B6"),
        ("a9 b8 c7 a6 b5 c4", "", 3, {"a": 3.0, "b": 1.0, "c": 2.0}, "b8 c7"),
    ],
    ids=[
        "nothing waits", "an app alone", "one slot is left to deploy branches",
        "deploy branches take all", "a deploy branch first, though it waited longest",
        "the slot that was left", "that slot is for no test", "apps in turn", "served last",
        "a single slot, deploy branch first", "a single slot is also for tests",
        "at most half while another waits", "more than half when no other waits",
        "an app above its half",
        "two deploy branches before all tests", "three apps in turn",
    ],
)  # fmt: skip
def test_slots_are_granted_fairly(
    wanted: str, running: str, limit: int, served: dict[str, float], granted: str
) -> None:
    slots = granted_slots(pushed(wanted), pushed(running), served, limit)
    assert slots == {*granted.split()}


def test_tests_that_began_while_nobody_waited_keep_all_slots_but_one() -> None:
    running = pushed("a1 a2 a3")
    assert granted_slots(running, [], {}, 4) == {"a1", "a2", "a3"}
    assert granted_slots(pushed("b1 a4"), running, {}, 4) == set()
    assert granted_slots(pushed("b1 B2"), running, {}, 4) == {"B2"}


def test_an_app_whose_tests_are_pushed_all_the_time_keeps_no_other_from_its_turn() -> None:
    served, last = {"flood": 0.0, "calm": 0.0}, list[str]()
    for second in range(1, 9):
        flood = hook.Run(id=f"f{second}", app="flood", ref="x", commit="", received=second)
        calm = hook.Run(id="c", app="calm", ref="x", commit="", received=0.5)
        (run,) = granted_slots([flood, calm], [], served, 1)
        app = "calm" if run == "c" else "flood"
        last.append(app)
        served[app] = float(second)
    assert last[:4] in (["flood", "calm"] * 2, ["calm", "flood"] * 2)


# === Doom, as recorded ===


@cache
def recorded(scenario: str, resource: str) -> list[Object]:
    """What was recorded of the objects of a kind, which nobody changes."""
    path = DATA / f"{scenario}.{resource}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def replayed(
    scenario: str, prefix: str, until: float = 0.0
) -> Iterator[tuple[float, list[hook.Pod]]]:
    """The pods at every event and every half second, to the recording's end and on until then."""
    events = [
        e for e in recorded(scenario, "pods") if e["object"]["metadata"]["name"].startswith(prefix)
    ]
    assert events
    times = sorted(
        {e["at"] for e in events} | {n / 2 for n in range(int(max(until, events[-1]["at"]) * 2))}
    )
    known: dict[str, hook.Pod] = {}
    for now in times:
        for event in (e for e in events if e["at"] == now):
            pod = hook.Pod(event["object"])
            known[pod.name] = pod
            if event["type"] == "DELETED":
                del known[pod.name]
        yield now, list(known.values())


def recorded_events(scenario: str, until: float) -> list[hook.PodEvent]:
    """What the Events of a recording have said until some second."""
    newest = {e["object"]["metadata"]["name"]: e for e in recorded(scenario, "events")
              if e["at"] <= until}  # fmt: skip
    return [hook.PodEvent(e["object"]) for e in newest.values()]


def grace_of(problem: hook.PodProblem) -> float:
    """Return how many seconds a problem may last that has been seen once."""
    return hook.NEVER if isinstance(problem.proof, hook.Exits) else problem.proof.seconds


def first_verdict(
    scenario: str, prefix: str, until: float = 0.0, *, with_events: bool = False
) -> tuple[float, hook.PodProblem] | None:
    doom = hook.ProblemTracker()
    for now, pods in replayed(scenario, prefix, until):
        events = recorded_events(scenario, now) if with_events else []
        if found := doom.fatal([s for p in pods for s in hook.pod_problems(p, events)], now):
            return now, found
    return None


@pytest.mark.parametrize(
    ("scenario", "prefix", "reason", "at", "text"),
    [
        ("deploy-crash-loop", "my-app-blue-59f6f", Reason.CRASH_LOOP, 12.09, "ended 2 times"),
        ("deploy-init-fails", "shop-green-fc849", Reason.INIT_FAILED, 12.27, "container migrate"),
        ("deploy-image-comes-later", "late-", Reason.IMAGE_NOT_FOUND, 28.76, "not found"),
        ("job-service-image-missing", "svc-img", Reason.IMAGE_NOT_FOUND, 31.0, "container db"),
    ],
)
def test_what_cannot_heal_is_told_in_time(
    scenario: str, prefix: str, reason: Reason, at: float, text: str
) -> None:
    found = first_verdict(scenario, prefix, 130)
    assert found is not None
    assert (found[1].reason, found[0]) == (reason, pytest.approx(at, abs=0.51))
    assert text in found[1].detail


@pytest.mark.parametrize(
    ("scenario", "prefix", "at"),
    [
        ("deploy-image-comes-later", "late-", 14.0),
        ("job-service-image-missing", "svc-img", 15.0),
    ],
)
def test_the_events_tell_of_a_second_refusal_as_soon_as_it_has_come(
    scenario: str, prefix: str, at: float
) -> None:
    found = first_verdict(scenario, prefix, 130, with_events=True)
    assert found is not None
    assert (found[1].reason, found[0]) == (Reason.IMAGE_NOT_FOUND, pytest.approx(at, abs=0.51))


SERVICE = hook.ServiceSettings(
    name="db", image="db:1", port=5432, command="", env={}, user=1, writable=(), resources={},
    start_timeout=10.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("job-service-crashes", "does not listen on port 5432; it ended 2 times, last with exit"),
        ("job-service-never-ready", "service db does not listen on port 5432"),
        ("job-service-succeeds", ""),
        ("job-service-dies-during-tests", ""),
        ("job-service-image-missing", ""),
    ],
)
def test_a_service_is_waited_for_until_two_exits_or_its_time_prove_that_it_will_not_listen(
    scenario: str, text: str
) -> None:
    tracker = hook.ProblemTracker()
    ends = []
    for now, pods in replayed(scenario, "", 60):
        problems = [p for pod in pods for p in hook.service_problems(pod, [SERVICE])]
        if problem := tracker.fatal(problems, now):
            ends.append((now, problem))
    assert bool(ends) == bool(text)
    if ends:
        at, problem = ends[0]
        assert text in problem.detail
        assert problem.reason is Reason.SERVICE_FAILED
        assert at < 20


def test_red_tests_name_the_services_that_were_restarted_meanwhile() -> None:
    *_, (_, pods) = (
        (now, pods) for now, pods in replayed("job-service-dies-during-tests", "") if pods
    )
    view = a_view(a_job("test", "failed"), pods=pods)
    settings = replace(view.app.test, services=(SERVICE,))
    view = replace(view, app=replace(view.app, test=settings))
    assert re.fullmatch("service db was restarted (once|[0-9]+ times)", view.restarted_services)
    ended = hook.with_services(view, hook.fails(Reason.TESTS_FAILED, "exit code 1", "test"))
    assert ended.detail.startswith("exit code 1; service db was restarted")


@pytest.mark.parametrize("with_events", [False, True])
@pytest.mark.parametrize(
    ("scenario", "prefix"),
    [
        ("deploy-bad-image", "my-app-blue-58b47"),
        ("deploy-registry-away", "away-fb59fc86"),
        ("deploy-missing-secret-mount", "tls-5bbbd"),
        ("job-node-comes-later", "svc-node"),
        ("job-secret-missing", "svc-sec"),
        ("job-volume-claim-missing", "svc-pvc"),
    ],
)
def test_what_may_heal_is_waited_for_however_long_it_lasts(
    scenario: str, prefix: str, *, with_events: bool
) -> None:
    assert first_verdict(scenario, prefix, 900, with_events=with_events) is None


@pytest.mark.parametrize(
    ("scenario", "prefix"),
    [("deploy-missing-configmap", "shop-green-88885"), ("job-image-pull", "test-pull")],
)
def test_neither_a_missing_configmap_nor_a_registry_without_an_address_is_a_proof(
    scenario: str, prefix: str
) -> None:
    assert first_verdict(scenario, prefix, 900) is None


@pytest.mark.parametrize(
    ("scenario", "prefix", "at", "reason", "text"),
    [
        ("deploy-registry-away", "away-fb59fc86", 30.0, Reason.NEVER_STARTED,
            'container my-app of away-fb59fc86-w8lrq is not started: Pulling image "registry.test'),
        ("job-secret-missing", "svc-sec", 3.0, Reason.VOLUME_UNAVAILABLE,
            'MountVolume.SetUp failed for volume "s" : secret "not-there" not found'),
        ("job-volume-claim-missing", "svc-pvc", 3.0, Reason.VOLUME_UNAVAILABLE,
            'persistentvolumeclaim "pip-cache" not found'),
        ("job-node-comes-later", "svc-node", 3.0, Reason.UNSCHEDULABLE,
            "0/1 nodes are available: 1 node(s) were unschedulable"),
        ("deploy-bad-image", "my-app-blue-58b47", 5.0, Reason.IMAGE_PULL_FAILED, "no such host"),
        ("deploy-image-comes-later", "late-", 5.0, Reason.IMAGE_NOT_FOUND, "not found"),
        ("job-node-comes-later", "svc-node", 7.0, None, ""),
        ("deploy-registry-away", "away-fb59fc86", 76.5, None, ""),
    ],
    ids=["silent registry", "missing Secret", "missing claim", "no node", "no such registry",
         "refused once", "its node came", "its registry came"],
)  # fmt: skip
def test_what_a_recorded_pod_waits_for_is_said_in_the_clusters_own_words(
    scenario: str, prefix: str, at: float, reason: Reason | None, text: str
) -> None:
    pods = next(pods for now, pods in replayed(scenario, prefix, 100) if now >= at)
    problem = hook.holdup(pods, recorded_events(scenario, at))
    assert (problem.reason if problem else None) == reason
    assert text in (problem.detail if problem else "")


@pytest.mark.parametrize(
    ("scenario", "prefix"),
    [
        ("deploy-succeeds", "my-app-blue"),
        ("deploy-restarted", "shop-"),
        ("deploy-sick-later", "shop-green-759b"),
        ("deploy-never-ready", "my-app-blue-c6748"),
        ("deploy-crash-loop", "my-app-blue-58b4"),
        ("job-succeeds", "test-ok"),
        ("job-fails", "test-fail"),
        ("job-fails-after-retries", "test-retry"),
        ("job-fails-with-results-sidecar", "test-side"),
        ("job-init-container-fails", "test-clone"),
        ("job-oom", "test-oom"),
        ("job-evicted-then-succeeds", "test-evict"),
        ("job-deadline", "test-slow"),
        ("job-unschedulable", "test-big"),
    ],
)
def test_what_heals_or_ends_by_itself_is_no_doom(scenario: str, prefix: str) -> None:
    assert first_verdict(scenario, prefix, 130) is None


@pytest.mark.parametrize(
    ("scenario", "reason", "grace"),
    [
        ("job-quota-exceeded", Reason.QUOTA_EXCEEDED, 0),
        ("job-request-above-quota", Reason.QUOTA_EXCEEDED, 0),
        ("job-quota-no-resources", Reason.ADMISSION_REFUSED, 3),
    ],
)
def test_why_pods_cannot_be_created(scenario: str, reason: Reason, grace: float) -> None:
    for event in recorded(scenario, "events"):
        found = hook.creation_problem(event["object"]["message"] if "object" in event
                                      else event["message"], "key")  # fmt: skip
        assert (found.reason, grace_of(found)) == (reason, grace)
        assert "test-quota" in found.detail


@pytest.mark.parametrize(
    ("requested", "limited", "above"),
    [
        ("limits.cpu=5,requests.cpu=5", "limits.cpu=4,requests.cpu=2", True),
        ("pods=1,requests.cpu=3", "pods=10,requests.cpu=2", True),
        ("limits.cpu=500m", "limits.cpu=4", False),
        ("limits.cpu=2300m", "limits.cpu=2.3", False),
        ("limits.cpu=2301m", "limits.cpu=2.3", True),
        ("requests.memory=2Gi", "requests.memory=2048Mi", False),
        ("requests.memory=2Gi", "requests.memory=2G", True),
        ("requests.storage=1e3", "requests.storage=1k", False),
        ("pods=1", "pods=0", True),
        ("limits.cpu=many", "limits.cpu=4", False),
        ("limits.cpu=5", "limits.cpu=some", False),
        ("limits.cpu", "limits.cpu", False),
    ],
)
def test_only_a_request_above_the_hard_limit_proves_that_waiting_is_pointless(
    requested: str, limited: str, *, above: bool
) -> None:
    used = ",".join(f"{item.partition('=')[0]}=0" for item in requested.split(","))
    message = 'Error creating: pods "x" is forbidden: exceeded quota: q, requested: '
    message += f"{requested}, used: {used}, limited: {limited}"
    problem = hook.creation_problem(message, "key")
    assert problem.reason is Reason.QUOTA_EXCEEDED
    assert grace_of(problem) == (0 if above else hook.NEVER)
    assert problem.detail == message


JOB_ENDS = {
    "job-succeeds": (Outcome.TESTED, Reason.OK, 5.3),
    "job-evicted-then-succeeds": (Outcome.TESTED, Reason.OK, 10.2),
    "job-suspended-then-released": (Outcome.TESTED, Reason.OK, 6.8),
    "job-unschedulable": (Outcome.TESTED, Reason.OK, 3.5),
    "job-fails": (Outcome.FAILED, Reason.TESTS_FAILED, 3.7),
    "job-fails-after-retries": (Outcome.FAILED, Reason.TESTS_FAILED, 33.9),
    "job-fails-under-policy": (Outcome.FAILED, Reason.TESTS_FAILED, 3.7),
    "job-fails-with-results-sidecar": (Outcome.FAILED, Reason.TESTS_FAILED, 5.5),
    "job-command-not-found": (Outcome.FAILED, Reason.TESTS_FAILED, 3.7),
    "job-init-container-fails": (Outcome.FAILED, Reason.CLONE_FAILED, 4.1),
    "job-oom": (Outcome.FAILED, Reason.OUT_OF_MEMORY, 3.7),
    "job-deadline": (Outcome.FAILED, Reason.TIMEOUT, 5.3),
    "job-disk-limit-evicts": (Outcome.FAILED, Reason.OUT_OF_DISK, 48.1),
}
TEST_NAMES = {"job-fails-under-policy": "test-pol", "job-unschedulable": "test-big"}


def story(scenario: str) -> Iterator[tuple[float, hook.Action]]:
    """Each different decision over a recorded test Job, with its second."""
    events = sorted(
        (*recorded(scenario, "jobs"), *recorded(scenario, "pods")), key=lambda e: e["at"]
    )
    name = TEST_NAMES.get(scenario) or events[0]["object"]["metadata"]["name"]
    begin = datetime.fromisoformat(events[0]["object"]["metadata"]["creationTimestamp"]).timestamp()
    jobs: dict[str, hook.Job] = {}
    pods: dict[str, hook.Pod] = {}
    # most of these pods had no side-car that could say something of a report
    has_reporter = any("results" in json.dumps(e["object"]) for e in events)
    notes: dict[str, str] = {} if has_reporter else dict(NO_REPORT)
    doom, last = hook.ProblemTracker(), None
    for now in sorted({e["at"] for e in events} | {float(n) for n in range(70)}):
        for found in (e["object"] for e in events if e["at"] == now):
            if found["kind"] == "Pod":
                pods[found["metadata"]["name"]] = hook.Pod(found)
            elif found["metadata"]["name"] == name:
                labels = found["metadata"]["labels"] | {"gitops-hook/stage": "test"}
                meta = found["metadata"] | {"labels": labels, "annotations": notes}
                jobs["test"] = hook.Job({**found, "metadata": meta})
        symptoms = [s for p in pods.values() for s in hook.pod_problems(p)]
        view = a_view(
            a_job("test", run=OTHER), jobs=jobs, pods=tuple(pods.values()), now=begin + now
        )
        view = replace(view, fatal_problem=doom.fatal(symptoms, now))
        action = hook.decide(view)
        if action.do is Do.ANNOTATE:
            notes[hook.ANNOTATION_SUMMARY] = action.detail
        if action != last:
            yield now, action
        if action.do is Do.END:
            return
        last = action


@pytest.mark.parametrize("scenario", JOB_ENDS)
def test_a_recorded_test_job_ends_as_it_should(scenario: str) -> None:
    *_, (at, action) = story(scenario)
    outcome, reason, expected = JOB_ENDS[scenario]
    assert (action.do, action.outcome, action.reason) == (Do.END, outcome, reason)
    assert at == pytest.approx(expected, abs=0.6)


def test_a_recorded_test_job_whose_registry_is_away_waits() -> None:
    *_, (_, action) = story("job-image-pull")
    assert (action.do, action.stage) == (Do.WAIT, "test")


def test_a_pod_that_filled_its_disk_ends_the_run_in_the_kubelets_words() -> None:
    *_, (_, action) = story("job-disk-limit-evicts")
    assert action.detail == 'Usage of EmptyDir volume "tmp" exceeds the limit "20Mi".'


@pytest.mark.parametrize("scenario", ["job-quota-exceeded"])
def test_a_recorded_job_without_a_pod_waits(scenario: str) -> None:
    jobs = [hook.Job(e["object"]) for e in recorded(scenario, "jobs")]
    found = jobs[-1]
    found.stage = "test"
    view = a_view(jobs={"test": found}, now=found.unsuspended + 600)
    assert hook.decide(view) == hook.Action(Do.WAIT, "test", detail="for its pod")
    late = hook.decide(replace(view, now=found.unsuspended + 3601))
    assert (late.outcome, late.reason) == (Outcome.FAILED, Reason.QUEUE_TIMEOUT)


def test_a_suspended_job_is_released_and_a_report_is_kept_on_the_way() -> None:
    released = [action.do for _, action in story("job-suspended-then-released")]
    assert released == [Do.NOTHING, Do.UNSUSPEND, Do.WAIT, Do.WAIT, Do.END]
    noted = [action.do for _, action in story("job-fails-with-results-sidecar")]
    assert noted == [Do.NOTHING, Do.WAIT, Do.WAIT, Do.ANNOTATE, Do.END]


# === Doom, by its texts ===

PULL = 'failed to pull and unpack image "{0}": failed to resolve reference "{0}": '


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("{0}: not found", "not found"),
        ("pull access denied, repository does not exist or may require authorization", "denied"),
        ("unexpected status from HEAD request to {0}: 403 Forbidden", "forbidden"),
        (
            "failed to authorize: failed to fetch oauth token: unexpected status: 401 Unauthorized",
            "unauthorized",
        ),
        ("manifest unknown: manifest unknown", "manifest unknown"),
        ("reading manifest 1 in r.example.com/shop: name unknown", "name unknown"),
        ("no basic auth credentials", "no basic auth"),
        ("no match for platform in manifest: not found", "no match for platform"),
        (
            'failed to do request: Head "https://{0}": dial tcp 10.0.0.1:443: connection refused',
            "",
        ),
        ('failed to do request: Head "https://{0}": dial tcp: lookup registry: no such host', ""),
        ('failed to do request: Head "https://{0}": net/http: TLS handshake timeout', ""),
        ("429 Too Many Requests - toomanyrequests: You have reached your pull rate limit", ""),
        ("unexpected status from HEAD request: 503 Service Unavailable", ""),
        ("unexpected status from HEAD request: 502 Bad Gateway: upstream not found", ""),
        ("x509: certificate signed by unknown authority", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize(
    "image", ["registry.example.com/shop@sha256:1", "example.com/denied/not found"]
)
@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff"])
def test_the_text_of_a_failed_pull_tells_whether_it_was_refused(
    text: str, refused: str, image: str, reason: str
) -> None:
    said = (PULL + text).replace("{0}", "registry.example.com/shop:1" if refused else image)
    pod = a_pod(apps=[entry("web", waiting(reason, said))])
    (found,) = hook.pod_problems(pod)
    assert grace_of(found) == (hook.REFUSED_SECONDS if refused else hook.NEVER)
    assert found.reason == (Reason.IMAGE_NOT_FOUND if refused else Reason.IMAGE_PULL_FAILED)
    assert found.cause == (refused or "away")


NEVER = hook.NEVER
STARTS = 'failed to create containerd task: exec: "serve": executable file not found in $PATH'


@pytest.mark.parametrize(
    ("pod", "reason", "grace"),
    [
        (a_pod(apps=[entry("web", waiting("InvalidImageName", "Failed to apply"))]),
            Reason.MANIFEST_INVALID, 0),
        (a_pod(TEST, apps=[entry("web", waiting("InvalidImageName", "Failed to apply"))]),
            Reason.JOB_REFUSED, 0),
        (a_pod(apps=[entry("web", waiting("CreateContainerConfigError", 'secret "x" not found'))]),
            Reason.CONTAINER_CONFIG, NEVER),
        (a_pod(apps=[entry("web", waiting("RunContainerError", STARTS))]),
            Reason.CONTAINER_CONFIG, NEVER),
        (a_pod(apps=[entry("web", terminated(128, STARTS, "StartError"))]),
            Reason.CRASH_LOOP, NEVER),
        (a_pod(apps=[entry("web", waiting("CrashLoopBackOff"), terminated(128, "",
            "ContainerCannotRun"), 9)]),
            Reason.CRASH_LOOP, NEVER),
        (a_pod(apps=[entry("web", waiting("CreateContainerConfigError",
            "failed to sync configmap cache: timed out waiting for the condition"))]),
            Reason.CONTAINER_CONFIG, NEVER),
        (a_pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient cpu."}], started=0, created=5),
            Reason.UNSCHEDULABLE, NEVER),
        (a_pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "pod has unbound immediate PersistentVolumeClaims."}], started=0, created=5),
            Reason.VOLUME_UNAVAILABLE, NEVER),
        (a_pod(apps=[entry("web", waiting("CrashLoopBackOff"), terminated(1), 4)]),
            Reason.CRASH_LOOP, NEVER),
        (a_pod(apps=[entry("web", terminated(0), terminated(0), 2)]), Reason.CRASH_LOOP, NEVER),
        (a_pod(inits=[entry("migrate", waiting("CrashLoopBackOff"), terminated(1), 4)], apps=[]),
            Reason.INIT_FAILED, NEVER),
        (a_pod(apps=[entry("web", waiting("CrashLoopBackOff"), terminated(137, "", "OOMKilled"),
            4)]),
            Reason.OUT_OF_MEMORY, NEVER),
        (a_pod(inits=[entry("results", waiting("CrashLoopBackOff"), terminated(1), 4)], apps=[]),
            Reason.CRASH_LOOP, NEVER),
        (a_pod(TEST, inits=[entry("results", waiting("ErrImagePull", "x: not found"))], apps=[]),
            Reason.IMAGE_NOT_FOUND, 30),
        (a_pod(apps=[entry("web", waiting("RegistryUnavailable", "x"))]),
            Reason.IMAGE_PULL_FAILED, NEVER),
        (a_pod(apps=[entry("web", waiting("ImageInspectError", "x"))]),
            Reason.IMAGE_PULL_FAILED, NEVER),
    ],
    ids=[
        "wrong name", "wrong name in a Job", "missing secret", "wrong command", "start error",
        "start error, backing off", "kubelet's cache", "unschedulable", "missing claim",
        "crash loop found late", "ends with success again and again",
        "init loop found late", "memory", "side-car of an app", "side-car's image",
        "registry away", "node's storage",
    ],
)  # fmt: skip
def test_a_sick_pod_is_known_by_its_status(pod: hook.Pod, reason: Reason, grace: float) -> None:
    (found,) = hook.pod_problems(pod)
    assert (found.reason, grace_of(found)) == (reason, grace)


OVERFULL = 'Usage of EmptyDir volume "tmp" exceeds the limit "20Mi". '
FULL_NODE = "The node was low on resource: ephemeral-storage. Threshold quantity: 1, available: 0. "
FULL_NODE += "Container test-runner was using 9Gi, request is 1Gi, has larger consumption of it. "


@pytest.mark.parametrize(
    ("message", "more", "told"),
    [
        (OVERFULL, {}, True),
        ('Container test-runner exceeded its local ephemeral storage limit "4Gi". ', {}, True),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 4Gi. ", {}, True),
        (OVERFULL, {"conditions": [DISRUPTED]}, False),
        (FULL_NODE, {"conditions": [DISRUPTED]}, False),
        (FULL_NODE, {}, False),
        ("Pod was rejected: The node had condition: [DiskPressure]. ", {}, False),
        ("", {}, False),
        (OVERFULL, {"reason": "Preempting"}, None),
    ],
)  # fmt: skip
def test_a_jobs_pod_is_at_fault_only_where_it_wrote_more_than_it_may(
    message: str, more: Object, told: bool | None
) -> None:
    ended = {"states": {"test-runner": terminated(137)}, "phase": "Failed", "message": message}
    pod = a_pod(TEST, **{**ended, "reason": "Evicted", **more})
    reasons = [s.reason for s in hook.pod_problems(pod)]
    assert (Reason.OUT_OF_DISK in reasons) is bool(told)
    assert pod.leaving is (told is False)
    # an application's pod is replaced, and its run goes on
    assert a_pod("", **{**ended, "reason": "Evicted"}).leaving


CRASHED = waiting("CrashLoopBackOff")


@pytest.mark.parametrize(
    "pod",
    [
        a_pod(),
        a_pod(apps=[entry("web", RUNNING)], ready=True),
        a_pod(apps=[entry("web", RUNNING, ready=False)]),
        a_pod(apps=[entry("web", waiting("ContainerCreating"))]),
        a_pod(apps=[entry("web", RUNNING, terminated(1), 9)], ready=True),
        a_pod(apps=[entry("web", RUNNING, terminated(1), 9), entry("log", RUNNING, ready=False)]),
        a_pod(apps=[entry("web", CRASHED, terminated(1), 9)], started=600, fell=20),
        a_pod(apps=[entry("web", RUNNING, terminated(128, "", "StartError"), 1, ready=False)],
            started=600, fell=20),
        a_pod(inits=[entry("migrate", terminated(0), ready=True)], apps=[]),
        a_pod(apps=[entry("web", CRASHED, terminated(1), 9)], conditions=[DISRUPTED]),
        a_pod(apps=[entry("web", CRASHED, terminated(1), 9)], reason="Evicted"),
        a_pod(apps=[entry("web", CRASHED, terminated(1), 9)],
            meta={"deletionTimestamp": stamp(NOW)}),
        a_pod(apps=[entry("web", RUNNING, terminated(255, "", "Unknown"), 2, ready=False)]),
        a_pod(TEST, inits=[entry("results", CRASHED, terminated(1), 9)], apps=[]),
        a_pod(TEST, inits=[entry("results", CRASHED, terminated(137, "", "OOMKilled"), 9)],
            apps=[]),
        a_pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates"}]),
    ],
    ids=[
        "just made", "well", "not ready yet", "being made", "restarted before and ready",
        "restarted before and ready beside one that is not yet",
        "crashing after it was ready", "started after all", "init container done", "disrupted",
        "evicted", "deleted", "its machine was restarted", "results side-car crashes",
        "results side-car needs memory", "held back on purpose",
    ],
)  # fmt: skip
def test_what_is_no_symptom(pod: hook.Pod) -> None:
    assert not list(hook.pod_problems(pod))


def crash(times: int, code: int = 1, why: str = "Error", **more: Any) -> hook.Pod:
    """A pod whose container has ended so often, and waits to be started again."""
    ended = terminated(code, reason=why)
    return a_pod(apps=[entry("web", CRASHED, ended, times - 1)], **more)


QUOTA = (
    'Error creating: pods "x" is forbidden: exceeded quota: test-quota, requested: limits.cpu=500m,'
    " used: limits.cpu=4, limited: limits.cpu=4"
)
NO_LIMITS = 'pods "x" is forbidden: failed quota: test-quota: must specify limits.cpu for: web'
WEBHOOK = (
    'Internal error occurred: failed calling webhook "check.example.com": failed to call webhook:'
    ' Post "https://check.policy.svc:443/": dial tcp 10.0.0.9:443: connect: connection refused'
)
SLOW = "Timeout: request did not complete within requested timeout - context deadline exceeded"
ELECTING = "etcdserver: leader changed"
PLUGIN = "Internal error occurred: admission plugin ResourceQuota failed to complete"
EDITED = (
    'pods "x" is forbidden: Operation cannot be fulfilled on resourcequotas "test-quota": the'
    " object has been modified; please apply your changes to the latest version and try again"
)
FULL = "0/3 nodes are available: 3 Insufficient cpu."
NO_NODE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": FULL}


def waits_for(reason: str, message: str = "") -> list[hook.PodProblem]:
    """The symptoms of a pod whose only container waits."""
    return list(hook.pod_problems(a_pod(apps=[entry("web", waiting(reason, message))])))


NO_ACCOUNT = 'pods "x" is forbidden: error looking up service account test/x: '
NO_ACCOUNT += 'serviceaccount "test-runner-sa" not found'
BASELINE = 'pods "x" is forbidden: violates PodSecurity "restricted:latest": timeout != true'
MAXIMUM = 'pods "x" is forbidden: maximum cpu usage per Container is 2, but limit is 5'
DENIED = 'admission webhook "x" denied the request: etcd: Internal error is no name'
ETCD = 'pods "etcd-1" is forbidden: failed quota: q: must specify limits.cpu for: etcd'
# What is fatal once it lasts: the symptom, the seconds after which it cannot heal any more, and the
# reason. Before that it may go away. What may heal is waited for until the deadline.
LASTING: dict[str, tuple[list[hook.PodProblem], float, Reason]] = {
    "no such image": (waits_for("ErrImagePull", "x: not found"), 30, Reason.IMAGE_NOT_FOUND),
    "no access": (waits_for("ErrImagePull", "pull access denied"), 30, Reason.IMAGE_NOT_FOUND),
    "no manifest": (waits_for("ErrImagePull", "manifest unknown"), 30, Reason.IMAGE_NOT_FOUND),
    "no name": (waits_for("InvalidImageName", "x"), 0, Reason.MANIFEST_INVALID),
    "above quota": (
        [hook.creation_problem(QUOTA.replace("500m", "5"), "k")], 0, Reason.QUOTA_EXCEEDED),
    "no limits": ([hook.creation_problem(NO_LIMITS, "k")], 3, Reason.ADMISSION_REFUSED),
    "no limits of etcd": ([hook.creation_problem(ETCD, "k")], 3, Reason.ADMISSION_REFUSED),
    "no privileges": ([hook.creation_problem(BASELINE, "k")], 3, Reason.ADMISSION_REFUSED),
    "no such size": ([hook.creation_problem(MAXIMUM, "k")], 3, Reason.ADMISSION_REFUSED),
    "no by a webhook": ([hook.creation_problem(DENIED, "k")], 3, Reason.ADMISSION_REFUSED),
}  # fmt: skip
PASSING: dict[str, tuple[list[hook.PodProblem], Reason]] = {
    "no registry": (waits_for("ErrImagePull", "no such host"), Reason.IMAGE_PULL_FAILED),
    "no settings": (
        waits_for("CreateContainerConfigError", 'configmap "not-there" not found'),
        Reason.CONTAINER_CONFIG),
    "no quota": ([hook.creation_problem(QUOTA, "k")], Reason.QUOTA_EXCEEDED),
    "no count": ([hook.creation_problem(EDITED, "k")], Reason.PODS_NOT_CREATED),
    "no time": ([hook.creation_problem(SLOW, "k")], Reason.PODS_NOT_CREATED),
    "no leader": ([hook.creation_problem(ELECTING, "k")], Reason.PODS_NOT_CREATED),
    "no plug-in": ([hook.creation_problem(PLUGIN, "k")], Reason.PODS_NOT_CREATED),
    "no webhook": ([hook.creation_problem(WEBHOOK, "k")], Reason.PODS_NOT_CREATED),
    "no account": ([hook.creation_problem(NO_ACCOUNT, "k")], Reason.PODS_NOT_CREATED),
    "no node": (list(hook.pod_problems(a_pod(conditions=[NO_NODE]))), Reason.UNSCHEDULABLE),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_never_fatal(name: str) -> None:
    symptoms, reason = PASSING[name]
    doom = hook.ProblemTracker()
    assert [doom.fatal(symptoms, now) for now in (0.0, 100.0, 100_000.0)] == [None] * 3
    assert [s.reason for s in symptoms] == [reason]


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_doomed_at_its_time_and_may_heal_before(name: str) -> None:
    symptoms, seconds, reason = LASTING[name]
    doom = hook.ProblemTracker()
    for now in (0.0, seconds - 0.1) if seconds else ():
        assert doom.fatal(symptoms, now) is None
    found = doom.fatal(symptoms, float(seconds))
    assert found is not None
    assert found.reason is reason
    healed = hook.ProblemTracker()
    for now in (0.0, seconds - 0.1) if seconds else ():
        healed.fatal(symptoms, now)
    assert healed.fatal([], seconds + 0.1) is None
    assert healed.fatal(symptoms if seconds else [], seconds + 0.2) is None


def init_crash(times: int) -> hook.Pod:
    """A pod whose init container has ended so often with an error."""
    return a_pod(inits=[entry("migrate", CRASHED, terminated(1), times - 1)], apps=[])


Steps = list[tuple[float, hook.Pod]]


@pytest.mark.parametrize(
    ("steps", "second"),
    [
        ([(1, crash(1)), (3, crash(2)), (10, crash(2)), (11, crash(2))], 11),
        ([(1, crash(1)), (13, crash(2))], 13),
        ([(1, crash(1)), (3, crash(2, 3)), (15, crash(2, 3))], None),
        ([(1, crash(1)), (3, crash(2, 3)), (16, crash(3, 3))], 16),
        ([(3, crash(2)), (12, crash(2)), (13, crash(2))], 13),
        ([(3, crash(4)), (13, crash(4))], 13),
        ([(1, crash(1)), (100, crash(1))], None),
        ([(1, crash(1, 137, "OOMKilled")), (11, crash(2, 137, "OOMKilled"))], 11),
        ([(1, crash(3, 137, "OOMKilled", started=600, fell=30)),
            (12, crash(4, 137, "OOMKilled", started=600, fell=30))], 12),
        ([(1, crash(3, 137, "OOMKilled", started=600, fell=30)),
            (12, crash(4, started=600, fell=30))], None),
        ([(1, crash(9, 137, "OOMKilled", started=600, fell=30)),
            (99, crash(9, 137, "OOMKilled", started=600, fell=30))], None),
        ([(1, crash(1)), (2, a_pod(apps=[entry("web", RUNNING, terminated(1), 1, False)])),
            (3, crash(2)), (11, crash(2))], 11),
        ([(1, crash(1)), (2, a_pod(ready=True)), (13, crash(2, started=60, fell=3))], None),
        ([(1, init_crash(1)), (2, init_crash(2)), (11, init_crash(2))], 11),
        ([(1, init_crash(1)), (12, a_pod(inits=[entry("migrate", terminated(0))]))], None),
    ],
    ids=[
        "second exit for the same reason", "second exit late", "second exit for another reason",
        "again and again",
        "first seen at its second exit", "first seen at its fourth exit", "one exit is none",
        "memory twice", "memory twice after it was ready", "memory once after it was ready",
        "memory long ago", "running in between", "ready in between", "init container twice",
        "init container once, then done",
    ],
)  # fmt: skip
def test_a_container_that_ends_twice_for_the_same_reason_is_doomed_ten_seconds_after_the_first(
    steps: Steps, second: float | None
) -> None:
    doom = hook.ProblemTracker()
    fell = [now for now, pod in steps if doom.fatal(hook.pod_problems(pod), now)]
    assert (fell[0] if fell else None) == second


def test_a_higher_number_of_crashes_gives_an_app_time_until_its_database_is_there() -> None:
    exits = [(1, 1), (3, 2), (12, 2), (14, 3), (34, 3), (36, 4)]
    fell = {
        crashes: [
            now for now, times in exits
            if doom.fatal(hook.pod_problems(crash(times), crashes=crashes), now)
        ]
        for crashes, doom in ((n, hook.ProblemTracker()) for n in (2, 3, 4, 5))
    }  # fmt: skip
    assert {crashes: seconds[:1] for crashes, seconds in fell.items()} == {
        2: [12], 3: [14], 4: [36], 5: [],
    }  # fmt: skip


def pulls(*steps: tuple[float, str, str]) -> float | None:
    """The second at which pulls that are told by a pod's status are fatal."""
    doom = hook.ProblemTracker()
    for now, reason, message in steps:
        if doom.fatal(waits_for(reason, message) if reason else [], now):
            return now
    return None


ERR, BACK = "ErrImagePull", "ImagePullBackOff"
NOT_THERE, SHUT = "x: not found", "pull access denied"
REFUSED_ONCE, OLD_WORDS = f"Back-off: {ERR}: {NOT_THERE}", 'Back-off pulling image "x:1"'


@pytest.mark.parametrize(
    ("steps", "second"),
    [
        ([(1, ERR, NOT_THERE), (2, BACK, REFUSED_ONCE), (14, ERR, NOT_THERE)], 14),
        ([(1, ERR, NOT_THERE), (2, BACK, OLD_WORDS), (14, ERR, NOT_THERE)], 14),
        ([(1, ERR, NOT_THERE), (2, BACK, REFUSED_ONCE), (30, BACK, REFUSED_ONCE)], None),
        ([(1, ERR, NOT_THERE), (2, BACK, REFUSED_ONCE), (31, BACK, REFUSED_ONCE)], 31),
        ([(1, ERR, NOT_THERE), (2, BACK, OLD_WORDS), (31, BACK, OLD_WORDS)], 31),
        ([(1, ERR, NOT_THERE), (2, BACK, REFUSED_ONCE), (5, ERR, NOT_THERE),
            (15, ERR, NOT_THERE)], None),
        ([(1, ERR, NOT_THERE), (14, ERR, SHUT), (40, ERR, SHUT)], None),
        ([(1, ERR, NOT_THERE), (2, BACK, REFUSED_ONCE), (14, ERR, SHUT), (15, BACK, SHUT),
            (40, ERR, SHUT)], 40),
        ([(1, ERR, NOT_THERE), (2, "", ""), (14, ERR, NOT_THERE), (40, BACK, REFUSED_ONCE)], None),
        ([(1, ERR, NOT_THERE), (14, ERR, "connection refused"), (40, ERR, NOT_THERE)], None),
        ([(1, BACK, OLD_WORDS), (500, BACK, OLD_WORDS)], None),
    ],
    ids=["twice", "twice, of an older kubelet", "once", "for so long that it was asked again",
         "the same, of an older kubelet", "twice within ten seconds", "otherwise",
         "otherwise twice", "run in between", "away in between", "nobody says why"],
)  # fmt: skip
def test_a_wrong_image_needs_two_refusals_alike_ten_seconds_apart(
    steps: list[tuple[float, str, str]], second: float | None
) -> None:
    assert pulls(*steps) == second


def refusals(message: str, times: int, first: float, last: float, name: str = "web") -> Object:
    """An Event of failed pulls, as the kubelet counts them."""
    about = {"name": "pod-1", "fieldPath": f"spec.containers{{{name}}}"}
    stamps = {"firstTimestamp": stamp(first), "lastTimestamp": stamp(last), "count": times}
    words = {"reason": "Failed", "message": f'Failed to pull image "x": {message}'}
    return {"involvedObject": about, "type": "Warning", **words, **stamps}


@pytest.mark.parametrize(
    ("events", "proven"),
    [
        ([refusals(NOT_THERE, 2, 1, 14)], True),
        ([refusals(NOT_THERE, 2, 1, 10)], False),
        ([refusals(NOT_THERE, 1, 1, 1)], False),
        ([refusals(NOT_THERE, 1, 1, 1), refusals(f"id 7: {NOT_THERE}", 1, 14, 14)], True),
        ([refusals(NOT_THERE, 1, 1, 1), refusals(SHUT, 1, 14, 14)], False),
        ([refusals("connection refused", 9, 1, 99), refusals(NOT_THERE, 1, 120, 120)], False),
        ([refusals(NOT_THERE, 5, 1, 99, "other")], False),
        ([], False),
    ],
    ids=["twice", "too near", "once", "with another id", "otherwise", "away before",
         "another container", "no Events"],
)  # fmt: skip
def test_the_events_prove_two_refusals_at_the_first_look(
    events: list[Object], *, proven: bool
) -> None:
    pod = a_pod(apps=[entry("web", waiting(ERR, NOT_THERE))])
    problems = [*hook.pod_problems(pod, [hook.PodEvent(e) for e in events])]
    assert bool(hook.ProblemTracker().fatal(problems, 1.0)) is proven


def lasting(key: str, seconds: float) -> hook.PodProblem:
    """Return a problem that is fatal once it has lasted for so long."""
    return hook.PodProblem(key, Reason.UNSCHEDULABLE, "", proof=hook.After(seconds))


def test_a_symptom_that_goes_away_starts_anew() -> None:
    doom, symptom = hook.ProblemTracker(), lasting("k", 60)
    assert doom.fatal([symptom], 0) is None
    assert doom.fatal([symptom], 59) is None
    assert doom.fatal([], 59.5) is None
    assert doom.fatal([symptom], 61) is None
    assert doom.fatal([symptom], 121) is symptom


def test_a_second_symptom_does_not_renew_the_first() -> None:
    doom, slow = hook.ProblemTracker(), lasting("slow", 120)
    quick = lasting("quick", 30)
    assert doom.fatal([slow], 0) is None
    assert doom.fatal([slow, quick], 100) is None
    assert doom.fatal([slow, quick], 120) is slow


# === After the switch ===


def test_a_recorded_version_that_turns_sick_is_found_at_its_first_exit() -> None:
    pods = [p for _, known in replayed("deploy-sick-later", "shop-green-759b") for p in known]
    switched = max(p.started for p in pods) + 3
    fell = []
    for now, known in replayed("deploy-sick-later", "shop-green-759b"):
        if sick := hook.container_failure(known, switched):
            fell.append((now, sick))
    assert fell[0][0] == pytest.approx(10.62, abs=0.1)
    assert "exit code 3" in fell[0][1]
    down = [now for now, known in replayed("deploy-sick-later", "shop-green-759b")
            if now > 4 and hook.unready(known, switched)]  # fmt: skip
    assert down[0] == pytest.approx(10.62, abs=0.1)


def test_a_recorded_restart_of_a_colour_is_not_sickness() -> None:
    for _, known in replayed("deploy-restarted", "shop-"):
        assert not hook.container_failure(known, 0)


def new_pod(name: str = "a", **more: Any) -> hook.Pod:
    apps = more.pop("apps", [entry("web", RUNNING)])
    return a_pod(
        **{
            "name": name,
            "run": "r",
            "apps": apps,
            "inits": [],
            "started": 60.0,
            "ready": True,
            **more,
        }
    )


BAD_EXIT = [entry("web", RUNNING, terminated(3), 1)]
NOT_READY = [entry("web", RUNNING, ready=False)]
GONE = {"deletionTimestamp": stamp(NOW)}


@pytest.mark.parametrize(
    ("pod", "sick", "down", "disturbed"),
    [
        (new_pod(), False, False, False),
        (new_pod(apps=BAD_EXIT), True, False, False),
        (new_pod(apps=[entry("web", RUNNING, terminated(0), 1)]), False, False, False),
        (new_pod(apps=[entry("web", RUNNING, terminated(3, at=NOW - 40), 1)]), False, False, False),
        (new_pod(apps=[entry("web", RUNNING, terminated(255, reason="Unknown"), 1)]),
            False, False, False),
        (new_pod(inits=[entry("results", RUNNING, terminated(1), 1)]), False, False, False),
        (new_pod(apps=NOT_READY, ready=False), False, True, False),
        (new_pod(apps=[*NOT_READY, entry("proxy", RUNNING)], ready=False), False, True, False),
        (new_pod(apps=NOT_READY, ready=False, started=5.0), False, False, False),
        (new_pod(apps=BAD_EXIT, conditions=[DISRUPTED]), False, False, True),
        (new_pod(apps=NOT_READY, ready=False, meta=GONE), False, False, True),
        (new_pod(ready=False), False, False, True),
    ],
    ids=[
        "well", "exits with an error", "exits without one", "ended before the switch",
        "its machine was restarted", "a side-car ends", "not ready",
        "one container of two is not ready",
        "made after the switch and not ready yet", "evicted", "deleted", "its machine is silent",
    ],
)  # fmt: skip
def test_what_is_sickness_and_what_is_not(
    pod: hook.Pod, sick: bool, down: bool, disturbed: bool
) -> None:
    switched = NOW - 20
    assert bool(hook.container_failure([pod], switched)) is sick
    assert bool(hook.unready([pod], switched)) is down
    assert hook.pods_taken_away([pod], 1) is disturbed


def test_a_missing_pod_is_a_disturbance() -> None:
    assert hook.pods_taken_away([new_pod()], 2)
    assert not hook.pods_taken_away([new_pod("a"), new_pod("b")], 2)
    assert hook.pods_taken_away([new_pod("a"), new_pod("b"), new_pod("c", meta=GONE)], 2)


FELL = [entry("web", RUNNING, ready=False)]


def down_pod(name: str, seconds: float) -> hook.Pod:
    """A pod that is not ready by the word of its own container, since so many seconds."""
    return new_pod(name, apps=FELL, ready=False, fell=seconds)


@pytest.mark.parametrize(
    ("pods", "starting", "told", "grace"),
    [
        ([new_pod("a"), new_pod("b")], True, "", 0.0),
        ([new_pod("a"), down_pod("b", 1.0)], True, "5 s: b", hook.UNREADY_SECONDS),
        ([new_pod("a"), down_pod("b", 9.0)], True, "5 s: b", 0.0),
        ([down_pod("a", 0.5), down_pod("b", 0.5)], True, "1 s: a, b", hook.GONE_SECONDS),
        ([down_pod("a", 40.0), down_pod("b", 0.5)], True, "1 s: a, b", hook.GONE_SECONDS),
        ([down_pod("a", 40.0), down_pod("b", 30.0)], True, "1 s: a, b", 0.0),
        ([new_pod("a", meta=GONE)], True, "20 s: any pod", hook.REPLACED_SECONDS),
        ([new_pod("a", meta=GONE)], False, "1 s: any pod", hook.GONE_SECONDS),
        ([], False, "1 s: any pod", hook.GONE_SECONDS),
        ([down_pod("a", 30.0), new_pod("b", meta=GONE)], True, "1 s: a", 0.0),
    ],
    ids=[
        "all", "one just fell", "one fell before the daemon was there", "all just fell",
        "the last one just fell", "all fell before the daemon was there",
        "taken away, another starts", "taken away, no other starts", "none",
        "one taken away, the other fell",
    ],
)  # fmt: skip
def test_a_version_may_lack_ready_pods_for_as_long_as_its_visitors_can_bear(
    pods: list[hook.Pod], told: str, grace: float, *, starting: bool
) -> None:
    found = hook.readiness_shortage(pods, NOW - 20, NOW, replacing=starting)
    assert (found.detail if found else "") == (told and f"not ready for {told}")
    assert (grace_of(found) if found else 0.0) == grace


# Each step: seconds after the one before, what the check said, whether pods could be seen.
CHECKED = {
    "passing": ([(0.25, None, True)] * 8, 1.75, 8, 0),
    "the first one covers no time": ([(9.0, None, True)], 0.0, 1, 0),
    "as far apart as may be": ([(0.0, None, True), (2.0, None, True)], 2.0, 2, 0),
    "too far apart": ([(0.0, None, True), (2.1, None, True)], 0.0, 1, 0),
    "a process that was stopped": (
        [(0.25, None, True)] * 4 + [(35.0, None, True)] + [(0.25, None, True)] * 2, 1.25, 3, 0),
    "pods that are missing": ([(0.25, None, False)] * 8, 0.0, 8, 0),
    "failing": ([(0.25, None, True)] * 4 + [(0.25, "status 503", True)] * 3, 0.75, 0, 3),
    "failing slowly": ([(2.1, "no whole answer", True)] * 3, 0.0, 0, 3),
    "now and then": ([(0.25, None, True), (0.25, "status 503", True)] * 4, 0.0, 0, 1),
    "failing twice of three times, then passing": (
        [(0.25, "status 503", True), (0.25, "status 503", True), (0.25, None, True)] * 80
        + [(0.25, None, True)] * 2, 0.5, 3, 0),
}  # fmt: skip


@pytest.mark.parametrize(("steps", "judged", "passes", "failures"), CHECKED.values(), ids=CHECKED)
def test_time_counts_for_the_bake_only_between_checks_that_passed_and_are_near_each_other(
    steps: list[tuple[float, str | None, bool]], judged: float, passes: int, failures: int
) -> None:
    checks, now = hook.HealthChecks(), 1000.0
    for seconds, refusal, clear in steps:
        now += seconds
        checks = checks.after(now, refusal, clear=clear)
    assert checks.judged_seconds == pytest.approx(judged)
    assert (checks.passing(now), checks.failures) == (passes, failures)
    assert checks.refusal == (steps[-1][1] or "")


def test_checks_of_long_ago_are_no_proof_that_a_version_is_healthy() -> None:
    checks = hook.HealthChecks()
    for now in (1.0, 1.25, 1.5):
        checks = checks.after(now, None, clear=True)
    assert checks.passing(1.5 + hook.CHECK_GAP) == 3
    assert checks.passing(1.6 + hook.CHECK_GAP) == 0


# === The verdict of a bake ===

SLOW_CONFIRMATION = {"proved_at": 90.0, "confirmed_at": 99.0}
HUNG = {"proved_at": 97.0}
REFUSED_CHECKS = hook.HealthChecks(asked=40, failures=3, refusal="status 503", judged_seconds=70.0)
NEVER_READY = hook.WorkersSeen(waits="workers are not ready: shop-worker")
FAILED_WORKER = hook.WorkersSeen(waits="workers are not ready: shop-worker", failed="it crashes")
Row = dict[str, Any]
PROVEN: Row = {"healthy": True}  # and judged for a minute, as the bake is long
BAKES: dict[str, tuple[Row, Row, hook.Verdict]] = {
    # what is observed beside the look, what the look shows, what is to become of the version
    "healthy so far": (
        {**PROVEN, "judged_seconds_needed": 80.0}, {}, hook.Verdict.WATCH),
    "healthy for long enough": (PROVEN, {}, hook.Verdict.CONFIRM),
    "judged for long enough, but not healthy now": ({}, {}, hook.Verdict.WATCH),
    "the API server was not heard lately, and will be before it is confirmed": (
        PROVEN, {"read_at": 90.0}, hook.Verdict.CONFIRM),
    "endpoints are waited for": (PROVEN, {"endpoints_came": None}, hook.Verdict.WATCH),
    "endpoints did not come": (
        PROVEN, {"endpoints_came": False}, hook.Verdict.ENDPOINTS_MISSING),
    "workers are not ready yet": (PROVEN, {"workers": NEVER_READY}, hook.Verdict.WATCH),
    "a worker has failed": (PROVEN, {"workers": FAILED_WORKER}, hook.Verdict.WORKER_FAILED),
    "three checks failed": ({"checks": REFUSED_CHECKS}, {}, hook.Verdict.CHECKS_FAILED),
    "two checks failed": (
        {"checks": replace(REFUSED_CHECKS, failures=2)}, {}, hook.Verdict.WATCH),
    "three checks failed, and are excused": (
        {"checks": REFUSED_CHECKS, "excused": 40}, {}, hook.Verdict.WATCH),
    "three checks failed after what is excused": (
        {"checks": replace(REFUSED_CHECKS, asked=43, failures=6), "excused": 40},
        {}, hook.Verdict.CHECKS_FAILED),
    "a check failed after what is excused": (
        {"checks": replace(REFUSED_CHECKS, asked=41, failures=4), "excused": 40},
        {}, hook.Verdict.WATCH),
    "a container ended": ({"pods_fault": "exit code 3"}, {}, hook.Verdict.PODS_FAILED),
    "not judged for too long": ({"unjudged_seconds": 301.0}, {}, hook.Verdict.UNJUDGEABLE),
    "not judged for long": ({"unjudged_seconds": 300.0}, {}, hook.Verdict.WATCH),
    "its workers hinder the judgement for too long": (
        {**PROVEN, "unjudged_seconds": 301.0}, {"workers": NEVER_READY},
        hook.Verdict.UNJUDGEABLE),
    "given up, and healthy": (
        {**PROVEN, "gave_up": True}, {"workers": NEVER_READY}, hook.Verdict.CONFIRM),
    "given up, and neither healthy nor unhealthy": ({"gave_up": True}, {}, hook.Verdict.WATCH),
    "given up, and neither for as long again": (
        {"gave_up": True, "unjudged_seconds": 301.0}, {}, hook.Verdict.UNJUDGEABLE),
    "given up, healthy, but not confirmed for as long again": (
        {**PROVEN, "gave_up": True, "unjudged_seconds": 301.0}, {}, hook.Verdict.UNJUDGEABLE),
    "confirmed": (PROVEN, {"proved_at": 97.0, "confirmed_at": 98.0}, hook.Verdict.STAYS),
    "confirmed, then three checks failed": (
        {"checks": REFUSED_CHECKS}, {"proved_at": 97.0, "confirmed_at": 98.0},
        hook.Verdict.STAYS),
    "confirmed, and a container had ended by then": (
        {"pods_fault": "exit code 3"}, {"proved_at": 97.0, "confirmed_at": 98.0},
        hook.Verdict.PODS_FAILED),
    "a container ended while it is confirmed": (
        {"pods_fault": "exit code 3"}, {"proved_at": 99.0}, hook.Verdict.PODS_FAILED),
    "three checks failed while it is confirmed": (
        {"checks": REFUSED_CHECKS}, {"proved_at": 99.0}, hook.Verdict.WATCH),
    "three checks failed while its confirmation hangs": (
        {"checks": REFUSED_CHECKS}, HUNG, hook.Verdict.CHECKS_FAILED),
    "confirmed late, and healthy": (PROVEN, SLOW_CONFIRMATION, hook.Verdict.STAYS),
    "confirmed late, and unhealthy": (
        {"checks": REFUSED_CHECKS}, SLOW_CONFIRMATION, hook.Verdict.CHECKS_FAILED),
    "confirmed late, and neither": ({}, SLOW_CONFIRMATION, hook.Verdict.WATCH),
    "confirmed late, and neither for too long": (
        {"unjudged_seconds": 301.0}, SLOW_CONFIRMATION, hook.Verdict.STAYS),
}  # fmt: skip


@pytest.mark.parametrize(("observed", "look", "verdict"), BAKES.values(), ids=BAKES)
def test_what_becomes_of_a_version_in_its_bake(
    observed: Row, look: Row, verdict: hook.Verdict
) -> None:
    values: Row = {"judged_seconds_needed": 60.0, "checks": hook.HealthChecks(judged_seconds=60.0)}
    seen = hook.BakeObservation(
        settings=a_view().app.deploy,
        now=100.0,
        look=hook.BakeLook(**{"read_at": 99.0, "endpoints_came": True, **look}),
        **{**values, **observed},
    )
    assert hook.judgement(seen).verdict is verdict


def test_pods_that_were_read_some_seconds_ago_are_no_proof_that_none_is_missing() -> None:
    look = hook.BakeLook(read_at=99.0, pods=(new_pod(),), wanted=1)
    assert look.is_complete(99.0 + hook.FRESH_SECONDS)
    assert not look.is_complete(99.1 + hook.FRESH_SECONDS)
    assert not replace(look, wanted=2).is_complete(99.0)


# === A foreign Service ===


def labelled(**labels: str) -> hook.Pod:
    return hook.Pod(
        {"metadata": {"name": "p", "resourceVersion": "1", "labels": labels}, "spec": {}}
    )


NEW = {"app": "shop", "version": "blue", "gitops-hook/run": "r"}


@pytest.mark.parametrize(
    ("selector", "pods", "narrow"),
    [
        ({"app": "old"}, [], {"app": "old"}),
        ({"app": "shop", "tier": "x"}, [], {"app": "shop", "tier": "x"}),
        ({"app": "shop"}, [{"app": "shop", "version": "green"}], {"app": "shop",
            "version": "green"}),
        ({"app": "shop"}, [{"app": "shop", "pod-template-hash": "1", "a": "b"}],
            {"app": "shop", "pod-template-hash": "1"}),
        ({"app": "shop"}, [{"app": "shop", "tier": "x"}, {"app": "shop", "tier": "x", "n": "2"}],
            {"app": "shop", "tier": "x"}),
        ({"app": "shop"}, [{"app": "shop", "n": "1"}, {"app": "shop", "n": "2"}], None),
        ({"app": "shop"}, [{"app": "shop", "version": "blue"}], None),
        ({"app": "shop"}, [], None),
    ],
    ids=["apart already", "apart by one key", "by version", "by template",
        "by what all share", "nothing shared",
        "same as the new", "no pods"],
)  # fmt: skip
def test_a_selector_is_narrowed_to_todays_pods(
    selector: dict[str, str], pods: list[dict[str, str]], narrow: dict[str, str] | None
) -> None:
    assert hook.narrowed(selector, [labelled(**p) for p in pods], NEW) == narrow


def test_a_version_of_the_apps_own_does_not_narrow_since_a_later_commit_may_have_it_too() -> None:
    old = labelled(**{"app": "shop", "version": "v1", "pod-template-hash": "1"})
    new = {"app": "shop", "version": "v2", hook.LABEL_COLOUR: "blue", hook.LABEL_RUN: "r"}
    narrow = {"app": "shop", "pod-template-hash": "1"}
    assert hook.narrowed({"app": "shop"}, [old], new) == narrow


# === Purity ===

HELPERS = {"clip", "replace", "seconds_of"}
FORBIDDEN = {
    "open",
    "print",
    "input",
    "eval",
    "exec",
    "compile",
    "breakpoint",
    "globals",
    "__import__",
}


def section(source: str, title: str) -> str:
    banner = re.search(rf"(?m)^# === {title} =+$", source)
    assert banner
    return re.split(r"(?m)^# === ", source[banner.end() :])[0]


def impure(source: str) -> set[str]:
    """The names used in a section of code that could reach outside of it."""
    tree = ast.parse(source)
    bound = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    bound |= {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    types = {n for n in used if n[0].isupper()}  # constants, values and annotations
    unknown = (
        used - bound - types - HELPERS - (set(dir(builtins)) - FORBIDDEN) - {"re", "dataclass"}
    )
    methods = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return unknown | {
        m for m in methods if re.search(r"\.(run|write|read|get_event|wait|start|sleep)$", m)
    }


def test_deciding_touches_nothing_outside() -> None:
    assert not impure(section(Path(hook.__file__).read_text("utf-8"), "decide"))


@pytest.mark.parametrize(
    "line",
    [
        "time.time()",
        "subprocess.run([])",
        "open('x')",
        "warn('x')",
        "random.random()",
        "kubectl.run()",
    ],
)
def test_an_impure_line_would_be_found(line: str) -> None:
    assert impure(f"def decide(view):\n    {line}\n")


@pytest.mark.parametrize(
    "message",
    [
        'Post "https://10.0.0.1/api/v1/pods": http2: client connection lost',
        "read tcp 10.0.0.1: connection reset by peer",
        "Unauthorized",
        "something that nobody knows",
    ],
)
def test_trouble_on_the_way_to_a_pod_is_no_policy(message: str) -> None:
    problem = hook.creation_problem(message, "k")
    assert (problem.reason, grace_of(problem)) == (Reason.PODS_NOT_CREATED, hook.NEVER)


def test_what_a_policy_refuses_of_a_job_is_the_fault_of_its_configuration() -> None:
    assert hook.creation_problem(BASELINE, "k").reason is Reason.ADMISSION_REFUSED
    problem = hook.job_creation_problem(BASELINE, "k")
    assert (problem.reason, grace_of(problem)) == (Reason.JOB_REFUSED, 3.0)
    assert not problem.reason.is_verdict


@pytest.mark.parametrize(
    ("waited", "reason"),
    [("Unschedulable", Reason.UNSCHEDULABLE), ("", Reason.TIMEOUT), ("Mischief", Reason.TIMEOUT)],
)
def test_a_job_whose_deadline_passed_while_its_pod_waited_ends_with_what_it_waited_for(
    waited: str, reason: Reason
) -> None:
    notes = {hook.ANNOTATION_REASON: waited, hook.ANNOTATION_DETAIL: "0/1 nodes"} if waited else {}
    job = a_job("test", "failed", since=60, reason="DeadlineExceeded", notes=notes)
    action = hook.decide(a_view(job))
    assert (action.do, action.reason) == (Do.END, reason)
    assert (action.detail == "0/1 nodes") is (reason is Reason.UNSCHEDULABLE)
