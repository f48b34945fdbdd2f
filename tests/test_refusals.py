"""Manifests that cannot be deployed: red while the tests run, and with everything that is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import pytest

from tests.fleet import Fleet, Gate, fleet
from tests.world import Object, eventually

NAMES = ("ten", "killed", "gitless", "twice", "branch")
BOTH = ["staging", "production"]
POD_SPEC = ("Deployment", "spec", "template", "spec")
OWN_TOKEN: Object = {"sources": [{"serviceAccountToken": {"path": "token"}}]}
OWNER = {"apiVersion": "v1", "kind": "Pod", "name": "of-others", "uid": "of-others"}
# What a deploy commit could do to others, by the application that tries it: where, and with what.
HARMFUL: dict[str, tuple[Sequence[str], Object]] = {
    "addresses": (("Service", "spec"), {"externalIPs": ["10.0.0.1"]}),
    "not-ready": (("Service", "spec"), {"publishNotReadyAddresses": True}),
    "owners": (("Deployment", "spec", "template", "metadata"), {"ownerReferences": [OWNER]}),
    "finalizers": (("Deployment", "spec", "template", "metadata"), {"finalizers": ["x.io/y"]}),
    "node": (POD_SPEC, {"nodeName": "node-1"}),
    "priority": (POD_SPEC, {"priorityClassName": "system-cluster-critical"}),
    "token": (POD_SPEC, {"volumes": [{"name": "token", "projected": OWN_TOKEN}]}),
}
TEN_FAULTS = (
    "staging: deploy/app.yaml: Service ten: metadata.namespace is not 'staging'",
    "production: deploy/app.yaml: Deployment ten: metadata.namespace is not 'production'",
    "deploy/app.yaml: Deployment ten: spec.hostNetwork shares the network of the node",
    "deploy/app.yaml: Deployment ten: spec.nodeName bypasses the scheduler",
    "deploy/app.yaml: Deployment ten: ports.hostPort takes a port of the node",
    "deploy/app.yaml: Deployment ten: securityContext.privileged gives root on the node",
    "deploy/app.yaml: Service ten: spec.externalIPs takes traffic of other addresses",
    "deploy/app.yaml: Secret ten of v1 is not deployed",
    "ConfigMap settings: NUMBER is not a text. Put it in quotes",
    "The image 'registry.example.com/demo/app:1' is not named by digest",
)


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Gate]:
    """What the tests of each application but the quick one wait for."""
    directory = tmp_path_factory.mktemp("gates")
    return {name: Gate(directory / name) for name in NAMES}


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory, gates: dict[str, Gate]) -> Iterator[Fleet]:
    """Applications with two environments, whose tests end only if they are let through."""
    plain: Object = {"bake": "1s", "environments": BOTH}
    named = {name: {**plain, "test": gate.command} for name, gate in gates.items()}
    named["quick"] = plain
    named |= {name: {**plain, "environments": ["production"]} for name in HARMFUL}
    named |= {name: {**plain, "environments": ["production"]} for name in ("quotes", "talks")}
    with fleet(tmp_path_factory.mktemp("refusals"), named) as running:
        yield running


def ten_faults(objects: dict[str, Object]) -> None:
    """Let manifests have ten faults, one of them in each environment alone."""
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (web,) = pod["containers"]
    objects["Service"]["metadata"]["namespace"] = "production"
    objects["Service"]["spec"]["externalIPs"] = ["10.0.0.1"]
    objects["Deployment"]["metadata"]["namespace"] = "staging"
    objects["ConfigMap"]["data"]["NUMBER"] = 5
    objects["Secret"] = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ten"}}
    pod |= {"hostNetwork": True, "nodeName": "node-1"}
    web["ports"][0]["hostPort"] = 8080
    web |= {"image": "registry.example.com/demo/app:1", "securityContext": {"privileged": True}}


def one_fault(objects: dict[str, Object]) -> None:
    """Let manifests have one fault."""
    objects["Deployment"]["spec"]["template"]["spec"]["hostPID"] = True


def only_for_staging(objects: dict[str, Object]) -> None:
    """Let manifests have one fault, in production alone."""
    objects["Service"]["metadata"]["namespace"] = "staging"


def refused(apps: Fleet, run: str, stage: str = "staging") -> Object:
    """Wait until a run is refused whose tests have not ended; return the log line of its end."""
    line = apps.ended(run, 60)
    assert "Complete" not in conditions(apps, run)
    end = (line["outcome"], line["reason"], line["stage"])
    assert end == ("failed", "ManifestRefused", stage), line
    return line


def conditions(apps: Fleet, run: str) -> set[str]:
    """Return which conditions of a run's test Job are true."""
    status = apps.jobs()[f"test-{run}"].get("status", {})
    return {c["type"] for c in status.get("conditions") or [] if c["status"] == "True"}


