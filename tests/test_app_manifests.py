"""The manifests of an app: how they are read, what is refused, and what a run makes of them."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gitops_hook import (
    App,
    AppObjects,
    ConfigError,
    Manifest,
    Placement,
    Reason,
    Release,
    Run,
    StageError,
    check_objects,
    image_remarks,
    load_config,
    parse_documents,
    parse_manifests,
    ports_like,
    read_manifests,
    recoloured,
    render,
    repository_of,
)
from tests.measuring import at_full_speed
from tests.memory import peak_of
from tests.standin.kubectl import find_kubectl

Object = dict[str, Any]
IMAGE = "registry.example.com:5000/demo/shop"
BUILT = f"{IMAGE}@sha256:{'0f' * 32}"
RUN = Run(id="shop-1a2b3c4d-5e6f", app="shop", ref="refs/heads/main", commit="1a2b3c4d" * 5)
DEPLOYMENT = f"""
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web, labels: {{app: shop, env: prod}}, annotations: {{owner: us}}}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: shop}}}}
  template:
    metadata: {{labels: {{app: shop, env: prod}}, annotations: {{scrape: "yes"}}}}
    spec:
      volumes: [{{name: settings, configMap: {{name: settings}}}}]
      containers:
        - name: web
          image: {IMAGE}:dev
          ports: [{{name: http, containerPort: 8080}}]
          envFrom: [{{configMapRef: {{name: settings}}}}]
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: shop}
spec: {selector: {env: prod}, ports: [{name: http, port: 80, targetPort: http}]}
"""
CONFIGMAP = """
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {GREETING: hello}
"""
ALL = f"{DEPLOYMENT}---{SERVICE}---{CONFIGMAP}"


def app_of(**settings: Any) -> App:
    entry = {"name": "shop", "repository": "/srv/shop.git", "build": {"image": IMAGE}}
    return load_config(json.dumps({"apps": [{**entry, **settings}]})).apps[0]


def write(root: Path, **files: str | bytes) -> Path:
    """A checked-out commit; __ in a name stands for /, and a file without folder is in deploy/."""
    for name, text in files.items():
        path = root / (name if "/" in name else f"deploy/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def read(root: Path, **files: str | bytes) -> list[Object]:
    return [manifest.content for manifest in read_manifests(write(root, **files), "deploy")]


def fault(call: Callable[[], Any]) -> tuple[Reason, str]:
    """Why a run ends red."""
    with pytest.raises(StageError) as failed:
        call()
    return failed.value.reason, failed.value.detail


@cache
def parsed(text: str) -> list[Object]:
    return list(yaml.safe_load_all(text))


def refusal(call: Callable[[], Any]) -> str | None:
    """Why a run ends red, if it does."""
    try:
        call()
    except StageError as refused:
        return refused.detail
    return None


def objects(text: str = ALL) -> list[Object]:
    return copy.deepcopy(parsed(text))


def check(items: list[Object], **app: Any) -> AppObjects:
    text = json.dumps({"kind": "List", "items": items})
    return check_objects(app_of(**app), "production", parse_manifests(text, "deploy/app.json"))


def released(items: list[Object] | None = None, live: int = 0, **app: Any) -> Release:
    checked = check(objects() if items is None else items, **app)
    return render(app_of(**app), RUN, BUILT, Placement("green", live), checked)


def changed(where: str, value: Any) -> list[Object]:
    """The sample with one field set, by a path like `Deployment.spec.replicas`."""
    items = objects()
    kind, *keys = where.split(".")
    target: Any = next(o for o in items if o["kind"] == kind)
    for key in keys[:-1]:
        target = target[int(key)] if key.isdigit() else target.setdefault(key, {})
    target[int(keys[-1]) if keys[-1].isdigit() else keys[-1]] = value
    return items


POD = "Deployment.spec.template.spec"
WEB = f"{POD}.containers.0"


def pod(release: Release) -> Object:
    spec: Object = release.deployment["spec"]["template"]["spec"]
    return spec


# === Reading a folder ===


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = write(tmp_path, **{"b.yml": SERVICE, "a.yaml": DEPLOYMENT})
    assert [manifest.where for manifest in read_manifests(folder, "deploy")] == [
        "deploy/a.yaml: Deployment web",
        "deploy/b.yml: Service shop",
    ]


def test_only_plain_manifests_are_read(tmp_path: Path) -> None:
    files = {
        ".hidden.yaml": "{",
        "notes.txt": "{",
        "app.yaml~": "{",
        "sub/x.yaml": "{",
        "README": "{",
    }
    assert (
        len(read(tmp_path, **{"app.yaml": ALL}, **{f"deploy/{k}": v for k, v in files.items()}))
        == 3
    )


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (
            f"---\n{DEPLOYMENT}\n---\n---\n# nothing\n---\n{SERVICE}\n...\n",
            ["Deployment", "Service"],
        ),
        ("---", []),
        ("", []),
        ("# a comment only\n", []),
        (ALL.replace("\n", "\r\n"), ["Deployment", "Service", "ConfigMap"]),
        ("\ufeff" + SERVICE, ["Service"]),
        (
            "kind: List\nitems:\n- &a {kind: A, metadata: {name: x}}\n- {<<: *a, kind: B}",
            ["A", "B"],
        ),
        ("kind: ConfigMapList\nitems: [{kind: ConfigMap, metadata: {name: x}}]", ["ConfigMap"]),
        ("kind: List\nitems: []", []),
        ("kind: AllowList\nmetadata: {name: x}", ["AllowList"]),
        (
            "a: &a {kind: X, metadata: {name: x}}\nkind: List\nitems: [*a, {<<: *a, more: 1}]",
            ["X", "X"],
        ),
    ],
    ids=[
        "multi",
        "separator",
        "empty",
        "comment",
        "crlf",
        "bom",
        "list",
        "kind-list",
        "empty-list",
        "kind-that-ends-so",
        "anchors",
    ],
)
def test_every_object_of_a_file_is_found(tmp_path: Path, text: str, kinds: list[str]) -> None:
    assert [o["kind"] for o in read(tmp_path, **{"app.yaml": text})] == kinds


def test_json_is_read_as_json_tabs_and_all(tmp_path: Path) -> None:
    text = json.dumps(objects(SERVICE)[0], indent="\t")
    assert read(tmp_path, **{"service.json": text}) == objects(SERVICE)


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("2026-01-02", "2026-01-02"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("0400", 256),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1.5", 1.5),
        ("yes", True),
        ("'yes'", "yes"),
        ("|\n  a\n  b", "a\nb\n"),
    ],
)
def test_a_value_is_what_kubectl_makes_of_it(written: str, means: Any) -> None:
    (document,) = parse_documents(f"kind: X\nvalue: {written}\n", "x.yaml")
    assert document["value"] == means
    assert type(document["value"]) is type(means)


def test_what_anchors_share_can_be_changed_apart() -> None:
    (document,) = parse_documents("a: &a {x: 1}\nb: *a\n", "x.yaml")
    document["a"]["x"] = 2
    assert document["b"] == {"x": 1}


BOMB = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)), "kind: X"]
)


MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 60))]
)
ITEMS = ", ".join(f"k{i}: 1" for i in range(10_000))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb:\n\tc: 2\n", "found character '\\t' that cannot start any token in line 3"),
        ("kind: X\r\na: [1\r\n", "in line 3"),
        ("kind: X\na: b: c\n", "mapping values are not allowed here in line 2"),
        ("kind: *nobody\n", "found undefined alias 'nobody' in line 1"),
        ("kind: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
        ("kind: X\na: !!binary aGVsbG8=\n", "Object of type bytes"),
        ("kind: X\na: !!set {b}\n", "Object of type set"),
        ("kind: X\na: .nan\n", "Out of range float"),
        ("kind: X\na: !!int text\n", "invalid literal"),
        ("kind: X\na: !!bool text\n", ""),
        ("kind: X\na: !!timestamp 2026-01-02\n", "Object of type date"),
        (f"kind: X\na: {'9' * 5000}\n", ""),
        ("? [a, b]\n: 1\n", "found unhashable key in line 1"),
        ("kind: X\na: &a [*a]\n", "Circular reference"),
        (BOMB, "It expands to too much"),
        (f"kind: X\na: [{'x,' * 100_000}]", "more than 50000 keys and values"),
        (f"a: &a {'x' * 60_000}\nb: [{'*a, ' * 1000}*a]\n", "It expands to too much"),
        ("[" * 100_000, ""),
        ("- " * 50_000, ""),
        ("{a: " * 500 + "1" + "}" * 500, ""),
        ("just text", "A document is not a mapping"),
        ("../elsewhere.yaml", "A document is not a mapping. Links are not"),
        ("[1, 2]", "A document is not a mapping"),
        ("metadata: {name: x}", "It is not a Kubernetes object"),
        ("kind: [List]", "It is not a Kubernetes object"),
        ("items: []", "It is not a Kubernetes object"),
        ("kind: List\nitems: [{metadata: {}}]", "It is not a Kubernetes object"),
        ("kind: List\nitems: [5, text]", "It is not a Kubernetes object"),
        ("kind: X\n\x00", ""),
        (b"kind: \xff\xfe", "It is not UTF-8"),
        (b"kind: X\na: " + b"x" * 2_100_000, "more than 2 MiB together. Shorten them."),
        (f"kind: X\na: {'1:' * 200_000}1\n", "a number of 400001 characters in line 2"),
        (f"kind: X\na: !!float {'1:' * 200_000}1\n", "a number of 400001 characters"),
        (MERGES, "more than 50000 keys and values"),
        (f"a: &a {{{ITEMS}}}\nb: {{<<: [{'*a,' * 10_000}*a]}}", "more than 50000 keys and values"),
    ],
    ids=[
        "tab",
        "crlf",
        "colon",
        "alias",
        "python",
        "binary",
        "set",
        "nan",
        "int",
        "bool",
        "tag",
        "digits",
        "key",
        "circle",
        "bomb",
        "many",
        "long-bomb",
        "deep",
        "deep-dashes",
        "deep-maps",
        "text",
        "link",
        "list",
        "no-kind",
        "odd-kind",
        "items-without-kind",
        "no-kind-in-list",
        "scalars-in-list",
        "nul",
        "latin",
        "large",
        "long-number",
        "long-float",
        "merges",
        "wide-merge",
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_line(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    began = time.process_time()
    with at_full_speed():
        reason, detail = fault(lambda: read(tmp_path, **{"app.yaml": text}))
    assert time.process_time() - began < 10
    assert reason is Reason.MANIFEST_INVALID
    assert detail.startswith("deploy/app.yaml: ")
    assert said in detail


def test_the_bound_of_what_is_read_is_for_all_files_together(tmp_path: Path) -> None:
    comments = {f"c{i}.yaml": "# comment\n" * 70_000 for i in range(3)}
    assert len(read(tmp_path, **{"app.yaml": ALL, **dict([*comments.items()][:2])})) == 3
    reason, detail = fault(lambda: read(tmp_path, **comments))
    said = "The manifests have more than 2 MiB together. Shorten them."
    assert (reason, detail) == (Reason.MANIFEST_INVALID, f"deploy/c2.yaml: {said}")


def test_the_bound_of_what_anchors_copy_is_for_all_files_together(tmp_path: Path) -> None:
    text = f"kind: X\nmetadata: {{name: x}}\na: &a {'x' * 4000}\nb: [{'*a, ' * 90}*a]\n"
    assert len(read(tmp_path / "few", **{f"{i}.yaml": text for i in range(5)})) == 5
    said = refusal(lambda: read(tmp_path / "many", **{f"{i}.yaml": text for i in range(40)}))
    assert (said or "").endswith("It expands to too much, since its anchors multiply.")


READ = """
import sys
try:
    print(len(gitops_hook.read_manifests(Path(sys.argv[1]), "deploy")))
