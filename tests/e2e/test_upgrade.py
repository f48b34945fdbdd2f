"""An upgrade from 0.1.0 in the middle of everything, and the way back to it.

Every application that 0.1.0 left behind is asked all the time by visitors. What is expected is said
by the commit and the branch, never by how this program keeps it.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.upgrade import DATA, Upgraded, load
from tests.fleet import Member, Traffic
from tests.standin.cluster import Cluster
from tests.world import PROGRAM, ROOT, Object, eventually, install

OLD = "648549b26f744a70dd4138189d04eb6ad0751f49"


class Site:
    """The applications that 0.1.0 left, their visitors, and what is expected of both."""

    def __init__(self, fleet: Upgraded) -> None:
        self.fleet, self.jobs = fleet, fleet.cluster.store.subscribe("jobs")
        self.probes = 0
        self.made()
        staging = copy.copy(fleet["shop"])
        staging.namespace = "staging"
        live = [a for a in fleet.apps.values() if a.service()]
        self.traffic = {f"{a.name} in {a.namespace}": a.traffic(0.1) for a in (*live, staging)}

    def made(self) -> Counter[tuple[str, str, str, str]]:
        """Return how many Jobs were made since the last time, by namespace, app, ref and commit."""
        found: Counter[tuple[str, str, str, str]] = Counter()
        while event := self.jobs.get(0):
            kind, job = event
            meta = job["metadata"]
            notes, app = meta["annotations"], meta["labels"]["gitops-hook/app"]
            where = (notes["gitops-hook/ref"], notes["gitops-hook/commit"])
            found[(meta["namespace"], app, *where)] += kind == "ADDED"
        return +found

    def commit(self, app: str, version: str) -> str:
        """Return the commit of a version, on whatever branch it is or was."""
        git = self.fleet[app].repository.git
        (found,) = git("log", "--all", "--format=%H", f"--grep=^Version {version}$").split()
        return found

    def status(self, app: str) -> Object:
        """Return what `status` says of an application."""
        done = self.fleet.command("status", app, "--output", "json")
        assert done.returncode == 0, done
        found: Object = json.loads(done.stdout)
        return found

    def run(self, app: str, version: str, branch: str = "main") -> Object:
        """Return what `status` says of the run of a version; empty if it says nothing."""
        key = (f"refs/heads/{branch}", self.commit(app, version))
        found = [r for r in self.status(app)["runs"] if (r["ref"], r["commit"]) == key]
        assert len(found) < 2
        return dict(*found)

    def ends(self, app: str, version: str, branch: str = "main") -> str:
        """Wait until a run has ended; return how."""
        what = f"{app} {version} of {branch} ends"
        return str(eventually(lambda: self.run(app, version, branch).get("outcome"), 60, what))

    def live(self, app: str, environment: str = "production") -> Object:
        """Return what `status` says is live."""
        (found,) = self.status(app)["apps"]
        entry: Object = found["environments"][environment]
        return entry

    def idle(self) -> None:
        """Wait until a push of a branch that comes now is through: what came before is decided."""
        self.probes += 1
        probe = f"probe-{self.probes}"
        self.fleet["queued"].go(probe, branch=f"feature/{probe}")
        assert self.ends("queued", probe, f"feature/{probe}") == "tested"

    @property
    def failed(self) -> dict[str, list[str]]:
        """The requests of visitors that failed."""
        return {name: t.failures for name, t in self.traffic.items() if t.failures}

    def seen(self, app: str, environment: str = "production") -> Traffic:
        """Return what the visitors of an application saw."""
        return self.traffic[f"{app} in {environment}"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The site, upgraded while its visitors come and go, once it has come to rest."""
    directory = tmp_path_factory.mktemp("upgrade")
    # at a real cluster's speed: a pod that turns sick stays ready for 20 seconds
    with Cluster(directory / "cluster", speed=1.0) as cluster, ExitStack() as stack:
        fleet = load(directory, cluster)
        stack.callback(fleet.kill)
        made = Site(fleet)
        install(cluster)  # as `make apply` would
        for traffic in made.traffic.values():
            stack.enter_context(traffic)
        fleet.start()
        eventually(lambda: all(t.seen for t in made.traffic.values()), 30)
        for app in ("claimed", "baking", "ailing"):
            made.ends(app, "v2")
            fleet[app].quiet()
        yield made


# In this order: what each finds is what the one before it left.

pytestmark = pytest.mark.timeout(300)


def test_what_was_under_way_reaches_its_end(site: Site) -> None:
    for number in range(4):
        assert site.ends("queued", f"v{number}", f"feature/{number}") == "tested"
    assert site.ends("claimed", "v2") == "deployed"
    assert site.ends("baking", "v2") == "deployed"
    assert site.ends("ailing", "v2") == "switched-back"
    for app, version in (("claimed", "v2"), ("baking", "v2"), ("ailing", "v1")):
        assert site.live(app)["commit"] == site.commit(app, version)
        assert site.fleet[app].answer()["version"] == version


def test_visitors_saw_nothing_of_it_but_the_versions(site: Site) -> None:
    assert not site.failed
    assert site.seen("claimed").versions == ["v1", "v2"]
    assert site.seen("baking").versions == ["v2"]
    assert site.seen("ailing").versions == ["v2", "v1"]
    for app, environment, version in (
        ("shop", "staging", "v4"),
        ("shop", "production", "v3"),
        ("red", "production", "v1"),
    ):
        assert site.seen(app, environment).versions == [version]