def entry_of(apps: Fleet, run: str) -> Object:
    """Return what `status` says of a run."""
    entries: list[Object] = apps.status()["runs"]
    return next(entry for entry in entries if entry["run"] == run)


def unsaid(faults: Sequence[str], text: str) -> list[str]:
    """Return the faults that a text does not name, wherever its lines are broken."""
    flat = " ".join(text.split())
    return [fault for fault in faults if fault not in flat]


def stopped(apps: Fleet, run: str) -> None:
    """Wait until the tests of a run have been stopped, or will not be begun any more."""
    eventually(
        lambda: not was_released(apps, run) or "Failed" in conditions(apps, run),
        90,
        "its Job has failed, or ended before it was released",
    )
    eventually(lambda: not running(apps, run), 90, "its pod is gone")


def was_released(apps: Fleet, run: str) -> bool:
    """Whether the Job of a run's tests has ever been let go on; it is deleted then, if it was not.

    Manifests may be read faster than git says what the head of the branch is.
    """
    job = apps.jobs().get(f"test-{run}")
    return job is not None and "startTime" in (job.get("status") or {})


def running(apps: Fleet, run: str) -> bool:
    """Whether a pod of a run's tests is running."""
    pods = apps.cluster.store.list("pods", "test")
    own = [p for p in pods if p["metadata"]["labels"].get("gitops-hook/run") == run]
    return any(p.get("status", {}).get("phase") == "Running" for p in own)


def test_ten_faults_in_two_environments_are_all_shown_while_the_tests_run(apps: Fleet) -> None:
    ten = apps["ten"]
    commit = ten.release("v1", change=ten_faults)
    run = ten.push(commit)
    line = refused(apps, run)
    assert len(line["detail"].split("\n")) == len(TEN_FAULTS)
    texts = {
        "log": line["detail"],
        "status as JSON": entry_of(apps, run)["detail"],
        "status": apps.command("status", "ten").stdout,
        "explain": apps.command("explain", run).stdout,
    }
    missing = {name: unsaid(TEN_FAULTS, text) for name, text in texts.items()}
    assert missing == {name: [] for name in texts}
    stopped(apps, run)
    assert ten.push(commit) == run
    again = {"run": run, "reason": "Rejected"}
    eventually(lambda: apps.said("push needs nothing", **again), 30, "it is rejected")


def test_plan_shows_the_refusals_of_each_environment_in_the_words_of_a_push(apps: Fleet) -> None:
    planned = apps.command("plan", "ten", apps["ten"].release("v1", change=ten_faults))
    assert planned.returncode == 1
    answers = re.split("(?m)^(?=[a-z]+, next: )", planned.stdout)
    for environment, other in (BOTH, BOTH[::-1]):
        (answer,) = [a for a in answers if a.startswith(f"{environment}, next: failed: ")]
        own = [f for f in TEN_FAULTS if not f.startswith(f"{other}: ")]
        assert unsaid([f.removeprefix(f"{environment}: ") for f in own], answer) == []
        assert f"is not '{other}'" not in answer


def test_what_one_environment_refuses_reaches_none(apps: Fleet) -> None:
    quick = apps["quick"]
    line = quick.deployed("v1", change=only_for_staging)
    end = (line["outcome"], line["reason"], line["stage"])
    assert end == ("failed", "ManifestRefused", "production")
    assert line["detail"].startswith("production: deploy/app.yaml: Service quick: metadata.name")
    assert apps.cluster.store.find("services", "staging", "quick") is None