except gitops_hook.StageError as refused:
    print(refused)
"""


def test_150_files_of_comments_are_refused_in_little_memory(tmp_path: Path) -> None:
    comments = b"# comment\n" * 209_000
    write(tmp_path, **{f"deploy/c{i}.yaml": comments for i in range(150)})
    said, peak = peak_of(READ, str(tmp_path))
    assert said.startswith("ManifestInvalid: deploy/c1.yaml: The manifests have more than 2 MiB")
    assert peak < 150


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"kind": "X",\n}', "line 2 column 1"),
        ("", "line 1 column 1"),
        ("kind: X", "line 1 column 1"),
        ("[" * 100_000, "maximum recursion"),
        ('{"kind": NaN}', "Out of range"),
    ],
    ids=["comma", "empty", "yaml", "deep", "nan"],
)
def test_json_that_cannot_be_read_is_named_with_file_and_line(
    tmp_path: Path, text: str, said: str
) -> None:
    reason, detail = fault(lambda: read(tmp_path, **{"a.json": text}))
    assert reason is Reason.MANIFEST_INVALID
    assert detail.startswith("deploy/a.json: ")
    assert said in detail


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet=" \n-:{}[]&*!|>#'\"%@,?a1\t~<", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    said = refusal(lambda: parse_documents(text, "x.yaml"))
    assert said is None or said.startswith("x.yaml")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    reason, detail = fault(lambda: read_manifests(tmp_path, "deploy"))
    assert (reason, detail) == (
        Reason.MANIFEST_INVALID,
        "The commit has no folder 'deploy'. Add it, or correct deploy.manifests.",
    )


@pytest.mark.parametrize("link", ["deploy", "deploy/app.yaml", "deploy/kustomization.yaml"])
def test_links_are_not_followed(tmp_path: Path, link: str) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    write(outside, **{"app.yaml": ALL, "kustomization.yaml": "resources: [app.yaml]"})
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(outside / link)
    assert fault(lambda: read_manifests(root, "deploy"))[0] is Reason.MANIFEST_INVALID


def test_a_long_text_in_any_script_is_no_bomb() -> None:
    (document,) = parse_documents(f"a: {'字' * 200_000}\n", "x.yaml")
    assert document["a"] == "字" * 200_000


def test_a_configmap_of_300_kilobytes_is_read_in_time(tmp_path: Path) -> None:
    lines = "".join(f"    line {i} of a large file\n" for i in range(12_000))
    text = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: large}}\ndata:\n  file: |\n{lines}"
    began = time.process_time()
    with at_full_speed():
        (item,) = read(tmp_path, **{"large.yaml": text})
    assert len(item["data"]["file"]) > 300_000
    assert time.process_time() - began < 10


# === Kustomizations ===


@pytest.fixture
def _kubectl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kubectl on the path."""
    folder = os.path.dirname(find_kubectl())
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_kustomization_is_built_by_a_kubectl_beside_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(find_kubectl())
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    files = {"kustomization.yaml": "resources: [app.yaml]", "app.yaml": CONFIGMAP}
    (item,) = read(tmp_path, **files)
    assert item["data"] == {"GREETING": "hello"}


@pytest.mark.usefixtures("_kubectl")
def test_a_kustomization_is_built_with_all_its_parts(tmp_path: Path) -> None:
    items = read(
        tmp_path,
        **{
            "kustomization.yaml": """
namePrefix: my-
resources: [../base]
components: [../parts/extra]
patches:
- path: patch.yaml
- target: {kind: Service}
  patch: |-
    - {op: replace, path: /spec/ports/0/port, value: 81}
configMapGenerator:
- {name: generated, literals: ["URL=https://api.example.com"], files: [key=file.txt], envs: [e.env]}
commonAnnotations: {docs: "https://wiki.example.com/x", path: "https://wiki.example.com"}
labels: [{pairs: {env: "a:b"}}]
""".replace('"a:b"', "ab"),
            "patch.yaml": DEPLOYMENT.replace("replicas: 2", "replicas: 5"),
            "file.txt": "content",
            "e.env": "FROM_FILE=1",
            "base/kustomization.yml": "resources: [app.yaml, service.yaml]",
            "base/app.yaml": DEPLOYMENT,
            "base/service.yaml": SERVICE,
            "parts/extra/kustomization.yaml": """
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
resources: [more.yaml]
""",
            "parts/extra/more.yaml": CONFIGMAP,
        },
    )
    kinds = {(o["kind"], o["metadata"]["name"].rsplit("-", 1)[0]): o for o in items}
    assert kinds["Deployment", "my"]["spec"]["replicas"] == 5
    assert kinds["Service", "my"]["spec"]["ports"][0]["port"] == 81
    assert kinds["ConfigMap", "my-generated"]["data"]["URL"] == "https://api.example.com"
    assert kinds["ConfigMap", "my-generated"]["data"]["key"] == "content"
    assert kinds["ConfigMap", "my"]["data"] == {"GREETING": "hello"}


REMOTE = "https://example.com/x.yaml"
REMOTES = {
    "resources": f"resources: ['{REMOTE}']",
    "upper-case": f"RESOURCES: ['{REMOTE}']",
    "long-s": f"re\u017fources: ['{REMOTE}']",
    "git": "resources: ['git::https://example.com/x']",
    "scp": "resources: ['git@example.com:demo/x.git']",
    "ssh": "resources: ['ssh://git@example.com/demo/x.git']",
    "file": "resources: ['file:///etc']",
    "query": "resources: ['example.com/demo/x?ref=main']",
    "github": "resources: ['github.com/demo/x']",
    "github-upper": "resources: ['GitHub.com/demo/x']",
    "bases": "bases: ['github.com/demo/x']",
    "components": "components: ['github.com/demo/x']",
    "crds": f"crds: ['{REMOTE}']",
    "configurations": f"configurations: ['{REMOTE}']",
    "openapi": f"openapi: {{path: '{REMOTE}'}}",
    "patches-once": f"patches: ['{REMOTE}']",
    "patches": f"patches: [{{path: '{REMOTE}'}}]",
    "patches-upper": f"patches: [{{PATH: '{REMOTE}'}}]",
    "strategic": f"patchesStrategicMerge: ['{REMOTE}']",
    "json6902": f"patchesJson6902: [{{target: {{kind: X}}, path: '{REMOTE}'}}]",
    "replacements": f"replacements: [{{path: '{REMOTE}'}}]",
    "generator-file": f"configMapGenerator: [{{name: x, files: ['{REMOTE}']}}]",
    "generator-key": f"configMapGenerator: [{{name: x, files: ['key={REMOTE}']}}]",
    "generator-env": f"configMapGenerator: [{{name: x, env: '{REMOTE}'}}]",
    "generator-envs": f"configMapGenerator: [{{name: x, envs: ['{REMOTE}=x']}}]",
    "secret": f"secretGenerator: [{{name: x, files: ['{REMOTE}']}}]",
    "anchor": f"x: &x ['{REMOTE}']\nresources: *x",
    "merge": f"<<: {{resources: ['{REMOTE}']}}",
    "helm": "helmCharts: [{name: x, repo: 'https://charts.example.com'}]",
    "helm-upper": "HelmCharts: [{name: x}]",
    "generators": "generators: [gen.yaml]",
    "transformers": "transformers: [gen.yaml]",
    "validators": "validators: [gen.yaml]",
    "absolute": "resources: [/etc]",
    "upwards": "resources: [../../outside]",
    "missing": "resources: [nowhere.yaml]",
    "long": f"resources: [{'a/' * 3000}x]",
    "two-lines": f'resources: ["{REMOTE}\\n"]',
}


