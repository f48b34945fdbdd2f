"""What stands beside an app: it follows the live version, and nothing of others is touched."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import yaml

from gitops_hook import Release
from tests.fleet import Fleet, Member, app_objects, fleet, is_ready, variable
from tests.services import Change
from tests.test_deployments import answers
from tests.world import Object, eventually

APPS: dict[str, Object] = {
    "shop": {"bake": "1s", "drain": "1s", "companions": ["Ingress"]},
    "refused": {"bake": "1s", "drain": "1s", "companions": ["ServiceMonitor"]},
    **{
        name: {"bake": "1s", "drain": "1s"}
        for name in ("failed", "killed", "later", "old", "taken", "told", "whole")
    },
}
ENDINGS = {  # of the names of what stands beside an app
    "horizontalpodautoscalers": "",
    "services": "-peers",
    "cronjobs": "-night",
    "configmaps": "-dashboard",
    "ingresses": "",
}


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, none of them deployed yet."""
    with fleet(tmp_path_factory.mktemp("companions"), APPS) as made:
        yield made


def named(api: str, kind: str, name: str, **content: Any) -> Object:
    """Return an object as a commit has it."""
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, **content}


def autoscaler(app: str, **spec: Any) -> Object:
    """Return an autoscaler of an app."""
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": app}
    limits = {"minReplicas": 1, "maxReplicas": 3}
    return named(
        "autoscaling/v2",
        "HorizontalPodAutoscaler",
        app,
        spec={**limits, **spec, "scaleTargetRef": target},
    )


def budget(app: str) -> Object:
    """Return a disruption budget of an app's pods."""
    selector = {"matchLabels": {"app": app}}
    spec = {"minAvailable": 1, "selector": selector}
    return named("policy/v1", "PodDisruptionBudget", app, spec=spec)


def night(app: Member, schedule: str = "0 3 * * *", **pod: Any) -> Object:
    """Return a CronJob."""
    container = {"name": "night", "image": app.fleet.image}
    spec = {"restartPolicy": "Never", "containers": [container], **pod}
    template = {"spec": {"template": {"spec": spec}}}
    return named(
        "batch/v1",
        "CronJob",
        f"{app.name}-night",
        spec={"schedule": schedule, "jobTemplate": template},
    )


def peers(app: str) -> Object:
    """Return a headless Service of an app's pods."""
    port = {"name": "peers", "port": 7000}
    spec = {"clusterIP": "None", "selector": {"app": app}, "ports": [port]}
    return named("v1", "Service", f"{app}-peers", spec=spec)


