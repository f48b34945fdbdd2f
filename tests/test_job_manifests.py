"""The Jobs of the tests and the build: that Kubernetes takes them, and what they leave behind."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import gitops_hook as hook
from gitops_hook import (
    TRUSTING,
    Config,
    Kubectl,
    Metrics,
    Run,
    build_job,
    clone_settings,
    junit_summary,
    load_config,
    run_of_job,
    seconds_of,
)
from gitops_hook import (
    test_job as make_test_job,
)
from tests.fuzz import TARGETS
from tests.schemas import require_valid
from tests.settings import loaded
from tests.standin.cluster import Cluster
from tests.standin.kubectl import find_kubectl
from tests.standin.podsecurity import violations
from tests.standin.sandbox import expand
from tests.starting import argv_of, finding
from tests.waiting import eventually

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RUN = Run(
    id="shop-1a2b3c4d-5e6f",
    app="shop",
    ref="refs/heads/feature/$(HOME)-$$",
    commit="1a2b3c4d" * 5,
    before="0" * 40,
    title="Ünïcode: $(CI)",
    delivery="f3b0",
    received=1234.5678,
)


def config(**app: Any) -> Config:
    entry = {
        "name": "shop",
        "repository": "https://gitlab.example.com/demo/shop.git",
        "build": {"image": "registry.example.com/demo/shop"},
    }
    images = {"hook": "registry.example.com/gitops-hook:1", "kaniko": "registry.example.com/kaniko"}
    return loaded(yaml.safe_dump({"apps": [{**entry, **app}], "images": images}))


def of_test(settings: Config, run: Run = RUN) -> Object:
    return make_test_job(settings, settings.apps[0], run)


def of_build(settings: Config, run: Run = RUN) -> Object:
    return build_job(settings, settings.apps[0], run)


BOTH = pytest.mark.parametrize("make", [of_test, of_build], ids=["test", "build"])
Make = Callable[[Config], Object]


def pod(job: Object) -> Object:
    spec: Object = job["spec"]["template"]["spec"]
    return spec


def container(job: Object, name: str) -> Object:
    every = [*pod(job)["initContainers"], *pod(job)["containers"]]
    return next(c for c in every if c["name"] == name)


def values(container: Object) -> dict[str, str]:
    """The environment as the kubelet gives it to the container, and what it gets by arguments."""
    env: dict[str, str] = {}
    for entry in container["env"]:
        env[entry["name"]] = expand(entry["value"], env)
    args = [expand(arg, env) for arg in container.get("args", [])]
    return env | hook.assigned(arg for arg in args if re.match(r"[A-Z_]+=", arg))


# === Kubernetes takes them ===


@BOTH
def test_they_are_valid_by_the_schema(make: Make) -> None:
    require_valid(make(config()))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the namespaces, accounts, quotas and limits that are shipped."""
    home = tmp_path_factory.mktemp("jobs")
    command = [find_kubectl(), "kustomize", str(ROOT / "manifests" / "base")]
    shipped = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kinds = ("Namespace", "ServiceAccount", "ResourceQuota", "LimitRange")
    with Cluster(home / "cluster") as running, pytest.MonkeyPatch.context() as patch:
        running.load(*(o for o in yaml.safe_load_all(shipped) if o["kind"] in kinds))
        patch.setenv("KUBECONFIG", str(running.kubeconfig()))
        patch.setenv("HOME", str(home))
        yield running


DB = {
    "name": "db",
    "image": "postgres:16",
    "port": 5432,
    "user": 999,
    "writable": ["/var/lib/postgresql", "/var/run/postgresql"],
    "env": {"POSTGRES_PASSWORD": "$(x)", "PGDATA": "/var/lib/postgresql/data"},
}
TESTS = st.fixed_dictionaries(
    {},
    optional={
        "services": st.sampled_from(
            [
                [DB],
                [
                    DB,
                    {"name": "queue", "image": "redis:7", "port": 6379, "command": "redis-server"},
                ],
                [{"name": f"s{n}", "image": "i:1", "port": 65531 + n} for n in range(5)],
            ]
        ),
        "env": st.sampled_from([{"A": "$(B)"}, {"HOME": "/workspace", "PIP_CACHE_DIR": "/x"}]),
        "env_from": st.sampled_from([["one"], ["one", "two.three"]]),
        "cache": st.sampled_from(["cache", "a.b"]),
        "timeout": st.sampled_from(["1s", "99999h"]),
        "resources": st.sampled_from([{}, {"limits": {"cpu": 2, "ephemeral-storage": "1Gi"}}]),
    },
)
BUILDS = st.fixed_dictionaries(
    {},
    optional={
        "context": st.sampled_from([".", "services/shop"]),
        "dockerfile": st.sampled_from(["Dockerfile", "docker/web.Dockerfile"]),
        "args": st.sampled_from([["--cache=true"], ["--build-arg=A=$(B)"]]),
    },
)


