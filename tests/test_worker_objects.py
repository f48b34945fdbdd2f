"""Workers as objects: how they are sorted and rendered, and when they are ready."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import gitops_hook as hook
from gitops_hook import Placement, Release, is_worker_ready, render
from tests.test_app_manifests import BUILT, IMAGE, RUN, Object, app_of, fault
from tests.test_companion_objects import (
    LABELS,
    MemoryKubectl,
    MemoryState,
    budget,
    checked,
    companions_of,
    item,
    peers,
    scaler,
    task,
)

SELECTOR = {"app": "shop-worker"}


def worker(name: str = "work", image: str = f"{IMAGE}:dev", **spec: Any) -> Object:
    """A Deployment beside the app's own."""
    pod = {"containers": [{"name": "c", "image": image}], **spec.pop("pod", {})}
    template = {"metadata": {"labels": SELECTOR}, "spec": pod}
    content = {"replicas": 2, "selector": {"matchLabels": SELECTOR}, "template": template}
    return item("Deployment", name, "apps/v1", spec={**content, **spec})


def released(*beside: Object, image: str = BUILT, run: str = "") -> Release:
    """The release of an app that has something beside it."""
    objects = checked(*beside)
    return render(app_of(), replace(RUN, id=run or RUN.id), image, Placement("green", 0), objects)


def named(release: Release, kind: str, name: str) -> Object:
    """What stands beside an app while a release is live, by kind and name."""
    (one,) = [
        o
        for o in release.companions_for("shop")
        if (o["kind"], o["metadata"]["name"]) == (kind, name)
    ]
    return one


def test_another_deployment_is_a_worker_with_the_built_image_and_our_labels() -> None:
    work = named(released(worker()), "Deployment", "work")
    assert work["metadata"]["labels"] == LABELS
    pod = work["spec"]["template"]["spec"]
    assert [c["image"] for c in pod["containers"]] == [BUILT]
    assert work["spec"]["replicas"] == 2
    assert work["spec"]["minReadySeconds"] == 10
    own = named(released(worker(minReadySeconds=0)), "Deployment", "work")
    assert own["spec"]["minReadySeconds"] == 0
    assert work["spec"]["selector"] == {"matchLabels": SELECTOR}
    labels = work["spec"]["template"]["metadata"]["labels"]
    assert {k: v for k, v in labels.items() if k != "gitops-hook/worker"} == SELECTOR


def test_the_pods_of_a_worker_are_known_by_their_template_alone() -> None:
    def label(release: Release, name: str = "work") -> str:
        return hook.worker_label(named(release, "Deployment", name))

    first = released(worker(), worker("store", "redis:7"))
    again = released(worker(), worker("store", "redis:7"), run="shop-2")
    other = released(worker(), worker("store", "redis:7"), image=BUILT.replace("0", "1"))
    assert label(first) == label(again)
    assert label(first) != label(other)
    assert label(first, "store") == label(other, "store"), "it is not restarted"
    assert label(first, "store") != label(first)


