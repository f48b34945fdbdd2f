"""A small world for tests: a stand-in cluster, a git repository, the real daemon, a signed push.

Everything lies in one temporary directory; what is started here is ended here.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.measuring import MEASURING
from tests.standin.cluster import Cluster
from tests.starting import PROGRAM, argv_of, finding
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TOKEN = b"whsec_" + base64.b64encode(b"t" * 32)
Object = dict[str, Any]

# The sample application: each world puts VERSION and MODES before it.
SERVER = """
import http.server, json, os, signal, sys, threading, time
if "crash-at-start" in MODES:
    print("cannot log in with password=hunter2", flush=True)
    sys.exit(7)
sick_from = [0.0 if "never-ready" in MODES else float("inf")]
bad, stopping, slow, unready = (threading.Event() for _ in range(4))
waiting, refused = ["smoke-waits" in MODES], []

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/turn-sick":
            sick_from[0] = 0.0
        if self.path == "/turn-well":
            sick_from[0], waiting[0] = float("inf"), False
        if self.path == "/turn-slow":
            slow.set()
        if self.path == "/turn-unready":
            unready.set()
        if self.path == "/turn-bad":
            bad.set()
        if self.path == "/" and "sick-later" in MODES:
            sick_from[0] = min(sick_from[0], time.monotonic() + 1.0)
        if self.path == "/exit" or (self.path == "/" and "crash-later" in MODES):
            threading.Timer(0.05 if self.path == "/exit" else 0.5, os._exit, (3,)).start()
        kubelet = "kube-probe" in self.headers.get("User-Agent", "")
        sick = time.monotonic() > sick_from[0] or ("smoke-fails" in MODES and not kubelet)
        sick = sick or (unready.is_set() if kubelet else waiting[0])
        if self.path == "/ready" and slow.is_set() and not kubelet:
            return self.drip()
        if self.path == "/ready" and sick and not kubelet:
            refused.append(1)
        body = {"version": VERSION, "greeting": os.environ.get("GREETING", "")}
        body = json.dumps({**body, "refused": len(refused)}).encode()
        self.send_response(503 if bad.is_set() or (sick and self.path == "/ready") else 200)
        self.send_header("Content-Length", str(len(body)))
        if stopping.is_set():
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def drip(self):
        self.close_connection = True
        for byte in b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nX-Slow: " + b"x" * 60000:
            self.wfile.write(bytes([byte]))
            time.sleep(0.7)

    def log_message(self, *args):
        pass

def leave(*_):
    stopping.set()
    threading.Timer(2.0 if "patient" in MODES else 0.2, os._exit, (0,)).start()

signal.signal(signal.SIGTERM, leave)
port = 9090 if "other-port" in MODES else 8080
server = http.server.ThreadingHTTPServer((os.environ.get("POD_IP", "0.0.0.0"), port), Handler)
server.daemon_threads = True
print("listening as", VERSION, flush=True)
server.serve_forever()
"""
APP = f"VERSION, MODES = (open(name).read().strip() for name in ('version', 'modes')){SERVER}"

DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "shop", "labels": {"app": "shop"}},
    "spec": {
        "replicas": 2,
        "minReadySeconds": 0,
        "selector": {"matchLabels": {"app": "shop"}},
        "template": {
            "metadata": {"labels": {"app": "shop"}},
            "spec": {
                "terminationGracePeriodSeconds": 2,
                "containers": [
                    {
                        "name": "web",
                        "image": "registry.example.com/demo/shop",
                        "ports": [{"name": "http", "containerPort": 8080}],
                        "envFrom": [{"configMapRef": {"name": "shop-settings"}}],
                        "readinessProbe": {
                            "httpGet": {"path": "/ready", "port": "http"},
                            "periodSeconds": 1,
                            "failureThreshold": 10,
                        },
                        "lifecycle": {"preStop": {"sleep": {"seconds": 1}}},
                    }
                ],
            },
        },
    },
}
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "shop"},
    "spec": {
        "selector": {"app": "shop"},
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
    },
}
DOCKERFILE = """FROM python:3.12-slim
WORKDIR /app
COPY app.py version modes /app/
CMD ["python", "app.py"]
"""


def session_members(leader: int) -> list[int]:
    """Return the processes of a session, its leader first: what one start_new_session began."""
    found = [leader]
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # the name in brackets may hold spaces: state, parent, group and session follow it
            session = int(entry.read_text().rpartition(")")[2].split()[3])
            if session == leader and int(entry.parent.name) != leader:
                found.append(int(entry.parent.name))
    return found


class Repository:
    """A git repository with the sample application, pushed to like an owner would."""

    def __init__(self, directory: Path) -> None:
        self.bare, self.work = directory / "shop.git", directory / "shop"
        self.git("init", "-q", "--bare", "-b", "main", str(self.bare), where=directory)
        self.git("clone", "-q", str(self.bare), str(self.work), where=directory)
        self.git("checkout", "-q", "-B", "main")

    def git(self, *args: str, where: Path | None = None) -> str:
        """Run git as the application's owner."""
        environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            **{
                f"GIT_{who}_{what}": "owner@example.com"
                for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")
            },
        }
        argv = ["git", "-C", str(where or self.work), *args]
        done = subprocess.run(argv, check=True, capture_output=True, text=True, env=environ)
        return done.stdout.strip()

    def write(self, files: dict[str, str]) -> None:
        """Put files into the work tree."""
        for name, content in files.items():
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    def release(
        self,
        version: str,
        *,
        modes: str = "",
        branch: str = "main",
        tests: bool = True,
        **more: str,
    ) -> str:
        """Commit and push a version of the sample application; return its commit."""
        objects = [DEPLOYMENT, SERVICE, settings_map(version)]
        files = {
            "app.py": APP,
            "version": version,
            "modes": modes,
            "Dockerfile": DOCKERFILE,
            "tests/test_app.py": f"def test_it():\n    assert {tests}\n",
            "deploy/app.yaml": yaml.safe_dump_all(objects),
            **{name.replace("__", "/"): content for name, content in more.items()},
        }
        self.git("checkout", "-q", "-B", branch)
        self.write(files)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", f"Version {version}")
        self.git("push", "-q", "-f", "origin", branch)
        return self.git("rev-parse", "HEAD")


