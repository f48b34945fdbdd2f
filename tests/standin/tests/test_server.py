"""What the stand-in's API does beyond the recordings, as the real kubectl sees it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.standin import make_fields
from tests.standin.api import Api
from tests.standin.faults import Fault, Faults, Request
from tests.standin.httpd import Connection, Leavers
from tests.standin.kubectl import Kubectl
from tests.standin.store import ApiError, Store
from tests.waiting import eventually

Object = dict[str, Any]
PATIENCE = 10.0
ACCOUNT = "system:serviceaccount:demo:worker"


@dataclass
class World:
    """A store behind an API server, and kubectl as its administrator."""

    store: Store
    api: Api
    kubectl: Kubectl
    directory: Path

    def run(self, *args: str, stdin: Object | str | None = None) -> str:
        """The output of a call that has to succeed."""
        text = stdin if isinstance(stdin, str | None) else json.dumps(stdin)
        done = self.kubectl.run(*args, stdin=text)
        assert done.code == 0, done.err
        return done.out

    def fail(self, *args: str, stdin: Object | str | None = None) -> str:
        """What a call says that has to be refused."""
        text = stdin if isinstance(stdin, str | None) else json.dumps(stdin)
        done = self.kubectl.run(*args, stdin=text)
        assert done.code == 1, done.out
        return done.err

    def request(
        self, method: str, path: str, body: str | None = None, content_type: str = ""
    ) -> tuple[int, str]:
        """Status and body of one request of the administrator, without kubectl in between."""
        context = ssl.create_default_context(cadata=self.api.ca_pem.decode())
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.api.port, timeout=PATIENCE, context=context
        )
        headers = {
            "Authorization": f"Bearer {self.api.admin_token}",
            "Content-Type": content_type or "application/json",
        }
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def verbs(self, resource: str) -> list[tuple[str, int]]:
        return [(item.verb, item.code) for item in self.api.faults.log if item.resource == resource]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    store = Store()
    store.create("namespaces", {"metadata": {"name": "demo"}})
    with Api(store) as api:
        yield World(store, api, Kubectl(tmp_path, api.kubeconfig(tmp_path / "config")), tmp_path)


def config(name: str = "settings", **more: Any) -> Object:
    meta = {"name": name, "namespace": "demo", **more.pop("metadata", {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"a": "b"}, **more}


def container(name: str = "main", **more: Any) -> Object:
    return {"name": name, "image": "example:1", **more}


def deployment(*containers: Object, **spec: Any) -> Object:
    pod = {"containers": list(containers) or [container()], **spec.pop("pod", {})}
    template = {"metadata": {"labels": {"app": "shop"}}, "spec": pod}
    selector = {"matchLabels": {"app": "shop"}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "shop", "namespace": "demo"},
        "spec": {"selector": selector, "template": template, **spec},
    }


def pod(name: str = "one", *containers: Object, **spec: Any) -> Object:
    inside = {"containers": list(containers) or [container()], **spec}
    meta = {"name": name, "namespace": "demo"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": inside}


def service(**spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "shop", "namespace": "demo"},
        "spec": {"selector": {"app": "shop"}, "ports": [{"port": 80}], **spec},
    }


def job(name: str, **spec: Any) -> Object:
    template = {"spec": {"restartPolicy": "Never", "containers": [container()]}}
    meta = {"name": name, "namespace": "demo"}
    inside = {"template": template, **spec}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": inside}


def listed(*objects: Object) -> Object:
    return {"apiVersion": "v1", "kind": "List", "items": list(objects)}


BASE = """
apiVersion: v1
kind: Namespace
metadata: {name: base}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: quota, namespace: base}
spec: {hard: {pods: "2", requests.cpu: 500m}}
---
apiVersion: v1
kind: LimitRange
metadata: {name: limits, namespace: base}
spec: {limits: [{type: Container, default: {cpu: 200m}, defaultRequest: {cpu: 100m}}]}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: worker, namespace: base}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: worker, namespace: base}
rules: [{apiGroups: [""], resources: [pods], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: worker, namespace: base}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: worker}
subjects: [{kind: ServiceAccount, name: worker, namespace: base}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: base}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  egress: [{ports: [{port: 53, protocol: UDP}]}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, namespace: base}
spec:
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec: {containers: [{name: main, image: "example:1"}]}
---
apiVersion: v1
kind: Service
metadata: {name: shop, namespace: base}
spec: {selector: {app: shop}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: shop, namespace: base}
spec:
  tls: [{hosts: [shop.example.com], secretName: tls}]
  rules:
  - host: shop.example.com
    http:
      paths:
      - {path: /webhook, pathType: Exact, backend: {service: {name: shop, port: {number: 80}}}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: base}
