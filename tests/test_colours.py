"""An app that begins to use the pod label `version` itself, and stops to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fleet import Fleet, Member, Traffic, fleet
from tests.world import Object, eventually

COLOUR = "gitops-hook/colour"
OWN = "gitops-hook/app"


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Applications on one cluster, none of them deployed yet."""
    settings: Object = {"bake": "1s", "rollout_timeout": "20s"}
    names = {"meshed": settings, "returning": settings, "failing": settings}
    with fleet(tmp_path_factory.mktemp("colours"), names) as made:
        yield made


def labelled(version: str) -> Callable[[dict[str, Object]], None]:
    """Return a change that gives the pods a label `version` of the app's own."""

    def change(objects: dict[str, Object]) -> None:
        labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
        labels["version"] = version

    return change


def deploy(app: Member, version: str, *, label: str = "", **content: str) -> Object:
    """Deploy a version, under load, whose pods have a label `version` or not; return its end."""
    change = labelled(label) if label else None
    with app.traffic() as traffic:
        ended = app.deployed(version, change=change, **content)
        app.quiet()
    assert traffic.failures == []
    return ended


def answers_with(traffic: Traffic, version: str) -> None:
    """Wait until the visitors get a version."""
    eventually(lambda: traffic.versions[-1:] == [version], 20, f"{version} answers")


def colour_labels(app: Member, colour: str) -> Object:
    """Return what the Deployment of a colour selects."""
    spec = app.objects("deployments")[f"{app.name}-{colour}"]["spec"]
    return dict(spec["selector"]["matchLabels"])


def live_labels(app: Member) -> Object:
    """Return what the live Service selects, without the run."""
    return {key: value for key, value in app.selector.items() if key != "gitops-hook/run"}


def test_a_commit_that_adds_the_label_and_one_that_drops_it_are_deployed(apps: Fleet) -> None:
    app = apps["meshed"]
    assert app.deployed("v1")["outcome"] == "deployed"
    assert live_labels(app) == {OWN: "meshed", "version": "blue"}
    assert deploy(app, "v2", label="mesh-2")["outcome"] == "deployed"
    assert live_labels(app) == {OWN: "meshed", COLOUR: "green"}
    # the idle Deployment has the other form, and makes room
    assert deploy(app, "v3", label="mesh-3")["outcome"] == "deployed"
    assert live_labels(app) == colour_labels(app, "blue") == {OWN: "meshed", COLOUR: "blue"}
    assert {p["metadata"]["labels"]["version"] for p in app.pods("v3")} == {"mesh-3"}
    assert deploy(app, "v4")["outcome"] == "deployed"
    assert live_labels(app) == colour_labels(app, "green") == {OWN: "meshed", "version": "green"}
    assert app.answer()["version"] == "v4"


def test_a_rollback_goes_to_versions_of_both_forms(apps: Fleet) -> None:
    app = apps["returning"]
    for version, label in (("v1", ""), ("v2", "mesh-2"), ("v3", "mesh-3"), ("v4", "")):
        change = labelled(label) if label else None
        assert app.deployed(version, change=change)["outcome"] == "deployed"
    runs = [entry["run"] for entry in reversed(app.note("history"))]
    run = dict(zip(["v1", "v2", "v3", "v4"], dict.fromkeys(runs), strict=True))
    for version, labels in (
        ("v3", {OWN: "returning", COLOUR: "blue"}),  # it stands there
        ("v1", {OWN: "returning", "version": "green"}),  # in the colour that is idle by now
        ("v2", {OWN: "returning", COLOUR: "blue"}),
    ):
        with app.traffic() as traffic:
            done = apps.command("rollback", app.name, "--to", run[version])
            assert done.returncode == 0, done
            answers_with(traffic, version)
        assert traffic.failures == []
        assert live_labels(app) == labels


def test_a_failed_deployment_of_the_other_form_gives_the_colour_back(apps: Fleet) -> None:
    app = apps["failing"]
    assert app.deployed("v1")["outcome"] == "deployed"
    assert app.deployed("v2")["outcome"] == "deployed"
    app.quiet()
    ended = deploy(app, "v3", label="mesh-3", modes="crash-at-start")
    assert ended["outcome"] == "failed"
    app.stands("blue", "v1")
    assert colour_labels(app, "blue") == {OWN: "failing", "version": "blue"}
    assert (app.answer()["version"], app.pods("v3")) == ("v2", [])
