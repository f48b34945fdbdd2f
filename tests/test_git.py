"""git as the program calls it: real repositories, a real server that asks for a password."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gitops_hook import (
    GIT_ENVIRONMENT,
    Activity,
    ConfigError,
    Credential,
    Git,
    GitError,
    StageError,
    logins_for,
)
from tests.git_server import GitServer, backend_environ, serving
from tests.memory import peak_of
from tests.waiting import eventually

OWNER = {
    f"GIT_{who}_{what}": "owner@example.com"
    for who in ("AUTHOR", "COMMITTER")
    for what in ("NAME", "EMAIL")
}
GOOD, OTHER = "s3cret%2Fword", "hunter2"  # as written in a URL
QUIET = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


class Repository:
    """A repository as its owner sees it."""

    def __init__(self, path: Path, *options: str) -> None:
        self.path = path
        subprocess.run(["git", "init", "-q", "-b", "main", *options, str(path)], check=True)

    def git(self, *args: str) -> str:
        command = ["git", "-C", str(self.path), "-c", "protocol.file.allow=always", *args]
        environ = {**os.environ, **OWNER, **QUIET}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
        return done.stdout.strip()

    def commit(self, **files: str) -> str:
        for name, text in files.items():
            (self.path / name).write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "change")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "shop.git")


@pytest.fixture
def git(tmp_path: Path) -> Git:
    return Git(tmp_path / "git-credentials", timeout=20.0)


class Backend(BaseHTTPRequestHandler):
    """`git http-backend` behind basic authentication."""

    root: ClassVar[Path]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        name, _, password = base64.b64decode(
            self.headers.get("Authorization", "").removeprefix("Basic ")
        ).partition(b":")
        self.asked.append(self.path)
        if (name, password) != (b"hook", b"s3cret/word"):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.end_headers()
            return
        environ = backend_environ(self, self.root)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        done = subprocess.run(
            ["git", "http-backend"], input=body, capture_output=True, env=environ, check=True
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self.send_response(int(headers.pop("Status", "200")[:3]))
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    Backend.root, Backend.asked = tmp_path, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Backend) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join(10)


def credentials(git: Git, server: str, password: str) -> None:
    git.credentials.write_text(
        f"https://other:x@git.example.com\n{server.replace('//', f'//hook:{password}@')}\n"
    )
    git.credentials.chmod(0o440)


# === Reading heads ===


def test_every_branch_is_read_with_its_full_name(repository: Repository, git: Git) -> None:
    first = repository.commit(a="1")
    repository.git("branch", "feature/x")
    repository.git("tag", "v1")
    second = repository.commit(a="2")
    heads = git.heads(str(repository.path))
    assert heads == {"refs/heads/main": second, "refs/heads/feature/x": first}
    assert git.heads(f"file://{repository.path}") == heads


def test_an_empty_repository_has_no_heads(repository: Repository, git: Git) -> None:
    assert git.heads(str(repository.path)) == {}


def test_a_repository_that_is_not_there_is_an_error_that_names_it(tmp_path: Path, git: Git) -> None:
    with pytest.raises(GitError, match="does not appear to be a git repository"):
        git.heads(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("url", ["ssh://git@127.0.0.1/x", "ext::touch /tmp/x", "git://127.0.0.1/x"])
def test_only_http_and_files_are_allowed(git: Git, url: str) -> None:
    with pytest.raises(GitError, match=r"transport '.*' not allowed"):
        git.heads(url)


def test_a_url_that_looks_like_an_option_is_a_url(tmp_path: Path, git: Git) -> None:
    with pytest.raises(GitError):
        git.heads(f"--upload-pack=touch {tmp_path}/proof")
    assert not (tmp_path / "proof").exists()


def update_ref(repository: Repository, ref: str | bytes, commit: str) -> None:
    """Make a branch of any name that git allows."""
    command = [b"git", b"-C", bytes(repository.path), b"update-ref"]
    name = ref if isinstance(ref, bytes) else ref.encode()
    subprocess.run([*command, b"refs/heads/" + name, commit.encode()], check=True)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_a_branch_that_only_looks_like_another_is_never_read_as_it(
    repository: Repository, git: Git, mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = repository.commit(a="1"), repository.commit(a="2")
    for name in (f"main{mark}x", f"main{mark}", f"x{mark}{second}\u3000refs/heads/main"):
        update_ref(repository, name, first)
    assert git.heads(str(repository.path)) == {"refs/heads/main": second}
    assert caplog.messages == ["ignored branches with unsupported names"]
    assert (caplog.records[0].fields["count"], mark) == (3, mark)  # type: ignore[attr-defined]
    assert git.heads(str(repository.path)) == {"refs/heads/main": second}
    assert len(caplog.messages) == 1, "it is logged once an hour"


def test_branches_with_unsupported_names_are_ignored(repository: Repository, git: Git) -> None:
    commit = repository.commit(a="1")
    for name in (b"caf\xe9", b"caf\xe8", b"caf\xc3\xa9", b"\xc2\x9b31m", b"long/" * 120 + b"x"):
        update_ref(repository, name, commit)
    heads = git.heads(str(repository.path))
    assert heads == dict.fromkeys(("refs/heads/main", "refs/heads/caf\u00e9"), commit)


@pytest.fixture
def _answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git that prints what a file holds."""
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("_answering")
def test_a_branch_that_is_listed_twice_is_an_error(git: Git, tmp_path: Path) -> None:
    lines = (f"{digit * 40}\trefs/heads/main\n" for digit in "ab")
    (tmp_path / "answer").write_text("".join(lines))
    with pytest.raises(GitError, match="the server lists refs/heads/main twice"):
        git.heads("https://git.example.com/demo/shop.git")