@given(TESTS, BUILDS, st.sampled_from([{}, {"HTTPS_PROXY": "http://proxy:3128", "HOME2": "x"}]))
@settings(max_examples=40, deadline=None, database=None)
def test_whatever_the_settings_say_they_are_valid_and_fit_pod_security(
    tests: Object, build: Object, variables: dict[str, str]
) -> None:
    image = {"image": "registry.example.com/demo/shop"}
    entry = {"name": "shop", "repository": "https://git.example.com/demo/shop.git"}
    app = {**entry, "test": tests, "build": {**image, **build}}
    loaded = load_config(yaml.safe_dump({"apps": [app], "job_env": variables}))
    for make, level in ((of_test, "restricted"), (of_build, "baseline")):
        job = make(loaded)
        require_valid(job)
        assert violations(level, pod(job)) == ""
        for one in (*pod(job)["initContainers"], *pod(job)["containers"]):
            names = [entry["name"] for entry in one["env"]]
            assert len(names) == len({*names})
            mounts = [mount["mountPath"] for mount in one["volumeMounts"]]
            assert len(mounts) == len({*mounts})
        volumes = [volume["name"] for volume in pod(job)["volumes"]]
        assert len(volumes) == len({*volumes})


def test_a_service_is_a_side_car_whose_port_the_tests_wait_for() -> None:
    job = of_test(config(test={"services": [DB, {"name": "queue", "image": "redis:7", "port": 1}]}))
    order = [c["name"] for c in pod(job)["initContainers"]]
    assert order == ["results", "clone", "db", "queue"]
    db = container(job, "db")
    assert (db["image"], db["restartPolicy"]) == ("postgres:16", "Always")
    assert "args" not in db
    assert "command" not in db
    assert db["startupProbe"]["tcpSocket"] == {"port": 5432}
    # longer than the daemon waits, which ends the run before the kubelet kills the service
    assert db["startupProbe"]["failureThreshold"] * db["startupProbe"]["periodSeconds"] > 60
    assert db["securityContext"] == {**hook.CONTAINER["securityContext"], "runAsUser": 999}
    assert values(db)["POSTGRES_PASSWORD"] == "$(x)"
    mounts = {mount["mountPath"]: mount["name"] for mount in db["volumeMounts"]}
    assert [*mounts] == ["/tmp", "/var/lib/postgresql", "/var/run/postgresql"]
    volumes = {v["name"]: v["emptyDir"] for v in pod(job)["volumes"] if v["name"].startswith("db")}
    assert volumes == {name: {"sizeLimit": "1Gi"} for name in mounts.values()}
    assert not {*mounts.values()} & {m["name"] for m in container(job, "queue")["volumeMounts"]}
    assert pod(job)["containers"][0]["name"] == "test-runner"


def test_the_command_of_a_service_reaches_the_shell_as_it_is_written() -> None:
    service = {"name": "queue", "image": "redis:7", "port": 1, "command": "echo $HOME $(id)"}
    queue = container(of_test(config(test={"services": [service]})), "queue")
    assert queue["command"] == ["sh", "-ec"]
    assert [expand(arg, {}) for arg in queue["args"]] == ["echo $HOME $(id)"]


def test_variables_of_the_tests_and_names_of_secrets_reach_the_tests_alone() -> None:
    loaded = config(test={"env": {"MODE": "$(ci)", "HOME": "/x"}, "env_from": ["a", "b"]})
    tests = container(of_test(loaded), "test-runner")
    assert (values(tests)["MODE"], values(tests)["HOME"]) == ("$(ci)", "/x")
    assert tests["envFrom"] == [{"secretRef": {"name": "a"}}, {"secretRef": {"name": "b"}}]
    others = pod(of_test(loaded))["initContainers"]
    assert all("envFrom" not in c and "MODE" not in values(c) for c in others)
    assert "envFrom" not in container(of_build(loaded), "kaniko")


@pytest.mark.parametrize(
    ("ref", "folder"),
    [
        ("refs/heads/main", "shop/deploy"),
        ("refs/heads/topic", "shop/branches"),
        ("refs/heads/x/main", "shop/branches"),
    ],
)
def test_the_cache_of_test_branches_is_not_that_of_the_deploy_branch(ref: str, folder: str) -> None:
    job = of_test(config(test={"cache": "pip-cache"}), replace(RUN, ref=ref))
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "pip-cache"}} in pod(job)[
        "volumes"
    ]
    tests = container(job, "test-runner")
    mount = {"name": "cache", "mountPath": "/cache", "subPath": folder}
    assert mount in tests["volumeMounts"]
    assert all(m["name"] != "cache" for c in pod(job)["initContainers"] for m in c["volumeMounts"])
    assert values(tests)["PIP_CACHE_DIR"] == "/cache/pip"


def test_apps_that_name_the_same_claim_have_a_cache_each() -> None:
    named = config(test={"cache": "pip-cache"})
    other = replace(named.apps[0], name="blog")
    jobs = [make_test_job(named, app, replace(RUN, app=app.name)) for app in (*named.apps, other)]
    mounts = [container(job, "test-runner")["volumeMounts"] for job in jobs]
    assert [m["subPath"] for each in mounts for m in each if m["name"] == "cache"] == [
        "shop/branches",
        "blog/branches",
    ]


