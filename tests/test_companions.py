"""What stands beside an app: it follows the live version, and nothing of others is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fleet import Fleet, Member, fleet
from tests.services import Change
from tests.world import Object, eventually

APPS: dict[str, Object] = {
    "shop": {"bake": "1s", "drain": "1s", "companions": ["Ingress"]},
    "other": {"bake": "1s", "drain": "1s"},
}
RESOURCES = {
    "horizontalpodautoscalers": "web",
    "services": "web-peers",
    "cronjobs": "web-night",
    "configmaps": "web-dashboard",
    "ingresses": "web",
}


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, none of them deployed yet."""
    with fleet(tmp_path_factory.mktemp("companions"), APPS) as made:
        made.cluster.store.list("roles")
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
        "web",
        spec={**limits, **spec, "scaleTargetRef": target},
    )


def budget(app: str) -> Object:
    """Return a disruption budget of an app's pods."""
    selector = {"matchLabels": {"app": app}}
    spec = {"minAvailable": 1, "selector": selector}
    return named("policy/v1", "PodDisruptionBudget", "web", spec=spec)


def night(image: str, schedule: str = "0 3 * * *", **pod: Any) -> Object:
    """Return a CronJob."""
    container = {"name": "night", "image": image}
    spec = {"restartPolicy": "Never", "containers": [container], **pod}
    template = {"spec": {"template": {"spec": spec}}}
    return named(
        "batch/v1", "CronJob", "web-night", spec={"schedule": schedule, "jobTemplate": template}
    )


def peers(app: str) -> Object:
    """Return a headless Service of an app's pods."""
    port = {"name": "peers", "port": 7000}
    spec = {"clusterIP": "None", "selector": {"app": app}, "ports": [port]}
    return named("v1", "Service", "web-peers", spec=spec)


def beside(app: Member, text: str = "a", *leave_out: str, **more: Object) -> Change:
    """Return a change that puts one object of each kind beside an app."""
    rule = {"http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend(app)}]}}
    items = {
        "scaler": autoscaler(app.name),
        "budget": budget(app.name),
        "peers": peers(app.name),
        "night": night(app.fleet.image, f"{len(text)} 3 * * *"),
        "dashboard": named("v1", "ConfigMap", "web-dashboard", data={"text": text}),
        "ingress": named("networking.k8s.io/v1", "Ingress", "web", spec={"rules": [rule]}),
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
        return (find(resource, app.namespace, RESOURCES[resource]) or {}).get("spec") or {}

    dashboard = find("configmaps", app.namespace, "web-dashboard") or {}
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
        "budgets": [f"web-{colour}"],
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


def test_it_follows_through_switches_a_switch_back_and_a_rollback(apps: Fleet) -> None:
    shop = apps["shop"]
    line = shop.deployed("v0", change=beside(shop))
    assert line["reason"] == "ManifestRefused", line
    assert "lacks the verb get for ingresses.networking.k8s.io" in line["detail"]
    allow_ingresses(apps)
    line = shop.deployed("v1", change=beside(shop))
    assert line["outcome"] == "deployed", line
    comes(shop)
    shop.quiet()
    assert shop.deployed("v2", change=beside(shop, "bb"))["outcome"] == "deployed"
    comes(shop, "bb")
    shop.quiet()
    run = shop.go("v3", change=beside(shop, "ccc"))
    shop.switched(run)
    shop.tell("v3", "/turn-sick")
    assert apps.ended(run)["outcome"] == "switched-back"
    shop.quiet()
    comes(shop, "bb")
    assert apps.command("rollback", "shop").returncode == 0
    comes(shop)
    shop.quiet()
    comes(shop)
    print(apps.command("status", "shop").stdout)
    print(apps.command("plan", "shop").stdout)
    assert shop.deployed("v4")["outcome"] == "deployed"
    shop.quiet()
    nothing = {"scales": None, "peers": None, "schedule": None, "text": None, "ingress": False}
    assert state(shop) == {**nothing, "budgets": []}
    assert apps.said("what stands beside the app did not follow") == []