@pytest.mark.parametrize("text", REMOTES.values(), ids=REMOTES)
def test_what_reaches_out_of_the_commit_is_refused_before_kubectl_sees_it(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "bin/kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    # in the commit lies what would stand in for each of them
    for name in ("https:/example.com/x.yaml", "x", "gen.yaml", "example.com/demo/x?ref=main/x"):
        write(tmp_path / "root", **{f"deploy/{name}": "kind: X"})
    for name in ("github.com/demo/x", "GitHub.com/demo/x", "../../outside"):
        write(tmp_path / "root", **{f"deploy/{name}/kustomization.yaml": "resources: []"})
    reason, detail = fault(lambda: read(tmp_path / "root", **{"kustomization.yaml": text}))
    assert reason is Reason.MANIFEST_REFUSED
    assert detail.startswith("deploy/kustomization.yaml: ")
    assert not (tmp_path / "called").exists()


@pytest.mark.usefixtures("_kubectl")
@pytest.mark.parametrize(
    "text",
    [
        "resources: [app.yaml]\n<<: {resources: [../../outside]}",
        "resources: [app.yaml]\n<<: {resources: ['http://127.0.0.1:9/x.yaml']}",
        "<<: {resources: [../../outside]}\nresources: [app.yaml]",
        "resources: [../../outside]\nresources: [app.yaml]",
    ],
    ids=["merged-later", "fetched", "merged-before", "twice"],
)
def test_kustomize_reads_what_was_checked_and_not_what_its_own_yaml_makes_of_it(
    tmp_path: Path, text: str
) -> None:
    outside = {"kustomization.yaml": "resources: [o.yaml]", "o.yaml": CONFIGMAP}
    for name, content in outside.items():
        write(tmp_path, **{f"outside/{name}": content})
    items = read(tmp_path / "root", **{"kustomization.yaml": text, "app.yaml": DEPLOYMENT})
    assert [item["kind"] for item in items] == ["Deployment"]


def test_a_remote_base_of_a_base_is_refused(tmp_path: Path) -> None:
    files = {
        "kustomization.yaml": "resources: [../base]",
        "base/Kustomization": "components: [../parts]",
        "parts/kustomization.yml": f"resources: ['{REMOTE}']",
    }
    reason, detail = fault(lambda: read(tmp_path, **files))
    assert (reason, detail.split(":")[0]) == (Reason.MANIFEST_REFUSED, "parts/kustomization.yml")


@pytest.mark.usefixtures("_kubectl")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resources: [app.yaml]\nnonsense: 1", "kustomize: "),
        ("resources: [app.yaml]\n\tx: 1", "deploy/kustomization.yaml: "),
        ("[app.yaml]", "deploy/kustomization.yaml: A document is not a mapping"),
        ("resources: {a: 1}", "kustomize: "),
        ("", "deploy/kustomization.yaml: It must be one document."),
        (
            "resources: []\n---\nresources: []",
            "deploy/kustomization.yaml: It must be one document.",
        ),
    ],
    ids=["unknown", "tab", "list", "odd-type", "empty", "two"],
)
def test_a_kustomization_that_cannot_be_built_says_why(
    tmp_path: Path, text: str, said: str
) -> None:
    files = {"kustomization.yaml": text, "app.yaml": DEPLOYMENT}
    reason, detail = fault(lambda: read(tmp_path, **files))
    assert reason is Reason.MANIFEST_INVALID
    assert detail.startswith(said)
    assert str(tmp_path) not in detail


LEVELS = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
ANCHORS = "\n".join([CONFIGMAP, "a0: &a0 [x, x, x, x, x, x, x, x, x]", *LEVELS])


@pytest.mark.usefixtures("_kubectl")
@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("resources: [file]", ANCHORS.encode()),
        ("configMapGenerator: [{name: x, files: [file]}]", b"x" * 100_000_000),
    ],
    ids=["anchors", "generator"],
)
def test_a_kustomization_that_takes_too_much_memory_is_refused(
    tmp_path: Path, text: str, file: bytes
) -> None:
    write(tmp_path, **{"kustomization.yaml": text, "file": file})
    said, peak = peak_of(READ, str(tmp_path))
    assert said.startswith("ManifestInvalid: kustomize: It takes more than 160 MiB of memory.")
    assert peak < 260


@pytest.mark.usefixtures("_kubectl")
def test_what_a_kustomization_makes_is_bounded(tmp_path: Path) -> None:
    text = "configMapGenerator: [{name: x, files: [file]}]"
    reason, detail = fault(
        lambda: read(tmp_path, **{"kustomization.yaml": text, "file": "x" * 2_100_000})
    )
    assert (reason, detail) == (
        Reason.MANIFEST_INVALID,
        "kustomize: it printed more than 2048 KiB",
    )


@pytest.mark.usefixtures("_kubectl")
@pytest.mark.cluster
def test_a_kustomization_of_as_much_as_is_read_is_built(tmp_path: Path) -> None:
    written = re.sub(r"\n *(volumes|envFrom): .*", "", DEPLOYMENT)
    deployments = [written.replace("name: web,", f"name: web-{i},") for i in range(500)]
    text = "namePrefix: my-\ncommonLabels: {a: b}\nresources: [file]"
    assert (
        len(read(tmp_path, **{"kustomization.yaml": text, "file": "\n---\n".join(deployments)}))
        == 500
    )


@pytest.mark.usefixtures("_kubectl")
def test_bases_that_multiply_are_refused_before_they_are_built(tmp_path: Path) -> None:
    files = {
        f"b{i}/kustomization.yaml": f"resources: [../b{i + 1}, ../b{i + 1}/.]" for i in range(60)
    }
    files |= {"b60/kustomization.yaml": "resources: []"}
    began = time.process_time()
    reason, detail = fault(
        lambda: read(tmp_path, **{"kustomization.yaml": "resources: [../b0]"}, **files)
    )
    assert (reason, "one of too many" in detail) == (Reason.MANIFEST_REFUSED, True)
    assert time.process_time() - began < 10


def test_a_kustomization_that_includes_itself_is_refused(tmp_path: Path) -> None:
    reason, detail = fault(lambda: read(tmp_path, **{"kustomization.yaml": "resources: [.]"}))
    assert (reason, "It includes itself" in detail) == (Reason.MANIFEST_REFUSED, True)


@pytest.mark.usefixtures("_kubectl")
def test_a_label_named_like_a_path_is_none(tmp_path: Path) -> None:
    text = """
commonLabels: {env: prod}
commonAnnotations: {path: "https://wiki.example.com/x"}
labels: [{pairs: {files: any}, fields: [{path: metadata/labels, create: true}]}]
generatorOptions: {labels: {envs: all}, disableNameSuffixHash: true}
metadata: {name: x, annotations: {path: "https://wiki.example.com/x"}}
resources: [app.yaml]
"""
    (item,) = read(tmp_path, **{"kustomization.yaml": text, "app.yaml": CONFIGMAP})
    assert item["metadata"]["labels"] == {"env": "prod", "files": "any"}


def test_kustomize_gets_no_home_no_git_and_no_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n/usr/bin/env > {tmp_path}/env\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setenv("SECRET", "hunter2")
    read(tmp_path / "root", **{"kustomization.yaml": "resources: []"})
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert not Path(seen["HOME"]).exists()
    assert seen["PATH"] == seen["HOME"]
    assert seen["HTTPS_PROXY"] == "http://127.0.0.1:9"
    assert "SECRET" not in seen


def test_a_missing_kubectl_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match="kubectl cannot be started"):
        read(tmp_path, **{"kustomization.yaml": "resources: []"})


# === What is accepted ===


def test_the_objects_of_an_app_are_sorted_by_kind() -> None:
    deployment, service, configmap = objects()
    assert check(objects()) == AppObjects(deployment, service, {"settings": configmap}, [])


def test_ignored_kinds_are_reported_whatever_they_hold() -> None:
    odd = {"kind": "Ingress", "metadata": {"name": "web"}, "spec": 5}
    text = json.dumps({"kind": "List", "items": [*objects(), odd]})
    app = app_of(deploy={"ignore_kinds": ["Ingress"]})
    checked = check_objects(app, "production", parse_manifests(text, "app.json"))
    assert checked.ignored == ["app.json: Ingress web"]


def test_a_namespace_may_be_named_if_it_is_the_one(tmp_path: Path) -> None:
    assert check(changed("Service.metadata.namespace", "production"))


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (
            [
                *objects(),
                {
                    "kind": "Ingress",
                    "apiVersion": "networking.k8s.io/v1",
                    "metadata": {"name": "x"},
                },
            ],
            "Ingress x of networking.k8s.io/v1 is not deployed. List Ingress/x in deploy.ignore",
        ),
        (
            [*objects(), {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "x"}}],
            "Secret x of v1",
        ),
        (
            [
                *objects(),
                {
                    "kind": "Service",
                    "apiVersion": "serving.knative.dev/v1",
                    "metadata": {"name": "y"},
                },
            ],
            "Service y of serving.knative.dev/v1 is not deployed",
        ),
        (
            [*objects(), {"kind": "Odd", "apiVersion": "", "metadata": {"name": "x"}}],
            "Odd x of  is not deployed",
        ),
        (
            changed("Deployment.apiVersion", "extensions/v1beta1"),
            "Deployment web is of the old extensions/v1beta1. Write apiVersion: apps/v1.",
        ),
        (
            changed("Deployment.metadata.namespace", "kube-system"),
            "metadata.namespace is not 'production'. Remove it, or change namespaces.<env",
        ),
        (
            changed("ConfigMap.metadata.namespace", "default"),
            "metadata.namespace is not 'production'. Remove it, or change namespaces.<env",
        ),
        (
            changed(f"{POD}.serviceAccountName", "admin"),
            "spec.serviceAccountName is not in deploy.service_accounts. Remove it, or add",
        ),
        (
            changed(f"{POD}.serviceAccount", "admin"),
            "spec.serviceAccount is not in deploy.service_accounts. Remove it, or add it there.",
        ),
        (
            changed("Service.spec.type", "ExternalName"),
            "Service shop is an ExternalName, which selects no pods. Change its type.",
        ),
        (
            changed("Service.metadata.name", "web"),
            "There is no Service named 'shop' (there are: web). Add it, rename one, or set deploy",
        ),
        (
            objects(SERVICE),
            "There is no Deployment. Add one, whose pods the Service selects.",
        ),
        (
            objects(DEPLOYMENT),
            "There is no Service named 'shop' (there are: none). Add it, rename one, or set deploy",
        ),
        ([], "rename one, or set deploy.service. There is no Deployment. Add one, whose pods the"),
        (
            objects(f"{ALL}---{DEPLOYMENT.replace('name: web,', 'name: second,')}"),
            "must select the pods of one Deployment (selected: web, second). Correct its selector.",
        ),
    ],
    ids=[
        "ingress",
        "secret",
        "knative",
        "no-api",
        "old-api",
        "namespace",
        "map-namespace",
        "account",
        "old-account",
        "external",
        "service-name",
        "no-deployment",
        "no-service",
        "nothing",
        "two",
    ],
)
def test_what_the_hook_may_not_apply_is_refused_with_what_to_do(
    items: list[Object], said: str
) -> None:
    reason, detail = fault(lambda: released(items))
    assert reason is Reason.MANIFEST_REFUSED
    assert said in detail


