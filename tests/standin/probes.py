"""Readiness, liveness and startup probes of containers."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
# The kubelet looks again at once when a container has just started.
SECOND_LOOK = 0.15
USER_AGENT = "kube-probe/1.36"


@dataclass(frozen=True)
class Target:
    """What is probed: an address, the container's named ports, and how to execute in it."""

    address: str
    ports: dict[str, int]
    execute: Callable[[list[str], float], tuple[int, str]]

    def port(self, value: int | str) -> int:
        """A port given by number or by name."""
        if isinstance(value, int) or value.isdigit():
            return int(value)
        return self.ports.get(value, 0)


class Probe(threading.Thread):
    """Looks at one container in its rhythm and tells when the verdict changes.

    `verdict(True/False)` is called when a threshold is reached; `unhealthy(text)` at each failure.
    """

    def __init__(
        self,
        kind: str,
        spec: Object,
        target: Target,
        *,
        speed: float,
        verdict: Callable[[str, bool], None],
        unhealthy: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"{kind}-probe", daemon=True)
        self.kind = kind
        self.spec = spec
        self.target = target
        self._speed = speed
        self._verdict = verdict
        self._unhealthy = unhealthy
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Look no more."""
        self._stop_asked.set()

    def run(self) -> None:
        """Look until told to stop."""
        period = self.spec.get("periodSeconds", 10) / self._speed
        wait = self.spec.get("initialDelaySeconds", 0) / self._speed
        good = bad = looks = 0
        current: bool | None = None
        while not self._stop_asked.wait(wait):
            fine, text = look(self.spec, self.target)
            if self._stop_asked.is_set():
                return
            looks += 1
            good, bad = (good + 1, 0) if fine else (0, bad + 1)
            if not fine:
                self._unhealthy(f"{self.kind.capitalize()} probe failed: {text}")
            if fine and good >= self.spec.get("successThreshold", 1) and current is not True:
                current = True
                self._verdict(self.kind, True)
            elif bad >= self.spec.get("failureThreshold", 3) and current is not False:
                current = False
                self._verdict(self.kind, False)
            early = self.kind == "readiness" and looks == 1 and not fine
            wait = min(period, SECOND_LOOK) if early else period


def look(spec: Object, target: Target) -> tuple[bool, str]:
    """One probe: whether it succeeded, and the text of the failure."""
    timeout = float(spec.get("timeoutSeconds", 1))
    if "httpGet" in spec:
        return _http(spec["httpGet"], target, timeout)
    if "tcpSocket" in spec or "grpc" in spec:
        # gRPC is not spoken here: who listens is taken to serve.
        return _tcp(spec.get("tcpSocket") or spec["grpc"], target, timeout)
    if "exec" in spec:
        code, output = target.execute(spec["exec"]["command"], timeout)
        return code == 0, output
    return False, "this kind of probe is not modelled"


def _http(spec: Object, target: Target, timeout: float) -> tuple[bool, str]:
    host, port = spec.get("host") or target.address, target.port(spec["port"])
    scheme = str(spec.get("scheme", "HTTP")).lower()
    path = spec.get("path") or "/"
    url = f"{scheme}://{host}:{port}{path}"
    headers = {"User-Agent": USER_AGENT, "Accept": "*/*", "Connection": "close"}
    headers |= {item["name"]: item["value"] for item in spec.get("httpHeaders") or []}
    connection: http.client.HTTPConnection
    if scheme == "https":
        # The kubelet does not verify certificates of probed pods either.
        unverified = ssl._create_unverified_context()  # noqa: S323 - as a kubelet does
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=unverified)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", path, headers=headers)
        status = connection.getresponse().status
    except TimeoutError:
        late = "context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        return False, f'Get "{url}": {late}'
    except (OSError, http.client.HTTPException) as error:
        return False, f'Get "{url}": {_reason(error, host, port)}'
    finally:
        connection.close()
    if 200 <= status < 400:
        return True, ""
    return False, f"HTTP probe failed with statuscode: {status}"


def _tcp(spec: Object, target: Target, timeout: float) -> tuple[bool, str]:
    host, port = spec.get("host") or target.address, target.port(spec["port"])
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True, ""
    except TimeoutError:
        return False, f"dial tcp {host}:{port}: i/o timeout"
    except OSError as error:
        return False, _reason(error, host, port)


def _reason(error: Exception, host: str, port: int) -> str:
    """The error in the words of the kubelet."""
    if isinstance(error, ConnectionRefusedError):
        return f"dial tcp {host}:{port}: connect: connection refused"
    if isinstance(error, ConnectionResetError):
        return f"read tcp {host}:{port}: read: connection reset by peer"
    if isinstance(error, http.client.BadStatusLine):
        return "EOF"
    return str(error)