def test_the_build_sees_the_folder_that_the_settings_name() -> None:
    build = {"image": "registry.example.com/demo/shop", "context": "services/shop"}
    args = container(of_build(config(build=build)), "kaniko")["args"]
    assert args[:2] == [
        "--context=dir:///kaniko/source/src/services/shop",
        "--dockerfile=Dockerfile",
    ]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("make", "namespace", "many"), [(of_test, "test", 4), (of_build, "build", 2)]
)
def test_as_many_as_run_at_once_get_their_pods_within_quota_and_pod_security(
    make: Callable[[Config, Run], Object], namespace: str, many: int
) -> None:
    kubectl = Kubectl(Metrics(), program=find_kubectl())
    runs = [replace(RUN, id=f"shop-1a2b3c4d-000{i}") for i in range(many)]
    jobs = [make(config(), run) for run in runs]
    assert kubectl.create_each(jobs, namespace) == {}
    names = [job["metadata"]["name"] for job in jobs]
    assert kubectl.list("pods", namespace) == [], "they wait until they are unsuspended"
    change = json.dumps({"spec": {"suspend": False}})
    kubectl.run("patch", "job", *names, "--type=merge", "-p", change, namespace=namespace)
    until = time.monotonic() + 20
    while {p["metadata"]["labels"]["gitops-hook/run"] for p in kubectl.list("pods", namespace)} != {
        run.id for run in runs
    }:
        events = kubectl.list("events", namespace)
        refused = [e["message"] for e in events if e["reason"] == "FailedCreate"]
        assert not refused
        assert time.monotonic() < until


