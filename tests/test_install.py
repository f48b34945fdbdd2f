"""`make apply` and `make delete` on a cluster where others live, too: theirs stays theirs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.installing import EXAMPLE, IMAGE, ROOT, Installed, make, rendered
from tests.standin.api import Api
from tests.standin.kubectl import find_kubectl
from tests.standin.store import Store
from tests.world import Object, World, daemon_config, world

LABEL = "app.kubernetes.io/part-of"
OURS = f"{LABEL}=gitops-hook"
NAMES = {"test": "ci", "build": "images", "staging": "stage", "production": "live"}
OLD = ROOT / "tests" / "data" / "upgrade" / "manifests.yaml"


class Desk:
    """An API server without controllers, and make and kubectl as someone who may use it."""

    def __init__(self, directory: Path, api: Api) -> None:
        self.directory, self.api, self.store = directory, api, api.store
        self.as_user(None)

    def as_user(self, account: str | None) -> None:
        """Go on as a service account, or as the administrator."""
        config = self.api.kubeconfig(self.directory / "kubeconfig", account)
        cache = self.directory / "cache"
        self.program = f"{find_kubectl()} --kubeconfig {config} --cache-dir {cache}"

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run make with this cluster; nobody sits at a terminal."""
        return make(*arguments, KUBECTL=self.program, IMAGE=IMAGE, **variables)

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl; return what it prints."""
        argv = [*self.program.split(), *arguments]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    def namespace(self, name: str, **labels: str) -> None:
        """Make a namespace as someone else would, with something in it."""
        enforced = {"pod-security.kubernetes.io/enforce": "privileged"}
        meta = {"name": name, "labels": {**enforced, **labels}}
        self.store.create("namespaces", {"metadata": meta})
        self.kubectl("-n", name, "create", "configmap", "theirs", "--from-literal=a=b")

    def names(self) -> set[str]:
        """Return the namespaces, without those that each cluster has."""
        found = {n["metadata"]["name"] for n in self.store.list("namespaces")}
        return found - {"default", "kube-system"}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Api(Store()) as api:
        yield Desk(tmp_path, api)


def overlay(directory: Path, **names: str) -> Path:
    """Return a copy of the manifests' example with other names of namespaces."""
    shutil.copytree(ROOT / "manifests", directory)
    path = directory / "example" / "namespaces.yaml"
    document = yaml.safe_load(path.read_text("utf-8"))
    document["data"].update(names)
    path.write_text(yaml.safe_dump(document), "utf-8")
    return directory / "example"


# === What make apply takes over ===


@pytest.mark.parametrize("name", ["orchestration", "test", "build", "staging", "production"])
def test_a_namespace_of_others_is_refused_before_anything_is_applied(desk: Desk, name: str) -> None:
    desk.namespace(name)
    version = desk.store.version
    done = desk.make("apply")
    assert desk.store.version == version, done
    assert done.returncode == 2
    said, end, _ = done.stderr.splitlines()
    assert said.startswith(f"make apply: namespace {name} exists and was not made by make apply")
    choose = "fixed in the program" if name == "orchestration" else "Choose another name in namespa"
    assert choose in said
    assert f"kubectl label namespace {name} {OURS}" in said
    assert end == "make apply: nothing was applied"


def test_every_namespace_of_others_is_named_at_once(desk: Desk) -> None:
    for name in ("test", "staging"):
        desk.namespace(name)
    done = desk.make("apply")
    assert done.stderr.count(" exists and was not made by make apply") == 2


@pytest.mark.parametrize("value", ["something-else", "gitops", "gitops-hook-2"])
def test_a_namespace_that_is_part_of_something_else_is_not_ours(desk: Desk, value: str) -> None:
    desk.namespace("test", **{LABEL: value})
    assert desk.make("apply").returncode == 2
    assert desk.names() == {"test"}


def test_a_namespace_that_was_handed_over_is_used(desk: Desk) -> None:
    desk.namespace("test")
    desk.kubectl("label", "namespace", "test", OURS)
    assert "everything is applied" in desk.make("apply").stderr
    labels = desk.store.get("namespaces", None, "test")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert desk.store.get("configmaps", "test", "theirs")


def test_what_0_1_0_installed_is_ours(desk: Desk) -> None:
    (desk.directory / "old.yaml").write_text(OLD.read_text("utf-8"), "utf-8")
    desk.kubectl("apply", "-f", str(desk.directory / "old.yaml"))
    done = desk.make("apply")
    assert "everything is applied" in done.stderr
    assert "nothing was applied" not in done.stderr


