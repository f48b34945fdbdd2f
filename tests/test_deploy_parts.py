"""Pieces of a deployment that need no cluster: what is concluded from what kubectl says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gitops_hook as hook

Object = dict[str, Any]
OLD, NEW = {"gitops-hook/run": "shop-old"}, {"gitops-hook/run": "shop-new"}
CONFIG = "apps: [{name: shop, repository: /srv/shop.git, build: {image: registry/shop}}]"


class Seconds(hook.Clock):
    """A clock on which a second goes by with each look at it."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.monotonic = self.tick  # type: ignore[method-assign, assignment]

    def tick(self) -> float:
        self.at += 1.0
        return self.at


def named(name: str) -> Object:
    return {"metadata": {"name": name}, "spec": {}, "status": {}}


def slices(*pods: str) -> Object:
    """The EndpointSlice of a Service with these ready pods."""
    ready = {"conditions": {"ready": True}, "addresses": ["10.0.0.1"]}
    endpoints = [{**ready, "targetRef": {"kind": "Pod", "name": pod}} for pod in pods]
    return {"items": [{**named("shop-x"), "endpoints": endpoints}]}


def deployer(folder: Path, looks: list[Object]) -> hook.Deployer:
    """A deployer whose kubectl answers each look at the endpoints with the next of these."""
    live = {"metadata": {"name": "shop", "resourceVersion": "1"}, "spec": {"selector": NEW}}
    (folder / "pods").write_text(json.dumps({"items": [named("shop-new-1"), named("shop-new-2")]}))
    (folder / "service").write_text(json.dumps(live))
    for number, look in enumerate(looks):
        (folder / f"look{number}").write_text(json.dumps(look))
    script = folder / "kubectl"
    script.write_text(
        f"""#!/bin/sh
cd '{folder}'
case "$*" in
*endpointslices*) echo >> asked; n=$(wc -l < asked); last={len(looks) - 1}
  cat "look$((n > last ? last : n))" ;;
*pods*) cat pods ;;
*deployment*) cat deployment ;;
*) cat service ;;
esac
"""
    )
    script.chmod(0o755)
    kubectl = hook.Kubectl(hook.Metrics(), program=str(script))
    secrets = hook.Secrets(folder)
    return hook.Deployer(kubectl, hook.Git(folder / "none"), secrets, Seconds())


def task() -> hook.Task:
    """The new run on its way to production."""
    app = hook.load_config(CONFIG).apps[0]
    run = hook.Run(id="shop-new", app="shop", ref="refs/heads/main", commit="a" * 40)
    return hook.Task(app=app, environment="production", namespace="production", run=run)


@pytest.mark.parametrize(
    ("looks", "arrives"),
    {
        "the pods wanted, at once": ([slices("shop-new-1", "shop-new-2")], True),
        "late, since nobody acted on the switch": (
            [*[slices("shop-old-1")] * 15, slices("shop-new-1", "shop-new-2")],
            True,
        ),
        "late, since there is no slice yet": (
            [*[{"items": []}] * 15, slices("shop-new-1", "shop-new-2")],
            True,
        ),
        "too late, since some had come": (
            [*[slices("shop-new-1")] * 15, slices("shop-new-1", "shop-new-2")],
            False,
        ),
        "too late, since nobody was served": (
            [*[slices()] * 15, slices("shop-new-1", "shop-new-2")],
            False,
        ),
    }.values(),
    ids=["at-once", "nobody-acted", "no-slice", "some-came", "nobody-served"],
)
def test_endpoints_that_did_not_move_at_all_are_given_more_time_than_those_that_did(
    tmp_path: Path, looks: list[Object], *, arrives: bool
) -> None:
    assert deployer(tmp_path, looks).followed(task(), NEW, 2) is arrives


def test_endpoints_are_as_many_as_an_autoscaler_wants_by_now(tmp_path: Path) -> None:
    made = deployer(tmp_path, [slices("shop-new-1")])
    smaller = {"metadata": {"name": "shop-green"}, "spec": {"replicas": 1}}
    (tmp_path / "deployment").write_text(json.dumps(smaller))
    assert made.followed(task(), NEW, 2)


