"""The live Service: what is live, what comes of it when someone else changes it, the way back."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gitops_hook as hook
from tests.fleet import Fleet, Member, apply_service, fleet
from tests.world import Object, eventually

RUN = "gitops-hook/run"
APPS: dict[str, Object] = {
    "applied": {"bake": "3s"},
    "again": {"bake": "3s"},
    "broken": {"bake": "3s"},
    "quick": {"rollout_timeout": "5s"},
    "hasty": {"rollout_timeout": "60s"},
    "forth": {"bake": "1s", "rollout_timeout": "5s"},
    "slow": {"bake": "20s"},
    "raced": {"bake": "20s"},
    "further": {"bake": "8s"},
    "emptied": {"bake": "1s", "retain": 0},
    "both": {"bake": "1s", "environments": ["staging", "production"]},
}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Several applications on one cluster, a first version live of each."""
    with fleet(tmp_path_factory.mktemp("live"), APPS) as made:
        runs = [made[name].go("v1") for name in APPS]
        assert {made.ended(run, 90)["outcome"] for run in runs} == {"deployed"}
        yield made


# What a switch carries of a Service.


KEYS = st.sampled_from(["app", "team", "a.example.com/x", "a.example.com/y", "note"])
TEXTS = st.dictionaries(KEYS, st.sampled_from(["", "one", "two"]), max_size=4)
PORT = st.fixed_dictionaries(
    {"port": st.integers(80, 83), "name": st.sampled_from(["http", "admin", "grpc"])},
    optional={
        "protocol": st.sampled_from(["TCP", "UDP"]),
        "targetPort": st.sampled_from(["http", 8080]),
        "appProtocol": st.sampled_from(["http", "kubernetes.io/h2c"]),
    },
)
SPEC = st.fixed_dictionaries(
    {"ports": st.lists(PORT, min_size=1, max_size=3, unique_by=lambda port: port["name"])},
    optional={
        "sessionAffinity": st.sampled_from(["None", "ClientIP"]),
        "sessionAffinityConfig": st.just({"clientIP": {"timeoutSeconds": 600}}),
        "internalTrafficPolicy": st.sampled_from(["Cluster", "Local"]),
        "trafficDistribution": st.sampled_from(["PreferClose", "PreferSameNode"]),
    },
)


def as_service(labels: Object, annotations: Object, spec: Object) -> Object:
    """A Service of ours, with these labels and annotations of others."""
    ours = {"gitops-hook/app": "shop", "app.kubernetes.io/managed-by": "gitops-hook"}
    meta = {"labels": {**labels, **ours}, "annotations": {**annotations, "gitops-hook/history": ""}}
    return {"metadata": {"name": "shop", "resourceVersion": "1", **meta}, "spec": spec}


SERVICES = st.builds(as_service, TEXTS, TEXTS, SPEC)