def test_a_namespace_that_is_going_is_waited_for_by_the_person(desk: Desk) -> None:
    desk.namespace("test", **{LABEL: "gitops-hook"})

    def going(found: Object) -> None:
        found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        found["status"]["phase"] = "Terminating"

    desk.store.update_status("namespaces", None, "test", going)
    done = desk.make("apply")
    assert done.returncode == 2
    assert "namespace test is still being deleted; try again when it is gone" in done.stderr


@pytest.mark.parametrize("target", ["apply", "delete"])
def test_who_may_not_read_namespaces_is_told_so_and_nothing_is_changed(
    desk: Desk, target: str
) -> None:
    desk.namespace("test")
    version = desk.store.version
    desk.as_user("default/default")
    done = desk.make(target, YES="1")
    assert done.returncode == 2
    *why, said, _ = done.stderr.splitlines()
    assert why
    assert all('namespaces "' in line and "is forbidden" in line for line in why)
    end = "the namespaces cannot be looked at (kubectl says why above); nothing was changed"
    assert said == f"make {target}: {end}"
    assert desk.store.version == version


@pytest.mark.parametrize("target", ["apply", "delete"])
def test_without_a_cluster_that_is_said_in_the_same_words(desk: Desk, target: str) -> None:
    desk.api.down()
    done = desk.make(target, YES="1")
    assert done.returncode == 2
    assert "refused" in done.stderr
    assert f"make {target}: the namespaces cannot be looked at (kubectl says" in done.stderr


# === Other names ===


def places(installed: Installed) -> dict[str, set[str]]:
    """Return every namespace that is named in a rendering, by where it is."""
    found: dict[str, set[str]] = {}
    for thing in installed.objects:
        kind, meta = thing["kind"], thing["metadata"]
        found.setdefault("made" if kind == "Namespace" else kind, set()).add(
            meta["name"] if kind == "Namespace" else meta["namespace"]
        )
        for subject in thing.get("subjects", []):
            found.setdefault("subjects", set()).add(subject["namespace"])
    policy = installed.one("NetworkPolicy", "orchestration-namespace-isolation")
    smoke = policy["spec"]["egress"][-1]["to"][0]["namespaceSelector"]["matchExpressions"][0]
    config = installed.one("ConfigMap", "gitops-hook")["data"]["config.yaml"]
    found["smoke tests"] = {*smoke["values"]}
    found["configuration"] = {*yaml.safe_load(config)["namespaces"].values()}
    return found


def test_other_names_are_one_place_that_all_else_follows(tmp_path: Path) -> None:
    usual = Installed(rendered(EXAMPLE))
    other = Installed(rendered(overlay(tmp_path / "m", **NAMES)))
    expected = {
        where: {NAMES.get(name, name) for name in names} for where, names in places(usual).items()
    }
    assert places(other) == expected
    assert expected["configuration"] == {*NAMES.values()}
    assert expected["subjects"] == {"orchestration"}
    kinds = ("Role", "RoleBinding", "NetworkPolicy", "ResourceQuota", "LimitRange")
    assert all(expected[kind] & {*NAMES.values()} for kind in kinds)
    assert len(other.objects) == len(usual.objects)


def test_what_only_carries_the_names_is_not_applied() -> None:
    assert "namespaces" not in {o["metadata"]["name"] for o in rendered(EXAMPLE)}


@pytest.mark.parametrize("names", [{"test": "build"}, {"staging": "live", "production": "live"}])
def test_two_namespaces_of_one_name_are_refused(
    desk: Desk, tmp_path: Path, names: dict[str, str]
) -> None:
    done = desk.make("apply", OVERLAY=str(overlay(tmp_path / "m", **names)))
    assert done.returncode == 2
    assert "already registered id: Namespace" in done.stderr.splitlines()[0]
    assert not desk.names()


def test_a_namespace_of_an_overlay_that_would_not_be_ours_is_refused(
    desk: Desk, tmp_path: Path
) -> None:
    folder = overlay(tmp_path / "m")
    bare = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "more"}}
    (folder / "persistentvolumeclaims.yaml").write_text(yaml.safe_dump(bare), "utf-8")
    done = desk.make("apply", OVERLAY=str(folder))
    assert done.returncode == 2
    assert f"namespace more of the overlay lacks the label {OURS}" in done.stderr
    assert not desk.names()


