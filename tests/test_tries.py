"""What ended by a circumstance is deployed by itself once that has passed; a verdict stays.

The real daemon on the stand-in cluster, with seconds between its tries in the place of minutes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet import APP, Fleet, Gate, fleet
from tests.hurried import hurried
from tests.standin.images import not_found_text
from tests.world import Object, eventually

REGISTRY = "registry.example.com/demo"
SECRET = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "late"}, "data": {}}
APPS = (
    "behind", "vanished", "crowded", "unpulled", "secretless", "occupied", "cloneless", "killed",
    "rolled", "red", "smoky",
)  # fmt: skip


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One application for each circumstance, and two for verdicts."""
    directory = tmp_path_factory.mktemp("tries")
    names: dict[str, Object] = {name: {"rollout_timeout": "6s", "bake": "1s"} for name in APPS}
    names["vanished"]["test"] = Gate(directory / "vanished").command
    names["red"]["test"] = "exit 1"
    program = hurried(directory, ROLLOUT_PER_REPLICA="5.0")
    with fleet(directory, names, program=program) as made:
        yield made


def ends(apps: Fleet, run: str) -> list[Object]:
    """Return the log lines of a run's ends so far."""
    return apps.said("run ended", run=run)


def deployed_by_itself(apps: Fleet, run: str, reason: str, seconds: float = 60.0) -> None:
    """Wait until a run that ended for a reason is deployed, and nothing has rejected its commit."""
    app = run.partition("-")[0]

    def over() -> bool:
        return bool(ends(apps, run)) and ends(apps, run)[-1]["outcome"] == "deployed"

    try:
        eventually(over, seconds, f"{run} is deployed by itself")
    except AssertionError as late:
        lines = [json.dumps(line) for line in apps.logged() if line.get("app") == app]
        raise AssertionError("\n".join([str(late), *lines[-30:]])) from None
    assert {line["reason"] for line in ends(apps, run)} == {reason, "Ok"}
    state = apps.cluster.store.get("configmaps", "orchestration", f"gitops-hook-{app}")["data"]
    assert not [key for key in state if key.startswith("rejected-")]


def ended(apps: Fleet, run: str, reason: str, seconds: float = 60.0) -> Object:
    """Wait until a run has ended for a reason; return the log line."""
    line = apps.ended(run, seconds)
    assert line["reason"] == reason, line
    return line


def quota(apps: Fleet, **hard: str) -> None:
    """Let the quota of production be full, or no longer."""
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}}
    verb = ("apply", "-f", "-") if hard else ("delete", "--ignore-not-found", "-f", "-")
    done = apps.kubectl(
        *verb, "-n", "production", stdin=json.dumps({**body, "spec": {"hard": hard}})
    )
    assert done.code == 0, done


def test_two_pushes_are_not_lost_while_the_git_server_shows_the_state_before_both(
    apps: Fleet,
) -> None:
    app = apps["behind"]
    base = app.release("v0")
    ended(apps, app.push(base), "Ok")
    first = app.commit("v1")
    runs = [app.push(first, before=base)]
    second = app.commit("v2")
    runs.append(app.push(second, before=first))
    waits = "for the head of the branch"
    for run in runs:
        eventually(
            lambda run=run: waits in json.dumps(apps.jobs().get(f"test-{run}", {})),
            30, f"{run} waits for the git server",
        )  # fmt: skip
    assert not [line for run in runs for line in ends(apps, run)]
    app.repository.git("push", "-q", "origin", "main")
    ended(apps, runs[1], "Ok")
    assert app.answer()["version"] == "v2"
    assert ended(apps, runs[0], "NotHead")["outcome"] == "superseded"


def test_a_test_job_that_someone_deleted_is_made_again(apps: Fleet) -> None:
    app = apps["vanished"]
    gate = apps.directory / "vanished"
    run = app.go("v1")
    eventually(lambda: not apps.jobs().get(f"test-{run}", {}).get("spec", {}).get("suspend", True))
    assert apps.kubectl("delete", "job", f"test-{run}", "-n", "test").code == 0
    ended(apps, run, "Vanished")
    eventually(lambda: apps.said("tried again", run=run), 30, "the next try")

    def only_the_new_pod() -> bool:
        pods = apps.cluster.store.list("pods", "test")
        own = [p for p in pods if p["metadata"]["labels"].get("gitops-hook/run") == run]
        return len(own) == 1 and "deletionTimestamp" not in own[0]["metadata"]

    eventually(only_the_new_pod, 30, "the pod of the deleted Job is gone, and another there")
    (gate / "pass").mkdir()
    deployed_by_itself(apps, run, "Vanished")


