"""The stand-in cluster as a whole: pods are processes, Services carry connections, all of it ends.

The conformance tests hold it to the recordings; these hold it to what its users rely on beyond.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.standin.builder import BuildError, read_dockerfile
from tests.standin.cluster import Cluster
from tests.standin.sandbox import expand, rewriter
from tests.waiting import eventually

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]
KUBECTL = Path(sys.executable).with_name("kubectl")
PATIENCE = 20.0
# A server that answers every path with its own name, on kept-alive connections too.
SERVER = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = os.environ["COLOUR"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
"""
SUMMARY = """
import signal, sys
def end(*_):
    with open("/workspace/result") as done, open("/dev/termination-log", "w") as log:
        log.write("summary of " + done.read())
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.pause()
"""


def lives(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pod(name: str, *containers: Object, **spec: Any) -> Object:
    mains = [{"image": "python:3.12-slim", "name": "main", **item} for item in containers]
    inits = spec.pop("inits", [])
    if inits:
        spec["initContainers"] = [{"image": "busybox:1", **item} for item in inits]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "test", "labels": {"app": name}},
        "spec": {"restartPolicy": "Never", "containers": mains, **spec},
    }


def shell(script: str, **more: Any) -> Object:
    return {"command": ["sh", "-c", script], **more}


def server(colour: str, **more: Any) -> Object:
    return {
        "command": ["python", "-c", SERVER],
        "env": [{"name": "COLOUR", "value": colour}],
        "ports": [{"containerPort": 8080, "name": "http"}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1},
        **more,
    }


def deployment(name: str, container: Object, **spec: Any) -> Object:
    labels = {"app": "shop", "version": name}
    template = {"containers": [{"image": "python:3.12-slim", "name": "main", **container}]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "test"},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": template},
            **spec,
        },
    }


def service(name: str, version: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "test"},
        "spec": {
            "selector": {"app": "shop", "version": version},
            "ports": [{"port": 80, "targetPort": "http"}],
        },
    }


def job(name: str, container: Object, inits: list[Object] | None = None, **spec: Any) -> Object:
    template = pod(name, container, inits=inits or [])["spec"]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": "test"},
        "spec": {"backoffLimit": 0, "template": {"spec": template}, **spec},
    }


