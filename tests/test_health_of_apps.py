"""Applications whose health is asked in other ways than by HTTP at /ready, with the real daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import trustme

from tests.fleet import Fleet, Member, fleet
from tests.world import Object, eventually

# Answers as its variable MODES says, on 8080 and on 9090. Whom it takes for the kubelet it always
# tells that it is ready, so that only the daemon's own question can see it sick.
SERVER = """
import http.server, os, signal, ssl, sys, threading
MODES, VERSION = os.environ["MODES"], os.environ["VERSION"]
sick = threading.Event()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/turn-sick":
            sick.set()
        if "deaf" in MODES:
            return self.wfile.write(b"this is no HTTP")
        kubelet = "kube-probe" in self.headers.get("User-Agent", "")
        asked = (self.server.server_port, self.path)
        ready = asked == (8080, MODES if "/" in MODES else "/")
        if "managed" in MODES:
            ready = asked == (9090, "/healthz")
        if "host" in MODES:
            ready = self.headers.get_all("Host") == ["shop.example.com"]
        ready = ready and (kubelet or not sick.is_set())
        self.send_response(200 if ready else 400)
        self.end_headers()

    def log_message(self, *args):
        pass

def serve(port):
    server = http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler)
    if "encrypted" in MODES:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain("certificate.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()

signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
threading.Thread(target=serve, args=(9090,), daemon=True).start()
serve(8080)
"""
APPS: dict[str, Object] = {
    name: {"health": {"successes": 2, "timeout": "3s"}, "bake": "2s"}
    for name in ("host", "managed", "encrypted", "tcp", "exec", "grpc", "none", "paths")
}
for name in ("managed", "none", "paths"):
    APPS[name]["bake"] = "5s"
APPS["overridden"] = {"health": {"path": "/healthz", "port": 9090, "successes": 2, "timeout": "3s"}}
ADMIN = {"name": "admin", "containerPort": 9090}
PATIENCE = 240.0  # seconds: all of them begin at the same time


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, none of them deployed yet."""
    directory = tmp_path_factory.mktemp("health")
    with fleet(directory, APPS) as made:
        source = directory / "probed"
        (source / "app").mkdir(parents=True)
        (source / "app" / "server.py").write_text(SERVER)
        certificate = trustme.CA().issue_cert("other.example.com").private_key_and_cert_chain_pem
        certificate.write_to_path(source / "app" / "certificate.pem")
        command = ["python", "server.py"]
        name = "registry.example.com/demo/probed"
        digest = made.cluster.images.add(f"{name}:1", source, cmd=command, workdir="/app")
        made.image = f"{name}@{digest}"
        yield made


def probed(probe: Object | None, *ports: Object, **service_port: Any) -> Callable[[Any], None]:
    """Return a change that gives an app this readiness probe, and its pods and Service these ports.

    The probe comes every second.
    """

    def change(objects: dict[str, Object]) -> None:
        container = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]
        container["readinessProbe"] = {**(probe or {}), "periodSeconds": 1, "failureThreshold": 20}
        container["ports"] += ports
        objects["Service"]["spec"]["ports"][0] |= service_port
        if probe is None:
            del container["readinessProbe"]

    return change


HEADERS = [{"name": "Host", "value": "shop.example.com"}]
MANAGED = probed({"httpGet": {"path": "/healthz", "port": "admin"}}, ADMIN)
CHANGES = {
    "host": probed({"httpGet": {"path": "/", "port": "http", "httpHeaders": HEADERS}}),
    "managed": MANAGED,
    "overridden": probed({"tcpSocket": {"port": "admin"}}, ADMIN),
    "encrypted": probed({"httpGet": {"path": "/", "port": "http", "scheme": "HTTPS"}}),
    "tcp": probed({"tcpSocket": {"port": "http"}}),
    "exec": probed({"exec": {"command": ["test", "-e", "server.py"]}}),
    "grpc": probed({"grpc": {"port": 8080}}, name="grpc", port=50051, appProtocol="grpc"),
    "none": probed(None),
}
MODES = dict.fromkeys(("tcp", "exec", "grpc", "none"), "deaf")
MODES |= {"host": "host", "managed": "managed", "overridden": "managed", "encrypted": "encrypted"}


