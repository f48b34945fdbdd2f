"""Many small applications in one world, each with a repository of its own.

Their tests and images cost next to nothing, so that what takes time is what is to be seen: the
deployment. An application is told by its environment how to behave, and by requests when to turn.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.standin.cluster import Cluster
from tests.standin.faults import Fault
from tests.standin.kubectl import Kubectl, Result
from tests.world import SERVER, TOKEN, Object, Repository, World, eventually, install

DAEMON = "system:serviceaccount:orchestration:orchestration-sa"
STAGE = "gitops-hook/stage"
IMAGE = "registry.example.com/demo/app"
MISSING_IMAGE = f"{IMAGE}@sha256:{'0' * 64}"

APP = f"import os; VERSION, MODES = os.environ['VERSION'], os.environ.get('MODES', ''){SERVER}"

# What stands in for the daemon's image in Job pods: nothing is cloned, and no report is read.
NO_CHECKOUT = 'if [ "$0" = clone ]; then exit 0; fi; trap "exit 0" TERM; sleep 600 & wait'


def pod_template(version: str, modes: str, image: str) -> Object:
    """Return the pods of a version; a patient one answers for a while after it was told to end."""
    grace = 8 if "patient" in modes else 2
    variables = [{"name": "VERSION", "value": version}, {"name": "MODES", "value": modes}]
    probe = {
        "httpGet": {"path": "/ready", "port": "http"},
        "periodSeconds": 1,
        "failureThreshold": 20,
    }
    web = {
        "name": "web",
        "image": image,
        "env": variables,
        "envFrom": [{"configMapRef": {"name": "settings"}}],
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": probe,
        "lifecycle": {"preStop": {"sleep": {"seconds": 1}}},
    }
    return {
        "metadata": {"labels": {"tier": "web"}},
        "spec": {"terminationGracePeriodSeconds": grace, "containers": [web]},
    }


def app_objects(name: str, version: str, modes: str, image: str) -> dict[str, Object]:
    """Return the manifests of a version, by kind."""
    template, chosen = pod_template(version, modes, image), {"app": name}
    template["metadata"]["labels"] |= chosen
    spec = {"replicas": 1, "minReadySeconds": 0, "template": template}
    spec["selector"] = {"matchLabels": chosen}
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    return {
        "Deployment": {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": spec,
        },
        "Service": {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": chosen, "ports": ports},
        },
        "ConfigMap": {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "settings"},
            "data": {"GREETING": f"hello from {version}"},
        },
    }


class Gate:
    """Lets test pods through one by one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)

    @property
    def command(self) -> str:
        """The test command that waits to be let through."""
        # broken up, because the stand-in takes /tmp in a script for the pod's own
        path = str(self.directory).replace("/tmp", '/t""mp')
        return f"until rmdir {path}/pass 2>/dev/null; do sleep 0.05; done"

    def open(self) -> None:
        """Let one through."""
        eventually(lambda: not (self.directory / "pass").exists(), what="the one before is through")
        (self.directory / "pass").mkdir()


class Traffic:
    """What a client without retries got from a live Service, a new connection each time."""

    def __init__(self, app: Member, pause: float) -> None:
        self.app, self.pause = app, pause
        self.seen: list[tuple[float, str]] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        while not self._stop.wait(self.pause):
            try:
                answer = self.app.answer()
                self.seen.append((time.monotonic(), str(answer["version"])))
            except (requests.RequestException, ValueError, KeyError) as failed:
                self.failures.append(repr(failed))

    @property
    def versions(self) -> list[str]:
        """The versions that answered, each run of equal ones once."""
        names = [version for _, version in self.seen]
        return [v for i, v in enumerate(names) if i == 0 or names[i - 1] != v]

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)


