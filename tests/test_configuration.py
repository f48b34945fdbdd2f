"""A configuration is valid as a whole, or every fault in it is told at once, with its place."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import gitops_hook as hook
from tests.deliveries import TOKEN
from tests.settings import settings_by_path

APP = {"name": "shop", "repository": "https://gitlab.example.com/demo/shop.git"}
IMAGE = {"image": "registry.example.com/demo/shop"}


def document(app: Any = None, **top: Any) -> str:
    """A valid configuration of one app, with other values."""
    one = {**APP, "build": IMAGE, **(app or {})}
    return yaml.safe_dump({"apps": [one], **top})


def loaded(app: Any = None, **top: Any) -> hook.Config:
    return hook.load_config(document(app, **top))


def faults(text: str) -> list[str]:
    with pytest.raises(hook.ConfigError) as wrong:
        hook.load_config(text)
    assert str(wrong.value) == "; ".join(wrong.value.faults)
    return list(wrong.value.faults)


# === Defaults ===


def test_an_app_needs_a_name_a_repository_and_where_its_image_goes() -> None:
    config = loaded()
    (app,) = config.apps
    assert (app.clone.depth, app.clone.tags) == (1, False)
    assert (app.clone.submodules, app.clone.lfs) == ("", "")
    assert config.job_env == {}
    assert app.branch == "main"
    assert app.deploy_ref == "refs/heads/main"
    assert app.test_branches == ("*",)
    assert app.test.command.endswith("--junitxml=$JUNIT_XML")
    assert app.test.resources["limits"] == {"cpu": "500m", "memory": "512Mi"}
    assert app.build.resources["limits"] == {"cpu": "2", "memory": "4Gi"}
    assert app.deploy.environments == ("staging", "production")
    assert (app.deploy.health.path, app.deploy.health.failures) == ("", 3)
    assert (app.deploy.rollout_timeout, app.deploy.bake, app.deploy.drain) == (300.0, 60.0, 60.0)
    assert app.deploy.retain is None
    assert app.deploy.crashes == 2
    assert config.namespaces == {n: n for n in ("test", "build", "staging", "production")}
    assert (config.webhook.verify, config.webhook.max_body) == ("signature", 5 * 1024 * 1024)
    assert (config.limits.max_running, config.limits.spool_files) == (4, 10_000)
    assert (config.limits.queue_timeout, config.catch_up) == (3600.0, 300.0)


def test_the_example_of_the_design_is_valid() -> None:
    config = hook.load_config("""
apps:
  - name: shop
    repository: https://gitlab.example.com/demo/shop.git
    branch: main
    test_branches: ["*"]
    test: {image: python:3.12-slim, command: "python -m pytest", timeout: 15m}
    build: {builder: kaniko, image: registry.example.com/demo/shop, dockerfile: Dockerfile,
            args: ["--cache=true"], timeout: 20m}
    deploy:
      manifests: deploy/
      ignore: [CronJob/night, Ingress]
      ignore_kinds: [HorizontalPodAutoscaler]
      service_accounts: [shop-s3]
      environments: [staging, production]
      health: {path: /ready, port: management, scheme: https, headers: {Host: shop.example.com},
               successes: 3, failures: 3, timeout: 30s}
      rollout_timeout: 300s
      bake: 60s
      drain: 60s
      retain: 1
