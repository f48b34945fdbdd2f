"""The manifests of an app: how they are read, what is refused, and what a run makes of them."""

from __future__ import annotations

import base64
import copy
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gitops_hook import (
    App,
    AppObjects,
    ConfigError,
    Faults,
    Git,
    Manifest,
    Placement,
    Reason,
    Release,
    Run,
    StageError,
    check_objects,
    image_remarks,
    json_bytes,
    ports_like,
    read_manifests,
    recoloured,
    refuse,
    render,
    repository_of,
    shared_node_ports,
    unread_warning,
)
from tests.memory import peak_of
from tests.schemas import require_valid
from tests.settings import loaded
from tests.standin.kubectl import find_kubectl
from tests.test_git import Repository, filling
from tests.waiting import eventually

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
ALL = f"{DEPLOYMENT}---{SERVICE}---{CONFIGMAP}"


def app_of(**settings: Any) -> App:
    entry = {"name": "shop", "repository": "/srv/shop.git", "build": {"image": IMAGE}}
    return loaded(json.dumps({"apps": [{**entry, **settings}]})).apps[0]


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


def manifests_of(items: list[Object]) -> list[Manifest]:
    """Objects as they come from one file."""
    names = [f"{item['kind']} {item['metadata']['name']}" for item in items]
    copied = json.loads(json.dumps(items))  # nothing in them is shared
    return [Manifest(f"deploy/app.json: {n}", i) for n, i in zip(names, copied, strict=True)]


def checked_objects(
    app: App, namespace: str, manifests: Sequence[Manifest], environment: str = ""
) -> AppObjects:
    """The objects of an app of which nothing is refused."""
    faults = Faults()
    sorted_ones = check_objects(app, namespace, manifests, environment, faults)
    faults.require_none()
    return sorted_ones


def check(items: list[Object], **app: Any) -> AppObjects:
    return checked_objects(app_of(**app), "production", manifests_of(items), "production")


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


def test_each_object_is_named_with_its_file(tmp_path: Path) -> None:
    files = {"10.yaml": ALL, "9.yaml": "", "a [1]*.json": json.dumps(objects(SERVICE)[0])}
    files["b.yaml"] = (
        f"{{apiVersion: v1, kind: List, items: [{{apiVersion: v1, kind: A, {NAMED}}}]}}"
    )
    files["c.yaml"] = "# nothing"
    assert [manifest.where for manifest in read_manifests(write(tmp_path, **files), "deploy")] == [
        "deploy/10.yaml: Deployment web",
        "deploy/10.yaml: Service shop",
        "deploy/10.yaml: ConfigMap settings",
        "deploy/a [1]*.json: Service shop",
        "deploy/b.yaml: A x",
    ]


def test_only_plain_manifests_are_read(tmp_path: Path) -> None:
    files = {
        ".hidden.yaml": "{",
        "notes.txt": "{",
        "app.yaml~": "{",
        "sub/x.yaml": "{",
        "sub.yaml/x.yaml": "{",
        "README": "{",
    }
    assert (
        len(read(tmp_path, **{"app.yaml": ALL}, **{f"deploy/{k}": v for k, v in files.items()}))
        == 3
    )


NAMED = "metadata: {name: x}"
V1 = "apiVersion: v1"
HEAD = f"apiVersion: v1\nkind: X\n{NAMED}\n"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (f"---\n{DEPLOYMENT}\n---\n---\n# nothing\n---\n{SERVICE}\n", ["Deployment", "Service"]),
        ("---", []),
        ("", []),
        ("# a comment only\n", []),
        (ALL.replace("\n", "\r\n"), ["Deployment", "Service", "ConfigMap"]),
        ("\ufeff" + SERVICE, ["Service"]),
        (
            f"{V1}\nkind: List\nitems: [&a {{{V1}, kind: A, {NAMED}}}, {{<<: *a, kind: B}}]",
            ["A", "B"],
        ),
        (
            f"apiVersion: v1\nkind: ConfigMapList\nitems: [{{apiVersion: v1, kind: C, {NAMED}}}]",
            ["C"],
        ),
        ("apiVersion: v1\nkind: List\nitems: []", []),
        (f"apiVersion: v1\nkind: AllowList\n{NAMED}", ["AllowList"]),
        (f'{{"apiVersion": "v1", "kind": "A",\n\t{NAMED}}}', ["A"]),
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
        "flow",
    ],
)
def test_every_object_of_a_file_is_found(tmp_path: Path, text: str, kinds: list[str]) -> None:
    assert [o["kind"] for o in read(tmp_path, **{"app.yaml": text})] == kinds


def test_json_is_read_as_json_tabs_and_all(tmp_path: Path) -> None:
    text = json.dumps(objects(SERVICE)[0], indent="\t")
    (service,) = read(tmp_path, **{"service.json": text})
    assert service["spec"] == objects(SERVICE)[0]["spec"]


def test_a_value_is_what_kubectl_makes_of_it(tmp_path: Path) -> None:
    values = {
        "2026-01-02": "2026-01-02",
        "2026-01-02T03:04:05Z": "2026-01-02T03:04:05Z",
        "22:15": "22:15",
        "08:30": "08:30",
        "=": "=",
        "0400": 256,
        "0x1F": 31,
        "1_000": 1000,
        "1.5": 1.5,
        "9223372036854775807": 2**63 - 1,
        "yes": True,
        "~": None,
        "'yes'": "yes",
        '"a\\u0041\\n"': "aA\n",
        "!!binary aGVsbG8=": "hello",
    }
    text = f"{HEAD}values: [{', '.join(values)}]\n"
    ((*_, (_, read_values)),) = [item.items() for item in read(tmp_path, **{"a.yaml": text})]
    assert read_values == [*values.values()]
    assert [*map(type, read_values)] == [*map(type, values.values())]


@pytest.mark.parametrize("built", [False, True], ids=["plain", "kustomization"])
def test_unquoted_times_and_signs_are_texts(tmp_path: Path, built: bool) -> None:
    files = {
        "app.yaml": DEPLOYMENT.replace('scrape: "yes"', "window: 22:15").replace(
            "ports: [{name", "args: [serve, =]\n          ports: [{name"
        ),
        "hours.yaml": CONFIGMAP.replace("GREETING: hello", "OPENS: 08:30, CLOSES: 22:15"),
    }
    if built:
        files["kustomization.yaml"] = "resources: [app.yaml, hours.yaml]"
    items = {item["kind"]: item for item in read(tmp_path, **files)}
    template = items["Deployment"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"window": "22:15"}
    assert template["spec"]["containers"][0]["args"] == ["serve", "="]
    assert items["ConfigMap"]["data"] == {"OPENS": "08:30", "CLOSES": "22:15"}


def test_what_anchors_share_can_be_changed_apart(tmp_path: Path) -> None:
    (item,) = read(tmp_path, **{"a.yaml": f"{HEAD}a: &a {{x: 1}}\nb: *a\n"})
    item["a"]["x"] = 2
    assert item["b"] == {"x": 1}