TOKEN_VOLUME = {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}
CERTIFICATE = {"podCertificate": {"signerName": "x", "keyType": "ED25519"}}
OWNER = [{"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "1"}]
INIT = {"name": "init", "image": IMAGE}
CAR = {**INIT, "name": "car", "restartPolicy": "Always"}
HOST_PORT = {"ports": [{"containerPort": 80, "hostPort": 80}]}
AWAY = {"httpGet": {"host": "169.254.169.254", "path": "/", "port": 80}}
TEMPLATE = "Deployment.spec.template.metadata"
LAST = "kubectl.kubernetes.io/last-applied-configuration"


def alone(**more: Any) -> Object:
    """An affinity that wants a node without certain pods."""
    term = {"topologyKey": "kubernetes.io/os", "labelSelector": {"matchLabels": {"a": "b"}}}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": [{**term, **more}]}
    return {"podAntiAffinity": required}


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("Service.spec.externalIPs", ["10.0.0.1"], "spec.externalIPs takes traffic of"),
        ("Service.spec.externalName", "example.com", "spec.externalName leads to another host"),
        ("Service.spec.publishNotReadyAddresses", True, "pods that are not ready. Remove it."),
        (f"{POD}.nodeName", "node-1", "spec.nodeName bypasses the scheduler. Use nodeSelector"),
        (f"{POD}.priorityClassName", "system-node-critical", "evict those of other apps. Remove"),
        (f"{POD}.priority", 2_000_000_000, "evict those of other apps. Remove it."),
        (f"{POD}.hostNetwork", True, "spec.hostNetwork shares the network of the node. Remove it."),
        (f"{POD}.hostPID", True, "spec.hostPID shares the processes of the node. Remove it."),
        (f"{POD}.hostIPC", True, "spec.hostIPC shares the memory of the node's processes."),
        (f"{POD}.affinity", alone(namespaceSelector={}), "keeps pods of other namespaces away"),
        (f"{POD}.affinity", alone(namespaces=["test"]), "keeps pods of other namespaces away"),
        (f"{WEB}.ports.0.hostPort", 8080, "ports.hostPort takes a port of the node. Remove it"),
        (f"{POD}.initContainers", [{**INIT, **HOST_PORT}], "ports.hostPort takes a port"),
        (f"{POD}.initContainers", [{**CAR, **HOST_PORT}], "ports.hostPort takes a port"),
        (f"{WEB}.securityContext", {"privileged": True}, "securityContext.privileged gives root"),
        (f"{POD}.initContainers", [{**CAR, "securityContext": {"privileged": True}}], "gives root"),
        (
            f"{POD}.securityContext",
            {"windowsOptions": {"hostProcess": True}},
            "windowsOptions.hostProcess gives root",
        ),
        (f"{WEB}.readinessProbe", AWAY, "httpGet.host makes the node ask another host"),
        (f"{WEB}.lifecycle", {"postStart": AWAY}, "httpGet.host makes the node ask another host"),
        (
            f"{POD}.initContainers",
            [{**CAR, "startupProbe": {"tcpSocket": {"host": "10.0.0.1", "port": 22}}}],
            "tcpSocket.host makes the node ask another host",
        ),
        (f"{POD}.volumes", [TOKEN_VOLUME], "sources.serviceAccountToken gives the pod credentials"),
        (
            f"{POD}.volumes",
            [{"name": "c", "projected": {"sources": [CERTIFICATE]}}],
            "sources.podCertificate gives the pod credentials",
        ),
        (f"{POD}.volumes", [{"name": "h", "hostPath": {"path": "/"}}], "volumes.hostPath reaches"),
        (f"{POD}.volumes", [{"name": "h", "gitRepo": {"repository": "x"}}], "volumes.gitRepo"),
        (f"{POD}.volumes", [{"name": "h", "nfs": {"server": "x", "path": "/"}}], "volumes.nfs"),
        *((f"{kind}.metadata.ownerReferences", OWNER, "metadata.ownerReferences is set by the")
          for kind in ("Deployment", "Service", "ConfigMap")),
        *((f"{kind}.metadata.finalizers", ["example.com/x"], "metadata.finalizers is set by the")
          for kind in ("Deployment", "Service", "ConfigMap")),
        *((f"Service.metadata.{field}", "x", f"metadata.{field} is set by the cluster")
          for field in ("generateName", "uid", "resourceVersion", "selfLink", "managedFields",
                        "creationTimestamp", "generation", "deletionTimestamp", "anything")),
        (f"{TEMPLATE}.ownerReferences", OWNER, "metadata.ownerReferences is set by the cluster"),
        (f"{TEMPLATE}.finalizers", ["example.com/x"], "metadata.finalizers is set by the cluster"),
        (f"{TEMPLATE}.namespace", "kube-system", "metadata.namespace is not 'production'. Remove"),
        ("Deployment.status", {"replicas": 3}, "Deployment.status is written by a tool or by the"),
        ("Service.status", {"loadBalancer": {"x": 1}}, "Service.status is written by a tool or"),
        ("Service.spce", {"type": "x"}, "Service.spce is written by a tool or by the cluster"),
        ("ConfigMap.stringData", {"a": "b"}, "ConfigMap.stringData is written by a tool or by the"),
        (f"{TEMPLATE}.labels", {"gitops-hook/app": "b"}, "labels.gitops-hook/app is reserved for"),
        ("Service.metadata.labels", {"gitops-hook/app": "b"}, "gitops-hook/app is reserved for"),
        ("ConfigMap.metadata.labels", {"gitops-hook/stage": "log"}, "hook/stage is reserved for"),
        ("Service.metadata.annotations", {"gitops-hook/history": "[]"}, "hook/history is reserved"),
        (f"{TEMPLATE}.annotations", {"gitops-hook/x": "y"}, "annotations.gitops-hook/x is"),
        ("Service.metadata.annotations", {LAST: "{}"}, "configuration is written by a tool"),
        (
            "Deployment.metadata.annotations",
            {"deployment.kubernetes.io/revision": "7"},
            "revision is written by a tool or by the cluster",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("live", [0, 3], ids=["first", "later"])
def test_what_could_harm_others_is_refused_with_what_to_do(
    where: str, value: Any, said: str, live: int
) -> None:
    reason, detail = fault(lambda: released(changed(where, value), live=live))
    kind, name = where.partition(".")[0], {"Deployment": "web", "Service": "shop"}
    assert reason is Reason.MANIFEST_REFUSED
    assert detail.startswith(f"deploy/app.json: {kind} {name.get(kind, 'settings')}: ")
    assert said in detail
    assert re.search(r"\S\. (Remove|Use|Write|Mount) .*[\w>]\.$", detail), "it says what to do"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tolerations", [{"key": "gpu", "operator": "Exists"}]),
        ("imagePullSecrets", [{"name": "registry"}]),
        ("runtimeClassName", "nvidia"),
        ("schedulerName", "volcano"),
        ("hostAliases", [{"ip": "10.0.0.1", "hostnames": ["db"]}]),
        ("automountServiceAccountToken", True),
        ("nodeSelector", {"disk": "ssd"}),
        ("volumes", [{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}]),
        ("volumes", [{"name": "s", "csi": {"driver": "secrets-store.csi.k8s.io"}}]),
        ("volumes", [{"name": "e", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}}]),
        ("volumes", [{"name": "p", "projected": {"sources": [{"secret": {"name": "x"}}]}}]),
        ("terminationGracePeriodSeconds", 60),
    ],
)  # fmt: skip
def test_what_concerns_the_app_alone_is_applied_as_it_is(field: str, value: Any) -> None:
    assert pod(released(changed(f"{POD}.{field}", value)))[field] == value


def test_all_refusals_of_a_folder_are_reported_at_once() -> None:
    items = changed(f"{POD}.hostNetwork", True)
    items[0]["spec"]["template"]["spec"]["nodeName"] = "node-1"
    items[1]["spec"]["externalIPs"] = ["10.0.0.1"]
    items.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}})
    detail = fault(lambda: released(items))[1]
    for said in ("spec.hostNetwork", "spec.nodeName", "spec.externalIPs", "Secret x of v1 is not"):
        assert said in detail


def test_the_first_of_very_many_refusals_are_listed_and_the_rest_is_counted() -> None:
    labels = {f"gitops-hook/x{i}": "y" for i in range(5000)}
    detail = fault(lambda: released(changed("Service.metadata.labels", labels)))[1]
    assert detail.endswith(". Remove it. 4990 more are not listed.")
    assert len(detail) < 2000


@pytest.mark.parametrize("name", ["web", "settings"])
def test_a_name_that_is_there_twice_is_refused(name: str) -> None:
    twice = [*objects(), *(o for o in objects() if o["metadata"]["name"] == name)]
    reason, detail = fault(lambda: check(twice))
    assert reason is Reason.MANIFEST_REFUSED
    assert detail.endswith(f"{name} occurs twice. Remove one of the two.")


ODD = [5, 1.5, "text", True, [], [5], ["a"], {}, {"a": 5}, [{}], [[]], {"name": 5}, [{"name": []}]]
PLACES = [
    "Deployment.metadata",
    "Deployment.metadata.name",
    "Deployment.metadata.labels",
    "Deployment.metadata.annotations",
    "Deployment.metadata.namespace",
    "Deployment.spec",
    "Deployment.spec.replicas",
    "Deployment.spec.minReadySeconds",
    "Deployment.spec.selector",
    "Deployment.spec.strategy",
    "Deployment.spec.template",
    "Deployment.spec.template.metadata",
    "Deployment.spec.template.metadata.labels",
    POD,
    f"{POD}.containers",
    f"{POD}.initContainers",
    f"{POD}.volumes",
    f"{POD}.terminationGracePeriodSeconds",
    f"{POD}.containers.0",
    f"{WEB}.name",
    f"{WEB}.image",
    f"{WEB}.env",
    f"{WEB}.envFrom",
    f"{WEB}.ports",
    f"{WEB}.lifecycle",
    f"{WEB}.readinessProbe",
    f"{POD}.serviceAccountName",
    "Service.metadata.labels",
    "Service.spec",
    "Service.spec.ports",
    "Service.spec.ports.0",
    "Service.spec.ports.0.port",
    "Service.spec.ports.0.targetPort",
    "Service.spec.selector",
    "Service.spec.type",
    "ConfigMap.metadata.name",
    "ConfigMap.data",
    "ConfigMap.binaryData",
    "ConfigMap.data.GREETING",
]


