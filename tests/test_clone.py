"""What Job pods get of a repository: the real command, git and git-lfs, servers on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import gitops_hook as hook
from gitops_hook import CloneSettings, Git, GitError, RefusedError, Surroundings
from tests.git_server import QUIET, GitServer, serving
from tests.standin.cluster import Cluster
from tests.standin.kubectl import find_kubectl
from tests.starting import argv_of, finding
from tests.test_git import Repository
from tests.waiting import eventually
from tests.world import install, world

CONTENT = b"a large file\0"
OID = hashlib.sha256(CONTENT).hexdigest()
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{OID}\nsize {len(CONTENT)}\n"
LFS_ATTRIBUTES = "*.bin filter=lfs diff=lfs merge=lfs -text\n"


def clone_settings(**settings: object) -> CloneSettings:
    faults: list[str] = []
    parsed: CloneSettings = hook.load_section(CloneSettings, settings, "", faults)
    assert not faults
    return parsed


class Pod:
    """A folder in which the container `clone` runs, as a Job's manifest has it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "workspace").mkdir(parents=True)
        self.src = root / "workspace" / "src"
        self.credentials = root / "git-credentials"
        self.ca = root / "ca.crt"
        self.bundle = root / "workspace" / "ca-certificates.crt"
        self.message = root / "termination-log"

    def clone(self, url: str, commit: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command in an empty workspace; what it leaves is in the folder."""
        self.message.unlink(missing_ok=True)
        shutil.rmtree(self.src, ignore_errors=True)
        environ = {
            **finding(),
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "CLONE_URL": url,
            "CLONE_COMMIT": commit,
            "CLONE_DIRECTORY": str(self.src),
            "CLONE_APP": "shop",
            "CREDENTIALS_FILE": str(self.credentials),
            "CA_FILE": str(self.ca),
            "CA_BUNDLE": str(self.bundle),
            "TERMINATION_LOG": str(self.message),
            **variables,
        }
        return subprocess.run(
            argv_of("clone"), env=environ, capture_output=True, text=True, check=False
        )

    def said(self) -> str:
        return self.message.read_text()

    def git(self, *args: str) -> subprocess.CompletedProcess[str]:
        argv = ["git", "-C", str(self.src), *args]
        environ = {**os.environ, **QUIET}  # as in an image without git-lfs
        return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path / "pod")


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """What the server serves."""
    return tmp_path / "repositories"


@pytest.fixture
def shop(repositories: Path) -> Repository:
    return Repository(repositories / "shop.git")


@pytest.fixture
def server(repositories: Path) -> Iterator[GitServer]:
    repositories.mkdir(exist_ok=True)
    with serving(repositories) as running:
        yield running


def address(server: GitServer, project: str = "shop.git") -> str:
    return f"{server.url}/{project}/.git"


@pytest.fixture
def lfs(repositories: Path, shop: Repository) -> str:
    """A commit with a file in git LFS, which the server has."""
    if shutil.which("git-lfs") is None:
        pytest.fail("git-lfs is missing; install it first")
    stored = repositories / "shop.git-objects" / OID
    stored.parent.mkdir()
    stored.write_bytes(CONTENT)
    return shop.commit(**{".gitattributes": LFS_ATTRIBUTES, "logo.bin": POINTER, "plain.bin": "x"})


# === History and tags ===


def test_one_commit_without_tags_is_what_a_job_gets_by_itself(pod: Pod, shop: Repository) -> None:
    shop.commit(a="1")
    shop.git("tag", "v1")
    commit = shop.commit(a="2")
    assert pod.clone(f"file://{shop.path}", commit).returncode == 0
    assert pod.git("rev-list", "--count", "HEAD").stdout == "1\n"
    assert pod.git("tag").stdout == ""


@pytest.mark.parametrize(("depth", "count"), [("2", "2"), ("full", "4")])
def test_as_much_history_comes_as_is_set(
    pod: Pod, shop: Repository, depth: str, count: str
) -> None:
    commit = [shop.commit(a=f"{i}") for i in range(4)][-1]
    assert pod.clone(f"file://{shop.path}", commit, CLONE_DEPTH=depth).returncode == 0
    assert pod.git("rev-list", "--count", "HEAD").stdout == f"{count}\n"


@pytest.mark.parametrize(("depth", "described"), [("1", 0), ("full", 0), ("2", 128)])
def test_with_tags_git_describe_works_unless_a_depth_is_chosen_that_ends_before_them(
    pod: Pod, shop: Repository, depth: str, described: int
) -> None:
    shop.commit(a="1")
    shop.git("tag", "-a", "v1.0", "-m", "one")
    commit = [shop.commit(a=f"{i}") for i in range(2, 5)][-1]
    url = f"file://{shop.path}"
    assert pod.clone(url, commit, CLONE_TAGS="true", CLONE_DEPTH=depth).returncode == 0
    answer = pod.git("describe")
    assert answer.returncode == described
    assert answer.stdout == ("" if described else f"v1.0-3-g{commit[:7]}\n")
    assert "gitops-hook" not in pod.git("for-each-ref").stdout


# === Submodules ===


@pytest.fixture
def library(repositories: Path) -> Repository:
    """A repository that others have as a submodule; the commit that they use is not its head."""
    library = Repository(repositories / "library.git")
    library.commit(code="of the library")
    return library


def with_submodule(shop: Repository, library: Repository, url: str, name: str = "lib/x") -> str:
    """Commit a submodule, whose repository then goes on."""
    shop.git("submodule", "--quiet", "add", "--name", name, str(library.path), "lib/x")
    shop.git("config", "-f", ".gitmodules", f"submodule.{name}.url", url)
    commit = shop.commit(a="1")
    library.commit(code="newer")
    return commit


def with_links(shop: Repository, count: int) -> str:
    """Commit entries of mode 160000, without .gitmodules."""
    for i in range(count):
        shop.git("update-index", "--add", "--cacheinfo", f"160000,{'a' * 40},d{i}")
    shop.git("commit", "-qm", "links")
    return shop.git("rev-parse", "HEAD")


def test_a_commit_with_submodules_is_refused_until_somebody_decides(
    pod: Pod, shop: Repository, library: Repository
) -> None:
    commit = with_submodule(shop, library, "https://example.com/library.git")
    done = pod.clone(str(shop.path), commit)
    sentence = "The commit has submodules (lib/x). "
    sentence += "Set clone.submodules of app shop to true or false."
    assert (done.returncode, pod.said()) == (3, sentence)
    assert sentence in done.stderr


def test_a_gitlink_without_gitmodules_is_a_submodule_too(pod: Pod, shop: Repository) -> None:
    commit = with_links(shop, 5)
    assert pod.clone(str(shop.path), commit).returncode == 3
    assert "submodules (d0, d1, d2, and 2 more). Set clone.submodules" in pod.said()
    assert pod.clone(str(shop.path), commit, CLONE_SUBMODULES="true").returncode == 3
    assert "Submodule d0 cannot be fetched: " in pod.said()


def test_a_file_gitmodules_without_a_submodule_is_a_file(pod: Pod, shop: Repository) -> None:
    commit = shop.commit(**{".gitmodules": '[submodule "x"]\n path = x\n url = ../x\n'})
    assert pod.clone(str(shop.path), commit).returncode == 0


def test_submodules_that_are_left_out_are_empty(
    pod: Pod, shop: Repository, library: Repository
) -> None:
    commit = with_submodule(shop, library, "../library.git")
    assert pod.clone(str(shop.path), commit, CLONE_SUBMODULES="false").returncode == 0
    assert list((pod.src / "lib/x").iterdir()) == []


def test_submodules_come_at_their_commit_with_those_in_them(
    pod: Pod, shop: Repository, library: Repository, repositories: Path, server: GitServer
) -> None:
    inner = Repository(repositories / "inner.git")
    inner.commit(deep="in the library")
    library.git("submodule", "--quiet", "add", str(inner.path), "inner")
    library.git("config", "-f", ".gitmodules", "submodule.inner.url", "../../inner.git/.git")
    library.commit(more="1")
    commit = with_submodule(shop, library, "../../library.git/.git")
    done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
    assert done.returncode == 0, pod.said()
    assert (pod.src / "lib/x/code").read_text() == "of the library"
    assert (pod.src / "lib/x/inner/deep").read_text() == "in the library"
    assert pod.git("submodule", "status", "--recursive").stdout.count("\n") == 2
    assert pod.git("status", "--porcelain").stdout == ""


def test_each_project_is_asked_with_the_line_that_names_it(
    pod: Pod, shop: Repository, library: Repository, server: GitServer
) -> None:
    commit = with_submodule(shop, library, "../../library.git/.git")
    server.logins = {"shop.git": {"a:for-shop"}, "library.git": {"b:for-library"}}
    lines = server.line("b:for-library", "/library.git/.git")
    pod.credentials.write_text(lines + server.line("a:for-shop", "/shop.git/.git"))
    done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
    assert done.returncode == 0, pod.said()
    assert {login for path, login in server.seen if "library" in path} == {"", "b:for-library"}
    assert {login for path, login in server.seen if "shop" in path} == {"", "a:for-shop"}


def test_a_submodule_on_another_server_gets_only_what_is_written_for_that_server(
    pod: Pod, shop: Repository, tmp_path: Path, server: GitServer
) -> None:
    library = Repository(tmp_path / "elsewhere" / "library.git")
    library.commit(code="1")
    with serving(tmp_path / "elsewhere", {"library.git": {"b:other"}}) as elsewhere:
        commit = with_submodule(shop, library, address(elsewhere, "library.git"))
        server.logins = {"shop.git": {"a:mine"}}
        pod.credentials.write_text(server.line("a:mine"))
        done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
        assert done.returncode == 1
        assert "could not read Username" in pod.said()
        assert {login for _, login in elsewhere.seen} == {""}
        pod.credentials.write_text(server.line("a:mine") + elsewhere.line("b:other"))
        done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
        assert done.returncode == 0, pod.said()
        assert {login for _, login in elsewhere.seen} == {"", "b:other"}


@pytest.mark.parametrize(
    "url",
    [
        "ssh://git@example.com/library.git",
        "git@example.com:library.git",
        "git://127.0.0.1/library.git",
        "ext::touch {proof}",
        "--upload-pack=touch {proof}",
        "-u./payload",
        "file://{library}",
        "{library}",
        "../" * 20 + "library.git",
    ],
)
def test_a_submodule_with_another_kind_of_url_is_refused(
    pod: Pod, shop: Repository, library: Repository, server: GitServer, url: str
) -> None:
    proof = pod.root / "proof"
    commit = with_submodule(shop, library, url.format(proof=proof, library=library.path))
    done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
    assert done.returncode == 3
    assert pod.said().startswith("Submodule lib/x cannot be fetched: ")
    assert pod.said().endswith("set clone.submodules of app shop to false.")
    assert not proof.exists()
    assert list((pod.src / "lib/x").iterdir()) == []


@pytest.mark.parametrize("name", ["../../hooks", "x/../../../hooks", ".."])
def test_a_submodule_with_a_name_that_leads_elsewhere_is_refused(
    pod: Pod, shop: Repository, library: Repository, server: GitServer, name: str
) -> None:
    with_submodule(shop, library, "../../library.git/.git", name="good")
    modules = (shop.path / ".gitmodules").read_text().replace("good", name)
    commit = shop.commit(**{".gitmodules": modules})
    done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
    assert done.returncode == 3
    assert pod.said().startswith("Submodule lib/x cannot be fetched: ")
    assert not list(pod.root.rglob("packed-refs"))


def test_what_a_repository_says_about_updates_runs_nothing(
    pod: Pod, shop: Repository, library: Repository, server: GitServer
) -> None:
    with_submodule(shop, library, "../../library.git/.git")
    for way in ("none", "!touch proof"):
        shop.git("config", "-f", ".gitmodules", "submodule.lib/x.update", way)
        commit = shop.commit()
        done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
        assert not list(pod.root.rglob("proof"))
        assert done.returncode == (0 if way == "none" else 3), pod.said()
        assert (pod.src / "lib/x/code").exists() is (way == "none")


def test_hooks_in_a_submodule_are_files(
    pod: Pod, shop: Repository, library: Repository, server: GitServer
) -> None:
    hooks = library.path / "hooks"
    hooks.mkdir()
    (hooks / "post-checkout").write_text(f"#!/bin/sh\ntouch {pod.root}/proof\n")
    (hooks / "post-checkout").chmod(0o755)
    library.commit(more="x")
    commit = with_submodule(shop, library, "../../library.git/.git")
    done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
    assert done.returncode == 0, pod.said()
    assert (pod.src / "lib/x/hooks/post-checkout").exists()
    assert not (pod.root / "proof").exists()


def test_the_url_that_is_checked_is_the_one_that_git_fetches(
    pod: Pod, shop: Repository, library: Repository, repositories: Path, server: GitServer
) -> None:
    private = Repository(repositories / "private.git")
    heads = {"a": library.git("rev-parse", "HEAD"), "b$Id$": private.commit(code="private")}
    # in the work tree `$Id$` gets an id, so that only A has this path there
    modules = f'[submodule "A"]\n path = b$I""d$\n url = {address(server, "private.git")}\n'
    modules += '[submodule "B"]\n path = b$Id$\n path = a\n'
    modules += f" url = {address(server, 'library.git')}\n"
    shop.commit(**{".gitattributes": ".gitmodules ident\n", ".gitmodules": modules})
    for path, head in heads.items():
        shop.git("update-index", "--add", "--cacheinfo", f"160000,{head},{path}")
    shop.git("commit", "-qm", "links")
    commit = shop.git("rev-parse", "HEAD")
    server.logins = {name: {"a:group"} for name in ("library.git", "private.git")}
    pod.credentials.write_text(server.line("a:group", "/library.git/.git"))
    assert pod.clone(address(server), commit, CLONE_SUBMODULES="true").returncode == 1
    assert "could not read Username" in pod.said()
    assert {login for path, login in server.seen if "library" in path} == {"", "a:group"}
    assert {login for path, login in server.seen if "private" in path} == {""}
    pod.credentials.write_text(server.line("a:group"))
    done = pod.clone(address(server), commit, CLONE_SUBMODULES="true")
    assert done.returncode == 0, pod.said()
    assert (pod.src / "a/code").read_text() == "of the library"
    assert (pod.src / "b$Id$/code").read_text() == "private"


def test_submodules_are_counted(tmp_path: Path, shop: Repository) -> None:
    commit = with_links(shop, 201)
    cloner = hook.Cloner(Git(tmp_path / "none"), "shop", clone_settings(submodules=True))
    with pytest.raises(RefusedError, match="more than 200 submodules, or 8 levels of them"):
        cloner.clone(str(shop.path), commit, tmp_path / "src")


def test_a_submodule_that_no_server_has_may_be_there_at_the_next_try(
    pod: Pod, shop: Repository, library: Repository, server: GitServer
) -> None:
    commit = with_submodule(shop, library, "../../nowhere.git/.git")
    assert pod.clone(address(server), commit, CLONE_SUBMODULES="true").returncode == 1


def test_submodules_of_a_local_repository_may_be_local(
    pod: Pod, shop: Repository, library: Repository
) -> None:
    commit = with_submodule(shop, library, "../library.git")
    assert pod.clone(str(shop.path), commit, CLONE_SUBMODULES="true").returncode == 0
    assert (pod.src / "lib/x/code").read_text() == "of the library"


# === git LFS ===


def test_a_commit_with_files_in_lfs_is_refused_until_somebody_decides(
    pod: Pod, shop: Repository, lfs: str
) -> None:
    assert pod.clone(str(shop.path), lfs).returncode == 3
    sentence = "The commit has files in git LFS (logo.bin). "
    assert pod.said() == sentence + "Set clone.lfs of app shop to true or false."


def test_all_that_is_undecided_is_said_at_once(
    pod: Pod, shop: Repository, library: Repository, lfs: str
) -> None:
    commit = with_submodule(shop, library, "../library.git")
    assert pod.clone(str(shop.path), commit).returncode == 3
    assert "clone.submodules of app shop" in pod.said()
    assert "clone.lfs of app shop" in pod.said()


@pytest.mark.parametrize(
    "files",
    [
        {"logo.bin": POINTER},
        {".gitattributes": LFS_ATTRIBUTES, "logo.bin": "no pointer"},
        {".gitattributes": LFS_ATTRIBUTES, "logo.txt": POINTER},
    ],
    ids=["no attribute", "no pointer", "other file"],
)
def test_what_only_looks_like_lfs_is_a_file(
    pod: Pod, shop: Repository, files: dict[str, str]
) -> None:
    assert pod.clone(str(shop.path), shop.commit(**files)).returncode == 0


def test_a_link_to_a_pointer_is_a_link(pod: Pod, shop: Repository) -> None:
    (shop.path / "logo.bin").symlink_to("pointer")
    commit = shop.commit(**{".gitattributes": LFS_ATTRIBUTES, "pointer": POINTER})
    assert pod.clone(str(shop.path), commit).returncode == 0


def test_pointers_stay_where_lfs_is_left_out(pod: Pod, shop: Repository, lfs: str) -> None:
    assert pod.clone(str(shop.path), lfs, CLONE_LFS="false").returncode == 0
    assert (pod.src / "logo.bin").read_text() == POINTER


def test_files_in_lfs_come_with_the_credentials_of_their_project(
    pod: Pod, lfs: str, server: GitServer
) -> None:
    server.logins = {"shop.git": {"a:good"}}
    pod.credentials.write_text(server.line("a:expired") + server.line("a:good"))
    done = pod.clone(address(server), lfs, CLONE_LFS="true")
    assert done.returncode == 0, pod.said()
    assert (pod.src / "logo.bin").read_bytes() == CONTENT
    assert (pod.src / "plain.bin").read_text() == "x"
    assert server.used() == ["a:expired", "a:good"]
    assert any("/info/lfs/objects/batch" in path for path, _ in server.seen)
    assert pod.git("status", "--porcelain").stdout == ""


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_server_that_refuses_its_files_in_lfs_is_a_circumstance(
    pod: Pod, lfs: str, server: GitServer, status: int
) -> None:
    server.logins = {"shop.git": {"a:good"}}
    server.lfs_status = status
    pod.credentials.write_text(server.line("a:good"))
    done = pod.clone(address(server), lfs, CLONE_LFS="true")
    assert done.returncode == 1
    assert "lfs" in pod.said()


def test_files_in_lfs_of_a_local_repository_come_from_it(
    pod: Pod, shop: Repository, lfs: str
) -> None:
    stored = shop.path / ".git/lfs/objects" / OID[:2] / OID[2:4] / OID
    stored.parent.mkdir(parents=True)
    stored.write_bytes(CONTENT)
    for url in (str(shop.path), f"file://{shop.path}"):
        assert pod.clone(url, lfs, CLONE_LFS="true").returncode == 0, pod.said()
        assert (pod.src / "logo.bin").read_bytes() == CONTENT


def test_a_file_that_the_server_lacks_is_red_whatever_lfsconfig_says(
    pod: Pod, shop: Repository, lfs: str, server: GitServer, repositories: Path
) -> None:
    (repositories / "shop.git-objects" / OID).unlink()
    commit = shop.commit(**{".lfsconfig": "[lfs]\n skipdownloaderrors = true\n"})
    done = pod.clone(address(server), commit, CLONE_LFS="true")
    assert (done.returncode, lfs != commit) == (1, True)
    assert "lfs" in pod.said()


@pytest.mark.parametrize("left_out", ["fetchexclude = *", "fetchinclude = other"])
def test_lfsconfig_leaves_no_file_out(
    pod: Pod, shop: Repository, lfs: str, server: GitServer, left_out: str
) -> None:
    commit = shop.commit(**{".lfsconfig": f"[lfs]\n {left_out}\n"})
    done = pod.clone(address(server), commit, CLONE_LFS="true")
    assert (done.returncode, lfs != commit) == (0, True)
    assert (pod.src / "logo.bin").read_bytes() == CONTENT


LFSCONFIG = """
[lfs]
    url = {evil}/shop.git/info/lfs
    standalonetransferagent = bad
[lfs "{evil}/"]
    access = basic
[lfs "customtransfer.bad"]
    path = /usr/bin/touch
    args = {proof}
[remote "origin"]
    url = {evil}/shop.git
    lfsurl = {evil}/shop.git/info/lfs
[credential]
    helper = "!touch {proof}"
"""


def test_lfsconfig_neither_leads_elsewhere_nor_runs_anything(
    pod: Pod, shop: Repository, lfs: str, server: GitServer, tmp_path: Path
) -> None:
    (tmp_path / "evil").mkdir()
    proof = pod.root / "proof"
    with serving(tmp_path / "evil", {"shop.git": {"x:y"}}) as evil:
        hostile = {".lfsconfig": LFSCONFIG.format(evil=evil.url, proof=proof)}
        commit = shop.commit(**hostile)
        server.logins = {"shop.git": {"a:good"}}
        pod.credentials.write_text(server.line("a:good"))
        done = pod.clone(address(server), commit, CLONE_LFS="true")
        assert done.returncode == 0, pod.said()
        assert (pod.src / "logo.bin").read_bytes() == CONTENT
        assert (lfs != commit, evil.seen) == (True, [])
        assert not proof.exists()


def test_files_in_lfs_of_a_submodule_come_too(
    pod: Pod, repositories: Path, shop: Repository, lfs: str, server: GitServer
) -> None:
    outer = Repository(repositories / "outer.git")
    outer.git("submodule", "--quiet", "add", str(shop.path), "shop")
    outer.git("config", "-f", ".gitmodules", "submodule.shop.url", "../../shop.git/.git")
    commit = outer.commit(a="1")
    url = address(server, "outer.git")
    assert pod.clone(url, commit, CLONE_SUBMODULES="true").returncode == 3
    assert "(logo.bin). Set clone.lfs" in pod.said()
    done = pod.clone(url, commit, CLONE_SUBMODULES="true", CLONE_LFS="true")
    assert done.returncode == 0, pod.said()
    assert lfs in pod.git("submodule", "status").stdout
    assert (pod.src / "shop/logo.bin").read_bytes() == CONTENT


# === A private certificate authority ===


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def private(repositories: Path, shop: Repository, authority: trustme.CA) -> Iterator[GitServer]:
    """A server with a certificate of a private authority."""
    assert shop.path.parent == repositories
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with serving(repositories, tls=context) as running:
        yield running


def test_a_job_trusts_the_private_authority_and_hands_it_to_the_tests(
    pod: Pod, shop: Repository, private: GitServer, authority: trustme.CA
) -> None:
    commit = shop.commit(a="1")
    done = pod.clone(address(private), commit)
    assert done.returncode == 1
    assert "certificate" in pod.said()
    assert not pod.bundle.exists()
    pod.ca.write_bytes(authority.cert_pem.bytes())
    assert pod.clone(address(private), commit).returncode == 0, pod.said()
    bundle = pod.bundle.read_bytes()
    assert bundle.endswith(authority.cert_pem.bytes())
    assert bundle.count(b"BEGIN CERTIFICATE") > 50, "the public ones are there, too"


def test_without_a_private_authority_no_bundle_is_written(pod: Pod, shop: Repository) -> None:
    assert pod.clone(str(shop.path), shop.commit(a="1")).returncode == 0
    assert not pod.bundle.exists()


def test_files_in_lfs_come_from_a_server_with_a_private_authority(
    pod: Pod, lfs: str, private: GitServer, authority: trustme.CA
) -> None:
    pod.ca.write_bytes(authority.cert_pem.bytes())
    done = pod.clone(address(private), lfs, CLONE_LFS="true")
    assert done.returncode == 0, pod.said()
    assert (pod.src / "logo.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [None, b"", b" \n"])
def test_without_a_private_authority_git_uses_its_own(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "ca.crt").write_bytes(content)
    assert Surroundings(ca=tmp_path / "ca.crt").authorities() == b""


def test_the_daemon_reads_the_private_authority_at_each_use(
    tmp_path: Path, shop: Repository, private: GitServer, authority: trustme.CA
) -> None:
    commit = shop.commit(a="1")
    ca = tmp_path / "ca.crt"
    git = Git(tmp_path / "none", surroundings=Surroundings(ca=ca))
    with pytest.raises(GitError, match="certificate"):
        git.heads(address(private))
    ca.write_bytes(authority.cert_pem.bytes())
    assert git.heads(address(private)) == {"refs/heads/main": commit}


def test_the_daemons_git_asks_the_proxy_of_job_env(tmp_path: Path, server: GitServer) -> None:
    variables = {"http_proxy": server.url, "no_proxy": "localhost"}
    git = Git(tmp_path / "none", surroundings=Surroundings(variables=variables))
    server.logins = {"": set()}  # a proxy is asked for the whole URL
    with pytest.raises(GitError):
        git.heads("http://git.invalid/shop.git/.git")
    assert {path.partition("?")[0] for path, _ in server.seen} == {
        "http://git.invalid/shop.git/.git/info/refs"
    }


@pytest.mark.parametrize("there", [True, False])
def test_the_tests_command_has_the_bundle_only_where_there_is_one(
    tmp_path: Path, there: bool
) -> None:
    bundle = tmp_path / "bundle"
    if there:
        bundle.write_text("x")
    environ = {"PATH": os.environ["PATH"], "CA_BUNDLE": str(bundle), "PIP_CERT": "mine"}
    command = 'echo "$PIP_CERT $SSL_CERT_FILE ${NODE_EXTRA_CA_CERTS-unset}"; false; echo never'
    argv = ["sh", "-ec", hook.TRUSTING, command]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    expected = f"mine {bundle} {bundle}\n" if there else "mine  unset\n"
    assert (done.returncode, done.stdout) == (1, expected)


# === In a cluster ===


def job_for(url: str, commit: str, **test: str) -> dict[str, Any]:
    """The Job of an app's tests, which may run at once."""
    app = {"name": "shop", "repository": url, "test": test, "build": {"image": "a/b"}}
    config = hook.load_config(json.dumps({"apps": [app]}))
    details = {"before": "", "title": "", "delivery": "", "received": 0.0}
    ids = {"id": f"shop-{commit[:8]}-0123456789", "app": "shop", "ref": "refs/heads/main"}
    run = hook.Run(**ids, commit=commit, **details)
    job = hook.test_job(config, config.apps[0], run)
    job["spec"]["suspend"] = False
    return job


@pytest.mark.parametrize("there", [True, False])
def test_a_job_and_its_tests_trust_what_configmap_gitops_hook_ca_holds(
    tmp_path: Path,
    shop: Repository,
    private: GitServer,
    authority: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    there: bool,
) -> None:
    """Without the ConfigMap a Job is as ever; with it git in the tests reaches the server, too."""
    commit = shop.commit(a="1")
    url = address(private) if there else str(shop.path)
    trusting = f"git ls-remote {url} && test -s $SSL_CERT_FILE && test -s $NODE_EXTRA_CA_CERTS"
    command = trusting if there else '! env | grep -E "^(SSL_CERT|PIP_CERT|NODE_EXTRA|GIT_SSL)"'
    with Cluster(tmp_path / "cluster", speed=5) as cluster:
        install(cluster)
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig()))
        monkeypatch.setenv("HOME", str(tmp_path))
        kubectl = hook.Kubectl(hook.Metrics(), program=find_kubectl())
        if there:
            pem = tmp_path / "ca.crt"
            authority.cert_pem.write_to_path(str(pem))
            ask = ("create", "configmap", "gitops-hook-ca", f"--from-file={pem}")
            kubectl.run(*ask, namespace="test")
        job = job_for(url, commit, command=command)
        assert kubectl.create_each([job], "test") == {}

        def ended() -> list[Any]:
            current = kubectl.get("job", job["metadata"]["name"], "test")
            assert current
            return [c for c in current["status"].get("conditions", []) if c["status"] == "True"]

        conditions = eventually(ended, 60.0, "the Job ends")
        assert conditions[0]["type"] == "SuccessCriteriaMet", kubectl.list("pods", "test")


def test_a_run_whose_commit_has_submodules_ends_with_the_setting_to_decide(tmp_path: Path) -> None:
    with world(tmp_path) as place:
        place.start()
        repository = place.repository
        repository.release("1")
        repository.git("update-index", "--add", "--cacheinfo", f"160000,{'a' * 40},lib/x")
        repository.git("commit", "-qm", "submodule")
        repository.git("push", "-q", "origin", "main")
        line = place.ended(place.push(repository.git("rev-parse", "HEAD")))
        assert (line["outcome"], line["reason"]) == ("failed", "CloneRefused")
        assert line["detail"].endswith("Set clone.submodules of app shop to true or false.")
        pods = place.cluster.store.list("pods", "test")
        names = [pod["metadata"]["name"] for pod in pods]
        assert len(names) == 1, "another pod would end alike"