@pytest.mark.usefixtures("_answering")
def test_a_carriage_return_ends_no_line(git: Git, tmp_path: Path) -> None:
    text = f"{'a' * 40}\trefs/heads/x\r{'b' * 40}\trefs/heads/main\n"
    (tmp_path / "answer").write_bytes(text.encode())
    assert git.heads("https://git.example.com/demo/shop.git") == {}


@pytest.mark.cluster
def test_of_200000_branches_the_deployed_one_is_read_in_little_memory(
    repository: Repository,
) -> None:
    commit = repository.commit(a="1")
    names = sorted(
        ["refs/heads/main", *(f"refs/heads/topic/{i}-{'x' * 20}" for i in range(200_000))]
    )
    packed = "# pack-refs with: peeled fully-peeled sorted \n"
    packed += "".join(f"{commit} {name}\n" for name in names)
    (repository.path / ".git" / "packed-refs").write_text(packed)
    said, peak = peak_of(
        """
import sys
url = sys.argv[1]
git = gitops_hook.Git(Path("none"), deployed_refs={url: ["refs/heads/main"]})
print(git.heads(url))
""",
        str(repository.path),
    )
    assert said == f"{{'refs/heads/main': '{commit}'}}\n"
    assert peak < 200


@pytest.mark.parametrize("there", [True, False])
def test_branches_that_end_like_the_deployed_one_do_not_hide_it(
    repository: Repository, there: bool
) -> None:
    commit = repository.commit(a="1")
    tails = [f"refs/heads/{i:04}/{'a' * 200}/refs/heads/main" for i in range(40_000)]
    names = sorted([*["refs/heads/main"] * there, *tails])
    packed = "# pack-refs with: peeled fully-peeled sorted \n"
    (repository.path / ".git" / "packed-refs").write_text(
        packed + "".join(f"{commit} {name}\n" for name in names)
    )
    if not there:
        repository.git("checkout", "-q", "--detach")
        (repository.path / ".git/refs/heads/main").unlink(missing_ok=True)
    url = str(repository.path)
    git = Git(Path("none"), deployed_refs={url: ["refs/heads/main"]})
    assert git.heads(url) == ({"refs/heads/main": commit} if there else {})


# === Checking out ===


def test_exactly_the_commit_is_checked_out(
    repository: Repository, git: Git, tmp_path: Path
) -> None:
    wanted = repository.commit(app="wanted")
    repository.commit(app="newer", more="file")
    git.checkout(str(repository.path), wanted, tmp_path / "new" / "src", symlinks=False)
    assert (tmp_path / "new/src/app").read_text() == "wanted"
    assert not (tmp_path / "new/src/more").exists()


def test_a_commit_of_a_sha256_repository_is_checked_out(git: Git, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "long.git", "--object-format=sha256")
    commit = repository.commit(app="long")
    git.checkout(str(repository.path), commit, tmp_path / "src", symlinks=False)
    assert (tmp_path / "src/app").read_text() == "long"


