"""What hurts the users of comparable tools does not happen here, or is told within seconds.

The pains are real reports; what is not here stands where the behaviour is tested.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests

from tests.fleet import Fleet, Member, fleet
from tests.world import Object, eventually

APPS: dict[str, Object] = {
    "trap": {},
    "broken": {"rollout_timeout": "6s"},
    "size": {},
    "kept": {},
    "empty": {},
}


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications, a first version of each live."""
    with fleet(tmp_path_factory.mktemp("pains"), APPS) as made:
        runs = [made[name].go("first", modes="patient") for name in APPS]
        assert {made.ended(run, 90)["outcome"] for run in runs} == {"deployed"}
        yield made


def test_rollback_serves_the_last_good_version_and_not_what_failed_in_its_colour(
    apps: Fleet,
) -> None:
    trap = apps["trap"]
    assert trap.deployed("second")["outcome"] == "deployed"
    trap.quiet()
    trap.stands("blue", "first")
    run = trap.go("third", modes="crash-at-start")
    # the failed version stays where it is: its colour is healed by nobody before `rollback` comes
    with apps.held("update", "deployments", name="trap-blue", body_contains="first"):
        assert apps.ended(run)["outcome"] == "failed"
        apps.kill()
    assert trap.pods("third")
    with trap.traffic() as traffic:
        done = apps.command("rollback", "trap")
        assert done.returncode == 0, done
        eventually(lambda: traffic.versions[-1:] == ["first"], 10, "the first version serves")
    apps.start()
    assert (traffic.failures, traffic.versions) == ([], ["second", "first"])
    assert trap.answer()["greeting"] == "hello from first"


def test_a_second_broken_version_is_red_as_soon_as_the_first(apps: Fleet) -> None:
    broken = apps["broken"]
    with broken.traffic() as traffic:
        for version in ("bad-1", "bad-2"):
            began = time.monotonic()
            ended = broken.deployed(version, modes="crash-at-start")
            assert (ended["outcome"], ended["reason"]) == ("failed", "CrashLoop")
            assert time.monotonic() - began < 20
    assert (traffic.failures, traffic.versions) == ([], ["first"])


def test_a_good_version_is_not_judged_by_the_pods_of_the_broken_one_before(apps: Fleet) -> None:
    broken = apps["broken"]
    assert broken.deployed("bad-3", modes="crash-at-start")["outcome"] == "failed"
    assert broken.deployed("good")["outcome"] == "deployed"


def test_ready_pods_of_another_version_are_no_proof_of_a_new_one(apps: Fleet) -> None:
    broken = apps["broken"]
    broken.quiet()
    broken.stands(broken.idle(), "first")
    with broken.traffic() as traffic:
        ended = broken.deployed("never", modes="never-ready")
    assert (ended["outcome"], ended["reason"]) == ("failed", "NeverReady")
    assert (traffic.failures, traffic.versions) == ([], ["good"])
    broken.stands(broken.idle(), "first")


def test_a_new_version_of_another_size_does_not_scale_the_one_that_serves(apps: Fleet) -> None:
    size = apps["size"]

    def three(objects: dict[str, Object]) -> None:
        objects["Deployment"]["spec"]["replicas"] = 3

    before = size.objects("deployments")["size-blue"]["spec"]
    run = size.go("second", change=three)
    with apps.held("patch", "services", name="size-preview"):
        assert size.objects("deployments")["size-green"]["spec"]["replicas"] == 3
        assert size.objects("deployments")["size-blue"]["spec"] == before
    size.switched(run)
    assert size.objects("deployments")["size-blue"]["spec"] == before
    assert apps.ended(run)["outcome"] == "deployed"


def test_an_invalid_manifest_is_red_whatever_its_texts_say_and_is_corrected_by_a_push(
    apps: Fleet,
) -> None:
    size = apps["size"]

    def hostile(objects: dict[str, Object]) -> None:
        text = 'connection refused\nError from server (ServiceUnavailable): "etcd timed out"'
        objects["Deployment"]["metadata"]["labels"] = {"note": text}

    ended = size.deployed("hostile", change=hostile)
    assert (ended["outcome"], ended["reason"]) == ("failed", "ManifestInvalid")
    assert size.deployed("corrected")["outcome"] == "deployed"


def test_manifests_that_are_too_large_are_red_and_corrected_by_a_push(apps: Fleet) -> None:
    size, many = apps["size"], {f"deploy/{i}.yaml": "# comment\n" * 50_000 for i in range(5)}
    ended = size.deployed("large", files=many)
    assert (ended["outcome"], ended["reason"]) == ("failed", "ManifestInvalid")
    assert "more than 2 MiB together" in ended["detail"]
    size.repository.git("rm", "-q", *many)
    files = {f"deploy/more/{i}.txt": f"{i}" for i in range(501)}
    ended = size.deployed("many", files=files)
    assert (ended["outcome"], ended["reason"]) == ("failed", "ManifestRefused")
    assert "it has 502 files. Put the manifests into a folder of their own." in ended["detail"]
    size.repository.git("rm", "-q", "-r", "deploy/more")
    assert size.deployed("small")["outcome"] == "deployed"


@contextmanager
def kept_connection(app: Member) -> Iterator[list[str]]:
    """Ask all the time on one connection while the server keeps it; what answered, in turn."""
    spec, seen, stop = app.service()["spec"], list[str](), threading.Event()
    url = f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}/"

    def ask() -> None:
        with requests.Session() as session:
            while not stop.wait(0.05):
                try:
                    said = str(session.get(url, timeout=5).json()["version"])
                except requests.RequestException as failed:
                    said = repr(failed)
                seen.extend([said] if seen[-1:] != [said] else [])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(10)


def test_a_kept_connection_reaches_the_new_version_after_the_drain(apps: Fleet) -> None:
    kept = apps["kept"]
    with kept_connection(kept) as seen:
        assert kept.deployed("second", modes="patient")["outcome"] == "deployed"
        eventually(lambda: seen[-1:] == ["second"], 20, "the connection has moved")
    assert seen == ["first", "second"]


def test_a_switch_that_no_endpoints_follow_is_put_back(apps: Fleet) -> None:
    empty = apps["empty"]

    def touchy(objects: dict[str, Object]) -> None:
        container = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]
        container["readinessProbe"]["failureThreshold"] = 1

    def unready() -> Any:
        conditions = [c for p in empty.pods("second") for c in p["status"]["conditions"]]
        return [c for c in conditions if (c["type"], c["status"]) == ("Ready", "False")]

    run = empty.go("second", change=touchy)
    with apps.held("patch", "services", name="empty", body_contains="baking"):
        empty.tell("second", "/turn-sick")
        eventually(unready, 10, "no pod of the new version is ready")
    ended = apps.ended(run)
    # its health path fails as well, which is seen before the endpoints had their time
    assert (ended["outcome"], ended["reason"]) == ("switched-back", "UnhealthyAfterSwitch")
    assert empty.answer()["version"] == "first"