class World:
    """A running cluster and short ways to look at it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.store = cluster.store

    def pods(self, label: str) -> list[Object]:
        key, _, value = label.partition("=")
        return self.store.list("pods", "test", {key: value})

    def phase(self, name: str) -> str:
        found = self.store.find("pods", "test", name) or {}
        return str(found.get("status", {}).get("phase", ""))

    def runs(self, name: str) -> bool:
        return self.phase(name) == "Running"

    def ended(self, name: str) -> Object:
        """The pod, once it has come to its end."""
        eventually(lambda: self.phase(name) in ("Succeeded", "Failed"))
        return self.store.get("pods", "test", name)

    def output(self, name: str, container: str = "main") -> str:
        return self.cluster.kubelet.logs("test", name, container).decode()

    def container(self, name: str) -> Object:
        found = self.store.get("pods", "test", name)["status"].get("containerStatuses")
        return dict(found[0]) if found else {"state": {}, "lastState": {}, "restartCount": 0}

    def condition(self, resource: str, name: str, kind: str) -> Object:
        found = self.store.get(resource, "test", name).get("status", {}).get("conditions") or []
        return next((dict(item) for item in found if item["type"] == kind), {})

    def available(self, name: str) -> bool:
        status = self.store.get("deployments", "test", name).get("status", {})
        return bool(status.get("availableReplicas", 0) == 2)

    def address(self, name: str) -> str:
        return str(self.store.get("services", "test", name)["spec"]["clusterIP"])

    def remove(self, resource: str, *names: str) -> None:
        for name in names:
            self.store.delete(resource, "test", name, grace=0)


def ask(connection: http.client.HTTPConnection) -> str:
    connection.request("GET", "/")
    return connection.getresponse().read().decode()


def ask_anew(address: str) -> str:
    """The answer on a connection of its own; empty when it is refused."""
    connection = http.client.HTTPConnection(address, 80, timeout=5)
    try:
        return ask(connection)
    except ConnectionError:
        return ""
    finally:
        connection.close()


def answers(address: str, colour: str) -> bool:
    return ask_anew(address) == colour


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Cluster(tmp_path_factory.mktemp("cluster"), speed=5) as cluster:
        cluster.load_yaml("{apiVersion: v1, kind: Namespace, metadata: {name: test}}")
        yield World(cluster)


# Speed


def test_pods_start_at_once_and_a_job_is_complete_in_half_a_second(world: World) -> None:
    times: dict[str, list[float]] = {"running": [], "complete": []}
    for number in range(3):
        begun = time.monotonic()
        world.cluster.load(pod(f"quick-{number}", shell("sleep 1")))
        eventually(partial(world.runs, f"quick-{number}"))
        times["running"].append(time.monotonic() - begun)
        begun = time.monotonic()
        world.cluster.load(job(f"quick-{number}", {"command": ["true"]}))
        eventually(partial(world.condition, "jobs", f"quick-{number}", "Complete"))
        times["complete"].append(time.monotonic() - begun)
    # The best of three, so that a busy machine does not decide.
    assert min(times["running"]) < 0.15
    assert min(times["complete"]) < 0.5


def test_a_thousand_suspended_jobs_cost_nothing(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.load_yaml("{apiVersion: v1, kind: Namespace, metadata: {name: test}}")
        cluster.load(*(job(f"j{n}", {"command": ["true"]}, suspend=True) for n in range(1000)))

        def suspended() -> bool:
            jobs = cluster.store.snapshot("jobs")[0]
            return all((item.object.get("status") or {}).get("conditions") for item in jobs)

        eventually(suspended)

        def idle() -> bool:
            used = time.process_time()
            threading.Event().wait(1)
            return time.process_time() - used < 0.03

        eventually(idle)
        assert not cluster.store.snapshot("pods")[0]


# What a container sees


def test_volumes_and_downward_values_are_where_the_manifest_says(world: World) -> None:
    world.cluster.load_yaml(
        """
        {apiVersion: v1, kind: ConfigMap, metadata: {name: settings, namespace: test},
         data: {a.txt: alpha, b.txt: beta}}
        """
    )
    world.cluster.load_yaml(
        """
        {apiVersion: v1, kind: Secret, metadata: {name: hidden, namespace: test},
         data: {token: dDBrZW4=}}
        """
    )
    script = """
        cd /workspace; echo $(cat /config/chosen) $(ls /config) $(cat /one) $(cat /secret/token)
        stat -L -c %a /secret/token; echo $(cat /all/a.txt) $(cat /all/where); pwd
        echo $NAME $PLACE $COLOUR $ADDRESS $POD_IP $WHERE $FROM $(echo $PASSWORD)
        cat results/none 2>/dev/null; echo kept > /workspace/x; cat x
    """
    field = {"fieldRef": {"fieldPath": "metadata.name"}}
    env = [
        {"name": "NAME", "valueFrom": field},
        {"name": "PLACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": "COLOUR", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
        {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "WHERE", "value": "/workspace/src:$(NAME)"},
        {"name": "FROM", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "a.txt"}}},
        {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "hidden", "key": "token"}}},
    ]
    mounts = [
        {"name": "space", "mountPath": "/workspace"},
        {"name": "some", "mountPath": "/config"},
        {"name": "settings", "mountPath": "/one", "subPath": "b.txt"},
        {"name": "hidden", "mountPath": "/secret", "readOnly": True},
        {"name": "all", "mountPath": "/all"},
    ]
    items = [{"key": "b.txt", "path": "chosen"}]
    sources = [
        {"configMap": {"name": "settings"}},
        {"downwardAPI": {"items": [{"path": "where", **field}]}},
    ]
    volumes = [
        {"name": "space", "emptyDir": {}},
        {"name": "some", "configMap": {"name": "settings", "items": items}},
        {"name": "settings", "configMap": {"name": "settings"}},
        {"name": "hidden", "secret": {"secretName": "hidden", "defaultMode": 0o400}},
        {"name": "all", "projected": {"sources": sources}},
    ]
    world.cluster.load(pod("seeing", shell(script, env=env, volumeMounts=mounts), volumes=volumes))
    assert world.ended("seeing")["status"]["phase"] == "Succeeded", world.output("seeing")
    lines = world.output("seeing").splitlines()
    assert lines[:3] == ["beta chosen beta t0ken", "400", "alpha seeing"]
    space = lines[3]
    assert space.startswith(str(world.cluster.directory))
    address = world.store.get("pods", "test", "seeing")["status"]["podIP"]
    assert lines[4:] == [
        f"seeing test seeing {address} {address} {space}/src:seeing alpha t0ken",
        "kept",
    ]


def test_a_container_gets_its_own_environment_and_nothing_of_ours(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITOPS_HOOK_CONFIG", "/leaked")
    world.cluster.load(pod("bare", {"command": ["env"], "env": [{"name": "A", "value": "b"}]}))
    world.ended("bare")
    found = dict(line.partition("=")[::2] for line in world.output("bare").splitlines())
    assert found.keys() - {"LC_CTYPE"} == {"A", "HOME", "LANG", "PATH", "POD_IP"}
    assert found["PATH"].startswith(str(Path(sys.executable).parent))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--context=dir:///workspace/src", "--context=dir:///P/space/src"),
        ("cd /workspace && cat /tmp/a", "cd /P/space && cat /P/tmp/a"),
        ("/workspaces /a/tmp ${X}/tmp $(pwd)/tmp", "/workspaces /a/tmp ${X}/tmp $(pwd)/tmp"),
        ("https://example.com/tmp/x", "https://example.com/tmp/x"),
        ("open('/workspace/cache')", "open('/P/cache')"),
    ],
)
def test_paths_are_rewritten_only_where_they_begin(text: str, expected: str) -> None:
    mounts = {"/workspace": "/P/space", "/tmp": "/P/tmp", "/workspace/cache": "/P/cache"}
    assert rewriter(mounts)(text) == expected


@pytest.mark.parametrize("before", ["", "CLONE_URL="])
def test_what_is_there_on_this_machine_is_no_path_of_the_pod(before: str, tmp_path: Path) -> None:
    rewrite = rewriter({str(tmp_path): "/P/tmp"})
    there, missing = tmp_path / "there", tmp_path / "missing"
    there.mkdir()
    assert rewrite(f"{before}{there}") == f"{before}{there}"
    assert rewrite(f"{before}{missing}") == f"{before}/P/tmp/missing"


def test_references_in_commands_are_expanded_as_kubernetes_does() -> None:
    assert expand("$(A) $$(A) $(NONE) $A", {"A": "1"}) == "1 $(A) $(NONE) $A"


# The life of containers


def test_init_container_and_side_car_work_together_with_the_tests(world: World) -> None:
    mount = {"volumeMounts": [{"name": "space", "mountPath": "/workspace"}]}
    inits = [
        {"name": "clone", **shell("echo cloned > /workspace/source"), **mount},
        {
            "name": "results",
            "image": "python:3.12-slim",
            "restartPolicy": "Always",
            "command": ["python", "-c", SUMMARY],
            **mount,
        },
    ]
    tests = shell("cat /workspace/source > /workspace/result", **mount)
    volumes = [{"name": "space", "emptyDir": {}}]
    world.cluster.load(pod("tested", tests, inits=inits, volumes=volumes))
    status = world.ended("tested")["status"]
    assert status["phase"] == "Succeeded"
    messages = [
        item["state"]["terminated"].get("message") for item in status["initContainerStatuses"]
    ]
    assert messages == [None, "summary of cloned\n"]


SERVES_ITSELF = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    socket.create_connection(("127.0.0.1", port)).close()
    socket.create_connection(("localhost", port), timeout=5).close()
"""


