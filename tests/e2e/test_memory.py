"""Whatever comes in, daemon and children together stay small, and the other app's pushes go on."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import requests
import yaml

from tests.fleet import Fleet, Member, app_objects
from tests.standin.cluster import Cluster
from tests.world import BIN, ROOT, TOKEN, Object, eventually, install

MOST = 400_000_000  # bytes of memory
MOST_FILES = 100_000_000  # bytes in temporary files, in which bodies wait
MIB = 2**20
KUBECTL = f"""#!/bin/bash
if [[ " $* " == *" get service/big "* ]]; then
  touch "${{0%/*}}/flooded"
  head -c 300000000 /dev/zero | tr '\\0' ' '
  exit
fi
exec {BIN}/kubectl "$@"
"""


class Forge(BaseHTTPRequestHandler):
    """A git server that knows filters, as GitLab does: what it needs is not the daemon's memory."""

    root: ClassVar[Path]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        environ = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "uploadpack.allowFilter",
            "GIT_CONFIG_VALUE_0": "true",
            "GIT_CONFIG_KEY_1": "uploadpack.allowAnySHA1InWant",
            "GIT_CONFIG_VALUE_1": "true",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
        }
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        done = subprocess.run(
            ["git", "http-backend"], input=body, capture_output=True, env=environ, check=False
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(headers.pop("Status", "200")[:3]))
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        with suppress(OSError):  # whoever has enough of it leaves
            self.wfile.write(content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class Scales(Fleet):
    """Two applications, to one of which something terrible happens."""

    forge = ""  # where big's repository is served
    tools: Path | None = None  # a folder before the others on the daemon's PATH

    @property
    def environ(self) -> dict[str, str]:
        """The environment of the daemon and of commands."""
        found = super().environ
        return {**found, "PATH": f"{self.tools}:{found['PATH']}"} if self.tools else found

    def deliver(self, repository: Path, ref: str, commit: str, **more: object) -> requests.Response:
        """Post a push as GitLab would."""
        url = self.forge if repository == self["big"].repository.bare else str(repository)
        payload = {"object_kind": "push", "ref": ref, "after": commit, **more}
        return self.signed({**payload, "project": {"git_http_url": url}})

    def signed(self, payload: Object) -> requests.Response:
        """Post a payload as GitLab would."""
        body, ident, stamp = json.dumps(payload).encode(), str(uuid.uuid4()), str(int(time.time()))
        key = base64.b64decode(TOKEN.removeprefix(b"whsec_"))
        digest = hmac.new(key, f"{ident}.{stamp}.".encode() + body, hashlib.sha256).digest()
        headers = {
            "Content-Type": "application/json",
            "webhook-id": ident,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
        }
        return requests.post(f"{self.url}/webhook", body, headers=headers, timeout=30)

    @contextmanager
    def weighed(self) -> Iterator[None]:
        """Fail if daemon and children grow too large in the block, or end."""
        assert self.process is not None
        argv = [sys.executable, "-m", "tests.e2e.weigh", str(self.process.pid)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        scales = subprocess.Popen(argv, cwd=ROOT, text=True, **pipes)
        assert scales.stdout is not None
        assert scales.stdout.readline() == "weighing\n"
        try:
            yield
        finally:
            found = json.loads(scales.communicate(timeout=30)[0])
            print(f"memory: {found['memory'] / 1e6:.0f} MB, files: {found['files'] / 1e6:.0f} MB")
        assert not found["killed"], found
        assert self.process.poll() is None, "the daemon ended"
        assert found["memory"] < MOST
        assert found["files"] < MOST_FILES

    @contextmanager
    def flooded(self, many: int, size: int) -> Iterator[None]:
        """Keep many connections to the webhook's port open while the block runs."""
        port = self.url.rpartition(":")[2]
        argv = [sys.executable, "-m", "tests.e2e.flood", port, str(many), str(size)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        flood = subprocess.Popen(argv, cwd=ROOT, text=True, **pipes)
        assert flood.stdout is not None
        try:
            assert flood.stdout.readline() == "there\n"
            yield
        finally:
            flood.communicate(timeout=30)

    def others_go_on(self) -> None:
        """Push a version of the other application, and see it live."""
        self.versions += 1
        version, other = f"v{self.versions}", self["other"]
        other.go(version)
        self.awaits(lambda: other.answer()["version"] == version, f"{version} is live")

    def awaits(self, check: Callable[[], object], what: str) -> None:
        """Wait for something that only a living daemon does."""

        def checked() -> object:
            assert self.process is not None
            assert self.process.poll() is None, "the daemon ended"
            return check()

        eventually(checked, 60, what)

    versions = 1

    def forget(self) -> None:
        """End the daemon, and let nothing be left to do."""
        self.kill()
        shutil.rmtree(self.spool)
        store = self.cluster.store
        for job in self.jobs():
            store.delete("jobs", "test", job)
        for found in store.list("configmaps", "orchestration"):
            if found["metadata"]["name"].startswith("gitops-hook-"):
                store.delete("configmaps", "orchestration", found["metadata"]["name"])
        store.update("services", "production", "big", unclaimed)
        big = self["big"]
        live = next(e for e in big.note("history") if e["selector"] == big.selector)
        bare = big.repository.bare
        big.repository.git("update-ref", "refs/heads/main", live["commit"], where=bare)


def unclaimed(service: Object) -> None:
    """Take a claim off a live Service."""
    service["metadata"]["annotations"].pop("gitops-hook/deploying", None)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scales]:
    """The cluster with both applications live, and a daemon that has ended."""
    directory = tmp_path_factory.mktemp("memory")
    apps: dict[str, Object] = {"big": {"bake": "0s", "drain": "0s"}}
    apps["other"] = {"bake": "0s", "drain": "0s"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Forge) as server, ExitStack() as stack:
        cluster = stack.enter_context(Cluster(directory / "cluster", speed=2.0))
        install(cluster)
        made = Scales(directory, cluster, apps)
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        stack.callback(server.shutdown)
        Forge.root = directory / "repositories"
        made.forge = f"http://127.0.0.1:{server.server_port}/big/shop.git"
        (entry,) = [a for a in made.config["apps"] if a["name"] == "big"]
        entry["repository"] = made.forge
        try:
            made.start()
            for run in [made[name].go("v1") for name in apps]:
                assert made.ended(run)["outcome"] == "deployed"
            made.forget()
            yield made
        finally:
            made.kill()


@pytest.fixture
def scales(cluster: Scales) -> Iterator[Scales]:
    """The same with a daemon that is fresh, and knows nothing of what was pushed before."""
    cluster.start()
    yield cluster
    cluster.forget()


def commit(app: Member, files: dict[str, str]) -> str:
    """Make a commit whose folder `deploy` has these blobs, and the branch's head of it."""

    def git(*args: str, stdin: str = "") -> str:
        argv = ["git", "-C", str(app.repository.bare), *args]
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    listed = "".join(f"100644 blob {blob}\t{name}\n" for name, blob in files.items())
    tree = git("mktree", stdin=f"040000 tree {git('mktree', stdin=listed)}\tdeploy\n")
    who = ("-c", "user.name=owner", "-c", "user.email=owner@example.com")
    made = git(*who, "commit-tree", "-p", "refs/heads/main", "-m", f"{len(files)} files", tree)
    git("update-ref", "refs/heads/main", made)
    return made


def blob(app: Member, content: bytes, times: int = 1) -> str:
    """Store a file that is a content so many times, without having all of it here."""
    argv = ["git", "-C", str(app.repository.bare), "-c", "core.compression=1"]
    store = subprocess.Popen(
        [*argv, "hash-object", "-w", "--stdin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert store.stdin is not None
    for _ in range(times):
        store.stdin.write(content)
    return store.communicate()[0].decode().strip()


def manifests(app: Member) -> str:
    """Store manifests that could be deployed."""
    objects = app_objects(app.name, "big", "", app.fleet.image)
    return blob(app, yaml.safe_dump_all([*objects.values()]).encode())


def kustomization(app: Member, **more: object) -> str:
    """Store a kustomization of those manifests and something more."""
    return blob(app, yaml.safe_dump({"resources": ["app.yaml"], **more}).encode())


def goes_through(scales: Scales, pushed: str) -> None:
    """Push a commit; while that comes to its end, however that is, the other's goes live."""
    with scales.weighed():
        run = scales["big"].push(pushed)
        scales.others_go_on()
        scales.awaits(lambda: scales.said("run ended", run=run), f"{run} ends")


pytestmark = pytest.mark.timeout(240)


def test_1700_connections(scales: Scales) -> None:
    with scales.weighed(), scales.flooded(1700, 0):
        scales.others_go_on()


def test_400_bodies_of_3_mb(scales: Scales) -> None:
    with scales.weighed(), scales.flooded(400, 3_000_000):
        scales.others_go_on()


def test_150_manifests_of_2_mib_of_comments(scales: Scales) -> None:
    big = scales["big"]
    comments = blob(big, b"# nothing\n" * 100, 2 * MIB // 1000)
    files = {f"{number:03}.yaml": comments for number in range(150)}
    goes_through(scales, commit(big, {"app.yaml": manifests(big), **files}))


def bomb() -> str:
    """Return 401 bytes of YAML whose anchors multiply to billions of values."""
    lines = ["apiVersion: v1", "kind: ConfigMap", "metadata: {name: b}", "data:"]
    inner = "x"
    for name in "abcdefghi":
        lines.append(f"  {name}: &{name} [{','.join([inner] * 9)}]")
        inner = f"*{name}"
    text = "\n".join(lines)
    return text + "\n" + "#" * (401 - len(text) - 2) + "\n"


@pytest.mark.parametrize("key", ["resources", "patches"])
def test_401_bytes_of_anchors_that_a_kustomization_names(scales: Scales, key: str) -> None:
    big = scales["big"]
    assert len(bomb()) == 401
    named = ["app.yaml", "bomb.yaml"] if key == "resources" else [{"path": "bomb.yaml"}]
    files = {"app.yaml": manifests(big), "bomb.yaml": blob(big, bomb().encode())}
    files["kustomization.yaml"] = kustomization(big, **{key: named})
    goes_through(scales, commit(big, files))


def test_a_file_of_400_mb(scales: Scales) -> None:
    big = scales["big"]
    data = blob(big, bytes(1_000_000), 400)
    goes_through(scales, commit(big, {"app.yaml": manifests(big), "data.bin": data}))


def test_a_generated_configmap_of_100_mb(scales: Scales) -> None:
    big = scales["big"]
    files = {"app.yaml": manifests(big), "data.txt": blob(big, b"text " * 200_000, 100)}
    generator = [{"name": "data", "files": ["data.txt"]}]
    files["kustomization.yaml"] = kustomization(big, configMapGenerator=generator)
    goes_through(scales, commit(big, files))


def test_91_signed_deliveries_with_an_address_of_5_mib(scales: Scales) -> None:
    with scales.weighed():
        for number in range(91):
            url = f"https://gitlab.example.com/{number}" + "x" * (5 * MIB - 1000)
            payload = {"object_kind": "push", "ref": "refs/heads/main", "after": "1" * 40}
            answer = scales.signed({**payload, "project": {"web_url": url}})
            assert answer.status_code in (200, 400)
        scales.others_go_on()


def test_records_of_100_000_brackets(cluster: Scales) -> None:
    keys = [f"{kind}-{'0' * 16}" for kind in ("ref", "rejected", "run", "live")]
    meta = {"name": "gitops-hook-big", "namespace": "orchestration"}
    data = dict.fromkeys(keys, "[" * 100_000)
    cluster.cluster.store.create("configmaps", {"metadata": meta, "data": data})
    cluster.start()
    try:
        with cluster.weighed():
            run = cluster["big"].go("v2", branch="feature/brackets")
            cluster.others_go_on()
            ended = {"run": run, "outcome": "tested"}
            cluster.awaits(lambda: cluster.said("run ended", **ended), "it is tested")
    finally:
        cluster.forget()


def test_300_mb_of_kubectl_output(cluster: Scales, tmp_path: Path) -> None:
    script = tmp_path / "kubectl"
    script.write_text(KUBECTL)
    script.chmod(0o755)
    cluster.tools = tmp_path
    cluster.start()
    try:
        with cluster.weighed():
            cluster["big"].go("flooded")
            eventually((tmp_path / "flooded").exists, 30, "kubectl floods the daemon")
            cluster.others_go_on()
    finally:
        cluster.forget()
        cluster.tools = None
