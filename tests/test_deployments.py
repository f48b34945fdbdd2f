"""Deployments that take their time: ports, sizes, adoption, foreign kinds, what is waited for."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import requests
import yaml

from tests.fleet import Fleet, Member, app_objects, fleet, pod_template
from tests.standin.kubectl import Kubectl
from tests.world import Object, eventually

RUN = "gitops-hook/run"
APPS: dict[str, Object] = {
    "nokey": {"rollout_timeout": "20s"},
    "mounted": {"bake": "1s", "rollout_timeout": "300s"},
    "hanging": {"bake": "1s", "rollout_timeout": "300s"},
    "shut": {"bake": "1s", "rollout_timeout": "60s"},
    "neverup": {"rollout_timeout": "5s"},
    "ports": {"bake": "4s", "retain": 1},
    "scaled": {"retain": 0},
    "kinds": {"ignore_kinds": ["Ingress"]},
    "adopted": {"bake": "3s"},
    "left": {},
    "grown": {"bake": "4s"},
    "refused": {},
    "evicted": {"bake": "4s"},
    "lacking": {"bake": "2s", "rollout_timeout": "8s"},
    "busy": {"bake": "1s"},
    "occupied": {"bake": "1s"},
    "overlaid": {
        "bake": "1s",
        "environments": ["staging", "production"],
        "manifests": "deploy/overlays/{environment}",
    },
    "twin": {},
    "twin-that-fails": {},
}
POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: kinds}
spec: {podSelector: {}}
"""
INGRESS = """
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: kinds}
spec: {defaultBackend: {service: {name: kinds, port: {number: 80}}}}
"""


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, none of them deployed yet."""
    with fleet(tmp_path_factory.mktemp("deployments"), APPS) as made:
        yield made


@pytest.fixture(scope="module")
def slow(apps: Fleet) -> dict[str, str]:
    """First deployments that fail only after a while; their runs."""
    never = apps["neverup"].go("v1", modes="never-ready")
    return {"nokey": apps["nokey"].go("v1", change=needs_a_missing_key), "neverup": never}


def needs_a_missing_key(objects: dict[str, Object]) -> None:
    """Let the container need a key that its ConfigMap does not have."""
    wanted = {"configMapKeyRef": {"name": "settings", "key": "NOT_THERE"}}
    container(objects)["env"].append({"name": "NOT_THERE", "valueFrom": wanted})


def container(objects: dict[str, Object]) -> Object:
    """Return the container of an app's manifests."""
    found: Object = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return found


# Environments that differ.


def overlays(app: Member, **sizes: int) -> dict[str, str]:
    """Return a base, and for each environment an overlay with a size and a greeting of its own."""
    base = app_objects(app.name, "v1", "", app.fleet.image)
    files = {
        "deploy/base/app.yaml": yaml.safe_dump_all([*base.values()]),
        "deploy/base/kustomization.yaml": "resources: [app.yaml]",
    }
    for environment, replicas in sizes.items():
        greeting = {"op": "replace", "path": "/data/GREETING", "value": f"hello {environment}"}
        overlay = {
            "namespace": environment,
            "resources": ["../../base"],
            "replicas": [{"name": app.name, "count": replicas}],
            "patches": [{"target": {"kind": "ConfigMap"}, "patch": json.dumps([greeting])}],
        }
        files[f"deploy/overlays/{environment}/kustomization.yaml"] = yaml.safe_dump(overlay)
    return files


def test_each_environment_is_deployed_from_its_own_overlay(apps: Fleet) -> None:
    app = apps["overlaid"]
    sizes = {"staging": 1, "production": 2}
    assert app.deployed("v1", files=overlays(app, **sizes))["outcome"] == "deployed"
    for environment, replicas in sizes.items():
        deployments = apps.cluster.store.list("deployments", environment)
        (deployment,) = [d for d in deployments if d["metadata"]["name"].startswith(app.name)]
        assert deployment["spec"]["replicas"] == replicas
        source = deployment["spec"]["template"]["spec"]["containers"][0]["envFrom"][0]
        name = source["configMapRef"]["name"]
        configmap = apps.cluster.store.get("configmaps", environment, name)
        assert configmap["data"]["GREETING"] == f"hello {environment}"