def test_a_container_reaches_what_it_serves_on_its_own_loopback_alone(world: World) -> None:
    command = ["python", "-c", SERVES_ITSELF]
    container = {"image": "python:3.12-slim", "command": command, "ports": [{"containerPort": 1}]}
    world.cluster.load(pod("alone", container))
    assert world.ended("alone")["status"]["phase"] == "Succeeded"


def test_a_termination_message_can_come_from_the_log(world: World) -> None:
    policy = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    world.cluster.load(pod("speaking", shell("echo it broke; exit 4", **policy)))
    status = world.ended("speaking")["status"]["containerStatuses"][0]
    assert status["state"]["terminated"]["message"] == "it broke\n"
    assert status["state"]["terminated"]["exitCode"] == 4


def test_a_program_that_is_not_there_is_a_start_error(world: World) -> None:
    world.cluster.load(pod("absent", {"command": ["no-such-program"]}))
    ended = world.ended("absent")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("StartError", 128)
    assert 'exec: "no-such-program": executable file not found in $PATH' in ended["message"]


def test_deleting_a_pod_runs_its_hook_then_sigterm_and_leaves_no_process(world: World) -> None:
    script = """
        import os, signal, subprocess, sys, time
        print(os.getpid(), subprocess.Popen(["sleep", "1000"]).pid, flush=True)
        signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), sys.exit(0)))
        signal.pause()
    """
    code = re.sub(r"(?m)^ {8}", "", script)
    hook = {"lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}
    world.cluster.load(pod("polite", {"command": ["python", "-c", code], **hook}))
    eventually(lambda: world.phase("polite") == "Running" and "\n" in world.output("polite"))
    pids = [int(word) for word in world.output("polite").split()]
    begun = time.monotonic()
    world.store.delete("pods", "test", "polite")
    eventually(lambda: world.store.find("pods", "test", "polite") is None)
    # One second at five times the speed, and far from the grace period of thirty.
    assert 0.2 <= time.monotonic() - begun < 5
    eventually(lambda: not any(lives(pid) for pid in pids))


def test_a_signal_without_handler_does_not_end_the_first_process(world: World) -> None:
    world.cluster.load(pod("deaf", shell("sleep 1000; true"), terminationGracePeriodSeconds=4))
    eventually(lambda: world.phase("deaf") == "Running")
    begun = time.monotonic()
    world.store.delete("pods", "test", "deaf")
    eventually(lambda: world.store.find("pods", "test", "deaf") is None)
    assert time.monotonic() - begun >= 4 / 5


def test_a_failed_liveness_probe_restarts_and_the_former_log_is_kept(world: World) -> None:
    probe = {"exec": {"command": ["test", "-e", "/state/fine"]}, "periodSeconds": 1}
    main = shell(
        "echo start $(ls /state); touch /state/fine; sleep 1; rm /state/fine; sleep 1000",
        volumeMounts=[{"name": "state", "mountPath": "/state"}],
        livenessProbe={**probe, "failureThreshold": 2, "initialDelaySeconds": 1},
    )
    volumes = [{"name": "state", "emptyDir": {}}]
    kind = {"restartPolicy": "Always", "terminationGracePeriodSeconds": 1}
    world.cluster.load(pod("sickly", main, volumes=volumes, **kind))
    eventually(lambda: world.container("sickly")["restartCount"] == 1)
    assert world.container("sickly")["lastState"]["terminated"]["exitCode"] == 137
    former = world.cluster.kubelet.logs("test", "sickly", "main", previous=True)
    assert former.startswith(b"start")
    reasons = {
        (item["reason"], item["message"])
        for item in world.store.list("events", "test")
        if item["involvedObject"]["name"] == "sickly"
    }
    assert ("Killing", "Container main failed liveness probe, will be restarted") in reasons
    world.remove("pods", "sickly")


def test_other_probes_wait_for_the_startup_probe(world: World) -> None:
    startup = {"exec": {"command": ["test", "-e", "/state/up"]}, "periodSeconds": 1}
    main = shell(
        "sleep 0.5; touch /state/up; sleep 1000",
        volumeMounts=[{"name": "state", "mountPath": "/state"}],
        startupProbe={**startup, "failureThreshold": 50},
        livenessProbe={**startup, "failureThreshold": 1},
    )
    world.cluster.load(pod("slow", main, volumes=[{"name": "state", "emptyDir": {}}]))
    eventually(lambda: world.phase("slow") == "Running")
    assert not world.container("slow")["started"]
    eventually(lambda: world.container("slow").get("ready"))
    assert world.container("slow")["restartCount"] == 0
    world.remove("pods", "slow")


def test_a_missing_volume_source_keeps_the_pod_waiting_until_it_is_there(world: World) -> None:
    volumes = [{"name": "late", "configMap": {"name": "late"}}]
    main = shell("cat /late/x", volumeMounts=[{"name": "late", "mountPath": "/late"}])
    world.cluster.load(pod("patient", main, volumes=volumes))

    def told() -> bool:
        text = 'MountVolume.SetUp failed for volume "late" : configmap "late" not found'
        events = world.store.list("events", "test")
        return any((item["reason"], item["message"]) == ("FailedMount", text) for item in events)

    eventually(told)
    assert world.phase("patient") == "Pending"
    world.cluster.load_yaml(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: late, namespace: test}, data: {x: y}}"
    )
    assert world.ended("patient")["status"]["phase"] == "Succeeded"
    assert world.output("patient") == "y"


