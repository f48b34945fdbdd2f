"""Apps of one cluster stay apart: none takes what another has or needs, nor its traffic."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator

import pytest

import gitops_hook as hook
from tests.fleet import Fleet, Member, fleet
from tests.test_names import TAKEN, companion, service, worker
from tests.world import Object

APPS: dict[str, Object] = {
    name: {"bake": "1s", "drain": "1s"}
    for name in (
        "evil",
        "shop",
        "worker",
        "preview",
        "headless",
        "live",
        "led",
        "guest",
        "host",
        "free",
        "later",
    )
}
APPS["shop"]["service"] = "web"


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
    item = worker("worker-green")
    # of pods that it shares with nobody, which would be another reason
    item["spec"]["template"]["metadata"]["labels"] = {"app": "evil-worker"}
    item["spec"]["selector"]["matchLabels"] = {"app": "evil-worker"}
    before = put(app, "deployments", item)
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


# What Services select.

Labels = dict[str, str]
MAIL = {"app": "mailer", "tier": "back"}


def labelled_pods(kind: str, labels: Labels) -> Callable[[dict[str, Object]], None]:
    """Return a change of manifests after which the pods of one object have these labels."""

    def change(objects: dict[str, Object]) -> None:
        if kind == "front":
            objects["Deployment"]["spec"]["template"]["metadata"]["labels"] |= labels
        elif kind == "worker":
            item = objects["worker"] = worker("guest-worker")
            if front := objects.get("Deployment"):
                item["spec"]["template"]["spec"] = copy.deepcopy(front["spec"]["template"]["spec"])
            item["spec"]["template"]["metadata"]["labels"] |= labels
            item["spec"]["selector"]["matchLabels"] = labels
        else:
            pod = {"restartPolicy": "Never", **worker("x")["spec"]["template"]["spec"]}
            job = {"template": {"metadata": {"labels": labels}, "spec": pod}}
            spec = {"schedule": "0 3 * * *", "jobTemplate": {"spec": job}}
            objects["night"] = {**companion("CronJob", "guest-night"), "spec": spec}
            objects["night"]["apiVersion"] = "batch/v1"

    return change


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("front", "Deployment guest-blue"),
        ("worker", "Deployment guest-worker"),
        ("cronjob", "CronJob guest-night"),
    ],
)
@pytest.mark.parametrize("adopted", [False, True], ids=["not deployed from here", "narrowed"])
def test_pods_that_the_live_service_of_another_app_selects_are_refused(
    apps: Fleet, kind: str, said: str, adopted: bool
) -> None:
    guest = apps["guest"]
    item = service("later", selector=MAIL)
    item["metadata"]["namespace"] = guest.namespace
    if adopted:
        narrow = {**MAIL, "pod-template-hash": "5d8f"}
        before = {"outcome": "adopted", "selector": narrow, "was": MAIL, "at": 1.0, "run": ""}
        item["metadata"]["annotations"] = {"gitops-hook/history": json.dumps([before])}
        item["spec"]["selector"] = narrow
    apps.cluster.store.create("services", item)
    try:
        line = apps.ended(guest.go("v1", change=labelled_pods(kind, MAIL)))
    finally:
        apps.cluster.store.remove("services", guest.namespace, "later")
    assert (line["outcome"], line["reason"]) == ("failed", "ManifestRefused")
    advice = "Service later of app later selects its pods. Give these pods other labels."
    assert line["detail"] == f"{said}: {advice}"
    assert not guest.objects("deployments")


def test_the_service_of_a_worker_selects_pods_of_its_own_app_only(apps: Fleet) -> None:
    free, host = apps["free"], apps["host"]
    labels = {**MAIL, "tier": "free"}

    def deployed(app: Member, version: str) -> None:
        def change(added: dict[str, Object]) -> None:
            labelled_pods("worker", labels)(added)
            added["worker"]["metadata"]["name"] = f"{app.name}-worker"
            added["peers"] = service(f"{app.name}-peers", selector=labels)

        assert app.deployed(version, change=change)["outcome"] == "deployed"

    for version in ("v1", "v2"):
        for app in (free, host):
            deployed(app, version)
    for app in (free, host):
        own = {**labels, "gitops-hook/worker-of": app.name}
        assert app.service(f"{app.name}-peers")["spec"]["selector"] == own
        listed = apps.cluster.store.list("pods", app.namespace)
        pods = [pod for pod in listed if own.items() <= pod["metadata"]["labels"].items()]
        owners = {pod["metadata"]["ownerReferences"][0]["name"].rpartition("-")[0] for pod in pods}
        assert owners == {f"{app.name}-worker"}
        worker_of = apps.cluster.store.find("deployments", app.namespace, f"{app.name}-worker")
        assert worker_of
        assert worker_of["spec"]["selector"]["matchLabels"] == own


def test_pods_that_a_worker_of_another_app_selects_are_refused(apps: Fleet) -> None:
    guest = apps["guest"]
    labels = {**MAIL, "tier": "queue"}
    item = worker("queue")
    item["spec"]["template"]["metadata"]["labels"] = labels
    item["spec"]["selector"]["matchLabels"] = labels
    put(guest, "deployments", item, "host")
    try:
        line = apps.ended(guest.go("v1", change=labelled_pods("worker", labels)))
    finally:
        apps.cluster.store.remove("deployments", guest.namespace, "queue")
    assert (line["outcome"], line["reason"]) == ("failed", "ManifestRefused")
    advice = "Deployment queue of app host selects its pods. Give these pods other labels."
    assert line["detail"] == f"Deployment guest-worker: {advice}"
