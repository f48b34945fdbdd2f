"""How it is asked whether a version is healthy: as its readiness probe says, over real sockets."""

from __future__ import annotations

import copy
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme

import gitops_hook as hook
from tests.test_app_manifests import WEB, app_of, changed, fault, pod, released
from tests.test_deploy_parts import (
    OK,
    SLOW,
    answering,
    history,
    ready_pod,
    take_back,
)

Object = dict[str, Any]
READY = {"path": "/ready", "port": "http"}
HTTP: Object = {"port": 80, "targetPort": "http", "name": "http"}
GRPC: Object = {"port": 50051, "targetPort": 9000, "name": "api", "appProtocol": "grpc"}
DNS: Object = {"port": 53, "protocol": "UDP", "name": "dns"}
HTTP_PORT: Object = {"name": "http", "containerPort": 8080}
ADMIN_PORT: Object = {"name": "admin", "containerPort": 9090}


def http(**more: Any) -> Object:
    """A readiness probe by HTTP that differs so from the usual one."""
    return {"httpGet": {**READY, **more}}


def web(probe: Object | None = None, *ports: Object, name: str = "web") -> Object:
    """A container with a readiness probe or none, and these ports or the usual one."""
    container = {"name": name, "ports": [*(ports or (HTTP_PORT,))]}
    return {**container, "readinessProbe": probe} if probe else container


def side_car(probe: Object, *ports: Object) -> Object:
    return {**web(probe, *ports, name="proxy"), "restartPolicy": "Always"}


def asked(port: int, **more: Any) -> hook.HealthCheck:
    """The question for /ready at a port."""
    return hook.HealthCheck(port=port, **{"path": "/ready", **more})


def connection(port: int) -> hook.HealthCheck:
    return hook.HealthCheck(port=port)