def test_a_claim_that_is_made_later_lets_the_pod_be_scheduled(world: World) -> None:
    volumes = [{"name": "cache", "persistentVolumeClaim": {"claimName": "pip"}}]
    mounts = {"volumeMounts": [{"name": "cache", "mountPath": "/cache"}]}
    world.cluster.load(pod("claiming", shell("true", **mounts), volumes=volumes))
    condition = eventually(lambda: world.condition("pods", "claiming", "PodScheduled"))
    text = '0/1 nodes are available: persistentvolumeclaim "pip" not found. not found'
    assert (condition["status"], condition["message"]) == ("False", text)
    meta = {"name": "pip", "namespace": "test"}
    world.cluster.load({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta})
    eventually(lambda: world.condition("pods", "claiming", "PodScheduled")["status"] == "True")
    world.remove("pods", "claiming")


def test_a_crashed_service_keeps_the_log_of_its_former_life(world: World) -> None:
    probe = {"tcpSocket": {"port": 5432}, "periodSeconds": 1}
    database = {
        "name": "db",
        **shell("echo life $(date +%N); exit 1", startupProbe=probe),
        "restartPolicy": "Always",
    }
    world.cluster.load(pod("served", shell("true"), inits=[database]))

    def restarts() -> int:
        shown = world.store.get("pods", "test", "served")["status"].get("initContainerStatuses")
        return int(shown[0]["restartCount"]) if shown else 0

    eventually(lambda: restarts() == 1)
    assert world.phase("served") == "Pending"
    logs = partial(world.cluster.kubelet.logs, "test", "served", "db")
    eventually(lambda: len({logs(previous=False), logs(previous=True)} - {b""}) == 2)
    world.remove("pods", "served")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"nodeSelector": {"disk": "gold"}}, "node(s) didn't match Pod's node affinity/selector"),
        ({"cpu": "64"}, "1 Insufficient cpu"),
        ({"memory": "1000Gi"}, "1 Insufficient memory"),
    ],
)
def test_what_fits_no_node_stays_unscheduled(world: World, spec: Object, text: str) -> None:
    more = {key: spec[key] for key in ("nodeSelector",) if key in spec}
    requests = {key: spec[key] for key in ("cpu", "memory") if key in spec}
    name = f"big-{'-'.join(spec).lower()}"
    world.cluster.load(pod(name, shell("true", resources={"requests": requests}), **more))
    condition = eventually(lambda: world.condition("pods", name, "PodScheduled"))
    assert (condition["status"], condition["reason"]) == ("False", "Unschedulable")
    assert text in condition["message"]
    world.remove("pods", name)


