"""What a deployment does to an environment, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.fleet import MISSING_IMAGE, STAGE, Fleet, Member, fleet
from tests.standin.kubectl import find_kubectl
from tests.world import Object, eventually

APPS: dict[str, Object] = {
    "image": {},
    "crash": {},
    "discreet": {"log_tails": False},
    "smoke": {},
    "shop": {"drain": "2s"},
    "sick": {"bake": "5s"},
    "both": {"bake": "5s"},
    "edited": {"bake": "3s"},
}
RUN = "gitops-hook/run"
USER = "system:serviceaccount:orchestration:orchestration-sa"  # of whom the commands are
LIVE = ("shop", "sick", "both", "edited")


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, none of them deployed yet."""
    with fleet(tmp_path_factory.mktemp("deploy"), APPS) as made:
        yield made


@pytest.fixture(scope="module")
def failing(apps: Fleet) -> dict[str, str]:
    """First deployments that are going to fail, each in its own way; their runs."""
    modes = {"crash": "crash-at-start", "discreet": "crash-at-start", "smoke": "smoke-fails"}
    return {name: apps[name].go("v1", modes=mode) for name, mode in modes.items()}


@pytest.fixture(scope="module")
def live(apps: Fleet, failing: dict[str, str]) -> Fleet:
    """The same, with a first version live of those that go further."""
    runs = [apps[name].go("v1") for name in LIVE]
    assert {apps.ended(run, 90)["outcome"] for run in runs} == {"deployed"}
    return apps


# A first deployment that fails.


def test_an_image_that_does_not_exist_is_red_before_the_time_of_its_rollout_is_over(
    apps: Fleet,
) -> None:
    ended = apps["image"].deployed("v1", image=MISSING_IMAGE)
    assert (ended["outcome"], ended["reason"]) == ("failed", "ImageNotFound")
    claimed, end = (
        datetime.fromisoformat(line["ts"])
        for line in (apps.said("claimed", run=ended["run"])[0], ended)
    )
    assert (ended["stage"], (end - claimed).seconds < 30) == ("production", True)
    assert MISSING_IMAGE in ended["detail"]


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize(("name", "reason"), [("crash", "CrashLoop"), ("smoke", "SmokeFailed")])
def test_a_first_version_that_is_bad_is_red_with_the_reason(
    apps: Fleet, failing: dict[str, str], name: str, reason: str
) -> None:
    ended = apps.ended(failing[name])
    assert (ended["outcome"], ended["reason"], ended["stage"]) == ("failed", reason, "production")


WORDS = "cannot log in with"


def kept(apps: Fleet, run: str, namespace: str = "production") -> Object:
    """The log that is kept of a run."""
    found = apps.cluster.store.find("configmaps", namespace, f"log-{run}")
    return found or {}


@pytest.mark.usefixtures("live")
def test_what_a_crashing_container_printed_is_kept_masked_beside_it_and_nowhere_else(
    apps: Fleet, failing: dict[str, str]
) -> None:
    run = failing["crash"]
    apps.ended(run)
    log = eventually(lambda: kept(apps, run), 20, "the log is kept")
    ((key, text),) = log["data"].items()
    assert re.fullmatch(r"crash-(blue|green)-\w+-\w+\.web", key)
    assert text == f"{WORDS} password=***"
    assert log["metadata"]["labels"] == {
        "app.kubernetes.io/managed-by": "gitops-hook",
        "gitops-hook/app": "crash",
        "gitops-hook/run": run,
        "gitops-hook/stage": "log",
    }
    assert WORDS not in apps.log.read_text()
    status = apps.command("status", "--output", "json").stdout
    assert WORDS not in status
    assert "crash" in status
    for resource in ("configmaps", "deployments", "events", "jobs", "services"):
        for namespace in ("orchestration", "test", "build", "staging", "production"):
            found = apps.cluster.store.list(resource, namespace)
            stages = [(o["metadata"].get("labels") or {}).get(STAGE) for o in found]
            others = [o for o, stage in zip(found, stages, strict=True) if stage != "log"]
            assert WORDS not in json.dumps(others), (resource, namespace)


@pytest.mark.usefixtures("live")
def test_what_a_version_printed_that_failed_its_smoke_test_is_kept_too(
    apps: Fleet, failing: dict[str, str]
) -> None:
    log = eventually(lambda: kept(apps, failing["smoke"]), 20, "the log is kept")
    (text,) = log["data"].values()
    assert text.startswith("listening as v1")


@pytest.mark.usefixtures("live")
def test_a_log_that_shall_not_be_kept_is_not(apps: Fleet, failing: dict[str, str]) -> None:
    run = failing["discreet"]
    assert apps.ended(run)["reason"] == "CrashLoop"
    eventually(lambda: not apps["discreet"].leftovers(), 20, "nothing is left")
    assert not kept(apps, run)
    assert "no log is kept" in apps.command("explain", run, "--log").stdout


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize("name", ["image", "crash", "smoke"])
def test_a_first_deployment_that_failed_leaves_nothing_half_made(apps: Fleet, name: str) -> None:
    eventually(lambda: not apps[name].leftovers(), 20, "nothing is left")


