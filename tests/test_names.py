"""A name that an app needs is not taken by another one, and what another one has stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import gitops_hook as hook
from tests.fleet import Fleet, Member, app_objects, fleet
from tests.idle_controller import Stop
from tests.settings import loaded
from tests.world import Object

APPS: dict[str, Object] = {
    name: {"bake": "1s", "drain": "1s"}
    for name in ("evil", "shop", "worker", "preview", "headless", "live", "led")
}
APPS["shop"]["service"] = "web"


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
]
FREE = [
    worker("shop-worker"),
    service("shop-peers", clusterIP="None"),
    service("shop"),
    companion("ConfigMap", "web", data={"a": "b"}),
    companion("ConfigMap", "shop-releases", data={"a": "b"}),
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


def faults_of(config: hook.Config, folder: Path, *more: Object) -> list[str]:
    """Return what a deployer refuses of the manifests of evil, with further objects in them."""
    image = f"registry.example.com/evil@sha256:{'0f' * 32}"
    objects = [*copy.deepcopy(app_objects("evil", "v1", "", image)).values(), *more]
    (folder / "deploy").mkdir()
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
    try:
        hook.Deployer(doors, config.apps).read_objects(task, folder)
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


# On a cluster.


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, none of them deployed yet."""
    with fleet(tmp_path_factory.mktemp("names"), APPS) as made:
        yield made


def test_it_is_refused_when_it_is_pushed_and_the_other_app_is_deployed(apps: Fleet) -> None:
    taken = [TAKEN[0], service("shop-preview", clusterIP="None"), service("web"), *TAKEN[4:6]]

    def add(objects: dict[str, Object]) -> None:
        objects |= {item["metadata"]["name"]: item for item in taken}

    before = apps["evil"].leftovers()
    run = apps["evil"].go("v1", change=add)
    line = apps.ended(run)
    assert (line["outcome"], line["reason"]) == ("failed", "ManifestRefused")
    assert "Deployment shop-green has a name that app shop needs. Rename it." in line["detail"]
    assert apps["evil"].leftovers() == before
    assert apps.said("stage ended", run=run, stage="build") == []
    shop = apps["shop"]

    def rename(objects: dict[str, Object]) -> None:
        objects["Service"]["metadata"]["name"] = "web"

    for version in ("v1", "v2"):
        assert shop.deployed(version, change=rename)["outcome"] == "deployed"


def put(app: Member, resource: str, item: Object, owner: str = "evil") -> Object:
    """Let another app have an object, as before it was refused; return it as it is then."""
    item = copy.deepcopy(item)
    labels = hook.companion_labels(owner)
    if owner == app.name:
        labels["gitops-hook/stage"] = "preview"
    item["metadata"] |= {"namespace": app.namespace, "labels": labels}
    app.fleet.cluster.store.create(resource, item)
    return stands(app, resource, item["metadata"]["name"])


def stands(app: Member, resource: str, name: str) -> Object:
    """Return an object but what the cluster itself writes on it."""
    item = copy.deepcopy(app.fleet.cluster.store.find(resource, app.namespace, name) or {})
    item.pop("status", None)
    kept = ("name", "labels", "uid")
    notes = {
        k: v
        for k, v in item["metadata"].get("annotations", {}).items()
        if k.startswith("gitops-hook/")
    }
    item["metadata"] = {k: v for k, v in item["metadata"].items() if k in kept} | notes
    return item


def refusal(app: Member, version: str = "v1") -> str:
    """Deploy a version that ends by what somebody else has; return what is said."""
    line = app.fleet.ended(app.go(version))
    assert (line["outcome"], line["reason"]) == ("failed", "AdoptionRefused"), line
    return str(line["detail"])


def test_a_worker_of_another_app_in_a_colour_is_named_and_stays_as_it_is(apps: Fleet) -> None:
    app = apps["worker"]
    before = put(app, "deployments", worker("worker-green"))
    assert app.deployed("v1")["outcome"] == "deployed"
    said = refusal(app, "v2")
    assert said == "Deployment worker-green belongs to app evil; delete or rename it"
    assert stands(app, "deployments", "worker-green") == before


def test_a_preview_service_of_another_app_is_named_and_stays_as_it_is(apps: Fleet) -> None:
    app = apps["preview"]
    before = put(app, "services", service("preview-preview", clusterIP="None"))
    assert refusal(app) == "Service preview-preview belongs to app evil; delete or rename it"
    assert stands(app, "services", "preview-preview") == before


@pytest.mark.parametrize(
    "spec", [{"clusterIP": "None"}, {"type": "ExternalName", "externalName": "example.com"}]
)
def test_a_preview_service_without_an_address_rejects_no_commit(apps: Fleet, spec: Object) -> None:
    app = apps["headless"]
    put(app, "services", service("headless-preview", **spec), "headless")
    said = refusal(app)
    assert said == "Service headless-preview has no cluster IP; delete it, and it is made anew"
    # as the deployment's end may have swept it away
    app.fleet.cluster.store.remove("services", app.namespace, "headless-preview")


def test_a_live_service_of_another_app_gets_no_claim_and_no_label(apps: Fleet) -> None:
    app = apps["live"]
    before = put(app, "services", service("live"))
    assert refusal(app) == "Service live belongs to app evil; delete or rename it"
    assert stands(app, "services", "live") == before


def test_a_live_service_that_leads_to_another_app_is_not_taken_over(apps: Fleet) -> None:
    app = apps["led"]
    item = service("led", selector={"gitops-hook/app": "evil", "version": "blue"})
    item["metadata"]["namespace"] = app.namespace
    app.fleet.cluster.store.create("services", item)
    before = stands(app, "services", "led")
    assert refusal(app) == "Service led belongs to app evil; delete or rename it"
    assert stands(app, "services", "led") == before