LEVELS = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
BOMB = "\n".join([HEAD, "a0: &a0 [x, x, x, x, x, x, x, x, x]", *LEVELS])
LARGE = "The manifests are too large. Shorten them."
NO_MAPPING = "A document is not a mapping. Links are not followed."
NO_OBJECT = "It is not a Kubernetes object: it lacks Kind."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEAD}a: 1\nb:\n\tc: 2\n", "line 6 of a document: found "),
        ("kind: X\r\na: [1\r\n", "line 2 of a document: did not find expected ',' or ']'"),
        ("kind: X\na: b: c\n", "line 2 of a document: mapping values are not allowed"),
        ("kind: *nobody\n", "unknown anchor 'nobody' referenced"),
        ("kind: !!python/object/apply:os.system [x]\n", NO_OBJECT),
        (f"{HEAD}a: .nan\n", "unsupported value: NaN"),
        (f"{HEAD}a: !!int text\n", "cannot decode !!str `text` as a !!int"),
        (f"{HEAD}a: &a [*a]\n", "anchor 'a' value contains itself"),
        (BOMB, "document contains excessive aliasing"),
        ("[" * 100_000, "exceeded max depth of 10000"),
        ("- " * 50_000, "exceeded max depth of 10000"),
        ("just text", NO_MAPPING),
        ("../elsewhere.yaml", NO_MAPPING),
        ("[1, 2]", NO_MAPPING),
        ("metadata: {name: x}", NO_OBJECT),
        ("kind: [List]", NO_OBJECT),
        (f"apiVersion: v1\nkind: X\nkind: Y\n{NAMED}", NO_OBJECT),
        ("apiVersion: v1\nkind: X\n", "X has no metadata.name. Add it."),
        ("apiVersion: v1\nkind: X\nmetadata: {generateName: x-}", "X has no metadata.name. Add"),
        (
            "apiVersion: v1\nkind: X\nmetadata: {name: 5}",
            "metadata.name has a number where a text must stand. Put it in quotes.",
        ),
        ("apiVersion: v1\nkind: X\nmetadata: x", "metadata cannot be a string."),
        ("apiVersion: v1\nkind: X\nmetadata: {}", "X has no metadata.name. Add it."),
        (
            "apiVersion: v1\nkind: X\nmetadata: {name: x, labels: {version: 7}}",
            "metadata.labels has a number where a text must stand. Put it in quotes.",
        ),
        ("kind: X\n\x00", "control characters are not allowed"),
        (HEAD.encode() + b"a: caf\xe9", "It is not UTF-8."),
    ],
    ids=[
        "tab",
        "crlf",
        "colon",
        "alias",
        "python",
        "nan",
        "int",
        "circle",
        "bomb",
        "deep",
        "deep-dashes",
        "text",
        "link",
        "list",
        "no-kind",
        "odd-kind",
        "kind-twice",
        "no-name",
        "generated-name",
        "number-as-name",
        "text-as-metadata",
        "empty-metadata",
        "number-as-label",
        "nul",
        "latin",
    ],
)
def test_what_cannot_be_read_is_named_with_its_file(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    reason, detail = fault(lambda: read(tmp_path, **{"app.yaml": text}))
    assert reason is Reason.MANIFEST_INVALID
    assert detail.startswith(f"deploy/app.yaml: {said}")
    assert str(tmp_path) not in detail


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ("[5, text]", "deploy/app.yaml: "),
        ("[{metadata: {}}]", f"deploy: {NO_OBJECT}"),
        (
            "[{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: A}]}]",
            "deploy: A List stands in another one. Write its objects into one List.",
        ),
    ],
    ids=["scalars", "no-kind", "nested"],
)
def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path, items: str, said: str) -> None:
    text = f"apiVersion: v1\nkind: List\nitems: {items}"
    reason, detail = fault(lambda: read(tmp_path, **{"app.yaml": text}))
    assert reason is Reason.MANIFEST_INVALID
    assert detail.startswith(said)


def test_the_faults_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    files = {"a.yaml": "a: [", "b.yaml": ALL, "c.json": "{", "d.yaml": f"{HEAD}---\na: 1\n"}
    _, detail = fault(lambda: read(tmp_path, **files))
    assert re.fullmatch(
        rf"deploy/a.yaml: .*\ndeploy/c.json: .*\ndeploy/d.yaml: {NO_OBJECT}", detail
    )


def test_of_very_many_faults_fifty_are_named_and_the_rest_is_counted(tmp_path: Path) -> None:
    _, detail = fault(lambda: read(tmp_path, **{f"{i:03}.yaml": "text" for i in range(300)}))
    assert detail.count(NO_MAPPING) == 50
    assert detail.endswith("\n250 more are not listed.")


@pytest.mark.cluster
@pytest.mark.parametrize(
    "text",
    [
        f"{HEAD}a: {'{a: ' * 9000}1{'}' * 9000}\n",
        f"{HEAD}a: {'[' * 1500}{']' * 1500}\n",
        f"{HEAD}a: [{'x,' * 110_000}x]\n",
        f"{HEAD}a: &a {'x' * 100_000}\nb: [{'*a, ' * 90}*a]\n",
        f"{HEAD}a: [{'{},' * 600_000}{{}}]\n",
    ],
    ids=["deep-maps", "deep-lists", "many", "copied", "very-many"],
)
def test_what_needs_much_memory_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, **{"app.yaml": text})
    said, peak = peak_of(READ, str(tmp_path))
    assert said.strip() in (f"ManifestInvalid: deploy: {LARGE}", f"ManifestInvalid: {LARGE}")
    assert peak < 260


def test_the_bound_of_what_is_read_is_for_all_files_together(tmp_path: Path) -> None:
    comments = {f"c{i}.yaml": "# comment\n" * 70_000 for i in range(3)}
    assert len(read(tmp_path, **{"app.yaml": ALL, **dict([*comments.items()][:2])})) == 3
    said = "The manifests have more than 2 MiB together. Shorten them."
    assert fault(lambda: read(tmp_path, **comments)) == (Reason.MANIFEST_INVALID, said)


READ = """
import sys
try:
    print(len(gitops_hook.read_manifests(Path(sys.argv[1]), "deploy")))
except gitops_hook.StageError as refused:
    print(refused)
"""


@pytest.mark.cluster
def test_150_files_of_comments_are_refused_in_little_memory(tmp_path: Path) -> None:
    comments = b"# comment\n" * 209_000
    write(tmp_path, **{f"deploy/c{i}.yaml": comments for i in range(150)})
    said, peak = peak_of(READ, str(tmp_path))
    assert said.startswith("ManifestInvalid: The manifests have more than 2 MiB together.")
    assert peak < 150


@pytest.mark.cluster
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(alphabet=" \n-:{}[]&*!|>#'\"%@,?a1\t~<", max_size=60), max_size=5))
def test_any_texts_are_read_or_refused(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{i}.yaml": text for i, text in enumerate(["", *texts])}
        said = refusal(lambda: read(Path(folder), **files))
    assert said is None or said.startswith("deploy")
    assert folder not in (said or "")


def test_a_missing_folder_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    said = "The commit has no folder 'deploy'. Add it, or correct deploy.manifests."
    assert fault(lambda: read_manifests(tmp_path, "deploy")) == (Reason.MANIFEST_REFUSED, said)
    files = {f"deploy/overlays/{name}/app.yaml": ALL for name in ("prod", "stage")}
    folder = write(tmp_path, **files)
    said = (
        "The commit has no folder 'deploy/overlays/staging'. Add it, or correct deploy.manifests. "
        "deploy/overlays has: prod, stage."
    )
    assert refusal(lambda: read_manifests(folder, "deploy/overlays/staging")) == said


OVERLAYS = ("overlays/production/kustomization.yaml", "overlays/staging/kustomization.yaml")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["base/app.yaml", *OVERLAYS],
            (
                "has no manifests itself. Set deploy.manifests to deploy/overlays/{environment}; "
                "there are: production, staging."
            ),
        ),
        (
            ["production/app.yaml", "staging/app.yaml", "base/app.yaml"],
            (
                "has no manifests itself. Set deploy.manifests to deploy/{environment}; "
                "there are: production, staging."
            ),
        ),
        (
            ["k8s/web.yaml", "docs/notes.txt"],
            "has no manifests itself. Set deploy.manifests to one of: deploy/k8s.",
        ),
        (
            ["chart/Chart.yaml", "chart/templates/app.yaml"],
            "has no manifests, but a Helm chart. Commit what `helm template` prints of it.",
        ),
        (["README.md"], "has no manifests. Add some, or correct deploy.manifests."),
    ],
    ids=["overlays", "environments", "one", "chart", "nothing"],
)
def test_a_folder_without_manifests_says_where_they_are(
    tmp_path: Path, files: list[str], said: str
) -> None:
    folder = write(tmp_path, **{f"deploy/{name}": "x" for name in files})
    reason, detail = fault(lambda: read_manifests(folder, "deploy"))
    assert (reason, detail) == (Reason.MANIFEST_REFUSED, f"The folder 'deploy' {said}")


def test_plan_names_the_folders_within_a_plain_one_that_are_not_read(tmp_path: Path) -> None:
    for name in ("app.yaml", "extra/job.yaml", "extra/deep/cron.yml", "docs/README.md"):
        file = tmp_path / "deploy" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    warning = unread_warning(tmp_path, "deploy")
    assert warning.endswith("no kustomization names them: deploy/extra, deploy/extra/deep")
    (tmp_path / "deploy" / "kustomization.yaml").touch()
    assert unread_warning(tmp_path, "deploy") == ""


def test_a_helm_chart_is_to_be_rendered_by_whoever_commits_it(tmp_path: Path) -> None:
    files = {"Chart.yaml": "name: shop", "values.yaml": "a: 1", "deploy/templates/a.yaml": "{{"}
    assert fault(lambda: read(tmp_path, **files)) == (
        Reason.MANIFEST_REFUSED,
        "deploy is a Helm chart. Commit what `helm template` prints of it.",
    )