def test_beside_a_namespace_of_others_another_name_installs_and_uninstalls(
    desk: Desk, tmp_path: Path
) -> None:
    desk.namespace("test")
    theirs = desk.store.list("configmaps", "test")
    chosen = {"KUBECTL": desk.program, "OVERLAY": str(overlay(tmp_path / "m", test="ci"))}
    assert "everything is applied" in make("apply", IMAGE=IMAGE, **chosen).stderr
    assert desk.names() == {"orchestration", "test", "ci", "build", "staging", "production"}
    assert make("delete", YES="1", **chosen).returncode == 0
    assert desk.names() == {"test", "staging", "production"}
    assert desk.store.list("configmaps", "test") == theirs


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[World]:
    """A world whose namespaces have other names, as an overlay gives them."""
    installed = Installed(rendered(overlay(tmp_path / "m", **NAMES)))
    config = installed.one("ConfigMap", "gitops-hook")["data"]["config.yaml"]
    named = yaml.safe_load(config)["namespaces"]

    def configured(repository: Path) -> Object:
        return {**daemon_config(repository), "namespaces": named}

    with world(tmp_path / "w", configured, manifests=tmp_path / "m" / "example") as made:
        yield made


def test_a_push_goes_all_the_way_through_namespaces_of_other_names(elsewhere: World) -> None:
    elsewhere.start()
    run = elsewhere.push(elsewhere.repository.release("v1"))
    assert elsewhere.ended(run)["outcome"] == "deployed"
    for environment in ("stage", "live"):
        assert elsewhere.answer(environment)["version"] == "v1"
    names = {n["metadata"]["name"] for n in elsewhere.cluster.store.list("namespaces")}
    assert names == {"default", "kube-system", "orchestration", *NAMES.values()}
    assert elsewhere.cluster.store.find("jobs", "ci", f"test-{run}")
    assert elsewhere.cluster.store.find("jobs", "images", f"build-{run}")


# === What make delete takes away ===


@pytest.fixture
def used(desk: Desk) -> Desk:
    """An installation that has been used: a run, a Secret made by hand, and something of others."""
    desk.make("apply")
    labels = {"app.kubernetes.io/managed-by": "gitops-hook", "gitops-hook/app": "shop"}
    spec = {"suspend": True, "template": {"spec": {"containers": [], "restartPolicy": "Never"}}}
    box = {"name": "c", "image": "python:3.12-slim"}
    spec["template"]["spec"]["containers"] = [box]  # type: ignore[index]
    run = {"metadata": {"name": "test-one", "namespace": "test", "labels": labels}, "spec": spec}
    owner = desk.store.create("jobs", {"apiVersion": "batch/v1", "kind": "Job", **run})
    secret = {"metadata": {"name": "gitops-hook-secrets", "namespace": "orchestration"}}
    desk.store.create("secrets", secret)
    desk.kubectl("-n", "test", "create", "configmap", "theirs", "--from-literal=a=b")
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": "test-one"}
    meta: dict[str, Any] = {"name": "owned", "namespace": "test"}
    meta["ownerReferences"] = [{**reference, "uid": owner["metadata"]["uid"]}]
    desk.store.create("configmaps", {"metadata": meta})
    return desk


LISTED = """\
namespace build goes, with all that is in it:
  installed by make apply: 1 LimitRange, 1 NetworkPolicy, 1 ResourceQuota, 1 Role, 1 RoleBinding, 1 ServiceAccount
namespace orchestration goes, with all that is in it:
  installed by make apply: 1 ConfigMap, 1 Deployment, 1 Ingress, 1 NetworkPolicy, 1 Role, 1 RoleBinding, 1 Service, 1 ServiceAccount
  made by others: 1 Secret: Secret/gitops-hook-secrets (<none>)
namespace production stays, with the applications in it; the daemon's permissions there go
namespace staging stays, with the applications in it; the daemon's permissions there go
namespace test goes, with all that is in it:
  installed by make apply: 1 LimitRange, 1 NetworkPolicy, 1 ResourceQuota, 1 Role, 1 RoleBinding, 1 ServiceAccount
  made by the daemon: 1 Job
  made by others: 1 ConfigMap: ConfigMap/theirs (kubectl-create)
  that these own: 1 ConfigMap
"""  # noqa: E501 - as it is printed


def test_it_lists_what_goes_and_whose_that_is_and_asks_nobody_without_a_terminal(
    used: Desk,
) -> None:
    version = used.store.version
    done = used.make("delete")
    assert done.returncode == 2
    assert done.stdout == f"make delete: kubectl context: standin\n{LISTED}"
    said = "nothing was deleted: there is no terminal to ask on; if all this may go: "
    assert done.stderr.splitlines()[0] == f"make delete: {said}make delete YES=1"
    assert used.store.version == version