def beside(app: Member, text: str = "a", *leave_out: str, **more: Object) -> Change:
    """Return a change that puts one object of each kind beside an app."""
    rule = {"http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend(app)}]}}
    items = {
        "scaler": autoscaler(app.name),
        "budget": budget(app.name),
        "peers": peers(app.name),
        "night": night(app, f"{len(text)} 3 * * *"),
        "dashboard": named("v1", "ConfigMap", f"{app.name}-dashboard", data={"text": text}),
        "ingress": named("networking.k8s.io/v1", "Ingress", app.name, spec={"rules": [rule]}),
        **more,
    }

    def change(objects: dict[str, Object]) -> None:
        objects.update({k: v for k, v in items.items() if k not in leave_out})

    return change


def backend(app: Member) -> Object:
    """Return where an Ingress leads to."""
    return {"service": {"name": app.name, "port": {"number": 80}}}


def state(app: Member) -> Object:
    """Return what an observer sees of everything beside an app."""
    find = app.fleet.cluster.store.find

    def spec(resource: str) -> Object:
        return (find(resource, app.namespace, f"{app.name}{ENDINGS[resource]}") or {}).get(
            "spec"
        ) or {}

    dashboard = find("configmaps", app.namespace, f"{app.name}-dashboard") or {}
    budgets = app.objects("poddisruptionbudgets")
    return {
        "scales": spec("horizontalpodautoscalers").get("scaleTargetRef", {}).get("name"),
        "peers": spec("services").get("selector"),
        "schedule": spec("cronjobs").get("schedule"),
        "text": (dashboard.get("data") or {}).get("text"),
        "ingress": bool(spec("ingresses")),
        "budgets": sorted(budgets),
    }


def follows(app: Member, text: str | None = "a") -> Object:
    """Return what everything beside an app is to be while its live version has a text."""
    colour = app.selector["version"]
    return {
        "scales": f"{app.name}-{colour}",
        "peers": app.selector,
        "schedule": f"{len(text or '')} 3 * * *",
        "text": text,
        "ingress": True,
        "budgets": [f"{app.name}-{colour}"],
    }


def comes(app: Member, text: str = "a") -> None:
    """Wait until everything beside an app is as its live version wants it."""
    eventually(lambda: state(app) == follows(app, text), 30, f"{state(app)} is {follows(app)}")


def allow_ingresses(apps: Fleet) -> None:
    """Let the administrator give the daemon the verbs for Ingresses."""
    rule = {
        "apiGroups": ["networking.k8s.io"],
        "resources": ["ingresses"],
        "verbs": ["get", "create", "update", "delete"],
    }
    patch = json.dumps([{"op": "add", "path": "/rules/-", "value": rule}])
    where = ("-n", "production", "role", "production-deployer")
    assert apps.kubectl("patch", *where, "--type=json", "-p", patch).code == 0


@contextmanager
def watched(app: Member, before: str = "") -> Iterator[list[str]]:
    """Note, while the block runs, each moment at which the live pods have no budget.

    What ran before the app was adopted has one without a colour.
    """
    gaps: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            colour = app.selector.get("version", "")
            budget = f"{app.name}-{colour}" if colour else before
            find = partial(app.fleet.cluster.store.find, "poddisruptionbudgets", app.namespace)
            if budget and not find(budget) and colour == app.selector.get("version", ""):
                budgets = app.objects("poddisruptionbudgets")
                gaps.append(f"{colour} is live, but there is {[*budgets]}")

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield gaps
    finally:
        over.set()
        thread.join(10)


def running_job(app: Member) -> str:
    """Let the CronJob have started a Job that runs; return its name."""
    owner = app.fleet.cluster.store.find("cronjobs", app.namespace, f"{app.name}-night")
    assert owner is not None
    reference = {"apiVersion": "batch/v1", "kind": "CronJob", "name": f"{app.name}-night"}
    reference |= {"uid": owner["metadata"]["uid"], "controller": True}
    pod = owner["spec"]["jobTemplate"]["spec"]
    meta = {
        "name": f"{app.name}-night-1",
        "namespace": app.namespace,
        "ownerReferences": [reference],
    }
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta}
    app.fleet.cluster.store.create("jobs", {**job, "spec": {**pod, "suspend": True}})
    return f"{app.name}-night-1"


def is_allowed_first(shop: Member) -> None:
    """Be refused for want of a verb, before anything changes, until it is granted."""
    line = shop.deployed("v0", change=beside(shop))
    assert line["reason"] == "ManifestRefused", line
    assert "lacks the verb get for ingresses.networking.k8s.io" in line["detail"]
    assert (shop.service(), state(shop)["budgets"]) == ({}, [])
    allow_ingresses(shop.fleet)


def goes_forward_and_back(shop: Member) -> None:
    """Switch to a version, and to one that is unhealthy, with a budget at every moment."""
    with watched(shop) as gaps:
        assert shop.deployed("v2", change=beside(shop, "bb"))["outcome"] == "deployed"
        comes(shop, "bb")
        shop.quiet()
        run = shop.go("v3", change=beside(shop, "ccc"))
        shop.switched(run)
        eventually(lambda: state(shop)["peers"] == shop.selector, 20, "the Service follows")
        assert state(shop)["schedule"] == "2 3 * * *", "nothing is confirmed"
        shop.tell("v3", "/turn-sick")
        assert shop.fleet.ended(run)["outcome"] == "switched-back"
        shop.quiet()
        comes(shop, "bb")
    assert gaps == []


def loses_everything_and_gets_it_back(shop: Member) -> None:
    """Deploy a version that has nothing beside it, and roll it back."""
    job = running_job(shop)
    planned = shop.fleet.command("plan", "shop", shop.release("v4")).stdout
    assert "CronJob/shop-night: deleted when it is confirmed" in planned
    assert shop.deployed("v4")["outcome"] == "deployed"
    shop.quiet()
    nothing = {"scales": None, "peers": None, "schedule": None, "text": None, "ingress": False}
    assert state(shop) == {**nothing, "budgets": []}
    assert shop.fleet.cluster.store.find("jobs", "production", job), "its running Job goes on"
    assert shop.fleet.command("rollback", "shop").returncode == 0
    comes(shop)


