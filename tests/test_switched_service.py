"""Every field of the live Service: what moves with a switch, what waits for the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fleet import Fleet, Member, fleet
from tests.services import NARROW, WIDE, Change, holds, seen, with_service
from tests.world import Object, eventually

APPS: dict[str, Object] = {
    "carried": {"bake": "3s"},
    "taken": {"bake": "4s"},
    "typed": {"bake": "3s"},
    "fixed": {"bake": "1s"},
    "sized": {"bake": "1s", "retain": 1},
    "renamed": {"bake": "1s", "service": "web"},
}


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, none of them deployed yet."""
    with fleet(tmp_path_factory.mktemp("switched"), APPS) as made:
        yield made


def node_port(number: int, **spec: Any) -> Change:
    """Return a change that makes the Service a NodePort."""
    port = {"name": "http", "port": 80, "targetPort": "http", "nodePort": number}
    return with_service({}, type="NodePort", ports=[port], **spec)


def write_by_hand(app: Member) -> None:
    """Let a person write a label and annotations on the live Service."""
    where = ("-n", app.namespace, "service", app.name)
    keys = ("example.com/owner=ann", "example.com/only-wide=by-hand")
    assert app.fleet.kubectl("annotate", *where, *keys).code == 0
    assert app.fleet.kubectl("label", *where, "cost-centre=7").code == 0


# What moves with a switch, and back.


def test_every_field_that_routes_moves_with_a_switch_and_comes_back_as_it_was(apps: Fleet) -> None:
    carried = apps["carried"]
    assert carried.deployed("v1")["outcome"] == "deployed"
    assert carried.deployed("v2", change=with_service(NARROW))["outcome"] == "deployed"
    carried.quiet()
    assert holds(carried, NARROW)
    write_by_hand(carried)
    before = seen(carried)
    with carried.traffic() as traffic:
        run = carried.go("v3", change=with_service(WIDE))
        carried.switched(run)
        assert holds(carried, WIDE)
        during = seen(carried)
        assert during["labels"].keys() & {"only-narrow", "cost-centre"} == {"cost-centre"}
        assert "example.com/only-narrow" not in during["annotations"]
        assert during["annotations"]["example.com/owner"] == "ann"
        assert (during["sessionAffinity"], "sessionAffinityConfig" in during) == ("None", False)
        carried.tell("v3", "/turn-sick")
        assert apps.ended(run)["outcome"] == "switched-back"
    assert seen(carried) == before
    assert (traffic.failures, traffic.versions) == ([], ["v2", "v3", "v2"])


def test_a_rollback_brings_the_service_back_too_at_once_or_from_the_records(apps: Fleet) -> None:
    carried = apps["carried"]
    carried.quiet()
    before = seen(carried)
    wide = carried.deployed("v4", change=with_service(WIDE))["run"]
    carried.quiet()
    later = seen(carried)
    for goal, service in (([], before), (["--to", wide], later)):
        done = apps.command("rollback", "carried", *goal)
        assert (done.returncode, seen(carried)) == (0, service), done
    first = carried.note("history")[-1]["run"]
    done = apps.command("rollback", "carried", "--to", first)
    assert done.returncode == 0, done
    plain = seen(carried)
    assert plain["labels"].keys() == {"cost-centre", "app.kubernetes.io/managed-by"}
    assert plain["annotations"] == {"example.com/owner": "ann"}
    assert [port["name"] for port in plain["ports"]] == ["http"]
    assert (plain["internalTrafficPolicy"], "trafficDistribution" in plain) == ("Cluster", False)


def test_what_the_version_before_this_one_left_is_enough_to_go_back(apps: Fleet) -> None:
    carried = apps["carried"]
    carried.quiet()
    run = carried.go("v5", change=with_service(NARROW))
    carried.switched(run)
    notes = {"metadata": {"annotations": {"gitops-hook/replaced": None}}}
    args = ("patch", "service", "carried", "-n", carried.namespace, "--type=merge")
    assert apps.kubectl(*args, "-p", json.dumps(notes)).code == 0
    carried.tell("v5", "/turn-sick")
    assert apps.ended(run)["outcome"] == "switched-back"
    assert "only-narrow" not in seen(carried)["labels"]
    assert [port["name"] for port in seen(carried)["ports"]] == ["http"]


def another_service(apps: Fleet, name: str, number: int) -> None:
    """Let someone else take a node port."""
    spec = {"type": "NodePort", "ports": [{"port": 80, "nodePort": number}]}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}
    done = apps.kubectl("create", "-n", "staging", "-f", "-", stdin=json.dumps(service))
    assert done.code == 0, done