@pytest.mark.parametrize("link", ["deploy", "deploy/app.yaml", "deploy/kustomization.yaml"])
def test_links_are_not_followed(tmp_path: Path, link: str) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    write(outside, **{"app.yaml": ALL, "kustomization.yaml": "resources: [app.yaml]"})
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(outside / link)
    reason = Reason.MANIFEST_REFUSED if link == "deploy" else Reason.MANIFEST_INVALID
    assert fault(lambda: read_manifests(root, "deploy"))[0] is reason


def test_a_configmap_of_as_much_as_kubernetes_takes_is_read(tmp_path: Path) -> None:
    lines = "".join(f"    line {i} of a <large> file 字\n" for i in range(31_000))
    text = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: large}}\ndata:\n  file: |\n{lines}"
    (item,) = read(tmp_path, **{"large.yaml": text})
    assert len(item["data"]["file"].encode()) > 950_000
    assert item["data"]["file"].startswith("line 0 of a <large> file 字\nline 1")


# === Kustomizations ===


@pytest.fixture(autouse=True)
def _kubectl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kubectl on the path."""
    folder = os.path.dirname(find_kubectl())
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("kustomization", ["kustomization.yaml", "notes.txt"])
def test_manifests_are_read_by_a_kubectl_beside_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kustomization: str
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(find_kubectl())
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    files = {kustomization: "resources: [app.yaml]", "app.yaml": CONFIGMAP}
    (item,) = read(tmp_path, **files)
    assert item["data"] == {"GREETING": "hello"}


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
replacements:
- source: {kind: Service, name: shop, fieldPath: spec.ports.0.name}
  targets:
  - {select: {kind: Deployment}, fieldPaths: [metadata.annotations.port], options: {create: true}}
transformers: [annotate.yaml]
configMapGenerator:
- {name: generated, literals: ["URL=https://api.example.com"], files: [key=file.txt], envs: [e.env]}
commonAnnotations: {docs: "https://wiki.example.com/x", path: "https://wiki.example.com"}
labels: [{pairs: {files: any}, fields: [{path: metadata/labels, create: true}]}]
""",
            "annotate.yaml": """
apiVersion: builtin
kind: AnnotationsTransformer
metadata: {name: x}
annotations: {built: in}
fieldSpecs: [{path: metadata/annotations, create: true}]
""",
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
    deployment = kinds["Deployment", "my"]
    assert deployment["spec"]["replicas"] == 5
    assert deployment["metadata"]["annotations"]["built"] == "in"
    assert deployment["metadata"]["annotations"]["port"] == "http"
    assert deployment["metadata"]["labels"]["files"] == "any"
    assert kinds["Service", "my"]["spec"]["ports"][0]["port"] == 81
    assert kinds["ConfigMap", "my-generated"]["data"]["URL"] == "https://api.example.com"
    assert kinds["ConfigMap", "my-generated"]["data"]["key"] == "content"
    assert kinds["ConfigMap", "my"]["data"] == {"GREETING": "hello"}


HOST_OF = (
    "- target: {kind: ConfigMap, name: settings}\n"
    "  patch: |-\n    - {op: replace, path: /data/GREETING, value: %s.example.com}\n"
)


def test_each_environment_is_read_from_its_own_overlay(tmp_path: Path) -> None:
    app = app_of(deploy={"manifests": "deploy/overlays/{environment}"})
    files = {"base/kustomization.yaml": "resources: [app.yaml]", "base/app.yaml": ALL}
    for environment, replicas in (("staging", 1), ("production", 4)):
        files[f"overlays/{environment}/kustomization.yaml"] = (
            f"resources: [../../base]\nreplicas: [{{name: web, count: {replicas}}}]\n"
            f"patches:\n{HOST_OF % environment}"
        )
    root = write(tmp_path, **{f"deploy/{name}": text for name, text in files.items()})
    sizes = {}
    for environment in app.deploy.environments:
        manifests = read_manifests(root, app.deploy.folder(environment))
        checked = checked_objects(app, environment, manifests, environment)
        sizes[environment] = checked.deployment["spec"]["replicas"]
        assert checked.configmaps["settings"]["data"]["GREETING"] == f"{environment}.example.com"
        written = f"deploy/base/app.yaml (by way of deploy/overlays/{environment}): "
        assert all(manifest.where.startswith(written) for manifest in manifests)
    assert sizes == {"staging": 1, "production": 4}


def places(root: Path, path: str = "deploy") -> list[str]:
    """How the objects of a folder are named, in the order of their names."""
    return sorted(manifest.where for manifest in read_manifests(root, path))


BUILT_OF = {
    "deploy/base/kustomization.yaml": (
        "resources: [web/app.yaml, service.json]\n"
        "configMapGenerator: [{name: mail, literals: [A=b]}]\n"
    ),
    "deploy/base/web/app.yaml": f"{DEPLOYMENT}---{CONFIGMAP}",
    "deploy/base/web/old.yaml": DEPLOYMENT,
    "deploy/base/service.json": json.dumps(objects(SERVICE)[0]),
    "deploy/parts/hours/Kustomization": (
        "apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\nresources:\n- a.yaml\n"
    ),
    "deploy/parts/hours/a.yaml": (
        "# when\r\nkind: 'ConfigMap' # open\r\napiVersion: v1\r\nmetadata:\r\n"
        '  labels:\r\n    name: no\r\n  # none\r\n\r\n  name: "hours"\r\n'
    ),
    "deploy/production/kustomization.yaml": "resources: [../base]\npatches: [{path: patch.yaml}]",
    "deploy/production/patch.yaml": DEPLOYMENT,
    "deploy/staging/kustomization.yaml": (
        "nameSuffix: -s\nresources: [../base/, 'own.yaml']\ncomponents: [../parts/hours]\n"
        "patches:\n- path: patch.yaml\n- patch: '{apiVersion: v1, kind: Service, "
        "metadata: {name: shop}, spec: {type: NodePort}}'\n"
        "configMapGenerator:\n- {name: own, literals: [A=b]}\n"
    ),
    "deploy/staging/own.yaml": (
        f"---\n{WORKER}\n---\napiVersion: v1\nkind: ConfigMap\n"
        "metadata: {labels: {name: x, y: z}, name: flow}\n"
    ),
    "deploy/staging/patch.yaml": (
        "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n    name: web\nspec: {replicas: 3}\n"
    ),
}


def test_an_object_that_is_built_is_named_with_the_files_in_which_it_is_written(
    tmp_path: Path,
) -> None:
    through = "(by way of deploy/staging)"
    patched = "deploy/base/web/app.yaml and deploy/staging/patch.yaml"
    assert places(write(tmp_path, **BUILT_OF), "deploy/staging") == [
        f"deploy/base/web/app.yaml {through}: ConfigMap settings-s",
        f"{patched} {through}: Deployment web-s",
        f"deploy/parts/hours/a.yaml {through}: ConfigMap hours-s",
        "deploy/staging/kustomization.yaml: ConfigMap mail-s-b9t2424hkf",
        "deploy/staging/kustomization.yaml: ConfigMap own-s-b9t2424hkf",
        "deploy/staging/kustomization.yaml: Service shop-s",
        "deploy/staging/own.yaml: ConfigMap flow-s",
        "deploy/staging/own.yaml: Deployment shop-worker-s",
    ]


def test_where_an_object_is_written_changes_nothing_of_it(tmp_path: Path) -> None:
    root = write(tmp_path, **BUILT_OF)
    build = [find_kubectl(), "label", "--local", "-o=json", "x-", "-k", root / "deploy/staging"]
    printed = subprocess.run(build, capture_output=True, check=True, text=True).stdout
    built = json.loads("[" + printed.replace("\n}\n{", "\n},{") + "]")
    assert [m.content for m in read_manifests(root, "deploy/staging")] == built


def test_no_file_is_named_for_an_object_that_is_written_in_many_or_in_none(
    tmp_path: Path,
) -> None:
    patches = {f"p{i}.yaml": CONFIGMAP for i in range(3)}
    files = {"app.yaml": CONFIGMAP, "many.yaml": SERVICE, **patches}
    listed = ", ".join(f"{{path: {name}}}" for name in patches)
    files["kustomization.yaml"] = f"resources: [app.yaml, many.yaml]\npatches: [{listed}]"
    assert places(write(tmp_path, **files)) == [
        "deploy/kustomization.yaml: ConfigMap settings",
        "deploy/many.yaml: Service shop",
    ]
    many = "---".join([SERVICE, *(SERVICE.replace("shop", f"x{i}") for i in range(500))])
    named = places(write(tmp_path, **{"many.yaml": many}))
    assert {where.partition(":")[0] for where in named} == {"deploy/kustomization.yaml"}