def test_a_broken_pull_says_the_text_that_was_asked_for(world: World) -> None:
    world.cluster.images.break_pull("busybox:broken", "denied: requested access is denied")
    world.cluster.load(pod("denied", shell("true", image="busybox:broken")))
    state = eventually(lambda: world.container("denied")["state"].get("waiting", {}).get("message"))
    assert state == "denied: requested access is denied"
    world.cluster.images.break_pull("busybox:broken", None)
    assert world.ended("denied")["status"]["phase"] == "Succeeded"


def test_a_silent_registry_keeps_a_pod_without_a_word_until_it_answers(world: World) -> None:
    world.cluster.images.hold_pull("busybox:silent", held=True)
    world.cluster.load(pod("silent", shell("true", image="busybox:silent")))
    told = eventually(lambda: [e for e in world.cluster.store.list("events")
                               if "busybox:silent" in e["message"]])  # fmt: skip
    assert [e["reason"] for e in told] == ["Pulling"]
    assert world.container("silent")["state"] == {"waiting": {"reason": "ContainerCreating"}}
    world.cluster.images.hold_pull("busybox:silent", held=False)
    assert world.ended("silent")["status"]["phase"] == "Succeeded"


def test_a_cordoned_node_takes_pods_only_when_it_is_open_again(world: World) -> None:
    world.cluster.cordon()
    world.cluster.load(pod("outside", shell("true")))
    condition = eventually(lambda: world.condition("pods", "outside", "PodScheduled"))
    assert condition["message"].startswith(
        "0/1 nodes are available: 1 node(s) were unschedulable. no new claims to deallocate"
    )
    world.cluster.cordon(False)
    assert world.ended("outside")["status"]["phase"] == "Succeeded"