def test_traffic_goes_back_also_where_the_service_cannot_be_as_it_was(apps: Fleet) -> None:
    taken = apps["taken"]
    assert taken.deployed("v1", change=node_port(30201))["outcome"] == "deployed"
    with taken.traffic() as traffic:
        run = taken.go("v2", change=node_port(30202))
        taken.switched(run)
        another_service(apps, "thief", 30201)
        taken.tell("v2", "/turn-sick")
        assert apps.ended(run)["outcome"] == "switched-back"
    assert (traffic.failures, traffic.versions) == ([], ["v1", "v2", "v1"])
    assert [port["nodePort"] for port in seen(taken)["ports"]] == [30202]
    (line,) = apps.said("the live Service was not restored", app="taken")
    assert "provided port is already allocated" in line["detail"]


# What waits until a version is confirmed.


def test_another_type_comes_with_the_confirmation_and_never_goes_back(apps: Fleet) -> None:
    typed = apps["typed"]
    assert typed.deployed("v1")["outcome"] == "deployed"
    sick = typed.go("v2", change=node_port(30211))
    typed.switched(sick)
    assert (seen(typed)["type"], "nodePort" in seen(typed)["ports"][0]) == ("ClusterIP", False)
    typed.tell("v2", "/turn-sick")
    assert apps.ended(sick)["outcome"] == "switched-back"
    assert seen(typed)["type"] == "ClusterIP"
    run = typed.go("v3", change=node_port(30211, externalTrafficPolicy="Local"))
    typed.switched(run)
    assert seen(typed)["type"] == "ClusterIP"
    assert apps.ended(run)["outcome"] == "deployed"
    service = seen(typed)
    assert (service["type"], service["externalTrafficPolicy"]) == ("NodePort", "Local")
    assert service["ports"][0]["nodePort"] == 30211
    typed.quiet()
    done = apps.command("rollback", "typed")
    assert (done.returncode, typed.answer()["version"]) == (0, "v1"), done
    assert (seen(typed)["type"], seen(typed)["ports"][0]["nodePort"]) == ("NodePort", 30211)
    assert typed.deployed("v4")["outcome"] == "deployed"
    service = seen(typed)
    assert (service["type"], "externalTrafficPolicy" in service) == ("ClusterIP", False)
    assert "nodePort" not in service["ports"][0]


def test_a_confirmed_version_stays_where_the_api_server_refuses_its_type(apps: Fleet) -> None:
    typed = apps["typed"]
    typed.quiet()
    run = typed.go("v5", change=node_port(30212))
    typed.switched(run)
    another_service(apps, "quicker", 30212)
    assert apps.ended(run)["outcome"] == "deployed"
    assert (seen(typed)["type"], typed.answer()["version"]) == ("ClusterIP", "v5")
    (line,) = apps.said("the live Service was not changed", app="typed")
    assert "provided port is already allocated" in line["detail"]
    fields = "externalTrafficPolicy, ports, type"
    assert line["advice"] == f"Correct {fields} in the manifest, and push again."


# What is refused before anything changes.


def test_an_address_that_no_service_can_change_is_refused_before_anything_changes(
    apps: Fleet,
) -> None:
    fixed = apps["fixed"]
    assert fixed.deployed("v1")["outcome"] == "deployed"
    fixed.quiet()
    version = fixed.service()["metadata"]["resourceVersion"]
    run = fixed.go("v2", change=with_service({}, clusterIP="None"))
    ended = apps.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("failed", "ManifestRefused")
    assert ended["detail"].startswith("clusterIP of Service fixed cannot be changed. Restore ")
    assert fixed.service()["metadata"]["resourceVersion"] == version
    assert not apps.said("claimed", run=run)


def test_what_the_api_server_will_not_take_is_red_before_anything_changes(apps: Fleet) -> None:
    fixed = apps["fixed"]
    run = fixed.go("v3", change=with_service({}, internalTrafficPolicy="Node"))
    ended = apps.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("failed", "ManifestInvalid")
    assert "spec.internalTrafficPolicy" in ended["detail"]
    assert not apps.said("claimed", run=run)
    done = apps.command("plan", "fixed")
    assert (done.returncode, "spec.internalTrafficPolicy" in done.stdout) == (1, True), done


# Sizes.


def replicas(number: int | None) -> Change:
    """Return a change that asks for so many pods, or leaves it open."""

    def change(objects: dict[str, Object]) -> None:
        objects["Deployment"]["spec"]["replicas"] = number

    return change