namespaces: {test: test, build: build, staging: staging, production: production}
images: {hook: gitops-hook:dev, kaniko: ghcr.io/osscontainertools/kaniko:v1.28.3}
webhook: {verify: hmac, max_body: 512KiB}
limits: {max_running: 4, queue_timeout: 1h, spool_files: 10000, kubectl: 8}
catch_up: 5m
""")
    (app,) = config.apps
    assert (app.deploy.retain, app.build.args) == (1, ("--cache=true",))
    assert app.deploy.service_accounts == ("shop-s3",)
    kinds = ("CronJob", "Ingress", "HorizontalPodAutoscaler")
    assert [app.deploy.ignores(kind, "night") for kind in kinds] == [True, True, True]
    assert not app.deploy.ignores("CronJob", "day")
    assert config.webhook.max_body == 512 * 1024


def test_no_app_at_all_is_valid() -> None:
    assert hook.load_config("apps: []").apps == ()


def test_a_section_left_empty_has_its_defaults() -> None:
    assert hook.load_config(document() + "webhook:\nlimits: {}\n") == loaded()


def test_an_app_without_environments_needs_no_image() -> None:
    assert loaded({"build": {}, "deploy": {"environments": []}}).apps[0].build.image == ""


def test_values_do_not_change() -> None:
    config: Any = loaded()
    with pytest.raises(AttributeError):
        config.catch_up = 1.0


# === Faults ===


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "configuration: is not a mapping"),
        ("[]", "configuration: is not a mapping"),
        ("{}", "apps: is required"),
        ("apps:", "apps: is required"),
        ("apps: 5", "apps: 5 is not a list"),
        ("apps: {}", "apps: {} is not a list"),
        ("apps: [5]", "apps[0]: is not a mapping"),
        ("apps: []\napp: []", "app: unknown key (known: apps, namespaces, images, webhook,"),
        ("apps: []\n1: []", "1: unknown key"),
        ("apps: []\nlimits: 5", "limits: is not a mapping"),
        (
            "apps: []\nlimits: {kubectl: 0}",
            "limits.kubectl: 0 is not a whole number from 1 to 999999",
        ),
        ("apps: []\nlimits: {kubectl: true}", "limits.kubectl: True is not a whole number"),
        ("apps: []\nlimits: {kubectl: '8'}", "limits.kubectl: '8' is not a whole number"),
        ("apps: []\nwebhook: {verify: none}", "webhook.verify: 'none' is not signature, token"),
        ("apps: []\nwebhook: {verify: false}", "webhook.verify: False is not signature, token"),
        ("apps: []\nwebhook: {max_body: 5MB}", "webhook.max_body: '5MB' is not a size up to 64MiB"),
        ("apps: []\nwebhook: {max_body: 0MiB}", "webhook.max_body: '0MiB' is not a size"),
        ("apps: []\nlimits: {checkout: 0MiB}", "limits.checkout: '0MiB' is not a size from 1MiB"),
        ("apps: []\nlimits: {checkout: 1GiB}", "limits.checkout: '1GiB' is not a size from 1MiB"),
        ("apps: []\nwebhook: {max_body: 99MiB}", "webhook.max_body: '99MiB' is not a size"),
        ("apps: []\ncatch_up: 0s", "catch_up: '0s' is not a duration (e.g. 90s, 15m, 2h)"),
        ("apps: []\nimages: {hook: UPPER}", "images.hook: 'UPPER' is not an image reference"),
        ("apps: []\nimages: {hook: r/A/b}", "images.hook: 'r/A/b' is not an image reference"),
        ("apps: []\napps: []", "configuration: not YAML: apps twice in one mapping"),
        ("apps:\n- {name: a, name: b}", "configuration: not YAML: name twice in one mapping"),
        ("x: {y: &m {<<: &b {a: 1}, a: 2}}\ntop: {<<: *m}", "x: unknown key"),
        ("a: *b", "configuration: not YAML: found undefined alias"),
        ("a: [", "configuration: not YAML: while parsing"),
        ("a: 2024-13-45", "configuration: not YAML: month must be in 1..12"),
        ("a: \x00", "configuration: not YAML: unacceptable character"),
        ("{[a]: b}", "configuration: not YAML: while constructing a mapping"),
        ("!!python/object:os.system x", "configuration: not YAML: could not determine a constr"),
        ("[" * 1000, "configuration: not YAML: maximum recursion depth exceeded"),
    ],
)
def test_a_fault_at_the_top_is_reported(text: str, fault: str) -> None:
    assert faults(text)[0].startswith(fault)


NOT = "is not"
SPACES = "test, build, staging, production"
NO_NAME = f"{NOT} a DNS label of at most 30 characters that begins with a letter"
NO_URL = f"{NOT} an http(s) URL without user, query and fragment (a user belongs in"
NO_DURATION = f"{NOT} a duration (e.g. 90s, 15m, 2h)"
NO_FOLDER = f"{NOT} a relative path within the repository"
NO_IMAGE = f"{NOT} an image reference"
NO_TARGET = f"{NOT} an image without tag and digest"


@pytest.mark.parametrize(
    ("app", "fault"),
    [
        ({"name": None}, "name: is required"),
        ({"name": "Shop"}, f"name: 'Shop' {NO_NAME}"),
        ({"name": "a" * 31}, f"name: '{'a' * 31}' {NO_NAME}"),
        ({"name": "-a"}, f"name: '-a' {NO_NAME}"),
        ({"name": "a\n"}, f"name: 'a\\n' {NO_NAME}"),
        ({"name": 5}, f"name: 5 {NO_NAME}"),
        ({"repository": None}, "repository: is required"),
        ({"repository": "git@host:a/b"}, f"repository: 'git@host:a/b' {NO_URL}"),
        ({"repository": "https://u:p@h/a"}, f"repository: 'https://u:p@h/a' {NO_URL}"),
        ({"repository": "https://h/a?b"}, f"repository: 'https://h/a?b' {NO_URL}"),
        ({"repository": "https://h"}, f"repository: 'https://h' {NO_URL}"),
        ({"repository": "https://h/a b"}, f"repository: 'https://h/a b' {NO_URL}"),
        ({"repository": "--upload-pack=x"}, f"repository: '--upload-pack=x' {NO_URL}"),
        ({"repository": "ext::sh"}, f"repository: 'ext::sh' {NO_URL}"),
        ({"branch": "refs/heads/main"}, "branch: 'refs/heads/main' is not a branch name (without"),
        ({"branch": "rel*"}, "branch: 'rel*' is not a branch name (without refs/heads/)"),
        ({"branch": 1.0}, "branch: 1.0 is not a branch name (without refs/heads/)"),
        ({"test_branches": "*"}, "test_branches: '*' is not a list"),
        ({"test_branches": [5]}, "test_branches[0]: 5 is not a text"),
        ({"test_branches": [""]}, "test_branches[0]: '' is not a text"),
        ({"test": {"image": "a b"}}, f"test.image: 'a b' {NO_IMAGE}"),
        ({"test": {"command": " "}}, "test.command: ' ' is not a text"),
        ({"test": {"command": "a\0"}}, "test.command: 'a\\x00' is not a text"),
        ({"test": {"timeout": "15x"}}, f"test.timeout: '15x' {NO_DURATION}"),
        ({"test": {"timeout": 15}}, f"test.timeout: 15 {NO_DURATION}"),
        ({"test": {"timeout": "0s"}}, f"test.timeout: '0s' {NO_DURATION}"),
        ({"test": {"timeout": "500ms"}}, f"test.timeout: '500ms' {NO_DURATION}"),
        ({"test": {"timeout": "-1m"}}, f"test.timeout: '-1m' {NO_DURATION}"),
        ({"test": {"timeout": "999999h"}}, f"test.timeout: '999999h' {NO_DURATION}"),
        ({"test": {"timeouts": "1m"}}, "test.timeouts: unknown key (known: image, command, time"),
        ({"test": []}, "test: is not a mapping"),
        ({"test": {"resources": []}}, "test.resources: [] is not a mapping"),
        (
            {"test": {"resources": {"limit": {}}}},
            "test.resources: 'limit' is neither requests nor limits",
        ),
        ({"test": {"resources": {"limits": 5}}}, "test.resources.limits: 5 is not a mapping"),
        (
            {"test": {"resources": {"limits": {"cpu": "fast"}}}},
            "test.resources.limits.cpu: 'fast' is not a quantity (e.g. 250m, 1Gi)",
        ),
        ({"build": {"builder": "docker"}}, "build.builder: 'docker' is not kaniko or none"),
        ({"build": {"image": "a b"}}, f"build.image: 'a b' {NO_TARGET}"),
        (
            {"build": {"image": "r.example.com/Shop"}},
            f"build.image: 'r.example.com/Shop' {NO_TARGET}",
        ),
        ({"build": {"image": ""}}, "build.image: is required with builder kaniko"),
        ({"build": {"image": "a@sha256:b"}}, f"build.image: 'a@sha256:b' {NO_TARGET}"),
        ({"build": {"image": "shop:1"}}, f"build.image: 'shop:1' {NO_TARGET}"),
        ({"build": {"image": "r:5000/a:1"}}, f"build.image: 'r:5000/a:1' {NO_TARGET}"),
        ({"build": {"dockerfile": "/a"}}, f"build.dockerfile: '/a' {NO_FOLDER}"),
        ({"build": {"dockerfile": "a/../../b"}}, f"build.dockerfile: 'a/../../b' {NO_FOLDER}"),
        ({"build": {"args": "--x"}}, "build.args: '--x' is not a list"),
        ({"deploy": {"manifests": ".."}}, f"deploy.manifests: '..' {NO_FOLDER}"),
        ({"deploy": {"manifests": "-f"}}, f"deploy.manifests: '-f' {NO_FOLDER}"),
        (
            {"deploy": {"manifests": "deploy/{env}"}},
            "deploy.manifests: 'deploy/{env}' has another placeholder than {environment}",
        ),
        (
            {"deploy": {"manifests": "deploy/{environment}}"}},
            "deploy.manifests: 'deploy/{environment}}' has another placeholder than",
        ),
        (
            {"deploy": {"manifests": "{environment}"}},
            "deploy.manifests: '{environment}' has {environment} in its first folder, which must",
        ),
        (
            {"deploy": {"manifests": "./k8s-{environment}/app"}},
            "deploy.manifests: './k8s-{environment}/app' has {environment} in its first folder",
        ),
        (
            {"deploy": {"environments": ["qa"]}},
            "deploy.environments: 'qa' is not an environment in",
        ),
        ({"deploy": {"environments": ["test"]}}, "deploy.environments: 'test' is not an environme"),
        (
            {"deploy": {"environments": ["staging", "staging"]}},
            "deploy.environments: names an environment twice",
        ),
        ({"deploy": {"health": {"path": "ready"}}}, "deploy.health.path: 'ready' is not a path"),
        ({"deploy": {"health": {"path": "/a b"}}}, "deploy.health.path: '/a b' is not a path"),
        ({"deploy": {"health": {"failures": 0}}}, "deploy.health.failures: 0 is not a whole numbe"),
        ({"deploy": {"health": {"port": 65536}}}, "deploy.health.port: 65536 is more than 65535"),
        ({"deploy": {"health": {"port": "HTTP"}}}, "deploy.health.port: 'HTTP' is not the numb"),
        ({"deploy": {"health": {"scheme": "ftp"}}}, "deploy.health.scheme: 'ftp' is not HTTP or"),
        (
            {"deploy": {"health": {"headers": {"X": "a\r\nHost: b"}}}},
            "deploy.health.headers.X: 'a\\r\\nHost: b' is not a text of one line",
        ),
        (
            {"deploy": {"health": {"headers": {"X: a\nHost": "b"}}}},
            "deploy.health.headers: 'X: a\\nHost' is no header's name",
        ),
        ({"deploy": {"bake": "soon"}}, "deploy.bake: 'soon' is not a duration (e.g. 90s, 15m, 2h)"),
        (
            {"clone": {"depth": 0}},
            "clone.depth: 0 is not a whole number from 1 to 999999",
        ),
        ({"clone": {"depth": "deep"}}, "clone.depth: 'deep' is not a whole number from 1"),
        ({"clone": {"tags": "yes"}}, "clone.tags: 'yes' is not true or false"),
        ({"clone": {"submodules": "no"}}, "clone.submodules: 'no' is not true, false or empty"),
        ({"clone": {"lfs": 1}}, "clone.lfs: 1 is not true, false or empty"),
        (
            {"deploy": {"retain": "some"}},
            "deploy.retain: 'some' is not full or a whole number from",
        ),
        (
            {"deploy": {"retain": -1}},
            "deploy.retain: -1 is not full or a whole number from 0 to 999",
        ),
    ],
    ids=str,
)
def test_a_fault_of_an_app_is_reported_with_its_path(app: Any, fault: str) -> None:
    build = {"build": {**IMAGE, **app.get("build", {})}}
    (only_fault,) = faults(document({**app, **build}))
    assert only_fault.startswith("apps[0]" + fault.rjust(len(fault) + (fault[0] != ":"), "."))


@pytest.mark.parametrize(
    "app",
    [
        {"repository": "/srv/git/shop.git"},
        {"repository": "file:///srv/git/shop.git"},
        {"repository": "http://host:8080/a/b/c"},
        {"repository": "https://[::1]:8443/a"},
        {"branch": "release/2.x"},
        {"test": {"timeout": "90s", "resources": {}}},
        {"test": {"resources": {"limits": {"cpu": 2, "memory": 1.5, "nvidia.com/gpu": 1}}}},
        {
            "test": {
                "resources": {"limits": {"a": "1m", "b": "1k", "c": "1M", "d": "1G", "e": "1T"}}
            }
        },
        {"test": {"resources": {"limits": {"a": "1Ki", "b": "1Mi", "c": "1Gi", "d": "1Ti"}}}},
        {"build": {"image": "localhost:5000/demo/shop"}},
        {"build": {"builder": "none"}},
        {"deploy": {"manifests": "./deploy/live/"}},
        {"deploy": {"manifests": "a..b"}},
        {"deploy": {"manifests": "deploy/{environment}"}},
        {"deploy": {"manifests": "./deploy/overlays/shop-{environment}/{environment}"}},
        {"deploy": {"bake": "0s", "drain": "250ms", "retain": 0}},
        {"clone": {"depth": "full", "tags": True, "submodules": "", "lfs": ""}},
    ],
    ids=str,
)
def test_valid_values_are_accepted(app: dict[str, Any]) -> None:
    assert loaded(app)


def test_each_environment_has_the_folder_that_its_name_makes() -> None:
    overlays = loaded({"deploy": {"manifests": "deploy/overlays/{environment}"}})
    deploy = overlays.apps[0].deploy
    folders = [deploy.folder(environment) for environment in deploy.environments]
    assert folders == ["deploy/overlays/staging", "deploy/overlays/production"]
    same = loaded({"deploy": {"manifests": "k8s"}})
    assert same.apps[0].deploy.folder("staging") == "k8s"


@pytest.mark.parametrize(
    ("text", "seconds"), [("1s", 1.0), ("90s", 90.0), ("15m", 900.0), ("2h", 7200)]
)
def test_durations_are_read_in_all_their_units(text: str, seconds: float) -> None:
    assert loaded(catch_up=text).catch_up == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("clone", "options"),
    [
        ({}, ("--depth=1",)),
        ({"depth": 50}, ("--depth=50",)),
        ({"depth": "full"}, ()),
        ({"tags": True}, ()),
        ({"tags": True, "depth": 50}, ("--depth=50",)),
    ],
    ids=str,
)
def test_history_is_as_deep_as_is_set_and_whole_for_tags_alone(
    clone: dict[str, Any], options: tuple[str, ...]
) -> None:
    assert loaded({"clone": clone}).apps[0].clone.depth_options == options


@pytest.mark.parametrize("written", ["true", "True", '"true"'])
def test_what_is_decided_on_submodules_and_lfs_is_a_word(written: str) -> None:
    text = document({"clone": {"submodules": True, "lfs": False}})
    (app,) = hook.load_config(text.replace("true", written)).apps
    assert (app.clone.submodules, app.clone.lfs) == ("true", "false")


def test_variables_of_jobs_are_plain_texts() -> None:
    variables = {"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "", "RETRIES": 3}
    assert loaded(job_env=variables).job_env == {**variables, "RETRIES": "3"}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("A-B", "is no name of an environment variable"),
        ("1A", "is no name of an environment variable"),
        ("A=B", "is no name of an environment variable"),
        ("", "is no name of an environment variable"),
        *(
            (name, "is set by this program, or would change how it works")
            for name in ("CLONE_URL", "GIT_CONFIG_COUNT", "LD_PRELOAD", "PATH", "HOME", "CA_FILE",
                         "GITOPS_HOOK_CA", "PYTHONPATH", "CREDENTIALS_FILE", "KUBECONFIG")
        ),
    ],
)  # fmt: skip
def test_a_variable_of_jobs_with_a_name_of_ours_is_a_fault(name: str, fault: str) -> None:
    assert faults(document(job_env={name: "x"})) == [f"job_env.{name}: {fault}"]


@pytest.mark.parametrize("value", ["a\nb", "a\x00b", [], True])
def test_the_value_of_a_variable_is_one_line(value: Any) -> None:
    (fault,) = faults(document(job_env={"A": value}))
    assert fault.startswith("job_env.A: ")


def service(**more: Any) -> Any:
    return {"name": "db", "image": "postgres:16", "port": 5432, **more}


def test_what_is_not_said_of_a_service_has_a_default() -> None:
    (db,) = loaded({"test": {"services": [service()]}}).apps[0].test.services
    assert (db.command, db.env, db.user, db.writable, db.start_timeout) == ("", {}, 65532, (), 60.0)


TAKEN = "is mounted already, or holds such a folder"
PATH = "is not an absolute path without . and .."


@pytest.mark.parametrize(
    ("services", "fault"),
    [
        ([service(name=f"s{n}", port=n + 1) for n in range(6)], ": 6 are too many (at most 5)"),
        ([service(), service(port=1)], "[1].name: 'db' is the name of another container"),
        ([service(name="clone")], "[0].name: 'clone' is the name of another container"),
        ([service(name="test-runner")], "[0].name: 'test-runner' is the name of another container"),
        ([service(), service(name="b")], "[1].port: 5432 is the port of another service"),
        ([service(port=0)], "[0].port: 0 is not a port from 1 to 65535"),
        ([service(port=65536)], "[0].port: 65536 is not a port from 1 to 65535"),
        ([service(user=0)], "[0].user: 0 is not the number of a user that is not root"),
        ([service(writable=["/a", "/a"])], f"[0].writable: /a {TAKEN}"),
        ([service(writable=["/a", "/a/b"])], f"[0].writable: /a {TAKEN}"),
        ([service(writable=["/tmp/x"])], f"[0].writable: /tmp/x {TAKEN}"),
        ([service(writable=["/a/../b"])], f"[0].writable[0]: '/a/../b' {PATH}"),
        ([service(writable=["a"])], f"[0].writable[0]: 'a' {PATH}"),
        ([service(writable=["/"])], f"[0].writable[0]: '/' {PATH}"),
        ([service(env={"A-B": "x"})], "[0].env.A-B: is no name of an environment variable"),
        ([service(resources={"limit": {}})],
         "[0].resources: 'limit' is neither requests nor limits"),
        ([{"image": "x:1", "port": 1}], "[0].name: is required"),
    ],
)  # fmt: skip
def test_services_that_collide_or_cannot_run_are_faults(services: Any, fault: str) -> None:
    text = document({"test": {"services": services}})
    found = [f for f in faults(text) if f"apps[0].test.services{fault}" == f]
    assert found == [f"apps[0].test.services{fault}"]


@pytest.mark.parametrize(
    ("test", "fault"),
    [
        ({"env": {"CI": "x"}}, "env.CI: is set by this program, or would change how it works"),
        ({"env_from": ["A"]}, "env_from[0]: 'A' is not the name of an object"),
        ({"cache": "a/b"}, "cache: 'a/b' is not the name of a claim"),
    ],
)
def test_names_that_tests_cannot_have_are_faults(test: Any, fault: str) -> None:
    assert faults(document({"test": test})) == [f"apps[0].test.{fault}"]


def test_a_pause_may_be_shorter_than_a_second() -> None:
    deploy = loaded({"deploy": {"bake": "250ms"}}).apps[0].deploy
    assert deploy.bake == pytest.approx(0.25)


@pytest.mark.parametrize("other", ["shop-blue", "shop-green", "shop-preview"])
def test_no_app_may_be_called_like_what_another_app_creates(other: str) -> None:
    apps = [{**APP, "build": IMAGE}, {**APP, "name": other, "build": IMAGE}]
    fault = f"apps[1].name: {other!r} is the name of another app's Deployment or Service"
    assert faults(yaml.safe_dump({"apps": apps})) == [fault]


def named_services(*services: str, environments: Sequence[str] = ("production",)) -> str:
    """Apps a, b and so on, whose live Services have these names."""
    apps = [
        {
            "name": name,
            "repository": f"/srv/{name}.git",
            "build": IMAGE,
            "deploy": {"service": service, "environments": [environment]},
        }
        for name, service, environment in zip(
            "abcd", services, [*environments] * len(services), strict=False
        )
    ]
    return yaml.safe_dump({"apps": apps})


def test_the_live_service_has_the_name_of_the_app_or_another() -> None:
    apps = hook.load_config(named_services("", "web-1")).apps
    assert [app.service_name for app in apps] == ["a", "web-1"]


@pytest.mark.parametrize("name", ["1web", "web_1", "Web", "web.shop", "web-", "w" * 64, "../x", 5])
def test_a_name_that_no_service_can_have_is_a_fault(name: Any) -> None:
    (fault,) = faults(document({"deploy": {"service": name}}))
    assert fault == f"apps[0].deploy.service: {name!r} is not a name that a Service can have"


@pytest.mark.parametrize(
    ("services", "fault"),
    [
        (("web", "web"), "apps[1].deploy.service: 'web' is the live Service of app 'a', too"),
        (("", "a"), "apps[1].deploy.service: 'a' is the live Service of app 'a', too"),
        (("b", ""), "apps[1].deploy.service: 'b' is the live Service of app 'a', too"),
        (("a-preview", ""), "apps[0].deploy.service: 'a-preview' is a preview Service's name"),
        (("b-preview", ""), "apps[0].deploy.service: 'b-preview' is a preview Service's name"),
    ],
)
def test_no_two_apps_of_an_environment_have_one_live_service(
    services: tuple[str, str], fault: str
) -> None:
    assert faults(named_services(*services)) == [fault]


def test_apps_of_different_environments_may_name_their_live_services_alike() -> None:
    text = named_services("web", "web", environments=("staging", "production"))
    assert [app.service_name for app in hook.load_config(text).apps] == ["web", "web"]


def test_no_two_apps_have_one_name() -> None:
    apps = [{**APP, "build": IMAGE}] * 2
    assert faults(yaml.safe_dump({"apps": apps})) == [
        "apps[1].name: 'shop' is the name of two apps"
    ]


@pytest.mark.parametrize(
    "spaces",
    [
        {"test": "a", "staging": "s", "production": "p"},
        {"build": "b", "staging": "s", "production": "p"},
        {"test": "a", "build": "a", "staging": "s", "production": "p"},
        {"test": "a", "build": "b", "staging": "s", "production": "s"},
        {"test": "a", "build": "orchestration", "staging": "s", "production": "p"},
    ],
)
def test_every_stage_and_environment_has_a_namespace_of_its_own(spaces: dict[str, str]) -> None:
    (fault,) = faults(document(namespaces=spaces))
    own = "test, build and each environment need one of their own, none orchestration"
    assert fault == f"namespaces: {own}; their keys must be DNS labels"


@pytest.mark.parametrize(
    "spaces", ["test", [], {"test": 5}, {"Test": "a", "test": "b", "build": "c"}, {"a": "x" * 64}]
)
def test_namespaces_are_dns_labels(spaces: Any) -> None:
    assert faults(document(namespaces=spaces))[0].startswith("namespaces")


def test_all_faults_are_reported_at_once() -> None:
    text = """