def test_a_reference_that_is_none_is_an_invalid_image_name(world: World) -> None:
    world.cluster.load(pod("misnamed", shell("true", image="Registry/UPPER:1")))

    def reason() -> bool:
        waiting = world.container("misnamed")["state"].get("waiting", {})
        return bool(waiting.get("reason") == "InvalidImageName")

    eventually(reason)
    world.remove("pods", "misnamed")


# Mishaps


def test_a_killed_container_is_an_error_and_restarts(world: World) -> None:
    world.cluster.load(pod("shot", shell("sleep 1000; true"), restartPolicy="Always"))
    eventually(lambda: world.phase("shot") == "Running")
    world.cluster.kill_container("test", "shot", "main")
    eventually(lambda: world.container("shot")["restartCount"] == 1)
    ended = world.container("shot")["lastState"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (137, "Error")
    world.remove("pods", "shot")


def test_a_job_goes_on_after_its_node_was_lost_and_after_its_pod_vanished(world: World) -> None:
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}},
    ]
    policy = {"rules": rules}
    world.cluster.load(job("unlucky", shell("sleep 1000; true"), podFailurePolicy=policy))

    def running(*but: str) -> str:
        return next(
            (
                item["metadata"]["name"]
                for item in world.pods("batch.kubernetes.io/job-name=unlucky")
                if item["metadata"]["name"] not in but and item["status"].get("phase") == "Running"
            ),
            "",
        )

    first = eventually(running)
    world.cluster.lose_node_of("test", first)
    second = eventually(lambda: running(first))
    world.cluster.lose_pod("test", second)
    eventually(lambda: running(first, second))
    assert world.condition("jobs", "unlucky", "FailureTarget") == {}
    assert world.store.get("jobs", "test", "unlucky")["status"].get("failed", 0) == 0
    world.remove("jobs", "unlucky")


# Images


def test_what_the_builder_stores_runs_by_its_digest(world: World, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "hello.py").write_text("print(open('name.txt').read(), __file__)\n")
    (tmp_path / "app" / "name.txt").write_text("shop")
    (tmp_path / "Dockerfile").write_text(
        "FROM python:3.12-slim\nWORKDIR /srv/app\nENV GREETING=hi\nCOPY app/ .\n"
        'CMD ["python", "/srv/app/hello.py"]\n'
    )
    script = f"mkdir -p /workspace/src; cp -r {tmp_path}/* /workspace/src"
    mount = {"volumeMounts": [{"name": "space", "mountPath": "/workspace"}]}
    build = {
        "image": "registry.example.com/tools/kaniko:v1",
        "args": [
            "--context=dir:///workspace/src",
            "--dockerfile=Dockerfile",
            "--destination=registry.example.com/demo/shop:1234",
            "--digest-file=/dev/termination-log",
            "--insecure",
        ],
        **mount,
    }
    digests = []
    for name in ("build-1", "build-2"):
        inits = [{"name": "clone", **shell(script), **mount}]
        volumes = [{"name": "space", "emptyDir": {}}]
        world.cluster.load(pod(name, build, inits=inits, volumes=volumes))
        status = world.ended(name)["status"]["containerStatuses"][0]
        assert status["state"]["terminated"]["exitCode"] == 0, world.output(name)
        digests.append(status["state"]["terminated"]["message"])
    assert digests[0] == digests[1]
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digests[0])
    image = f"registry.example.com/demo/shop@{digests[0]}"
    world.cluster.load(pod("built", {"image": image}))
    assert world.ended("built")["status"]["phase"] == "Succeeded", world.output("built")
    assert world.output("built").startswith("shop ")


