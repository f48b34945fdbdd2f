"""A name that an app needs is refused to another one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

import gitops_hook as hook
from tests.fleet import app_objects
from tests.idle_controller import Stop
from tests.settings import loaded
from tests.world import Object


def companion(kind: str, name: str, **content: Any) -> Object:
    """Return an object as a commit has it."""
    api = {"Deployment": "apps/v1"}.get(kind, "v1")
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}, **content}


def worker(name: str) -> Object:
    """Return a Deployment that no Service selects."""
    labels = {"app": "worker"}
    pod = {"containers": [{"name": "web", "image": f"registry.example.com/x@sha256:{'0f' * 32}"}]}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    return companion("Deployment", name, spec=spec)


def service(name: str, **spec: Any) -> Object:
    """Return a Service of the pods of evil."""
    ports = [{"name": "http", "port": 80}]
    return companion("Service", name, spec={"selector": {"app": "evil"}, "ports": ports, **spec})


TAKEN = [
    worker("shop-green"),
    worker("shop-blue"),
    service("shop-preview", clusterIP="None"),
    service("web"),
    companion("ConfigMap", "shop-adopted", data={"a": "b"}),
    companion("ConfigMap", "shop-release", data={"a": "b"}),
    companion("ConfigMap", "shop-release-0123abcd", data={"a": "b"}),
    companion("ConfigMap", "settings-0123abcd", data={"a": "b"}),
    companion("ConfigMap", "log-shop-1a2b3c4d-0123456789", data={"a": "b"}),
    # What the other app may have one day, or had before it was deployed from here.
    worker("shop-worker"),
    service("shop"),
    service("shop-peers", clusterIP="None"),
    companion("ConfigMap", "shop-config", data={"a": "b"}),
]
FREE = [
    worker("worker"),
    worker("shopping-worker"),
    worker("evil-shop-worker"),
    service("evil-peers", clusterIP="None"),
    service("peers", clusterIP="None"),
    companion("ConfigMap", "web", data={"a": "b"}),
    companion("ConfigMap", "releases", data={"a": "b"}),
    companion("ConfigMap", "settings-5f7g8h9k2m", data={"a": "b"}),
]


def configured(*names: str, environments: str = "[staging, production]") -> hook.Config:
    """Return a configuration of apps, of which shop has another live Service."""
    deploy = f"deploy: {{environments: {environments}"
    entries = [
        f"{{name: {name}, repository: /srv/{name}.git, build: {{builder: none}}, {deploy}"
        f"{', service: web' if name == 'shop' else ''}}}}}"
        for name in names
    ]
    return loaded(f"apps: [{', '.join(entries)}]")


def objects_of(config: hook.Config, folder: Path, *more: Object) -> hook.AppObjects:
    """Return what a deployer reads of the manifests of evil, with further objects in them."""
    image = f"registry.example.com/evil@sha256:{'0f' * 32}"
    objects = [*copy.deepcopy(app_objects("evil", "v1", "", image)).values(), *more]
    (folder / "deploy").mkdir(parents=True)
    (folder / "deploy" / "app.yaml").write_text(yaml.safe_dump_all(copy.deepcopy(objects)))
    kubectl = hook.Kubectl(hook.Metrics())
    git: Any = None
    doors = hook.Doors(
        kubectl=kubectl,
        git=git,
        secrets=hook.Secrets(folder),
        clock=hook.Clock(),
        reports=hook.Reports(kubectl.metrics),
        stop=Stop(),
    )
    (app,) = [app for app in config.apps if app.name == "evil"]
    run = hook.Run(id="evil-1", app="evil", ref="refs/heads/main", commit="a" * 40)
    task = hook.Task(app=app, environment="production", namespace="production", run=run)
    return hook.Deployer(doors, config.apps).read_objects(task, folder)


def faults_of(config: hook.Config, folder: Path, *more: Object) -> list[str]:
    """Return what is refused of them."""
    try:
        objects_of(config, folder, *more)
    except hook.ManifestError as refused:
        return [fault.text for fault in refused.faults]
    return []


@pytest.mark.parametrize("item", TAKEN, ids=lambda item: item["metadata"]["name"])
def test_a_name_that_another_app_needs_is_refused(item: Object, tmp_path: Path) -> None:
    (said,) = faults_of(configured("evil", "shop"), tmp_path, item)
    assert f"{item['kind']} {item['metadata']['name']} has " in said
    assert said.endswith("Rename it.")


@pytest.mark.parametrize("item", FREE, ids=lambda item: item["metadata"]["name"])
def test_a_name_that_no_other_app_needs_is_free(item: Object, tmp_path: Path) -> None:
    assert faults_of(configured("evil", "shop"), tmp_path, item) == []


@pytest.mark.parametrize("item", TAKEN, ids=lambda item: item["metadata"]["name"])
def test_an_app_that_has_an_environment_for_itself_has_all_names(
    item: Object, tmp_path: Path
) -> None:
    assert faults_of(configured("evil"), tmp_path, item) == []


def test_of_two_apps_the_one_whose_longer_name_begins_an_objects_name_has_it() -> None:
    assert hook.owner_by_name("shop-api-cache", "shop", ["shop-api"]) == "shop-api"
    assert hook.owner_by_name("shop-api-cache", "shop-api", ["shop"]) == "shop-api"
    assert hook.owner_by_name("shop-api", "shop-api", ["shop"]) == "shop-api"
    assert hook.owner_by_name("shop-worker", "shop", ["shop-api"]) == "shop"
    assert hook.owner_by_name("shop-api", "shop", ["shop-api"]) == "shop-api"
    assert hook.owner_by_name("cache", "shop", ["shop-api"]) == ""


def with_pod(item: Object, **fields: Any) -> Object:
    """Return a worker whose pods say more."""
    item["spec"]["template"]["spec"] |= fields
    return item


@pytest.mark.parametrize("subdomain", ["databases", "production", "evilest"])
def test_pods_beside_those_of_other_apps_have_names_that_begin_with_their_app(
    subdomain: str, tmp_path: Path
) -> None:
    item = with_pod(worker("work"), hostname="postgres", subdomain=subdomain)
    (said,) = faults_of(configured("evil", "shop"), tmp_path / "a", item)
    assert said == (
        "Deployment work: its subdomain does not begin with evil. Rename it and its Service."
    )
    assert faults_of(configured("evil"), tmp_path / "b", item) == []
    item = with_pod(worker("work"), subdomain="evil-peers")
    assert faults_of(configured("evil", "shop"), tmp_path / "c", item) == []


def test_pods_beside_those_of_other_apps_get_no_variables_of_services(tmp_path: Path) -> None:
    asking = with_pod(worker("asking"), enableServiceLinks=True)
    silent = with_pod(worker("silent"), enableServiceLinks=None)
    night = companion("CronJob", "night")
    pod = {**worker("x")["spec"]["template"]["spec"], "restartPolicy": "Never"}
    night["apiVersion"] = "batch/v1"
    job = {"template": {"spec": pod}}
    night["spec"] = {"schedule": "0 3 * * *", "jobTemplate": {"spec": job}}

    def links(config: hook.Config, folder: Path) -> list[Any]:
        objects = objects_of(config, folder, asking, silent, night)
        made = (objects.deployment, *objects.companions)
        return [hook.pod_of(item).get("enableServiceLinks") for item in made]

    assert links(configured("evil", "shop"), tmp_path / "a") == [False, True, False, False]
    assert links(configured("evil"), tmp_path / "b") == [None, True, None, None]