apps:
  - {name: shop, repository: https://h/a, test: {timeout: 15x, tiemout: 1m}, build: {image: r/a:1}}
  - {name: shop, repository: nowhere, deploy: {environments: [qa, staging], retain: many}}
  - nothing
namespaces: {test: test, build: build, staging: staging}
webhook: {verify: maybe}
colour: blue
"""
    assert [fault.split(" (")[0] for fault in faults(text)] == [
        "colour: unknown key",
        "apps[0].test.tiemout: unknown key",
        "apps[0].test.timeout: '15x' is not a duration",
        "apps[0].build.image: 'r/a:1' is not an image without tag and digest",
        "apps[1].repository: 'nowhere' is not an http(s) URL without user, query and fragment",
        "apps[1].deploy.retain: 'many' is not full or a whole number from 0 to 999",
        "apps[2]: is not a mapping",
        "apps[2].name: is required",
        "apps[2].repository: is required",
        "webhook.verify: 'maybe' is not signature, token or hmac",
        "apps[0].deploy.environments: 'production' is not an environment in namespaces",
        "apps[1].name: 'shop' is the name of two apps",
        "apps[1].deploy.environments: 'qa' is not an environment in namespaces",
        "apps[1].build.image: is required with builder kaniko",
        "apps[2].deploy.environments: 'production' is not an environment in namespaces",
        "apps[2].build.image: is required with builder kaniko",
    ]


def test_each_wrong_element_of_a_list_is_reported() -> None:
    assert faults(document({"deploy": {"environments": [5, "qa"]}})) == [
        "apps[0].deploy.environments[0]: 5 is not a text",
        f"apps[0].deploy.environments: 'qa' is not an environment in namespaces ({SPACES})",
    ]


def test_a_fault_quotes_no_more_than_a_line() -> None:
    (fault,) = faults(document({"branch": "x " * 5000}))
    assert len(fault) < 200


# === The table for the README ===


def paths(section: Any, prefix: str = "") -> list[str]:
    """Where values are in a configuration."""
    listed = []
    for field in fields(section):
        value = getattr(section, field.name)
        path = prefix + field.name
        if is_dataclass(value):
            listed += paths(value, f"{path}.")
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            listed += paths(value[0], f"{path}[].")
        else:
            listed.append(path)
    return listed


def test_the_table_lists_every_setting_with_its_default_and_its_meaning() -> None:
    table = settings_by_path()
    assert table["apps[].name"].default == hook.REQUIRED
    assert table["apps[].deploy.health.path"].default == "''"
    assert table["apps[].deploy.retain"].default == "full"
    assert table["limits.spool_files"].default == "10000"
    assert table["catch_up"].default == "5m"
    assert all(setting.meaning for setting in table.values())
    required = [path for path, setting in table.items() if setting.default == hook.REQUIRED]
    of_a_service = [f"apps[].test.services[].{key}" for key in ("name", "image", "port")]
    assert required == ["apps[].name", "apps[].repository", *of_a_service]
    assert sorted(table) == sorted(paths(loaded({"test": {"services": [service()]}})))


def test_a_configuration_of_the_defaults_in_the_table_is_the_default() -> None:
    spelled: dict[str, Any] = {}
    for path, setting in settings_by_path().items():
        section = spelled
        *sections, key = path.replace("[]", "").split(".")
        for name in sections:
            section = section.setdefault(name, {})
        if setting.default != hook.REQUIRED:
            section[key] = yaml.safe_load(setting.default)
    app = spelled.pop("apps")
    app["build"]["image"] = IMAGE["image"]
    app["test"]["services"] = [service(**app["test"]["services"])]
    assert loaded(app, **spelled) == loaded({"test": {"services": [service()]}})


# === The process ===


def process_faults(**environ: str) -> list[str]:
    with pytest.raises(hook.ConfigError) as wrong:
        hook.Process.from_environ(environ)
    return list(wrong.value.faults)


def test_the_process_has_its_defaults() -> None:
    assert hook.Process.from_environ({"HOME": "/", "GITOPS_HOOK_SPOOL": ""}) == hook.Process(
        config=Path("/etc/gitops-hook/config.yaml"),
        secrets=Path("/etc/gitops-hook/secrets"),
        spool=Path("/var/spool/gitops-hook"),
        listen="0.0.0.0:8080",
        admin_listen="127.0.0.1:8081",
        ca=Path("/etc/gitops-hook-ca/ca.crt"),
    )


def test_the_process_is_configured_by_its_environment() -> None:
    process = hook.Process.from_environ(
        {"GITOPS_HOOK_SPOOL": "/a/b", "GITOPS_HOOK_ADMIN_LISTEN": "[::1]:0"}
    )
    assert (process.spool, process.admin_listen) == (Path("/a/b"), "[::1]:0")


def test_a_variable_that_nobody_knows_is_a_fault() -> None:
    (fault,) = process_faults(GITOPS_HOOK_SECRET="x")
    assert fault.startswith(
        "GITOPS_HOOK_SECRET: unknown key (known: config, secrets, spool, listen"
    )


def test_what_a_kubelet_injects_beside_a_service_is_no_fault() -> None:
    names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8080_TCP"]
    names += ["PORT_8080_TCP_ADDR", "METRICS_SERVICE_HOST", "METRICS_PORT"]
    environ = {f"GITOPS_HOOK_{name}": "tcp://10.0.0.1:80" for name in names}
    assert hook.Process.from_environ(environ) == hook.Process.from_environ({})


@pytest.mark.parametrize("key", ["LISTEN", "ADMIN_LISTEN"])
@pytest.mark.parametrize(
    "wrong", ["8080", ":8080", "host:", "host:http", "h:123456", "http://h:80"]
)
def test_where_to_listen_is_a_host_and_a_port(key: str, wrong: str) -> None:
    fault = f"GITOPS_HOOK_{key}: {wrong!r} is not host:port"
    assert process_faults(**{f"GITOPS_HOOK_{key}": wrong}) == [fault]


def test_all_faults_of_the_environment_are_reported_at_once() -> None:
    assert len(process_faults(GITOPS_HOOK_A="", GITOPS_HOOK_B="", GITOPS_HOOK_LISTEN="x")) == 3


# === Secrets ===


@pytest.fixture
def secrets(tmp_path: Path) -> hook.Secrets:
    return hook.Secrets(tmp_path)


def write(secrets: hook.Secrets, name: str, content: str) -> None:
    (secrets.directory / name).write_bytes(content.encode())


TOKENS = "webhook-signing-tokens"


@pytest.mark.parametrize("around", ["{}", "{}\n", "{}\r\n", "\n\n {}\t\n\n", "{}\n\n"])
def test_white_space_around_a_secret_is_not_part_of_it(secrets: hook.Secrets, around: str) -> None:
    write(secrets, TOKENS, around.format(TOKEN))
    assert secrets.keys("signature") == [bytes(range(32))]
    write(secrets, "webhook-tokens", around.format("a b"))
    assert secrets.keys("token") == secrets.keys("hmac") == [b"a b"]


@pytest.mark.parametrize("mode", ["signature", "token", "hmac"])
@pytest.mark.parametrize("content", [None, "", "\n", " \t\r\n \n"])
def test_a_missing_or_empty_secret_is_an_error(
    secrets: hook.Secrets, mode: str, content: str | None
) -> None:
    for name in (TOKENS, "webhook-tokens"):
        if content is not None:
            write(secrets, name, content)
    with pytest.raises(hook.ConfigError, match="is missing or empty"):
        secrets.keys(mode)


@pytest.mark.parametrize(
    "token",
    [
        TOKEN.removeprefix("whsec_"), TOKEN.upper(), TOKEN[:-1], TOKEN + "A",
        TOKEN.replace("A", "*"), "whsec_",
        "whsec_" + base64.b64encode(bytes(31)).decode(), "whpk_" + TOKEN[6:], "plain",
        "whsec_" + base64.b64encode(bytes(33)).decode(), TOKEN[:20] + " " + TOKEN[20:], "whsec_é",
    ],
)  # fmt: skip
def test_a_signing_token_that_is_none_is_an_error_that_names_its_line_only(
    secrets: hook.Secrets, token: str
) -> None:
    write(secrets, TOKENS, f"{TOKEN}\n{token}\n")
    with pytest.raises(hook.ConfigError) as wrong:
        secrets.keys("signature")
    fault = "is not whsec_ and the base64 of 32 bytes"
    assert str(wrong.value) == f"secret file {TOKENS}, line 2: {fault}"


def test_a_file_that_changes_is_read_again(secrets: hook.Secrets) -> None:
    write(secrets, "webhook-tokens", "old\n")
    assert secrets.keys("token") == [b"old"]
    write(secrets, "webhook-tokens", "new\nold\n")
    assert secrets.keys("token") == [b"new", b"old"]


# === Masking ===


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("git push https://me:s3cr3tpw@host/x", "git push https://***@host/x"),
        ("https://tok3n@host", "https://***@host"),
        ("no user at https://host/a@b", "no user at https://host/a@b"),
        ("with glpat-abcdefgh12345678 in it", "with *** in it"),
        (f"it was {TOKEN}, yes", "it was ***, yes"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-def", "***"),
        ("password=hunter2 user=me", "password=*** user=me"),
        ("DB_PASSWORD: hunter2", "DB_PASSWORD: ***"),
        ('{"api_key": "abc", "x": 1}', '{"api_key": *** "x": 1}'),
        ("MY_SECRET_KEY=abc", "MY_SECRET_KEY=***"),
        ("CLIENT_SECRET=abc", "CLIENT_SECRET=***"),
        ("Authorization: Bearer abcdefghijklmnop1234", "Authorization: ***"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", "Authorization: ***"),
        ("MY-Token: bearer abcdefghijklmnop1234 x", "MY-Token: *** x"),
        ("GHP_0123 ghp_0123456789", "GHP_0123 ***"),
        ("PASSWD=a Passwd: b", "PASSWD=*** Passwd: ***"),
        ("APIKEY=a private-key = b", "APIKEY=*** private-key = ***"),
        ("X-Gitlab-Token does not match", "X-Gitlab-Token does not match"),
        ("no secret here, a basic example", "no secret here, a basic example"),
        ("", ""),
    ],
)
def test_what_looks_like_a_secret_is_masked_and_other_text_is_not(
    secrets: hook.Secrets, text: str, masked: str
) -> None:
    assert secrets.mask(text) == masked


KEY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
BEGIN, END = "-----BEGIN RSA PRIVATE KEY-----", "-----END RSA PRIVATE KEY-----"
PGP = "-----{} PGP PRIVATE KEY BLOCK-----"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("AKIAIOSFODNN7EXAMPLE and ASIAIOSFODNN7EXAMPLE", "*** and ***"),
        ("xAKIAIOSFODNN7EXAMPLE AKIA AKIA-1", "xAKIAIOSFODNN7EXAMPLE AKIA AKIA-1"),
        ("a gho_0123456789abcdef b", "a *** b"),
        ("a github_pat_11ABCDEFG0_12345 b", "a *** b"),
        ("x_glptt-0123456789abcdef gldt-0123456789abcdef", "x_*** ***"),
        ("xoxb-123456789012-abcdef sk_live_0123456789", "*** ***"),
        ("DB_PASS=hunter2 db-pass: hunter2", "DB_PASS=*** db-pass: ***"),
        ("PASSPHRASE=hunter2 passphrase: hunter2", "PASSPHRASE=*** passphrase: ***"),
        ("STRIPE_KEY=hunter2 my_key: hunter2", "STRIPE_KEY=*** my_key: ***"),
        ("access-key = hunter2 accessKey: hunter2", "access-key = *** accessKey: ***"),
        ("SSH_KEY_2=hunter2", "SSH_KEY_2=***"),
        ("pwd=hunter2 MYSQL_PWD=/hunter2", "pwd=*** MYSQL_PWD=***"),
        ("mysql --password hunter2 -h db", "mysql --password *** -h db"),
        ("x -password hunter2 --db-token hunter2 y", "x -password *** --db-token *** y"),
        ("['mysql', '--password', 'hunter2']", "['mysql', '--password', ***"),
        ("the password is hunter2, I think", "the password is *** I think"),
        ("Password was hunter2", "Password was ***"),
        ("the token is abcdefg1", "the token is ***"),
        ('password="two words" x', "password=*** x"),
        ("password: 'it is \\' here' x", "password: *** x"),
        (f"a\n{BEGIN}\n{KEY}\n{KEY}\n{END}\nb", "a\n***\nb"),
        (f"a\r\n{BEGIN}\r\n{KEY}\r\n{END}\r\nb", "a\r\n***\r\nb"),
        (f'{{"k": "{BEGIN}\\n{KEY}\\n{END}\\n", "x": 1}}', '{"k": "***\\n", "x": 1}'),
        (f'private_key: "{BEGIN}\\n{KEY}\\n{END}" x', "private_key: *** x"),
        (f"{BEGIN}\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,AB\n\n{KEY}\n{END} b", "*** b"),
        (f"{BEGIN}\n{KEY}\n{END}\nb\n{BEGIN}\n{KEY}\n{END}\nc", "***\nb\n***\nc"),
        (f"{PGP.format('BEGIN')}\n{KEY}\n{PGP.format('END')}", "***"),
    ],
)  # fmt: skip
def test_the_secrets_that_programs_print_are_masked(
    secrets: hook.Secrets, text: str, masked: str
) -> None:
    assert secrets.mask(text) == masked
    # a line of a log stands among others
    assert secrets.mask(f"one.\n{text}\n") == f"one.\n{masked}\n"


def test_of_a_private_key_that_is_cut_off_nothing_is_left(secrets: hook.Secrets) -> None:
    assert secrets.mask(f"cut: {BEGIN} {KEY} {KEY[:9]}") == "cut: ***"
    assert secrets.mask(f"{KEY[9:]}\n{KEY}==\n{END}\nb") == "***\nb"


@pytest.mark.parametrize(
    "text",
    [
        "key=value key: value matchLabels: {app: shop} configMapKeyRef: {name: x, key: y}",
        "monkey=1 keys: 5 num_keys=5 a_keyboard=us turkey: 3",
        "PWD=/workspace/src OLDPWD=/workspace",
        "bypass=1 compass: 2 --bypass 3 12 passed, 1 failed PASS: test_it",
        "unexpected token } in a token stream; tokens",
        "password is required; the password was not set; secret is missing",
        "token is 3 days old, the key is unknown",
        "docker login --password-stdin registry.example.com",
        "give --password or --token-file /run/token",
        'secret "not-there" not found, failed quota: test-quota: must specify limits.cpu for: web',
        "-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----",
        "-----BEGIN PUBLIC KEY-----\nMIIE\n-----END PUBLIC KEY-----",
        "a ghost_writer on the AKIA line, xoxo, Asia/Tokyo",
    ],
)  # fmt: skip
def test_innocent_words_are_not_masked(secrets: hook.Secrets, text: str) -> None:
    assert secrets.mask(text) == text


def test_known_secrets_are_masked_wherever_they_stand(secrets: hook.Secrets) -> None:
    write(secrets, "webhook-tokens", "zebra-stripes\nzebra\nfour\nab\n")
    write(
        secrets, "git-credentials", "https://oauth2:p%40ss-word@host\nhttps://lonely-token@host\n"
    )
    text = "xzebra-stripesx zebra four ab p%40ss-word p@ss-word lonely-token oauth2"
    assert secrets.mask(text) == "x***x *** *** ab *** *** *** oauth2"


@pytest.mark.parametrize(
    "line",
    ["https://me@example.com:p@ss word@host/a", "https://me:p%40ss%20word@host/a/b.git"],
)
def test_passwords_are_masked_in_each_form_in_which_they_may_be_printed(
    secrets: hook.Secrets, line: str
) -> None:
    write(secrets, "git-credentials", f"{line.replace(' ', '%20')}\r\n")
    assert secrets.mask("x p@ss word p%40ss%20word x") == "x *** *** x"


def test_no_content_of_a_secret_file_makes_masking_stumble(secrets: hook.Secrets) -> None:
    write(secrets, "webhook-tokens", "http://[::1\n//[x]:y@z\n\\g<0> $1 (\n")
    (secrets.directory / "git-credentials").write_bytes(b"\xff\xfe://\xfe:\xff@h\n")
    assert secrets.mask("a \\g<0> $1 ( b") == "a *** b"


def test_every_text_within_a_value_is_masked_and_the_rest_is_left(secrets: hook.Secrets) -> None:
    value = {"a": ["token=x", 5, None, True, 1.5], "b": {"c": ("glpat-abcdefgh", Path("/x"))}}
    masked: Any = secrets.mask(value)
    assert masked == {"a": ["token=***", 5, None, True, 1.5], "b": {"c": ["***", "/x"]}}


class Later:
    """A monotonic clock that goes on when it is told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_a_secret_that_changes_is_masked_a_second_later(
    secrets: hook.Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Later(monkeypatch)

    def masked(text: str) -> str:
        clock.now += hook.WORDS_SECONDS
        return secrets.mask(text)

    assert masked("zebra stripes") == "zebra stripes"
    write(secrets, "webhook-tokens", "zebra\n")
    assert masked("zebra stripes") == "*** stripes"
    # as a kubelet does it: a link is put in the place of another
    for folder, content in (("one", "zebra"), ("two", "other")):
        (secrets.directory / folder).mkdir()
        (secrets.directory / folder / "webhook-tokens").write_text(content)
    (secrets.directory / "webhook-tokens").unlink()
    (secrets.directory / "webhook-tokens").symlink_to("..data/webhook-tokens")
    for folder, expected in (("one", "*** other"), ("two", "zebra ***")):
        (secrets.directory / "next").symlink_to(folder)
        (secrets.directory / "next").rename(secrets.directory / "..data")
        assert masked("zebra other") == expected
    (secrets.directory / "webhook-tokens").unlink()
    assert masked("zebra other") == "zebra other"


def test_a_new_secret_is_masked_at_once_where_it_is_used(
    secrets: hook.Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    Later(monkeypatch)  # which stands still
    write(secrets, "webhook-tokens", "zebra\n")
    for _ in range(2):  # the first reads the file anew
        assert secrets.mask("zebra stripes other") == "*** stripes other"
    write(secrets, "webhook-tokens", "stripes\n")
    assert secrets.mask("zebra stripes other") == "*** stripes other"
    assert secrets.keys("token") == [b"stripes"]
    assert secrets.mask("zebra stripes other") == "zebra *** other"


def test_a_secret_whose_file_was_away_for_a_moment_is_masked_at_once_where_it_is_used(
    secrets: hook.Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Later(monkeypatch)
    write(secrets, "webhook-tokens", "zebra\n")
    write(secrets, "gitlab-token", "other\n")
    path = secrets.directory / "webhook-tokens"
    assert secrets.mask("zebra other") == "*** ***"
    path.rename(secrets.directory / "away")
    clock.now += hook.WORDS_SECONDS
    assert secrets.mask("zebra other") == "zebra ***"
    (secrets.directory / "away").rename(path)
    assert secrets.keys("token") == [b"zebra"]
    assert secrets.mask("zebra other") == "*** ***"


def test_the_login_that_git_reads_is_masked_at_once_wherever_a_person_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Later(monkeypatch)  # which stands still
    url = "https://127.0.0.1:1/shop.git"
    config = {"apps": [{"name": "shop", "repository": url, "build": {"image": "r.io/shop"}}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    environ = {
        "GITOPS_HOOK_CONFIG": str(tmp_path / "config.yaml"),
        "GITOPS_HOOK_SECRETS": str(tmp_path),
    }
    doors = hook.Tools.load(environ).doors
    write(doors.secrets, "git-credentials", "https://hook:zebra@127.0.0.1:1\n")
    assert [doors.secrets.mask("zebra stripes") for _ in range(2)] == ["*** stripes"] * 2
    write(doors.secrets, "git-credentials", "https://hook:stripes@127.0.0.1:1\n")
    with pytest.raises(hook.GitError):
        doors.git.heads(url)
    assert doors.secrets.mask("zebra stripes") == "zebra ***"


class HeldSecrets(hook.Secrets):
    """Secrets, held in the thread "slow" when it has read the last of the files."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.has_read = threading.Event()
        self.goes_on = threading.Event()

    def lines(self, name: str) -> list[bytes]:
        """Return the secrets in a file."""
        lines = super().lines(name)
        if threading.current_thread().name == "slow" and name == hook.SECRET_FILES[-1]:
            self.has_read.set()
            assert self.goes_on.wait(10)
        return lines


def test_a_thread_that_reads_slowly_does_not_show_a_secret_again_that_another_has_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, secrets = Later(monkeypatch), HeldSecrets(tmp_path)
    write(secrets, "webhook-tokens", "zebra\n")
    assert [secrets.mask("zebra stripes") for _ in range(2)] == ["*** stripes"] * 2
    clock.now += hook.WORDS_SECONDS
    slow = threading.Thread(target=secrets.words, name="slow")
    quick = threading.Thread(target=secrets.words)
    slow.start()
    assert secrets.has_read.wait(10)
    write(secrets, "webhook-tokens", "stripes\n")
    assert secrets.keys("token") == [b"stripes"]
    quick.start()
    quick.join(0.3)  # it is done by now, or waits for the slow one
    secrets.goes_on.set()
    slow.join()
    quick.join()
    assert secrets.mask("zebra stripes") == "zebra ***"


def test_the_value_of_a_variable_is_masked_by_its_name(secrets: hook.Secrets) -> None:
    names = ["PRIVATE_KEY", "STRIPE_KEY", "DB_PASS", "PASSPHRASE", "MYSQL_PWD", "db-password"]
    named: Any = secrets.mask([{"name": n, "value": "MIIEv\nhunter2\n"} for n in names])
    assert [each["value"] for each in named] == ["***"] * len(names)
    plain = [{"name": n, "value": 1} for n in ("x", "COUNT", "MONKEY", "KEYBOARD")]
    assert secrets.mask(plain) == plain


@pytest.mark.cluster
@pytest.mark.parametrize(
    "piece",
    [
        "a", "token", "eyJ", "eyJ-", "a-", "://", "x://", "password ", "bearer ", "whsec_", "=",
        BEGIN, END, f"{BEGIN}a-", "-----BEGIN ", "-", "--", "-a", " --a", "--pass-", "--password ",
        f"--{'a' * 30} ", "password is ", "token is a", "token is   ", "_key", "_pass_", "pwd",
        'pwd="', 'pwd="\\', "secret='", "A \n", "MII\\n", "AKIA", "gl", " ", "\n", "\\",
    ],
)  # fmt: skip
def test_masking_a_long_log_takes_time_in_proportion(secrets: hook.Secrets, piece: str) -> None:
    text = "key " + piece * (200_000 // len(piece))
    started = time.process_time()
    secrets.mask(text)
    assert time.process_time() - started < 2.0


PIECES = ["AKIA", "IOSFODNN7EXAMPLE", "eyJ", ".", "abcdefgh1", "Bearer ", "basic ", "://", "@"]
PIECES += ["--", "pass", "_PASS", "passphrase", "Password", "secret", "token", "_KEY", "api-key"]
PIECES += ["pwd", "=", ": ", " is ", " ", '"', BEGIN, END, KEY]


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.sampled_from([*PIECES, *hook.TOKEN_PREFIXES]), max_size=8))
def test_the_hints_miss_nothing_that_would_be_masked(pieces: list[str]) -> None:
    text = "".join(pieces)
    if hook.SECRET.search(text) or hook.PEM.search(text):
        assert any(hint in text.lower() for hint in hook.SECRET_HINTS)
