"""Where the demo takes place: a stand-in cluster with the shipped manifests, and the daemon."""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.demo.processes import PRODUCT, ROOT, Broken, Program, environment, run
from tests.standin.kubectl import Kubectl

Object = dict[str, Any]
APP = "shop"
ACCOUNT = "orchestration/orchestration-sa"
HOOK_IMAGE = "gitops-hook:dev"
STORE_IMAGE = "registry.example.com/demo/store:1"
STORE = Path(__file__).with_name("app") / "store.py"
BAKE, DRAIN = 8, 3  # seconds
START_SECONDS = 90.0


def configuration(repository: Path) -> Object:
    """What the daemon is told; the durations are those of a demonstration."""
    shop = {
        "name": APP,
        "repository": str(repository),
        # The virtual environment has pytest; without an index nothing is looked up elsewhere.
        "test": {
            "command": "pip install --no-index -r requirements.txt"
            " && python -m pytest tests/ -v --junitxml=$JUNIT_XML",
            "services": [{"name": "store", "image": STORE_IMAGE, "port": 7379}],
        },
        "build": {"image": "registry.example.com/demo/shop"},
        "deploy": {
            "manifests": "deploy/overlays/{environment}",
            "health": {"path": "/ready", "successes": 2, "failures": 3},
            "rollout_timeout": "60s",
            "bake": f"{BAKE}s",
            "drain": f"{DRAIN}s",
        },
    }
    return {"apps": [shop], "images": {"hook": HOOK_IMAGE}, "catch_up": "1m"}


@dataclass(frozen=True)
class Daemon:
    """The real gitops_hook.py as a process of its own, and how to reach it."""

    program: Program
    env: dict[str, str]
    host: str

    @property
    def webhook(self) -> str:
        """Where deliveries go."""
        return f"http://{self.host}:8080/webhook"

    @property
    def page(self) -> str:
        """Where people look."""
        return f"http://{self.host}:8081/"

    @property
    def metrics(self) -> str:
        """What a Prometheus would read."""
        return f"http://{self.host}:8081/metrics"

    def push(self, sha: str) -> str:
        """Sign a delivery and post it, as GitLab would; what was answered."""
        command = ("push", "--app", APP, "--ref", "main", "--sha", sha, "--url", self.webhook)
        return run([sys.executable, str(PRODUCT), *command], ROOT, self.env).strip()

    def ready(self) -> bool:
        """Whether it takes deliveries; Broken when it has ended."""
        if not self.program.running:
            raise Broken("the daemon has ended")
        connection = http.client.HTTPConnection(self.host, 8080, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def wait_until(true: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Wait until something is true; Broken when it does not become so in time."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise Broken(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def start_cluster(directory: Path, stack: ExitStack) -> Kubectl:
    """Start a stand-in cluster, ended with the stack; kubectl as its administrator."""
    place = directory / "cluster"
    argv = [sys.executable, "-m", "tests.standin", "--directory", str(place)]
    for image, program in ((HOOK_IMAGE, PRODUCT), (STORE_IMAGE, STORE)):
        argv += ["--image", f"{image}={shlex.join([sys.executable, str(program)])}"]
    argv += ["--account", ACCOUNT]
    program = Program(argv, directory / "standin.log", environment(directory))
    stack.callback(program.stop, 10)
    wait_until(
        lambda: not program.running or program.printed.read_text().endswith("\n"),
        "the stand-in cluster is up",
    )
    if not program.running:
        raise Broken(f"the stand-in cluster did not start: {program.log.read_text()[-1000:]}")
    return Kubectl(directory, Path(json.loads(program.printed.read_text())["kubeconfig"]))


def ask(kubectl: Kubectl, *args: str, stdin: str | None = None) -> str:
    """What kubectl prints; Broken when it fails."""
    try:
        done = kubectl.run(*args, stdin=stdin)
    except subprocess.TimeoutExpired as late:
        raise Broken(f"kubectl {' '.join(args[:3])} does not end") from late
    if done.code != 0:
        raise Broken(f"kubectl {' '.join(args[:3])}: {done.err.strip()}")
    return done.out


def install(kubectl: Kubectl, directory: Path, config: Object) -> int:
    """Apply the shipped manifests through an overlay, as a user would; how many objects that are.

    The daemon's Deployment gets no pods: the daemon of the demo is a process beside the cluster.
    """
    overlay = directory / "overlay"
    overlay.mkdir()
    (overlay / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    replaced = {"name": "gitops-hook", "namespace": "orchestration", "behavior": "replace"}
    kustomization = {
        "resources": [os.path.relpath(ROOT / "manifests", overlay.resolve())],
        "replicas": [{"name": "gitops-hook", "count": 0}],
        "configMapGenerator": [
            {**replaced, "files": ["config.yaml"], "options": {"disableNameSuffixHash": True}}
        ],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    rendered = ask(kubectl, "kustomize", str(overlay))
    return len(ask(kubectl, "apply", "-f", "-", stdin=rendered).splitlines())


def start_daemon(kubectl: Kubectl, directory: Path, stack: ExitStack) -> Daemon:
    """Start the daemon as the service account that the manifests bind, ended with the stack."""
    place = directory / "secrets"
    place.mkdir(mode=0o700)
    token = base64.b64encode(secrets.token_bytes(32)).decode()
    (place / "webhook-signing-tokens").write_text(f"whsec_{token}\n", encoding="utf-8")
    # The node's address belongs to this cluster alone, so that its ports are free.
    address = "jsonpath={.items[0].status.addresses[0].address}"
    host = ask(kubectl, "get", "nodes", "-o", address)
    env = environment(
        directory,
        KUBECONFIG=f"{kubectl.environment['KUBECONFIG']}-{ACCOUNT.replace('/', '-')}",
        GITOPS_HOOK_CONFIG=str(directory / "overlay" / "config.yaml"),
        GITOPS_HOOK_SECRETS=str(place),
        GITOPS_HOOK_SPOOL=str(directory / "spool"),
        GITOPS_HOOK_LISTEN=f"{host}:8080",
        GITOPS_HOOK_ADMIN_LISTEN=f"{host}:8081",
    )
    argv = [sys.executable, str(PRODUCT), "serve"]
    daemon = Daemon(Program(argv, directory / "daemon.log", env), env, host)
    stack.callback(daemon.program.stop, 10)
    wait_until(daemon.ready, "the daemon is ready")
    return daemon