def test_it_follows_through_switches_a_switch_back_and_rollbacks(apps: Fleet) -> None:
    shop = apps["shop"]
    is_allowed_first(shop)
    assert shop.deployed("v1", change=beside(shop))["outcome"] == "deployed"
    comes(shop)
    shop.quiet()
    goes_forward_and_back(shop)
    assert apps.command("rollback", "shop").returncode == 0
    comes(shop)
    shop.quiet()
    shown = " ".join(apps.command("status", "shop").stdout.split())
    assert "beside it: ConfigMap/shop-dashboard, CronJob/shop-night, Horiz" in shown
    loses_everything_and_gets_it_back(shop)
    assert apps.said("what stands beside the app did not follow", app="shop") == []


def workers(app: Member) -> list[str]:
    """Return the versions of the ready pods of an app's worker."""
    pods = app.fleet.cluster.store.list("pods", app.namespace)
    own = [p for p in pods if p["metadata"]["labels"].get("app") == f"{app.name}-worker"]
    stays = [p for p in own if "deletionTimestamp" not in p["metadata"]]
    return [variable(p, "VERSION") for p in stays if is_ready(p)]


def with_worker(app: Member, version: str) -> Change:
    """Return a change that puts one object of each kind beside an app, and a worker."""
    labels = {"app": f"{app.name}-worker"}
    container = {"name": "worker", "image": app.fleet.image}
    container["env"] = [{"name": "VERSION", "value": version}, {"name": "MODES", "value": ""}]
    pod = {"terminationGracePeriodSeconds": 1, "containers": [container]}
    spec = {"replicas": 1, "minReadySeconds": 1, "selector": {"matchLabels": labels}}
    spec["template"] = {"metadata": {"labels": labels}, "spec": pod}
    worker = named("apps/v1", "Deployment", f"{app.name}-worker", spec=spec)
    return beside(app, version, "ingress", worker=worker)


def stands_whole(app: Member, version: str) -> None:
    """Wait until a version is live, and everything beside it is of that version."""
    app.quiet()
    assert app.answer()["version"] == version
    expected = {**follows(app, version), "ingress": False}
    eventually(lambda: state(app) == expected, 30, f"{state(app)} is {expected}")
    eventually(lambda: workers(app) == [version], 30, f"{workers(app)} is {version}")


def test_five_switches_two_switch_backs_and_a_rollback_leave_nothing_behind_or_unprotected(
    apps: Fleet,
) -> None:
    whole = apps["whole"]
    assert whole.deployed("v0", change=with_worker(whole, "v0"))["outcome"] == "deployed"
    stands_whole(whole, "v0")
    job = running_job(whole)
    with watched(whole) as gaps, whole.traffic() as traffic:
        for number in range(1, 6):
            version = f"v{number}"
            line = whole.deployed(version, change=with_worker(whole, version))
            assert line["outcome"] == "deployed", line
            stands_whole(whole, version)
            if number in (2, 4):
                run = whole.go(f"sick{number}", change=with_worker(whole, f"sick{number}"))
                whole.switched(run)
                whole.tell(f"sick{number}", "/turn-sick")
                assert apps.ended(run)["outcome"] == "switched-back"
                stands_whole(whole, version)
        assert apps.command("rollback", "whole").returncode == 0
        stands_whole(whole, "v4")
    assert gaps == [], "the live pods had a budget at every moment"
    assert traffic.failures == []
    assert apps.cluster.store.find("jobs", "production", job), "its running Job goes on"


def ran_before(app: Member, version: str) -> None:
    """Let a version run with all that stands beside it, as its owner has applied it."""
    objects = app_objects(app.name, version, "", app.fleet.image)
    template = objects["Deployment"]["spec"]["template"]
    template["metadata"]["labels"] = {"app": app.name}
    with_worker(app, version)(objects)
    stream = yaml.safe_dump_all(copy.deepcopy([*objects.values()]))
    done = app.fleet.kubectl("apply", "-n", app.namespace, "-f", "-", stdin=stream)
    assert done.code == 0, done
    eventually(lambda: app.service() and answers(app) == version, 60, f"{version} answers")
    eventually(lambda: workers(app) == [version], 60, f"the worker of {version} is ready")