def test_files_outside_of_the_commit_are_not_looked_at_for_an_object(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", **{"outside/app.yaml": CONFIGMAP}) / "outside"
    words = ["../../outside", "outside", "link.yaml", "linked", "gone.yaml", "loop.yaml", "/", "~"]
    words += [str(outside), f"{outside}/app.yaml", "../../../../../../etc", "x" * 5000, "\u2028"]
    files = {
        "kustomization.yaml": f"configMapGenerator: [{{name: settings}}]\n# {' '.join(words)}",
        "deploy/many.yaml/app.yaml": CONFIGMAP,
    }
    root = write(tmp_path / "root", **files)
    for link, target in (
        ("link.yaml", outside / "app.yaml"),
        ("linked", outside),
        ("loop.yaml", "loop.yaml"),
    ):
        (root / "deploy" / link).symlink_to(target)
    (where,) = places(root)
    assert where.startswith("deploy/kustomization.yaml: ConfigMap settings-")


@pytest.mark.parametrize(
    "text",
    [
        "metadata:\n" + " " * 10**6 + "x\n" + " " * 5 * 10**5 + "name: x",
        "metadata:\n" + "  x: y\n" * 10**5,
        "metadata:\n" + "  \n\n" * 3 * 10**5,
        "metadata:" + "\n\r\n" * 5 * 10**5,
        "metadata: {" + "a, " * 3 * 10**5,
        "metadata: {" + "{" * 10**6,
        "metadata: {" + "{}" * 5 * 10**5,
        "metadata: {}\n" * 10**5,
        "kind:" + " " * 10**6 + "x y",
        "kind: x" + " " * 10**6 + "y",
        "\n---" * 3 * 10**5,
    ],
    ids=[
        "indented",
        "lines",
        "blanks",
        "empty",
        "commas",
        "braces",
        "pairs",
        "many",
        "kind",
        "spaces",
        "documents",
    ],
)
def test_it_takes_no_long_time_to_see_that_a_text_says_nothing(tmp_path: Path, text: str) -> None:
    files = {
        "kustomization.yaml": "configMapGenerator: [{name: x}] # text.yaml",
        "text.yaml": f"{text}\n# no object",
    }
    root = write(tmp_path, **files)
    began = time.process_time()
    (where,) = places(root)
    assert time.process_time() - began < 2
    assert where.startswith("deploy/kustomization.yaml: ")


def test_of_very_many_words_of_a_kustomization_the_first_are_looked_at(tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(150_000))
    files = {"kustomization.yaml": f"resources: [app.yaml]\n# {words}", "app.yaml": CONFIGMAP}
    root = write(tmp_path, **files)
    began = time.process_time()
    assert places(root) == ["deploy/app.yaml: ConfigMap settings"]
    assert time.process_time() - began < 2
    write(tmp_path, **{"kustomization.yaml": f"# {words}\nresources: [app.yaml]"})
    assert places(root) == ["deploy/kustomization.yaml: ConfigMap settings"]


def test_of_more_than_may_be_read_no_file_is_looked_at(tmp_path: Path) -> None:
    files = {"kustomization.yaml": "resources: [app.yaml] # large.yaml", "app.yaml": CONFIGMAP}
    root = write(tmp_path, **files, **{"large.yaml": bytes(3 * 2**20)})
    assert places(root) == ["deploy/kustomization.yaml: ConfigMap settings"]


def test_the_places_are_seen_in_a_commit_that_git_brought(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "shop")
    repository.git("config", "uploadpack.allowFilter", "false")  # so that all of it is brought
    files = {
        "src__logo.png": os.urandom(3 * 2**20),
        "deploy__base__kustomization.yaml": "resources: [app.yaml]",
        "deploy__base__app.yaml": CONFIGMAP,
        "deploy__production__kustomization.yaml": "resources: [../base]",
    }
    commit = filling(repository, **files)
    with Git(tmp_path / "none").manifests(str(repository.path), commit, "deploy") as root:
        assert places(root, "deploy/production") == [
            "deploy/base/app.yaml (by way of deploy/production): ConfigMap settings"
        ]


def test_the_shop_of_the_demo_has_an_overlay_for_each_environment() -> None:
    root = Path(__file__).parent / "demo/app"
    app = app_of(deploy={"manifests": "deploy/overlays/{environment}"})
    rendered = {}
    for environment in app.deploy.environments:
        manifests = read_manifests(root, app.deploy.folder(environment))
        checked = checked_objects(app, environment, manifests, environment)
        placement = Placement("blue", 0)
        rendered[environment] = render(app, RUN, BUILT, placement, checked)
    assert {name: release.wanted for name, release in rendered.items()} == {
        "staging": 1,
        "production": 2,
    }
    greetings = {release.configmaps[0]["data"]["greeting"] for release in rendered.values()}
    assert greetings == {"Welcome to the shop", "Welcome to the shop's rehearsal"}


# What leads out of a commit, {} being the address of a server that must not be asked.
HOSTILE = {
    "resources": "resources: ['http://{}/x.yaml']",
    "escaped": 'resources: ["\\x68ttp:\\u002f/{}/x.yaml"]',
    "upper-case": "RESOURCES: ['http://{}/x.yaml']",
    "git-http": "resources: ['git::http://{}/demo/x.git']",
    "git-suffix": "resources: ['http://{}/demo/x.git?ref=main']",
    "git-protocol": "resources: ['git://{}/demo/x.git']",
    "scp": "resources: ['git@127.0.0.1:demo/x.git']",
    "ssh": "resources: ['ssh://git@{}/demo/x.git']",
    "file": "resources: ['file:///etc']",
    "github": "resources: ['github.com/demo/x']",
    "bases": "bases: ['http://{}/demo/x.git']",
    "components": "components: ['http://{}/demo/x.git']",
    "crds": "crds: ['http://{}/x.yaml']",
    "configurations": "configurations: ['http://{}/x.yaml']",
    "openapi": "openapi: {{path: 'http://{}/x.yaml'}}",
    "patches": "resources: [app.yaml]\npatches: [{{path: 'http://{}/x.yaml'}}]",
    "strategic": "resources: [app.yaml]\npatchesStrategicMerge: ['http://{}/x.yaml']",
    "json6902": "patchesJson6902: [{{target: {{kind: X, name: z}}, path: 'http://{}/x.yaml'}}]",
    "replacements": "resources: [app.yaml]\nreplacements: [{{path: 'http://{}/x.yaml'}}]",
    "generator-file": "configMapGenerator: [{{name: x, files: ['http://{}/x.yaml']}}]",
    "generator-key": "configMapGenerator: [{{name: x, files: ['key=http://{}/x.yaml']}}]",
    "generator-envs": "configMapGenerator: [{{name: x, envs: ['http://{}/x']}}]",
    "secret": "secretGenerator: [{{name: x, files: ['http://{}/x']}}]",
    "anchor": "commonLabels: &x {{a: b}}\nresources: &y ['http://{}/x.yaml']\ncomponents: *y",
    "merge": "<<: {{resources: ['http://{}/x.yaml']}}",
    "generators": "generators: ['http://{}/x.yaml']",
    "transformers": "transformers: ['http://{}/x.yaml']",
    "validators": "resources: [app.yaml]\nvalidators: ['http://{}/x.yaml']",
    "helm": "helmCharts: [{{name: x, repo: 'http://{}/'}}]",
    "helm-plugin": "generators: [helm.yaml]",
    "exec": "resources: [app.yaml]\ntransformers: [exec.yaml]",
    "container": "generators: [container.yaml]",
    "go-plugin": "generators: [plugin.yaml]",
    "absolute": "resources: [/etc/passwd]",
    "absolute-folder": "resources: [{outside}]",
    "absolute-file": "configMapGenerator: [{{name: x, files: [{outside}/app.yaml]}}]",
    "upwards": "resources: [../../outside]",
    "upwards-file": "resources: [../../outside/app.yaml]",
    "upwards-patch": "resources: [app.yaml]\npatches: [{{path: ../../outside/app.yaml}}]",
    "upwards-component": "resources: [app.yaml]\ncomponents: [../../outside/part]",
    "upwards-openapi": "resources: [app.yaml]\nopenapi: {{path: ../../outside/app.yaml}}",
    "process": "resources: [../../../../../../../../../../proc/self/cwd/tests]",
    "link": "resources: [link]",
    "linked-file": "resources: [link/app.yaml]",
    "nested": "resources: [far]",
    "itself": "resources: [.]",
    "circle": "resources: [there]",
    "bomb": "resources: [bomb.yaml]",
    "own-bomb": BOMB.replace(HEAD, "").replace("{", "{{").replace("}", "}}") + "\nresources: []",
    "number": f"resources: [app.yaml]\nreplicas: [{{{{name: web, count: {'9' * 100_000}}}}}]",
    "long": f"resources: [{'a/' * 3000}x]",
}
FUNCTION = "apiVersion: x/v1\nkind: X\nmetadata:\n  name: x\n  annotations:\n"
FUNCTION += "    config.kubernetes.io/function: |\n      "


def hostile(folder: Path, text: str, address: str) -> Path:
    """A commit with a kustomization that leads out of it, and what stands there."""
    outside = {
        "kustomization.yaml": "resources: [app.yaml]",
        "app.yaml": CONFIGMAP,
        "part/kustomization.yaml": "apiVersion: kustomize.config.k8s.io/v1alpha1\n"
        "kind: Component\nnamePrefix: other-",
    }
    write(folder, **{f"outside/{name}": content for name, content in outside.items()})
    program = folder / "root/deploy/run.sh"
    helm = f"{FUNCTION.split('  annotations')[0]}name: x\nrepo: http://{address}/\n"
    files = {
        "kustomization.yaml": text.format(address, outside=folder / "outside"),
        "app.yaml": ALL,
        "run.sh": f"#!/bin/sh\ntouch {folder}/proof\n",
        "bomb.yaml": BOMB,
        "exec.yaml": f"{FUNCTION}exec: {{path: ./run.sh}}",
        "container.yaml": f"{FUNCTION}container: {{image: '{address}/x', network: true}}",
        "plugin.yaml": "apiVersion: demo/v1\nkind: Run\nmetadata: {name: x}",
        "helm.yaml": helm.replace("x/v1", "builtin").replace("X", "HelmChartInflationGenerator"),
        "deploy/there/kustomization.yaml": "resources: [../back]",
        "deploy/back/kustomization.yaml": "resources: [../there]",
        "deploy/far/kustomization.yaml": f"resources: ['http://{address}/x.yaml']",
    }
    root = write(folder / "root", **files)
    program.chmod(0o755)
    (root / "deploy/link").symlink_to(folder / "outside")
    return root


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server on loopback that takes note of who connects, and answers nobody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def address_of(listener: socket.socket) -> str:
    """Its host and port."""
    return "{}:{}".format(*listener.getsockname())


def was_asked(listener: socket.socket) -> bool:
    """Whether anyone connected."""
    with suppress(BlockingIOError):
        listener.accept()[0].close()
        return True
    return False


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_kustomization_that_leads_out_of_the_commit_is_refused(
    tmp_path: Path, text: str, listener: socket.socket
) -> None:
    root = hostile(tmp_path, text, address_of(listener))
    _, detail = fault(lambda: read_manifests(root, "deploy"))
    assert detail.startswith("deploy/kustomization.yaml: ")
    assert str(tmp_path) not in detail.replace(str(tmp_path / "outside"), "")
    assert not was_asked(listener)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["resources", "escaped", "openapi", "generator-file", "merge"])