@pytest.mark.parametrize(
    "commit",
    ["--upload-pack=touch proof", "-h", "main", "HEAD", "", "0" * 39, "a" * 40 + "\n", "A" * 40,
     "+refs/heads/main:refs/heads/x"],
    ids=["option", "letter", "branch", "head", "empty", "short", "newline", "upper", "refspec"],
)  # fmt: skip
def test_what_is_not_a_commit_id_is_never_fetched(
    repository: Repository, git: Git, tmp_path: Path, commit: str
) -> None:
    repository.commit(a="1")
    with pytest.raises(GitError, match="is not a commit id"):
        git.checkout(str(repository.path), commit, tmp_path / "src", symlinks=False)
    assert not (tmp_path / "src").exists()


def test_a_missing_commit_is_an_error(repository: Repository, git: Git, tmp_path: Path) -> None:
    repository.commit(a="1")
    with pytest.raises(GitError):
        git.checkout(str(repository.path), "0" * 39 + "1", tmp_path / "src", symlinks=False)


@pytest.mark.parametrize(("symlinks", "is_link"), [(True, True), (False, False)])
def test_symlinks_are_made_only_where_they_are_wanted(
    repository: Repository, git: Git, tmp_path: Path, symlinks: bool, is_link: bool
) -> None:
    (repository.path / "link").symlink_to("/etc/passwd")
    commit = repository.commit(a="1")
    git.checkout(str(repository.path), commit, tmp_path / "src", symlinks=symlinks)
    link = tmp_path / "src" / "link"
    assert link.is_symlink() is is_link
    assert str(link.readlink() if is_link else link.read_text()) == "/etc/passwd"


def test_hooks_and_filters_of_the_surroundings_do_not_run(
    repository: Repository, git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, proof = tmp_path / "template", tmp_path / "proof"
    (template / "hooks").mkdir(parents=True)
    for hook in ("post-checkout", "reference-transaction"):
        (template / "hooks" / hook).write_text(f"#!/bin/sh\necho {hook} >> {proof}\n")
        (template / "hooks" / hook).chmod(0o755)
    (tmp_path / ".gitconfig").write_text(
        f'[filter "x"]\n smudge = touch {proof}\n[init]\n templateDir = {template}\n'
    )
    (repository.path / ".gitattributes").write_text("* filter=x\n")
    commit = repository.commit(a="1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(template))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.hooksPath")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(template / "hooks"))
    git.checkout(str(repository.path), commit, tmp_path / "src", symlinks=True)
    assert (tmp_path / "src/a").read_text() == "1"
    assert not proof.exists()


def test_submodules_are_left_empty(repository: Repository, git: Git, tmp_path: Path) -> None:
    inner = Repository(tmp_path / "inner.git")
    inner.commit(secret="inner")
    repository.git("submodule", "--quiet", "add", str(inner.path), "inner")
    commit = repository.commit(a="1")
    git.checkout(str(repository.path), commit, tmp_path / "src", symlinks=False)
    assert list((tmp_path / "src/inner").iterdir()) == []


# === The folder of the manifests ===


def brought(git: Git, repository: Repository | str, commit: str, path: str = "deploy") -> set[str]:
    """What is brought of a commit to read its manifests."""
    url = repository if isinstance(repository, str) else str(repository.path)
    with git.manifests(url, commit, path) as root:
        files = [f for f in root.rglob("*") if f.is_file() and ".git" not in f.parts]
        return {str(f.relative_to(root)) for f in files}


def refused(git: Git, repository: Repository | str, commit: str, path: str = "deploy") -> str:
    """Why manifests are not read."""
    with pytest.raises(StageError) as failed:
        brought(git, repository, commit, path)
    assert failed.value.reason == "ManifestRefused"
    return failed.value.detail


def filling(repository: Repository, **files: str | bytes) -> str:
    """Commit files; __ in a name stands for /."""
    for name, text in files.items():
        path = repository.path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return repository.commit()


@pytest.mark.parametrize("filters", ["true", "false"])
@pytest.mark.parametrize("path", ["deploy", "./deploy", "deploy/overlays/production"])
def test_only_the_top_folder_of_the_manifests_is_brought(
    repository: Repository, git: Git, path: str, filters: str
) -> None:
    repository.git("config", "uploadpack.allowFilter", filters)
    commit = filling(repository, deploy__a="1", deploy__base__b="2", src__c="3", deploying="4")
    filling(repository, deploy__newer="5")
    assert brought(git, repository, commit, path) == {"deploy/a", "deploy/base/b"}


def test_the_whole_repository_may_be_the_folder_of_the_manifests(
    repository: Repository, git: Git
) -> None:
    commit = filling(repository, a="1", deploy__b="2")
    assert brought(git, repository, commit, ".") == {"a", "deploy/b"}