# A deployment onto a live version.


def test_traffic_moves_to_the_new_version_without_a_failed_request(live: Fleet) -> None:
    shop = live["shop"]
    with shop.traffic() as traffic:
        ended = shop.deployed("v2")
        shop.quiet()
    assert (ended["outcome"], traffic.failures, traffic.versions) == ("deployed", [], ["v1", "v2"])
    ours = {"gitops-hook/app": "shop", "version": "green", "gitops-hook/run": ended["run"]}
    assert shop.selector == ours
    assert shop.note("previous-selector")["version"] == "blue"
    outcomes = [(e["colour"], e["outcome"]) for e in shop.note("history")]
    assert outcomes == [("green", "deployed"), ("blue", "deployed")]


def test_after_the_drain_the_old_colour_is_restarted_and_stays_a_target(live: Fleet) -> None:
    shop = live["shop"]
    eventually(lambda: restarted(shop, "blue"), 30, "the old colour is restarted")
    shop.stands("blue", "v1")


def restarted(app: Member, colour: str) -> bool:
    """Whether a colour was restarted as `kubectl rollout restart` does it."""
    template = app.objects("deployments")[f"{app.name}-{colour}"]["spec"]["template"]
    return "kubectl.kubernetes.io/restartedAt" in (template["metadata"].get("annotations") or {})


def test_each_version_keeps_the_settings_it_was_pushed_with(live: Fleet) -> None:
    said = {a["version"]: a["greeting"] for a in live["shop"].tell("")}
    assert said == {"v1": "hello from v1", "v2": "hello from v2"}


def test_a_version_that_crashes_at_start_is_red_without_its_last_words(live: Fleet) -> None:
    shop = live["shop"]
    with shop.traffic() as traffic:
        ended = shop.deployed("v3", modes="crash-at-start")
    assert (ended["outcome"], ended["reason"]) == ("failed", "CrashLoop")
    assert re.fullmatch(r"container web of \S+ ended \d times, last with .*", ended["detail"])
    assert "hunter2" not in live.log.read_text()
    assert (traffic.failures, traffic.versions) == ([], ["v2"])


def test_the_rollback_target_that_it_overwrote_is_restored(live: Fleet) -> None:
    shop = live["shop"]
    shop.quiet()
    shop.stands("blue", "v1")


def test_releases_and_copies_that_nothing_names_are_deleted(live: Fleet) -> None:
    shop = live["shop"]
    named = {e["release"] for e in shop.note("history")}

    def releases() -> set[str]:
        return {name for name in shop.objects("configmaps") if name.startswith("shop-release-")}

    eventually(lambda: releases() == named, 20, "only the releases in the history are left")


def test_rollback_then_serves_the_version_before_and_never_the_failed_one(live: Fleet) -> None:
    shop = live["shop"]
    with shop.traffic() as traffic:
        done = live.command("rollback", "shop", "--reason", "too slow")
        assert done.returncode == 0, done
        eventually(lambda: "v1" in traffic.versions, 5, "v1 serves")
    assert (traffic.failures, traffic.versions) == ([], ["v2", "v1"])


def test_the_daemon_tells_of_a_rollback_that_a_command_made(live: Fleet) -> None:
    old, new = (e["run"] for e in live["shop"].note("history")[::-1])
    told = {"run": new, "live": old, "detail": "too slow", "by": USER, "level": "warning"}
    eventually(lambda: live.said("rolled back", app="shop", **told), 10, "the daemon has seen it")
    labels = {"app": "shop", "environment": "production", "direction": "rollback"}
    assert live.metric("gitops_hook_switches_total", **labels) == 1


def test_kubectl_describe_reads_like_the_story(live: Fleet) -> None:
    old, new = (e["run"] for e in live["shop"].note("history")[::-1])
    went_live = [
        f"Switched: The traffic goes to run {new}.",
        f"Deployed: Run {new} is live, and stays.",
    ]
    second = [f"Claimed: Run {new} is being deployed.", *went_live]
    left = f"RolledBack: {USER} rolled back from run {new}: too slow"
    eventually(lambda: left in described(live, "service", "shop"), 10, "it is told")
    story = described(live, "service", "shop")
    # within a second, which is all that the API keeps, kubectl has no order
    assert sorted(story[:2]) == sorted(line.replace(new, old) for line in went_live)
    assert sorted(story[2:5]) == sorted(second)
    failed = [line.partition(":")[0] for line in story[5:-1]]
    assert (failed[0], sorted(failed[1:])) == ("Claimed", ["CrashLoop", "Restored"])
    assert story[-1] == left
    # a Deployment carries its run a moment after the claim
    story = described(live, "deployment", "shop-green")
    seen = [line for line in story if not line.startswith("Claimed")]
    assert (sorted(seen[:-1]), seen[-1]) == (sorted(went_live), left)