def test_it_is_the_closed_network_that_keeps_kustomize_from_fetching(
    tmp_path: Path, name: str, listener: socket.socket
) -> None:
    root = hostile(tmp_path, HOSTILE[name], address_of(listener))
    build = subprocess.Popen([find_kubectl(), "kustomize", root / "deploy"], stderr=-1, stdout=-1)
    try:
        assert eventually(lambda: was_asked(listener))
    finally:
        build.kill()
        build.communicate()


@pytest.mark.parametrize("name", ["upwards", "upwards-component", "link"])
def test_it_is_the_closed_file_system_that_keeps_kustomize_in_the_commit(
    tmp_path: Path, name: str
) -> None:
    root = hostile(tmp_path, HOSTILE[name], "")
    build = [find_kubectl(), "kustomize", root / "deploy"]
    assert subprocess.run(build, capture_output=True, check=False).returncode == 0


def test_a_system_that_cannot_close_the_network_is_not_one_to_read_manifests_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(ConfigError, match="the system cannot close the network to kubectl"):
        read(tmp_path, **{"app.yaml": ALL})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resources: [app.yaml]\nnonsense: 1", 'invalid Kustomization: json: unknown field "nonse'),
        ("resources: [app.yaml]\n\tx: 1", "invalid Kustomization: yaml: "),
        ("[app.yaml]", "invalid Kustomization: json: cannot unmarshal array into Go value"),
        ("resources: {a: 1}", "invalid Kustomization: json: cannot unmarshal object into Go"),
        ("", "kustomization.yaml is empty"),
        ("resources: [app.yaml]\nbases: [gone]", "deploy/gone is not in the commit. Add it, or do"),
        ("resources: [../gone]", "gone is not below deploy, the only folder that is read. Move it"),
        ("resources: [gone.yaml]", "deploy/gone.yaml is not in the commit. Add it, or do not name"),
        (
            "resources: [../deploy/base]",
            "deploy/base/gone.yaml is not in the commit. Add it, or do",
        ),
        (
            "resources: [../base]",
            "base/gone.yaml is not below deploy, the only folder that is read.",
        ),
        (
            "configMapGenerator: [{name: x, files: [../a]}]",
            "a is not below deploy, the only folder",
        ),
        ("resources: [../docs]", "docs has no kustomization. Add one."),
        (
            "resources: [../base/o.yaml]",
            (
                "base/o.yaml is not below the folder of the kustomization that names it. "
                "Name a folder with a kustomization."
            ),
        ),
        (
            "secretGenerator: [{name: x, envs: [.env]}]",
            (
                "deploy/.env is not in the commit. If it is secret, do not commit it: "
                "make a Secret in each namespace."
            ),
        ),
        ("resources: [app.yaml, app.yaml]", "Deployment.v1.apps/web.[noNs] occurs twice. Remove"),
        ("resources: [nothing.yaml]", "nothing.yaml is not a Kubernetes object."),
        ("resources: ['git@example.com:a/b.git']", "What it names is outside of the commit. Copy"),
        ("resources: [/etc/passwd]", "What it names is outside of the commit. Copy it there."),
        ("resources: ['http://127.0.0.1:9/x']", "http://127.0.0.1:9/x is outside of the commit."),
        ("helmCharts: [{name: x, repo: 'http://x'}]", "It has a Helm chart. Commit what `helm te"),
        ("resources: [.]", "deploy includes itself. Do not name it there."),
        ("generators: [plugin.yaml]", "It runs a plugin, which is not done here. Commit what it"),
        (
            "resources: [twice.yaml]",
            "line 4 of a document: the key A is there twice. Remove one of the",
        ),
        ("resources: [in]", "line 4 of a document: the key A is there twice. Remove one of the"),
    ],
    ids=[
        "unknown",
        "tab",
        "list",
        "odd-type",
        "empty",
        "warnings",
        "elsewhere",
        "missing",
        "missing-in-base",
        "missing-elsewhere",
        "file-of-elsewhere",
        "no-kustomization",
        "not-below",
        "ignored-by-git",
        "twice",
        "no-object",
        "repository",
        "outside",
        "address",
        "helm",
        "itself",
        "plugin",
        "key-twice",
        "key-twice-in-component",
    ],
)
def test_a_kustomization_that_cannot_be_built_says_why_in_plain_words(
    tmp_path: Path, text: str, said: str
) -> None:
    files = {"kustomization.yaml": text, "app.yaml": DEPLOYMENT, "nothing.yaml": "a: 1"}
    files |= {"base/kustomization.yaml": "resources: [gone.yaml]", "base/o.yaml": CONFIGMAP}
    files |= {"deploy/base/kustomization.yaml": "resources: [gone.yaml]"}
    files |= {"docs/a.md": "x", "plugin.yaml": "apiVersion: a/v1\nkind: P\nmetadata: {name: x}"}
    twice = f"{V1}\nkind: ConfigMap\n{NAMED}\ndata: {{A: '1',\n A: '2'}}"
    files |= {"twice.yaml": twice, "deploy/in/kustomization.yaml": "components: [../part]"}
    part = "kind: Component\napiVersion: kustomize.config.k8s.io/v1alpha1\n"
    files |= {"deploy/part/kustomization.yaml": f"{part}resources: [twice.yaml]"}
    files |= {"deploy/part/twice.yaml": twice}
    detail = fault(lambda: read(tmp_path, **files))[1]
    assert detail.startswith(f"deploy/kustomization.yaml: {said}")
    assert str(tmp_path) not in detail
    assert "/tmp" not in detail
    assert "Warning" not in detail