def test_a_full_quota_ends_no_head_for_good(apps: Fleet) -> None:
    guest = {"name": "web", "image": apps.image, "env": [{"name": "VERSION", "value": "guest"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "guest"}}
    text = json.dumps({**pod, "spec": {"containers": [guest]}})
    assert apps.kubectl("create", "-n", "production", "-f", "-", stdin=text).code == 0
    # as much as is requested, and all of it used: whoever waits may get some
    quota(apps, pods="1")
    try:
        run = apps["crowded"].go("v1")
        line = ended(apps, run, "QuotaExceeded")
        assert (line["outcome"], line["tries"]) == ("failed", 1)
        assert line["next_try"] > 0
    finally:
        quota(apps)
    deployed_by_itself(apps, run, "QuotaExceeded")


def missing_image(apps: Fleet, name: str) -> str:
    """Return an image that the registry does not have until it is mended."""
    source = apps.directory / "image"
    start = ["python", "server.py"]
    digest = apps.cluster.images.add(f"{REGISTRY}/{name}:1", source, cmd=start, workdir="/app")
    image = f"{REGISTRY}/{name}@{digest}"
    apps.cluster.images.break_pull(image, not_found_text(image))
    return image


def test_an_image_that_comes_later_is_enough(apps: Fleet) -> None:
    image = missing_image(apps, "late")
    run = apps["unpulled"].go("v1", image=image)
    ended(apps, run, "ImageNotFound")
    apps.cluster.images.break_pull(image, None)
    deployed_by_itself(apps, run, "ImageNotFound")


def test_a_secret_that_is_made_afterwards_is_enough(apps: Fleet) -> None:
    app = apps["secretless"]

    def name_secret(objects: dict[str, Object]) -> None:
        (web,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
        web["envFrom"].append({"secretRef": {"name": "late"}})

    run = app.go("v1", change=name_secret)
    ended(apps, run, "ContainerConfigError")
    done = apps.kubectl("create", "-n", "production", "-f", "-", stdin=json.dumps(SECRET))
    assert done.code == 0, done
    deployed_by_itself(apps, run, "ContainerConfigError")


def test_a_name_that_was_taken_is_used_once_it_is_free(apps: Fleet) -> None:
    app = apps["occupied"]
    where = ("service", "occupied-preview", "-n", "production")
    spec = {"ports": [{"port": 80}], "selector": {"app": "other"}}
    other = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": where[1]}, "spec": spec}
    made = apps.kubectl("create", "-n", "production", "-f", "-", stdin=json.dumps(other))
    assert made.code == 0, made
    run = app.go("v1")
    ended(apps, run, "AdoptionRefused")
    eventually(lambda: len(ends(apps, run)) > 1, 30, "the next try has ended")
    # what is seen without it does not touch the idle colour again
    assert len(apps.said("claimed", run=run)) == 1
    # the first deployment has nothing to go back to, and leaves what belongs to someone else
    assert apps.kubectl("delete", *where).code == 0
    deployed_by_itself(apps, run, "AdoptionRefused")


def test_a_daemon_that_is_killed_between_two_tries_goes_on_with_the_next(apps: Fleet) -> None:
    image = missing_image(apps, "killed")
    run = apps["killed"].go("v1", image=image)
    first = ended(apps, run, "ImageNotFound")
    apps.kill()
    (status,) = [r for r in apps.status()["runs"] if r["run"] == run]
    assert (status["tries"], status["next_try"] > 0) == (1, True)
    assert status["advice"].startswith("Push the image, correct its name")
    told = apps.command("explain", run).stdout
    assert status["advice"] in told
    assert re.search(r"next_try: *Try 2 (now|in \d+s), if it is still the head\.", told)
    assert f"{status['advice']}" in " ".join(apps.command("status", "killed").stdout.split())
    apps.cluster.images.break_pull(image, None)
    apps.start()
    deployed_by_itself(apps, run, "ImageNotFound")
    assert ends(apps, run)[0] == first
    assert apps.created(f"test-{run}") == 1  # green tests are used again


def test_a_deployment_that_lost_its_claim_to_a_rollback_waits_for_the_person(apps: Fleet) -> None:
    app = apps["rolled"]
    for version in ("v1", "v2"):
        assert app.deployed(version)["outcome"] == "deployed"
    app.quiet()
    fault = apps.fault("hang", "update", "deployments", name=f"rolled-{app.idle()}", times=1)
    run = app.go("v3")
    eventually(lambda: apps.cluster.faults.holds(fault), 40, "its Deployment is written")
    done = apps.command("rollback", "rolled")
    apps.cluster.faults.lift(fault)
    assert done.returncode == 0, done
    line = ended(apps, run, "ClaimLost")
    assert (line["outcome"], "next_try" in line) == ("superseded", False)
    assert app.answer()["version"] == "v1"
    assert apps.command("rerun", run).returncode == 0
    eventually(lambda: ends(apps, run)[-1]["outcome"] == "deployed", 60, "it is tried again")
    assert app.answer()["version"] == "v3"


def test_a_commit_that_cannot_be_cloned_is_cloned_later(tmp_path: Path) -> None:
    images = {"hook": "gitops-hook:dev"}
    program = hurried(tmp_path)
    with fleet(tmp_path, ["shop"], program=program, images=images) as made:
        app = made["shop"]
        commit = app.release("v1")
        objects = app.repository.bare / "objects"
        objects.rename(objects.with_name("gone"))  # heads are listed, and nothing can be fetched
        objects.mkdir()
        run = app.push(commit)
        try:
            ended(made, run, "CloneFailed", 120)
        finally:
            objects.rmdir()
            objects.with_name("gone").rename(objects)
        deployed_by_itself(made, run, "CloneFailed", 90)


def test_an_image_that_a_registry_did_not_take_is_built_later(tmp_path: Path) -> None:
    images = {"hook": "gitops-hook:dev"}
    dockerfile = "FROM python:3.12-slim\nWORKDIR /app\nCOPY server.py /app/\n"
    files = {"Dockerfile": dockerfile + 'CMD ["python", "server.py"]\n', "server.py": APP}
    shop: Object = {"build": {"image": f"{REGISTRY}/built"}, "bake": "1s"}
    with fleet(tmp_path, {"shop": shop}, program=hurried(tmp_path), images=images) as made:
        refusal = 'Put "https://registry.example.com/v2/": dial tcp: connect: connection refused'
        made.cluster.images.break_push(refusal)
        run = made["shop"].go("v1", files=files)
        line = ended(made, run, "RegistryUnavailable")
        assert (line["outcome"], line["stage"]) == ("failed", "build")
        log = made.command("explain", run, "--log").stdout
        assert f"error pushing image: failed to push to destination {REGISTRY}/built" in log
        made.cluster.images.break_push(None)
        deployed_by_itself(made, run, "RegistryUnavailable", 90)
        assert made.created(f"test-{run}") == 1


def test_a_verdict_is_not_tried_again(apps: Fleet) -> None:
    red, smoky, other = apps["red"], apps["smoky"], apps["unpulled"]
    runs = {red.go("v1"): "TestsFailed", smoky.go("v1", modes="smoke-fails"): "SmokeFailed"}
    for run, reason in runs.items():
        assert "next_try" not in ended(apps, run, reason)
    planned = apps.command("plan", "red").stdout
    assert "rejected: no, but its run ended failed at test: TestsFailed; `rerun red-" in planned
    planned = apps.command("plan", "smoky").stdout
    assert "rejected: SmokeFailed; only `rerun smoky-" in planned
    waiting = other.go("v2", image=missing_image(apps, "never"))
    eventually(lambda: len(ends(apps, waiting)) > 2, 90, "another is tried three times")
    for run in runs:
        assert len(ends(apps, run)) == 1
        assert apps.created(f"test-{run}") == 1