class Member:
    """One application of a fleet, in its last environment."""

    def __init__(self, fleet: Fleet, name: str, directory: Path, namespace: str) -> None:
        self.fleet, self.name, self.namespace = fleet, name, namespace
        directory.mkdir(parents=True)
        self.repository = Repository(directory)
        self.address = ""  # by which pushes name the repository, where that is not its folder

    # What its owner does.

    def release(self, version: str, *, branch: str = "main", **content: Any) -> str:
        """Commit and push a version with the content that `commit` takes; return the commit."""
        commit = self.commit(version, branch=branch, **content)
        self.repository.git("push", "-q", "-f", "origin", branch)
        return commit

    def commit(
        self,
        version: str,
        *,
        modes: str = "",
        image: str = "",
        branch: str = "main",
        change: Callable[[dict[str, Object]], None] | None = None,
        files: dict[str, str] | None = None,
    ) -> str:
        """Commit a version, its manifests changed as told; return the commit.

        It is not pushed, so that the git server does not show it.
        """
        objects = app_objects(self.name, version, modes, image or self.fleet.image)
        if change:
            change(objects)
        git = self.repository.git
        git("checkout", "-q", "-B", branch)
        manifests = yaml.safe_dump_all(copy.deepcopy([*objects.values()]))
        self.repository.write({"deploy/app.yaml": manifests, **(files or {})})
        git("add", "-A")
        git("commit", "-q", "--allow-empty", "-m", f"Version {version}")
        return git("rev-parse", "HEAD")

    def push(self, commit: str, ref: str = "main", **more: Any) -> str:
        """Announce a commit by a signed delivery; return the run's id."""
        where = self.address or self.repository.bare
        answer = self.fleet.deliver(where, f"refs/heads/{ref}", commit, **more)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["runs"][0])

    def go(self, version: str, *, branch: str = "main", **release: Any) -> str:
        """Release a version and announce it; return the run's id."""
        return self.push(self.release(version, branch=branch, **release), branch)

    def deployed(self, version: str, seconds: float = 60.0, **release: Any) -> Object:
        """Release a version, announce it, and wait for the end; return the log line of that."""
        return self.fleet.ended(self.go(version, **release), seconds)

    # What is in the cluster.

    def service(self, name: str = "") -> Object:
        """Return its live Service, or another; an empty mapping when there is none."""
        return self.fleet.cluster.store.find("services", self.namespace, name or self.name) or {}

    @property
    def selector(self) -> dict[str, str]:
        """What its live Service selects."""
        return dict((self.service().get("spec") or {}).get("selector") or {})

    def note(self, name: str) -> Any:
        """Return an annotation of ours on its live Service."""
        notes = (self.service().get("metadata") or {}).get("annotations") or {}
        return json.loads(notes.get(f"gitops-hook/{name}", "null"))

    def objects(self, resource: str) -> dict[str, Object]:
        """Return its objects of a kind by name."""
        found = self.fleet.cluster.store.list(resource, self.namespace)
        label = "gitops-hook/app"
        mine = [o for o in found if (o["metadata"].get("labels") or {}).get(label) == self.name]
        return {o["metadata"]["name"]: o for o in mine}

    def pods(self, version: str = "") -> list[Object]:
        """Return its pods that are not ending, of one version or all."""
        pods = [
            p for p in self.objects("pods").values() if "deletionTimestamp" not in p["metadata"]
        ]
        return [p for p in pods if not version or variable(p, "VERSION") == version]

    def standing(self, colour: str) -> str:
        """Return the version in a colour when all its wanted pods are ready, else ""."""
        found = self.objects("deployments").get(f"{self.name}-{colour}")
        if found is None or not found["spec"].get("replicas"):
            return ""
        template, status = found["spec"]["template"], found.get("status") or {}
        whole = {status.get(k, 0) for k in ("replicas", "updatedReplicas", "readyReplicas")}
        current = status.get("observedGeneration") == found["metadata"]["generation"]
        if not current or whole != {found["spec"]["replicas"]}:
            return ""
        return variable(template, "VERSION")

    def idle(self) -> str:
        """Return the colour that is not live."""
        return {"blue": "green", "green": "blue"}[self.selector["version"]]

    def quiet(self, seconds: float = 40.0) -> None:
        """Wait until nothing is left to do: no claim on the live Service."""
        eventually(
            lambda: self.note("deploying") is None, seconds, f"{self.name}: no claim is left"
        )

    def leftovers(self) -> list[str]:
        """Return everything of it that is in its namespace but logs, by kind and name."""
        kinds = ("deployments", "services", "configmaps", "replicasets")
        found = [(kind, name, o) for kind in kinds for name, o in self.objects(kind).items()]
        return [f"{k}/{n}" for k, n, o in found if o["metadata"]["labels"].get(STAGE) != "log"]

    # What it waits for.

    def switched(self, run: str, seconds: float = 30.0) -> None:
        """Wait until traffic was switched to a run."""
        eventually(lambda: self.fleet.said("switched", run=run), seconds, f"{run} is switched to")

    def stands(self, colour: str, version: str, seconds: float = 20.0) -> None:
        """Wait until a version stands in a colour with all its pods ready."""
        try:
            eventually(lambda: self.standing(colour) == version, seconds)
        except AssertionError as late:
            where = (f"deployment/{self.name}-{colour}", "-n", self.namespace)
            told = self.fleet.kubectl("describe", *where).out
            told += self.fleet.kubectl("get", "pods,replicasets", "-n", self.namespace).out
            raise AssertionError(f"{late}: {version} does not stand in {colour}\n{told}") from None

    # What its clients do.

    def answer(self, path: str = "/") -> Object:
        """Ask it through its live Service."""
        spec = self.service()["spec"]
        answer = requests.get(
            f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}{path}", timeout=5
        )
        return {"status": answer.status_code, **answer.json()}

    def tell(self, version: str, path: str = "/") -> list[Object]:
        """Send a request to every ready pod of a version, past any Service; return the answers."""
        answers = []
        for pod in (p for p in self.pods(version) if is_ready(p)):
            port = 9090 if "other-port" in variable(pod, "MODES") else 8080
            answer = requests.get(f"http://{pod['status']['podIP']}:{port}{path}", timeout=5)
            answers.append(dict(answer.json()))
        return answers

    def traffic(self, pause: float = 0.04) -> Traffic:
        """Return a client that asks all the time while its block runs."""
        return Traffic(self, pause)