@pytest.mark.parametrize("answer", ["1", "0", "yes", "no"])
def test_only_yes_1_answers_for_a_person(used: Desk, answer: str) -> None:
    done = used.make("delete", YES=answer)
    assert LISTED in done.stdout
    assert (done.returncode == 0) is (answer == "1")
    assert used.names() >= {"staging", "production"}
    assert ("test" in used.names()) is (answer != "1")


def at_a_terminal(desk: Desk, answer: str) -> tuple[int, str]:
    """Run `make delete` at a terminal and answer it; return its code and what it says."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    near, far = os.openpty()
    argv = ["make", "delete", f"KUBECTL={desk.program}"]
    process = subprocess.Popen(argv, cwd=ROOT, env=clean, stdin=far, stdout=far, stderr=far)
    os.close(far)
    said = ""
    with suppress(OSError):  # with which Linux says that the other end is closed
        while chunk := os.read(near, 4096):
            said += chunk.decode()
            if said.endswith("[y/N] "):
                os.write(near, f"{answer}\n".encode())
    os.close(near)
    return process.wait(60), said


ANSWERS = [("y", True), ("yes", True), ("n", False), ("", False)]


@pytest.mark.parametrize(("answer", "goes"), ANSWERS)
def test_at_a_terminal_it_asks(used: Desk, answer: str, *, goes: bool) -> None:
    code, said = at_a_terminal(used, answer)
    assert LISTED in said.replace("\r\n", "\n")
    assert "make delete: delete all this? [y/N] " in said
    assert (code == 0) is goes
    assert ("nothing was deleted" in said) is not goes
    left = {"staging", "production"} if goes else {*NAMES, "orchestration"}
    assert used.names() == left


def test_a_namespace_without_our_label_stays_with_all_that_is_in_it(used: Desk) -> None:
    used.kubectl("label", "namespace", "test", f"{LABEL}-")
    before = {k: used.store.list(k, "test") for k in ("roles", "resourcequotas", "configmaps")}
    done = used.make("delete", YES="1")
    assert done.returncode == 0, done.stderr
    kept = "namespace test was not made by make apply: it stays, and nothing in it is touched\n"
    assert kept in done.stdout
    assert used.names() == {"test", "staging", "production"}
    assert before == {k: used.store.list(k, "test") for k in before}


def test_many_things_of_others_are_counted_and_some_of_them_named(used: Desk) -> None:
    for number in range(30):
        meta = {"name": f"more-{number:02}", "namespace": "test"}
        used.store.create("configmaps", {"metadata": meta})
    said = used.make("delete").stdout
    (line,) = [line for line in said.splitlines() if "31 ConfigMap: " in line]
    assert line.count("ConfigMap/") == 20
    assert line.endswith(" and more")


def test_what_cannot_be_listed_is_said(used: Desk) -> None:
    rules = [{"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get"]}]
    group = "rbac.authorization.k8s.io"
    used.store.create("clusterroles", {"metadata": {"name": "few"}, "rules": rules})
    role = {"apiGroup": group, "kind": "ClusterRole", "name": "few"}
    subject = {"kind": "ServiceAccount", "name": "default", "namespace": "default"}
    binding = {"metadata": {"name": "few"}, "roleRef": role, "subjects": [subject]}
    used.store.create("clusterrolebindings", binding)
    used.as_user("default/default")
    done = used.make("delete")
    assert done.stdout.count("and what could not be listed (kubectl says why above)") == 3
    assert "is forbidden" in done.stderr
    assert done.returncode == 2


def test_it_says_that_nothing_of_ours_is_there(desk: Desk) -> None:
    done = desk.make("delete")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "make delete: none of its namespaces is in this cluster"


# === kind ===


def test_make_kind_makes_a_namespace_that_make_apply_takes_for_ours(
    desk: Desk, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "docker": "[[ $2 != inspect ]] || echo sha256:0123456789abcdef",
        "kind": "[[ $1 != get ]] || echo gitops-hook",
        # the context is the one that kind would have made; nothing is rolled out here
        "kubectl": '[[ "$*" == *rollout* ]] || '
        f'exec {desk.program} "${{@/kind-gitops-hook/standin}}"',
    }
    for name, line in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n", "utf-8")
        (tools / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        for _ in range(2):
            done = make("kind", KUBECTL=str(tools / "kubectl"))
            assert done.returncode == 0, done.stderr
    labels = desk.store.get("namespaces", None, "orchestration")["metadata"]["labels"]
    assert labels[LABEL] == "gitops-hook"
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
