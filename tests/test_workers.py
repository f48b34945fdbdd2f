"""Workers: other Deployments of an app follow traffic, and take it back when they fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import gitops_hook as hook
from tests.fleet import Fleet, Member, fleet, variable
from tests.services import Change
from tests.world import Object, eventually

QUICK = {"bake": "1s", "drain": "1s"}
APPS: dict[str, Object] = {
    "shop": QUICK,
    "sick": QUICK,
    "first": QUICK,
    "waits": {**QUICK, "rollout_timeout": "6s"},
    "unready": {**QUICK, "rollout_timeout": "6s"},
    "killed": QUICK,
    "staged": {**QUICK, "environments": ["staging", "production"]},
}


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, none of them deployed yet."""
    with fleet(tmp_path_factory.mktemp("workers"), APPS) as made:
        yield made


def deployment(app: Member, name: str, version: str, modes: str = "", **pod: Any) -> Object:
    """Return a Deployment beside the app's own, of the same image."""
    variables = [{"name": "VERSION", "value": version}, {"name": "MODES", "value": modes}]
    container = {"name": "worker", "image": app.fleet.image, "env": variables}
    container["envFrom"] = [{"configMapRef": {"name": "worker"}}]
    labels = {"app": f"{app.name}-{name}"}
    spec = {"terminationGracePeriodSeconds": 1, "containers": [container], **pod}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{app.name}-{name}"},
        "spec": {
            "minReadySeconds": 2,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def worker(app: Member, version: str, modes: str = "", **pod: Any) -> Change:
    """Return a change that adds a worker and the ConfigMap that it names."""
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "worker"},
        "data": {"QUEUE": version},
    }

    def change(objects: dict[str, Object]) -> None:
        objects["worker"] = deployment(app, "worker", version, modes, **pod)
        objects["worker-settings"] = settings

    return change


def worker_with(app: Member, version: str, modes: str = "", **fields: Any) -> Change:
    """Return a change that adds a worker whose container has these fields."""

    def change(objects: dict[str, Object]) -> None:
        worker(app, version, modes)(objects)
        (container,) = objects["worker"]["spec"]["template"]["spec"]["containers"]
        container |= fields

    return change


def store(app: Member, version: str = "1") -> Object:
    """Return a Deployment that no version of the app changes, such as a store of sessions."""
    kept = deployment(app, "store", version)
    del kept["spec"]["template"]["spec"]["containers"][0]["envFrom"]
    return kept


def go(app: Member, version: str, modes: str = "", **pod: Any) -> str:
    """Release and announce a version of the app with a worker; return the run's id."""
    return app.go(version, change=worker(app, version, modes, **pod))


def deploy(app: Member, version: str, modes: str = "", **pod: Any) -> Object:
    """Release a version of the app with a worker, and wait for its end."""
    return app.fleet.ended(go(app, version, modes, **pod), 90)


def working(app: Member, name: str = "worker") -> list[str]:
    """Return the versions of a worker's ready pods, each with the ConfigMap that it names."""
    label = f"{app.name}-{name}"
    pods = app.fleet.cluster.store.list("pods", app.namespace)
    own = [p for p in pods if p["metadata"]["labels"].get("app") == label]
    stays = [p for p in own if "deletionTimestamp" not in p["metadata"]]
    return [variable(pod, "VERSION") for pod in stays if hook.Pod(pod).ready]


def works(app: Member, version: str) -> None:
    """Wait until the worker runs a version, alone."""
    eventually(lambda: working(app) == [version], 30, f"{working(app)} is {version}")


def test_a_worker_follows_traffic_forward_back_and_to_a_rollback(apps: Fleet) -> None:
    shop = apps["shop"]
    assert deploy(shop, "v1")["outcome"] == "deployed"
    assert working(shop) == ["v1"], "it is ready when the run ends"
    shop.quiet()
    assert deploy(shop, "v2")["outcome"] == "deployed"
    assert working(shop) == ["v2"]
    shop.quiet()
    run = go(shop, "v3")
    shop.switched(run)
    works(shop, "v3")
    shop.tell("v3", "/turn-sick")
    assert apps.ended(run)["reason"] == "UnhealthyAfterSwitch"
    works(shop, "v2")
    shop.quiet()
    assert apps.command("rollback", "shop").returncode == 0
    assert shop.answer()["version"] == "v1"
    works(shop, "v1")
    shop.quiet()
    # the next version has none
    assert shop.deployed("v4")["outcome"] == "deployed"
    eventually(lambda: working(shop) == [], 20, "the worker goes when it is confirmed")