def test_a_worker_names_the_immutable_copies_of_its_configmaps() -> None:
    settings = item("ConfigMap", "queue", data={"a": "b"})
    pod = {"volumes": [{"name": "v", "configMap": {"name": "queue"}}]}
    release = released(worker(pod=pod), settings)
    (copied,) = release.worker_configmaps
    assert copied["metadata"]["name"].startswith("queue-")
    assert copied["immutable"]
    work = named(release, "Deployment", "work")
    (volume,) = work["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == copied["metadata"]["name"]
    assert [c["kind"] for c in release.companions or ()] == ["Deployment"]


def test_what_is_for_a_worker_gets_no_colour() -> None:
    selector = {"matchLabels": SELECTOR}
    beside = (
        worker(),
        scaler(target="work"),
        budget(**selector),
        peers("work-peers", selector=SELECTOR),
    )
    release = released(*beside)
    kept = named(release, "HorizontalPodAutoscaler", "x")
    assert kept["spec"]["scaleTargetRef"]["name"] == "work"
    kept = named(release, "PodDisruptionBudget", "x")
    assert kept["spec"]["selector"]["matchLabels"] == SELECTOR
    assert named(release, "Service", "work-peers")["spec"]["selector"] == SELECTOR
    assert release.wanted == 2, "the app's own size is as its Deployment has it"


OWN = {"gitops-hook/worker-of": "shop"}


def apart(release: Release, *standing: Object) -> dict[str, Object]:
    """What is wanted of a release beside what stands, by name."""
    by_identity = {hook.identity_of(one): one for one in release.companions_for("shop")}
    there = {hook.identity_of(one): one for one in standing}
    wanted = hook.kept_apart(by_identity, there)
    return {one["metadata"]["name"]: one for one in wanted.values()}


def stands(item: Object, **status: int) -> Object:
    """A Deployment as it stands, rolled out but for what the status says."""
    rolled_out = dict.fromkeys(("replicas", "updatedReplicas", "availableReplicas"), 2)
    generation = {**item["metadata"], "generation": 2}
    counts = {**rolled_out, "observedGeneration": 2, **status}
    return {**item, "metadata": generation, "status": counts}


def selector_of(item: Object) -> Object:
    """What a Service selects."""
    return dict(item["spec"]["selector"])


def pod_labels(worker: Object) -> Object:
    """The labels of a worker's pods, but for that of its template."""
    labels = worker["spec"]["template"]["metadata"]["labels"]
    return {key: value for key, value in labels.items() if key != "gitops-hook/worker"}


def test_a_new_worker_and_its_service_select_pods_of_their_app_only() -> None:
    new = apart(released(worker(), peers("work-peers", selector=SELECTOR)))
    assert selector_of(new["work-peers"]) == {**SELECTOR, **OWN}
    assert new["work"]["spec"]["selector"] == {"matchLabels": {**SELECTOR, **OWN}}
    assert pod_labels(new["work"]) == {**SELECTOR, **OWN}
    again = apart(released(worker(), peers("work-peers", selector=SELECTOR)), *new.values())
    assert again == new


def test_a_worker_that_stood_before_gets_the_label_of_its_app_with_its_next_change() -> None:
    first = released(worker(), peers("work-peers", selector=SELECTOR))
    before = stands(named(first, "Deployment", "work"))
    plain = named(first, "Service", "work-peers")
    same = apart(first, before, plain)
    assert same["work"] == named(first, "Deployment", "work"), "no pod restarts for a label"
    assert selector_of(same["work-peers"]) == SELECTOR

    second = released(
        worker(), peers("work-peers", selector=SELECTOR), image=BUILT.replace("0", "1")
    )
    changed = apart(second, before, plain)
    assert pod_labels(changed["work"]) == {**SELECTOR, **OWN}
    assert changed["work"]["spec"]["selector"] == {"matchLabels": SELECTOR}, "it cannot change"
    assert selector_of(changed["work-peers"]) == SELECTOR, "no pod has the label yet"

    rolling = stands(changed["work"], updatedReplicas=1)
    assert selector_of(apart(second, rolling, plain)["work-peers"]) == SELECTOR
    done = apart(second, stands(changed["work"]), plain)
    assert selector_of(done["work-peers"]) == {**SELECTOR, **OWN}
    back = apart(first, stands(done["work"], updatedReplicas=0), done["work-peers"])
    assert pod_labels(back["work"]) == {**SELECTOR, **OWN}, "it is not taken away again"
    assert selector_of(back["work-peers"]) == {**SELECTOR, **OWN}


def test_a_service_of_two_workers_asks_for_the_label_when_the_pods_of_both_have_it() -> None:
    release = released(worker(), worker("second"), peers("work-peers", selector=SELECTOR))
    plain = named(release, "Deployment", "second")
    wanted = apart(release, stands(plain))
    assert selector_of(wanted["work-peers"]) == SELECTOR
    assert selector_of(apart(release)["work-peers"]) == {**SELECTOR, **OWN}


def test_a_service_keeps_the_pods_of_a_renamed_worker_until_the_new_ones_are_ready() -> None:
    first = released(worker(), peers("work-peers", selector=SELECTOR))
    plain = named(first, "Service", "work-peers")
    before = stands(named(first, "Deployment", "work"))
    second = released(worker("renamed"), peers("work-peers", selector=SELECTOR))
    assert selector_of(apart(second, before, plain)["work-peers"]) == SELECTOR
    new = apart(second, before, plain)["renamed"]
    assert selector_of(apart(second, stands(new, replicas=3), plain)["work-peers"]) == SELECTOR
    assert selector_of(apart(second, stands(new), plain)["work-peers"]) == {**SELECTOR, **OWN}


def test_a_service_that_is_pointed_at_another_worker_waits_until_its_pods_have_the_label() -> None:
    other = {"app": "other"}
    second = worker("second", selector={"matchLabels": other})
    second["spec"]["template"]["metadata"] = {"labels": other}
    first = released(worker(), copy.deepcopy(second), peers("work-peers", selector=SELECTOR))
    asking = apart(first)["work-peers"]
    assert selector_of(asking) == {**SELECTOR, **OWN}
    again = released(
        worker(), second, peers("work-peers", selector=other), image=BUILT.replace("0", "1")
    )
    labelled = apart(again)["second"]
    rolling = stands(labelled, updatedReplicas=1)
    assert selector_of(apart(again, rolling, asking)["work-peers"]) == other
    assert selector_of(apart(again, stands(labelled), asking)["work-peers"]) == {**other, **OWN}


def test_what_is_given_back_keeps_the_selector_that_it_stands_with() -> None:
    release = released(worker(), peers("work-peers", selector=SELECTOR))
    new = apart(release)
    back = {**worker(), "metadata": {"name": "work", "labels": {}}}
    wanted = {hook.identity_of(back): back}
    (kept,) = hook.kept_apart(wanted, {hook.identity_of(back): stands(new["work"])}).values()
    assert kept["spec"]["selector"] == new["work"]["spec"]["selector"]
    assert pod_labels(kept) == {**SELECTOR, **OWN}
    plain = stands(named(release, "Deployment", "work"))
    assert hook.kept_apart(wanted, {hook.identity_of(back): plain}) == wanted
    assert hook.kept_apart(wanted, {}) == wanted


@pytest.mark.parametrize("selector", ["text", [], ["a"], 7, None, {}, {"matchLabels": None}])
def test_a_worker_without_a_selector_is_for_the_api_server_to_refuse(selector: Any) -> None:
    kept = apart(released(worker(selector=selector)))["work"]
    assert kept["spec"]["selector"] == selector


def test_what_is_not_for_workers_selects_as_before() -> None:
    release = released(worker(), peers("peers"))
    assert apart(release)["peers"] == named(release, "Service", "peers")


OTHERS = {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["shop", "evil"]}]}