def settings_map(version: str) -> Object:
    """The sample application's settings: each version has its own."""
    data = {"GREETING": f"hello from {version}"}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "shop-settings"},
        "data": data,
    }


def daemon_config(repository: Path, **deploy: Any) -> Object:
    """A configuration with short times."""
    settings = {
        "bake": "3s",
        "drain": "1s",
        "rollout_timeout": "30s",
        "health": {"path": "/ready", "successes": 2},
    }
    return {
        "apps": [
            {
                "name": "shop",
                "repository": str(repository),
                "test": {
                    "command": "python -m pytest -q -p no:cacheprovider --junitxml=$JUNIT_XML"
                },
                "build": {"image": "registry.example.com/demo/shop"},
                "deploy": {**settings, **deploy},
            }
        ],
        "catch_up": "10m",
    }


class World:
    """One directory with a cluster that has our manifests, a repository and a daemon."""

    def __init__(
        self, directory: Path, cluster: Cluster, config: Callable[[Path], Object] = daemon_config
    ) -> None:
        self.directory, self.cluster = directory, cluster
        self.repository = Repository(directory)
        self.config = config(self.repository.bare)
        self.secrets, self.spool = directory / "secrets", directory / "spool"
        self.secrets.mkdir()
        (self.secrets / "webhook-signing-tokens").write_bytes(TOKEN + b"\n")
        self.log = directory / "daemon.log"
        self._lines: list[tuple[int, Object]] = []
        self._read, self._reading = 0, threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.program = PROGRAM
        self.url = self.admin_url = ""
        self.path = f"{BIN}:{os.environ['PATH']}"  # of the daemon

    @property
    def environ(self) -> dict[str, str]:
        """The environment of the daemon and of commands."""
        config = self.directory / "config.yaml"
        config.write_text(yaml.safe_dump(self.config))
        home = self.directory / "home"
        home.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if k in ("LANG", "LD_LIBRARY_PATH")}
        return {
            **kept,
            **finding(self.program),
            "PATH": self.path,
            "HOME": str(home),
            "KUBECONFIG": str(self.cluster.kubeconfig("orchestration/orchestration-sa")),
            "GITOPS_HOOK_CONFIG": str(config),
            "GITOPS_HOOK_SECRETS": str(self.secrets),
            "GITOPS_HOOK_SPOOL": str(self.spool),
            "GITOPS_HOOK_LISTEN": "127.0.0.1:0",
            "GITOPS_HOOK_ADMIN_LISTEN": "127.0.0.1:0",
        }

    def start(self, seconds: float = 20.0) -> None:
        """Start the daemon and wait until it serves."""
        offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            argv = argv_of("serve", program=self.program)
            self.process = subprocess.Popen(
                argv, env=self.environ, stderr=log, start_new_session=True
            )

        def serving() -> Object | None:
            if self.process is None or self.process.poll() is not None:
                raise AssertionError(f"the daemon ended: {self.log.read_text()[offset:][-2000:]}")
            return next((e for e in self.logged(offset) if e["msg"] == "serving"), None)

        line = eventually(serving, seconds, "the daemon serves")
        self.url = f"http://127.0.0.1:{line['port']}"
        self.admin_url = f"http://127.0.0.1:{line['admin_port']}"

    def logged(self, offset: int = 0) -> list[Object]:
        """The daemon's log lines so far, from a byte on."""
        with self._reading:
            if self.log.exists():
                with self.log.open("rb") as log:
                    log.seek(self._read)
                    self._take(log.read())
            return [line for at, line in self._lines if at >= offset]

    def _take(self, text: bytes) -> None:
        """Parse what is new in the log; the last line may be half written."""
        for line in text.splitlines(keepends=True):
            if line.endswith(b"\n"):
                try:
                    self._lines.append((self._read, json.loads(line)))
                except ValueError as wrong:
                    raise AssertionError(f"not only JSON lines: {text[-3000:]!r}") from wrong
                self._read += len(line)

    def signal(self, number: int) -> None:
        """Send a signal to the daemon and its kubectl processes, as to a whole container."""
        for pid in session_members(self.process.pid) if self.process else ():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill the daemon and its kubectl processes at once, as a lost node would."""
        if self.process:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self, seconds: float = 50.0) -> int:
        """End the daemon as a kubelet would; return its exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def end(self) -> None:
        """End the daemon because its tests are over; a measured one has time to say what it ran."""
        with suppress(subprocess.TimeoutExpired):
            if MEASURING:
                self.stop(15.0)
        self.kill()

    def command(
        self, *args: str, timeout: float = 60.0, administrator: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the program's commands, with the daemon's account unless another is asked."""
        argv = argv_of(*args, program=self.program)
        environ = self.environ
        if administrator:
            environ = {**environ, "KUBECONFIG": str(self.cluster.kubeconfig())}
        return subprocess.run(
            argv, env=environ, capture_output=True, text=True, timeout=timeout, check=False
        )

    def push(self, commit: str, ref: str = "main") -> str:
        """Announce a commit by a signed delivery; return the first run's id."""
        done = self.command(
            "push", "--app", "shop", "--ref", ref, "--sha", commit, "--url", f"{self.url}/webhook"
        )
        assert done.returncode == 0, done
        return str(json.loads(done.stdout.partition(" ")[2])["runs"][0])

    def status(self) -> Object:
        """What `status` says."""
        done = self.command("status", "--output", "json")
        assert done.returncode == 0, done
        found: Object = json.loads(done.stdout)
        return found

    def ended(self, run: str, seconds: float = 90.0) -> Object:
        """Wait for the log line that a run ended; return it."""

        def line() -> Object | None:
            found = [e for e in self.logged() if e["msg"] == "run ended" and e.get("run") == run]
            return found[-1] if found else None

        try:
            return dict(eventually(line, seconds, f"{run} ends"))
        except AssertionError as late:
            raise AssertionError(f"{late}; the log:\n{self.log.read_text()[-6000:]}") from None

    def deployed(self, version: str, **release: Any) -> Object:
        """Release, push and wait for the end."""
        return self.ended(self.push(self.repository.release(version, **release)))

    def service(self, environment: str = "production", name: str = "shop") -> Object | None:
        """A Service as it is in the cluster."""
        return self.cluster.store.find("services", environment, name)

    def answer(self, environment: str = "production", path: str = "/") -> Object:
        """Ask the application through its live Service."""
        service = self.service(environment)
        assert service is not None
        answer = requests.get(f"http://{service['spec']['clusterIP']}:80{path}", timeout=5)
        return {"status": answer.status_code, **answer.json()}


def install(cluster: Cluster, manifests: Path = ROOT / "manifests") -> None:
    """Put the shipped manifests, as `make apply` would, and the daemon's image into a cluster."""
    kubectl = ["kubectl", "kustomize", str(manifests)]
    environ = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(cluster.directory)}
    rendered = subprocess.run(
        kubectl, check=True, capture_output=True, text=True, env=environ
    ).stdout
    kept = [o for o in yaml.safe_load_all(rendered) if o["kind"] not in ("Deployment", "Ingress")]
    cluster.load(*kept)
    cluster.images.add("gitops-hook:dev", entrypoint=argv_of(), env=finding())


@contextmanager
def world(
    directory: Path,
    config: Callable[[Path], Object] = daemon_config,
    *,
    speed: float = 1.0,
    manifests: Path = ROOT / "manifests",
) -> Iterator[World]:
    """A world with everything but a started daemon; ended with all its processes."""
    with Cluster(directory / "cluster", speed=speed) as cluster:
        install(cluster, manifests)
        made = World(directory, cluster, config)
        try:
            yield made
        finally:
            made.end()