def described(apps: Fleet, kind: str, name: str) -> list[str]:
    """What `kubectl describe` shows of our Events in production: reason and message of each."""
    argv = [find_kubectl(), "describe", kind, name, "-n", "production"]
    environ = {**os.environ, "KUBECONFIG": str(apps.cluster.kubeconfig())}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environ)
    rows = re.findall(r"(?m)^ +\w+ +(\w+) +\S+ +gitops-hook +(.*)$", done.stdout)
    return [f"{reason}: {message}" for reason, message in rows]


# After the switch.


def test_a_version_that_turns_sick_is_switched_back_within_seconds(live: Fleet) -> None:
    sick = live["sick"]
    with sick.traffic() as traffic:
        run = sick.go("v2")
        sick.switched(run)
        turned = time.monotonic()
        sick.tell("v2", "/turn-sick")
        ended = live.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("switched-back", "UnhealthyAfterSwitch")
    assert "/ready failed 3 times in a row: status 503" in ended["detail"]
    assert (traffic.failures, traffic.versions) == ([], ["v1", "v2", "v1"])
    assert max(at for at, version in traffic.seen if version == "v2") - turned < 3


def test_the_sick_colour_is_scaled_to_nothing_and_its_commit_rejected(live: Fleet) -> None:
    sick = live["sick"]
    eventually(lambda: not sick.pods("v2"), 20, "the sick pods are gone")
    sick.quiet()
    live.deliver(sick.repository.bare, "refs/heads/main", sick.repository.git("rev-parse", "HEAD"))
    refused = {"app": "sick", "reason": "Rejected"}
    eventually(lambda: live.said("push needs nothing", **refused), 10, "the push asks for nothing")


def test_a_container_that_ends_after_the_switch_is_switched_back(live: Fleet) -> None:
    sick = live["sick"]
    with sick.traffic() as traffic:
        run = sick.go("v3")
        sick.switched(run)
        sick.tell("v3", "/exit")
        ended = live.ended(run)
        eventually(lambda: traffic.versions[-1] == "v1", 5, "v1 serves")
    assert (ended["outcome"], ended["reason"]) == ("switched-back", "UnhealthyAfterSwitch")
    assert "exit code 3" in ended["detail"]


def test_with_both_versions_sick_traffic_stays(live: Fleet) -> None:
    both = live["both"]
    run = both.go("v2")
    both.switched(run)
    both.tell("v1", "/turn-sick")
    both.tell("v2", "/turn-sick")
    ended = live.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("failed", "BothUnhealthy")
    both.quiet()
    assert both.selector[RUN] == run
    ledger = live.cluster.store.find("configmaps", "orchestration", "gitops-hook-both") or {}
    assert not [key for key in ledger["data"] if key.startswith("rejected-")]


def test_what_stayed_although_sick_is_gone_back_to_when_it_is_well_again(live: Fleet) -> None:
    both = live["both"]
    both.tell("", "/turn-well")
    run = both.go("v3")
    both.switched(run)
    both.tell("v3", "/turn-sick")
    ended = live.ended(run)
    assert (ended["outcome"], both.answer()["version"]) == ("switched-back", "v2")


# Someone else changes the Service.


def edit_selector(app: Member, **selector: str | None) -> None:
    """Let a person change what the live Service selects; None takes a key away."""
    patch = json.dumps({"spec": {"selector": selector}})
    args = ("patch", "service", app.name, "-n", app.namespace, "--type=merge", "-p", patch)
    done = app.fleet.kubectl(*args, "--field-manager=kubectl-edit")
    assert done.code == 0, done


def test_a_service_edited_before_the_switch_is_left_alone_and_the_editor_named(live: Fleet) -> None:
    edited = live["edited"]
    before = live.metric("gitops_hook_selector_drift_total", app="edited")
    run = edited.go("v2")
    with live.held("patch", "services", name="edited-preview"):
        edit_selector(edited, **{RUN: None})
    ended = live.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("failed", "SelectorChanged")
    assert "kubectl-edit" in ended["detail"]
    edited.quiet()
    assert live.metric("gitops_hook_selector_drift_total", app="edited") == before + 1
    assert (edited.answer()["version"], RUN in edited.selector) == ("v1", False)


def test_the_next_push_takes_over_what_the_editor_left(live: Fleet) -> None:
    edited = live["edited"]
    with edited.traffic() as traffic:
        ended = edited.deployed("v3")
    assert (ended["outcome"], traffic.failures, traffic.versions) == ("deployed", [], ["v1", "v3"])


def test_a_service_edited_during_the_bake_is_left_alone(live: Fleet) -> None:
    edited = live["edited"]
    edited.quiet()
    old = edited.selector
    run = edited.go("v4")
    edited.switched(run)
    edit_selector(edited, **old)
    ended = live.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("superseded", "SelectorChanged")
    assert "kubectl-edit" in ended["detail"]
    assert (edited.selector, edited.answer()["version"]) == (old, "v3")