def test_pods_that_the_shipped_quota_never_allows_are_named_before_the_first_push() -> None:
    assert [*hook.quota_warnings(config())] == []
    text = (ROOT / "manifests" / "base" / "resourcequotas.yaml").read_text()
    for quota in yaml.safe_load_all(text):
        hard = {name: amount for name, amount in quota["spec"]["hard"].items() if name != "pods"}
        assert hard == hook.SHIPPED_QUOTA
    large = {**DB, "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "7800Mi"}}}
    second = {**large, "name": "other", "port": 1}
    (requests, limits) = hook.quota_warnings(config(test={"services": [large, second]}))
    assert requests.startswith("apps.shop.test: a pod asks for requests.cpu of 2.3, but the ")
    assert limits.endswith("allows 8Gi. Raise it in ResourceQuota test-quota, or ask for less.")


# === What they may do ===


@BOTH
def test_no_pod_has_a_token_or_the_addresses_of_services(make: Make) -> None:
    spec = pod(make(config()))
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


@BOTH
def test_a_volume_whose_files_have_the_right_group_is_mounted_without_a_walk(make: Make) -> None:
    context = pod(make(config(test={"cache": "pip-cache"})))["securityContext"]
    assert (context["fsGroup"], context["fsGroupChangePolicy"]) == (65532, "OnRootMismatch")


def test_every_container_of_a_test_is_locked_up() -> None:
    spec = pod(of_test(config()))
    assert spec["serviceAccountName"] == "test-runner-sa"
    context = {"runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532}
    assert context.items() <= spec["securityContext"].items()
    for each in (*spec["initContainers"], *spec["containers"]):
        security = each["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}


def test_a_build_is_root_with_six_capabilities_and_its_clone_is_nobody() -> None:
    job = of_build(config())
    assert pod(job)["serviceAccountName"] == "build-runner-sa"
    security = container(job, "kaniko")["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (0, 0)
    assert (security["runAsNonRoot"], security["allowPrivilegeEscalation"]) == (False, False)
    assert "readOnlyRootFilesystem" not in security, "it unpacks images over its root"
    assert security["capabilities"]["drop"] == ["ALL"]
    assert security["capabilities"]["add"] == [
        "CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "SETFCAP"
    ]  # fmt: skip
    # what a container says counts before what its pod says
    clone = pod(job)["securityContext"] | container(job, "clone")["securityContext"]
    assert (clone["runAsUser"], clone["runAsGroup"], clone["runAsNonRoot"]) == (65532, 65532, True)
    assert clone["readOnlyRootFilesystem"] is True
    assert clone["capabilities"] == {"drop": ["ALL"]}


@BOTH
def test_git_credentials_are_optional_files_that_only_the_clone_sees(make: Make) -> None:
    job = make(config())
    volume = next(v for v in pod(job)["volumes"] if v["name"] == "git")
    # the kubelet makes 0440 of 0400 for the fsGroup, which is the clone's user's
    assert volume["secret"] == {
        "secretName": "git-credentials",
        "optional": True,
        "defaultMode": 0o400,
    }
    assert pod(job)["securityContext"]["fsGroup"] == 65532
    seeing = {
        c["name"]: values(c).get("CREDENTIALS_FILE")
        for c in (*pod(job)["initContainers"], *pod(job)["containers"])
        if any(m["name"] == "git" for m in c["volumeMounts"])
    }
    assert seeing == {"clone": "/var/run/gitops-hook/git-credentials"}


def test_registry_credentials_are_seen_by_the_builder_only() -> None:
    job = of_build(config())
    (mount,) = [m for m in container(job, "kaniko")["volumeMounts"] if m["name"] == "registry"]
    assert mount["mountPath"] == "/kaniko/.docker"
    volume = next(v for v in pod(job)["volumes"] if v["name"] == "registry")
    assert volume["secret"]["secretName"] == "registry-credentials"
    assert volume["secret"]["items"] == [{"key": ".dockerconfigjson", "path": "config.json"}]
    assert all(m["name"] != "registry" for m in container(job, "clone")["volumeMounts"])
    assert all(v["name"] != "registry" for v in pod(of_test(config()))["volumes"])


# === What they do ===


@BOTH
def test_the_clone_gets_the_commit_and_the_configured_url(make: Make) -> None:
    clone = container(make(config()), "clone")
    assert clone["image"] == "registry.example.com/gitops-hook:1"
    env = values(clone)
    assert env["CLONE_URL"] == "https://gitlab.example.com/demo/shop.git"
    assert env["CLONE_COMMIT"] == RUN.commit
    assert env["CLONE_DIRECTORY"] == "/workspace/src"


@BOTH
def test_the_clone_does_what_the_settings_of_the_app_say(make: Make) -> None:
    names = ("CLONE_DEPTH", "CLONE_TAGS", "CLONE_SUBMODULES", "CLONE_LFS")
    env = values(container(make(config()), "clone"))
    assert env["CLONE_APP"] == "shop"
    assert not env.keys() & {*names}
    assert clone_settings(env) == config().apps[0].clone
    settings = config(clone={"depth": "full", "tags": True, "submodules": True, "lfs": False})
    env = values(container(make(settings), "clone"))
    assert [env[name] for name in names] == ["full", "true", "true", "false"]
    assert clone_settings(env) == settings.apps[0].clone


def test_a_job_of_an_older_version_has_the_defaults() -> None:
    assert clone_settings({}) == config().apps[0].clone


@BOTH
def test_the_private_authority_is_an_optional_file_that_needs_nothing_to_be_there(
    make: Make,
) -> None:
    job = make(config())
    (volume,) = [v for v in pod(job)["volumes"] if v["name"] == "ca"]
    assert volume["configMap"] == {"name": "gitops-hook-ca", "optional": True}
    mounts = {
        c["name"]: m["mountPath"]
        for c in (*pod(job)["initContainers"], *pod(job)["containers"])
        for m in c["volumeMounts"]
        if m["name"] == "ca"
    }
    env = values(container(job, "clone"))
    assert env["CA_FILE"] == f"{mounts.pop('clone')}/ca.crt"
    assert env["CA_BUNDLE"] == "/workspace/ca-certificates.crt"
    if make is of_build:
        # its own image has the public ones in the first; a folder that is not there adds nothing
        folders = values(container(job, "kaniko"))["SSL_CERT_DIR"].split(":")
        assert folders == ["/kaniko/ssl/certs", "/etc/ssl/certs", mounts.pop("kaniko")]
    else:
        assert values(container(job, "test-runner"))["CA_BUNDLE"] == env["CA_BUNDLE"]
    assert mounts == {}


VARIABLES = {"HTTPS_PROXY": "http://proxy:3128/$(HOME)", "no_proxy": ".svc", "RETRIES": "3"}


@BOTH
def test_the_variables_of_all_jobs_reach_every_container_as_they_are_written(make: Make) -> None:
    job = make(replace(config(), job_env=VARIABLES))
    for each in (*pod(job)["initContainers"], *pod(job)["containers"]):
        assert VARIABLES.items() <= values(each).items()
    plain = make(config())
    for each in (*pod(plain)["initContainers"], *pod(plain)["containers"]):
        assert not VARIABLES.keys() & values(each).keys()


def test_a_proxy_reaches_the_commands_of_the_dockerfile_too() -> None:
    build = {"image": "registry.example.com/demo/shop", "args": ["--build-arg=HTTPS_PROXY=mine"]}
    job = of_build(replace(config(build=build), job_env=VARIABLES))
    args = [expand(a, {}) for a in container(job, "kaniko")["args"]]
    assert [a for a in args if a.startswith("--build-arg=")] == [
        "--build-arg=HTTPS_PROXY=http://proxy:3128/$(HOME)",
        "--build-arg=no_proxy=.svc",
        "--build-arg=HTTPS_PROXY=mine",  # the last one counts
    ]


@pytest.mark.parametrize(
    "command",
    ["echo $(date) $$ $HOME", "test $(CI) = true", "a && b || exit $?", "echo '$$(CI)'", "x $"],
)
def test_the_command_reaches_the_shell_as_it_is_written(command: str) -> None:
    tests = container(of_test(config(test={"command": command})), "test-runner")
    assert tests["command"] == ["sh", "-ec", TRUSTING]
    assert expand(TRUSTING, values(tests)) == TRUSTING
    assert TRUSTING.endswith('\nexec sh -ec "$0"\n')
    assert [expand(a, values(tests)) for a in tests["args"]] == [command]


def test_names_from_outside_reach_the_tests_as_they_are() -> None:
    env = values(container(of_test(config()), "test-runner"))
    assert env["GIT_BRANCH"] == "feature/$(HOME)-$$"
    assert env["GIT_COMMIT"] == RUN.commit
    assert (env["CI"], env["HOME"]) == ("true", "/tmp")


def test_the_report_is_where_the_side_car_looks() -> None:
    job = of_test(config())
    first = pod(job)["initContainers"][0]
    assert (first["name"], first["restartPolicy"]) == ("results", "Always")
    assert values(first)["JUNIT_XML"] == values(container(job, "test-runner"))["JUNIT_XML"]


def test_kaniko_pushes_the_commit_and_leaves_the_digest() -> None:
    build = {
        "image": "registry.example.com:5000/demo/shop",
        "dockerfile": "docker/Dockerfile.prod",
        "args": ["--build-arg=PRICE=$(5)", "--digest-file=/elsewhere"],
    }
    args = [expand(a, {}) for a in container(of_build(config(build=build)), "kaniko")["args"]]
    assert args == [
        "--context=dir:///kaniko/source/src",
        "--dockerfile=docker/Dockerfile.prod",
        "--destination=registry.example.com:5000/demo/shop:1a2b3c4d",
        "--build-arg=PRICE=$(5)",
        "--digest-file=/elsewhere",
        "--digest-file=/dev/termination-log",  # the last one counts
    ]


def test_kaniko_knows_that_it_is_in_a_container_though_it_has_no_token() -> None:
    # else it guesses from the type of its root, and refuses to work where that is no overlay
    assert values(container(of_build(config()), "kaniko"))["container"] == "kube"


def test_resources_are_those_of_the_configuration() -> None:
    mine = {"requests": {"cpu": "1"}, "limits": {"cpu": "2", "memory": "3Gi"}}
    settings = config(
        test={"resources": mine},
        build={"image": "registry.example.com/demo/shop", "resources": mine},
    )
    both = container(of_test(settings), "test-runner"), container(of_build(settings), "kaniko")
    for main in both:
        for kind, amounts in mine.items():
            assert main["resources"][kind].items() >= amounts.items()
    assert container(of_test(settings), "clone")["resources"]["limits"]["memory"] == "512Mi"


DISK = "ephemeral-storage"


@pytest.mark.parametrize(
    ("resources", "requests", "limits"),
    [
        ({}, "256Mi", "4Gi"),
        ({"limits": {"cpu": "1"}}, "256Mi", "4Gi"),
        ({"limits": {DISK: "100Mi"}}, None, "100Mi"),  # Kubernetes requests as much then
        ({"requests": {DISK: "6Gi"}}, "6Gi", "6Gi"),
        ({"requests": {DISK: "1Gi"}, "limits": {DISK: "20Gi"}}, "1Gi", "20Gi"),
    ],
    ids=["nothing", "other", "limit", "request", "both"],
)
def test_what_a_test_writes_to_the_disk_of_its_node_is_bounded(
    resources: Object, requests: str | None, limits: str
) -> None:
    job = of_test(config(test={"resources": resources}))
    actual = container(job, "test-runner")["resources"]
    assert (actual.get("requests", {}).get(DISK), actual["limits"][DISK]) == (requests, limits)
    volumes = {v["name"]: v["emptyDir"] for v in pod(job)["volumes"] if "emptyDir" in v}
    assert volumes == {"workspace": {"sizeLimit": limits}, "tmp": {"sizeLimit": limits}}


@BOTH
def test_every_container_has_a_limit_of_disk(make: Make) -> None:
    job = make(config())
    every = [*pod(job)["initContainers"], *pod(job)["containers"]]
    assert all(c["resources"][k][DISK] for c in every for k in ("requests", "limits"))
    assert all(v["emptyDir"]["sizeLimit"] for v in pod(job)["volumes"] if "emptyDir" in v)


def test_a_build_may_unpack_more_than_a_test_may_write() -> None:
    assert container(of_build(config()), "kaniko")["resources"]["limits"][DISK] == "10Gi"


@pytest.mark.parametrize(
    ("make", "main", "seconds"),
    [(of_test, "test-runner", 15 * 60 + 3600), (of_build, "kaniko", 20 * 60 + 3600)],
)
def test_a_red_result_is_final_and_a_disruption_is_not(make: Make, main: str, seconds: int) -> None:
    spec = make(config())["spec"]
    assert (spec["suspend"], spec["backoffLimit"]) == (True, 2)
    assert spec["activeDeadlineSeconds"] == seconds
    assert "ttlSecondsAfterFinished" not in spec
    ignore, fail, refused = spec["podFailurePolicy"]["rules"]
    assert refused == {
        "action": "FailJob",
        "onExitCodes": {"containerName": "clone", "operator": "In", "values": [3]},
    }
    assert ignore["action"] == "Ignore"
    assert ignore["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"] == {"containerName": main, "operator": "NotIn", "values": [0]}


# === Which run they belong to ===


@BOTH
def test_the_run_is_read_back_from_its_job(make: Make) -> None:
    assert run_of_job(make(config())) == replace(RUN, received=1234.568)


@BOTH
def test_names_and_labels_fit_kubernetes_for_the_longest_app(make: Callable[..., Object]) -> None:
    name = "a" * 30
    settings = config(name=name)
    job = make(settings, replace(RUN, app=name, id=f"{name}-1a2b3c4d-5e6f"))
    assert len(job["metadata"]["name"]) <= 63
    assert all(len(v) <= 63 for v in job["metadata"]["labels"].values())


@pytest.mark.parametrize(
    "meta", [{}, {"labels": None, "annotations": None}, {"annotations": {"gitops-hook/ref": 5}}]
)
def test_a_job_without_annotations_is_a_run_without_a_name(meta: Object) -> None:
    run = run_of_job({"metadata": meta})
    assert (run.id, run.app, run.received) == ("", "", 0.0)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("12.5", 12.5), (3, 3.0), (None, 0.0), ("", 0.0), ("soon", 0.0), ([], 0.0)],
)
def test_seconds_are_a_number_or_nothing(value: Any, seconds: float) -> None:
    assert seconds_of(value) == seconds


# === The summary of a report ===

CASE = '<testcase classname="{}" name="{}">{}</testcase>'
JEST = """<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="jest tests" tests="1" failures="0" errors="1" time="5.73">
  <testsuite name="add" errors="0" failures="0" skipped="0" tests="1">
    <testcase classname="add" name="add works" time="0.1"></testcase>
  </testsuite>
  <testsuite name="src/app.test.ts" errors="1" failures="0" skipped="0" tests="0">{}</testsuite>
</testsuites>"""
NOT_RUN = CASE.format("Test suite failed to run", "src/app.test.ts", "<error>x</error>")


def report(*cases: str) -> bytes:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>".encode()


def suite(attributes: str, *content: str) -> bytes:
    inside = f"<testsuite {attributes}>{''.join(content)}</testsuite>"
    return f"<testsuites>{inside}</testsuites>".encode()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (report(), "0 passed, 0 failed"),
        (report(CASE.format("a", "b", "")), "1 passed, 0 failed"),
        (
            report(
                CASE.format("a", "b", "<failure>x</failure>"),
                CASE.format("a", "c", "<error/>"),
                CASE.format("a", "d", "<skipped/>"),
                CASE.format("a", "e", "<system-out>x</system-out>"),
            ),
            "1 passed, 2 failed: a.b, a.c",
        ),
        (
            report(CASE.format("a", "b", "<failure/><failure/>")),
            "0 passed, 1 failed: a.b",
        ),
        (
            report(*(CASE.format("a", name, "<error/>") for name in "bcdefg")),
            "0 passed, 6 failed: a.b, a.c, a.d, a.e, a.f",
        ),
        (report("<testcase/>", CASE.format("", "b", "<error/>")), "1 passed, 1 failed: b"),
        (CASE.format("a", "b", "<error/>").encode(), "0 passed, 1 failed: a.b"),
    ],
    ids=[
        "empty", "green", "one-of-each", "two-failures-of-one-case", "the-first-five", "nameless",
        "no-suites",
    ],
)  # fmt: skip
def test_a_report_is_counted(tmp_path: Path, content: bytes, sentence: str) -> None:
    assert summary_of(tmp_path, content) == sentence


