"""What 0.1.0 left in a cluster when it ended in the middle of everything, as it wrote it.

`tests/data/upgrade/` was made by that program: it was killed while several applications were in
different states, and what it had written until then was kept. To make it anew:

    git show 648549b:gitops_hook.py > old.py; HOOK_PROGRAM=old.py python -m tests.e2e.upgrade

Times are kept as if it had been killed at KILLED, and repositories as if they lay in REPOSITORIES.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tests.fleet import Fleet, Member
from tests.standin.cluster import Cluster
from tests.world import PROGRAM, ROOT, Object, eventually

DATA = ROOT / "tests" / "data" / "upgrade"
REPOSITORIES = "/repositories"
KILLED = 1_800_000_000.0
AROUND = 3600.0  # seconds around it, in which all kept times are
BUILDER = "builder:1"
# What builds nothing, and says as the digest which of two there is.
BUILD = 'for a; do case $a in --digest-file=*) printf %s {digest} > "${{a#*=}}";; esac; done'

# claimed: an image was built, and its rollout was under way. baking, ailing: traffic was switched,
# and the new version watched; ailing's turns sick when somebody asks for it. red: the last tests
# failed. queued: tests ran on some branches, and others waited.
APPS: dict[str, Object] = {
    "shop": {"environments": ["staging", "production"], "bake": "2s"},
    "claimed": {"bake": "1s"},
    "baking": {"bake": "1s"},
    "ailing": {"bake": "1s"},
    "red": {"bake": "1s"},
    "queued": {"environments": [], "test": "sleep 4"},
}
LATER: dict[str, Object] = {**APPS, "baking": {"bake": "15s"}, "ailing": {"bake": "15s"}}
LATER["red"] = {"bake": "1s", "test": "false"}
# Whatever is pushed after the upgrade is tested at once.
UPGRADED: dict[str, Object] = {**LATER, "queued": {"environments": [], "test": "true"}}


class Upgraded(Fleet):
    """The applications, in a cluster that 0.1.0 was installed in."""

    def __init__(self, directory: Path, cluster: Cluster, apps: dict[str, Object]) -> None:
        manifests = yaml.safe_load_all((DATA / "manifests.yaml").read_text("utf-8"))
        cluster.load(*(o for o in manifests if o["kind"] not in ("Deployment", "Ingress")))
        super().__init__(directory, cluster, apps, limits={"max_running": 2})
        cluster.images.add(BUILDER, entrypoint=["sh", "-c", BUILD.format(digest=self.digest)])
        self.config["images"]["kaniko"] = BUILDER
        self.settle(apps)

    @property
    def digest(self) -> str:
        """The digest of the image that all versions run."""
        return self.image.rpartition("@")[2]

    def settle(self, apps: dict[str, Object]) -> None:
        """Take over the settings of applications, from the next start on."""
        for entry in self.config["apps"]:
            settings = copy.deepcopy(apps[entry["name"]])
            entry["test"]["command"] = settings.pop("test", "true")
            entry["deploy"].update(settings)
            if entry["name"] == "claimed":
                entry["build"] = {"image": self.image.partition("@")[0]}


def shifted(text: str, since: float, until: float) -> str:
    """Return a text with all times around one moved as far as that one is from another."""
    moved = until - since

    def seconds(found: re.Match[str]) -> str:
        then = float(found[0])
        return f"{then + moved:.3f}" if abs(then - since) < AROUND else found[0]

    def stamp(found: re.Match[str]) -> str:
        then = datetime.fromisoformat(found[0]).timestamp() + moved
        return datetime.fromtimestamp(then, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    text = re.sub(r"\b1[0-9]{9}(\.[0-9]+)?\b", seconds, text)
    return re.sub(r"\b20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp, text)


# Back from the files.


def load(directory: Path, cluster: Cluster) -> Upgraded:
    """Put all that was kept into a cluster and wait until its pods run, as if they always had."""
    fleet = Upgraded(directory, cluster, UPGRADED)
    (directory / "old" / "app").mkdir(parents=True)
    shutil.copy(DATA / "server", directory / "old" / "app" / "server.py")
    start = ["python", "server.py"]
    name = fleet.image.partition("@")[0]
    old = cluster.images.add(f"{name}:old", directory / "old", cmd=start, workdir="/app")
    text = (DATA / "objects.json").read_text("utf-8")
    assert old in text, "the image is another than the one that is kept"
    text = text.replace(REPOSITORIES, str(directory / "repositories"))
    objects = json.loads(shifted(text, KILLED, time.time()))
    for name, app in fleet.apps.items():
        fetch = ("fetch", "-q", str(DATA / "repositories.bundle"))
        app.repository.git(*fetch, f"refs/heads/{name}/*:refs/heads/*", where=app.repository.bare)
        app.repository.git("fetch", "-q", "origin")
    cluster.load(*objects)
    for found in (o for o in objects if o["kind"] == "Deployment" and o["spec"]["replicas"]):
        where = (found["metadata"]["namespace"], found["metadata"]["name"])
        eventually(lambda w=where: stands(cluster, *w), 60, f"{where} stands")
    active = [o for o in objects if o["kind"] == "Job" and not over(o) and not waits(o)]
    for found in active:
        where = (found["metadata"]["namespace"], found["metadata"]["name"])
        eventually(lambda w=where: cluster.store.get("jobs", *w)["status"].get("active"), 30)
    return fleet


def stands(cluster: Cluster, namespace: str, name: str) -> bool:
    """Whether all pods of a Deployment are ready."""
    found = cluster.store.get("deployments", namespace, name)
    status = found.get("status") or {}
    return bool(status.get("readyReplicas", 0) == found["spec"]["replicas"])


def over(job: Object) -> bool:
    """Whether a Job has ended."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return any(c["type"] in ("Complete", "Failed") for c in conditions if c["status"] == "True")