def test_an_object_of_another_namespace_is_refused_with_the_setting_to_change(apps: Fleet) -> None:
    app = apps["overlaid"]
    files = overlays(app, staging=1, production=1)
    where = "deploy/overlays/staging/kustomization.yaml"
    files[where] = files[where].replace("namespace: staging", "namespace: stage")
    line = apps.ended(app.go("v2", files=files))
    assert (line["outcome"], line["reason"]) == ("failed", "ManifestRefused")
    said = "metadata.namespace is not 'staging'. Remove it, or change namespaces.staging."
    place = "deploy/base/app.yaml (by way of deploy/overlays/staging)"
    assert f"{place}: Service overlaid: {said}" in line["detail"]


# What cannot heal, after the time it is given.


@pytest.mark.usefixtures("slow")
def test_a_kind_that_is_not_deployed_is_refused_by_name_with_what_to_do(apps: Fleet) -> None:
    kinds = apps["kinds"]
    ended = kinds.push(kinds.release("v1", files={"deploy/policy.yaml": POLICY}))
    line = apps.ended(ended)
    assert (line["outcome"], line["reason"]) == ("failed", "ManifestRefused")
    advice = r"NetworkPolicy in deploy\.companions .* NetworkPolicy/kinds in deploy\.ignore"
    assert re.search(advice, line["detail"])
    assert not kinds.leftovers()


def test_a_kind_that_is_to_be_ignored_is_reported_and_not_applied(apps: Fleet) -> None:
    kinds = apps["kinds"]
    kinds.repository.git("rm", "-q", "deploy/policy.yaml")
    run = kinds.push(kinds.release("v2", files={"deploy/ingress.yaml": INGRESS}))
    assert apps.ended(run)["outcome"] == "deployed"
    assert apps.said("claimed", run=run)[0]["ignored"] == ["deploy/ingress.yaml: Ingress kinds"]
    assert apps.cluster.store.find("ingresses", "production", "kinds") is None


# Ports.


def node_port(target: int) -> object:
    """Return a change that makes the Service a NodePort for a numeric target port."""

    def change(objects: dict[str, Object]) -> None:
        ports = [{"name": "http", "port": 80, "targetPort": target, "nodePort": 30123}]
        objects["Service"]["spec"] |= {"type": "NodePort", "ports": ports}
        container(objects)["ports"][0]["containerPort"] = target
        objects["Deployment"]["spec"]["replicas"] = 2

    return change


def live_ports(app: Member) -> list[tuple[int, int]]:
    """Return the target and node ports of the live Service."""
    return [(p["targetPort"], p["nodePort"]) for p in app.service()["spec"]["ports"]]


def test_a_numeric_target_port_travels_with_the_switch_and_back(apps: Fleet) -> None:
    ports = apps["ports"]
    assert ports.deployed("v1", change=node_port(8080))["outcome"] == "deployed"
    with ports.traffic() as traffic:
        run = ports.go("v2", modes="other-port", change=node_port(9090))
        ports.switched(run)
        assert live_ports(ports) == [(9090, 30123)]
        eventually(lambda: traffic.versions[-1:] == ["v2"], 5, "v2 answers on its port")
        ports.tell("v2", "/turn-sick")
        assert apps.ended(run)["outcome"] == "switched-back"
        assert live_ports(ports) == [(8080, 30123)]
        eventually(lambda: traffic.versions[-1:] == ["v1"], 5, "v1 answers on its own")
    assert traffic.failures == []


def test_a_node_port_is_kept_and_the_preview_has_none(apps: Fleet) -> None:
    ports = apps["ports"]
    assert ports.deployed("v3", modes="other-port", change=node_port(9090))["outcome"] == "deployed"
    assert live_ports(ports) == [(9090, 30123)]
    preview = ports.service("ports-preview")["spec"]
    assert (preview["type"], [p for p in preview["ports"] if "nodePort" in p]) == ("ClusterIP", [])
    assert preview["clusterIP"] != ports.service()["spec"]["clusterIP"]


# Sizes.


