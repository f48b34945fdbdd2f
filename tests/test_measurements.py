"""What the metrics show of queues and of what serves the environments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

import gitops_hook as hook
from gitops_hook import Do
from tests.idle_controller import idle_controller, live_service, refused, sample, synced
from tests.test_decide import NOW, a_job, a_run, a_view
from tests.world import Object

STAGING = {"app": "shop", "environment": "staging"}
QUOTA = {hook.ANNOTATION_REASON: "QuotaExceeded"}


@pytest.fixture
def controller(tmp_path: Path) -> Any:
    controller = idle_controller(tmp_path)
    synced(controller)
    return controller


# === Queues ===


def waits(*jobs: hook.Job, **changes: Any) -> hook.Wait | None:
    """What a run waits for by its next step."""
    observed = a_view(*jobs, **changes)
    return hook.wait_of(observed, hook.decide(observed))


def test_a_suspended_job_waits_for_a_slot_since_it_was_created() -> None:
    job = a_job("test", "suspended", since=40)
    assert waits(job, slot=False) == hook.Wait("FreeSlot", NOW - 40)
    assert waits(job) is None


def test_a_run_that_is_tried_again_waits_since_its_next_try_began() -> None:
    job = a_job("test", "suspended", since=4000, run=a_run(received=NOW - 30))
    assert waits(job, slot=False, queue_timeout=9999.0) == hook.Wait("FreeSlot", NOW - 30)


def test_a_build_that_has_no_job_yet_waits_since_its_tests_are_green() -> None:
    test = a_job("test", "succeeded", since=20, notes={hook.ANNOTATION_SUMMARY: hook.NO_REPORT})
    assert waits(test, slot=False) == hook.Wait("FreeSlot", NOW - 20)
    assert waits(test, head="unknown") == hook.Wait("GitError", NOW - 20)


def test_a_job_without_its_pod_waits_for_what_the_cluster_says() -> None:
    job = a_job("test", since=50, notes=QUOTA)
    assert waits(job) == hook.Wait("QuotaExceeded", NOW - 50)
    assert waits(a_job("test", since=50)) is None


def test_a_reason_that_somebody_else_wrote_is_no_label() -> None:
    job = a_job("test", since=50, notes={hook.ANNOTATION_REASON: "Evil"})
    assert waits(job) is None


def test_of_each_reason_the_longest_wait_is_shown_and_0_when_it_is_over() -> None:
    metrics = hook.Metrics()
    shown = hook.Waits(SimpleNamespace(metrics=metrics))  # type: ignore[arg-type]
    queued = [a_view(a_job("test", "suspended", since=s), slot=False) for s in (10, 30, 20)]
    stuck = a_view(a_job("test", since=5, notes=QUOTA))
    shown.show([hook.Step(o, hook.decide(o)) for o in (*queued, stuck)])
    assert seconds(metrics) == {"FreeSlot": 30.0, "QuotaExceeded": 5.0}
    shown.show([hook.Step(stuck, hook.Action(Do.NOTHING))])
    assert seconds(metrics) == {"FreeSlot": 0.0, "QuotaExceeded": 0.0}


def seconds(metrics: hook.Metrics) -> dict[str, float]:
    (family,) = metrics.queue_wait.collect()
    return {s.labels["reason"]: s.value for s in family.samples}


def test_what_a_run_waits_for_is_reported_when_it_begins_and_when_it_changes(
    controller: Any,
) -> None:
    reported: list[hook.Transition] = []
    controller.context.doors.reports.sinks = [reported.append]

    def look(*jobs: hook.Job) -> list[tuple[str, str]]:
        reported.clear()
        controller.runs.waits.report(jobs)
        return [(str(t.state), t.reason) for t in reported]

    waits = a_job("test", notes={**QUOTA, hook.ANNOTATION_DETAIL: "used: 1"})
    later = a_job("test", notes={**QUOTA, hook.ANNOTATION_DETAIL: "used: 2"})
    told = [("waits", "QuotaExceeded")]
    assert [look(waits), look(waits), look(later)] == [told, [], told]
    assert [look(a_job("test")), look(later)] == [[], told]
    assert (reported[0].run, reported[0].stage) == (a_run().id, "test")
    assert reported[0].detail == "used: 2"


def test_every_look_of_the_controller_shows_what_is_waited_for(
    controller: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(controller.runs.waits, "show", shown.append)
    controller.reconcile()
    assert shown == [[]]


# === Environments ===


class Cluster(SimpleNamespace):
    """What the measurements read of an environment."""

    def __init__(self) -> None:
        super().__init__(slices=[], deployments=[], asked=[], refuses="")

    def list(self, resource: str, namespace: str, *filters: str) -> list[Object]:
        self.asked.append((resource, namespace, *filters))
        if namespace == self.refuses:
            raise refused("Error from server (Forbidden): no")
        listed: list[Object] = getattr(self, resource.removeprefix("endpoint"))
        return listed if namespace == "staging" else []

    def pages(self, address: str, namespace: str) -> Iterator[Object]:
        path, _, query = address.partition("?labelSelector=")
        listed = self.list(path.rpartition("/")[2], namespace, "-l", unquote(query))
        yield from ({"items": [item]} for item in listed)  # each on a page of its own


def endpoints(*ready: bool, service: str = "shop") -> Object:
    listed = [
        {"addresses": [f"10.0.0.{n}"], "conditions": {"ready": one}} for n, one in enumerate(ready)
    ]
    return {"metadata": {"labels": {hook.LABEL_SERVICE: service}}, "endpoints": listed}


def a_deployment(name: str, run: str, replicas: int, ready: int) -> Object:
    meta = {"name": name, "labels": {hook.LABEL_RUN: run}}
    return {"metadata": meta, "spec": {"replicas": replicas}, "status": {"readyReplicas": ready}}


@pytest.fixture
def cluster(controller: Any) -> Cluster:
    cluster = Cluster()
    controller.measurements.kubectl = cluster
    return cluster


def serve(controller: Any, *history: Object) -> None:
    """Let the informer of staging show a live Service."""
    controller.informers.services["staging"]._take("ADDED", live_service(*history))


LIVE = {"run": "shop-2", "live": True, "colour": "green", "outcome": "deployed", "at": 20.0}
BEFORE = {"run": "shop-1", "colour": "blue", "outcome": "deployed", "at": 10.0}
FAILED = {"run": "shop-3", "colour": "blue", "outcome": "switched-back", "at": 30.0}


def measured(controller: Any) -> Mapping[str, float | None]:
    controller.measurements.measure_all()
    names = ("live_endpoints", "rollback_ready", "last_success_timestamp_seconds")
    return {name: sample(controller, name, STAGING) for name in names}


def test_an_environment_without_a_service_has_no_values(controller: Any, cluster: Cluster) -> None:
    assert {*measured(controller).values()} == {None}
    controller.informers.services["staging"]._take("ADDED", live_service(LIVE))
    assert measured(controller)["live_endpoints"] == 0
    controller.informers.services["staging"]._take("DELETED", live_service(LIVE))
    assert {*measured(controller).values()} == {None}


def test_the_ready_endpoints_of_all_slices_of_the_live_service_are_counted(
    controller: Any, cluster: Cluster
) -> None:
    serve(controller, LIVE)
    cluster.slices = [endpoints(True, True, False), endpoints(True), endpoints(True, service="x")]
    cluster.slices[1]["endpoints"][0]["addresses"] = ["10.0.1.1"]
    assert measured(controller)["live_endpoints"] == 3
    terms = "kubernetes.io/service-name in (shop)"
    assert ("endpointslices", "staging", "-l", terms) in cluster.asked


@pytest.mark.parametrize(
    ("stands", "ready"),
    [
        (("shop-blue", "shop-1", 2, 2), 1),
        (("shop-blue", "shop-1", 2, 1), 0),
        (("shop-blue", "shop-1", 0, 0), 1),  # deploy.retain: 0
        (("shop-blue", "shop-3", 2, 2), 0),  # a failed version stands in its place
        (("shop-green", "shop-2", 2, 2), 0),
    ],
)
def test_a_rollback_is_ready_while_all_pods_that_are_kept_for_it_are(
    controller: Any, cluster: Cluster, stands: tuple[str, str, int, int], ready: int
) -> None:
    serve(controller, LIVE, BEFORE)
    cluster.deployments = [a_deployment(*stands)]
    assert measured(controller)["rollback_ready"] == ready


def test_without_a_version_to_go_back_to_nothing_is_said_of_a_rollback(
    controller: Any, cluster: Cluster
) -> None:
    serve(controller, LIVE, {"run": "shop-0", "outcome": "adopted"})
    assert measured(controller)["rollback_ready"] is None


def test_the_last_success_is_when_the_newest_confirmed_version_went_live(
    controller: Any, cluster: Cluster
) -> None:
    serve(controller, FAILED, LIVE, BEFORE)
    assert measured(controller)["last_success_timestamp_seconds"] == 20.0
    serve(controller, {**LIVE, "outcome": "adopted"})
    assert measured(controller)["last_success_timestamp_seconds"] is None


def test_an_environment_that_cannot_be_read_keeps_no_other_from_being_measured(
    controller: Any, cluster: Cluster
) -> None:
    serve(controller, LIVE)
    cluster.refuses = "production"
    assert [*controller.informers.services] == ["staging", "production"]
    controller.informers.services = dict(reversed(controller.informers.services.items()))
    with pytest.raises(hook.KubectlError):
        measured(controller)
    assert sample(controller, "live_endpoints", STAGING) == 0


def test_what_an_informer_cannot_follow_is_measured_soon(controller: Any, cluster: Cluster) -> None:
    assert controller.measurements.measure_all() == hook.MEASURE_SECONDS
    controller.informers.services["staging"].trouble = "away"
    cluster.asked.clear()
    assert controller.measurements.measure_all() == hook.LOOK_SECONDS
    assert {namespace for _, namespace, *_ in cluster.asked} == {"production"}


def test_the_thread_does_not_count_as_stuck_while_every_call_takes_its_time(
    controller: Any, cluster: Cluster
) -> None:
    clock = controller.context.clock
    late: list[str] = []

    def slow(*_: str) -> list[Object]:
        clock.time += hook.STEP_SECONDS / 2 - 1
        late.extend(controller.heartbeats.late())
        return []

    cluster.list = slow
    controller.heartbeats.beat("measurements", hook.STEP_SECONDS)  # as its thread begins
    controller.measurements.measure_all()
    assert clock.time > 1000.0 + hook.STEP_SECONDS
    assert late == []