def apply_service(app: Member, *, anew: bool = False) -> None:
    """Let a colleague apply the Service as it is in the repository, after its deletion or not."""
    where, kubectl = ("-n", app.namespace), app.fleet.kubectl
    if anew:
        assert kubectl("delete", "service", app.name, *where).code == 0
    listed = yaml.safe_load_all((app.repository.work / "deploy" / "app.yaml").read_text())
    (service,) = [o for o in listed if o["kind"] == "Service"]
    for _ in range(2):  # it may be there again between kubectl's look and its creation
        done = kubectl("apply", *where, "-f", "-", stdin=json.dumps(service))
        if done.code == 0:
            break
    assert done.code == 0, done


def is_ready(pod: Object) -> bool:
    """Whether a pod's Ready condition is true."""
    conditions = pod.get("status", {}).get("conditions") or []
    return any((c["type"], c["status"]) == ("Ready", "True") for c in conditions)


def variable(holder: Object, name: str) -> str:
    """Return an environment variable of the first container of a pod or pod template."""
    env = holder["spec"]["containers"][0].get("env") or []
    return next((str(e.get("value", "")) for e in env if e["name"] == name), "")


class Fleet(World):
    """A world with several applications and one daemon."""

    def __init__(
        self, directory: Path, cluster: Cluster, apps: dict[str, Object], **config: Any
    ) -> None:
        super().__init__(directory, cluster)
        source = directory / "image"
        (source / "app").mkdir(parents=True)
        (source / "app" / "server.py").write_text(APP)
        start = ["python", "server.py"]
        digest = cluster.images.add(f"{IMAGE}:1", source, cmd=start, workdir="/app")
        self.image = f"{IMAGE}@{digest}"
        cluster.images.add("nothing:dev", entrypoint=["sh", "-c", NO_CHECKOUT])
        self._jobs_seen, self._created = cluster.store.subscribe(("jobs",)), list[str]()
        self.apps = {}
        entries = []
        for name, deploy in apps.items():
            entry = app_entry(name, directory / "repositories" / name / "shop.git", deploy)
            entries.append(entry)
            last = entry["deploy"]["environments"][-1:] or ["production"]
            self.apps[name] = Member(self, name, directory / "repositories" / name, last[0])
        images = {"images": {"hook": "nothing:dev"}, "limits": {"max_running": 8}}
        self.config = {"apps": entries, "catch_up": "10m", **images, **config}

    def __getitem__(self, name: str) -> Member:
        return self.apps[name]

    def deliver(
        self, repository: Path | str, ref: str, commit: str, *, ident: str = "", **more: Any
    ) -> requests.Response:
        """Post a push as GitLab would, signed; with an id it may be a delivery that comes again."""
        payload = {"object_kind": "push", "ref": ref, "after": commit, **more}
        payload["project"] = {"git_http_url": str(repository)}
        body, stamp = json.dumps(payload).encode(), str(int(time.time()))
        ident = ident or str(uuid.uuid4())
        key = base64.b64decode(TOKEN.removeprefix(b"whsec_"))
        signed = hmac.new(key, f"{ident}.{stamp}.".encode() + body, hashlib.sha256).digest()
        headers = {
            "Content-Type": "application/json",
            "webhook-id": ident,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        }
        return requests.post(f"{self.url}/webhook", body, headers=headers, timeout=10)

    def said(self, message: str, **fields: Any) -> list[Object]:
        """Return the log lines with a message and these fields."""
        wanted = {"msg": message, **fields}.items()
        return [line for line in self.logged() if all(line.get(k) == v for k, v in wanted)]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels."""
        total = 0.0
        for line in requests.get(f"{self.admin_url}/metrics", timeout=5).text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(
                f'{k}="{v}"' in head for k, v in labels.items()
            ):
                total += float(value)
        return total

    def kubectl(self, *args: str, stdin: str = "") -> Result:
        """Run kubectl as the cluster's administrator."""
        return Kubectl(self.directory, self.cluster.kubeconfig()).run(*args, stdin=stdin or None)

    def fault(self, action: str, verb: str, resource: str, **more: Any) -> Fault:
        """Arm trouble that only the daemon and its commands meet."""
        return self.cluster.faults.add(Fault(action, verb, resource, user=DAEMON, **more))

    @contextmanager
    def held(self, verb: str, resource: str, **more: Any) -> Iterator[Callable[[], bool]]:
        """Hold the daemon in one call, from when it makes it until the block ends.

        What the block gets tells whether the call is still held: kubectl gives up after 30 s.
        """
        fault = self.fault("hang", verb, resource, **more)
        try:
            eventually(lambda: self.cluster.faults.holds(fault), 40, f"the daemon meets {fault}")
            yield lambda: self.cluster.faults.holds(fault)
        finally:
            self.cluster.faults.lift(fault)

    def jobs(self, namespace: str = "test") -> dict[str, Object]:
        """Return the Jobs of a namespace by name."""
        return {j["metadata"]["name"]: j for j in self.cluster.store.list("jobs", namespace)}

    def created(self, name: str) -> int:
        """Return how often a Job of this name was created so far."""
        while event := self._jobs_seen.get(0):
            kind, found = event
            self._created += [found["metadata"]["name"]] * (kind == "ADDED")
        return self._created.count(name)


