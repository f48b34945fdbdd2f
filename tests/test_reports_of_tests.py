"""What becomes of runs whose report and exit code disagree: real Jobs and a real daemon.

The Jobs' pods run the program's own `clone` and `collect`.
"""

from __future__ import annotations

import html
from collections.abc import Iterator

import pytest
import requests

from tests.fleet import Fleet, Member, fleet
from tests.standin.store import Hooks, Store
from tests.world import Object, eventually

UNREAD = "exit code 0, but the test report cannot be read: "
RED = "<testsuite><testcase classname='t' name='good'/><testcase classname='t' name='bad'>"
RED += "<failure/></testcase></testsuite>"
GREEN = "<testsuite><testcase classname='t' name='good'/></testsuite>"
WHY = "<failure message='assert 3 == 4'>def test_total(): &lt;x&gt; password=hunter22</failure>"
EXPLAINED = RED.replace("<failure/>", WHY)


def writes(report: str, status: int = 0) -> str:
    """A test command that leaves a report and ends with a status."""
    return f'printf %s "{report}" > $JUNIT_XML; exit {status}'


# as `pytest ... | tee log` does: the status is tee's
PIPED = f"({writes(RED, 1)}) | cat"


class Mesh:
    """What a service mesh does: each pod of an app gets a container that never ends."""

    def __init__(self, hooks: Hooks, app: str) -> None:
        self.hooks = hooks
        self.app = app

    def prepare(self, store: Store, resource: str, new: Object, old: Object | None) -> None:
        """Add the container to a pod that is created."""
        labels = new["metadata"].get("labels") or {}
        if resource == "pods" and old is None and labels.get("gitops-hook/app") == self.app:
            proxy = {**new["spec"]["containers"][0], "name": "istio-proxy"}
            new["spec"]["containers"].append({**proxy, "args": ["sleep 600"]})
        self.hooks.prepare(store, resource, new, old)

    def check(self, store: Store, resource: str, new: Object, old: Object | None) -> None:
        """Let the cluster check it."""
        self.hooks.check(store, resource, new, old)

    def written(self, store: Store, resource: str, new: Object | None, old: Object | None) -> None:
        """Let the cluster follow it."""
        self.hooks.written(store, resource, new, old)


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Applications that differ in what their tests leave."""
    commands = {
        "piped": PIPED,
        "branchy": PIPED,
        "green": writes(GREEN),
        "silent": "true",
        "status": writes(GREEN, 3),
        "broken": writes("<testsuite><testcase name='a'/>"),
        "typed": writes("<!DOCTYPE x><testsuite/>"),
        "large": "truncate -s 100M $JUNIT_XML",
        "linked": "ln -s /etc/passwd $JUNIT_XML",
        "again": writes(RED),
        "killed": writes(RED),
        "gone": writes(RED),
        "explained": writes(EXPLAINED, 1),
    }
    named: dict[str, Object] = {name: {"test": command} for name, command in commands.items()}
    named["meshed"] = {"test": "true", "test_timeout": "12s"}
    named["slow"] = {"test": "sleep 600", "test_timeout": "12s"}
    directory = tmp_path_factory.mktemp("reports")
    images = {"hook": "gitops-hook:dev"}
    with fleet(directory, named, images=images) as running:
        running.cluster.store.hooks = Mesh(running.cluster.store.hooks, "meshed")
        yield running


def is_red(app: Member, ended: Object, detail: str) -> None:
    """Check that a run ended by its tests, and that nothing of it was deployed."""
    assert (ended["outcome"], ended["reason"]) == ("failed", "TestsFailed")
    assert (ended["stage"], ended["detail"]) == ("test", detail)
    assert not app.leftovers()


@pytest.mark.parametrize("branch", ["main", "topic"])
def test_a_red_report_of_tests_that_exit_with_0_is_not_deployed(apps: Fleet, branch: str) -> None:
    app = apps["piped" if branch == "main" else "branchy"]
    ended = app.deployed("v1", branch=branch)
    is_red(app, ended, "exit code 0, but 1 passed, 1 failed: t.bad")


@pytest.mark.parametrize("name", ["green", "silent"])
def test_a_green_report_is_deployed_and_so_are_tests_without_one(apps: Fleet, name: str) -> None:
    ended = apps[name].deployed("v1")
    detail = "1 passed, 0 failed" if name == "green" else None
    assert (ended["outcome"], ended.get("detail")) == ("deployed", detail)


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("status", "1 passed, 0 failed, but exit code 3"),
        ("broken", f"{UNREAD}no element found: line 1, column 31, after 1 passed, 0 failed"),
        ("typed", f"{UNREAD}it has a document type"),
        ("large", "exit code 0, but the test report has 100 MiB; at most 10 MiB are read"),
        ("linked", f"{UNREAD}Too many levels of symbolic links"),
    ],
)
def test_why_a_report_is_red_that_has_no_failure_is_said(
    apps: Fleet, name: str, detail: str
) -> None:
    is_red(apps[name], apps[name].deployed("v1"), detail)


def test_explain_and_page_show_why_tests_failed_without_a_secret(apps: Fleet) -> None:
    ended = apps["explained"].deployed("v1")
    is_red(apps["explained"], ended, "1 passed, 1 failed: t.bad")
    run = ended["run"]
    why = "t.bad\n    assert 3 == 4\n    def test_total(): <x> password=***\n"
    printed = eventually(lambda: why in apps.command("explain", run).stdout, 30, "it is kept")
    assert printed
    whole = apps.command("explain", run, "--log").stdout
    assert whole.count(why) == 1
    page = requests.get(f"{apps.admin_url}/runs/{run}", timeout=30).text
    assert "<h3>Failing tests</h3>" in page
    assert html.escape(why.rstrip("\n")) in page
    assert "hunter22" not in page + whole + apps.log.read_text()


def test_a_rerun_of_a_red_report_runs_the_tests_again(apps: Fleet) -> None:
    again = apps["again"]
    first = again.deployed("v1")
    is_red(again, first, "exit code 0, but 1 passed, 1 failed: t.bad")
    name = f"test-{first['run']}"
    assert apps.created(name) == 1
    done = apps.command("rerun", first["run"])
    assert done.returncode == 0, done
    again_by = eventually(lambda: apps.said("run again", run=first["run"]), 30, "it is reported")
    ends = eventually(lambda: apps.said("run ended", run=first["run"])[1:], 60, "it ends again")
    is_red(again, ends[0], first["detail"])
    assert apps.created(name) == 2
    (by,) = [line["by"] for line in again_by]
    events = apps.cluster.store.list("events", "test")
    texts = [event["message"] for event in events if event["reason"] == "Rerun"]
    assert texts == [f"{by} lets run {first['run']} run again."]
    page = requests.get(f"{apps.admin_url}/runs/{first['run']}", timeout=30).text
    assert f"<dt>Run again by</dt><dd>{by}</dd>" in page
    assert f"by:       {by}\n" in apps.command("explain", first["run"]).stdout


@pytest.mark.parametrize("name", ["killed", "gone"])
def test_a_red_report_is_red_though_the_daemon_is_killed_before_it_is_kept(
    apps: Fleet, name: str
) -> None:
    app = apps[name]
    run = app.go("v1")
    keeps = {"namespace": "test", "body_contains": "gitops-hook/summary"}
    fault = apps.fault("hang", "patch", "jobs", **keeps)
    faults = apps.cluster.faults
    eventually(lambda: faults.holds(fault), 40, "the daemon keeps the report")
    apps.kill()
    eventually(lambda: not faults.holds(fault), 10, "the call ends with the daemon")
    faults.lift(fault)
    if name == "gone":
        # else the Job would run them in another pod
        eventually(lambda: is_complete(apps.jobs()[f"test-{run}"]), 30, "the Job is complete")
        (pod,) = [p["metadata"]["name"] for p in pods_of(apps, run)]
        apps.cluster.store.remove("pods", "test", pod)
    apps.start()
    ended = apps.ended(run)
    if name == "killed":
        is_red(app, ended, "exit code 0, but 1 passed, 1 failed: t.bad")
    else:
        detail = "the result of the tests is lost: its pod is gone"
        assert (ended["outcome"], ended["reason"]) == ("failed", "Vanished")
        assert ended["detail"] == detail
        assert not app.leftovers()


def is_complete(job: Object) -> bool:
    """Whether a Job has succeeded, its last words included."""
    return any(c["type"] == "Complete" for c in job["status"].get("conditions") or ())


def pods_of(apps: Fleet, run: str) -> list[Object]:
    """The pods of a run's tests."""
    pods = apps.cluster.store.list("pods", "test")
    return [p for p in pods if (p["metadata"].get("labels") or {}).get("gitops-hook/run") == run]


@pytest.mark.parametrize(
    ("name", "container"), [("meshed", "istio-proxy"), ("slow", "test-runner")]
)
def test_the_container_that_still_runs_is_named(apps: Fleet, name: str, container: str) -> None:
    ended = apps[name].deployed("v1")
    assert (ended["outcome"], ended["reason"]) == ("failed", "Timeout")
    assert ended["detail"] == f"container {container} still runs after 12 s"
    assert not apps[name].leftovers()