def stands_as_before(app: Member, version: str, *, whole: bool = True) -> None:
    """Wait until all is again as its owner had it; after a rollback, Services are narrower."""
    app.quiet()
    assert app.answer()["version"] == version
    expected = {
        "scales": app.name,
        "peers": {"app": app.name},
        "schedule": f"{len(version)} 3 * * *",
        "text": version,
        "ingress": False,
        "budgets": [app.name],
    }
    if whole:
        eventually(lambda: state(app) == expected, 30, f"{state(app)} is {expected}")
    else:  # a version of ours can be gone to again, whose pods the wider selector would reach
        eventually(lambda: state(app) == {**expected, "peers": app.selector}, 30, "it is back")
    eventually(lambda: workers(app) == [version], 30, f"{workers(app)} is {version}")


def turns_sick(app: Member, version: str) -> None:
    """Switch to a version, have all of it follow, and be switched back from it."""
    run = app.go(version, change=with_worker(app, version))
    app.switched(run)
    eventually(lambda: state(app)["scales"] == f"{app.name}-{app.selector['version']}", 20)
    app.tell(version, "/turn-sick")
    assert app.fleet.ended(run)["outcome"] == "switched-back"


def is_live_whole(app: Member, version: str) -> None:
    """Deploy a version, and have all of it follow."""
    assert app.deployed(version, change=with_worker(app, version))["outcome"] == "deployed"
    stands_whole(app, version)


def test_what_stood_beside_a_running_app_is_taken_over_and_given_back(apps: Fleet) -> None:
    taken = apps["taken"]
    ran_before(taken, "v0")
    commit = taken.release("planned", change=with_worker(taken, "planned"))
    planned = apps.command("plan", "taken", commit).stdout
    assert "HorizontalPodAutoscaler/taken: taken over, changed with the switch" in planned
    assert "PodDisruptionBudget/taken: taken over, deleted after the drain" in planned
    with watched(taken, "taken") as gaps, taken.traffic() as traffic:
        turns_sick(taken, "sick1")
        stands_as_before(taken, "v0")
        is_live_whole(taken, "v11")
        assert apps.command("rollback", "taken").returncode == 0
        stands_as_before(taken, "v0", whole=False)
        is_live_whole(taken, "v222")
    assert (traffic.failures, gaps) == ([], [])
    assert apps.said("what stands beside the app did not follow", app="taken") == []


def test_what_was_taken_over_is_told(apps: Fleet) -> None:
    told = apps["told"]
    ran_before(told, "v0")
    is_live_whole(told, "v1")
    (line,) = apps.said("taken over", app="told")
    for name in ("CronJob/told-night", "Deployment/told-worker", "PodDisruptionBudget/told"):
        assert name in line["detail"]

    def events() -> list[Object]:
        """Return the Events of it."""
        listed = apps.cluster.store.list("events", "production")
        return [e for e in listed if (e["reason"], "told" in e["message"]) == ("Adopted", True)]

    eventually(lambda: [e for e in events() if e["involvedObject"]["kind"] == "Service"], 30)
    assert line["detail"] in events()[0]["message"]


def nonsense(app: Member) -> Object:
    """Return a CronJob with a schedule that is none."""
    return night(app, "nonsense")


def test_what_the_cluster_refuses_or_others_have_ends_a_run_before_anything_changes(
    apps: Fleet,
) -> None:
    refused = apps["refused"]
    monitor = named("monitoring.coreos.com/v1", "ServiceMonitor", "web", spec={})
    foreign = {**budget("refused"), "metadata": {"name": "refused-blue", "namespace": "production"}}
    apps.cluster.store.create("poddisruptionbudgets", foreign)
    before = apps.cluster.store.find("poddisruptionbudgets", "production", "refused-blue")
    faults = {
        'The CronJob "refused-night" is invalid: spec.schedule': {"night": nonsense(refused)},
        "The cluster has no ServiceMonitor of monitoring.coreos.com/v1": {"monitor": monitor},
        "PodDisruptionBudget/refused-blue is there without our labels": {},
    }
    for number, (said, more) in enumerate(faults.items()):
        leave = ("ingress", "budget") if more else ("ingress",)
        change = beside(refused, "a", *leave, **more)
        run = refused.go(f"v{number}", change=change)
        line = eventually(lambda run=run: apps.said("run ended", run=run), 60, "it ends")[0]
        assert said in line["detail"], line
        assert (refused.leftovers(), refused.objects("cronjobs")) == ([], {})
    find = apps.cluster.store.find
    after = find("poddisruptionbudgets", "production", "refused-blue")
    assert (after or {})["spec"] == (before or {})["spec"]
    assert "labels" not in (after or {})["metadata"]
    apps.cluster.store.remove("poddisruptionbudgets", "production", "refused-blue")