data: {a: b}
---
apiVersion: v1
kind: Secret
metadata: {name: secret, namespace: base}
data: {a: Yg==}
"""


# Applying, patching, comparing


def test_a_kustomization_of_every_kind_is_applied_compared_and_deleted(world: World) -> None:
    folder = world.directory / "base"
    folder.mkdir()
    (folder / "all.yaml").write_text(BASE)
    (folder / "kustomization.yaml").write_text("resources: [all.yaml]\n")
    kinds = {item["kind"].lower() for item in yaml.safe_load_all(BASE)}
    first = world.run("apply", "-k", str(folder)).splitlines()
    assert {line.split("/")[0].split(".")[0] for line in first} == kinds
    assert all(line.endswith(" created") for line in first)
    again = world.run("apply", "-k", str(folder)).splitlines()
    assert all(line.endswith(" unchanged") for line in again)
    assert world.run("diff", "-k", str(folder)) == ""
    assert world.run("delete", "-k", str(folder)).count(" deleted") == len(kinds)
    assert world.fail("get", "namespace", "base").endswith('namespaces "base" not found\n')


def test_diff_shows_what_apply_would_change_and_changes_nothing(world: World) -> None:
    world.run("apply", "-f", "-", stdin=deployment())
    before = world.store.get("deployments", "demo", "shop")
    changed = deployment(container(env=[{"name": "A", "value": "1"}]))
    done = world.kubectl.run("diff", "-f", "-", stdin=json.dumps(changed))
    assert done.code == 1
    assert '+          value: "1"' in done.out
    assert world.store.get("deployments", "demo", "shop") == before


def test_apply_merges_containers_ports_env_and_volumes_by_their_keys(world: World) -> None:
    env = [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    volume = {"name": "data", "emptyDir": {}}
    mount = {"name": "data", "mountPath": "/data"}
    main = container(env=env, ports=[{"containerPort": 80}], volumeMounts=[mount])
    world.run("apply", "-f", "-", stdin=deployment(main, pod={"volumes": [volume]}))
    world.run("set", "env", "-n", "demo", "deployment/shop", "BY_HAND=yes")
    volume = {"name": "data", "configMap": {"name": "settings"}}
    main = container(env=env[1:], ports=[{"containerPort": 81}], volumeMounts=[mount])
    wanted = deployment(container("side"), main, pod={"volumes": [volume]})
    world.run("apply", "-f", "-", stdin=wanted)
    spec = world.store.get("deployments", "demo", "shop")["spec"]["template"]["spec"]
    assert [item["name"] for item in spec["containers"]] == ["side", "main"]
    kept = spec["containers"][1]
    assert {item["name"] for item in kept["env"]} == {"B", "BY_HAND"}
    assert kept["ports"] == [{"containerPort": 81, "protocol": "TCP"}]
    assert spec["volumes"] == [
        {"name": "data", "configMap": {"name": "settings", "defaultMode": 420}}
    ]


def test_apply_that_only_reorders_containers_reorders_them(world: World) -> None:
    for first, second in (("one", "two"), ("two", "one")):
        wanted = deployment(container(first), container(second))
        world.run("apply", "-f", "-", stdin=wanted)
        spec = world.store.get("deployments", "demo", "shop")["spec"]["template"]["spec"]
        assert [item["name"] for item in spec["containers"]] == [first, second]


def test_directives_of_strategic_patches_are_followed(world: World) -> None:
    world.run("create", "-f", "-", stdin=deployment(container(), container("side")))
    place = ("patch", "-n", "demo", "deployment", "shop", "-p")
    inside = {"containers": [{"name": "side", "$patch": "delete"}]}
    world.run(*place, json.dumps({"spec": {"template": {"spec": inside}}}))
    strategy = {"$retainKeys": ["type"], "type": "Recreate"}
    world.run(*place, json.dumps({"spec": {"strategy": strategy}}))
    finalizers = {"metadata": {"finalizers": ["example.com/a", "example.com/b"]}}
    world.run(*place, json.dumps(finalizers))
    world.run(
        *place,
        json.dumps({"metadata": {"$deleteFromPrimitiveList/finalizers": ["example.com/a"]}}),
    )
    found = world.store.get("deployments", "demo", "shop")
    names = [item["name"] for item in found["spec"]["template"]["spec"]["containers"]]
    assert names == ["main"]
    assert found["spec"]["strategy"] == {"type": "Recreate"}
    assert found["metadata"]["finalizers"] == ["example.com/b"]


def test_null_in_a_patch_removes_a_field(world: World) -> None:
    world.run("create", "-f", "-", stdin=config(data={"a": "b", "c": "d"}))
    for kind in ("merge", "strategic"):
        world.run(
            "patch", "-n", "demo", "cm", "settings", f"--type={kind}", "-p", '{"data":{"c":null}}'
        )
        assert world.store.get("configmaps", "demo", "settings")["data"] == {"a": "b"}


def test_a_dry_run_answers_and_stores_nothing(world: World) -> None:
    assert "created" in world.run("create", "--dry-run=server", "-f", "-", stdin=config())
    assert world.store.find("configmaps", "demo", "settings") is None
    world.run("create", "-f", "-", stdin=config())
    version = world.store.version
    world.run(
        "patch", "-n", "demo", "cm", "settings", "--dry-run=server", "-p", '{"data":{"a":"c"}}'
    )
    world.run("delete", "-n", "demo", "cm", "settings", "--dry-run=server")
    assert world.store.version == version


def test_replace_is_a_compare_and_set(world: World) -> None:
    world.run("create", "-f", "-", stdin=config())
    current = world.store.get("configmaps", "demo", "settings")
    world.run("replace", "-f", "-", stdin={**current, "data": {"a": "new"}})
    assert "the object has been modified" in world.fail("replace", "-f", "-", stdin=current)


def test_the_generation_of_a_deployment_counts_changes_of_spec_and_annotations(
    world: World,
) -> None:
    def generation(*command: str) -> int:
        world.run(*command)
        return int(world.store.get("deployments", "demo", "shop")["metadata"]["generation"])

    world.run("apply", "-f", "-", stdin=deployment())
    assert generation("label", "-n", "demo", "deployment", "shop", "a=b") == 1
    assert generation("annotate", "-n", "demo", "deployment", "shop", "a=b") == 2
    assert generation("annotate", "-n", "demo", "deployment", "shop", "a=b", "--overwrite") == 2
    assert generation("scale", "-n", "demo", "deployment/shop", "--replicas=4") == 3


def test_managed_fields_name_who_set_the_selector_last(world: World) -> None:
    world.run("create", "-f", "-", stdin=service())
    patch = '{"spec":{"selector":{"app":"other"}}}'
    world.run("patch", "-n", "demo", "svc", "shop", "-p", patch, "--field-manager=somebody")
    found = json.loads(
        world.run("get", "-n", "demo", "svc", "shop", "-o", "json", "--show-managed-fields")
    )
    owners = [
        item["manager"]
        for item in found["metadata"]["managedFields"]
        if "f:selector" in item["fieldsV1"].get("f:spec", {})
    ]
    assert owners == ["somebody"]


def test_the_status_is_written_through_its_subresource_alone(world: World) -> None:
    world.run("create", "-f", "-", stdin=deployment())
    place = ("patch", "-n", "demo", "deployment", "shop", "--type=merge", "-p")
    world.run(*place, '{"status":{"replicas":3}}')
    assert world.store.get("deployments", "demo", "shop")["status"] == {}
    world.run(*place, '{"spec":{"replicas":7},"status":{"replicas":3}}', "--subresource=status")
    found = world.store.get("deployments", "demo", "shop")
    assert found["status"] == {"replicas": 3}
    assert found["spec"]["replicas"] == 1


# Reading and watching


def test_lists_are_selected_by_labels_and_fields(world: World) -> None:
    for name, labels in (("one", {"a": "1"}), ("two", {"a": "2", "b": ""}), ("three", {})):
        world.store.create("configmaps", config(name, metadata={"labels": labels}))

    def names(*args: str) -> list[str]:
        out = world.run("get", "cm", "-n", "demo", "-o", "name", *args)
        return [line.removeprefix("configmap/") for line in out.splitlines()]

    assert names("-l", "a in (1,2),!b") == ["one"]
    assert names("-l", "a notin (1)") == ["kube-root-ca.crt", "three", "two"]
    assert names("-l", "a!=1,a") == ["two"]
    assert names("--field-selector", "metadata.name=three") == ["three"]
    refused = world.fail("get", "cm", "-n", "demo", "--field-selector", "data.a=b")
    assert "field label not supported: data.a" in refused


def test_tables_have_the_columns_of_a_real_server(world: World) -> None:
    world.store.create("services", service(type="NodePort"))
    world.store.create("deployments", deployment())
    world.store.create("jobs", job("test", suspend=True))
    world.store.create("pods", pod())
    world.store.record_event(
        world.store.get("pods", "demo", "one"), "Warning", "Failed", "Error: gone", "kubelet"
    )
    heads = {
        kind: world.run("get", kind, "-n", "demo").splitlines()[0].split()
        for kind in ("svc", "deploy", "jobs", "pods", "cm")
    }
    assert heads == {
        "svc": ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE"],
        "deploy": ["NAME", "READY", "UP-TO-DATE", "AVAILABLE", "AGE"],
        "jobs": ["NAME", "STATUS", "COMPLETIONS", "DURATION", "AGE"],
        "pods": ["NAME", "READY", "STATUS", "RESTARTS", "AGE"],
        "cm": ["NAME", "DATA", "AGE"],
    }
    wide = world.run("get", "pods", "-n", "demo", "-o", "wide").splitlines()[0].split()
    assert wide == [*heads["pods"], "IP", "NODE", "NOMINATED", "NODE", "READINESS", "GATES"]
    line = world.run("get", "events", "-n", "demo").splitlines()[1].split()
    assert line[1:] == ["Warning", "Failed", "pod/one", "Error:", "gone"]


def test_a_watch_tells_what_enters_changes_in_and_leaves_its_selection(world: World) -> None:
    world.store.create("configmaps", config("there", metadata={"labels": {"a": "1"}}))
    process = world.kubectl.start(
        "get", "cm", "-n", "demo", "-l", "a=1", "--watch", "--output-watch-events", "-o", "json"
    )
    try:
        eventually(lambda: ("watch", 200) in world.verbs("configmaps"), PATIENCE, "the watch")
        world.store.create("configmaps", config("late", metadata={"labels": {"a": "1"}}))
        world.run("label", "-n", "demo", "cm", "late", "b=2")
        world.run("label", "-n", "demo", "cm", "late", "--overwrite", "a=2")
        world.store.delete("configmaps", "demo", "there")
        assert process.stdout is not None
        seen = []
        decoder, text = json.JSONDecoder(), ""
        while len(seen) < 5:
            text += process.stdout.readline()
            try:
                event, end = decoder.raw_decode(text)
            except ValueError:
                continue
            text = text[end:].lstrip()
            seen.append((event["type"], event["object"]["metadata"]["name"]))
    finally:
        process.kill()
        process.communicate()
    assert seen == [
        ("ADDED", "there"),
        ("ADDED", "late"),
        ("MODIFIED", "late"),
        ("DELETED", "late"),
        ("DELETED", "there"),
    ]


def events(body: str) -> list[Object]:
    return [json.loads(line) for line in body.splitlines()]


def test_a_watch_with_initial_events_ends_them_with_a_bookmark(world: World) -> None:
    world.store.create("configmaps", config())
    _, body = world.request(
        "GET",
        "/api/v1/namespaces/demo/configmaps?watch=1&sendInitialEvents=true"
        "&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=1",
    )
    seen = events(body)
    assert [item["type"] for item in seen] == ["ADDED", "ADDED", "BOOKMARK"]
    annotations = seen[-1]["object"]["metadata"]["annotations"]
    assert annotations == {"k8s.io/initial-events-end": "true"}


def test_a_watch_from_a_forgotten_version_is_gone(world: World) -> None:
    world.store.create("configmaps", config())
    old = world.store.version
    world.store.create("configmaps", config("next"))
    world.store.compact()
    path = "/api/v1/namespaces/demo/configmaps?watch=1&timeoutSeconds=1&resourceVersion="
    code, body = world.request("GET", f"{path}{old}")
    told = json.loads(body)
    assert (code, told["type"], told["object"]["code"]) == (200, "ERROR", 410)
    assert told["object"]["reason"] == "Expired"
    assert world.request("GET", f"{path}{world.store.version}") == (200, "")


def test_a_client_that_leaves_frees_its_watch(world: World) -> None:
    threads = threading.active_count()
    process = world.kubectl.start("get", "cm", "-n", "demo", "--watch")
    try:
        eventually(lambda: ("watch", 200) in world.verbs("configmaps"), PATIENCE, "the watch")
        assert threading.active_count() > threads
    finally:
        process.kill()
        process.communicate()
    eventually(
        lambda: threading.active_count() <= threads, PATIENCE, "the end of the watch's thread"
    )


def test_logs_are_followed_until_the_container_ends(world: World) -> None:
    world.store.create("pods", pod())
    text = [b"first\n"]
    world.api.log_source = lambda *_: b"".join(text)

    def become(state: Object) -> None:
        def change(found: Object) -> None:
            found["spec"]["nodeName"] = "vm"
            status = {"name": "main", "state": state}
            found["status"] = {"phase": "Running", "containerStatuses": [status]}

        world.store.update_status("pods", "demo", "one", change)

    become({"running": {}})
    process = world.kubectl.start("logs", "-n", "demo", "one", "--follow")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        text.append(b"second\n")
        assert process.stdout.readline() == "second\n"
        become({"terminated": {"exitCode": 0}})
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.communicate()


def test_logs_say_which_container_is_meant_or_missing(world: World) -> None:
    world.store.create("pods", pod("two", container(), container("side")))
    path = "/api/v1/namespaces/demo/pods/two/log"
    text = json.loads(world.request("GET", path)[1])["message"]
    assert text.endswith("must be specified for pod two, choose one of: [main side]")
    assert "container no is not valid for pod two" in world.fail(
        "logs", "-n", "demo", "two", "-c", "no"
    )


# Deleting


def owned(child: Object, owner: Object) -> Object:
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "blockOwnerDeletion": True,
    }
    child["metadata"]["ownerReferences"] = [reference]
    return child


@pytest.mark.parametrize("cascade", ["background", "foreground", "orphan"])
def test_dependents_go_with_their_owner_or_stay(world: World, cascade: str) -> None:
    owner = world.store.create("configmaps", config("owner"))
    child = world.store.create("configmaps", owned(config("child"), owner))
    world.store.create("configmaps", owned(config("grandchild"), child))
    world.run("delete", "cm", "-n", "demo", "owner", f"--cascade={cascade}")
    names = {item["metadata"]["name"] for item in world.store.list("configmaps", "demo")}
    left = {"child", "grandchild"} if cascade == "orphan" else set()
    assert names == {"kube-root-ca.crt", *left}
    if cascade == "orphan":
        freed = world.store.get("configmaps", "demo", "child")["metadata"]
        assert "ownerReferences" not in freed


def test_a_pod_on_a_node_waits_for_its_kubelet(world: World) -> None:
    world.store.create("pods", pod())

    def bind(found: Object) -> None:
        found["spec"]["nodeName"] = "vm"

    world.store.update_status("pods", "demo", "one", bind)
    world.run("delete", "pod", "-n", "demo", "one", "--wait=false", "--grace-period=7")
    meta = world.store.get("pods", "demo", "one")["metadata"]
    assert (meta["deletionGracePeriodSeconds"], meta["generation"]) == (7, 2)
    world.store.remove("pods", "demo", "one")
    assert world.store.find("pods", "demo", "one") is None


def test_finalizers_hold_an_object_until_they_are_gone(world: World) -> None:
    world.run("create", "-f", "-", stdin=config(metadata={"finalizers": ["example.com/wait"]}))
    world.run("delete", "cm", "-n", "demo", "settings", "--wait=false")
    assert world.store.get("configmaps", "demo", "settings")["metadata"]["deletionTimestamp"]
    world.run("patch", "cm", "-n", "demo", "settings", "-p", '{"metadata":{"finalizers":null}}')
    assert world.store.find("configmaps", "demo", "settings") is None


def test_a_namespace_takes_its_content_with_it_and_lets_nothing_in(world: World) -> None:
    world.store.create("configmaps", config())
    world.run("delete", "namespace", "demo", "--wait=false")
    refused = world.fail("create", "-f", "-", stdin=config("late"))
    assert "unable to create new content in namespace demo because it is being" in refused
    eventually(lambda: not world.store.list("configmaps", "demo"), PATIENCE, "an empty namespace")
    eventually(
        lambda: world.store.find("namespaces", None, "demo") is None, PATIENCE, "no namespace"
    )


def test_a_deletion_meant_for_another_object_of_that_name_is_refused(world: World) -> None:
    world.store.create("configmaps", config())
    options = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": "other"}}
    path = "/api/v1/namespaces/demo/configmaps/settings"
    code, body = world.request("DELETE", path, json.dumps(options))
    assert code == 409
    assert "Precondition failed: UID in precondition: other" in body


def test_a_collection_is_deleted_by_selector(world: World) -> None:
    for name, label in (("one", "x"), ("two", "y")):
        world.store.create("configmaps", config(name, metadata={"labels": {"a": label}}))
    world.request("DELETE", "/api/v1/namespaces/demo/configmaps?labelSelector=a%3Dx")
    assert world.store.find("configmaps", "demo", "one") is None
    assert world.store.find("configmaps", "demo", "two")


# Rules


WRONG: dict[str, tuple[Object, str]] = {
    "no containers": (
        deployment(pod={"containers": []}),
        "spec.template.spec.containers: Required value",
    ),
    "no image": (
        deployment({"name": "main"}),
        "spec.template.spec.containers[0].image: Required value",
    ),
    "two containers of one name": (
        deployment(container(), container()),
        'spec.template.spec.containers[1].name: Duplicate value: "main"',
    ),
    "a bad container name": (
        deployment(container("Main")),
        'spec.template.spec.containers[0].name: Invalid value: "Main": a lowercase RFC 1123 label',
    ),
    "a port out of range": (
        deployment(container(ports=[{"containerPort": 70000}])),
        "containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535",
    ),
    "an unknown volume": (
        deployment(container(volumeMounts=[{"name": "no", "mountPath": "/x"}])),
        'spec.template.spec.containers[0].volumeMounts[0].name: Not found: "no"',
    ),
    "a request over its limit": (
        deployment(container(resources={"requests": {"cpu": 2}, "limits": {"cpu": "1"}})),
        'requests: Invalid value: "2": must be less than or equal to cpu limit of 1',
    ),
    "a probe that asks nothing": (
        deployment(container(readinessProbe={"periodSeconds": 1})),
        "readinessProbe: Required value: must specify a handler type",
    ),
    "a label value": (
        config(metadata={"labels": {"a": "b c"}}),
        'metadata.labels: Invalid value: "b c": a valid label must be an empty string or consist',
    ),
    "a key of a ConfigMap": (
        config(data={"a b": "c"}),
        'data[a b]: Invalid value: "a b": a valid config key must consist of',
    ),
    "a Job that restarts": (
        job("test", template={"spec": {"containers": [container()]}}),
        'spec.template.spec.restartPolicy: Required value: valid values: "OnFailure", "Never"',
    ),
    "a Service without ports": (service(ports=[]), "spec.ports: Required value"),
    "a name of a Service": (
        {**service(), "metadata": {"name": "1shop", "namespace": "demo"}},
        'metadata.name: Invalid value: "1shop": a DNS-1035 label must consist of',
    ),
    "a node port out of range": (
        service(type="NodePort", ports=[{"port": 80, "nodePort": 80}]),
        "spec.ports[0].nodePort: Invalid value: 80: provided port is not in the valid range",
    ),
    "a node port twice": (
        service(
            type="NodePort",
            ports=[
                {"name": "a", "port": 80, "nodePort": 30123},
                {"name": "b", "port": 81, "nodePort": 30123},
            ],
        ),
        "spec.ports[1].nodePort: ",
    ),
    "a node port of a ClusterIP": (
        service(ports=[{"port": 80, "nodePort": 30123}]),
        "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
    ),
    "an affinity of no time": (
        service(
            sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 0}}
        ),
        "spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 0: must be greater",
    ),
    "a time without affinity": (
        service(sessionAffinityConfig={"clientIP": {"timeoutSeconds": 600}}),
        "spec.sessionAffinityConfig: Forbidden: must not be set when session affinity is None",
    ),
    "a traffic policy that is none": (
        service(internalTrafficPolicy="Node"),
        'spec.internalTrafficPolicy: Unsupported value: "Node"',
    ),
    "a balancer's field of another type": (
        service(loadBalancerSourceRanges=["10.0.0.0/8"]),
        "spec.loadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'",
    ),
    "a Deployment without selector": (
        {**deployment(), "spec": {"template": deployment()["spec"]["template"]}},
        "spec.selector: Required value",
    ),
    "a rolling update that cannot": (
        deployment(strategy={"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}),
        "maxUnavailable: Invalid value: 0: may not be 0 when `maxSurge` is 0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_breaks_a_rule_is_refused_with_the_field(world: World, case: str) -> None:
    obj, text = WRONG[case]
    refused = world.fail("create", "-f", "-", stdin=obj)
    assert text in refused
    assert refused.startswith(f'The {obj["kind"]} "{obj["metadata"]["name"]}" is invalid: ')


MISREAD: dict[str, tuple[Object, str]] = {
    "a number for a text": (
        config(data={"a": 1}),
        "json: cannot unmarshal number into Go struct field ConfigMap.data of type string",
    ),
    "a text for a number": (
        deployment(replicas="three"),
        "cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
    ),
    "an unknown field in a list": (
        deployment(container(imagee="x")),
        'strict decoding error: unknown field "spec.template.spec.containers[0].imagee"',
    ),
    "two unknown fields": (
        config(dataa={}, more={}),
        'strict decoding error: unknown field "dataa", unknown field "more"',
    ),
    "a time to the second where microseconds belong": (
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "lease", "namespace": "demo"},
            "spec": {"renewTime": "2026-01-01T00:00:00Z"},
        },
        'parsing time "2026-01-01T00:00:00Z" as "2006-01-02T15:04:05.000000Z07:00"',
    ),
    "a secret that is not base64": (
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "secret", "namespace": "demo"},
            "data": {"a": "b!"},
        },
        "illegal base64 data at input byte 1",
    ),
    "no quantity": (
        deployment(container(resources={"limits": {"cpu": "fast"}})),
        "quantities must match the regular expression",
    ),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_cannot_be_read_is_a_bad_request(world: World, case: str) -> None:
    obj, text = MISREAD[case]
    refused = world.fail("create", "-f", "-", stdin=obj)
    assert refused.startswith('Error from server (BadRequest): error when creating "STDIN": ')
    assert text in refused


def test_without_validation_unknown_fields_are_dropped_silently(world: World) -> None:
    done = world.kubectl.run("create", "--validate=false", "-f", "-", stdin=json.dumps(config(x=1)))
    assert (done.code, done.err) == (0, "")
    assert "x" not in world.store.get("configmaps", "demo", "settings")


def test_with_warnings_unknown_fields_are_dropped_and_named(world: World) -> None:
    done = world.kubectl.run("create", "--validate=warn", "-f", "-", stdin=json.dumps(config(x=1)))
    assert (done.code, done.err) == (0, 'Warning: unknown field "x"\n')


def test_kubectl_checks_the_items_of_a_list_itself_by_the_served_schema(world: World) -> None:
    refused = world.fail("create", "-f", "-", stdin=listed(config("good"), config("bad", x={})))
    assert 'unknown field "x" in io.k8s.api.core.v1.ConfigMap' in refused
    assert world.store.find("configmaps", "demo", "good") is None


def test_a_strict_patch_with_an_unknown_field_is_refused(world: World) -> None:
    world.store.create("services", service())
    path = "/api/v1/namespaces/demo/services/shop?fieldValidation=Strict"
    kind = "application/merge-patch+json"
    code, body = world.request("PATCH", path, '{"spec":{"selektor":{}}}', kind)
    assert code == 422
    assert 'strict decoding error: unknown field "spec.selektor"' in json.loads(body)["message"]


def test_the_large_is_refused_where_a_real_server_refuses_it(world: World) -> None:
    text = "x" * 300_000
    refused = world.fail("apply", "-f", "-", stdin=config(data={"a": text}))
    assert "metadata.annotations: Too long: may not be more than 262144 bytes" in refused
    world.run("create", "-f", "-", stdin=config(data={"a": text}))
    refused = world.fail("create", "-f", "-", stdin=config("more", data={"a": text * 4}))
    assert "Too long: may not be more than 1048576 bytes" in refused
    assert world.request("POST", "/api/v1/namespaces/demo/configmaps", text * 11)[0] == 413


def test_what_is_fixed_in_a_job_stays(world: World) -> None:
    world.run("create", "-f", "-", stdin=job("test"))
    place = ("patch", "job", "-n", "demo", "test", "--type=json", "-p")
    image = {"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "x:2"}
    assert "field is immutable" in world.fail(*place, json.dumps([image]))
    world.run(*place, '[{"op":"replace","path":"/spec/suspend","value":true}]')


def test_names_can_be_generated(world: World) -> None:
    obj = config()
    obj["metadata"] = {"generateName": "settings-", "namespace": "demo"}
    names = {world.run("create", "-f", "-", "-o", "name", stdin=obj) for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("configmap/settings-") for name in names)


# Admission


def test_a_quota_refuses_what_is_too_much_and_counts_what_ends(world: World) -> None:
    hard = {"pods": "1", "requests.cpu": "1", "count/configmaps": "4"}
    meta = {"name": "quota", "namespace": "demo"}
    world.store.create("resourcequotas", {"metadata": meta, "spec": {"hard": hard}})
    needs = {"resources": {"requests": {"cpu": "600m"}}}
    unsaid = world.fail("create", "-f", "-", stdin=pod("none"))
    assert "failed quota: quota: must specify requests.cpu for: main" in unsaid
    world.run("create", "-f", "-", stdin=pod("one", container(**needs)))
    refused = world.fail("create", "-f", "-", stdin=pod("two", container(**needs)))
    assert (
        'pods "two" is forbidden: exceeded quota: quota, requested: pods=1,requests.cpu=600m, '
        "used: pods=1,requests.cpu=600m, limited: pods=1,requests.cpu=1"
    ) in refused
    used = world.store.get("resourcequotas", "demo", "quota")["status"]["used"]
    assert used == {"pods": "1", "requests.cpu": "600m", "count/configmaps": "1"}

    def end(found: Object) -> None:
        found["status"]["phase"] = "Succeeded"

    world.store.update_status("pods", "demo", "one", end)
    used = world.store.get("resourcequotas", "demo", "quota")["status"]["used"]
    assert used == {"pods": "0", "requests.cpu": "0", "count/configmaps": "1"}
    world.run("create", "-f", "-", stdin=pod("two", container(**needs)))


def test_a_limit_range_gives_defaults_and_refuses_extremes(world: World) -> None:
    limit = {
        "type": "Container",
        "default": {"cpu": "200m"},
        "defaultRequest": {"cpu": "100m"},
        "max": {"cpu": "500m"},
    }
    meta = {"name": "limits", "namespace": "demo"}
    world.store.create("limitranges", {"metadata": meta, "spec": {"limits": [limit]}})
    created = world.store.create("pods", pod())
    resources = created["spec"]["containers"][0]["resources"]
    assert resources == {"limits": {"cpu": "200m"}, "requests": {"cpu": "100m"}}
    big = pod("big", container(resources={"limits": {"cpu": "1"}}))
    refused = world.fail("create", "-f", "-", stdin=big)
    assert "maximum cpu usage per Container is 500m, but limit is 1" in refused


SAFE = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
CHECKS: dict[str, tuple[str, Object, str]] = {
    "restricted, nothing said": (
        "restricted",
        pod(),
        (
            'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false ('
            'container "main" must set securityContext.allowPrivilegeEscalation=false), '
            'unrestricted capabilities (container "main" must set '
            'securityContext.capabilities.drop=["ALL"]), '
            'runAsNonRoot != true (pod or container "main" must set '
            'securityContext.runAsNonRoot=true), seccompProfile (pod or container "main" must set '
            'securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost")'
        ),
    ),
    "restricted, all said": ("restricted", pod("one", container(securityContext=SAFE)), ""),
    "restricted, a capability": (
        "restricted",
        pod(
            "one",
            container(
                securityContext={**SAFE, "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]}}
            ),
        ),
        'must not include "CHOWN" in securityContext.capabilities.add',
    ),
    "baseline, nothing said": ("baseline", pod(), ""),
    "baseline, what kaniko needs": (
        "baseline",
        pod(
            "one",
            container(
                securityContext={"runAsUser": 0, "capabilities": {"add": ["CHOWN", "SETFCAP"]}}
            ),
        ),
        "",
    ),
    "baseline, privileged": (
        "baseline",
        pod("one", container(securityContext={"privileged": True})),
        'privileged (container "main" must not set securityContext.privileged=true)',
    ),
    "baseline, the node's files": (
        "baseline",
        pod("one", volumes=[{"name": "root", "hostPath": {"path": "/"}}], hostNetwork=True),
        'host namespaces (hostNetwork=true), hostPath volumes (volume "root")',
    ),
}


@pytest.mark.parametrize("case", CHECKS)
def test_pod_security_lets_in_and_refuses_by_level(world: World, case: str) -> None:
    level, obj, text = CHECKS[case]
    label = f"pod-security.kubernetes.io/enforce={level}"
    world.run("label", "namespace", "demo", label)
    if not text:
        world.run("create", "-f", "-", stdin=obj)
        return
    assert text in world.fail("create", "-f", "-", stdin=obj)


def test_pod_security_warns_about_workloads_whose_pods_it_would_refuse(world: World) -> None:
    world.run("label", "namespace", "demo", "pod-security.kubernetes.io/enforce=restricted")
    done = world.kubectl.run("apply", "-f", "-", stdin=json.dumps(deployment()))
    assert done.code == 0
    assert done.err.startswith('Warning: would violate PodSecurity "restricted:latest": allowPriv')
    scaled = world.kubectl.run("scale", "-n", "demo", "deployment/shop", "--replicas=2")
    assert (scaled.code, scaled.err) == (0, "")


def test_pods_need_their_namespace_and_their_account(world: World) -> None:
    nowhere = pod()
    nowhere["metadata"]["namespace"] = "nowhere"
    assert 'namespaces "nowhere" not found' in world.fail("create", "-f", "-", stdin=nowhere)
    refused = world.fail("create", "-f", "-", stdin=pod(serviceAccountName="nobody"))
    assert (
        'pods "one" is forbidden: error looking up service account demo/nobody: '
        'serviceaccount "nobody" not found'
    ) in refused
    mounted = world.store.create("pods", pod("with"))["spec"]["containers"][0]
    assert mounted["volumeMounts"][0]["mountPath"].endswith("/serviceaccount")
    bare = world.store.create("pods", pod("without", automountServiceAccountToken=False))
    assert "volumeMounts" not in bare["spec"]["containers"][0]


def test_addresses_and_node_ports_are_given_and_kept(world: World) -> None:
    world.run("apply", "-f", "-", stdin=service(type="NodePort"))
    before = world.store.get("services", "demo", "shop")["spec"]
    assert before["ports"][0]["nodePort"] in range(30000, 32768)
    changed = service(type="NodePort", ports=[{"port": 80, "targetPort": 8080}])
    world.run("apply", "-f", "-", stdin=changed)
    after = world.store.get("services", "demo", "shop")["spec"]
    assert after["clusterIP"] == before["clusterIP"]
    assert after["ports"][0]["nodePort"] == before["ports"][0]["nodePort"]
    patch = '{"spec":{"clusterIP":"10.96.0.1","clusterIPs":["10.96.0.1"]}}'
    refused = world.fail("patch", "svc", "-n", "demo", "shop", "-p", patch)
    assert "spec.clusterIPs[0]: Invalid value:" in refused
    assert "may not change once set" in refused


# Who may what


def allow(world: World, *rules: Object) -> None:
    meta = {"name": "worker", "namespace": "demo"}
    world.store.create("serviceaccounts", {"metadata": meta})
    world.store.create("roles", {"metadata": meta, "rules": list(rules)})
    subjects = [{"kind": "ServiceAccount", "name": "worker"}]
    reference = {"kind": "Role", "name": "worker"}
    world.store.create(
        "rolebindings", {"metadata": meta, "roleRef": reference, "subjects": subjects}
    )


def test_a_service_account_s_own_token_is_judged_by_its_roles(world: World) -> None:
    allow(
        world,
        {
            "apiGroups": [""],
            "resources": ["services"],
            "resourceNames": ["shop"],
            "verbs": ["get", "patch"],
        },
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    )
    world.store.create("services", service())
    path = world.api.kubeconfig(world.directory / "worker", "demo/worker", "demo")
    worker = Kubectl(world.directory, path)
    patch = '{"metadata":{"annotations":{"a":"b"}}}'
    assert worker.run("patch", "svc", "shop", "-p", patch).code == 0
    refused = worker.run("get", "svc", "other").err
    assert refused == (
        f'Error from server (Forbidden): services "other" is forbidden: User "{ACCOUNT}" cannot '
        'get resource "services" in API group "" in the namespace "demo"\n'
    )
    assert 'cannot list resource "services"' in worker.run("get", "svc").err
    refused = worker.run("get", "nodes").err
    assert 'cannot list resource "nodes" in API group "" at the cluster scope' in refused
    assert worker.run("auth", "can-i", "patch", "service/shop").out == "yes\n"
    assert worker.run("auth", "can-i", "patch", "service/other").out == "no\n"
    assert worker.run("auth", "can-i", "get", "pods", "--subresource=log").out == "yes\n"
    assert worker.run("auth", "can-i", "get", "pods").out == "no\n"
    assert worker.run("get", "pods", f"--as={ACCOUNT}").err.count("impersonate") == 1


def test_a_token_that_was_revoked_is_unauthorised(world: World) -> None:
    path = world.api.kubeconfig(world.directory / "worker", "demo/worker")
    worker = Kubectl(world.directory, path)
    worker.run("get", "svc")
    world.api.tokens.revoke(world.api.tokens.of_account("demo", "worker"))
    done = worker.run("get", "svc")
    assert done.err == "error: You must be logged in to the server (Unauthorized)\n"


def test_a_kubeconfig_that_is_being_read_is_never_half_written(world: World) -> None:
    path, ended = world.directory / "shared", threading.Event()

    def write() -> None:
        while not ended.is_set():
            world.api.kubeconfig(path)

    world.api.kubeconfig(path)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(500):
            authority = json.loads(path.read_text())["clusters"][0]["cluster"]
            assert Path(authority["certificate-authority"]).read_bytes() == world.api.ca_pem
    finally:
        ended.set()
        writer.join()


def test_cluster_roles_count_where_they_are_bound(world: World) -> None:
    rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}
    world.store.create("clusterroles", {"metadata": {"name": "lister"}, "rules": [rule]})
    subject = {"kind": "ServiceAccount", "name": "worker", "namespace": "demo"}
    reference = {"kind": "ClusterRole", "name": "lister"}
    meta = {"name": "lister", "namespace": "demo"}
    binding = {"metadata": meta, "roleRef": reference, "subjects": [subject]}
    world.store.create("rolebindings", binding)
    account = f"--as={ACCOUNT}"
    world.run("get", "cm", "-n", "demo", account)
    assert "at the cluster scope" in world.fail("get", "cm", "-A", account)
    whole = {"metadata": {"name": "lister"}, "roleRef": reference, "subjects": [subject]}
    world.store.create("clusterrolebindings", whole)
    world.run("get", "cm", "-A", account)


# Trouble


def patch_service(world: World, *more: str) -> Any:
    patch = '{"metadata":{"annotations":{"a":"b"}}}'
    return world.kubectl.run("patch", "svc", "-n", "demo", "shop", "-p", patch, *more)


FAULTS = {
    "refuse": "EOF",
    "409": "the object has been modified",
    "500": "Internal error occurred",
    "forbid": "Error from server (Forbidden)",
}


@pytest.mark.parametrize("action", FAULTS)
def test_a_fault_hits_the_meant_request_once(world: World, action: str) -> None:
    world.store.create("services", service())
    world.api.faults.add(Fault(action, verb="patch", resource="services", name="shop"))
    done = patch_service(world)
    assert done.code == 1
    assert FAULTS[action] in done.err
    assert patch_service(world).code == 0


def test_too_many_requests_are_tried_again_by_kubectl_itself(world: World) -> None:
    world.store.create("services", service())
    world.api.faults.add(Fault("429", verb="patch", resource="services"))
    assert patch_service(world).code == 0
    assert world.verbs("services")[-2:] == [("patch", 429), ("patch", 200)]


def annotated(world: World) -> bool:
    return "annotations" in world.store.get("services", "demo", "shop")["metadata"]


@pytest.mark.parametrize("action", ["hang", "hang-after"])
def test_a_hanging_request_was_done_or_not(world: World, action: str) -> None:
    world.store.create("services", service())
    world.api.faults.add(Fault(action, verb="patch", resource="services"))
    done = patch_service(world, "--request-timeout=1s")
    assert done.code == 1
    assert "context deadline exceeded" in done.err or "Client.Timeout exceeded" in done.err
    assert annotated(world) == (action == "hang-after")


def test_clearing_the_faults_lets_a_hanging_request_go_on(world: World) -> None:
    world.store.create("services", service())
    world.api.faults.add(Fault("hang", verb="patch", resource="services"))
    process = world.kubectl.start("annotate", "svc", "-n", "demo", "shop", "a=b")
    try:
        eventually(lambda: ("patch", 0) in world.verbs("services"), PATIENCE, "the hanging patch")
        assert not annotated(world)
        world.api.faults.clear()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.communicate()
    assert annotated(world)


def test_a_fault_that_was_lifted_holds_no_request_that_had_met_it() -> None:
    faults, leavers, (near, far) = Faults(), Leavers(), socket.socketpair()
    request = Request("patch", "services", "demo", "shop", "worker", 0, 0.0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    sock = context.wrap_socket(near, server_side=True, do_handshake_on_connect=False)
    with sock, far:
        for free in (faults.lift, lambda _: faults.clear()):
            fault = faults.add(Fault("hang"))
            assert faults.take(request, b"") is fault
            free(fault)
            going = threading.Event()
            going.set()
            args = (Connection(sock, leavers, going), fault, None)
            waiting = threading.Thread(target=faults.hang, args=args, daemon=True)
            waiting.start()
            waiting.join(PATIENCE)
            assert not waiting.is_alive()
    leavers.stop()


def test_faults_count_wait_and_look_into_the_body(world: World) -> None:
    world.store.create("services", service())
    place = {"verb": "patch", "resource": "services"}
    world.api.faults.add(Fault("500", **place, after=1, times=2))
    assert [patch_service(world).code for _ in range(4)] == [0, 1, 1, 0]
    world.api.faults.add(Fault("500", **place, body_contains='"special"', times=None))
    assert patch_service(world).code == 0
    done = world.kubectl.run("annotate", "svc", "-n", "demo", "shop", "special=1")
    assert done.code == 1
    world.api.faults.clear()
    world.api.faults.add(Fault("500", **place, user=ACCOUNT, times=None))
    assert patch_service(world).code == 0


def test_a_fault_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown action 'explode'"):
        Fault("explode")


def test_a_dropped_watch_stays_open_and_says_nothing(world: World) -> None:
    world.api.faults.add(Fault("drop-watch", resource="configmaps"))
    process = world.kubectl.start(
        "get", "cm", "-n", "demo", "--watch", "-o", "name", "--request-timeout=2s"
    )
    try:
        eventually(lambda: ("watch", 200) in world.verbs("configmaps"), PATIENCE, "the watch")
        world.store.create("configmaps", config())
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert out == "configmap/kube-root-ca.crt\n"
    assert process.returncode == 0


def test_a_server_that_is_down_refuses_and_comes_back_with_everything(world: World) -> None:
    world.store.create("services", service())
    world.run("get", "svc", "-n", "demo")
    watch = world.kubectl.start("get", "svc", "-n", "demo", "--watch", "-o", "name")
    try:
        eventually(lambda: ("watch", 200) in world.verbs("services"), PATIENCE, "the watch")
        world.api.down()
        out, err = watch.communicate(timeout=PATIENCE)
    finally:
        watch.kill()
        watch.wait()
    assert (watch.returncode, out, err) == (0, "service/shop\n", "")
    down = world.fail("get", "svc", "-n", "demo")
    assert f"The connection to the server 127.0.0.1:{world.api.port} was refused" in down
    assert "connect: connection refused" in world.fail("create", "-f", "-", stdin=config())
    world.api.up()
    assert world.run("get", "svc", "-n", "demo", "-o", "name") == "service/shop\n"


# The rest


def test_a_thousand_jobs_in_one_call_take_less_than_five_seconds(world: World) -> None:
    jobs = [job(f"test-{number:04}", suspend=True) for number in range(1000)]
    began = time.monotonic()
    out = world.run("create", "-f", "-", "-o", "name", stdin=listed(*jobs))
    assert time.monotonic() - began < 5
    assert len(out.splitlines()) == len(world.store.list("jobs")) == 1000


def test_the_typed_commands_of_kubectl_are_understood(world: World) -> None:
    world.run("create", "namespace", "more")
    world.run("create", "configmap", "c", "-n", "more", "--from-literal=a=b")
    world.run("create", "secret", "generic", "s", "-n", "more", "--from-literal=a=b")
    world.run("create", "deployment", "d", "-n", "more", "--image=example:1", "--port=80")
    world.run("create", "job", "j", "-n", "more", "--image=example:1", "--", "sh", "-c", "true")
    world.run("create", "role", "r", "-n", "more", "--verb=get", "--resource=pods")
    world.run("create", "rolebinding", "r", "-n", "more", "--role=r", "--serviceaccount=more:x")
    assert world.store.get("secrets", "more", "s")["data"] == {"a": "Yg=="}
    made = world.store.get("jobs", "more", "j")["spec"]["template"]["spec"]["containers"][0]
    assert made["command"] == ["sh", "-c", "true"]
    subjects = world.store.get("rolebindings", "more", "r")["subjects"]
    assert subjects == [{"kind": "ServiceAccount", "name": "x", "namespace": "more"}]


def test_waiting_for_a_condition_ends_when_it_holds(world: World) -> None:
    world.store.create("jobs", job("test"))
    process = world.kubectl.start(
        "wait", "--for=condition=Complete", "job/test", "-n", "demo", "--timeout=20s"
    )
    try:
        eventually(lambda: ("watch", 200) in world.verbs("jobs"), PATIENCE, "the watch")

        def complete(found: Object) -> None:
            found["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}

        world.store.update_status("jobs", "demo", "test", complete)
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert out == "job.batch/test condition met\n"


def test_events_of_the_same_kind_are_counted(world: World) -> None:
    obj = world.store.create("configmaps", config())
    for text in ("first", "second", "second"):
        world.store.record_event(obj, "Warning", "Odd", text, "someone")
    found = {item["message"]: item["count"] for item in world.store.list("events", "demo")}
    assert found == {"first": 1, "second": 2}
    selector = f"involvedObject.uid={obj['metadata']['uid']},reason=Odd"
    out = world.run("get", "events", "-n", "demo", "-o", "name", "--field-selector", selector)
    assert len(out.splitlines()) == 2


def test_the_known_fields_are_those_of_the_published_schemas() -> None:
    written = json.loads(make_fields.OUTPUT.read_text())
    assert written == make_fields.collect()


def test_the_store_hands_out_copies_and_refuses_what_is_not_there() -> None:
    store = Store()
    store.create("configmaps", {"metadata": {"name": "a"}, "data": {"x": "y"}})
    store.get("configmaps", None, "a")["data"]["x"] = "changed"
    assert store.get("configmaps", None, "a")["data"] == {"x": "y"}
    with pytest.raises(ApiError, match='configmaps "b" not found'):
        store.get("configmaps", "default", "b")
    with pytest.raises(ApiError, match='configmaps "a" already exists'):
        store.create("configmaps", {"metadata": {"name": "a"}})


def test_a_change_that_changes_nothing_is_no_event() -> None:
    store = Store()
    store.create("configmaps", {"metadata": {"name": "a"}})
    subscription = store.subscribe("configmaps", store.version)
    before = store.version
    store.update("configmaps", None, "a", lambda obj: None)
    assert store.version == before
    store.update("configmaps", None, "a", lambda obj: {**obj, "data": {"x": "y"}})
    event = subscription.get(PATIENCE)
    assert event is not None
    assert (event[0], event[1]["data"]) == ("MODIFIED", {"x": "y"})
    subscription.close()
    assert subscription.get(PATIENCE) is None


def test_an_object_made_for_an_owner_that_is_gone_goes_too() -> None:
    store = Store()
    owner = store.create("configmaps", {"metadata": {"name": "owner"}})
    store.delete("configmaps", None, "owner")
    child = owned({"metadata": {"name": "child"}}, owner)
    store.create("configmaps", child)
    assert store.find("configmaps", None, "child") is None


def test_stopping_leaves_no_thread_and_no_listener(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    api = Api(Store()).start()
    kubectl = Kubectl(tmp_path, api.kubeconfig(tmp_path / "config"))
    watch = kubectl.start("get", "cm", "--watch")
    try:
        eventually(
            lambda: any(item.verb == "watch" for item in api.faults.log), PATIENCE, "the watch"
        )
        api.stop()
        assert watch.wait(PATIENCE) == 0
    finally:
        watch.kill()
        watch.communicate()
    assert set(threading.enumerate()) <= before