@pytest.mark.parametrize("where", PLACES)
def test_a_field_of_the_wrong_type_ends_the_run_or_is_left_to_the_api_server(where: str) -> None:
    for odd in ODD:
        with suppress(StageError):
            release = released(changed(where, copy.deepcopy(odd)))
            assert ports_like(release.ports, [{"port": 80, "protocol": "TCP", "nodePort": 30001}])


@pytest.mark.parametrize(
    ("where", "odd", "said"),
    [
        ("Deployment.metadata", "x", "deploy/app.json: It is not a Kubernetes object"),
        ("Deployment.metadata", {}, "deploy/app.json: It is not a Kubernetes object"),
        ("Deployment.spec", {}, "The Deployment or the Service is not well formed, near"),
        ("Deployment.spec.replicas", "3", "near TypeError("),
        (f"{POD}.containers", ["web"], "near TypeError("),
        (WEB, {"name": "x"}, "near KeyError('image'). `kubectl apply --dry-run=server` on them"),
        (f"{WEB}.image", 7, "near 7. `kubectl apply --dry-run=server` on them"),
        (f"{WEB}.lifecycle", 7, "near TypeError("),
        (f"{WEB}.ports", ["text"], "near 'text'"),
        ("Service.spec", {}, "near KeyError('ports')"),
        ("Service.spec.ports", [], "Service shop must have ports"),
        ("Service.spec.ports", [{"name": "x"}], "near KeyError('port')"),
        (
            "ConfigMap.data",
            {"PORT": 80},
            "ConfigMap settings: PORT is not a text. Put it in quotes.",
        ),
        ("ConfigMap.data", yaml.safe_load("at: 12:30:45"), "ConfigMap settings: at is not a text"),
        ("ConfigMap.data", {"TEXT": "\ud800"}, "near UnicodeEncodeError"),
    ],
)
def test_what_cannot_be_rendered_says_where_to_look(where: str, odd: Any, said: str) -> None:
    reason, detail = fault(lambda: released(changed(where, odd)))
    assert reason is Reason.MANIFEST_INVALID
    assert said in detail


def test_nulls_say_nothing() -> None:
    fields = ("replicas", "template.metadata.labels")
    places = [f"Deployment.spec.{f}" for f in fields] + [
        *("Deployment.metadata.labels", "Service.metadata.annotations", "Service.spec.ports.0.x"),
        *(f"{POD}.volumes", f"{POD}.initContainers", f"{WEB}.env", f"{WEB}.lifecycle"),
    ]
    for place in places:
        assert released(changed(place, None)).deployment["spec"]["replicas"] >= 1
    (configmap,) = released(changed("ConfigMap.data.EMPTY", None)).configmaps
    assert configmap["data"] == {
        "GREETING": "hello",
        "EMPTY": None,
    }  # an empty text, as kubectl has it


@pytest.mark.parametrize("replicas", [1001, 2**31 - 1, int("9" * 400)])
def test_more_pods_than_a_cluster_is_for_are_refused(replicas: int) -> None:
    reason, detail = fault(lambda: released(changed("Deployment.spec.replicas", replicas)))
    said = f"{replicas} replicas are too many. At most 1000 are possible."
    assert (reason, detail) == (Reason.MANIFEST_REFUSED, said)


@pytest.mark.parametrize("image", ["@" * 10**6 + "\nx", ":" * 10**6 + "\n", "/:@" * 10**6])
def test_the_name_of_an_image_takes_no_long_time_to_find(image: str) -> None:
    began = time.monotonic()
    side = {"name": "side", "image": "busybox"}
    fault(lambda: released(changed(f"{POD}.containers", [{"name": "web", "image": image}, side])))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("shop", "shop"), ("shop:1", "shop"), ("registry:5000/a/shop", "registry:5000/a/shop"),
        ("registry:5000/a/shop:1", "registry:5000/a/shop"),
        (f"registry/shop:1@sha256:{'0' * 64}", "registry/shop"),
        (f"registry/shop@sha256:{'0' * 64}", "registry/shop"),
    ],
)  # fmt: skip
def test_an_image_has_a_name_without_tag_and_digest(image: str, name: str) -> None:
    assert repository_of(image) == name


def test_nesting_of_any_depth_ends_in_a_release_or_a_refusal() -> None:
    for depth in (150, 250, 300, 450, 700):
        text = json.dumps(objects()[0]).replace('"dev"', "{}")
        deep = text[:-1] + ', "x": ' + '{"a":' * depth + "1" + "}" * depth + "}"
        manifests = [Manifest("deploy/x.json", item) for item in objects()[1:]]
        with suppress(StageError):
            manifests += parse_manifests(deep, "deploy/x.json")
            checked = check_objects(app_of(), "production", manifests)
            render(app_of(), RUN, BUILT, Placement("green", 0), checked)


@pytest.mark.parametrize("depth", [150, 450, 700])
def test_labels_and_selectors_of_any_depth_are_compared(depth: int) -> None:
    deep = json.loads('{"a":' * depth + "1" + "}" * depth)
    items = changed(f"{TEMPLATE}.labels", {"env": deep})
    items[0]["spec"]["template"]["spec"] |= spread({"matchLabels": {"env": deep}})
    items[1]["spec"]["selector"] = {"env": copy.copy(deep)}
    items.append(other("PersistentVolumeClaim", spec={"accessModes": deep}))
    manifests = [Manifest(f"app.json: {item['kind']}", item) for item in items]
    ignoring = app_of(deploy={"ignore": ["PersistentVolumeClaim"]})
    with suppress(StageError):
        checked = check_objects(ignoring, "production", manifests)
        render(ignoring, RUN, BUILT, Placement("green", 0), checked)


# === Whose an object is ===

WORKER = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop-worker}
spec:
  selector: {matchLabels: {app: shop-worker}}
  template:
    metadata: {labels: {app: shop-worker}}
    spec: {containers: [{name: worker, image: busybox}]}