def merged(old: object, patch: object) -> object:
    """Apply a merge patch (RFC 7386), as the API server does."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        result[key] = merged(result.get(key), value)
    return {key: value for key, value in result.items() if value is not None}


def patched(service: Object, patch: hook.ServiceFields) -> Object:
    """A Service after a patch of such fields."""
    meta = {"labels": patch.labels, "annotations": patch.annotations}
    result = merged(service, {"metadata": meta, "spec": patch.spec})
    assert isinstance(result, dict)
    return result


def outside(service: Object) -> Object:
    """A Service with the node ports that the cluster would give it."""
    ports = [{**p, "nodePort": 30000 + n} for n, p in enumerate(service["spec"]["ports"])]
    return {**service, "spec": {**service["spec"], "type": "NodePort", "ports": ports}}


@given(SERVICES.map(outside), SERVICES, SERVICES)
@settings(deadline=None)
def test_a_switch_and_its_way_back_leave_a_service_as_it_was_and_what_others_wrote_untouched(
    live: Object, before: Object, wanted: Object
) -> None:
    fields = hook.ServiceFields.of
    goal = fields(wanted).fitted(live["spec"])
    patch = fields(before).patch_to(goal)
    after = patched(live, patch)
    for part in ("labels", "annotations"):
        left = fields(before).to_json()[part].keys() - fields(wanted).to_json()[part].keys()
        ours = fields(wanted).to_json()[part]
        others = {
            key: value for key, value in live["metadata"][part].items() if key not in {*left, *ours}
        }
        assert after["metadata"][part] == {**others, **ours}
    assert fields(after).spec == goal.spec
    undo = hook.ServiceFields.from_json(
        json.loads(json.dumps(fields(live).changed_by(patch).to_json()))
    )
    back = patched(after, undo.fitted(after["spec"]))
    assert back["metadata"] == live["metadata"]
    assert fields(back) == fields(live)


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"labels": {"gitops-hook/app": "other"}, "annotations": {"gitops-hook/history": "[]"}},
        {"labels": {"team": 5}, "annotations": ["x"], "spec": {"type": "ExternalName"}},
        {"spec": {"ports": [{"port": "80"}]}},
        {"spec": {"selector": {"app": "other"}}},
    ],
)
def test_what_undoes_a_switch_touches_nothing_else_whatever_is_written_there(data: object) -> None:
    assert not hook.ServiceFields.from_json(data)


BALANCER = {"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}
BALANCER |= {"allocateLoadBalancerNodePorts": True}


@pytest.mark.parametrize(
    ("now", "wanted", "changes"),
    [
        ({"type": "ClusterIP"}, {}, {}),
        ({"type": "ClusterIP"}, {"type": "NodePort"}, {"type": "NodePort"}),
        ({"type": "NodePort", "externalTrafficPolicy": "Local"}, {}, {"type": "ClusterIP"}),
        (BALANCER, {"type": "LoadBalancer"}, {}),
        (
            {"type": "ClusterIP"},
            {"type": "LoadBalancer", "loadBalancerClass": "example.com/a"},
            {**BALANCER, "loadBalancerClass": "example.com/a"},
        ),
        (
            {**BALANCER, "loadBalancerIP": "10.0.0.9", "loadBalancerSourceRanges": ["10.0.0.0/8"]},
            {"type": "LoadBalancer", "loadBalancerSourceRanges": ["10.1.0.0/16"]},
            {"loadBalancerIP": None, "loadBalancerSourceRanges": ["10.1.0.0/16"]},
        ),
        (
            BALANCER,
            {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False},
            {"allocateLoadBalancerNodePorts": False},
        ),
        (
            {"type": "ClusterIP", "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"},
            {"ipFamilyPolicy": "PreferDualStack"},
            {"ipFamilyPolicy": "PreferDualStack"},
        ),
        (
            {"type": "ClusterIP", "ports": [{"name": "http", "port": 80}]},
            {"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30001}]},
            {"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30001}]},
        ),
    ],
    ids=[
        *("nothing", "node-port", "inside", "same-balancer", "balancer", "ranges", "no-ports"),
        *("dual-stack", "chosen-port"),
    ],
)  # fmt: skip
def test_confirming_a_version_changes_what_gives_a_service_other_addresses(
    now: Object, wanted: Object, changes: Object
) -> None:
    result = hook.confirmed_changes(now, wanted)
    policy = result.pop("externalTrafficPolicy", "none")
    assert result == {key: v for key, v in changes.items() if key != "externalTrafficPolicy"}
    outside = wanted.get("type", "ClusterIP") != "ClusterIP"
    stays = now.get("externalTrafficPolicy") == ("Cluster" if outside else None)
    assert policy == ("none" if stays else "Cluster" if outside else None)


@pytest.mark.parametrize(
    ("now", "wanted", "field"),
    [
        ({"clusterIP": "10.0.0.1"}, {}, ""),
        ({"clusterIP": "10.0.0.1"}, {"clusterIP": "10.0.0.1"}, ""),
        ({"clusterIP": "10.0.0.1"}, {"clusterIP": "10.0.0.2"}, "clusterIP"),
        ({"clusterIP": "10.0.0.1"}, {"clusterIPs": ["10.0.0.2"]}, "clusterIP"),
        ({"clusterIP": "10.0.0.1"}, {"clusterIPs": {"a": "b"}}, ""),
        ({"clusterIP": "10.0.0.1"}, {"clusterIP": "None"}, "clusterIP"),
        ({"clusterIP": "None"}, {}, "clusterIP"),
        ({**BALANCER, "loadBalancerClass": "a"}, {**BALANCER, "loadBalancerClass": "a"}, ""),
        ({**BALANCER, "loadBalancerClass": "a"}, BALANCER, ""),
        (BALANCER, {**BALANCER, "loadBalancerClass": "a"}, "loadBalancerClass"),
        ({"type": "ClusterIP"}, {**BALANCER, "loadBalancerClass": "a"}, ""),
    ],
)  # fmt: skip
def test_a_field_that_no_service_can_change_is_named(
    now: Object, wanted: Object, field: str
) -> None:
    assert hook.fixed_field(now, wanted) == field


# Someone applies the Service of the repository, or makes it anew.


def edit_selector(app: Member, selector: dict[str, str | None]) -> None:
    """Let a person change what the live Service selects; None takes a key away."""
    patch = json.dumps({"spec": {"selector": selector}})
    args = ("patch", "service", app.name, "-n", app.namespace, "--type=merge", "-p", patch)
    done = app.fleet.kubectl(*args, "--field-manager=kubectl-edit")
    assert done.code == 0, done


def live_run(app: Member) -> str:
    """Return what `status` says is live."""
    done = app.fleet.command("status", app.name, "--output", "json")
    assert done.returncode == 0, done
    return str(json.loads(done.stdout)["apps"][0]["environments"]["production"]["run"])


def test_a_key_that_a_colleague_adds_to_the_selector_changes_nothing_of_what_is_live(
    live: Fleet,
) -> None:
    applied = live["applied"]
    run = applied.go("v2")
    applied.switched(run)
    apply_service(applied)
    assert live.ended(run)["outcome"] == "deployed"
    applied.quiet()
    apply_service(applied)
    assert (applied.selector["app"], live_run(applied)) == ("applied", run)
    labels = {"app": "applied", "environment": "production"}
    eventually(lambda: live.metric("gitops_hook_selector_drift_total", **labels) >= 1, 10)
    eventually(lambda: applied.note("history")[0]["by"] == "kubectl-client-side-apply", 10)


def test_a_deployment_goes_on_although_a_colleague_adds_a_key_meanwhile(live: Fleet) -> None:
    applied = live["applied"]
    with applied.traffic() as traffic:
        run = applied.go("v3")
        with live.held("patch", "services", name="applied-preview"):
            apply_service(applied)
        assert live.ended(run)["outcome"] == "deployed"
        applied.quiet()
    assert (traffic.failures, traffic.versions) == ([], ["v2", "v3"])


def test_rollback_leaves_what_is_live_whatever_keys_were_added(live: Fleet) -> None:
    applied = live["applied"]
    first, second, third = (e["run"] for e in applied.note("history")[::-1])
    apply_service(applied)
    done = live.command("rollback", "applied", "--to", third)
    assert (done.returncode, done.stderr) == (
        3,
        f"gitops-hook: applied in production: {third} is what is live\n",
    )
    with applied.traffic() as traffic:
        done = live.command("rollback", "applied", "--to", "2")
        assert done.returncode == 0, done
        eventually(lambda: traffic.versions[-1:] == ["v1"], 10, "v1 serves")
    assert (traffic.failures, traffic.versions) == ([], ["v3", "v1"])
    assert re.match(rf"applied production: from {third} \(\w+\) to {first} \(\w+\)\n", done.stdout)
    assert "app" not in applied.selector
    apply_service(applied)
    done = live.command("rollback", "applied", "--to", second)
    assert (done.returncode, applied.answer()["version"]) == (0, "v2"), done


def test_a_service_made_anew_from_the_repository_is_pointed_at_the_live_version_again(
    live: Fleet,
) -> None:
    again = live["again"]
    assert again.deployed("v2")["outcome"] == "deployed"
    again.quiet()
    again.stands(again.idle(), "v1")
    before, history = again.selector, again.note("history")
    apply_service(again, anew=True)
    made = time.monotonic()
    eventually(lambda: again.selector == before, 10, "it is put back")
    assert time.monotonic() - made < 5
    assert again.note("history") == history
    eventually(lambda: again.answer()["version"] == "v2", 10, "the live version answers")
    (line,) = live.said("selector drift", app="again")
    assert (line["drift"], line["by"]) == ("Widened", "kubectl-client-side-apply")


def test_one_made_anew_while_no_daemon_ran_is_put_back_too(live: Fleet) -> None:
    again = live["again"]
    ledger = partial(live.cluster.store.get, "configmaps", "orchestration", "gitops-hook-again")
    eventually(lambda: again.selector[RUN] in ledger()["data"].get("live-production", ""), 10)
    before = again.selector
    live.kill()
    apply_service(again, anew=True)
    live.start()
    eventually(lambda: again.selector == before, 10, "it is put back")


def test_what_is_widened_again_and_again_is_left_alone_at_last(live: Fleet) -> None:
    again = live["again"]
    before = again.selector
    wide = {"app": "again", "gitops-hook/app": None, "version": None, RUN: None}
    for _ in range(3 - len(again.note("put-back-at"))):
        edit_selector(again, wide)
        eventually(lambda: again.selector == before, 10, "it is put back")
    edit_selector(again, wide)
    contested = {"app": "again", "reason": "SelectorContested"}
    eventually(lambda: live.said("selector drift", **contested), 10, "it is given up")
    assert again.selector == {"app": "again"}
    done = live.command("rollback", "again")
    assert (done.returncode, "say where to go, --to RUN" in done.stderr) == (3, True), done
    ended = again.deployed("v3")
    assert (ended["outcome"], ended["reason"]) == ("failed", "SelectorContested")
    done = live.command("rollback", "again", "--to", before[RUN])
    assert (done.returncode, again.selector) == (0, before), done


def test_a_maintenance_page_is_reported_and_never_undone(live: Fleet) -> None:
    again = live["again"]
    edit_selector(again, {"maintenance": "on"})
    elsewhere = {"app": "again", "drift": "Elsewhere"}
    eventually(lambda: live.said("selector drift", **elsewhere), 10, "it is reported")
    assert again.selector["maintenance"] == "on"
    assert live_run(again) == again.selector[RUN]
    edit_selector(again, {"maintenance": None})


HOSTILE = {
    "replicas": "many", "ports": [5], "selector": {"a b": "c,d"}, "at": 1e300, "colour": "purple",
}  # fmt: skip


@pytest.mark.parametrize(
    "history",
    ["{", "[" * 100_000, "[1]", json.dumps([HOSTILE]), json.dumps([{**HOSTILE, "selector": {}}])],
    ids=["broken", "deep", "a-number", "hostile", "bare"],
)
def test_a_broken_history_rejects_no_commit_and_ends_no_command_in_a_traceback(
    live: Fleet, history: str
) -> None:
    broken = live["broken"]
    run = broken.go(f"v-{len(history)}")
    broken.switched(run)
    notes = json.dumps({"metadata": {"annotations": {"gitops-hook/history": history}}})
    (live.directory / "notes.json").write_text(notes)
    args = ("patch", "service", "broken", "-n", broken.namespace, "--type=merge")
    done = live.kubectl(*args, f"--patch-file={live.directory / 'notes.json'}")
    assert done.code == 0, done
    for command in (["status"], ["plan", "broken"], ["rollback", "broken", "--to", "7"]):
        done = live.command(*command)
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 1, 3), done
    assert live.ended(run)["outcome"] == "deployed"
    broken.quiet()
    assert (broken.selector[RUN], broken.note("history")[0]["run"]) == (run, run)


# The way back.


def test_a_version_that_a_person_points_the_service_at_is_live_from_then_on(live: Fleet) -> None:
    quick = live["quick"]
    second = quick.deployed("v2")["run"]
    quick.quiet()
    quick.stands(quick.idle(), "v1")
    first = quick.note("history")[1]
    edit_selector(quick, {"version": first["colour"], RUN: None})
    eventually(lambda: quick.note("history")[0]["run"] == first["run"], 10, "it is written down")
    newest = quick.note("history")[0]
    assert (newest["by"], newest["outcome"]) == ("kubectl-edit", "deployed")
    assert live_run(quick) == first["run"]
    done = live.command("rollback", "quick")
    assert (done.returncode, "no proven version to go back to" in done.stderr) == (3, True), done
    done = live.command("rollback", "quick", "--to", second)
    assert (done.returncode, quick.selector[RUN]) == (0, second), done


def test_a_person_may_also_point_it_there_by_the_whole_selector(live: Fleet) -> None:
    again = live["again"]
    for version in ("m1", "m2"):
        assert again.deployed(version)["outcome"] == "deployed"
        again.quiet()
    before = again.note("history")[1]
    edit_selector(again, dict(before["selector"]))
    eventually(lambda: again.note("history")[0]["run"] == before["run"], 10, "it is written down")
    assert again.note("history")[0]["by"] == "kubectl-edit"
    assert live_run(again) == before["run"]


def test_a_rollback_that_cannot_be_made_pauses_nothing(live: Fleet) -> None:
    again = live["again"]
    for version in ("p2", "p3"):
        assert again.deployed(version)["outcome"] == "deployed"
        again.quiet()
    third = next(e for e in again.note("history")[2:] if e["outcome"] == "deployed")
    live.cluster.store.delete("configmaps", "production", third["release"])
    live.cluster.store.delete("deployments", "production", f"again-{again.idle()}")
    eventually(lambda: not again.pods("p2"), 30, "the one before is gone")
    done = live.command("rollback", "again", "--to", third["run"])
    assert done.returncode != 0, done
    assert not [d for d in again.objects("deployments").values() if d["spec"].get("paused")]
    assert again.deployed("p4")["outcome"] == "deployed"
    again.quiet()


def test_rollback_right_after_a_failed_deployment_switches_first_and_puts_the_target_back_then(
    live: Fleet,
) -> None:
    quick = live["quick"]
    target, old = quick.selector, quick.answer()["version"]
    assert quick.deployed("v3")["outcome"] == "deployed"
    quick.quiet()
    quick.stands(target["version"], old)
    run, name = quick.go("v4", modes="never-ready"), f"quick-{target['version']}"
    eventually(lambda: quick.pods("v4"), 30, "it is being rolled out")
    with quick.traffic() as traffic:
        with live.held("update", "deployments", name=name):
            asked = threading.Thread(target=live.command, args=("rollback", "quick"))
            asked.start()
            eventually(lambda: quick.selector == target, 20, "traffic goes back first")
        asked.join(30)
        quick.stands(target["version"], old)
        eventually(lambda: not quick.pods("v4"), 20, "what overwrote it is gone")
    assert (traffic.failures, traffic.versions[-1]) == ([], old)
    assert live.ended(run)["reason"] == "NeverReady"
    quick.quiet()


def test_rollback_while_its_target_is_overwritten_switches_before_it_puts_the_target_back(
    live: Fleet,
) -> None:
    hasty = live["hasty"]
    target = hasty.selector
    assert hasty.deployed("v2")["outcome"] == "deployed"
    hasty.quiet()
    run = hasty.go("v3", modes="never-ready")
    eventually(lambda: hasty.pods("v3"), 30, "it is being rolled out over the target")
    with hasty.traffic() as traffic:
        asked = threading.Thread(target=live.command, args=("rollback", "hasty"))
        asked.start()
        with live.held("update", "deployments", name=f"hasty-{target['version']}") as held:
            eventually(lambda: hasty.selector == target, 20, "traffic goes back")
            assert held()  # nobody waited for the call to end
        asked.join(30)
        hasty.stands(target["version"], "v1")
    assert (traffic.failures, traffic.versions) == ([], ["v2", "v1"])
    assert live.ended(run)["reason"] == "ClaimLost"


def recorded(live: Fleet, app: str) -> Object:
    """Return what is recorded of an app."""
    data: Object = live.cluster.store.get("configmaps", "orchestration", f"gitops-hook-{app}")
    return dict(data["data"])


def test_what_a_rollback_left_is_drained_and_may_be_gone_forward_to(live: Fleet) -> None:
    forth = live["forth"]
    assert forth.deployed("v2")["outcome"] == "deployed"
    forth.quiet()
    second = live_run(forth)
    left = {pod["metadata"]["name"] for pod in forth.pods("v2")}
    assert live.command("rollback", "forth").returncode == 0
    assert forth.note("deploying")["phase"] == "draining"
    eventually(lambda: not left & pod_names(forth, "v2"), 30, "its pods are replaced")
    eventually(lambda: forth.note("deploying") is None, 20, "nothing is left to do")
    assert [key for key in recorded(live, "forth") if key.startswith("rejected-")]
    forth.stands(forth.idle(), "v2")
    done = live.command("rollback", "forth", "--to", second)
    assert (done.returncode, forth.answer()["version"]) == (0, "v2"), done
    commits = {e["run"]: e["commit"] for e in forth.note("history")}
    rejected = {key.partition("-")[2] for key in recorded(live, "forth") if "rejected-" in key}
    assert commits[second] not in rejected
    assert len(rejected) == 1
    (run,) = [r for r in live.status()["runs"] if r["run"] == second]
    assert run["outcome"] == "deployed"


def pod_names(app: Member, version: str) -> set[str]:
    """Return the names of a version's pods."""
    return {pod["metadata"]["name"] for pod in app.pods(version)}