def size(app: Member, colour: str) -> int:
    """Return how many replicas a colour asks for."""
    return int(app.objects("deployments")[f"{app.name}-{colour}"]["spec"]["replicas"])


def test_retain_keeps_that_many_pods_of_the_old_colour(apps: Fleet) -> None:
    ports = apps["ports"]
    ports.quiet()
    assert (size(ports, ports.selector["version"]), size(ports, ports.idle())) == (2, 1)


def no_size(objects: dict[str, Object]) -> None:
    """Leave open how many pods there are."""
    del objects["Deployment"]["spec"]["replicas"]


def test_a_size_that_was_set_by_hand_is_kept_where_none_is_committed(apps: Fleet) -> None:
    scaled = apps["scaled"]
    assert scaled.deployed("v1")["outcome"] == "deployed"
    args = ("scale", "deployment/scaled-blue", "-n", "production", "--replicas=3")
    assert apps.kubectl(*args).code == 0
    assert scaled.deployed("v2", change=no_size)["outcome"] == "deployed"
    assert (scaled.standing("green"), size(scaled, "green")) == ("v2", 3)


def test_a_target_without_pods_is_brought_up_to_the_live_size_before_traffic_goes_back(
    apps: Fleet,
) -> None:
    scaled = apps["scaled"]
    eventually(lambda: not scaled.pods("v1"), 20, "the old colour is drained to nothing")
    scaled.quiet()
    with scaled.traffic() as traffic:
        done = apps.command("rollback", "scaled")
        assert done.returncode == 0, done
        eventually(lambda: traffic.versions[-1:] == ["v1"], 10, "v1 serves")
    assert (traffic.failures, traffic.versions) == ([], ["v2", "v1"])
    assert size(scaled, "blue") >= 3


# Adoption.


def foreign(app: Member, *, bare: bool) -> None:
    """Put a Service with a selector of its own there, and two pods, or a bare one of no owner."""
    template = pod_template("v0", "", app.fleet.image)
    template["metadata"]["labels"] = {"app": app.name}
    spec = {
        "selector": {"app": app.name},
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
    }
    pod: Object = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{app.name}-old"}}
    owner: Object = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{app.name}-old"},
    }
    chosen = pod if bare else owner
    if bare:
        chosen["spec"] = template["spec"]
        chosen["metadata"]["labels"] = {"app": app.name}
    else:
        labels = {"matchLabels": {"app": app.name}}
        chosen["spec"] = {"replicas": 2, "selector": labels, "template": template}
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "settings"},
        "data": {},
    }
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": app.name}, "spec": spec}
    stream = yaml.safe_dump_all([settings, chosen, service])
    done = app.fleet.kubectl("apply", "-n", app.namespace, "-f", "-", stdin=stream)
    assert done.code == 0, done
    eventually(lambda: answers(app) == "v0", 60, "the application of before answers")


def answers(app: Member) -> str:
    """Return the version that answers, or nothing."""
    slices = app.fleet.cluster.store.list("endpointslices", app.namespace)
    label = "kubernetes.io/service-name"
    mine = [s for s in slices if s["metadata"]["labels"].get(label) == app.name]
    ready = [e for s in mine for e in s.get("endpoints") or [] if e["conditions"].get("ready")]
    # the Service follows its endpoints a moment later
    with suppress(requests.ConnectionError):
        return str(app.answer()["version"]) if ready else ""
    return ""


def same_labels(objects: dict[str, Object]) -> None:
    """Give the new pods the labels that the Service of before selects."""
    name = objects["Deployment"]["metadata"]["name"]
    labels = {"app": name}
    objects["Deployment"]["spec"]["selector"] = {"matchLabels": labels}
    objects["Deployment"]["spec"]["template"]["metadata"]["labels"] = labels
    objects["Service"]["spec"]["selector"] = labels


def test_an_existing_service_is_narrowed_and_never_sends_traffic_to_both(apps: Fleet) -> None:
    adopted = apps["adopted"]
    foreign(adopted, bare=False)
    with adopted.traffic() as traffic:
        ended = adopted.deployed("v1", change=same_labels)
    assert (ended["outcome"], traffic.failures, traffic.versions) == ("deployed", [], ["v0", "v1"])
    before = adopted.note("previous-selector")
    assert (before["app"], "pod-template-hash" in before) == ("adopted", True)
    assert len(adopted.pods("v1")) == 1, "as committed, though two served before"