HOST = [{"name": "Host", "value": "shop.example.com"}, {"name": "X-Probe", "value": "a"}]
HOST_LINES = ("Host: shop.example.com", "X-Probe: a")
TCP = {"tcpSocket": {"port": 9090}}
EXEC = {"exec": {"command": ["true"]}}
EIGHTY: Object = {"port": 80, "targetPort": 8080}
ADMIN = {"path": "/healthz", "port": "admin"}
TWO = (HTTP_PORT, ADMIN_PORT)
Row = tuple[list[Object], list[Object], Object, hook.HealthCheck, hook.HealthCheck]
ROWS: dict[str, Row] = {
    # the pods' containers, the Service's ports, settings: how pods and the Service are asked
    "a probe by HTTP": ([web(http())], [HTTP], {}, asked(8080), asked(80)),
    "a port by number": ([web(http(port=8080))], [EIGHTY], {}, asked(8080), asked(80)),
    "a target that is the port": (
        [web(http(port=80), {"containerPort": 80})], [{"port": 80}], {}, asked(80), asked(80),
    ),
    "a query": (
        [web(http(path="/ready?full=1&x=%20"))], [HTTP], {},
        asked(8080, path="/ready?full=1&x=%20"), asked(80, path="/ready?full=1&x=%20"),
    ),
    "a path that must be quoted": (
        [web(http(path="up ü\r\nX: y#top"))], [HTTP], {},
        asked(8080, path="/up%20%C3%BC%0D%0AX:%20y"), asked(80, path="/up%20%C3%BC%0D%0AX:%20y"),
    ),
    "no path": (
        [web({"httpGet": {"port": "http"}})], [HTTP], {},
        asked(8080, path="/"), asked(80, path="/"),
    ),
    "HTTPS": (
        [web(http(scheme="HTTPS"))], [HTTP], {},
        asked(8080, scheme="HTTPS"), asked(80, scheme="HTTPS"),
    ),
    "headers": (
        [web(http(httpHeaders=HOST))], [HTTP], {},
        asked(8080, headers=HOST_LINES), asked(80, headers=HOST_LINES),
    ),
    "headers that would be two lines": (
        [web(http(httpHeaders=[{"name": "X", "value": "a\r\nHost: b"}, *HOST]))], [HTTP], {},
        asked(8080, headers=HOST_LINES), asked(80, headers=HOST_LINES),
    ),
    "a port of management": (
        [web({"httpGet": ADMIN}, *TWO)], [HTTP], {}, asked(9090, path="/healthz"), connection(80),
    ),
    "a port of management that the Service has, too": (
        [web({"httpGet": ADMIN}, *TWO)], [HTTP, {"port": 81, "targetPort": 9090}], {},
        asked(9090, path="/healthz"), asked(81, path="/healthz"),
    ),
    "a probe by TCP": ([web(TCP, *TWO)], [HTTP], {}, connection(8080), connection(80)),
    "a probe by a command": ([web(EXEC)], [HTTP], {}, connection(8080), connection(80)),
    "gRPC alone": (
        [web({"grpc": {"port": 8080}})], [{**GRPC, "targetPort": 8080}], {},
        connection(8080), connection(50051),
    ),
    "gRPC first, in one container with HTTP": (
        [web(http(), HTTP_PORT, {"containerPort": 9000})], [GRPC, HTTP], {}, asked(8080), asked(80),
    ),
    "gRPC first, in another container": (
        [web({"grpc": {"port": 9000}}, {"containerPort": 9000}, name="api"), web(http())],
        [GRPC, HTTP], {}, asked(8080), asked(80),
    ),
    "gRPC and metrics": (
        [web({"grpc": {"port": 9000}}, {"containerPort": 9000}, ADMIN_PORT)],
        [GRPC, {"port": 9090, "name": "metrics"}], {}, connection(9000), connection(50051),
    ),
    "gRPC first, and a path in the settings": (
        [web(None, HTTP_PORT, {"containerPort": 9000})], [GRPC, HTTP], {"path": "/ready"},
        asked(8080), asked(80),
    ),
    "metrics of another container": (
        [web(), web(http(port=9090), ADMIN_PORT, name="exporter")],
        [HTTP, {"port": 9090, "name": "metrics"}], {}, connection(8080), connection(80),
    ),
    "UDP first": ([web(http())], [DNS, HTTP], {}, asked(8080), asked(80)),
    "a probe only on a side-car": (
        [web(), side_car(http(port=15021), {"containerPort": 15021})], [HTTP], {},
        connection(8080), connection(80),
    ),
    "a side-car that serves": (
        [web(None, {"containerPort": 3000}), side_car(http(), HTTP_PORT)], [HTTP], {},
        asked(8080), asked(80),
    ),
    "a number that no container declares": (
        [web(None, {"containerPort": 1}), web(http(port=8080), {"containerPort": 2}, name="b")],
        [EIGHTY], {}, asked(8080), asked(80),
    ),
    "a number that no container declares, and no probe": (
        [{"name": "web"}], [EIGHTY], {}, connection(8080), connection(80),
    ),
    "no probe": ([web()], [HTTP], {}, connection(8080), connection(80)),
    "no probe, but a path in the settings": (
        [web()], [HTTP], {"path": "/ready"}, asked(8080), asked(80),
    ),
    "a probe by TCP, and a path in the settings": (
        [web(TCP, *TWO)], [HTTP], {"path": "/ready"}, asked(8080), asked(80),
    ),
    "another path in the settings": (
        [web(http(scheme="HTTPS", httpHeaders=HOST))], [HTTP], {"path": "/up"},
        asked(8080, path="/up", scheme="HTTPS", headers=HOST_LINES),
        asked(80, path="/up", scheme="HTTPS", headers=HOST_LINES),
    ),
    "another port in the settings, by name": (
        [web(http(), *TWO)], [HTTP], {"port": "admin"}, asked(9090), connection(80),
    ),
    "another port in the settings, by number": (
        [web(EXEC)], [HTTP], {"port": 9000}, connection(9000), connection(80),
    ),
    "another scheme in the settings": (
        [web(http(scheme="HTTPS"))], [HTTP], {"scheme": "http"}, asked(8080), asked(80),
    ),
    "other headers in the settings": (
        [web(http(httpHeaders=HOST))], [HTTP], {"headers": {"Host": "other"}},
        asked(8080, headers=("Host: other",)), asked(80, headers=("Host: other",)),
    ),
}  # fmt: skip