def summary_of(directory: Path, content: bytes) -> str:
    """What is said of a report."""
    path = directory / "junit.xml"
    path.write_bytes(content)
    return junit_summary(path).sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (JEST.format("").encode(), "1 passed, 1 failed: suite src/app.test.ts"),
        (
            JEST.format(NOT_RUN).encode(),
            "1 passed, 1 failed: Test suite failed to run.src/app.test.ts",
        ),
        (suite('name="s" failures="2" errors="1"'), "0 passed, 3 failed: suite s"),
        (
            suite('name="s" tests="1" failures="1"', CASE.format("a", "b", "")),
            "1 passed, 1 failed: suite s",
        ),
        (
            suite('failures="2"', CASE.format("a", "b", "<failure/>")),
            "0 passed, 1 failed: a.b",
        ),
        (b'<testsuites errors="2"><testsuite errors="2" name="s"/></testsuites>',
         "0 passed, 2 failed: suite s"),
        (b'<testsuites errors="2"/>', "0 passed, 2 failed: suite"),
        (suite('name="s"', "<error>cannot be loaded</error>"), "0 passed, 1 failed: suite s"),
        (suite('name="s" failures="some" errors="-1"'), "0 passed, 0 failed"),
        (suite('failures="99999999999999999999"'), "0 passed, 0 failed"),
    ],
    ids=[
        "jest-older", "jest", "suite", "beside-green-cases", "declared-and-shown",
        "both-declare", "only-the-root", "an-error-of-a-suite", "no-numbers", "no-such-number",
    ],
)  # fmt: skip
def test_a_suite_that_failed_to_run_is_counted_once_and_named(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    assert summary_of(tmp_path, content) == sentence


RED = "<testsuites{}>" + CASE.format("a", "b", "<failure/>") + "</testsuites>"


@pytest.mark.parametrize(
    "content",
    [
        RED.format(' xmlns="https://example.com/junit"').encode(),
        RED.format(' xmlns:x="u"').replace("</", "</x:").replace("<t", "<x:t").replace(
            "<f", "<x:f").encode(),
        RED.format("").encode("utf-16"),
        (b'<?xml version="1.0" encoding="utf-16"?>'.decode() + RED.format("")).encode("utf-16"),
        ('<?xml version="1.0" encoding="latin-1"?>' + RED.format("")).encode("latin-1"),
        ("<!-- <!DOCTYPE a> -->" + RED.format("")).encode(),
        RED.format("").replace("<failure/>", "<failure><![CDATA[<!DOCTYPE html>]]></failure>")
        .encode(),
    ],
    ids=[
        "default-namespace", "prefixed-namespace", "utf-16", "utf-16-declared", "latin-1",
        "comment", "a-web-page-in-a-message",
    ],
)  # fmt: skip
def test_a_report_is_read_in_any_namespace_and_encoding(tmp_path: Path, content: bytes) -> None:
    assert summary_of(tmp_path, content) == "0 passed, 1 failed: a.b"


PYTEST = """def test_total():
>       assert total([1, 2]) == 4
E       assert 3 == 4

test_shop.py:5: AssertionError"""


@pytest.mark.parametrize(
    ("content", "failures"),
    [
        (report(CASE.format("a", "b", "")), ""),
        (
            report(
                CASE.format("a", "b", f'<failure message="assert 3 == 4">{PYTEST}</failure>'),
                CASE.format("a", "c", '<error message="no such table: carts">x.py:3</error>'),
            ),
            (
                "a.b\n    def test_total():\n    >       assert total([1, 2]) == 4\n"
                "    E       assert 3 == 4\n    test_shop.py:5: AssertionError\n"
                "a.c\n    no such table: carts\n    x.py:3"
            ),
        ),
        (
            report(CASE.format("a", "b", "<failure>one</failure><failure>two</failure>")),
            "a.b\n    onetwo",
        ),
        (
            report(CASE.format("a", "b", "<failure>1 &lt; 2 <![CDATA[<b>]]></failure>")),
            "a.b\n    1 &lt; 2 <b>".replace("&lt;", "<"),
        ),
        (
            suite('errors="1" name="s"', '<error message="cannot import"/>'),
            "suite s\n    cannot import",
        ),
        (report(CASE.format("a", "b", "<system-out>x</system-out>")), ""),
    ],
    ids=["green", "message-and-traceback", "two", "escaped", "whole-suite", "output"],
)
def test_a_report_explains_why_tests_failed(tmp_path: Path, content: bytes, failures: str) -> None:
    path = tmp_path / "junit.xml"
    path.write_bytes(content)
    assert junit_summary(path).failures == failures


def test_explanations_are_few_short_and_fit_for_a_terminal(tmp_path: Path) -> None:
    text = "\n".join([f"line {i} \u202e" + "x" * 1000 for i in range(100)])
    failure = f'<failure message="{"m" * 100_000}">{text}</failure>'
    path = tmp_path / "junit.xml"
    path.write_bytes(report(*(CASE.format("a", f"t{i}", failure) for i in range(30))))
    failures = junit_summary(path).failures
    assert [line for line in failures.split("\n") if line.startswith("a.")] == [
        f"a.t{i}" for i in range(10)
    ]
    assert len(failures) < hook.LOG_BYTES
    assert max(map(len, failures.split("\n"))) == 304
    assert "line 6 \\u202exxx" in failures
    assert "\u202e" not in failures


def test_where_no_report_is_that_is_said(tmp_path: Path) -> None:
    assert junit_summary(tmp_path / "junit.xml").sentence == hook.NO_REPORT
    assert junit_summary(tmp_path / "missing" / "junit.xml").sentence == hook.NO_REPORT


LAUGH = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><testsuites name="&b;"/>'
EXTERNAL = '<!DOCTYPE x SYSTEM "file:///etc/passwd"><testsuites/>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "latin-1"])
@pytest.mark.parametrize("text", [LAUGH, EXTERNAL, f"<!-- {'x' * 5000} -->{LAUGH}"])
def test_a_document_type_is_refused_in_any_encoding(
    tmp_path: Path, text: str, encoding: str
) -> None:
    if encoding == "latin-1":
        text = f'<?xml version="1.0" encoding="latin-1"?>{text}'
    content = b"\xfe\xff" * (encoding == "utf-16-be") + text.encode(encoding)
    said = "the test report cannot be read: it has a document type"
    assert summary_of(tmp_path, content) == said


def test_no_entity_can_be_used_in_the_piece_that_declares_it() -> None:
    for use in ('<!DOCTYPE x[<!ENTITY a "">]><x>&a;', '<!DOCTYPE x[<!ENTITY a "">]><x y="&a;"'):
        assert len(use) - len("<!DOCTYPE x") > hook.PROLOG_PIECE


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no element found"),
        (b"no xml", "syntax error"),
        (b"\xff\xfe\x00", "unclosed token|no element|invalid|partial"),
        (b"<testsuites><testcase/>", "no element found.*, after 1 passed, 0 failed$"),
        (RED.format("").encode()[:-5], "unclosed token.*, after 0 passed, 1 failed: a.b$"),
        (RED.format("").encode() * 2, "junk after document element.*, after 0 passed, 1 failed"),
        (report() + b"\n3 passed", "junk after document element"),
        (b'<?xml version="1.0" encoding="nonsense"?><a/>', "its encoding is not supported$"),
        (b'<?xml version="1.0" encoding="utf-7"?><a/>', "its encoding is not supported$"),
        (b'<coverage><class errors="1"/></coverage>', "it has neither testsuites nor testcases$"),
        (b"<a>" * 101, "it has more than 100 elements within each other$"),
        (b"<testsuites>" + b"<a/>" * 500_000, "it has more than 500000 elements$"),
        (b" " * 70_000 + report(), "no element is in its first 64 KiB$"),
    ],
    ids=[
        "empty", "text", "binary", "cut-off", "cut-off-after-a-failure", "two-reports", "junk",
        "no-encoding", "odd-encoding", "another-report", "depth", "elements", "nothing-for-long",
    ],
)  # fmt: skip
def test_why_a_report_cannot_be_read(tmp_path: Path, content: bytes, why: str) -> None:
    said = summary_of(tmp_path, content)
    assert re.match(f"the test report cannot be read: (?:{why})", said)