@pytest.mark.parametrize("path", ["nowhere", "*", ":(top)deploy", "deploy/a/b", "-x"])
def test_a_folder_that_is_not_there_is_no_error_of_git(
    repository: Repository, git: Git, path: str
) -> None:
    commit = filling(repository, deploy__a="1")
    assert brought(git, repository, commit, path) <= {"deploy/a"}


def test_the_manifests_of_a_sha256_repository_are_brought(git: Git, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "long.git", "--object-format=sha256")
    assert brought(git, repository, filling(repository, deploy__a="1")) == {"deploy/a"}


def test_links_among_manifests_become_plain_files(repository: Repository, git: Git) -> None:
    (repository.path / "deploy").mkdir()
    (repository.path / "deploy/link").symlink_to("/etc/passwd")
    commit = repository.commit()
    with git.manifests(str(repository.path), commit, "deploy") as root:
        assert (root / "deploy/link").read_text() == "/etc/passwd"
        assert not (root / "deploy/link").is_symlink()
    assert not root.exists()


def test_manifests_over_a_server_with_a_password_are_brought(
    repository: Repository, git: Git, server: str
) -> None:
    repository.git("config", "uploadpack.allowFilter", "true")
    commit = filling(repository, deploy__a="1", src__large=os.urandom(3_000_000))
    credentials(git, server, GOOD)
    git.limit = 2**20  # what is not wanted is not brought
    assert brought(git, f"{server}/shop.git/.git", commit) == {"deploy/a"}


@pytest.mark.parametrize("filters", ["true", "false"])
def test_more_than_500_files_of_manifests_are_refused(
    repository: Repository, git: Git, filters: str
) -> None:
    repository.git("config", "uploadpack.allowFilter", filters)
    most = filling(repository, **{f"deploy__{i}": f"{i}" for i in range(500)})
    commit = filling(repository, deploy__more="x")
    assert len(brought(git, repository, most)) == 500
    detail = refused(git, repository, commit)
    assert detail == (
        "The folder 'deploy' has more than 500 files or 64 MiB (limits.checkout): "
        "it has 501 files. Put the manifests into a folder of their own."
    )


def test_folders_that_multiply_are_refused_before_they_are_brought(
    repository: Repository, git: Git
) -> None:
    """Ten billion files from eleven objects."""
    repository.commit(a="1")

    def make(*args: str, lines: str) -> str:
        command = ["git", "-C", str(repository.path), *args]
        return subprocess.run(command, input=lines, stdout=-1, check=True, text=True).stdout.strip()

    entry = "100644 blob " + make("hash-object", "-w", "--stdin", lines="kind: X")
    for _ in range(10):
        entry = "040000 tree " + make("mktree", lines="".join(f"{entry}\t{i}\n" for i in range(10)))
    tree = make("mktree", lines=f"{entry}\tdeploy\n")
    commit = repository.git("commit-tree", tree, "-m", "bomb")
    repository.git("update-ref", "refs/heads/bomb", commit)
    for path in ("deploy", "."):
        assert "it printed more than 2000 KiB. Put the manifests" in refused(
            git, repository, commit, path
        )


@pytest.mark.parametrize("filters", ["true", "false"])
@pytest.mark.parametrize(
    "files",
    [
        {"deploy__a": bytes(3_000_000)},
        {f"deploy__{i}": bytes(400_000) + b"%d" % i for i in range(4)},
        {"deploy__a": os.urandom(3_000_000)},
    ],
    ids=["packs-well", "together", "packs-badly"],
)
def test_manifests_above_the_limit_are_refused(
    repository: Repository, git: Git, files: dict[str, bytes], filters: str
) -> None:
    repository.git("config", "uploadpack.allowFilter", filters)
    git.limit = 2**20
    commit = filling(repository, **files)
    detail = refused(git, repository, commit)
    assert detail.startswith(
        "The folder 'deploy' has more than 500 files or 1 MiB (limits.checkout): "
    )
    assert detail.endswith(". Put the manifests into a folder of their own.")


def test_a_server_without_filters_may_bring_what_is_not_wanted_only_to_the_limit(
    repository: Repository, git: Git
) -> None:
    commit = filling(repository, deploy__a="1", src__large=os.urandom(3_000_000))
    assert brought(git, repository, commit) == {"deploy/a"}
    git.limit = 2**20
    assert "git needs more disk or memory" in refused(git, repository, commit)


