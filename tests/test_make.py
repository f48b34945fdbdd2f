"""What the Makefile does: for who installs, and when the daemon it installs does not start."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import gitops_hook
from tests.installing import IMAGE, ROOT, Installed, Object, make, rendered
from tests.standin.api import Api
from tests.standin.cluster import Cluster
from tests.standin.kubectl import find_kubectl
from tests.standin.store import Store

BIN = Path(sys.executable).parent
PLACEHOLDER = "gitops-hook:dev"
OURS = {"orchestration", "test", "build", "staging", "production"}


# === With a kubectl that only writes down ===


@pytest.fixture
def fake_kubectl(tmp_path: Path) -> Path:
    """A kubectl that renders for real, and otherwise only writes down what it was told."""
    script = tmp_path / "kubectl"
    script.write_text(
        f"""#!/bin/bash
[[ $1 == kustomize ]] && exec {find_kubectl()} "$@"
[[ $1 == config && -e {tmp_path}/context ]] && exec cat {tmp_path}/context
[[ $1 == config ]] && exit 1
[[ $1 == get && $2 == namespaces ]] && exec cat {tmp_path}/namespaces
[[ $1 == api-resources || "$*" == *custom-columns* ]] && exit
number=$(ls {tmp_path}/call-* 2>/dev/null | wc -l)
printf "%s\\n" "$*" > {tmp_path}/call-$number
[[ " $* " == *" -f - "* ]] && cat > {tmp_path}/stdin-$number
[[ "$*" == *" logs "* ]] && echo "last words"
[[ "$*" != *rollout* || -e {tmp_path}/well ]] || exit 1
[[ "$*" != *"get secret"* || -e {tmp_path}/secret ]]
""",
        "utf-8",
    )
    script.chmod(0o755)
    (tmp_path / "context").write_text("somewhere\n", "utf-8")
    (tmp_path / "namespaces").touch()
    for state in ("secret", "well"):
        (tmp_path / state).touch()
    return script


def calls(fake: Path) -> list[str]:
    return [path.read_text("utf-8").strip() for path in sorted(fake.parent.glob("call-*"))]


def sent(fake: Path, number: int) -> Installed:
    text = (fake.parent / f"stdin-{number}").read_text("utf-8")
    return Installed(list(yaml.safe_load_all(text)))


def overlaid(directory: Path, config: str) -> str:
    """An overlay like the example's, with another config.yaml."""
    shutil.copytree(ROOT / "manifests", directory)
    (directory / "example" / "config.yaml").write_text(config, "utf-8")
    return str(directory / "example")


@pytest.mark.parametrize("overlay", ["manifests/", "manifests/example"])
def test_make_apply_sets_the_image_in_both_places_and_waits(
    fake_kubectl: Path, overlay: str
) -> None:
    done = make("apply", KUBECTL=str(fake_kubectl), IMAGE=IMAGE, OVERLAY=overlay)
    assert done.returncode == 0, done.stderr
    applied, *rest = calls(fake_kubectl)
    assert applied == "apply -f -"
    assert rest[-1] == "-n orchestration rollout status deployment/gitops-hook --timeout=5s"
    objects = sent(fake_kubectl, 0)
    assert objects.container["image"] == IMAGE
    config = objects.one("ConfigMap", "gitops-hook", "orchestration")["data"]["config.yaml"]
    assert yaml.safe_load(config)["images"]["hook"] == IMAGE
    assert len(objects.objects) == len(rendered(ROOT / overlay))
    assert PLACEHOLDER not in yaml.safe_dump_all(objects.objects)