def settings_of(**health: Any) -> hook.Health:
    return app_of(deploy={"health": health}).deploy.health


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_pods_and_their_service_are_asked_as_the_probe_and_the_settings_say(row: Row) -> None:
    containers, ports, settings, of_pods, of_service = row
    inits = [c for c in containers if "restartPolicy" in c]
    spec = {"containers": [c for c in containers if c not in inits], "initContainers": inits}
    before = copy.deepcopy(spec)
    checks = hook.release_checks(settings_of(**settings), spec, ports)
    assert checks == hook.ReleaseChecks(of_pods, of_service)
    assert spec == before


def test_what_is_asked_follows_from_a_recorded_release_alone() -> None:
    release = released(changed(f"{WEB}.readinessProbe", http(httpHeaders=HOST)))
    recorded = hook.Release.from_configmap(release.configmap("shop"))
    checks = recorded.checks(settings_of())
    assert checks.pods == asked(8080, headers=HOST_LINES)
    assert checks.service == asked(80, headers=HOST_LINES)


def test_pods_without_an_address_are_not_asked() -> None:
    pods = [{"status": {"podIP": "10.0.0.1"}}, {"status": {}}, {"status": {"podIP": "fd00::1"}}]
    hosts = [check.host for check in hook.at_pods(asked(80), pods)]
    assert hosts == ["10.0.0.1", "fd00::1"]


# What rendering adds and refuses.


def test_a_probe_is_added_only_where_the_settings_name_a_path() -> None:
    assert "readinessProbe" not in pod(released())["containers"][0]
    health = {"path": "/up", "port": 8080, "scheme": "https", "headers": {"Host": "shop"}}
    probe = pod(released(deploy={"health": health}))["containers"][0]["readinessProbe"]
    headers = [{"name": "Host", "value": "shop"}]
    expected = {"path": "/up", "port": 8080, "scheme": "HTTPS", "httpHeaders": headers}
    assert probe["httpGet"] == expected