@pytest.mark.cluster
def test_a_file_of_400_megabytes_is_refused_in_little_memory(repository: Repository) -> None:
    (repository.path / "deploy").mkdir()
    with (repository.path / "deploy" / "app.yaml").open("wb") as file:
        file.truncate(400_000_000)
    repository.git("config", "core.bigFileThreshold", "1m")
    commit = repository.commit()
    said, peak = peak_of(
        """
import sys
try:
    with gitops_hook.Git(Path("none")).manifests(sys.argv[1], sys.argv[2], "deploy"):
        print("brought")
except gitops_hook.StageError as refused:
    print(refused)
""",
        str(repository.path),
        commit,
    )
    assert "(limits.checkout): it has 381 MiB. Put" in said
    assert peak < 150


def test_a_server_that_is_away_is_no_fault_of_the_manifests(git: Git, tmp_path: Path) -> None:
    with pytest.raises(GitError, match="does not appear to be a git repository"):
        brought(git, str(tmp_path / "nowhere"), "a" * 40)


@pytest.mark.parametrize("commit", ["main", "--upload-pack=x", "a" * 39, "a" * 40 + "\n"])
def test_manifests_are_brought_of_a_commit_id_only(
    repository: Repository, git: Git, commit: str
) -> None:
    with pytest.raises(GitError, match="is not a commit id"):
        brought(git, repository, commit)


def test_manifests_are_read_one_folder_at_a_time(repository: Repository, git: Git) -> None:
    commit, done = filling(repository, deploy__a="1"), threading.Event()

    def read() -> None:
        brought(git, repository, commit)
        done.set()

    with git.manifests(str(repository.path), commit, "deploy"):
        thread = threading.Thread(target=read)
        thread.start()
        assert not done.wait(1.0)
    assert done.wait(20)
    thread.join()


# === A server with a password ===


def test_credentials_come_from_the_file(
    repository: Repository, git: Git, server: str, tmp_path: Path
) -> None:
    commit = repository.commit(app="private")
    credentials(git, server, GOOD)
    url = f"{server}/shop.git/.git"
    assert git.heads(url) == {"refs/heads/main": commit}
    git.checkout(url, commit, tmp_path / "src", symlinks=False)
    assert (tmp_path / "src/app").read_text() == "private"
    assert any("git-upload-pack" in path for path in Backend.asked)


def test_rotated_credentials_are_read_at_the_next_use(
    repository: Repository, git: Git, server: str
) -> None:
    repository.commit(a="1")
    credentials(git, server, "old")
    with pytest.raises(GitError, match="Authentication failed"):
        git.heads(f"{server}/shop.git/.git")
    git.credentials.chmod(0o640)
    credentials(git, server, GOOD)
    assert git.heads(f"{server}/shop.git/.git")


@pytest.mark.parametrize("written", [None, "", "https://hook:x@git.example.com\n"])
def test_without_fitting_credentials_git_does_not_prompt(
    repository: Repository, git: Git, server: str, written: str | None
) -> None:
    repository.commit(a="1")
    if written is not None:
        git.credentials.write_text(written)
    with pytest.raises(GitError, match="could not read Username"):
        git.heads(f"{server}/shop.git/.git")


def test_refused_credentials_are_neither_printed_nor_changed(
    repository: Repository, git: Git, server: str
) -> None:
    credentials(git, server, OTHER)
    before = git.credentials.read_bytes()
    with pytest.raises(GitError) as failed:
        git.heads(f"{server}/shop.git/.git")
    assert "hunter2" not in f"{failed.value} {failed.value.stderr} {failed.value.stdout}"
    assert git.credentials.read_bytes() == before