ANCHORS = "\n".join([CONFIGMAP, "a0: &a0 [x, x, x, x, x, x, x, x, x]", *LEVELS])


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("resources: [file]", ANCHORS.encode()),
        ("configMapGenerator: [{name: x, files: [file]}]", b"x" * 100_000_000),
        ("configMapGenerator: [{name: x, files: [file]}]", b"x" * 9_000_000),
    ],
    ids=["anchors", "generator", "output"],
)
def test_a_kustomization_that_takes_too_much_memory_is_refused(
    tmp_path: Path, text: str, file: bytes
) -> None:
    write(tmp_path, **{"kustomization.yaml": text, "file": file})
    said, peak = peak_of(READ, str(tmp_path))
    assert said.strip() == f"ManifestInvalid: deploy/kustomization.yaml: {LARGE}"
    assert peak < 260


@pytest.mark.cluster
def test_a_kustomization_of_as_much_as_is_read_is_built(tmp_path: Path) -> None:
    written = re.sub(r"\n *(volumes|envFrom): .*", "", DEPLOYMENT)
    deployments = [written.replace("name: web,", f"name: web-{i},") for i in range(500)]
    text = "namePrefix: my-\ncommonLabels: {a: b}\nresources: [file]"
    assert (
        len(read(tmp_path, **{"kustomization.yaml": text, "file": "\n---\n".join(deployments)}))
        == 500
    )


@pytest.mark.cluster
def test_bases_that_multiply_end_at_the_time_limit(tmp_path: Path) -> None:
    files = {
        f"b{i}/kustomization.yaml": f"resources: [../b{i + 1}, ../b{i + 1}/.]" for i in range(60)
    }
    files |= {"b60/kustomization.yaml": "resources: []"}
    text = "resources: [../b0]"
    reason, detail = fault(lambda: read(tmp_path, **{"kustomization.yaml": text}, **files))
    assert reason is Reason.MANIFEST_INVALID
    assert "kubectl does not come to an end with it. Make it smaller." in detail