def test_a_rollback_that_fails_leaves_no_claim_whatever_else_it_cannot_undo(live: Fleet) -> None:
    forth = live["forth"]
    forth.quiet()
    name = f"forth-{forth.idle()}"
    target = next(e for e in forth.note("history") if e["selector"] != forth.selector)
    live.cluster.store.delete("configmaps", "production", target["release"])
    live.cluster.store.delete("deployments", "production", name)
    eventually(lambda: not forth.pods("v1"), 30, "it is gone")
    fault = live.fault("forbid", "get", "deployments", name=name, times=None)
    try:
        done = live.command("rollback", "forth", "--to", target["run"])
    finally:
        live.cluster.faults.lift(fault)
    assert done.returncode != 0, done
    assert forth.note("deploying") is None
    assert forth.deployed("v3")["outcome"] == "deployed"


def test_a_verdict_is_not_lost_with_the_answer_to_the_next_question(live: Fleet) -> None:
    forth = live["forth"]
    forth.quiet()
    run = forth.go("v4", modes="smoke-fails")
    eventually(lambda: live.said("claimed", run=run), 30, "it is being deployed")
    eventually(
        lambda: any(a["refused"] for a in forth.tell("v4")), 30, "it is asked for its health"
    )
    live.fault("500", "get", "services", name="forth", times=3)
    assert live.ended(run, 60)["reason"] == "SmokeFailed"
    assert len(live.said("claimed", run=run)) == 1