def test_a_worker_that_crashes_takes_the_traffic_back_and_is_the_reason(apps: Fleet) -> None:
    sick = apps["sick"]
    assert deploy(sick, "v1")["outcome"] == "deployed"
    sick.quiet()
    with sick.traffic() as traffic:
        line = deploy(sick, "v2", "crash-at-start")
    assert (line["outcome"], line["reason"]) == ("switched-back", "WorkerFailed"), line
    assert "sick-worker" in line["detail"]
    assert "CrashLoop" in line["detail"]
    assert traffic.failures == []
    assert sick.answer()["version"] == "v1"
    works(sick, "v1")
    sick.quiet()
    shown = apps.command("explain", line["run"], "--log").stdout
    assert "sick-worker" in shown
    assert "Read the log of the worker" in apps.command("status", "sick").stdout


def test_a_first_version_whose_worker_crashes_keeps_its_traffic_and_says_so(apps: Fleet) -> None:
    first = apps["first"]
    line = deploy(first, "v1", "crash-at-start")
    assert (line["outcome"], line["reason"]) == ("failed", "BothUnhealthy"), line
    assert "first-worker" in line["detail"]
    assert "there is none before" in line["detail"]
    assert first.answer()["version"] == "v1"


def test_a_worker_that_waits_for_a_secret_is_no_reason_to_switch_back(apps: Fleet) -> None:
    waits = apps["waits"]
    assert deploy(waits, "v1")["outcome"] == "deployed"
    waits.quiet()

    missing = [{"configMapRef": {"name": "worker"}}, {"secretRef": {"name": "missing"}}]
    run = waits.go("v2", change=worker_with(waits, "v2", envFrom=missing))
    assert apps.ended(run, 90)["outcome"] == "deployed"
    (unjudged,) = apps.said("confirmed unjudged", run=run)
    assert "workers are not ready: waits-worker" in unjudged["detail"]
    assert "missing" in unjudged["detail"]
    assert waits.answer()["version"] == "v2"


def test_a_worker_that_runs_but_is_never_ready_takes_the_traffic_back(apps: Fleet) -> None:
    unready = apps["unready"]
    assert deploy(unready, "v1")["outcome"] == "deployed"
    unready.quiet()

    probe = {"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 1}
    change = worker_with(unready, "v2", "never-ready", readinessProbe=probe)
    line = unready.deployed("v2", 90, change=change)
    assert (line["outcome"], line["reason"]) == ("switched-back", "WorkerFailed"), line
    assert "unready-worker" in line["detail"]
    assert unready.answer()["version"] == "v1"
    works(unready, "v1")


def test_what_a_version_leaves_as_it_is_is_not_restarted(apps: Fleet) -> None:
    killed = apps["killed"]

    def change(objects: dict[str, Object]) -> None:
        worker(killed, "w1")(objects)
        objects["store"] = store(killed)

    assert killed.deployed("v1", change=change)["outcome"] == "deployed"
    killed.quiet()

    def names() -> list[str]:
        label = "killed-store"
        pods = apps.cluster.store.list("pods", killed.namespace)
        return [p["metadata"]["name"] for p in pods if p["metadata"]["labels"].get("app") == label]

    before = names()
    assert len(before) == 1
    assert killed.deployed("v2", change=change)["outcome"] == "deployed"
    assert names() == before


def test_a_daemon_that_dies_before_the_worker_follows_lets_the_next_one_do_it(apps: Fleet) -> None:
    killed = apps["killed"]
    killed.quiet()
    run = go(killed, "v3")
    # the first is the dry run
    with apps.held("update", "deployments", after=1):
        killed.switched(run)
        apps.kill()
    apps.start()
    assert apps.ended(run, 60)["outcome"] == "deployed"
    works(killed, "v3")


def test_a_worker_that_fails_in_staging_never_reaches_production(apps: Fleet) -> None:
    staged = apps["staged"]
    assert deploy(staged, "v1")["outcome"] == "deployed"
    staged.quiet()
    line = deploy(staged, "v2", "crash-at-start")
    assert (line["reason"], line["stage"]) == ("WorkerFailed", "staging"), line
    assert staged.answer()["version"] == "v1"
    works(staged, "v1")