def test_a_daemon_that_is_killed_before_it_stops_the_tests_stops_them_after_its_start(
    apps: Fleet,
) -> None:
    killed = apps["killed"]
    hang = apps.fault("hang", "patch", "jobs", body_contains="gitops-hook/outcome", times=1)
    run = killed.go("v1", change=one_fault)
    eventually(lambda: apps.cluster.faults.holds(hang), 60, "the end is recorded")
    apps.kill()  # and what hangs is never carried out
    before = entry_of(apps, run)
    assert (before["state"], before["reason"]) == ("ended", "ManifestRefused")
    apps.start()
    refused(apps, run)
    stopped(apps, run)
    assert entry_of(apps, run) == before


def test_while_git_is_away_nothing_is_decided_and_it_is_read_again(apps: Fleet) -> None:
    gitless = apps["gitless"]
    commit = gitless.release("v1", change=one_fault)
    objects = gitless.repository.bare / "objects"
    gone = objects.with_name("gone")
    objects.rename(gone)  # heads are listed, and nothing can be fetched
    objects.mkdir()
    try:
        run = gitless.push(commit)
        message = "manifests could not be read, will be tried again"
        eventually(lambda: len(apps.said(message, app="gitless")) > 1, 60, "it is read again")
        eventually(lambda: running(apps, run), 60, "its tests run")
        assert entry_of(apps, run)["state"] == "active"
    finally:
        objects.rmdir()
        gone.rename(objects)
    refused(apps, run)


def test_after_two_refused_pushes_a_correct_one_goes_live(
    apps: Fleet, gates: dict[str, Gate]
) -> None:
    twice = apps["twice"]
    for change in (one_fault, ten_faults):
        run = twice.go("v1", change=change)
        refused(apps, run)
        stopped(apps, run)
    run = twice.go("v2")
    gates["twice"].open()
    assert apps.ended(run, 90)["outcome"] == "deployed"
    assert twice.answer()["version"] == "v2"


def test_the_manifests_of_a_branch_that_is_only_tested_are_not_read(
    apps: Fleet, gates: dict[str, Gate]
) -> None:
    run = apps["branch"].go("v1", branch="feature/x", change=one_fault)
    gates["branch"].open()
    assert apps.ended(run, 60)["outcome"] == "tested"


# What a deploy commit could do to others.


@pytest.mark.parametrize("name", HARMFUL)
def test_a_first_deployment_that_could_harm_others_is_refused_and_makes_nothing(
    apps: Fleet, name: str
) -> None:
    def harm(objects: dict[str, Object]) -> None:
        path, fields = HARMFUL[name]
        place: Object = objects
        for key in path:
            place = place[key]
        place |= fields

    line = apps[name].deployed("v1", change=harm)
    assert (line["outcome"], line["reason"]) == ("failed", "ManifestRefused"), line
    assert not apps[name].leftovers()
    assert not apps[name].service()


def test_an_invalid_manifest_that_quotes_an_outage_is_red_and_its_correction_deployed(
    apps: Fleet,
) -> None:
    def quote(objects: dict[str, Object]) -> None:
        labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
        labels["why"] = "dial tcp 10.0.0.1:443: connect: connection refused"

    quotes = apps["quotes"]
    line = quotes.deployed("v1", change=quote)
    assert line["outcome"] == "failed", line
    assert quotes.deployed("v2")["outcome"] == "deployed"


def test_what_a_crashing_version_prints_is_in_no_place_where_others_may_look(apps: Fleet) -> None:
    words = "the value of a Secret, hunter2"

    def talk(objects: dict[str, Object]) -> None:
        (web,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
        web["command"] = ["sh", "-c", f"echo {words}; exit 7"]

    line = apps["talks"].deployed("v1", change=talk)
    assert (line["outcome"], line["reason"]) == ("failed", "CrashLoop"), line
    assert "hunter2" not in apps.log.read_text()
    assert "hunter2" not in apps.command("status", "--output", "json").stdout
    assert "hunter2" not in json.dumps([*apps.jobs().values()])


def test_every_container_of_a_test_has_a_limit_of_disk(apps: Fleet) -> None:
    run = apps["quick"].go("disk", branch="disk")
    eventually(lambda: f"test-{run}" in apps.jobs(), what="its Job is there")
    pod = apps.jobs()[f"test-{run}"]["spec"]["template"]["spec"]
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    limits = [container["resources"].get("limits", {}) for container in containers]
    assert all("ephemeral-storage" in limit for limit in limits), limits
    assert apps.ended(run)["outcome"] == "tested"