@pytest.mark.parametrize(("observed", "told"), [(1, []), (2, ["QuotaExceeded"])])
def test_what_a_deployment_said_of_the_version_before_is_not_held_against_the_new_one(
    tmp_path: Path, observed: int, told: list[str]
) -> None:
    made = deployer(tmp_path, [])
    failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: small"}
    status = {"observedGeneration": observed, "conditions": [failure]}
    standing = {"metadata": {"name": "shop-blue", "generation": 2}, "status": status}
    (tmp_path / "deployment").write_text(json.dumps(standing))
    names = ("run", "commit", "image", "colour")
    values: Object = {**dict.fromkeys(names, ""), "selector": NEW, "configmaps": [], "service": {}}
    release = hook.Release(**values, deployment=standing)
    pods = hook.Watch(made.kubectl, "pods", "production", hook.Pod, "")
    assert [str(s.reason) for s in made.symptoms(task(), release, pods)] == told


def a_release(deployment: Object) -> hook.Release:
    names = ("run", "commit", "image", "colour")
    values: Object = {**dict.fromkeys(names, ""), "selector": NEW, "configmaps": [], "service": {}}
    return hook.Release(**{**values, "run": "shop-new"}, deployment=deployment)


@pytest.mark.parametrize(
    ("carried", "raised", "said"),
    [
        ("shop-old", hook.HookError, "deleted or replaced meanwhile"),
        ("shop-new", hook.StageError, "0 of 0 pods ready"),
    ],
    ids=["replaced", "scaled-to-nothing"],
)
def test_a_rollout_that_cannot_end_well_any_more_is_not_waited_for(
    tmp_path: Path, carried: str, raised: type[Exception], said: str
) -> None:
    made = deployer(tmp_path, [])
    meta = {"name": "shop-blue", "generation": 2, "labels": {hook.LABEL_RUN: carried}}
    spec = {"replicas": 0, "progressDeadlineSeconds": 600}
    standing = {"metadata": meta, "spec": spec, "status": {"observedGeneration": 2}}
    (tmp_path / "deployment").write_text(json.dumps(standing))
    (tmp_path / "pods").write_text('{"items": []}')
    pods = hook.Watch(made.kubectl, "pods", "production", hook.Pod, "")
    with pytest.raises(raised, match=said):
        made.roll_out(task(), a_release(standing), pods)
    assert made.clock.monotonic() < 1000 + 10 * hook.VERIFY_SECONDS


def ready_pod(name: str) -> Object:
    condition = {"type": "Ready", "status": "True"}
    meta = {"name": name, "resourceVersion": "1"}
    return {"metadata": meta, "spec": {}, "status": {"conditions": [condition]}}


@pytest.mark.parametrize(
    ("old", "new", "back"),
    [(2, 1, True), (2, 2, True), (1, 2, False), (0, 0, False)],
    ids=["better", "as-good", "worse", "nothing"],
)
def test_missing_endpoints_send_traffic_back_only_to_a_version_that_is_as_well(
    tmp_path: Path, old: int, new: int, *, back: bool
) -> None:
    made = deployer(tmp_path, [slices()])
    deployment = {"metadata": {"name": "shop-green"}, "spec": {"replicas": 2}}
    release = a_release(deployment)
    entries = [
        {"run": "shop-new", "selector": NEW, "outcome": "", "release": "record", "at": 2},
        {"run": "shop-old", "selector": OLD, "outcome": "deployed", "at": 1},
    ]
    notes = {hook.NOTE_HISTORY: json.dumps(entries), hook.NOTE_PREVIOUS: json.dumps(OLD)}
    live = {"metadata": {"name": "shop", "resourceVersion": "1", "annotations": notes}}
    texts = {
        "service": {**live, "spec": {"selector": NEW}},
        "deployment": deployment,
        "record": release.configmap("shop"),
        "old": {"items": [ready_pod(f"shop-old-{n}") for n in range(old)]},
        "new": {"items": [ready_pod(f"shop-new-{n}") for n in range(new)]},
    }
    for name, content in texts.items():
        (tmp_path / name).write_text(json.dumps(content))
    script = tmp_path / "kubectl"
    cases = """case "$*" in
*configmap*) cat record ;;
*pods*shop-old*) cat old ;;
*pods*shop-new*) cat new ;;
*patch*) cat > patched; cat service ;;"""
    script.write_text(script.read_text().replace('case "$*" in', cases))
    pods = hook.Watch(made.kubectl, "pods", "production", hook.Pod, "")
    with pytest.raises(hook.StageError, match="^EndpointsMissing: " if back else "^BothSick: "):
        made.settle(task(), pods)
    assert (tmp_path / "patched").exists() is back