@pytest.mark.parametrize("selector", [{"matchLabels": SELECTOR}, OTHERS])
def test_the_budget_of_workers_counts_no_pods_but_theirs(selector: Object) -> None:
    second = worker("second", "redis:7")
    release = released(worker(), second, budget(**selector))
    labels = [hook.worker_label(named(release, "Deployment", n)) for n in ("work", "second")]
    chosen = named(release, "PodDisruptionBudget", "x")["spec"]["selector"]
    own = {"key": "gitops-hook/worker", "operator": "In", "values": labels}
    written = selector.get("matchExpressions", [])
    assert chosen == {**selector, "matchExpressions": [*written, own]}
    for name in ("work", "second"):
        template = named(release, "Deployment", name)["spec"]["template"]
        assert hook.selects(chosen, template["metadata"]["labels"])
    assert not hook.selects(chosen, SELECTOR), "a pod of another app with the same labels"
    recorded = Release.from_configmap(release.configmap("shop"))
    assert named(recorded, "PodDisruptionBudget", "x")["spec"]["selector"] == chosen


def test_an_autoscaler_says_how_many_workers_there_are() -> None:
    work = named(released(worker(), scaler(target="work")), "Deployment", "work")
    assert "replicas" not in work["spec"]


def test_a_worker_may_be_replaced_at_once_and_use_a_disk_of_one_node() -> None:
    pod = {"volumes": [{"name": "d", "persistentVolumeClaim": {"claimName": "disk"}}]}
    recreated = worker(pod=pod, strategy={"type": "Recreate"})
    assert checked(recreated).companions == [recreated]


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ([worker("shop-blue")], "has the name of a colour of the app. Rename it."),
        ([worker(), budget(matchExpressions=[{"key": "app", "operator": "Exists"}])],
         "selects the pods of web, work. Write one for each"),
        ([worker(), scaler("a", "work"), scaler("b", "work")], "a, b scale the same Deployment."),
        ([worker(pod={"hostNetwork": True})], "spec.hostNetwork shares the network of the node"),
        ([worker(paused=True)], "spec.paused keeps a version from starting"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_worker_is_refused_with_advice(beside: list[Object], said: str) -> None:
    assert said in fault(lambda: checked(*beside))[1]


def status(**more: int) -> Object:
    """The status of a Deployment with two pods, all of them ready."""
    counts = {"updatedReplicas": 2, "availableReplicas": 2, "replicas": 2, "observedGeneration": 3}
    return {**counts, **more}


@pytest.mark.parametrize(
    ("reported", "ready"),
    [
        (status(), True),
        (status(availableReplicas=1), False),
        (status(updatedReplicas=1), False),
        (status(replicas=3), False),
        (status(observedGeneration=2), False),
        ({}, False),
    ],
)
def test_a_worker_is_ready_once_all_its_pods_are_those_that_were_wanted(
    reported: Object, ready: bool
) -> None:
    work = named(released(worker()), "Deployment", "work")
    standing = {**work, "metadata": {**work["metadata"], "generation": 3}, "status": reported}
    assert is_worker_ready(work, standing) is ready
    assert not is_worker_ready(work, None)
    older = named(released(worker(), image=BUILT.replace("0", "1")), "Deployment", "work")
    assert not is_worker_ready(older, standing)


def test_a_worker_with_no_pods_is_ready() -> None:
    work = named(released(worker(replicas=0)), "Deployment", "work")
    none = {"observedGeneration": 1}
    assert is_worker_ready(
        work, {**work, "metadata": {**work["metadata"], "generation": 1}, "status": none}
    )


class Listed(hook.Kubectl):
    """A cluster that has one worker, and pods of it."""

    def __init__(self, worker_: Object, pods: list[Object]) -> None:
        super().__init__(hook.Metrics())
        self.worker = worker_
        self.pods = pods

    def get_each(self, namespace: str, *references: str) -> list[Object | None]:
        """Return the worker."""
        assert (namespace, references) == ("production", ("deployment/work",))
        return [self.worker]

    def list(
        self, resource: str, namespace: str, *filters: str, timeout: float = 30.0
    ) -> list[Object]:
        """Return the pods, or no Events."""
        return self.pods if resource == "pods" else []


class Standing(hook.Clock):
    """A clock that a test moves on."""

    at = 1000.0

    def monotonic(self) -> float:
        """Return when it is."""
        return self.at


def crashed(created: str, exits: int, code: int = 7) -> Object:
    """A pod whose container has exited and waits."""
    ended = {"exitCode": code, "reason": "Error", "finishedAt": created}
    state = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
    container = {"name": "c", "ready": False, "restartCount": exits, "state": state}
    container["lastState"] = {"terminated": ended}
    meta = {"name": "work-1", "resourceVersion": "1", "creationTimestamp": created}
    return {
        "metadata": meta,
        "spec": {"containers": [{"name": "c"}]},
        "status": {"phase": "Running", "containerStatuses": [container], "startTime": created},
    }


@pytest.mark.parametrize(
    ("created", "failed"),
    [
        ("2026-01-01T00:00:05Z", True),
        ("2025-12-31T23:59:50Z", True),  # the clock of the cluster is behind
        ("2025-12-31T23:00:00Z", False),  # it was there before, and is as it was
    ],
)
def test_only_pods_of_since_the_switch_show_that_a_worker_fails(created: str, failed: bool) -> None:
    switched_at = hook.epoch("2026-01-01T00:00:00Z")
    release = released(worker())
    work = named(release, "Deployment", "work")
    standing = {**work, "metadata": {**work["metadata"], "generation": 1}, "status": {}}
    clock = Standing()
    doors: Any = SimpleNamespace(kubectl=Listed(standing, [crashed(created, 2)]), clock=clock)
    place: Any = SimpleNamespace(app=app_of(), namespace="production")
    watch = hook.WorkerWatch(doors, place, release)
    assert watch.look(switched_at).failed == "", "nothing is proven yet"
    clock.at += 11
    doors.kubectl.pods = [crashed(created, 3)]
    seen = watch.look(switched_at)
    assert ("CrashLoop" in seen.failed) is failed
    assert "workers are not ready: work" in seen.waits


def test_the_budget_of_a_worker_stays_one_and_changes_after_the_switch() -> None:
    def release(least: int, run: str) -> Release:
        kept = budget(matchLabels=SELECTOR)
        return released(
            worker(), {**kept, "spec": {**kept["spec"], "minAvailable": least}}, run=run
        )

    first = release(1, "shop-1")
    cluster = MemoryKubectl([])
    state = MemoryState([])
    companions = companions_of(cluster, state, first)
    companions.prepare(task(), first)
    assert companions.follow(task(), has_companions=True)
    key = ("PodDisruptionBudget", "x")
    (own,) = cluster.objects[key]["spec"]["selector"]["matchExpressions"]
    assert own["values"] == [hook.worker_label(named(first, "Deployment", "work"))]
    second = release(2, "shop-2")
    companions.require_accepted(task(), second)
    companions.prepare(task(), second)
    assert cluster.objects[key]["spec"]["minAvailable"] == 1
    assert companions_of(cluster, state, second).follow(task(), has_companions=True)
    assert cluster.objects[key]["spec"]["minAvailable"] == 2