def app_entry(name: str, repository: Path, settings: Object) -> Object:
    """Return the configuration of an application: one environment and short times."""
    settings = copy.deepcopy(settings)
    small = {"requests": {"cpu": "10m", "memory": "16Mi"}}
    test = {"command": settings.pop("test", "true"), "resources": small}
    if "test_image" in settings:
        test["image"] = settings.pop("test_image")
    if "test_timeout" in settings:
        test["timeout"] = settings.pop("test_timeout")
    test |= settings.pop("test_settings", {})
    branches = settings.pop("test_branches", ["*"])
    build = settings.pop("build", {"builder": "none"})
    health = {"path": "/ready", "successes": 2, "timeout": "3s"}
    deploy = {
        "environments": ["production"],
        "bake": "2s",
        "drain": "1s",
        "rollout_timeout": "30s",
        "health": health,
    }
    return {
        "name": name,
        "repository": str(repository),
        "test_branches": branches,
        "test": test,
        "build": build,
        "deploy": {**deploy, **settings},
    }


@contextmanager
def fleet(
    directory: Path,
    apps: dict[str, Object] | Sequence[str],
    *,
    speed: float = 2.0,
    program: Path | None = None,
    **config: Any,
) -> Iterator[Fleet]:
    """A fleet with a started daemon; ended with all its processes."""
    named = apps if isinstance(apps, dict) else {name: {} for name in apps}
    with Cluster(directory / "cluster", speed=speed) as cluster:
        install(cluster)
        made = Fleet(directory, cluster, named, **config)
        made.program = program or made.program
        try:
            made.start()
            yield made
        finally:
            with suppress(AssertionError):
                cluster.faults.clear()
            made.end()