def size(app: Member, colour: str) -> int:
    """Return how many replicas a colour asks for."""
    return int(app.objects("deployments")[f"{app.name}-{colour}"]["spec"]["replicas"])


def scale(app: Member, number: int) -> None:
    """Let a person scale the live version."""
    name = f"deployment/{app.name}-{app.selector['version']}"
    done = app.fleet.kubectl("scale", name, "-n", app.namespace, f"--replicas={number}")
    assert done.code == 0, done


def test_a_commit_can_lower_the_number_of_pods(apps: Fleet) -> None:
    sized = apps["sized"]
    assert sized.deployed("v1", change=replicas(3))["outcome"] == "deployed"
    with sized.traffic() as traffic:
        commit = sized.release("v2", change=replicas(2))
        done = apps.command("plan", "sized")
        assert "green, 2 pods in about" in done.stdout, done
        assert "replicas: 3 → 2" in done.stdout
        assert apps.ended(sized.push(commit))["outcome"] == "deployed"
        assert (size(sized, "green"), len(sized.pods("v2"))) == (2, 2)
    assert (traffic.failures, traffic.versions) == ([], ["v1", "v2"])


def test_what_is_committed_counts_more_than_what_was_scaled_by_hand(apps: Fleet) -> None:
    sized = apps["sized"]
    sized.quiet()
    scale(sized, 4)
    assert sized.deployed("v3", change=replicas(2))["outcome"] == "deployed"
    assert size(sized, sized.selector["version"]) == 2


def test_a_version_without_a_size_is_as_large_as_the_live_one_right_before_the_switch(
    apps: Fleet,
) -> None:
    sized = apps["sized"]
    sized.quiet()
    run = sized.go("v4", change=replicas(None))
    with apps.held("patch", "services", name="sized-preview"):
        scale(sized, 3)
    assert apps.ended(run)["outcome"] == "deployed"
    assert (size(sized, sized.selector["version"]), len(sized.pods("v4"))) == (3, 3)
    assert sized.note("history")[0]["replicas"] == 3


# Another name than that of the app.


def named(name: str) -> Change:
    """Return a change that gives the Service a name."""

    def change(objects: dict[str, Object]) -> None:
        objects["Service"]["metadata"]["name"] = name

    return change


def test_the_live_service_may_be_called_otherwise_than_the_app(apps: Fleet) -> None:
    renamed = apps["renamed"]
    assert renamed.deployed("v1", change=named("web"))["outcome"] == "deployed"
    run = renamed.go("v2", change=named("web"))
    assert apps.ended(run)["outcome"] == "deployed"
    eventually(lambda: "gitops-hook/deploying" not in notes_of(renamed, "web"), 20, "it is quiet")
    web = renamed.service("web")
    assert web["spec"]["selector"]["gitops-hook/run"] == run
    assert web["metadata"]["labels"]["gitops-hook/app"] == "renamed"
    assert (renamed.service("renamed"), "web-preview" in renamed.objects("services")) == ({}, False)
    status = apps.command("status", "renamed", "--output", "json")
    place = json.loads(status.stdout)["apps"][0]["environments"]["production"]
    assert (place["run"], place["left_behind"], place["drift"]) == (run, [], "")
    done = apps.command("rollback", "renamed")
    assert done.returncode == 0, done
    assert renamed.service("web")["spec"]["selector"]["gitops-hook/run"] != run


def notes_of(app: Member, name: str) -> Object:
    """Return the annotations of a Service."""
    return dict(app.service(name)["metadata"]["annotations"])


def test_a_service_under_its_new_name_is_a_first_deployment_beside_the_old_one(
    apps: Fleet,
) -> None:
    renamed = apps["renamed"]
    before = renamed.service("web")["spec"]
    apps.kill()
    (entry,) = (entry for entry in apps.config["apps"] if entry["name"] == "renamed")
    del entry["deploy"]["service"]
    apps.start()
    run = renamed.go("v3")
    assert apps.ended(run)["outcome"] == "deployed"
    assert renamed.selector["gitops-hook/run"] == run
    assert renamed.service("web")["spec"] == before
    assert renamed.answer()["version"] == "v3"
    old = before["selector"]["gitops-hook/run"]
    pods = [pod for pod in renamed.pods() if pod["metadata"]["labels"]["gitops-hook/run"] == old]
    assert len(pods) == 1
    done = apps.command("status", "renamed")
    assert "Service web is not switched any more; delete it when it is unused." in done.stdout