def test_a_commit_that_is_live_in_production_alone_is_deployed_to_staging_too(live: Fleet) -> None:
    both = live["both"]
    first = both.repository.git("rev-parse", "HEAD")
    assert both.deployed("v2")["outcome"] == "deployed"
    both.quiet()
    assert live.command("rollback", "both").returncode == 0
    both.quiet()
    both.repository.git("push", "-q", "-f", "origin", f"{first}:main")
    run = both.push(first)
    staging = Member(live, "both", live.directory / "staging", "staging")
    eventually(lambda: staging.selector.get(RUN) == run, 60, "staging has it, too")
    eventually(lambda: live.said("run ended", run=run)[1:], 60, "it ends once more")
    assert live.said("run ended", run=run)[-1]["outcome"] == "deployed"
    assert both.answer()["version"] == "v1"


def test_a_version_whose_record_was_deleted_is_watched_after_a_restart_too(live: Fleet) -> None:
    slow = live["slow"]
    old = slow.answer()["version"]
    run = slow.go("v2")
    slow.switched(run)
    live.kill()
    entry = slow.note("history")[0]
    live.cluster.store.delete("configmaps", "production", entry["release"])
    live.start()
    eventually(lambda: live.said("the record of a live version is lost"), 30, "it goes on")
    slow.tell("v2", "/turn-sick")
    assert live.ended(run)["outcome"] == "switched-back"
    eventually(lambda: slow.answer()["version"] == old, 10, "the version before serves")