def test_make_apply_again_changes_nothing_and_another_configuration_restarts(
    fake_kubectl: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "manifests"
    shutil.copytree(ROOT / "manifests", overlay)
    for _ in range(2):
        assert (
            make("apply", KUBECTL=str(fake_kubectl), IMAGE=IMAGE, OVERLAY=str(overlay)).returncode
            == 0
        )
    config = overlay / "base" / "configmap.yaml"
    config.write_text(config.read_text("utf-8") + "    catch_up: 10m\n", "utf-8")
    assert (
        make("apply", KUBECTL=str(fake_kubectl), IMAGE=IMAGE, OVERLAY=str(overlay)).returncode == 0
    )
    first, second, third = (sent(fake_kubectl, number) for number in (0, 3, 6))
    assert first.objects == second.objects
    notes = [o.daemon["spec"]["template"]["metadata"]["annotations"] for o in (first, third)]
    assert notes[0]["gitops-hook/applied"] != notes[1]["gitops-hook/applied"]
    assert all(re.fullmatch("[0-9a-f]{16}", note["gitops-hook/applied"]) for note in notes)


def test_make_apply_says_which_secret_is_missing_instead_of_waiting(fake_kubectl: Path) -> None:
    (fake_kubectl.parent / "secret").unlink()
    done = make("apply", KUBECTL=str(fake_kubectl), IMAGE=IMAGE)
    assert done.returncode != 0
    assert "secrets.example" in done.stderr
    assert not [call for call in calls(fake_kubectl) if "rollout" in call]


@pytest.mark.parametrize(
    ("images", "fine"),
    [("", False), ("images: {kaniko: k:1}", False), ("images: {kaniko: k:1, hook: own:1}", True)],
)
def test_make_apply_refuses_a_configuration_whose_jobs_would_have_no_image(
    fake_kubectl: Path, tmp_path: Path, images: str, *, fine: bool
) -> None:
    overlay = overlaid(tmp_path / "manifests", f"apps: []\n{images}\n")
    done = make("apply", KUBECTL=str(fake_kubectl), IMAGE=IMAGE, OVERLAY=overlay)
    assert (done.returncode == 0) is fine
    assert ("images.hook" in done.stderr) is not fine
    assert bool(calls(fake_kubectl)) is fine


BROKEN = """
apps: [{name: shop, repository: https://bot:hunter2-hunter2@git.example.com/a.git}]
catch_up: 5
images: {hook: gitops-hook:dev}
"""


def test_make_apply_applies_nothing_of_a_broken_configuration(
    fake_kubectl: Path, tmp_path: Path
) -> None:
    overlay = overlaid(tmp_path / "manifests", BROKEN)
    done = make("apply", KUBECTL=str(fake_kubectl), IMAGE=IMAGE, OVERLAY=overlay, BIN=str(BIN))
    assert done.returncode == 2
    *faults, end, _ = done.stderr.splitlines()
    assert [fault.partition(":")[0] for fault in faults] == [
        "apps[0].repository",
        "catch_up",
        "apps[0].build.image",
    ]
    assert "hunter2" not in done.stderr
    assert end == "make apply: the configuration is not valid; nothing was applied"
    assert not calls(fake_kubectl)


def test_make_apply_needs_nothing_but_kubectl(fake_kubectl: Path, tmp_path: Path) -> None:
    done = make("apply", KUBECTL=str(fake_kubectl), IMAGE=IMAGE, BIN=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert "make apply: the configuration is not checked" in done.stdout
    assert calls(fake_kubectl)[0] == "apply -f -"


def test_make_apply_shows_the_last_words_of_a_daemon_that_is_not_ready(fake_kubectl: Path) -> None:
    (fake_kubectl.parent / "well").unlink()
    done = make("apply", KUBECTL=str(fake_kubectl), IMAGE=IMAGE)
    assert done.returncode == 2
    assert calls(fake_kubectl)[-1] == "-n orchestration logs deployment/gitops-hook --tail=20"
    *_, words, said, _ = done.stderr.splitlines()
    assert words == "last words"
    assert said.startswith("make apply: everything is applied but the daemon is not ready; above")


@pytest.mark.parametrize("target", ["apply", "delete"])
def test_make_says_first_which_cluster_it_changes(fake_kubectl: Path, target: str) -> None:
    def said(**variables: str) -> str:
        return make(target, KUBECTL=str(fake_kubectl), IMAGE=IMAGE, **variables).stdout

    assert said().startswith(f"make {target}: kubectl context: somewhere\n")
    (fake_kubectl.parent / "context").unlink()
    assert said().startswith(f"make {target}: kubectl context: none\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
        assert said().startswith(f"make {target}: kubectl context: none (in-cluster)\n")


@pytest.mark.parametrize("target", ["apply", "delete"])
def test_make_says_in_one_sentence_that_an_overlay_is_none(fake_kubectl: Path, target: str) -> None:
    done = make(target, KUBECTL=str(fake_kubectl), IMAGE=IMAGE, OVERLAY="/no/where")
    assert done.returncode == 2
    said, _ = done.stderr.splitlines()
    beginning = "is no folder with a kustomization that works: must build at directory"
    assert said.startswith(f"make {target}: OVERLAY=/no/where {beginning}")
    assert not calls(fake_kubectl)


@pytest.mark.parametrize("image", ["registry.example.com:5000/a/b", "gitops-hook"])
def test_make_apply_says_that_an_image_has_no_tag(fake_kubectl: Path, image: str) -> None:
    done = make("apply", KUBECTL=str(fake_kubectl), IMAGE=image)
    version = f"{image}:{gitops_hook.__version__}"
    assert f"make apply: IMAGE={image} has no tag; add the version: {version}\n" in done.stderr


@pytest.mark.parametrize("image", ["", "gitops-hook", "a b:1", "x:1'; echo no; '", "x:1#g;s/a/b/"])
def test_make_apply_refuses_what_is_no_image_with_a_version(fake_kubectl: Path, image: str) -> None:
    done = make("apply", KUBECTL=str(fake_kubectl), IMAGE=image)
    assert done.returncode != 0
    assert not calls(fake_kubectl)


def test_make_delete_leaves_the_applications_namespaces(fake_kubectl: Path) -> None:
    there = "".join(f"{name} gitops-hook Active\n" for name in sorted(OURS))
    (fake_kubectl.parent / "namespaces").write_text(there, "utf-8")
    done = make("delete", KUBECTL=str(fake_kubectl), YES="1")
    assert done.returncode == 0, done.stderr
    (call,) = calls(fake_kubectl)
    assert "--selector gitops-hook/uninstall!=keep" in call
    goes = re.findall("^namespace (.*) goes", done.stdout, re.MULTILINE)
    assert goes == ["build", "orchestration", "test"]
    kept = [
        (thing["kind"], thing["metadata"]["name"])
        for thing in sent(fake_kubectl, 0).objects
        if thing["metadata"].get("labels", {}).get("gitops-hook/uninstall") == "keep"
    ]
    assert sorted(kept) == [("Namespace", "production"), ("Namespace", "staging")]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The kubectl command for an empty stand-in cluster, without controllers."""
    api = Api(Store()).start()
    try:
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")
        yield f"{find_kubectl()} --kubeconfig {kubeconfig} --cache-dir {tmp_path / 'cache'}"
    finally:
        api.stop()


def test_installing_twice_changes_nothing_and_uninstalling_keeps_the_applications(
    cluster: str,
) -> None:
    first = make("apply", KUBECTL=cluster, IMAGE=IMAGE)
    assert len(re.findall(" created$", first.stdout, re.MULTILINE)) == len(
        rendered(ROOT / "manifests")
    )
    assert "secrets.example" in first.stderr
    second = make("apply", KUBECTL=cluster, IMAGE=IMAGE)
    context, *applied = second.stdout.splitlines()
    assert context == "make apply: kubectl context: standin"
    assert {line.split()[-1] for line in applied} == {"unchanged"}
    ours = ["get", "roles,rolebindings,services", "-A", "-o", "name"]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "shop", "namespace": "production"},
        "spec": {"selector": {"app": "shop"}, "ports": [{"port": 80}]},
    }
    create = [*cluster.split(), "create", "-f", "-"]
    subprocess.run(create, input=yaml.safe_dump(service).encode(), check=True, capture_output=True)
    assert make("delete", KUBECTL=cluster, YES="1").returncode == 0
    left, names = (
        subprocess.run([*cluster.split(), *what], check=True, capture_output=True, text=True).stdout
        for what in (ours, ["get", "namespaces", "-o", "name"])
    )
    assert left.split() == ["service/shop"]
    kept = ("default", "kube-system", "production", "staging")
    assert {*names.split()} == {f"namespace/{n}" for n in kept}


@pytest.mark.parametrize(("target", "tool"), [("image", "docker"), ("kind", "kind")])
def test_make_says_which_tool_is_missing(tmp_path: Path, target: str, tool: str) -> None:
    for name in ("bash", "git", "awk"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    program = shutil.which("make")
    done = subprocess.run(
        [str(program), target, "SHELL=/bin/bash", "KUBECTL=kubectl"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "missing" in done.stderr
    assert tool in done.stderr


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python-of-old"
    old.write_text('#!/bin/bash\n[[ $1 == -V ]] && echo "Python 3.9.2"\nexit 1\n', "utf-8")
    old.chmod(0o755)
    done = make("--always-make", "venv", PYTHON=str(old), VENV=str(tmp_path / "venv"))
    assert done.returncode != 0
    assert "Python 3.9.2" in done.stderr
    assert "3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


# === A daemon that does not start ===

READY = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("", 8081), Handler).serve_forever()
"""
CRASH = "print('listen: address in use', flush=True); raise SystemExit(3)"


class Site:
    """A whole cluster, with the Secret that the daemon needs, and make as its administrator."""

    def __init__(self, directory: Path, cluster: Cluster) -> None:
        self.cluster = cluster
        config = cluster.kubeconfig()
        self.program = f"{find_kubectl()} --kubeconfig {config} --cache-dir {directory / 'cache'}"
        meta = {"name": "orchestration", "labels": {"app.kubernetes.io/part-of": "gitops-hook"}}
        cluster.load({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        self.load("Secret", "gitops-hook-secrets")

    def load(self, kind: str, name: str, **more: Any) -> None:
        """Put an object beside the daemon."""
        meta = {"name": name, "namespace": "orchestration"}
        self.cluster.load({"apiVersion": "v1", "kind": kind, "metadata": meta, **more})

    def apply(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `make apply`, looking at the daemon each second if nothing else is said."""
        chosen = {"KUBECTL": self.program, "IMAGE": IMAGE, "LOOK": "1", **variables}
        return make("apply", **chosen)

    def failed(self, **variables: str) -> list[str]:
        """Run `make apply`, which must fail after all was applied; return what it says."""
        done = self.apply(**variables)
        assert "deployment.apps/gitops-hook " in done.stdout
        *said, end = done.stderr.splitlines()
        # of kubectl, because the namespace was not made by `kubectl apply`
        said = [line for line in said if not line.startswith("Warning: resource namespaces/")]
        assert re.fullmatch(r"make: \*\*\* \[.*apply\] Error 1", end)
        return said


NOT_STARTED = "everything is applied but the daemon does not start; above is what the cluster says"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Cluster(tmp_path / "cluster") as cluster:
        yield Site(tmp_path, cluster)


def patched(directory: Path, patch: Object) -> str:
    """Return an overlay of the base that patches the daemon's pod."""
    shutil.copytree(ROOT / "manifests", directory)
    meta = {"name": "gitops-hook", "namespace": "orchestration"}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta}
    change = {**deployment, "spec": {"template": {"spec": patch}}}
    kustomization = {"resources": ["../base"], "patches": [{"path": "change.yaml"}]}
    (directory / "own").mkdir()
    (directory / "own" / "change.yaml").write_text(yaml.safe_dump(change), "utf-8")
    (directory / "own" / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), "utf-8")
    return str(directory / "own")


def test_within_20_seconds_it_is_said_that_the_image_cannot_be_pulled(site: Site) -> None:
    began = time.monotonic()
    *words, said = site.failed(LOOK="5")
    assert time.monotonic() - began < 20
    assert said == f"make apply: {NOT_STARTED}"
    status, event = words
    assert re.match(
        r"  pod gitops-hook-\S+: container gitops-hook: (ErrImagePull|Image\w+): ", status
    )
    assert f': Failed: Failed to pull image "{IMAGE}": ' in event
    assert event.endswith(": not found")


def test_the_pod_of_an_earlier_try_is_not_told_as_the_one_that_was_applied(site: Site) -> None:
    assert site.failed()
    own = IMAGE.replace("1.2.3", "1.2.4")
    site.cluster.images.add(own, entrypoint=["python", "-c", READY])
    done = site.apply(IMAGE=own)
    assert done.returncode == 0, done.stderr
    assert "does not start" not in done.stderr
    assert "successfully rolled out" in done.stdout


def test_a_missing_secret_is_told_in_the_words_of_the_cluster(site: Site) -> None:
    site.cluster.store.delete("secrets", "orchestration", "gitops-hook-secrets")
    words, said = site.failed()
    assert words == 'Error from server (NotFound): secrets "gitops-hook-secrets" not found'
    assert said.startswith("make apply: everything is applied; the daemon waits for its Secret")


def test_a_missing_volume_of_an_overlay_is_told_in_the_words_of_the_cluster(
    site: Site, tmp_path: Path
) -> None:
    volume = {"name": "more", "secret": {"secretName": "of-the-overlay"}}
    mount = {"name": "more", "mountPath": "/more"}
    container = {"name": "gitops-hook", "volumeMounts": [mount]}
    overlay = patched(tmp_path / "m", {"volumes": [volume], "containers": [container]})
    *words, said = site.failed(OVERLAY=overlay)
    assert said == f"make apply: {NOT_STARTED}"
    (line,) = words
    assert line.endswith(
        ': FailedMount: MountVolume.SetUp failed for volume "more" : '
        'secret "of-the-overlay" not found'
    )


def test_a_pod_that_no_node_takes_is_told_in_the_words_of_the_cluster(
    site: Site, tmp_path: Path
) -> None:
    overlay = patched(tmp_path / "m", {"nodeSelector": {"pool": "tools"}})
    *words, said = site.failed(OVERLAY=overlay)
    assert said == f"make apply: {NOT_STARTED}"
    assert ": Unschedulable: 0/1 nodes are available: 1 node(s) didn't match" in words[0]


def test_a_pod_that_may_not_be_made_is_told_in_the_words_of_the_cluster(site: Site) -> None:
    site.load("ResourceQuota", "none", spec={"hard": {"pods": "0"}})
    words, said = site.failed()
    assert said == f"make apply: {NOT_STARTED}"
    assert words.startswith("  deployment gitops-hook: pods ")
    assert "is forbidden: exceeded quota: none, requested: pods=1, used: pods=0" in words


def test_a_daemon_that_ends_at_once_is_told_with_its_last_words(site: Site) -> None:
    site.cluster.images.add(IMAGE, entrypoint=["python", "-c", CRASH])
    *words, said = site.failed()
    assert said == f"make apply: {NOT_STARTED}"
    assert "listen: address in use" in words
    assert [line for line in words if "container gitops-hook" in line]