def test_what_a_first_version_made_goes_with_it_when_it_fails(apps: Fleet) -> None:
    failed = apps["failed"]
    change = beside(failed, "a", "ingress")
    assert failed.deployed("v1", modes="crash-at-start", change=change)["outcome"] == "failed"
    eventually(lambda: state(failed)["budgets"] == [], 30, "its budget is gone")
    eventually(lambda: failed.leftovers() == [], 30, "nothing is left")


def test_a_daemon_that_dies_after_the_switch_lets_the_next_one_follow(apps: Fleet) -> None:
    killed = apps["killed"]
    change = beside(killed, "a", "ingress", scaler=autoscaler("killed", minReplicas=2))
    assert killed.deployed("v1", change=change)["outcome"] == "deployed"
    assert len(killed.pods("v1")) == 2, "as many as the autoscaler wants at least"
    killed.quiet()
    run = killed.go("v2", change=change)
    # the first is the dry run
    with apps.held("update", "horizontalpodautoscalers", after=1):
        before = state(killed)["scales"]
        apps.kill()
    assert before == f"killed-{killed.idle()}"
    apps.start()
    expected = f"killed-{killed.selector['version']}"
    eventually(lambda: state(killed)["scales"] == expected, 30, "the autoscaler follows")
    apps.ended(run, 60)
    killed.quiet()
    assert state(killed)["budgets"] == [f"killed-{killed.selector['version']}"]


def test_what_fails_after_the_switch_is_reported_and_takes_no_traffic_back(apps: Fleet) -> None:
    later = apps["later"]
    change = beside(later, "a", "ingress")
    assert later.deployed("v1", change=change)["outcome"] == "deployed"
    later.quiet()
    before = apps.metric("gitops_hook_errors_total", where="companions")
    changed = beside(later, "bb", "ingress")
    # the first is the dry run
    fault = apps.fault("forbid", "update", "cronjobs", times=None, after=1)
    run = later.go("v2", change=changed)
    try:
        eventually(
            lambda: apps.said("what stands beside the app did not follow", run=run), 60, "it fails"
        )
    finally:
        apps.cluster.faults.lift(fault)
    assert apps.ended(run)["outcome"] == "deployed"
    assert later.answer()["version"] == "v2"
    assert apps.metric("gitops_hook_errors_total", where="companions") > before
    later.quiet()
    eventually(lambda: state(later)["schedule"] == "2 3 * * *", 20, "the next step does it")


def forget_companions(app: Member) -> None:
    """Let the release before the live one be recorded as version 0.1.0 did."""
    history = app.note("history")
    (entry,) = [e for e in history[1:] if e["outcome"] == "deployed"][:1]
    store = app.fleet.cluster.store
    record = store.find("configmaps", app.namespace, entry["release"])
    assert record is not None
    release = replace(Release.from_configmap(record), companions=None)
    old = release.configmap(app.name)
    old["metadata"]["namespace"] = app.namespace
    store.create("configmaps", old)
    changed = [{**e, "beside": False} for e in history]
    changed[history.index(entry)]["release"] = old["metadata"]["name"]
    notes = {"metadata": {"annotations": {"gitops-hook/history": json.dumps(changed)}}}
    args = ("patch", "service", app.name, "-n", app.namespace, "--type=merge")
    assert app.fleet.kubectl(*args, "-p", json.dumps(notes)).code == 0


def test_a_rollback_to_a_release_of_before_touches_nothing_beside_the_app(apps: Fleet) -> None:
    old = apps["old"]
    for version, text in (("v1", "a"), ("v2", "bb")):
        line = old.deployed(version, change=beside(old, text, "ingress"))
        assert line["outcome"] == "deployed", line
        old.quiet()
    before = state(old)
    forget_companions(old)
    assert apps.command("rollback", "old").returncode == 0
    assert old.answer()["version"] == "v1"
    assert state(old) == before