def put_directory(path: Path) -> None:
    path.mkdir()


def put_link(path: Path) -> None:
    other = path.with_name("other.xml")
    other.write_bytes(report())
    path.symlink_to(other)


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.mark.parametrize(
    ("put", "why"),
    [
        (put_directory, "it is not a regular file"),
        (os.mkfifo, "it is not a regular file"),
        (put_link, "Too many levels of symbolic links"),
        (put_socket, "No such device or address"),
        (lambda path: path.symlink_to("/dev/zero"), "Too many levels of symbolic links"),
    ],
    ids=["directory", "pipe", "link", "socket", "endless"],
)
def test_what_stands_in_the_place_of_a_report_is_neither_followed_nor_waited_for(
    tmp_path: Path, put: Callable[[Path], None], why: str
) -> None:
    path = tmp_path / "junit.xml"
    put(path)
    assert junit_summary(path).sentence == f"the test report cannot be read: {why}"


def test_a_report_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    assert junit_summary(path).sentence == "the test report has 100 MiB; at most 10 MiB are read"
    with path.open("wb") as file:
        file.truncate(10 * 2**20 + 1)
    assert junit_summary(path).sentence == "the test report has 11 MiB; at most 10 MiB are read"


def test_a_report_that_grows_while_it_is_read_is_too_large() -> None:
    grown = io.BytesIO(b"<testsuites>" + b" " * hook.REPORT_BYTES)
    with pytest.raises(hook.OversizedError, match="has 11 MiB"):
        hook.read_report(grown, hook.ReportCounts())