def test_a_dockerfile_that_runs_something_fails_the_build(world: World, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:3.12-slim\nRUN pip install x\n")
    args = [f"--context=dir://{tmp_path}", "--destination=registry.example.com/a:1"]
    world.cluster.load(pod("unbuilt", {"image": "registry.example.com/kaniko:1", "args": args}))
    assert world.ended("unbuilt")["status"]["phase"] == "Failed"
    assert "Dockerfile:2: RUN is not carried out" in world.output("unbuilt")


def test_continuation_lines_of_a_dockerfile_are_one_instruction() -> None:
    text = "# a comment\nFROM a\nENV A=1 \\\n  B=2\n"
    assert read_dockerfile(text) == [(2, "FROM", "a"), (3, "ENV", "A=1  B=2")]
    with pytest.raises(BuildError, match="ends in the middle"):
        read_dockerfile("FROM a \\\n")


# Deployments and Services


@pytest.fixture
def colours(world: World) -> Iterator[str]:
    """Two colours and a Service that selects blue; the Service's address."""
    names = ("blue", "green")
    world.cluster.load(*(deployment(name, server(name)) for name in names), service("shop", "blue"))
    eventually(lambda: all(world.available(name) for name in names))
    address = world.address("shop")
    eventually(lambda: ask_anew(address) == "blue")
    yield address
    world.remove("deployments", *names)
    world.remove("services", "shop")
    eventually(lambda: not world.pods("app=shop"))


def select(world: World, version: str) -> None:
    def change(stored: Object) -> None:
        stored["spec"]["selector"]["version"] = version

    world.store.update("services", "test", "shop", change)


def test_new_connections_follow_the_selector_and_open_ones_stay(world: World, colours: str) -> None:
    kept = http.client.HTTPConnection(colours, 80, timeout=5)
    assert ask(kept) == "blue"
    moved = []
    for colour in ("green", "blue", "green"):
        begun = time.monotonic()
        select(world, colour)
        eventually(partial(answers, colours, colour))
        moved.append(time.monotonic() - begun)
        assert ask(kept) == "blue"
    assert min(moved) < 0.15
    for item in world.pods("version=blue"):
        world.store.delete("pods", "test", item["metadata"]["name"], grace=0)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        eventually(lambda: ask(kept) != "blue")
    kept.close()


def test_a_service_without_ready_pods_refuses_connections(world: World, colours: str) -> None:
    select(world, "none")

    def refused() -> bool:
        with socket.socket() as client:
            return client.connect_ex((colours, 80)) != 0

    eventually(refused)
    select(world, "green")
    eventually(lambda: ask_anew(colours) == "green")


def test_min_ready_seconds_delay_availability_and_recreate_ends_the_old_first(
    world: World,
) -> None:
    world.cluster.load(
        deployment("white", server("white"), minReadySeconds=5, strategy={"type": "Recreate"})
    )

    def ready() -> int:
        status = world.store.get("deployments", "test", "white").get("status", {})
        return int(status.get("readyReplicas", 0))

    eventually(lambda: ready() == 2)
    begun = time.monotonic()
    assert not world.available("white")
    eventually(lambda: world.available("white"))
    assert time.monotonic() - begun > 0.5
    old = {item["metadata"]["name"] for item in world.pods("version=white")}
    both: list[int] = []

    def change(stored: Object) -> None:
        stored["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = "snow"

    world.store.update("deployments", "test", "white", change)

    def replaced() -> bool:
        names = {item["metadata"]["name"] for item in world.pods("version=white")}
        both.append(len(names & old) and len(names - old))
        return bool(names) and not names & old

    eventually(replaced)
    assert not any(both)
    world.remove("deployments", "white")


def test_a_refused_pod_is_a_condition_of_the_deployment(world: World) -> None:
    world.cluster.load_yaml(
        """
        {apiVersion: v1, kind: ResourceQuota, metadata: {name: tight, namespace: test},
         spec: {hard: {count/pods: "0", pods: "0"}}}
        """
    )
    world.cluster.load(deployment("excess", server("excess")))
    found = eventually(lambda: world.condition("deployments", "excess", "ReplicaFailure"))
    assert found["reason"] == "FailedCreate"
    assert "exceeded quota: tight" in found["message"]
    world.remove("resourcequotas", "tight")
    eventually(lambda: world.available("excess"))
    eventually(lambda: not world.condition("deployments", "excess", "ReplicaFailure"))
    world.remove("deployments", "excess")


def test_two_clusters_side_by_side_do_not_meet(tmp_path: Path) -> None:
    heard = {}
    with Cluster(tmp_path / "one") as one, Cluster(tmp_path / "two") as two:
        for name, cluster in (("one", one), ("two", two)):
            cluster.load_yaml("{apiVersion: v1, kind: Namespace, metadata: {name: test}}")
            cluster.load(deployment(name, server(name)), service("shop", name))
        for name, cluster in (("one", one), ("two", two)):
            address = World(cluster).address("shop")
            heard[name] = eventually(partial(ask_anew, address))
    assert heard == {"one": "one", "two": "two"}


# As a program


class Program:
    """`python -m tests.standin`, with the real kubectl."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        manifests = directory.parent / "start.yaml"
        manifests.write_text(
            "{apiVersion: v1, kind: Namespace, metadata: {name: test}}\n---\n"
            "{apiVersion: v1, kind: ServiceAccount, metadata: {name: runner, namespace: test}}\n"
        )
        arguments = ["--directory", str(directory), "--manifests", str(manifests)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.standin", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready: Object = {}

    def wait(self) -> None:
        assert self.process.stdout is not None
        self.ready = json.loads(self.process.stdout.readline())

    def kubectl(self, *arguments: str, given: Object | None = None) -> str:
        done = subprocess.run(
            [str(KUBECTL), "--kubeconfig", self.ready["kubeconfig"], "-n", "test", *arguments],
            input=json.dumps(given) if given else "",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "HOME": str(self.directory)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start_pod(self) -> list[int]:
        """Run a pod with a child and a grandchild; their process ids."""
        # $$$$, since $$ is how a manifest writes one dollar.
        script = "sleep 1000 & setsid sleep 1000 & echo $$$$ $!; wait"
        self.kubectl("create", "-f", "-", given=pod("tree", shell(script)))
        found = eventually(lambda: self.kubectl("logs", "tree").split() if self.runs() else [])
        return [int(word) for word in found]

    def runs(self) -> bool:
        return "Running" in self.kubectl("get", "pod", "tree", "-o", "jsonpath={.status.phase}")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    running = Program(tmp_path / "cluster")
    try:
        running.wait()
        yield running
    finally:
        running.end()


def test_the_program_tells_where_it_is_and_ends_with_all_its_processes(program: Program) -> None:
    assert Path(program.ready["accounts"]["test/runner"]).name == "kubeconfig-test-runner"
    begun = time.monotonic()
    program.kubectl(
        "create", "-f", "-", given=pod("wrong", shell("true", image="registry.invalid/none:1"))
    )
    path = "jsonpath={.status.containerStatuses[0].state.waiting.reason}"
    eventually(lambda: program.kubectl("get", "pod", "wrong", "-o", path) == "ErrImagePull")
    assert time.monotonic() - begun < 3
    pids = program.start_pod()
    assert all(lives(pid) for pid in pids)
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(PATIENCE) == 0
    assert not any(lives(pid) for pid in pids)


def test_a_killed_program_leaves_no_pod_behind(program: Program) -> None:
    pids = program.start_pod()
    program.process.kill()
    eventually(lambda: not any(lives(pid) for pid in pids))