"""
ADVICE = {
    "Secret": "Create it by hand in each namespace, and remove it from git.",
    "Job": "Use an init container of the Deployment: it ends before a version gets traffic.",
    "CronJob": "List CronJob/x in deploy.ignore and apply it by hand; its image does not follow",
    "HorizontalPodAutoscaler": "by hand, one for each of shop-blue and shop-green.",
    "PodDisruptionBudget": "apply it by hand; it counts the pods of both colours.",
    "Service": "by hand; its selector must not reach the pods of both colours.",
    "StatefulSet": "apply it by hand; its image does not follow the versions.",
    "PersistentVolumeClaim": "by hand; the pods of both colours use it at once.",
    "ServiceAccount": "apply it by hand; deploy.service_accounts lets pods run as it.",
    "ClusterRole": "It concerns the whole cluster. List ClusterRole/x in deploy.ignore and apply",
    "Namespace": "It concerns the whole cluster. List Namespace/x in deploy.ignore and apply it",
    "NetworkPolicy": "is not deployed. List NetworkPolicy/x in deploy.ignore and apply it by hand.",
}
OWN_APIS = {"Service": "v1"}


def other(kind: str, name: str = "x", **more: Any) -> Object:
    """An object of any kind."""
    version = OWN_APIS.get(kind, "example.com/v1")
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **more}


@pytest.mark.parametrize("kind", ADVICE)
def test_each_kind_that_is_not_deployed_has_its_own_advice(kind: str) -> None:
    detail = fault(lambda: check([*objects(), other(kind)]))[1]
    assert detail.startswith(f"deploy/app.json: {kind} x of ")
    assert ADVICE[kind] in detail


@pytest.mark.parametrize("setting", ["ignore", "ignore_kinds"])
def test_an_object_is_ignored_by_its_kind_or_by_its_kind_and_name(setting: str) -> None:
    items = [*objects(f"{ALL}---{WORKER}"), other("CronJob", "night"), other("CronJob", "day")]
    names = ("CronJob night of", "CronJob day of", "Deployment shop-worker of")

    def refused(*entries: str) -> list[str]:
        detail = refusal(lambda: check(items, deploy={setting: [*entries]})) or ""
        return [name for name in names if name in detail]

    assert refused() == [*names]
    assert refused("CronJob/night", "Deployment/shop") == [*names[1:]]
    assert refused("CronJob") == [*names[2:]]
    assert refused("CronJob", "Deployment/shop-worker") == []
    checked = check(items, deploy={setting: ["CronJob", "Deployment/shop-worker"]})
    assert len(checked.ignored) == 3


def test_both_settings_of_what_is_ignored_are_heeded() -> None:
    items = [*objects(), other("CronJob"), other("Ingress")]
    deploy = {"ignore": ["CronJob/x"], "ignore_kinds": ["Ingress"]}
    assert len(check(items, deploy=deploy).ignored) == 2


@pytest.mark.parametrize("entry", ["", "cron job", "CronJob/", "CronJob/A", "/x", "a/b/c"])
def test_an_entry_that_can_match_nothing_is_a_fault_of_the_configuration(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"deploy.ignore\[0\]"):
        app_of(deploy={"ignore": [entry]})


@pytest.mark.parametrize("name", ["", "Shop", "a b", "a/b", "-a", "x" * 254])
def test_what_is_no_name_of_a_service_account_is_a_fault_of_the_configuration(name: str) -> None:
    with pytest.raises(ConfigError, match=r"deploy.service_accounts\[0\]"):
        app_of(deploy={"service_accounts": [name]})


def test_thousands_of_objects_are_sorted_in_time() -> None:
    items = objects()
    pod = items[0]["spec"]["template"]["spec"]
    names = [f"c{i}" for i in range(5000)]
    pod["containers"][0]["envFrom"] += [{"configMapRef": {"name": name}} for name in names]
    claims = [{"name": n, "persistentVolumeClaim": {"claimName": n}} for n in names]
    pod["volumes"] += claims
    items += [{**other("ConfigMap", name), "apiVersion": "v1"} for name in names]
    items += [other("PersistentVolumeClaim", name) for name in names]
    manifests = [Manifest(f"app.json: {item['kind']}", item) for item in items]
    began = time.monotonic()
    app = app_of(deploy={"ignore": ["PersistentVolumeClaim"]})
    detail = fault(lambda: check_objects(app, "production", manifests))[1]
    assert "claimName is a disk of one node" in detail
    assert time.monotonic() - began < 30


def test_of_two_deployments_the_one_that_the_service_selects_is_the_apps() -> None:
    items = objects(f"{WORKER}---{ALL}")
    ignored = check(items, deploy={"ignore": ["Deployment/shop-worker"]})
    assert ignored.deployment["metadata"]["name"] == "web"
    detail = fault(lambda: check(items))[1]
    assert detail == (
        "deploy/app.json: Deployment shop-worker of apps/v1 is not deployed. "
        "List Deployment/shop-worker in deploy.ignore and apply it by hand; "
        "it gets neither colours nor the built image."
    )


def test_a_configmap_that_no_pod_of_the_app_uses_is_refused() -> None:
    items = [*objects(), other("ConfigMap", "dashboard", data={"a": "b"})]
    items[-1]["apiVersion"] = "v1"
    assert fault(lambda: check(items))[1] == (
        "deploy/app.json: ConfigMap dashboard is used by no pod of the app. "
        "List ConfigMap/dashboard in deploy.ignore and apply it by hand."
    )
    checked = check(items, deploy={"ignore": ["ConfigMap/dashboard"]})
    assert [*checked.configmaps] == ["settings"]


@pytest.mark.parametrize("field", ["serviceAccountName", "serviceAccount"])
def test_pods_run_as_a_service_account_that_the_configuration_allows(field: str) -> None:
    items = changed(f"{POD}.{field}", "shop-s3")
    assert "spec." + field in fault(lambda: released(items))[1]
    assert pod(released(items, deploy={"service_accounts": ["shop-s3"]}))[field] == "shop-s3"
    items[0]["spec"]["template"]["spec"]["automountServiceAccountToken"] = False
    rendered = pod(released(items, deploy={"service_accounts": ["shop-s3"]}))
    assert rendered["automountServiceAccountToken"] is False


def test_what_cannot_run_beside_its_next_version_is_refused() -> None:
    detail = fault(lambda: check(changed("Deployment.spec.strategy", {"type": "Recreate"})))[1]
    assert detail.endswith(
        "strategy.type is Recreate, but two versions run side by side. "
        "Use RollingUpdate and shared data."
    )


@pytest.mark.parametrize(
    ("modes", "refused"),
    [
        (["ReadWriteOnce"], True),
        (["ReadWriteOncePod"], True),
        (["ReadWriteOnce", "ReadWriteMany"], False),
        (["ReadOnlyMany"], False),
        (5, True),
    ],
)
def test_a_claim_of_the_folder_must_be_one_that_several_nodes_can_use(
    modes: Any, refused: bool
) -> None:
    claimed = {"name": "data", "persistentVolumeClaim": {"claimName": "disk"}}
    items = changed(f"{WEB}.volumeMounts", [{"name": "data", "mountPath": "/data"}])
    items[0]["spec"]["template"]["spec"]["volumes"].append(claimed)
    items.append(other("PersistentVolumeClaim", "disk", spec={"accessModes": modes}))
    ignore = {"ignore": ["PersistentVolumeClaim"]}
    said = refusal(lambda: check(items, deploy=ignore)) or ""
    assert ("persistentVolumeClaim.claimName is a disk of one node" in said) is refused


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("paused", True, "spec.paused keeps a version from starting. Remove it."),
        ("progressDeadlineSeconds", 2**31 - 1, "Seconds is more than a day. Use less."),
    ],
)
def test_a_deployment_that_would_never_come_to_an_end_is_refused(
    field: str, value: Any, said: str
) -> None:
    assert fault(lambda: check(changed(f"Deployment.spec.{field}", value)))[1].endswith(said)


# === Rendering: the Deployment ===


@pytest.mark.parametrize("place", ["template.metadata", "metadata"])
def test_where_the_app_uses_the_label_version_itself_the_colour_has_another(place: str) -> None:
    where = "Deployment.metadata" if place == "metadata" else f"Deployment.spec.{place}"
    labels = {"app": "shop", "env": "prod", "version": "v3"}
    release = released(changed(f"{where}.labels", labels))
    own = {"gitops-hook/app": "shop", "gitops-hook/colour": "green"}
    assert release.deployment["spec"]["selector"] == {"matchLabels": own}
    assert release.selector == {**own, "gitops-hook/run": RUN.id}
    assert release.service["spec"]["selector"] == release.selector
    template = release.deployment["spec"]["template"]["metadata"]["labels"]
    assert template.items() >= release.selector.items()
    written = release.deployment["metadata"] if place == "metadata" else {"labels": template}
    assert written["labels"]["version"] == "v3"


def spread(selector: Object | None) -> Object:
    """The fields of a pod that keep it away from others: spread constraint and anti-affinity."""
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}
    preferred = {"weight": 1, "podAffinityTerm": term}
    return {
        "topologySpreadConstraints": [{**term, "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}],
        "affinity": {
            "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]},
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [term],
                "preferredDuringSchedulingIgnoredDuringExecution": [preferred],
            },
        },
    }


@pytest.mark.parametrize(
    ("selector", "own"),
    [
        ({"matchLabels": {"app": "shop"}}, True),
        ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["shop", "x"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "zone", "operator": "DoesNotExist"}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["shop"]}]}, False),
        ({"matchLabels": {"app": "database"}}, False),
        ({"matchLabels": {"app": "shop", "tier": "web"}}, False),
        ({}, False),
        (None, False),
    ],
)
@pytest.mark.parametrize("label", ["version", "gitops-hook/colour"])
def test_pods_of_the_other_colour_do_not_count_in_spread_and_anti_affinity(
    selector: Object | None, own: bool, label: str
) -> None:
    items = objects()
    if label != "version":
        items[0]["spec"]["template"]["metadata"]["labels"]["version"] = "v3"
    items[0]["spec"]["template"]["spec"] |= spread(selector)
    release = released(items)
    expected = copy.deepcopy(selector)
    if expected and own:
        expected["matchLabels"] = {**expected.get("matchLabels", {}), label: "green"}
    written = spread(expected)
    written["affinity"]["podAffinity"] = spread(selector)["affinity"]["podAffinity"]
    assert {key: pod(release)[key] for key in written} == written
    blue = recoloured(release, app_of(), "blue", 2)
    text = json.dumps(pod(release)).replace(f'"{label}": "green"', f'"{label}": "blue"')
    assert pod(blue) == json.loads(text)
    assert blue.selector[label] == "blue"


def test_the_deployment_is_coloured_and_keeps_what_the_app_says() -> None:
    deployment = released().deployment
    ours = {
        "app.kubernetes.io/managed-by": "gitops-hook",
        "gitops-hook/app": "shop",
        "gitops-hook/run": RUN.id,
        "version": "green",
    }
    assert deployment["metadata"] == {
        "name": "shop-green",
        "labels": {"app": "shop", "env": "prod", **ours},
        "annotations": {"owner": "us", "gitops-hook/commit": RUN.commit},
    }
    assert deployment["spec"]["selector"] == {
        "matchLabels": {"gitops-hook/app": "shop", "version": "green"}
    }
    template = deployment["spec"]["template"]["metadata"]
    assert template == {
        "labels": {"app": "shop", "env": "prod", **ours},
        "annotations": {"scrape": "yes"},
    }


def test_what_is_rendered_is_valid_by_the_schema() -> None:
    release = released(changed(f"{WEB}.envFrom", [{"configMapRef": {"name": "settings"}}]))
    version = kubernetes_validate.latest_version()
    rendered = (
        release.deployment,
        *release.configmaps,
        release.configmap("shop"),
        release.service,
    )
    for thing in rendered:
        kubernetes_validate.validate(thing, version, strict=True)


def test_rendering_does_not_change_the_objects_of_the_app() -> None:
    checked = check(objects())
    before = copy.deepcopy(checked)
    render(app_of(), RUN, BUILT, Placement("green", 0), checked)
    assert checked == before


def test_the_selector_has_always_the_same_three_keys() -> None:
    assert released().selector == {
        "gitops-hook/app": "shop",
        "version": "green",
        "gitops-hook/run": RUN.id,
    }


def test_what_says_nothing_may_stay_as_tools_write_it() -> None:
    items = objects()
    for item in items:
        item["metadata"] |= {"creationTimestamp": None, "ownerReferences": [], "finalizers": None}
        item["status"] = {}
    spec = items[0]["spec"]["template"]["spec"]
    spec |= {"serviceAccountName": "default", "serviceAccount": "default", "securityContext": {}}
    spec |= {"nodeName": "", "hostNetwork": False, "priority": 0, "volumes": None}
    items[0]["spec"]["template"]["metadata"] |= {"creationTimestamp": None, "finalizers": []}
    items[1]["spec"] |= {"externalIPs": [], "externalName": "", "publishNotReadyAddresses": False}
    release = released(items)
    for item in (release.deployment, release.service, *release.configmaps):
        assert "status" not in item
        assert set(item["metadata"]) == {"name", "labels", "annotations"}


@pytest.mark.parametrize(
    ("written", "live", "replicas"),
    [(2, 0, 2), (2, 5, 5), (6, 5, 6), (0, 0, 1), (0, 3, 3), (-1, 0, 1), (None, 0, 1)],
)
def test_a_version_is_never_smaller_than_the_live_one(
    written: int | None, live: int, replicas: int
) -> None:
    items = changed("Deployment.spec.replicas", written)
    if written is None:
        del items[0]["spec"]["replicas"]
    release = released(items, live=live)
    assert (release.wanted, release.deployment["spec"]["replicas"]) == (replicas, replicas)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {},
            {
                "minReadySeconds": 10,
                "revisionHistoryLimit": 3,
                "paused": False,
                "strategy": {
                    "type": "RollingUpdate",
                    "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
                },
            },
        ),
        (
            {"minReadySeconds": 0, "revisionHistoryLimit": 0},
            {"minReadySeconds": 0, "revisionHistoryLimit": 0},
        ),
        ({"strategy": {"type": "RollingUpdate"}}, {"strategy": {"type": "RollingUpdate"}}),
        ({"paused": False}, {"paused": False}),
        ({}, {"progressDeadlineSeconds": 300}),
        ({"progressDeadlineSeconds": 5}, {"progressDeadlineSeconds": 300}),
        ({"progressDeadlineSeconds": 900}, {"progressDeadlineSeconds": 900}),
        ({"replicas": 30}, {"progressDeadlineSeconds": 600}),
        ({"replicas": 10, "minReadySeconds": 60}, {"progressDeadlineSeconds": 700}),
        ({"minReadySeconds": 900}, {"minReadySeconds": 900, "progressDeadlineSeconds": 1820}),
    ],
    ids=[
        "defaults",
        "zeroes",
        "strategy",
        "paused",
        "rollout",
        "short-deadline",
        "long-deadline",
        "many",
        "calm-many",
        "calm",
    ],
)
def test_the_articles_values_stand_where_the_app_says_nothing(
    spec: Object, expected: Object
) -> None:
    items = objects()
    items[0]["spec"] |= spec
    spec = released(items).deployment["spec"]
    assert {k: spec[k] for k in expected} == expected


# === Rendering: images ===


@pytest.mark.parametrize(
    "image",
    [
        IMAGE,
        f"{IMAGE}:dev",
        f"{IMAGE}@sha256:{'a' * 64}",
        f"{IMAGE}:1@sha256:{'a' * 64}",
        "shop",
        "shop:1",
    ],
)
def test_the_built_image_takes_its_place_by_digest(image: str) -> None:
    assert pod(released(changed(f"{WEB}.image", image)))["containers"][0]["image"] == BUILT


@pytest.mark.parametrize(
    "image",
    [
        f"{IMAGE}-debug:1",
        "registry.example.com/demo/shop:1",
        "other.example.com:5000/demo/shop",
        "demo/shop",
        "registry.example.com:5000",
        f"{IMAGE}/sub:1",
    ],
)
def test_an_image_that_is_not_the_built_one_is_left_beside_one_that_is(image: str) -> None:
    web = objects()[0]["spec"]["template"]["spec"]["containers"][0]
    side = {"name": "side", "image": image}
    rendered = pod(released(changed(f"{POD}.containers", [side, web])))["containers"]
    assert [c["image"] for c in rendered] == [image, BUILT]
    reason, detail = fault(lambda: released(changed(f"{POD}.containers", [side, {**web, **side}])))
    assert reason is Reason.MANIFEST_REFUSED
    assert "so the build would not be deployed. Name it" in detail


def remarks(items: list[Object], **app: Any) -> list[str]:
    """What `plan` says of the images of a commit."""
    written = check(items, **app).deployment["spec"]["template"]["spec"]
    return [*image_remarks(app_of(**app), written)]


def test_the_only_container_gets_the_built_image_whatever_it_names_and_plan_says_so() -> None:
    items = changed(f"{WEB}.image", "team/web:1")
    assert pod(released(items))["containers"][0]["image"] == BUILT
    assert remarks(items) == ["container web: image team/web:1 is replaced by the built image"]
    assert remarks(objects()) == []
    init = [{"name": "assets", "image": IMAGE}]
    items[0]["spec"]["template"]["spec"]["initContainers"] = init
    rendered = pod(released(items))
    assert (rendered["containers"][0]["image"], rendered["initContainers"][0]["image"]) == (
        "team/web:1",
        BUILT,
    )


def test_plan_names_images_beside_the_built_one_that_are_not_pinned() -> None:
    digest = f"@sha256:{'0' * 64}"
    path = "registry.example.com:5000/demo"
    inits = [
        {"name": name, "image": image}
        for name, image in {
            "loose": f"{path}/migrate:1",
            "pinned": f"{path}/migrate:1{digest}",
            "public": "busybox:1",
        }.items()
    ]
    said = f"container loose: image {path}/migrate:1 is not named by digest, so it may change"
    (line,) = remarks(changed(f"{POD}.initContainers", inits))
    assert line.startswith(said)


def test_init_containers_and_side_cars_of_the_app_get_the_built_image_too() -> None:
    inits = [
        {"name": "migrate", "image": IMAGE},
        {"name": "proxy", "image": "envoy:1", "restartPolicy": "Always"},
    ]
    rendered = pod(released(changed(f"{POD}.initContainers", inits)))["initContainers"]
    assert [c["image"] for c in rendered] == [BUILT, "envoy:1"]


def test_without_a_builder_every_image_must_be_a_digest_already() -> None:
    none = {"build": {"builder": "none"}}
    digest = f"docker.io/library/nginx:1@sha256:{'b' * 64}"
    items = changed(f"{WEB}.image", digest)
    assert pod(released(items, **none))["containers"][0]["image"] == digest
    items[0]["spec"]["template"]["spec"]["initContainers"] = [{"name": "x", "image": "busybox:1"}]
    reason, detail = fault(lambda: released(items, **none))
    assert (reason, "'busybox:1' is not named by digest" in detail) == (
        Reason.MANIFEST_REFUSED,
        True,
    )


# === Rendering: ConfigMaps ===


def test_configmaps_are_copied_under_the_name_of_their_content() -> None:
    (configmap,) = released().configmaps
    name = configmap["metadata"]["name"]
    assert name.startswith("settings-")
    assert len(name) == len("settings-") + 8
    assert (configmap["immutable"], configmap["data"]) == (True, {"GREETING": "hello"})
    assert configmap["metadata"]["labels"]["gitops-hook/app"] == "shop"
    (same,) = released().configmaps
    (other,) = released(changed("ConfigMap.data.GREETING", "bye")).configmaps
    assert same == configmap
    assert other["metadata"]["name"] != name


def test_labels_and_annotations_of_a_configmap_are_on_its_copy_and_in_its_name() -> None:
    (plain,) = released().configmaps
    (configmap,) = released(changed("ConfigMap.metadata.labels", {"team": "a"})).configmaps
    (other,) = released(changed("ConfigMap.metadata.annotations", {"docs": "b"})).configmaps
    assert configmap["metadata"]["labels"] == {**plain["metadata"]["labels"], "team": "a"}
    assert other["metadata"]["annotations"] == {"docs": "b"}
    assert len({each["metadata"]["name"] for each in (plain, configmap, other)}) == 3


def test_the_same_content_in_another_order_has_the_same_name() -> None:
    two = {"a": "1", "b": "2"}
    (configmap,) = released(changed("ConfigMap.data", two)).configmaps
    (same,) = released(changed("ConfigMap.data", dict(reversed(two.items())))).configmaps
    assert same["metadata"]["name"] == configmap["metadata"]["name"]


def test_binary_data_is_copied() -> None:
    (configmap,) = released(changed("ConfigMap.binaryData", {"logo": "AAEC"})).configmaps
    assert configmap["binaryData"] == {"logo": "AAEC"}


def test_a_configmap_of_binary_data_only_is_copied() -> None:
    items = changed("ConfigMap.binaryData", {"logo": "AAEC"})
    del items[2]["data"]
    (configmap,) = released(items).configmaps
    assert (configmap["data"], configmap["binaryData"]) == ({}, {"logo": "AAEC"})


def test_every_reference_to_a_configmap_follows_its_copy() -> None:
    def container(name: str) -> Object:
        return {
            "name": name,
            "image": IMAGE,
            "ports": [{"name": "http", "containerPort": 8080}],
            "env": [
                {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "a"}}},
                {"name": "B", "valueFrom": {"secretKeyRef": {"name": "settings", "key": "a"}}},
                {"name": "C", "value": "settings"},
            ],
            "envFrom": [
                {"configMapRef": {"name": "settings"}},
                {"secretRef": {"name": "settings"}},
            ],
        }

    items = changed(f"{POD}.containers", [container("web"), container("log")])
    spec = items[0]["spec"]["template"]["spec"]
    spec["initContainers"] = [container("init"), {**container("car"), "restartPolicy": "Always"}]
    spec["volumes"] = [
        {"name": "a", "configMap": {"name": "settings", "items": [{"key": "a", "path": "a"}]}},
        {
            "name": "b",
            "projected": {
                "sources": [
                    {"configMap": {"name": "settings"}},
                    {"configMap": {"name": "foreign"}},
                    {"secret": {"name": "settings"}},
                ]
            },
        },
        {"name": "c", "secret": {"secretName": "settings"}},
        {"name": "d", "configMap": {"name": "foreign", "optional": True}},
        {"name": "e", "emptyDir": {}},
    ]
    release = released(items)
    copied = release.configmaps[0]["metadata"]["name"]
    expected = json.dumps(spec)
    for reference in ("configMapKeyRef", "configMapRef", "configMap"):
        old = f'"{reference}": {{"name": "settings"'
        expected = expected.replace(old, old.replace("settings", copied))
    rendered = pod(release)
    for each, wanted in zip(
        [*rendered["containers"], *rendered["initContainers"]],
        [*json.loads(expected)["containers"], *json.loads(expected)["initContainers"]],
        strict=True,
    ):
        assert (each["env"], each["envFrom"]) == (wanted["env"], wanted["envFrom"])
    assert rendered["volumes"] == json.loads(expected)["volumes"]
    assert expected.count(copied) == 10


# === Rendering: probes and endings ===


@pytest.mark.parametrize(
    ("port", "containers", "owner"),
    [
        ({"port": 80, "targetPort": "http"}, ["http"], 0),
        ({"port": 80, "targetPort": "http"}, [None, "http"], 1),
        ({"port": 80, "targetPort": 8080}, [None, "http"], 1),
        ({"port": 8080}, [None, "http"], 1),
        ({"port": 80}, [None, "http"], 0),
    ],
    ids=["named", "named-second", "number-second", "default-second", "undeclared"],
)
def test_the_container_that_serves_gets_a_readiness_probe(
    port: Object, containers: list[str | None], owner: int
) -> None:
    items = changed("Service.spec.ports", [port])
    items[0]["spec"]["template"]["spec"]["containers"] = [
        {"name": f"c{i}", "image": IMAGE}
        | ({"ports": [{"name": n, "containerPort": 8080}]} if n else {})
        for i, n in enumerate(containers)
    ]
    rendered = pod(released(items, deploy={"health": {"path": "/up"}}))["containers"]
    assert [i for i, c in enumerate(rendered) if "readinessProbe" in c] == [owner]
    target = port.get("targetPort", port["port"])
    assert rendered[owner]["readinessProbe"] == {
        "httpGet": {"path": "/up", "port": target},
        "initialDelaySeconds": 5,
        "periodSeconds": 5,
    }
    assert not any("livenessProbe" in c for c in rendered)


def test_a_target_port_that_no_container_names_is_refused() -> None:
    reason, detail = fault(lambda: released(changed("Service.spec.ports.0.targetPort", "web")))
    assert (reason, "No container has a port with the targetPort 'web'." in detail) == (
        Reason.MANIFEST_INVALID,
        True,
    )


def test_a_side_car_may_be_what_serves() -> None:
    proxy = {"name": "proxy", "image": "envoy:1", "ports": [{"name": "web", "containerPort": 1}]}
    items = changed("Service.spec.ports.0.targetPort", "web")
    items[0]["spec"]["template"]["spec"]["initContainers"] = [proxy]
    assert "targetPort 'web'" in fault(lambda: released(items))[1]  # it ends before it can serve
    proxy["restartPolicy"] = "Always"
    rendered = pod(released(items))
    assert rendered["initContainers"][0]["readinessProbe"]["httpGet"]["port"] == "web"
    assert "readinessProbe" not in rendered["containers"][0]


def test_a_readiness_probe_of_the_app_is_kept() -> None:
    mine = {"exec": {"command": ["true"]}}
    assert (
        pod(released(changed(f"{WEB}.readinessProbe", mine)))["containers"][0]["readinessProbe"]
        == mine
    )


@pytest.mark.parametrize(
    ("grace", "lifecycle", "expected"),
    [
        (None, None, {"preStop": {"sleep": {"seconds": 5}}}),
        (60, None, {"preStop": {"sleep": {"seconds": 5}}}),
        (3, None, {"preStop": {"sleep": {"seconds": 3}}}),
        (0, None, None),
        (
            None,
            {"preStop": {"exec": {"command": ["x"]}}},
            {"preStop": {"exec": {"command": ["x"]}}},
        ),
        (
            None,
            {"postStart": {"sleep": {"seconds": 1}}},
            {"preStop": {"sleep": {"seconds": 5}}, "postStart": {"sleep": {"seconds": 1}}},
        ),
    ],
    ids=["default", "long", "short", "none", "own", "post-start"],
)
def test_a_pod_sleeps_before_it_stops_but_never_longer_than_its_grace(
    grace: int | None, lifecycle: Object | None, expected: Object | None
) -> None:
    items = objects()
    spec = items[0]["spec"]["template"]["spec"]
    if grace is not None:
        spec["terminationGracePeriodSeconds"] = grace
    if lifecycle:
        spec["containers"][0]["lifecycle"] = lifecycle
    assert pod(released(items))["containers"][0].get("lifecycle") == expected


# === Rendering: Services ===


def test_the_live_service_keeps_what_the_app_says_but_its_selector() -> None:
    items = changed("Service.metadata.annotations", {"lb.example.com/internal": "yes"})
    items[1]["metadata"]["labels"] = {"team": "a"}
    items[1]["spec"] |= {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}
    release = released(items)
    service = release.service
    assert service["metadata"]["name"] == "shop"
    assert service["metadata"]["annotations"] == {"lb.example.com/internal": "yes"}
    assert service["metadata"]["labels"]["team"] == "a"
    assert service["metadata"]["labels"]["gitops-hook/app"] == "shop"
    assert service["metadata"]["labels"]["gitops-hook/stage"] == "live"
    assert service["spec"]["selector"] == release.selector
    assert service["spec"]["externalTrafficPolicy"] == "Local"


@pytest.mark.parametrize(
    "spec",
    [
        {"clusterIP": "None"},
        {"sessionAffinity": "ClientIP"},
        {"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6", "IPv4"]},
        {"type": "NodePort", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local"},
        {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False},
        {"clusterIP": "10.96.0.7", "loadBalancerClass": "internal", "type": "LoadBalancer"},
        {"ports": [{"name": "a", "port": 80, "appProtocol": "http"}, {"name": "b", "port": 81}]},
    ],
    ids=["headless", "affinity", "dual-stack", "node-port", "balancer", "address", "ports"],
)
def test_whatever_kind_of_service_the_app_has_it_is_created_as_it_says(spec: Object) -> None:
    items = changed("Service.spec", {**objects(SERVICE)[0]["spec"], **spec})
    rendered = released(items).service["spec"]
    assert {k: rendered[k] for k in spec} == spec
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(released(items).service, version, strict=True)


def test_of_several_ports_each_needs_a_name() -> None:
    ports = [{"name": "http", "port": 80, "targetPort": "http"}, {"port": 9090}]
    reason, detail = fault(lambda: released(changed("Service.spec.ports", ports)))
    said = "Service shop must have ports, and several ports must have names."
    assert (reason, detail) == (Reason.MANIFEST_INVALID, said)


@pytest.mark.parametrize(
    ("ports", "live", "expected"),
    [
        (
            [{"port": 80}],
            [{"port": 80, "protocol": "TCP", "nodePort": 30001}],
            [{"port": 80, "nodePort": 30001}],
        ),
        (
            [{"port": 80, "nodePort": 30002}],
            [{"port": 80, "protocol": "TCP", "nodePort": 30001}],
            [{"port": 80, "nodePort": 30002}],
        ),
        ([{"port": 80, "nodePort": 30002}], [{"port": 80}], [{"port": 80}]),
        ([{"port": 80, "nodePort": 30002}], [], [{"port": 80}]),
        (
            [{"port": 53, "protocol": "UDP"}],
            [{"port": 53, "protocol": "TCP", "nodePort": 30001}],
            [{"port": 53, "protocol": "UDP"}],
        ),
        (
            [{"port": 53}, {"port": 80}],
            [{"port": 53, "protocol": "TCP", "nodePort": 30001}],
            [{"port": 53, "nodePort": 30001}, {"port": 80}],
        ),
    ],
    ids=["kept", "chosen", "cluster-ip", "none", "protocol", "new-port"],
)
def test_node_ports_stay_those_of_the_live_service(
    ports: list[Object], live: list[Object], expected: list[Object]
) -> None:
    assert ports_like(ports, live) == expected


# === Releases ===


def test_a_release_is_read_back_as_it_was() -> None:
    release = released()
    record = release.configmap("shop")
    assert Release.from_configmap(json.loads(json.dumps(record))) == release
    assert record["immutable"] is True
    assert record["metadata"]["labels"]["gitops-hook/stage"] == "release"


def test_the_same_release_has_the_same_name_and_another_one_another() -> None:
    assert released().configmap("shop") == released().configmap("shop")
    other = released(changed("ConfigMap.data.GREETING", "bye"))
    assert (
        other.configmap("shop")["metadata"]["name"]
        != released().configmap("shop")["metadata"]["name"]
    )


def test_configmaps_of_300_kilobytes_fit_into_a_release() -> None:
    text = "".join(f"line {i}\n" for i in range(30_000))
    release = released(changed("ConfigMap.data.GREETING", text))
    assert len(release.configmaps[0]["data"]["GREETING"]) > 300_000
    assert Release.from_configmap(release.configmap("shop")) == release


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (os.urandom(900_000).hex(), "ConfigMap settings has "),
        ("x" * (2**20 + 1), "ConfigMap settings has 1048577 bytes, but 1048576 are possible. Make"),
        ("\x01" * 600_000, "ConfigMap settings has "),
        (os.urandom(2**19).hex(), ""),
        ("\u20ac" * 349_525, ""),
        ("x" * 2**20, ""),
    ],
    ids=["noise", "one-letter", "escaped", "half-noise", "three-byte-letters", "one-mebibyte"],
)
def test_what_fits_into_no_configmap_is_refused_before_anything_changes(
    content: str, said: str
) -> None:
    items = changed("ConfigMap.data.GREETING", content)
    refused = refusal(lambda: released(items))
    assert refused is None if not said else said in (refused or "")


def test_what_fits_into_no_release_is_refused_before_anything_changes() -> None:
    items = changed("ConfigMap.data.GREETING", os.urandom(520_000).hex())
    items[0]["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"] = "more"
    more = copy.deepcopy(items[2])
    more["metadata"]["name"], more["data"] = "more", {"noise": os.urandom(520_000).hex()}
    reason, detail = fault(lambda: released([*items, more]))
    assert reason is Reason.MANIFEST_REFUSED
    said = r"The manifests have \d+ bytes when compressed, but \d+ are possible. Make the ConfigM.*"
    assert re.fullmatch(said, detail)


def test_a_configmap_of_one_mebibyte_of_files_is_copied_and_recorded() -> None:
    items = changed("ConfigMap.binaryData", {"noise": base64.b64encode(os.urandom(10**6)).decode()})
    release = released(items)
    assert Release.from_configmap(release.configmap("shop")) == release
    items[2]["binaryData"]["noise"] = base64.b64encode(bytes(2**20 + 1)).decode()
    assert "ConfigMap settings has 1048582 bytes" in fault(lambda: released(items))[1]


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"binaryData": None},
        {"binaryData": {"release": "%%%"}},
        {"binaryData": {"release": "eJw="}},
        {"binaryData": {"release": "AAAA"}},
        {"binaryData": {"release": 5}},
        {"binaryData": {"release": "eJyrrgUAAXUA+Q=="}},
    ],
    ids=["nothing", "null", "no-base64", "cut-off", "no-zlib", "number", "empty-object"],
)
def test_a_release_that_cannot_be_read_ends_the_run(record: Object) -> None:
    reason, detail = fault(lambda: Release.from_configmap(record))
    assert (reason, detail) == (Reason.MANIFEST_INVALID, "The release record cannot be read.")