def test_kubectl_gets_no_home_and_nothing_of_the_environment(
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
    assert seen.keys() <= {"HOME", "PATH", "GOMAXPROCS", "PWD", "SHLVL", "OLDPWD", "_"}


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
    app = app_of(deploy={"ignore_kinds": ["Ingress"]})
    checked = checked_objects(app, "production", manifests_of([*objects(), odd]))
    assert checked.ignored == ["deploy/app.json: Ingress web"]


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
            "Ingress x of networking.k8s.io/v1 is not deployed. List Ingress in deploy.companions",
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
            "Odd x of is not deployed",
        ),
        (
            changed("Deployment.apiVersion", "extensions/v1beta1"),
            "Deployment web is of the old extensions/v1beta1. Write apiVersion: apps/v1.",
        ),
        (
            changed("Deployment.metadata.namespace", "kube-system"),
            "metadata.namespace is not 'production'. Remove it, or change namespaces.production.",
        ),
        (
            changed("ConfigMap.metadata.namespace", "default"),
            "metadata.namespace is not 'production'. Remove it, or change namespaces.production.",
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
        ([], "rename one, or set deploy.service.\nThere is no Deployment. Add one, whose pods the"),
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


CONTROL_PLANE = [
    {"operator": "Exists"},
    {"key": "", "operator": "Exists", "effect": "NoSchedule"},
    {"key": None, "operator": "Exists", "effect": "NoExecute"},
    *(
        {"key": f"node-role.kubernetes.io/{role}", "operator": "Exists"}
        for role in ("control-plane", "master", "controlplane", "etcd")
    ),
]


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
        *((f"{POD}.tolerations", [one], "tolerations let these pods run on the control plane.")
          for one in CONTROL_PLANE),
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


def test_refusals_in_the_objects_and_in_their_rendering_are_reported_at_once() -> None:
    items = changed(f"{POD}.hostNetwork", True)
    (web,) = items[0]["spec"]["template"]["spec"]["containers"]
    web["image"] = "registry.example.com/other"
    items[0]["spec"]["template"]["spec"]["containers"] += [{**web, "name": "second"}]
    items[0]["spec"]["template"]["spec"]["serviceAccountName"] = "admin"
    items[0]["spec"]["replicas"] = 1001
    items[1]["spec"]["type"] = "ExternalName"
    items[2]["data"]["NUMBER"] = 5
    faults = Faults()
    checked = check_objects(app_of(), "production", manifests_of(items), "", faults)
    with faults.collect():
        render(app_of(), RUN, BUILT, Placement("green", 0), checked)
    reason, detail = fault(faults.require_none)
    assert reason is Reason.MANIFEST_REFUSED
    assert [line.split(". ")[0] for line in detail.split("\n")] == [
        "deploy/app.json: Deployment web: spec.hostNetwork shares the network of the node",
        (
            "deploy/app.json: Deployment web: spec.serviceAccountName is not in deploy."
            "service_accounts"
        ),
        "Service shop is an ExternalName, which selects no pods",
        "ConfigMap settings: NUMBER is not a text",
        f"No container has the image {IMAGE!r} (or 'shop'), so the build would not be deployed",
        "1001 replicas are too many",
    ]


def test_a_fault_is_collected_once_and_incomplete_objects_end_it_at_once() -> None:
    faults = Faults()
    for _ in range(2):
        with faults.collect():
            refuse("one")
        with faults.collect():
            {}["missing"]
    assert len(fault(faults.require_none)[1].split("\n")) == 2
    manifests = manifests_of([objects()[1]])
    assert (
        "There is no Deployment"
        in fault(lambda: check_objects(app_of(), "x", manifests, "", faults))[1]
    )


def test_the_first_of_very_many_refusals_are_listed_and_the_rest_is_counted() -> None:
    labels = {f"gitops-hook/x{i}": "y" for i in range(5000)}
    detail = fault(lambda: released(changed("Service.metadata.labels", labels)))[1]
    assert detail.endswith(". Remove it.\n4950 more are not listed.")
    assert len(detail) < 6000


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


@pytest.mark.cluster
@pytest.mark.parametrize("where", PLACES)
def test_a_field_of_the_wrong_type_ends_the_run_or_is_left_to_the_api_server(
    tmp_path: Path, where: str
) -> None:
    for i, odd in enumerate(ODD):
        with suppress(StageError):
            items = changed(where, copy.deepcopy(odd))
            if where.split(".")[1] == "metadata":  # which kubectl judges
                text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
                items = read(tmp_path / str(i), **{"app.json": text})
            release = released(items)
            assert ports_like(release.ports, [{"port": 80, "protocol": "TCP", "nodePort": 30001}])


@pytest.mark.parametrize(
    ("where", "odd", "said"),
    [
        ("Deployment.spec", {}, "The Deployment or the Service is not well formed, near"),
        *(
            ("Deployment.spec.replicas", odd, "spec.replicas is no whole number. Write one without")
            for odd in ("3", True, 2.5, [])
        ),
        (f"{POD}.containers", ["web"], "near TypeError("),
        (WEB, {"name": "x"}, "near KeyError('image'). `kubectl apply --dry-run=server` on them"),
        (f"{WEB}.image", 7, "near 7. `kubectl apply --dry-run=server` on them"),
        (f"{WEB}.lifecycle", 7, "near 7. `kubectl apply --dry-run=server` on them"),
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
    for field in ("strategy", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"):
        assert released(changed(f"Deployment.spec.{field}", None)) == released()
    for place in (f"{WEB}.lifecycle.preStop", f"{POD}.terminationGracePeriodSeconds"):
        (web,) = pod(released(changed(place, None)))["containers"]
        assert web["lifecycle"] == {"preStop": {"sleep": {"seconds": 5}}}
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
        ("docker.io/demo/shop:1", "demo/shop"), ("index.docker.io/demo/shop", "demo/shop"),
    ],
)  # fmt: skip
def test_an_image_has_a_name_without_tag_and_digest(image: str, name: str) -> None:
    assert repository_of(image) == name


def test_nesting_of_any_depth_ends_in_a_release_or_a_refusal(tmp_path: Path) -> None:
    for depth in (150, 250, 300, 450, 700):
        text = json.dumps(objects()[0]).replace('"dev"', "{}")
        deep = text[:-1] + ', "x": ' + '{"a":' * depth + "1" + "}" * depth + "}"
        manifests = [Manifest("deploy/x.json", item) for item in objects()[1:]]
        with suppress(StageError):
            manifests += read_manifests(write(tmp_path, **{"x.json": deep}), "deploy")
            checked = checked_objects(app_of(), "production", manifests)
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
        checked = checked_objects(ignoring, "production", manifests)
        render(ignoring, RUN, BUILT, Placement("green", 0), checked)


# === Whose an object is ===

ADVICE = {
    "Secret": "Create it by hand in each namespace, and remove it from git.",
    "Job": "Use an init container of the Deployment: it ends before a version gets traffic.",
    "HorizontalPodAutoscaler": "Its scaleTargetRef must name a Deployment here. Correct it, or",
    "PodDisruptionBudget": "Its selector must reach pods of a Deployment here. Correct it, or list",
    "Service": "Its selector must reach pods of a Deployment here. Correct it, or list Service/",
    "StatefulSet": "List StatefulSet in deploy.companions to have it applied, or StatefulSet/x in",
    "PersistentVolumeClaim": "by hand; the pods of both colours use it at once.",
    "ServiceAccount": "apply it by hand; deploy.service_accounts lets pods run as it.",
    "ClusterRole": "It concerns the whole cluster. List ClusterRole/x in deploy.ignore and apply",
    "Namespace": "It concerns the whole cluster. List Namespace/x in deploy.ignore and apply it",
    "Role": "List Role/x in deploy.ignore and apply it by hand.",
    "NetworkPolicy": "is not deployed. List NetworkPolicy in deploy.companions to have it applied",
}
OWN_APIS = {
    "Deployment": "apps/v1",
    "Service": "v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
}


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
    role = other("Role", "shop-role")
    items = [*objects(ALL), other("Secret", "night"), other("Secret", "day"), role]
    names = ("Secret night of", "Secret day of", "Role shop-role of")

    def refused(*entries: str) -> list[str]:
        detail = refusal(lambda: check(items, deploy={setting: [*entries]})) or ""
        return [name for name in names if name in detail]

    assert refused() == [*names]
    assert refused("Secret/night", "Role/shop") == [*names[1:]]
    assert refused("Secret") == [*names[2:]]
    assert refused("Secret", "Role/shop-role") == []
    checked = check(items, deploy={setting: ["Secret", "Role/shop-role"]})
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
    detail = fault(lambda: checked_objects(app, "production", manifests))[1]
    assert "claimName is a disk of one node" in detail
    assert time.monotonic() - began < 30


def test_of_two_deployments_the_one_that_the_service_selects_is_the_apps() -> None:
    items = objects(f"{WORKER}---{ALL}")
    ignored = check(items, deploy={"ignore": ["Deployment/shop-worker"]})
    assert (ignored.deployment["metadata"]["name"], ignored.companions) == ("web", [])
    sorted_ = check(items)
    assert sorted_.deployment["metadata"]["name"] == "web"
    assert [c["metadata"]["name"] for c in sorted_.companions] == ["shop-worker"]


def test_a_configmap_that_no_pod_of_the_app_uses_stands_beside_it() -> None:
    items = [*objects(), other("ConfigMap", "dashboard", data={"a": "b"})]
    items[-1]["apiVersion"] = "v1"
    checked = check(items)
    assert ([*checked.configmaps], checked.companions) == (["settings"], [items[-1]])
    checked = check(items, deploy={"ignore": ["ConfigMap/dashboard"]})
    assert ([*checked.configmaps], checked.companions) == (["settings"], [])


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


def spread(selector: Object | None, required: Object | None = None) -> Object:
    """The fields of a pod that keep it away from others: spread constraint and anti-affinity."""
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}
    must = {**term, "labelSelector": required} if required else term
    preferred = {"weight": 1, "podAffinityTerm": term}
    return {
        "topologySpreadConstraints": [{**term, "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}],
        "affinity": {
            "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]},
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [must],
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
    own_pods = {"matchLabels": {"app": "shop"}}
    items[0]["spec"]["template"]["spec"] |= spread(selector, selector if own else own_pods)
    release = released(items)
    expected = copy.deepcopy(selector)
    required = copy.deepcopy(selector if own else own_pods) or {}
    if expected and own:
        expected["matchLabels"] = {**expected.get("matchLabels", {}), label: "green"}
    required["matchLabels"] = {
        **required.get("matchLabels", {}),
        "gitops-hook/app": "shop",
        label: "green",
    }
    written = spread(expected, required)
    written["affinity"]["podAffinity"] = spread(selector)["affinity"]["podAffinity"]
    assert {key: pod(release)[key] for key in written} == written
    blue = recoloured(release, app_of(), "blue", 2)
    text = json.dumps(pod(release)).replace(f'"{label}": "green"', f'"{label}": "blue"')
    assert pod(blue) == json.loads(text)
    assert blue.selector[label] == "blue"


OTHERS = [  # selectors of pods that are not, or not only, those that have the term
    {"matchLabels": {"app": "database"}},
    {"matchLabels": {"app": "shop", "gitops-hook/app": "other"}},
    {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["shop"]}]},
    {"matchExpressions": [{"key": "gitops-hook/app", "operator": "NotIn", "values": ["shop"]}]},
    {"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]},
    {"matchLabels": {}, "matchExpressions": []},
    {},
    None,
]


@pytest.mark.parametrize("selector", OTHERS)
def test_a_required_anti_affinity_against_pods_of_others_is_refused(selector: Any) -> None:
    term = {"topologyKey": "kubernetes.io/os", "labelSelector": selector}
    both = [{**term, "labelSelector": {"matchLabels": {"app": "shop"}}}, term]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": both}
    reason, said = fault(lambda: released(changed(f"{POD}.affinity.podAntiAffinity", required)))
    assert reason is Reason.MANIFEST_REFUSED
    assert said == (
        "Deployment web: a required podAntiAffinity may only keep these pods apart from each "
        "other. Use preferredDuringSchedulingIgnoredDuringExecution."
    )
    preferred = [{"weight": 1, "podAffinityTerm": term}]
    pods = {"preferredDuringSchedulingIgnoredDuringExecution": preferred}
    kept = pod(released(changed(f"{POD}.affinity.podAntiAffinity", pods)))["affinity"]
    assert kept == {"podAntiAffinity": pods}


@pytest.mark.parametrize("field", ["matchLabelKeys", "mismatchLabelKeys"])
def test_keys_of_labels_do_not_let_a_required_anti_affinity_reach_pods_of_others(
    field: str,
) -> None:
    selector = {"matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]}
    term = {"topologyKey": "kubernetes.io/os", "labelSelector": selector, field: ["app"]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    rendered = pod(released(changed(f"{POD}.affinity.podAntiAffinity", required)))["affinity"]
    (one,) = rendered["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    own = {"matchLabels": {"gitops-hook/app": "shop", "version": "green"}}
    assert one == {**term, "labelSelector": {**selector, **own}}
    del term["labelSelector"]
    assert fault(lambda: released(changed(f"{POD}.affinity.podAntiAffinity", required)))


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


def test_pods_say_who_manages_them_as_the_app_does_so_that_its_selectors_reach_them() -> None:
    labels = {"env": "prod", "app.kubernetes.io/managed-by": "kustomize"}
    items = changed(f"{TEMPLATE}.labels", labels)
    selector = {"matchLabels": labels}
    items.append(other("PodDisruptionBudget", spec={"minAvailable": 1, "selector": selector}))
    items[0]["spec"]["template"]["spec"] |= spread(selector)
    release = released(items)
    template = release.deployment["spec"]["template"]
    (budget,) = release.companions_for("shop")
    selected = budget["spec"]["selector"]["matchLabels"]
    assert selected == {**labels, "gitops-hook/app": "shop", "version": "green"}
    assert selected.items() <= template["metadata"]["labels"].items()
    (constraint,) = template["spec"]["topologySpreadConstraints"]
    assert constraint["labelSelector"]["matchLabels"] == {**labels, "version": "green"}


def test_what_is_rendered_is_valid_by_the_schema() -> None:
    release = released(changed(f"{WEB}.envFrom", [{"configMapRef": {"name": "settings"}}]))
    rendered = (
        release.deployment,
        *release.configmaps,
        release.configmap("shop"),
        release.service,
    )
    for thing in rendered:
        require_valid(thing)


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
    [(2, 0, 2), (2, 5, 2), (6, 5, 6), (1000, 5, 1000), (None, 0, 1), (None, 3, 3)],
)
def test_a_version_is_as_large_as_committed_else_as_the_live_one(
    written: int | None, live: int, replicas: int
) -> None:
    items = changed("Deployment.spec.replicas", written)
    if written is None:
        del items[0]["spec"]["replicas"]
    release = released(items, live=live)
    assert (release.wanted, release.deployment["spec"]["replicas"]) == (replicas, replicas)


@pytest.mark.parametrize("replicas", [0, -1])
def test_a_version_without_pods_is_refused_since_nothing_would_serve(replicas: int) -> None:
    reason, detail = fault(lambda: released(changed("Deployment.spec.replicas", replicas), live=3))
    said = f"spec.replicas is {replicas}, so nothing would serve. Set it to 1 or more."
    assert (reason, detail) == (Reason.MANIFEST_REFUSED, said)


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


@pytest.mark.parametrize("built", ["demo/shop", "docker.io/demo/shop", "index.docker.io/demo/shop"])
def test_an_image_of_docker_hub_is_the_built_one_however_it_is_written(built: str) -> None:
    inits = [{"name": "a", "image": "docker.io/demo/shop:1"}, {"name": "b", "image": "demo/shop"}]
    items = changed(f"{POD}.initContainers", inits)
    items += objects(WORKER.replace("busybox", "index.docker.io/demo/shop"))
    items += objects(NIGHTLY.replace("busybox", "docker.io/demo/tool"))
    app: Object = {"build": {"image": built}}
    release = released(items, **app)
    assert [c["image"] for c in pod(release)["initContainers"]] == [BUILT, BUILT]
    assert release.workers[0]["spec"]["template"]["spec"]["containers"][0]["image"] == BUILT
    (line,) = remarks(items, **app)
    assert line.startswith("CronJob nightly, container job: image docker.io/demo/tool is not named")


def remarks(items: list[Object], **app: Any) -> list[str]:
    """What `plan` says of the images of a commit."""
    return [*image_remarks(app_of(**app), check(items, **app))]


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


NIGHTLY = """
apiVersion: batch/v1
kind: CronJob
metadata: {name: nightly}
spec:
  schedule: "0 3 * * *"
  jobTemplate:
    spec: {template: {spec: {restartPolicy: Never, containers: [{name: job, image: busybox}]}}}
"""


def test_what_has_the_image_of_the_only_container_gets_the_built_one_with_it() -> None:
    items = changed(f"{WEB}.image", "team/web:1")
    inits = [{"name": "migrate", "image": "team/web:1"}, {"name": "wait", "image": "busybox"}]
    items[0]["spec"]["template"]["spec"]["initContainers"] = inits
    items += objects(WORKER.replace("busybox", "team/web:2"))
    items += objects(NIGHTLY.replace("busybox", "team/web"))
    release = released(items)
    images = [c["image"] for c in pod(release)["initContainers"]]
    assert images == [BUILT, "busybox"]
    text = json.dumps(release.companions)
    assert (text.count(BUILT), text.count("team/web")) == (2, 0)
    assert remarks(items) == [
        f"{name}: image {image} is replaced by the built image"
        for name, image in (
            ("container web", "team/web:1"),
            ("container migrate", "team/web:1"),
            ("Deployment shop-worker, container worker", "team/web:2"),
            ("CronJob nightly, container job", "team/web"),
        )
    ]


def test_plan_names_the_images_of_what_stands_beside_the_app_too() -> None:
    worker = WORKER.replace("busybox", "registry.example.com:5000/demo/worker:latest")
    (line,) = remarks(objects(f"{ALL}---{worker}---{NIGHTLY}"))
    assert line == (
        "Deployment shop-worker, container worker: image registry.example.com:5000/demo/"
        "worker:latest is not named by digest, so it may change without a push"
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
    rendered = pod(released(items, deploy={"health": {"path": "/up"}}))
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
    require_valid(released(items).service)


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
        (
            [{"name": "http", "port": 8080}, {"name": "admin", "port": 80}],
            [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30001}],
            [{"name": "http", "port": 8080, "nodePort": 30001}, {"name": "admin", "port": 80}],
        ),
        (
            [{"name": "web", "port": 80}],
            [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30001}],
            [{"name": "web", "port": 80, "nodePort": 30001}],
        ),
        (
            [{"name": "http", "port": 80}, {"name": "admin", "port": 81, "nodePort": 30001}],
            [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30001}],
            [{"name": "http", "port": 80}, {"name": "admin", "port": 81, "nodePort": 30001}],
        ),
    ],
    ids=[
        *("kept", "chosen", "cluster-ip", "none", "protocol", "new-port"),
        *("other-number", "other-name", "given-away"),
    ],
)
def test_node_ports_stay_those_of_the_live_service(
    ports: list[Object], live: list[Object], expected: list[Object]
) -> None:
    assert ports_like(ports, live) == expected


def test_a_service_that_is_to_be_reached_from_outside_gets_the_node_ports_that_are_committed() -> (
    None
):
    ports = [{"port": 80, "nodePort": 30002}, {"port": 81}]
    assert ports_like(ports, [{"port": 80}], external=True) == ports


def test_a_node_port_needs_a_type_that_has_one() -> None:
    ports = [{"port": 80, "nodePort": 30002}]
    reason, detail = fault(lambda: released(changed("Service.spec.ports", ports)))
    said = "Service shop has a nodePort, but the type ClusterIP. Set the type to NodePort or"
    assert (reason, detail.startswith(said)) == (Reason.MANIFEST_REFUSED, True)


def test_labels_and_annotations_of_a_service_that_leave_no_room_for_its_history_are_refused() -> (
    None
):
    released(changed("Service.metadata.annotations", {"text": "x" * 30_000}))
    large = changed("Service.metadata.annotations", {"text": "x" * 33_000})
    said = "Service shop: labels and annotations have more than 32 KiB. Shorten them."
    assert fault(lambda: released(large)) == (Reason.MANIFEST_REFUSED, said)


def with_node_ports(*numbers: int) -> Release:
    """A release whose Service has these node ports."""
    ports = [{"name": f"p{n}", "port": n, "nodePort": n} for n in numbers]
    return released(changed("Service.spec", {"type": "NodePort", "ports": ports}))


def test_a_node_port_that_two_environments_name_is_refused_once_for_each() -> None:
    releases = {
        "staging": with_node_ports(30001, 30002),
        "qa": released(),
        "production": with_node_ports(30002, 30003, 30001),
    }
    assert [text.partition(". ")[0] for text in shared_node_ports(releases)] == [
        "nodePort 30002 is that of staging and of production",
        "nodePort 30001 is that of staging and of production",
    ]
    assert not [*shared_node_ports({"staging": with_node_ports(30001), "qa": released()})]


def test_the_live_service_may_have_another_name_than_the_app() -> None:
    items = changed("Service.metadata.name", "web")
    service = released(items, deploy={"service": "web"}).service
    assert (service["metadata"]["name"], service["metadata"]["labels"]["gitops-hook/app"]) == (
        *("web", "shop"),
    )
    assert "no Service named 'web' (there are: shop)" in str(
        refusal(lambda: released(deploy={"service": "web"}))
    )


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
        ("<" * 600_000, "ConfigMap settings has 1200"),
        ("<" * 500_000, ""),
        (os.urandom(2**19).hex(), ""),
        ("\u20ac" * 349_525, ""),
        ("x" * 2**20, ""),
    ],
    ids=[
        "noise",
        "one-letter",
        "escaped",
        "angles",
        "fewer-angles",
        "half-noise",
        "three-byte-letters",
        "one-mebibyte",
    ],
)
def test_what_fits_into_no_configmap_is_refused_before_anything_changes(
    content: str, said: str
) -> None:
    items = changed("ConfigMap.data.GREETING", content)
    refused = refusal(lambda: released(items))
    assert refused is None if not said else said in (refused or "")


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("a <b> && c\u2028\u2029", 0),
        ("\x01\x7f\t\n\r/ \u00e9 \U0001f600", 0),
        ('"\\ \\\\b \\f \\\\\\" \\u003c', 0),
        ("\b\f \\\b", 12),  # of which newer ones write two bytes each
    ],
)
def test_json_is_measured_as_kubectl_writes_it(tmp_path: Path, text: str, more: int) -> None:
    data = {"key": text, "other": "x"}
    written = {**other("ConfigMap", "x"), "data": data}
    (tmp_path / "app.json").write_text(json.dumps(written))
    argv = [
        str(find_kubectl()),
        "label",
        "--local",
        "-f",
        str(tmp_path),
        "x-",
        "-o",
        "jsonpath={.data}",
    ]
    printed = subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout
    assert json.loads(printed) == data
    assert json_bytes(data) in (len(printed), len(printed) + more)


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