def test_a_probe_of_a_side_car_is_none_of_the_container_that_serves() -> None:
    items = changed("Deployment.spec.template.spec.initContainers", [side_car(EXEC, ADMIN_PORT)])
    items[0]["spec"]["template"]["spec"]["initContainers"][0]["image"] = "proxy:1"
    (container,) = pod(released(items, deploy={"health": {"path": "/up"}}))["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/up"


@pytest.mark.parametrize(
    ("probe", "said"),
    {
        "a line break in a value": (
            http(httpHeaders=[{"name": "X", "value": "a\r\nHost: b"}]),
            "has the header 'X', which cannot be sent. Write its value on one line.",
        ),
        "a line break in a name": (
            http(httpHeaders=[{"name": "X\r\nHost", "value": "b"}]),
            r"has the header 'X\r\nHost', which cannot be sent.",
        ),
        "half a character": (
            http(httpHeaders=[{"name": "X", "value": "\ud800"}]),
            "has the header 'X', which cannot be sent.",
        ),
        "long headers": (
            http(httpHeaders=[{"name": "X", "value": "x" * 9000}]),
            "has more than 8000 characters. Shorten it.",
        ),
        "many headers": (
            http(httpHeaders=[{"name": "X", "value": "x"}] * 1000),
            "has more than 8000 characters. Shorten it.",
        ),
        "a long path": (http(path="/" + "x" * 9000), "has more than 8000 characters. Shorten it."),
        "an unknown port": (
            http(port="admin"),
            "asks port 'admin', which the container does not have. Name the port there.",
        ),
    }.values(),
)
def test_a_probe_that_cannot_be_asked_is_refused(probe: Object, said: str) -> None:
    reason, detail = fault(lambda: released(changed(f"{WEB}.readinessProbe", probe)))
    assert reason is hook.Reason.MANIFEST_INVALID
    assert f"The readinessProbe of container web {said}" in detail


def test_a_port_in_the_settings_that_no_pod_has_is_refused() -> None:
    reason, detail = fault(lambda: released(deploy={"health": {"port": "admin"}}))
    assert reason is hook.Reason.MANIFEST_REFUSED
    assert "deploy.health.port 'admin' is no port of the pods." in detail


def test_a_service_without_a_tcp_port_is_refused() -> None:
    items = changed("Service.spec.ports", [DNS])
    assert "no TCP port" in fault(lambda: released(items))[1]


def test_plan_warns_of_pods_of_which_nothing_tells_that_they_are_ready() -> None:
    warning = hook.probe_warning(settings_of(), released())
    assert warning.startswith("\n  warning: no readiness probe: container web counts as ready")
    probed = released(changed(f"{WEB}.readinessProbe", EXEC))
    assert hook.probe_warning(settings_of(), probed) == ""
    added = released(deploy={"health": {"path": "/up"}})
    assert hook.probe_warning(settings_of(path="/up"), added) == ""


# What is sent.


@contextmanager
def listening(context: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers 200 to each request; its port, and the requests."""
    requests: list[bytes] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                plain, _ = listener.accept()
                with suppress(OSError):
                    near = context.wrap_socket(plain, server_side=True) if context else plain
                    with near:
                        requests.append(near.recv(65536))
                        near.sendall(OK + b"\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1], requests
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def here(port: int, **more: Any) -> hook.HealthCheck:
    return asked(port, host="127.0.0.1", **more)


def test_a_request_has_our_headers_and_those_of_the_app_in_their_place() -> None:
    lines = ("host: shop.example.com", "User-Agent: kube", "X-Probe: ü", "X-Probe: b")
    with listening() as (port, requests):
        assert hook.health_refusal(here(port)) is None
        assert hook.health_refusal(here(port, headers=lines)) is None
    mine, theirs = (request.decode().split("\r\n") for request in requests)
    agent = f"User-Agent: gitops-hook/{hook.__version__}"
    last = ["Accept: */*", "Connection: close"]
    assert mine == ["GET /ready HTTP/1.1", f"Host: 127.0.0.1:{port}", agent, *last, "", ""]
    assert theirs == ["GET /ready HTTP/1.1", *last, *lines, "", ""]


def test_the_host_of_an_ipv6_address_is_in_brackets() -> None:
    request = asked(80, host="fd00::1").request
    assert b"\r\nHost: [fd00::1]:80\r\n" in request


def test_without_a_path_a_connection_is_enough() -> None:
    with answering([]) as port:
        assert hook.health_refusal(hook.HealthCheck(host="127.0.0.1", port=port)) is None
    check = hook.HealthCheck(host="127.0.0.1", port=port)
    assert hook.health_refusal(check) == "ConnectionRefusedError"


class Dripping:
    """A connection of which each read gets one part; only its thread's own work takes time."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts = iter(parts)

    def recv(self, _: int) -> bytes:
        return next(self.parts, b"")

    def sendall(self, _: bytes) -> None: ...

    def settimeout(self, _: float) -> None: ...


def test_a_long_answer_that_drips_costs_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = OK + b"a" + b"\n\rx" * 20_000
    drops = [lines, *[b"\r"] * 5000, b"\n\r", b"\n"]

    @contextmanager
    def connected(*_: Any) -> Iterator[Any]:
        yield Dripping(drops)

    monkeypatch.setattr(hook, "connected", connected)
    began = time.thread_time()
    assert hook.health_refusal(here(1), 60.0) is None
    assert time.thread_time() - began < 0.5


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"\n\n", b"\n\r\n"], ids=repr)
def test_an_end_of_headers_that_comes_byte_by_byte_is_seen(end: bytes) -> None:
    parts = [b"HTTP/1.1 200 OK\r\na: b", *(end[at : at + 1] for at in range(len(end)))]
    with answering(parts, pause=0.05) as port:
        assert hook.health_refusal(here(port), 20.0) is None


