"""Each way in which a run ends: everyone who reports it gives the same true reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import requests

from tests.fleet import Gate, Member
from tests.test_commit_statuses import Place, gitlab_place
from tests.test_workers import worker
from tests.world import Object, eventually

QUICK: dict[str, Object] = {"bake": "2s", "environments": ["production"]}


class Way(NamedTuple):
    """What is pushed, what happens then, and how the run ends."""

    outcome: str
    reason: str
    stage: str
    status: str  # what GitLab shows of the stage
    says: str = ""  # of the reason, in all texts
    praise: str = ""  # what GitLab and the page say where there is no reason
    release: Callable[[Member], Object] = lambda _: {}
    settings: Object | None = None
    then: Callable[[Place, Member, str], None] | None = None


def push_again(place: Place, app: Member, run: str) -> None:
    """Push another version while the tests of the first run, and let those pass then."""
    eventually(lambda: is_testing(place, run), 30, "its tests run")
    newer = place.push(app.name, app.release("v2"))
    eventually(lambda: is_testing(place, newer), 30, "the tests of the newer one run")
    place.gate.open()
    place.gate.open()


def is_testing(place: Place, run: str) -> bool:
    """Whether the Job of a run's tests was started."""
    job = place.apps.jobs().get(f"test-{run}", {})
    return "startTime" in job.get("status", {})


def turn_sick(place: Place, app: Member, run: str) -> None:
    """Let the new version turn sick once it has the traffic."""
    app.switched(run)
    app.tell("v1", "/turn-sick")


def roll_back(place: Place, app: Member, run: str) -> None:
    """Roll the new version back by hand while it bakes."""
    app.switched(run)
    assert place.apps.command("rollback", app.name, "--reason", "too loud").returncode == 0


def two_secrets(objects: dict[str, Object]) -> None:
    """Add what is refused."""
    meta = {"name": "keys"}
    objects["secret"] = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": {}}


WAYS = {
    "deployed": Way("deployed", "Ok", "production", "success", praise="is live"),
    "tests": Way(
        "failed", "TestsFailed", "test", "failed", "exit code 3", settings={"test": "exit 3"}
    ),
    "build": Way(
        "failed", "BuildFailed", "build", "failed", "exit code 1",
        settings={"build": {"image": "registry.example.com/demo/build"}},
    ),
    "superseded": Way(
        "superseded", "NotHead", "production", "canceled", "pushed again",
        then=push_again,
    ),
    "refused": Way(
        "failed", "ManifestRefused", "production", "failed", "Secret keys",
        release=lambda _: {"change": two_secrets},
    ),
    "crash": Way(
        "failed", "CrashLoop", "production", "failed", "exit code 7",
        release=lambda _: {"modes": "crash-at-start"},
    ),
    "smoke": Way(
        "failed", "SmokeFailed", "production", "failed", "/ready",
        release=lambda _: {"modes": "smoke-fails"},
    ),
    "sick": Way(
        "switched-back", "UnhealthyAfterSwitch", "production", "failed", "/ready failed 3 times",
        then=turn_sick,
    ),
    "worker": Way(
        "switched-back", "WorkerFailed", "production", "failed", "worker-worker",
        release=lambda app: {"change": worker(app, "v1", "crash-at-start")},
    ),
    "back": Way(
        "rolled-back", "RolledBack", "production", "failed", "too loud",
        settings={"bake": "30s"}, then=roll_back,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """An application for each way, each with a healthy version that is live."""
    gate = Gate(tmp_path_factory.mktemp("gates") / "gated")
    apps = {name: {**QUICK, **(way.settings or {})} for name, way in WAYS.items()}
    apps["superseded"]["test"] = gate.command
    with gitlab_place(tmp_path_factory.mktemp("statuses"), apps, gate) as made:
        yield made


def events(place: Place, run: str) -> str:
    """Return what the Events of a run say."""
    listed: list[Any] = []
    for namespace in ("test", "build", "production"):
        listed += place.apps.cluster.store.list("events", namespace)
    ours = [e for e in listed if run in str(e.get("message"))]
    return "\n".join(f"{e['reason']}: {e['message']}" for e in ours)


@pytest.mark.parametrize("name", WAYS)
def test_log_metric_event_status_page_and_explain_give_the_same_reason(
    place: Place, name: str
) -> None:
    way, app, apps = WAYS[name], place.apps[name], place.apps
    if way.stage == "production" and name not in ("deployed", "superseded"):
        run = place.push(name, app.release("v0"))
        assert apps.ended(run)["outcome"] == "deployed"
        app.quiet()
    commit = app.release("v1", **way.release(app))
    run = place.push(name, commit)
    if way.then:
        way.then(place, app, run)
    line = apps.ended(run)
    assert (line["outcome"], line["reason"], line["stage"]) == (way.outcome, way.reason, way.stage)
    assert way.says in line.get("detail", "")
    labels = {"app": name, "outcome": way.outcome, "stage": way.stage, "reason": way.reason}
    assert apps.metric("gitops_hook_runs_total", **labels) == 1
    status = f"gitops-hook/{way.stage}"
    eventually(lambda: place.gitlab.shown(commit).get(status) == [way.status], 60, "a status")
    page = requests.get(f"{apps.admin_url}/runs/{run}", timeout=30).text
    explained = apps.command("explain", run).stdout
    said = way.says or way.praise
    for text in (page, explained):
        assert way.reason in text or way.outcome == "deployed"
        assert way.outcome in text
        assert said in " ".join(text.split())
    assert said in place.gitlab.description(status, commit)
    eventually(lambda: said in events(place, run), 30, f"an Event: {events(place, run)}")