def waits(job: Object) -> bool:
    """Whether a Job is suspended."""
    return bool(job["spec"].get("suspend"))


# Into the files.


def record() -> None:
    """Bring the applications into their states with the old program, kill it, keep everything."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with Cluster(directory / "cluster", speed=2.0) as cluster:
            fleet = Upgraded(directory, cluster, APPS)
            try:
                into_the_middle(fleet)
                fleet.kill()
                killed = time.time()
                keep(fleet, killed)
            finally:
                fleet.kill()


def into_the_middle(fleet: Upgraded) -> None:
    """Let each application come to where it is to be when the daemon is killed."""
    shop = fleet["shop"]
    shop.release("unannounced", branch="feature/unannounced")
    fleet.start()
    tell_the_story_of(shop)
    for name in ("baking", "ailing", "red"):
        assert fleet[name].deployed("v1")["outcome"] == "deployed"
    built = fleet.image.partition("@")[0]
    assert fleet["claimed"].deployed("v1", image=built)["outcome"] == "deployed"
    for app in (a for a in fleet.apps.values() if a.service()):
        app.quiet()
    fleet.stop()
    fleet.settle(LATER)
    fleet.start()
    assert fleet["red"].deployed("v2")["reason"] == "TestsFailed"
    switched = [fleet["baking"].go("v2"), fleet["ailing"].go("v2", modes="sick-later")]
    for run in switched:
        eventually(lambda r=run: fleet.said("switched", run=r), 30)
    fleet["claimed"].go("v2", image=built, change=slow)
    eventually(lambda: "claimed-green" in fleet["claimed"].objects("deployments"), 30)
    for number in range(4):
        fleet["queued"].go(f"v{number}", branch=f"feature/{number}")
    eventually(lambda: len(queue(fleet, suspended=False)) == 2, 30)
    eventually(lambda: len(queue(fleet, suspended=True)) == 2, 30)
    for name, phase in (("claimed", "preparing"), ("baking", "baking"), ("ailing", "baking")):
        assert fleet[name].note("deploying")["phase"] == phase


def tell_the_story_of(shop: Member) -> None:
    """Deploy versions, one of which is switched back and one rolled back."""
    fleet = shop.fleet
    for version in ("v1", "v2"):
        assert shop.deployed(version)["outcome"] == "deployed"
        shop.quiet()
    sick = shop.go("sick")
    eventually(lambda: shop.selector.get("gitops-hook/run") == sick, 60)
    shop.tell("sick", "/turn-sick")
    assert fleet.ended(sick)["outcome"] == "switched-back"
    shop.quiet()
    for version in ("v3", "v4"):
        assert shop.deployed(version)["outcome"] == "deployed"
        shop.quiet()
    assert fleet.command("rollback", "shop", "--reason", "too sweet").returncode == 0
    shop.quiet()
    assert fleet.ended(shop.go("other", branch="feature/tested"))["outcome"] == "tested"
    shop.repository.git("checkout", "-q", "main")


def slow(objects: dict[str, Object]) -> None:
    """Let a rollout take some seconds."""
    objects["Deployment"]["spec"]["minReadySeconds"] = 12


def queue(fleet: Fleet, *, suspended: bool) -> list[Object]:
    """Return the Jobs of branches that run, or wait."""
    jobs = [j for j in fleet.jobs().values() if not over(j) and "queued" in j["metadata"]["name"]]
    return [j for j in jobs if waits(j) is suspended]


def keep(fleet: Upgraded, killed: float) -> None:
    """Write objects, repositories and the image to the folder of test data."""
    store, spaces = fleet.cluster.store, ("staging", "production")
    found = [o for n in ("test", "build") for o in store.list("jobs", n)]
    found += [o for o in store.list("configmaps", "orchestration") if "gitops-hook-" in name_of(o)]
    for kind in ("deployments", "services", "configmaps"):
        found += [o for n in spaces for o in store.list(kind, n) if ours(o)]
    text = json.dumps([sanitised(o) for o in found], indent=1, sort_keys=True)
    text = text.replace(str(fleet.directory / "repositories"), REPOSITORIES)
    text = shifted(text, killed, KILLED)
    assert str(fleet.directory) not in text
    (DATA / "objects.json").write_text(text + "\n", "utf-8")
    shutil.copy(fleet.directory / "image" / "app" / "server.py", DATA / "server")
    all_of_them = fleet["shop"].repository
    for name, app in fleet.apps.items():
        branches = f"refs/heads/*:refs/heads/{name}/*"
        all_of_them.git("fetch", "-q", str(app.repository.bare), branches)
    names = [f"--branches={name}/*" for name in fleet.apps]
    all_of_them.git("bundle", "create", "-q", str(DATA / "repositories.bundle"), *names)


def name_of(found: Object) -> str:
    """Return the name of an object."""
    return str(found["metadata"]["name"])


def ours(found: Object) -> bool:
    """Whether the daemon made an object."""
    labels = found["metadata"].get("labels") or {}
    return labels.get("app.kubernetes.io/managed-by") == "gitops-hook"


def sanitised(found: Object) -> Object:
    """Return an object without what a cluster adds, but with how a Job stands."""
    kept = ("name", "namespace", "labels", "annotations")
    meta: dict[str, Any] = {k: v for k, v in found["metadata"].items() if k in kept}
    meta.get("annotations", {}).pop("deployment.kubernetes.io/revision", None)
    made = {k: v for k, v in found.items() if k not in ("metadata", "status")} | {"metadata": meta}
    if found["kind"] == "Job":
        gone = ("active", "ready", "terminating", "uncountedTerminatedPods")
        made["status"] = {k: v for k, v in found["status"].items() if k not in gone}
        made["spec"].pop("selector")
        labels = made["spec"]["template"]["metadata"]["labels"]
        for label in [k for k in labels if "controller-uid" in k or "job-name" in k]:
            del labels[label]
    elif found["kind"] == "Service":
        for field in ("clusterIP", "clusterIPs"):
            made["spec"].pop(field)
    return made


if __name__ == "__main__":
    if PROGRAM == ROOT / "gitops_hook.py":
        sys.exit("HOOK_PROGRAM: set it to a file with the program of 0.1.0")
    record()