# TLS.


@pytest.fixture(scope="module")
def encrypted() -> ssl.SSLContext:
    """A server's side of TLS, with a certificate that nobody trusts and for another host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("other.example.com").configure_cert(context)
    return context


def test_a_certificate_is_not_verified(encrypted: ssl.SSLContext) -> None:
    with listening(encrypted) as (port, requests):
        assert hook.health_refusal(here(port, scheme="HTTPS")) is None
    assert len(requests) == 1
    assert requests[0].startswith(b"GET /ready HTTP/1.1\r\n")


def test_a_plain_server_that_is_asked_for_tls_is_unhealthy() -> None:
    with answering([b"HTTP/1.1 400 Bad Request\r\n\r\n"]) as port:
        refusal = hook.health_refusal(here(port, scheme="HTTPS"), 5.0)
    assert refusal is not None
    assert refusal.startswith("SSLError: ")


def test_a_server_of_tls_that_is_asked_in_plain_is_unhealthy(encrypted: ssl.SSLContext) -> None:
    with listening(encrypted) as (port, _):
        assert hook.health_refusal(here(port)) is not None


@pytest.mark.parametrize(
    ("parts", "pause"),
    [([], 0.0), ([b"\x16\x03\x03\x40\x00", *[b"\x02"] * 100], 0.3)],
    ids=["silence", "a-byte-now-and-then"],
)
def test_a_handshake_ends_in_time_whatever_is_sent(parts: list[bytes], pause: float) -> None:
    with answering(parts, pause=pause) as port:
        began = time.monotonic()
        assert hook.health_refusal(here(port, scheme="HTTPS"), 1.0) == SLOW
        assert time.monotonic() - began < 5


def test_many_pods_that_answer_nothing_take_the_time_of_one() -> None:
    with answering([]) as port:
        began = time.monotonic()
        assert hook.refusals_of([here(port)] * 20, 1.0) == [SLOW] * 20
        assert time.monotonic() - began < 10


# Both versions of a bake.


@pytest.mark.parametrize("recorded", [True, False])
def test_pods_are_asked_as_their_release_says_whatever_was_added_to_them(
    tmp_path: Path, *, recorded: bool
) -> None:
    versions = {"old": ("127.9.2.1", OK), "new": ("127.9.3.1", b"HTTP/1.1 503 Busy\r\n")}
    pods: dict[str, list[Object]] = {}
    with ExitStack() as servers:
        port = proxy_port = 0
        for name, (host, answer) in versions.items():
            port = servers.enter_context(answering([answer + b"\r\n"], host, port))
            proxy_port = servers.enter_context(answering([OK + b"\r\n"], host, proxy_port))
            pods[name] = [ready_pod(name)]
            pods[name][0]["status"]["podIP"] = host
            proxy = web(http(port=proxy_port), {"containerPort": proxy_port}, name="proxy")
            pods[name][0]["spec"]["containers"].append(proxy)
        made = history(tmp_path, pods["old"], pods["new"], port=port)
        if not recorded:
            (tmp_path / "record").write_text("")
        verdict = take_back(made.steady, None)
    # what is left without a record is the word of the container that has a probe
    assert verdict == ("UnhealthyAfterSwitch" if recorded else "")


# A bake whose Service does not lead to the port of management.


def test_a_bake_asks_the_pods_in_turn_where_the_service_leads_to_another_port() -> None:
    with answering([b"HTTP/1.1 503 Busy\r\n\r\n"]) as sick, answering([OK + b"\r\n"]) as well:
        through = hook.HealthCheck(host="127.0.0.1", port=well)
        look = hook.BakeLook(checks=(here(sick), here(well)), preview=through)
        answers = [hook.refusal_of_a_pod(look, asked) for asked in range(4)]
        assert answers == ["status 503", None] * 2
        led = replace(look, preview=here(well))
        assert hook.refusal_of_a_pod(led, 0) is None, "the Service leads to it"