def test_a_switch_back_that_someone_else_has_made_is_neither_counted_nor_logged(
    live: Fleet,
) -> None:
    raced = live["raced"]
    run = raced.go("v2")
    raced.switched(run)
    raced.tell("v2", "/turn-sick")
    before = raced.note("history")[1]["selector"]
    back = {"spec": {"selector": before}}
    with live.held("patch", "services", name="raced"):
        patch = ("patch", "service", "raced", "-n", raced.namespace, "--type=merge", "-p")
        assert live.kubectl(*patch, json.dumps(back)).code == 0
    assert live.ended(run)["outcome"] != "deployed"
    assert raced.selector == before
    labels = {"app": "raced", "environment": "production", "direction": "back"}
    assert live.metric("gitops_hook_switches_total", **labels) == 0
    assert not live.said("switched back", run=run)


def test_a_version_that_is_live_again_is_not_drained_although_that_was_due(live: Fleet) -> None:
    emptied = live["emptied"]
    assert emptied.deployed("v2")["outcome"] == "deployed"
    emptied.quiet()
    second = live_run(emptied)
    name = f"emptied-{emptied.selector['version']}"
    assert live.command("rollback", "emptied").returncode == 0
    with live.held("get", "deployments", name=name):
        done = live.command("rollback", "emptied", "--to", second, administrator=True)
        assert (done.returncode, emptied.answer()["version"]) == (0, "v2"), done
    emptied.quiet()
    eventually(lambda: not emptied.pods("v1"), 30, "the other one is drained")
    assert emptied.objects("deployments")[name]["spec"]["replicas"] == 1
    assert emptied.answer()["version"] == "v2"


def test_a_rollback_of_what_bakes_leaves_the_version_before_where_it_stands(live: Fleet) -> None:
    further = live["further"]
    first = live_run(further)
    assert further.deployed("v2")["outcome"] == "deployed"
    further.quiet()
    second = live_run(further)
    run = further.go("v3")
    further.switched(run)
    live.kill()  # so that it is not confirmed before the command looks
    done = live.command("rollback", "further", "--to", first)
    assert (done.returncode, further.answer()["version"]) == (3, "v3"), done
    assert f"`rollback further --to {second}` goes there at once" in done.stderr
    assert further.pods("v2")
    assert further.note("deploying")["phase"] == "baking"
    done = live.command("rollback", "further", "--to", second)
    assert (done.returncode, further.answer()["version"]) == (0, "v2"), done
    done = live.command("rollback", "further", "--to", first)
    assert (done.returncode, further.answer()["version"]) == (0, "v1"), done
    live.start()
    assert live.ended(run)["outcome"] == "rolled-back"