def test_nothing_runs_twice(site: Site) -> None:
    site.idle()
    again = [key for key in site.made() if "probe" not in key[2]]
    assert not again


def test_status_shows_what_0_1_0_left(site: Site) -> None:
    live = site.live("shop")
    assert live["commit"] == site.commit("shop", "v3")
    assert live["previous"]["commit"] == site.commit("shop", "v2")
    assert "too sweet" in str(live["reverted"].values())
    assert site.live("shop", "staging")["commit"] == site.commit("shop", "v4")
    assert site.run("shop", "v4")["outcome"] == "rolled-back"
    assert site.run("shop", "sick")["outcome"] == "switched-back"
    assert site.run("shop", "other", "feature/tested")["outcome"] == "tested"
    red = site.run("red", "v2")
    assert (red["outcome"], red["reason"]) == ("failed", "TestsFailed")


def test_what_was_rejected_stays_rejected_when_it_is_pushed_again(site: Site) -> None:
    for app, version in (("shop", "sick"), ("ailing", "v2"), ("shop", "v4")):
        pushed(site, app, version)
    site.idle()
    assert not {key for key in site.made() if key[1] in ("shop", "ailing")}
    assert site.live("shop")["commit"] == site.commit("shop", "v3")
    assert site.live("ailing")["commit"] == site.commit("ailing", "v1")
    assert not site.failed


def pushed(site: Site, app: str, version: str) -> None:
    """Make a commit that there is the head of its branch again, and announce it."""
    member, commit = site.fleet[app], site.commit(app, version)
    refs = [f"{commit}:refs/heads/main"]
    # the head that it replaces stays known under a name that nobody asks for
    head = member.repository.git("rev-parse", "origin/main")
    member.repository.git("update-ref", f"refs/kept/{head}", head)
    member.repository.git("push", "-q", "-f", "origin", *refs)
    member.push(commit)


def test_a_rollback_goes_to_a_version_that_0_1_0_deployed(site: Site) -> None:
    done = site.fleet.command("rollback", "shop")
    assert done.returncode == 0, done.stderr
    assert site.live("shop")["commit"] == site.commit("shop", "v2")
    eventually(lambda: site.fleet["shop"].answer()["version"] == "v2", 10)
    site.fleet["shop"].quiet()
    assert not site.failed


def test_a_run_of_0_1_0_goes_again_by_its_old_id(site: Site) -> None:
    commit = site.commit("shop", "v4")
    kept = json.loads((DATA / "objects.json").read_text("utf-8"))
    (job,) = [
        o
        for o in kept
        if o["kind"] == "Job" and o["metadata"]["annotations"]["gitops-hook/commit"] == commit
    ]
    done = site.fleet.command("rerun", job["metadata"]["labels"]["gitops-hook/run"])
    assert done.returncode == 0, done.stderr
    eventually(lambda: site.live("shop")["commit"] == commit, 60)
    assert site.ends("shop", "v4") == "deployed"
    site.fleet["shop"].quiet()
    assert not [key for key in site.made() if key[3] == commit], "green tests are not run again"
    assert not site.failed


def test_what_comes_after_the_upgrade_is_deployed(site: Site) -> None:
    shop = site.fleet["shop"]
    assert shop.deployed("v5")["outcome"] == "deployed"
    assert shop.answer()["version"] == "v5"
    shop.quiet()
    assert not site.failed


# The way back.


@pytest.fixture(scope="module")
def gone_back(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    """The same site with 0.1.0 once more, as it is in this repository's history."""
    argv = ["git", "show", f"{OLD}:gitops_hook.py"]
    shown = subprocess.run(argv, cwd=ROOT, capture_output=True, check=False)
    assert shown.returncode == 0, f"0.1.0 is not in this clone's history: {shown.stderr.decode()}"
    old = tmp_path_factory.mktemp("old") / "gitops_hook.py"
    old.write_bytes(shown.stdout)
    for app in site.fleet.apps.values():
        if app.service():
            app.quiet()
    assert site.fleet.stop() == 0
    site.made()
    site.fleet.program = old
    site.fleet.start()
    yield site.fleet["shop"]
    site.fleet.program = PROGRAM


def test_going_back_to_0_1_0_leaves_live_what_is_live(site: Site, gone_back: Member) -> None:
    site.idle()
    for app, version in (
        ("shop", "v5"), ("claimed", "v2"), ("baking", "v2"), ("ailing", "v1"), ("red", "v1"),
    ):  # fmt: skip
        assert site.live(app)["commit"] == site.commit(app, version), app
        assert site.fleet[app].answer()["version"] == version
    assert not {key for key in site.made() if key[1] in ("shop", "claimed", "baking", "ailing")}
    assert site.live("shop")["previous"]["commit"] == site.commit("shop", "v4")
    assert not site.failed


def test_after_going_back_a_push_is_deployed_and_can_be_rolled_back(
    site: Site, gone_back: Member
) -> None:
    assert gone_back.deployed("v6")["outcome"] == "deployed"
    gone_back.quiet()
    done = site.fleet.command("rollback", "shop")
    assert done.returncode == 0, done.stderr
    assert site.live("shop")["commit"] == site.commit("shop", "v5")
    assert not site.failed
