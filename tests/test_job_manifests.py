"""The Jobs of the tests and the build: that Kubernetes takes them, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

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
from tests.standin.cluster import Cluster
from tests.standin.kubectl import find_kubectl
from tests.standin.sandbox import expand

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
    return load_config(yaml.safe_dump({"apps": [{**entry, **app}], "images": images}))


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
    """The environment as the kubelet gives it to the container."""
    env: dict[str, str] = {}
    for entry in container["env"]:
        env[entry["name"]] = expand(entry["value"], env)
    return env


# === Kubernetes takes them ===


@BOTH
def test_they_are_valid_by_the_schema(make: Make) -> None:
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(make(config()), version, strict=True)


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


# === What they may do ===


@BOTH
def test_no_pod_has_a_token_or_the_addresses_of_services(make: Make) -> None:
    spec = pod(make(config()))
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


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
    names = ("CLONE_APP", "CLONE_DEPTH", "CLONE_TAGS", "CLONE_SUBMODULES", "CLONE_LFS")
    env = values(container(make(config()), "clone"))
    assert [env[name] for name in names] == ["shop", "1", "false", "", ""]
    assert clone_settings(env) == config().apps[0].clone
    settings = config(clone={"depth": "full", "tags": True, "submodules": True, "lfs": False})
    env = values(container(make(settings), "clone"))
    assert [env[name] for name in names] == ["shop", "full", "true", "true", "false"]
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


def report(*cases: str) -> bytes:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>".encode()


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
    ],
    ids=["empty", "green", "one-of-each", "two-failures-of-one-case", "the-first-five"],
)
def test_a_report_is_counted(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "junit.xml"
    path.write_bytes(content)
    assert junit_summary(path) == sentence


LAUGH = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><testsuites>&b;</testsuites>'


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no xml", b"<testsuites><testcase/>", b"\xff\xfe\x00", LAUGH,
     b'<?xml version="1.0" encoding="nonsense"?><a/>',
     b'<?xml version="1.0" encoding="utf-7"?><a/>'],
    ids=["none", "empty", "text", "cut-off", "binary", "entities", "no-encoding", "odd-encoding"],
)  # fmt: skip
def test_a_file_that_is_no_report_has_no_summary(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "junit.xml"
    if content is not None:
        path.write_bytes(content)
    assert junit_summary(path) == ""


def test_a_directory_in_the_place_of_the_report_has_no_summary(tmp_path: Path) -> None:
    assert junit_summary(tmp_path) == ""


@pytest.mark.parametrize("letter", ["x", "ü", "\U0001f600"])
def test_the_summary_of_any_report_fits_a_termination_message(tmp_path: Path, letter: str) -> None:
    path = tmp_path / "junit.xml"
    path.write_bytes(report(*[CASE.format(letter * 500, "n", "<error/>")] * 1000))
    summary = junit_summary(path)
    assert len(summary.encode()) <= 4096
    assert summary.startswith("0 passed, 1000 failed: ")