def test_no_secret_is_in_the_arguments_or_the_environment(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, program = tmp_path / "log", tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\nenv >> {log}\n')
    program.chmod(0o755)
    git.credentials.write_text("https://hook:hunter2@git.example.com\n")
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    git.heads("https://git.example.com/demo/shop.git")
    git.checkout("https://git.example.com/demo/shop.git", "a" * 40, tmp_path, symlinks=False)
    assert "ls-remote" in log.read_text()
    assert "hunter2" not in log.read_text()


def test_a_call_to_a_server_that_hangs_ends_in_time(tmp_path: Path) -> None:
    git = Git(tmp_path / "none", timeout=1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(GitError, match="no answer in time") as failed:
            git.heads(f"http://127.0.0.1:{silent.getsockname()[1]}/shop.git")
        assert time.monotonic() - began < 10
        assert failed.value.code is None
        # git's helper, which holds the connection, has ended with it
        connection, _ = silent.accept()
        connection.settimeout(10)
        with connection:
            while connection.recv(65536):
                pass


def test_a_server_that_hangs_is_asked_by_few_at_once_and_holds_up_no_other(
    repository: Repository, tmp_path: Path
) -> None:
    commit, git = repository.commit(app="1"), Git(tmp_path / "none", timeout=3.0)
    with socket.create_server(("127.0.0.1", 0), backlog=20) as silent, ExitStack() as asked:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/shop.git"

        def ask() -> None:
            with pytest.raises(GitError):
                git.heads(url)

        threads = [threading.Thread(target=ask) for _ in range(7)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for _ in range(4):
            asked.enter_context(silent.accept()[0])
        assert git.heads(str(repository.path)) == {"refs/heads/main": commit}
        silent.settimeout(0.5)
        with pytest.raises(TimeoutError):
            silent.accept()
        for thread in threads:
            thread.join(20)
        assert time.monotonic() - began < 20


def test_a_call_that_waits_too_long_for_its_server_fails(tmp_path: Path) -> None:
    git = Git(tmp_path / "none", timeout=0.1)
    git._slots["git.example.com"] = threading.Semaphore(0)
    with pytest.raises(GitError, match="too many calls wait for"):
        git.heads("https://git.example.com/demo/shop.git")


def test_a_missing_git_is_a_configuration_error(
    git: Git, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match="git cannot be started"):
        git.heads("https://git.example.com/demo/shop.git")


# === Several lines of credentials ===


@pytest.fixture
def shops(tmp_path: Path) -> Iterator[GitServer]:
    """A server with two projects, each with a token of its own."""
    root = tmp_path / "served"
    for name in ("one", "two"):
        Repository(root / name).commit(a=name)
    with serving(root, {"one": {"hook:good1"}, "two": {"hook:good2"}}) as running:
        yield running


def asked(shops: GitServer, git: Git, project: str, *lines: str) -> list[str]:
    """The logins with which a project is asked, and at the end whether all were refused."""
    git.credentials.write_text("".join(lines))
    shops.seen.clear()
    try:
        git.heads(f"{shops.url}/{project}/.git")
    except GitError:
        return [*shops.used(), "refused"]
    return shops.used()


def test_an_expired_line_does_not_hide_the_next(git: Git, shops: GitServer) -> None:
    lines = [shops.line("hook:expired"), shops.line("hook:good1")]
    assert asked(shops, git, "one", *lines) == ["hook:expired", "hook:good1"]
    assert asked(shops, git, "one", *lines) == ["hook:good1"], "the one that worked comes first"
    assert asked(shops, git, "one", shops.line("hook:expired")) == ["hook:expired", "refused"]


@pytest.mark.parametrize("refusal", [401, 403, 404])
def test_a_token_that_may_not_read_the_project_does_not_hide_the_next(
    git: Git, shops: GitServer, refusal: int
) -> None:
    shops.refusal = refusal
    lines = [shops.line("hook:good1"), shops.line("hook:good2")]
    assert asked(shops, git, "two", *lines) == ["hook:good1", "hook:good2"]


def test_lines_that_name_the_project_come_before_those_that_name_none(
    git: Git, shops: GitServer
) -> None:
    lines = [
        shops.line("hook:good1"),
        shops.line("hook:own", "/one/.git"),
        shops.line("hook:other", "/on"),
        shops.line("hook:two", "/two"),
    ]
    assert asked(shops, git, "one", *lines) == ["hook:own", "hook:good1"]
    assert asked(shops, git, "two", *lines) == ["hook:two", "hook:good1", "refused"]


def test_the_line_that_names_most_of_the_path_comes_first() -> None:
    lines = [b"https://a:all@h", b"https://a:group@h/g/", b"https://a:shop@h/g/shop.git"]
    lines += [b"https://a:second@h/g/shop", b"https://a:else@other", b"https://a:no@other/g"]
    credentials = [c for c in map(Credential.parse, lines) if c]
    logins = [login.split("\n") for login in logins_for(credentials, "https://h/g/shop.git")]
    passwords = [login[0].removeprefix("https://a:").removesuffix("@h") for login in logins]
    assert passwords == ["shop", "second", "group", "all"]
    assert {login[1] for login in logins} == {"https://a:else@other"}


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("/group/shop.git", "https://git.example.com/group/shop"),
        ("/Group/Shop", "https://git.example.com:443/group/shop.git"),
        ("/group/", "https://GIT.example.com/group/shop.git"),
        ("", "https://hook@git.example.com/group/shop.git"),
    ],
)
def test_a_path_is_compared_as_the_server_does(path: str, url: str) -> None:
    credential = Credential.parse(f"https://a:b@git.example.com{path}".encode())
    assert credential is not None
    assert credential.fits(url)


@pytest.mark.parametrize(
    "rest",
    ["/../private.git", "/..", "/./x", "/.", "/x/../../private", "/%2e%2e/private", "/%2E./private",
     "/..%2fprivate", "/..\\private", "\\..\\private", "//x", "/x//../private", "/../?x", "/..#x"],
)  # fmt: skip
def test_a_line_with_a_path_is_not_shown_for_a_url_that_may_lead_out_of_it(rest: str) -> None:
    confined = Credential.parse(b"https://a:b@git.example.com/group/shop")
    whole = Credential.parse(b"https://a:b@git.example.com")
    assert confined is not None
    assert whole is not None
    assert not confined.fits(f"https://git.example.com/group/shop{rest}")
    assert whole.fits(f"https://git.example.com/group/shop{rest}")


@pytest.mark.parametrize("rest", ["/x.git", "/.x", "/..x/y.", "/...", "/x/.git", "/x/", "/x?a=%2e"])
def test_dots_in_names_of_projects_lead_nowhere_else(rest: str) -> None:
    confined = Credential.parse(b"https://a:b@git.example.com/group/shop")
    assert confined is not None
    assert confined.fits(f"https://git.example.com/group/shop{rest}")


def test_git_gets_no_login_of_one_project_on_the_way_through_it_to_another(
    git: Git, shops: GitServer
) -> None:
    line = shops.line("hook:good2", "/one")
    assert asked(shops, git, "one/../two", line) == ["refused"]
    assert {path.split("/")[1] for path, _ in shops.seen} == {"two"}


@pytest.mark.parametrize(
    "url",
    [
        "http://git.example.com/group/shop.git",
        "https://git.example.com:8443/group/shop.git",
        "https://git.example.com.evil.example/group/shop.git",
        "https://git.example.com@evil.example/group/shop.git",
        "https://git.example.com/group/shop-two.git",
        "https://git.example.com/group",
        "https://[/group/shop.git",
        "/group/shop.git",
    ],
)
def test_a_line_is_for_its_server_and_project_only(url: str) -> None:
    credential = Credential.parse(b"https://a:b@git.example.com/group/shop.git")
    assert credential is not None
    assert not credential.fits(url)


@pytest.mark.parametrize("end", ["\r\n", " \n", "\t \r\n", "\r\n\r\n", ""])
def test_blanks_at_the_ends_of_lines_do_no_harm(git: Git, shops: GitServer, end: str) -> None:
    line = " " + shops.line("hook:good1").rstrip("\n") + end
    assert asked(shops, git, "one", line) == ["hook:good1"]


@pytest.mark.parametrize(
    ("written", "login"),
    [
        ("hook:s3cret%2Fword", "hook:s3cret/word"),
        ("me@example.com:p@ss", "me@example.com:p@ss"),
        ("hook:a:b", "hook:a:b"),
        ("hook:50%off%", "hook:50%off%"),
        ("hook:", "hook:"),
        ("hook:gr%c3%bcn", "hook:gr\u00fcn"),
    ],
)
def test_passwords_with_odd_characters_are_sent_as_they_are(
    git: Git, shops: GitServer, written: str, login: str
) -> None:
    shops.logins = {"one": {login}}
    assert asked(shops, git, "one", shops.line(written)) == [login]


def test_only_some_lines_are_tried(git: Git, shops: GitServer) -> None:
    lines = [shops.line(f"hook:{i}") for i in range(20)]
    assert asked(shops, git, "one", *lines) == [f"hook:{i}" for i in range(8)] + ["refused"]


def test_a_line_that_is_none_hides_no_other(git: Git, shops: GitServer) -> None:
    lines = ["no line\n", "https://[\n", "ssh://a:b@host\n", f"{shops.url}\n"]
    assert asked(shops, git, "one", *lines, shops.line("hook:good1")) == ["hook:good1"]


def test_only_a_refused_credential_makes_git_try_the_next(git: Git, shops: GitServer) -> None:
    lines = [shops.line("hook:good1"), shops.line("hook:other")]
    shops.broken = True
    assert asked(shops, git, "one", *lines) == ["hook:good1", "refused"]


def test_a_server_that_was_led_to_gets_no_credential_of_another(
    git: Git, shops: GitServer, tmp_path: Path
) -> None:
    with serving(tmp_path / "served", {"one": {"x:y"}}) as elsewhere:
        shops.logins = {}
        shops.moved = {"one": f"{elsewhere.url}/one"}
        line = shops.line("hook:good1")
        assert asked(shops, git, "one", line)[-1] == "refused"
        assert elsewhere.used() == []
        assert asked(shops, git, "one", line + elsewhere.line("x:y"))[-1:] != ["refused"]
        assert elsewhere.used() == ["x:y"]


def test_no_login_is_left_on_the_disk(
    git: Git, shops: GitServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert asked(shops, git, "one", shops.line("hook:good1")) == ["hook:good1"]
    assert not list((tmp_path / "tmp").rglob("*"))


# === Servers that take their time ===


class SlowBackend(BaseHTTPRequestHandler):
    """`git http-backend` whose packs take some seconds; it says so every second, or nothing."""

    root: ClassVar[Path]
    config: ClassVar[Path]
    ends: ClassVar[list[subprocess.Popen[bytes]]]

    def do_GET(self) -> None:
        environ = backend_environ(self, self.root) | {"GIT_CONFIG_GLOBAL": str(self.config)}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        backend = subprocess.Popen(
            ["git", "http-backend"], env=environ, start_new_session=True, **pipes
        )
        self.ends.append(backend)
        assert backend.stdin
        assert backend.stdout
        with backend.stdin:
            backend.stdin.write(body)
        self.send_response(200)
        with backend.stdout:
            while line := backend.stdout.readline().strip():
                self.send_header(*line.decode().split(": ", 1))
            self.end_headers()
            with suppress(OSError):
                while chunk := os.read(backend.stdout.fileno(), 65536):
                    self.wfile.write(chunk)
                    self.wfile.flush()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def slow_server(root: Path, seconds: float, *, keep_alive: bool) -> Iterator[str]:
    """Serve the repositories of a folder; each pack takes some seconds."""
    hook = root / "slow"
    hook.write_text(f'#!/bin/sh\nsleep {seconds}\nexec "$@"\n')
    hook.chmod(0o755)
    SlowBackend.root, SlowBackend.config, SlowBackend.ends = root, root / "config", []
    SlowBackend.config.write_text(
        f"[uploadpack]\n packObjectsHook = {hook}\n keepAlive = {int(keep_alive)}\n"
        " allowAnySHA1InWant = true\n"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), SlowBackend) as running:
        running.daemon_threads = False
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join(10)
            for process in SlowBackend.ends:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


@pytest.mark.cluster
def test_a_server_that_packs_for_long_is_waited_for_as_long_as_it_says_that_it_does(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repository.commit(app="1")
    # whatever slowness git is told to give up at, it is reached here
    monkeypatch.setitem(GIT_ENVIRONMENT, "GIT_HTTP_LOW_SPEED_TIME", "6")
    git = Git(tmp_path / "none", timeout=6.0)
    with slow_server(tmp_path, 13, keep_alive=True) as url:
        git.checkout(f"{url}/shop.git", commit, tmp_path / "out", symlinks=True)
    assert (tmp_path / "out" / "app").read_text() == "1"


@pytest.mark.cluster
def test_a_server_that_says_nothing_is_left_long_before_the_whole_time_is_over(
    repository: Repository, tmp_path: Path
) -> None:
    commit = repository.commit(app="1")
    git = Git(tmp_path / "none", timeout=3.0)
    began = time.monotonic()
    with (
        slow_server(tmp_path, 60, keep_alive=False) as url,
        pytest.raises(GitError, match="no answer"),
    ):
        git.checkout(f"{url}/shop.git", commit, tmp_path / "out", symlinks=True)
    assert time.monotonic() - began < 20  # of the 30 that a fetch may take


def test_a_program_that_computes_or_of_which_nothing_is_known_is_not_taken_for_silent() -> None:
    own_group = Activity(os.getpgrp(), silence=0.0)
    assert own_group.measured().moved > 0
    unknown = Activity(2**22 + 1, silence=0.0)
    assert not unknown.stalled()
    idle = subprocess.Popen(["sleep", "60"], process_group=0)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], process_group=0)
    try:
        silent, computing = (Activity(p.pid, silence=0.4) for p in (idle, busy))
        computing.BUSY_SECONDS = 0.05

        def is_left() -> bool:
            assert not computing.stalled()
            return silent.stalled()

        eventually(is_left, 20, "what does nothing is left")
    finally:
        for process in (idle, busy):
            process.kill()
            process.wait()
