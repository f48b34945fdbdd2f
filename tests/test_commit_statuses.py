"""What a GitLab shows of pushes that the real daemon brings through a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.fleet import Fleet, Gate
from tests.git_server import serving
from tests.gitlab_server import TOKEN, GitLabServer, Trouble, gitlab_server
from tests.standin.cluster import Cluster
from tests.world import Object, eventually, install

SETTINGS = {"bake": "1s", "environments": ["staging", "production"]}
GREEN = ("test", "staging", "production")
PAGE = "https://gitops.example.com/hooks"


@dataclass
class Place:
    """Applications whose repositories a server has, and the GitLab that is told about them."""

    apps: Fleet
    gitlab: GitLabServer
    gate: Gate

    def push(self, name: str, commit: str, ref: str = "main") -> str:
        """Announce a commit by the URL of its repository; return the run's id."""
        return self.apps[name].push(commit, ref)

    def shows(self, commit: str, **states: str) -> None:
        """Wait until exactly these stages have a status of a commit, one each and in this state."""
        wanted = {f"gitops-hook/{stage}": [state] for stage, state in states.items()}
        what = f"GitLab shows {wanted}"
        eventually(lambda: self.gitlab.shown(commit) == wanted, 60, what)


@contextmanager
def gitlab_place(
    directory: Path, apps: dict[str, Object], gate: Gate | None = None
) -> Iterator[Place]:
    """A place with these applications, and a started daemon that tells GitLab of them."""
    with (
        gitlab_server(*(f"{name}/shop" for name in apps)) as gitlab,
        serving(directory / "repositories") as git,
        Cluster(directory / "cluster", speed=2.0) as cluster,
    ):
        install(cluster)
        more = {"gitlab": {"url": gitlab.url}, "external_url": f"{PAGE}/"}
        fleet = Fleet(directory, cluster, apps, **more)
        for entry in fleet.config["apps"]:
            entry["repository"] = f"{git.url}/{entry['name']}/shop.git"
            fleet[entry["name"]].address = entry["repository"]
        (fleet.secrets / "gitlab-token").write_text(f"{TOKEN}\n")
        fleet.start()
        try:
            yield Place(fleet, gitlab, gate or Gate(directory / "gate"))
        finally:
            fleet.end()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Three applications, of which the tests of one wait at a gate."""
    gate = Gate(tmp_path_factory.mktemp("gates") / "gated")
    apps: dict[str, Object] = {
        "shop": SETTINGS,
        "red": {**SETTINGS, "test": "echo 'no <database>'; false"},
        "gated": {**SETTINGS, "test": gate.command},
    }
    with gitlab_place(tmp_path_factory.mktemp("statuses"), apps, gate) as made:
        yield made


def test_a_push_that_goes_live_has_a_green_status_of_each_stage(place: Place) -> None:
    commit = place.apps["shop"].release("v1")
    run = place.push("shop", commit)
    assert place.apps.ended(run, 90)["outcome"] == "deployed"
    place.shows(commit, **dict.fromkeys(GREEN, "success"))
    assert place.gitlab.description("gitops-hook/production") == "is live"
    assert place.gitlab.link("gitops-hook/production") == f"{PAGE}/runs/{run}"
    assert TOKEN not in place.apps.log.read_text()


def test_the_page_that_a_status_leads_to_says_what_became_of_the_push(place: Place) -> None:
    commit = place.apps["red"].release("v0")
    run = place.push("red", commit)
    assert place.apps.ended(run, 90)["reason"] == "TestsFailed"
    place.shows(commit, test="failed")
    link = place.gitlab.link("gitops-hook/test")
    assert link == f"{PAGE}/runs/{run}"
    path = link.removeprefix(PAGE)
    page = requests.get(f"{place.apps.admin_url}{path}", timeout=30)
    assert page.status_code == 200
    assert "TestsFailed" in page.text

    def log() -> bool:
        """Whether the page has what the tests printed, as text."""
        text = requests.get(f"{place.apps.admin_url}{path}", timeout=30).text
        return "no &lt;database&gt;" in text

    eventually(log, what="the log of the tests is kept, and on the page")
    overview = requests.get(f"{place.apps.admin_url}/", timeout=30).text
    assert f'<a href="runs/{run}">' in overview
    assert "The cluster cannot be followed" not in overview


def test_a_push_with_red_tests_has_one_red_status(place: Place) -> None:
    commit = place.apps["red"].release("v1")
    place.push("red", commit)
    place.shows(commit, test="failed")
    branch = place.apps["red"].release("v2", branch="feature/<script>")
    place.push("red", branch, "feature/<script>")
    place.shows(branch, test="failed")


def test_a_push_that_a_newer_one_overtakes_is_canceled(place: Place) -> None:
    gated = place.apps["gated"]
    older = gated.release("v1")
    place.push("gated", older)
    place.shows(older, test="running")
    newer = gated.release("v2")
    run = place.push("gated", newer)
    place.shows(newer, test="running")  # by now the daemon knows the new head
    place.gate.open()
    place.gate.open()
    assert place.apps.ended(run, 90)["outcome"] == "deployed"
    place.shows(older, test="success", staging="canceled")
    place.shows(newer, **dict.fromkeys(GREEN, "success"))


def test_killed_while_gitlab_is_away_it_sends_what_is_missing_after_its_start(
    place: Place,
) -> None:
    gated = place.apps["gated"]
    commit = gated.release("v3")
    run = place.push("gated", commit)
    place.shows(commit, test="running")
    away = [Trouble(503) for _ in range(100)]
    place.gitlab.troubles = away
    place.gate.open()
    assert place.apps.ended(run, 90)["outcome"] == "deployed"
    place.apps.kill()
    assert place.gitlab.shown(commit) == {"gitops-hook/test": ["running"]}
    place.gitlab.troubles = []
    place.apps.start()
    place.shows(commit, **dict.fromkeys(GREEN, "success"))