@pytest.fixture(scope="module")
def first(apps: Fleet) -> dict[str, str]:
    """The first version of each, on its way; their runs."""
    return {
        name: apps[name].go("v1", modes=MODES[name], change=change)
        for name, change in CHANGES.items()
    }


@pytest.mark.parametrize("name", list(CHANGES))
def test_an_app_goes_live_that_is_ready_as_its_own_probe_says(
    apps: Fleet, first: dict[str, str], name: str
) -> None:
    ended = apps.ended(first[name], PATIENCE)
    assert (ended["outcome"], ended.get("detail", "")) == ("deployed", "")


def test_no_probe_is_added_where_the_app_has_none(apps: Fleet, first: dict[str, str]) -> None:
    apps.ended(first["none"], PATIENCE)
    assert not [p for p in apps["none"].pods() if "readinessProbe" in p["spec"]["containers"][0]]


def test_plan_warns_of_an_app_without_a_probe(apps: Fleet, first: dict[str, str]) -> None:
    apps.ended(first["none"], PATIENCE)
    warning = "warning: no readiness probe: container web counts as ready"
    assert warning in apps.command("plan", "none").stdout
    assert warning not in apps.command("plan", "exec").stdout


def tell(app: Member, version: str, port: int, path: str) -> None:
    """Send a request to the pods of a version."""
    for pod in app.pods(version):
        requests.get(f"http://{pod['status']['podIP']}:{port}{path}", timeout=5)


def deployed_first(apps: Fleet, first: dict[str, str], name: str) -> Member:
    """Return an app once its first version is live and nothing goes on there."""
    apps.ended(first[name], PATIENCE)
    apps[name].quiet(PATIENCE)
    return apps[name]


def test_an_app_whose_port_of_management_turns_sick_is_switched_back(
    apps: Fleet, first: dict[str, str]
) -> None:
    managed = deployed_first(apps, first, "managed")
    run = managed.go("v2", modes="managed", change=MANAGED)
    managed.switched(run, PATIENCE)
    tell(managed, "v2", 9090, "/turn-sick")
    ended = apps.ended(run, PATIENCE)
    assert (ended["outcome"], ended["reason"]) == ("switched-back", "UnhealthyAfterSwitch")
    assert "/healthz failed 3 times in a row: status 400" in ended["detail"]


def test_an_app_that_does_not_listen_where_its_service_leads_fails_its_smoke_test(
    apps: Fleet, first: dict[str, str]
) -> None:
    silent = deployed_first(apps, first, "exec")
    elsewhere = probed({"exec": {"command": ["true"]}}, targetPort=7070)
    ended = apps.ended(silent.go("v2", modes="deaf", change=elsewhere), PATIENCE)
    assert (ended["outcome"], ended["reason"]) == ("failed", "SmokeFailed")
    assert ended["detail"] == "port 7070: ConnectionRefusedError"


def test_each_version_is_asked_as_its_own_probe_says(apps: Fleet) -> None:
    paths = apps["paths"]
    for version, path in (("v1", "/one"), ("v2", "/two")):
        change = probed({"httpGet": {"path": path, "port": "http"}})
        run = paths.go(version, modes=path, change=change)
        if version == "v1":
            assert apps.ended(run, PATIENCE)["outcome"] == "deployed"
            paths.quiet(PATIENCE)
    paths.switched(run, PATIENCE)
    tell(paths, "v2", 8080, "/turn-sick")
    ended = apps.ended(run, PATIENCE)
    assert (ended["outcome"], ended["reason"]) == ("switched-back", "UnhealthyAfterSwitch")
    assert "/two failed 3 times in a row" in ended["detail"]
    eventually(lambda: paths.selector["version"] == "blue", 10, "the version before is live")


def test_a_version_whose_preview_service_is_deleted_in_its_bake_is_confirmed_all_the_same(
    apps: Fleet, first: dict[str, str]
) -> None:
    without = deployed_first(apps, first, "none")
    run = without.go("v2", modes="deaf", change=CHANGES["none"])
    with apps.held("list", "endpointslices"):  # what the bake asks for next
        apps.kubectl("delete", "-n", without.namespace, "service", "none-preview")
    assert apps.ended(run, PATIENCE)["outcome"] == "deployed"
    preview = apps.kubectl("get", "-n", without.namespace, "service", "none-preview", "-o", "name")
    assert preview.out.strip() == "service/none-preview"