def test_an_adoption_that_failed_leaves_the_service_as_its_owner_had_it(apps: Fleet) -> None:
    left = apps["left"]
    foreign(left, bare=False)
    with left.traffic() as traffic:
        assert left.deployed("v1", modes="smoke-fails", change=same_labels)["outcome"] == "failed"
        left.quiet()
        assert left.selector == {"app": "left"}
        place = ("deployment/left-old", "-n", left.namespace)
        assert apps.kubectl("set", "env", *place, "VERSION=v0b").code == 0
        eventually(lambda: traffic.versions[-1:] == ["v0b"], 30, "what its owner changed serves")
        assert left.deployed("v2", change=same_labels)["outcome"] == "deployed"
    assert traffic.failures == []
    assert set(traffic.versions) == {"v0", "v0b", "v2"}
    assert "pod-template-hash" in left.note("previous-selector")


def test_what_was_there_before_the_adoption_can_be_gone_back_to(apps: Fleet) -> None:
    adopted = apps["adopted"]
    adopted.quiet()
    with adopted.traffic() as traffic:
        done = apps.command("rollback", "adopted")
        assert done.returncode == 0, done
        eventually(lambda: traffic.versions[-1:] == ["v0"], 5, "v0 serves")
    assert traffic.failures == []


def test_a_service_that_cannot_be_narrowed_is_refused_with_a_command_that_mends_it(
    apps: Fleet,
) -> None:
    refused = apps["refused"]
    foreign(refused, bare=True)
    commit = refused.release("v1", change=same_labels)
    ended = apps.ended(refused.push(commit))
    assert (ended["outcome"], ended["reason"]) == ("failed", "AdoptionRefused")
    assert (refused.selector, answers(refused)) == ({"app": "refused"}, "v0")
    command = ended["detail"].partition("run: ")[2]
    environ = Kubectl(apps.directory, apps.cluster.kubeconfig()).environment
    path = apps.environ["PATH"]
    done = subprocess.run(
        ["sh", "-ec", command],
        env={**environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done
    with refused.traffic() as traffic:
        run = refused.push(commit)
        again = lambda: apps.said("run ended", run=run, outcome="deployed")  # noqa: E731 - one use
        eventually(again, 60, "the same push is deployed now")
    assert (traffic.failures, traffic.versions) == ([], ["v0", "v1"])


# Two versions of different sizes.


def three_replicas(objects: dict[str, Object]) -> None:
    """Ask for three pods."""
    objects["Deployment"]["spec"]["replicas"] = 3


def test_a_larger_version_that_crashes_is_switched_back_to_a_smaller_one(apps: Fleet) -> None:
    grown = apps["grown"]
    assert grown.deployed("v1", change=two_replicas)["outcome"] == "deployed"
    run = grown.go("v2", change=three_replicas, modes="crash-later")
    grown.switched(run)
    eventually(lambda: grown.answer()["version"] == "v2", 10, "one pod has answered, and crashes")
    assert apps.ended(run)["reason"] == "UnhealthyAfterSwitch"
    eventually(lambda: answers(grown) == "v1", 10, "the version before serves again")


def test_a_rollback_makes_the_target_as_large_as_what_it_replaces(apps: Fleet) -> None:
    grown = apps["grown"]
    grown.quiet()
    assert grown.deployed("v3", change=two_replicas)["outcome"] == "deployed"
    grown.quiet()
    name = f"grown-{grown.selector['version']}"
    assert apps.kubectl("scale", f"deployment/{name}", "-n", "production", "--replicas=4").code == 0
    done = apps.command("rollback", "grown")
    assert done.returncode == 0, done
    back = f"grown-{grown.selector['version']}"
    assert (back != name, grown.objects("deployments")[back]["spec"]["replicas"]) == (True, 4)


# A node that goes away.


def two_replicas(objects: dict[str, Object]) -> None:
    """Ask for two pods."""
    objects["Deployment"]["spec"]["replicas"] = 2


def test_a_pod_evicted_during_the_bake_is_not_sickness(apps: Fleet) -> None:
    evicted = apps["evicted"]
    assert evicted.deployed("v1", change=two_replicas)["outcome"] == "deployed"
    run = evicted.go("v2", change=two_replicas)
    evicted.switched(run)
    apps.cluster.evict("production", evicted.pods("v2")[0]["metadata"]["name"])
    assert apps.ended(run)["outcome"] == "deployed"


def test_a_node_lost_during_the_bake_is_not_sickness(apps: Fleet) -> None:
    evicted = apps["evicted"]
    evicted.quiet()
    run = evicted.go("v3", change=two_replicas)
    evicted.switched(run)
    apps.cluster.lose_node_of("production", evicted.pods("v3")[0]["metadata"]["name"])
    assert apps.ended(run)["outcome"] == "deployed"


@pytest.fixture
def full(apps: Fleet) -> Iterator[Callable[[], None]]:
    """Return what lets the namespace be full, until the test ends."""
    store, meta = apps.cluster.store, {"name": "full", "namespace": "production"}

    def fill() -> None:
        store.create("resourcequotas", {"metadata": meta, "spec": {"hard": {"pods": "0"}}})

    yield fill
    store.delete("resourcequotas", "production", "full")


def lose_a_pod(app: Member, *versions: str) -> None:
    """Evict a pod of each version, while another in its place is refused."""
    for version in versions:
        name = app.pods(version)[0]["metadata"]["name"]
        app.fleet.cluster.evict("production", name)
        eventually(lambda v=version: len(app.pods(v)) == 1, 10, "one is left")


def test_a_version_of_which_a_pod_stays_missing_gives_way_to_one_that_is_whole(
    apps: Fleet, full: Callable[[], None]
) -> None:
    lacking = apps["lacking"]
    assert lacking.deployed("v1", change=two_replicas)["outcome"] == "deployed"
    lacking.quiet()
    run = lacking.go("v2", change=two_replicas)
    lacking.switched(run)
    full()
    lose_a_pod(lacking, "v2")
    ended = apps.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("failed", "Unjudged")
    assert "1 of 2 pods are healthy, 2 of 2 of the version before" in ended["detail"]
    assert lacking.answer()["version"] == "v1"
    ledger = apps.cluster.store.get("configmaps", "orchestration", "gitops-hook-lacking")["data"]
    assert not [key for key in ledger if key.startswith("rejected-")]


def test_of_two_versions_that_lack_a_pod_alike_the_new_one_stays_and_is_marked(
    apps: Fleet, full: Callable[[], None]
) -> None:
    lacking = apps["lacking"]
    lacking.quiet()
    run = lacking.go("v3", change=two_replicas)
    lacking.switched(run)
    full()
    lose_a_pod(lacking, "v3", "v1")
    assert apps.ended(run)["outcome"] == "deployed"
    assert apps.said("confirmed unjudged", run=run, level="warning")
    (entry,) = [e for e in lacking.note("history") if e["run"] == run]
    assert (entry["outcome"], entry["unjudged"]) == ("deployed", True)


# Neighbours.


def test_applications_with_equal_settings_keep_their_own_copies(apps: Fleet) -> None:
    twin, failing = apps["twin"], apps["twin-that-fails"]
    run = failing.go("equal", modes="smoke-fails")
    with apps.held("create", "services", body_contains="twin-that-fails-preview"):
        assert twin.deployed("equal")["outcome"] == "deployed"
    assert apps.ended(run)["reason"] == "SmokeFailed"
    eventually(lambda: not failing.leftovers(), 20, "the failed one is swept away")
    source = twin.pods("equal")[0]["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"]
    assert apps.cluster.store.find("configmaps", "production", source)


@pytest.mark.parametrize(
    ("data", "label", "immutable"),
    [
        ({"GREETING": "forged"}, "occupied", True),
        ({"GREETING": "hello from v1"}, "twin", True),
        ({"GREETING": "hello from v1"}, "occupied", False),
    ],
    ids=["other-content", "other-label", "not-immutable"],
)
def test_a_copy_that_is_there_already_is_used_only_if_it_is_the_one(
    apps: Fleet, data: dict[str, str], label: str, *, immutable: bool
) -> None:
    occupied, wanted = apps["occupied"], {"binaryData": {}, "data": {"GREETING": "hello from v1"}}
    digest = hashlib.sha256(b"occupied " + json.dumps(wanted).encode()).hexdigest()
    labels = {"app.kubernetes.io/managed-by": "gitops-hook", "gitops-hook/app": label}
    meta = {"name": f"settings-{digest[:8]}", "namespace": "production", "labels": labels}
    item = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
    apps.cluster.store.create("configmaps", {**item, "immutable": immutable})
    line = apps.ended(occupied.go("v1"))
    assert (line["outcome"], line["reason"]) == ("failed", "AdoptionRefused")
    assert f"ConfigMap {meta['name']} is there with another content" in line["detail"]
    assert not occupied.service()
    # as the deployment's end may have swept it away
    apps.cluster.store.remove("configmaps", "production", meta["name"])


def test_and_it_rejects_nothing_once_it_is_gone(apps: Fleet) -> None:
    assert apps["occupied"].deployed("v1")["outcome"] == "deployed"


# A rollback in the middle.


def test_rollback_works_with_the_daemon_down(apps: Fleet) -> None:
    busy = apps["busy"]
    for version in ("v1", "v2"):
        assert busy.deployed(version)["outcome"] == "deployed"
        busy.quiet()
    busy.stands("blue", "v1")
    assert apps.stop() == 0
    with busy.traffic() as traffic:
        done = apps.command("rollback", "busy")
        assert done.returncode == 0, done
        eventually(lambda: traffic.versions[-1:] == ["v1"], 5, "v1 serves")
    apps.start()
    assert (traffic.failures, traffic.versions) == ([], ["v2", "v1"])


def test_the_version_that_was_rolled_back_is_not_deployed_again_by_catch_up(apps: Fleet) -> None:
    busy = apps["busy"]
    ledger = apps.cluster.store.get("configmaps", "orchestration", "gitops-hook-busy")["data"]
    commit = busy.repository.git("rev-parse", "HEAD")
    assert f"rejected-{commit}" in ledger
    run = busy.push(commit)
    eventually(lambda: apps.said("push needs nothing", run=run, reason="Rejected"), 10)
    assert busy.answer()["version"] == "v1"


def test_nor_is_it_by_a_daemon_that_was_uninstalled_and_installed_again(apps: Fleet) -> None:
    busy, known = apps["busy"], len(apps.logged())
    assert apps.stop() == 0
    apps.cluster.store.delete("configmaps", "orchestration", "gitops-hook-busy")
    for job in apps.jobs():
        apps.cluster.store.delete("jobs", "test", job)
    apps.start()

    def remembered() -> bool:
        found = apps.cluster.store.find("configmaps", "orchestration", "gitops-hook-busy") or {}
        return "RolledBack" in str(found.get("data"))

    eventually(remembered, 20, "the catch-up has looked")
    run = busy.push(busy.repository.git("rev-parse", "HEAD"))
    rejected = {"msg": "push needs nothing", "run": run, "reason": "Rejected"}
    eventually(lambda: [e for e in apps.logged()[known:] if rejected.items() <= e.items()], 10)
    assert (busy.answer()["version"], f"test-{run}" in apps.jobs()) == ("v1", False)


def test_a_rerun_deploys_what_was_rolled_back_although_the_service_remembers_it(
    apps: Fleet,
) -> None:
    busy = apps["busy"]
    (old,) = [e for e in busy.note("history") if e["outcome"] == "rolled-back"]
    known = len(apps.logged())
    done = apps.command("rerun", old["run"])
    assert done.returncode == 0, done
    ended = {"msg": "run ended", "run": old["run"], "outcome": "deployed"}
    eventually(lambda: [e for e in apps.logged()[known:] if ended.items() <= e.items()], 60)
    assert busy.answer()["version"] == "v2"


def status_of(apps: Fleet, run: str) -> Object:
    """Return what `status` says of a run; an empty mapping where it does not know it."""
    return next((dict(r) for r in apps.status()["runs"] if r["run"] == run), {})


def mounts_a_secret(objects: dict[str, Object]) -> None:
    """Let the pods mount a Secret."""
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    pod["volumes"] = [*pod.get("volumes", []), {"name": "tls", "secret": {"secretName": "tls"}}]
    mounts = container(objects).setdefault("volumeMounts", [])
    mounts.append({"name": "tls", "mountPath": "/tls"})


def test_a_missing_secret_is_named_while_it_is_waited_for_and_nothing_else_once_it_is_there(
    apps: Fleet,
) -> None:
    run = apps["mounted"].go("v1", change=mounts_a_secret)
    said = 'MountVolume.SetUp failed for volume "tls" : secret "tls" not found'
    eventually(lambda: said in status_of(apps, run).get("waits_for", ""), 40, "it says for what")
    assert status_of(apps, run)["reason"] == "VolumeUnavailable"
    assert 'secret "tls" not found' in " ".join(apps.command("status", "mounted").stdout.split())
    meta = {"name": "tls", "namespace": "production"}
    apps.cluster.load({"apiVersion": "v1", "kind": "Secret", "metadata": meta})
    assert apps.ended(run, 90)["outcome"] == "deployed"
    assert status_of(apps, run)["waits_for"] == ""
    jobs = [j for j in apps.cluster.store.list("jobs") if run in j["metadata"]["name"]]
    assert not [j for j in jobs if said in str(j["metadata"]["annotations"])]


def own_image(apps: Fleet, name: str) -> str:
    """Return an image that runs the app and is not on the node yet."""
    start: Object = {"cmd": ["python", "server.py"], "workdir": "/app"}
    digest = apps.cluster.images.add(f"{name}:1", apps.directory / "image", **start)
    return f"{name}@{digest}"


def test_a_registry_that_refuses_once_ends_no_rollout(apps: Fleet) -> None:
    image = own_image(apps, "registry.example.com/shut/web")
    apps.cluster.images.break_pull(image, "pull access denied: no basic auth credentials")
    run = apps["shut"].go("v1", image=image)
    said = f'Failed to pull image "{image}": pull access denied'

    def refused() -> list[Object]:
        events = apps.cluster.store.list("events", "production")
        return [event for event in events if event["message"].startswith(said)]

    eventually(refused, 40, "it is refused once")
    apps.cluster.images.break_pull(image, None)
    assert apps.ended(run, 60)["outcome"] == "deployed"


def test_a_silent_registry_is_waited_for_until_it_answers_or_a_newer_commit_is_pushed(
    apps: Fleet,
) -> None:
    hanging = apps["hanging"]
    images = [own_image(apps, f"registry.example.com/silent/{name}") for name in ("one", "two")]
    for image in images:
        apps.cluster.images.hold_pull(image, held=True)
    first = hanging.go("v1", image=images[0])
    said = f'is not started: Pulling image "{images[0]}"'
    eventually(lambda: said in status_of(apps, first).get("waits_for", ""), 40, "it says for what")
    second = hanging.go("v2", image=images[1])
    ended = apps.ended(first, 60)
    assert (ended["outcome"], ended["reason"]) == ("superseded", "NotHead")
    said = f'is not started: Pulling image "{images[1]}"'
    eventually(lambda: said in status_of(apps, second).get("waits_for", ""), 40, "it waits, too")
    apps.cluster.images.hold_pull(images[1], held=False)
    assert apps.ended(second, 60)["outcome"] == "deployed"


@pytest.mark.parametrize(
    ("name", "reason"), [("nokey", "ContainerConfigError"), ("neverup", "NeverReady")]
)
def test_what_could_still_heal_is_red_after_its_time(
    apps: Fleet, slow: dict[str, str], name: str, reason: str
) -> None:
    ended = apps.ended(slow[name])
    assert (ended["outcome"], ended["reason"]) == ("failed", reason)
    eventually(lambda: not apps[name].leftovers(), 20, "nothing is left")


def test_the_container_that_could_not_be_made_is_named_with_what_it_lacks(
    apps: Fleet, slow: dict[str, str]
) -> None:
    detail = apps.ended(slow["nokey"])["detail"]
    assert "NOT_THERE" in detail