@pytest.mark.parametrize("letter", ["x", "ü", "\U0001f600"])
def test_the_summary_of_any_report_fits_a_termination_message(tmp_path: Path, letter: str) -> None:
    content = report(*[CASE.format(letter * 500, "n", "<error/>")] * 1000)
    summary = summary_of(tmp_path, content)
    assert len(summary.encode()) <= 4096
    assert summary.startswith("0 passed, 1000 failed: ")


@settings(max_examples=250, deadline=None, database=None)
@given(TARGETS["reports"].inputs)
def test_anything_in_the_place_of_a_report_becomes_one_line(data: bytes) -> None:
    TARGETS["reports"].run(data)


# === The side-car that collects it ===


@dataclass(frozen=True)
class Collected:
    """What the side-car left, and the most memory that it took, in MB."""

    status: int
    message: str
    memory: float


def catches_sigterm(pid: int) -> bool:
    """Whether a process would handle SIGTERM now."""
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> signal.SIGTERM - 1 & 1)


# The command as it is, and what its process took at most. What the kernel counts of a child begins
# with the size of its parent.
MEASURED = """
import atexit, runpy, sys
def peak():
    with open("/proc/self/status") as status:
        print(status.read().partition("VmHWM:")[2].split()[0])
atexit.register(peak)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def collected(directory: Path) -> Collected:
    """Run the side-car beside tests that have ended."""
    log = directory / "termination-log"
    environ = {"JUNIT_XML": str(directory / "junit.xml"), "TERMINATION_LOG": str(log)}
    environ["PYTHONPATH"] = str(ROOT)
    argv = [sys.executable, "-P", "-c", MEASURED, "gitops_hook", "collect"]
    with subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            eventually(lambda: catches_sigterm(process.pid), 30, "it listens")
            process.send_signal(signal.SIGTERM)
            peak = process.communicate(timeout=60)[0].split("\n")[-2]  # after what it prints
        finally:
            process.kill()
    return Collected(process.returncode, log.read_text("utf-8"), int(peak) * 1024 / 1e6)


def test_the_clone_of_tests_ends_only_when_their_side_car_listens(tmp_path: Path) -> None:
    job = of_test(config())
    paths = {values(container(job, name))["COLLECTING"] for name in ("results", "clone")}
    assert len(paths) == 1
    assert "COLLECTING" not in values(container(of_build(config()), "clone"))
    listening = tmp_path / "listening"
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(hook.await_collector, str(listening))
        assert not waits.done()
        environ = {"JUNIT_XML": "x", "TERMINATION_LOG": str(tmp_path / "log"), **finding()}
        environ["COLLECTING"] = str(listening)
        with subprocess.Popen(argv_of("collect"), env=environ) as process:
            waits.result(60)
            assert catches_sigterm(process.pid)
            process.terminate()
            assert process.wait(60) == 0
    hook.await_collector("")


def ten_mebibytes(head: bytes, part: Callable[[int], bytes], tail: bytes) -> bytes:
    """A report that is as large as may be."""
    room = 10 * 2**20 - len(head) - len(tail)
    parts = bytearray()
    for number in itertools.count():
        more = part(number)
        if len(parts) + len(more) > room:
            return bytes(head + parts + tail)
        parts += more
    raise AssertionError


LARGEST: dict[str, tuple[bytes, Callable[[int], bytes], bytes]] = {
    "cases": (b"<testsuites>", lambda n: b'<testcase name="%d"/>' % n, b"</testsuites>"),
    "attribute": (b'<testsuites><testcase name="', lambda n: b"x" * 1000, b'"/></testsuites>'),
    "attributes": (b"<testsuites><a ", lambda n: b'a%x="" ' % n, b"/></testsuites>"),
    "names": (b"<testsuites>", lambda n: b"<n%020d/>" % n, b"</testsuites>"),
    "text": (b"<testsuites>", lambda n: b"x" * 1000, b"</testsuites>"),
    "comment": (b"<testsuites><!--", lambda n: b"x" * 1000, b"--></testsuites>"),
    "failures": (
        b"<testsuites>",
        lambda n: b'<testcase name="%d"><failure message="m"/></testcase>' % n,
        b"</testsuites>",
    ),
}


@pytest.mark.cluster
@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_report_takes_less_memory_than_the_side_car_has(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "junit.xml").write_bytes(ten_mebibytes(*LARGEST[kind]))
    left = collected(tmp_path)
    assert left.status == 0
    assert re.match(r"\d+ passed, \d+ failed|the test report cannot be read: ", left.message)
    assert left.memory < 400  # of 512 MiB


def test_the_side_car_says_what_a_report_that_is_too_large_has(tmp_path: Path) -> None:
    with (tmp_path / "junit.xml").open("wb") as file:
        file.truncate(100 * 2**20)
    left = collected(tmp_path)
    said = "the test report has 100 MiB; at most 10 MiB are read"
    assert (left.status, left.message) == (0, said)
    assert left.memory < 150


def test_the_side_car_says_that_there_is_no_report(tmp_path: Path) -> None:
    left = collected(tmp_path)
    assert (left.status, left.message) == (0, "no test report")
