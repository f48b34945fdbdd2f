"""git as the program calls it: real repositories, a real server that asks for a password."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gitops_hook import ConfigError, Git, GitError

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
        path, _, query = self.path.partition("?")
        environ = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.root),
            **QUIET,
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_USER": "hook",
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
        }
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
def test_only_http_and_files_are_spoken(git: Git, url: str) -> None:
    with pytest.raises(GitError, match=r"transport '.*' not allowed"):
        git.heads(url)


def test_a_url_that_looks_like_an_option_is_a_url(tmp_path: Path, git: Git) -> None:
    with pytest.raises(GitError):
        git.heads(f"--upload-pack=touch {tmp_path}/proof")
    assert not (tmp_path / "proof").exists()


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
    found = tmp_path / "src" / "link"
    assert found.is_symlink() is is_link
    assert str(found.readlink() if is_link else found.read_text()) == "/etc/passwd"


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
def test_without_fitting_credentials_nobody_is_asked(
    repository: Repository, git: Git, server: str, written: str | None
) -> None:
    repository.commit(a="1")
    if written is not None:
        git.credentials.write_text(written)
    with pytest.raises(GitError, match="could not read Username"):
        git.heads(f"{server}/shop.git/.git")


def test_refused_credentials_are_neither_told_nor_changed(
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


def test_a_server_that_hangs_is_left_in_time(tmp_path: Path) -> None:
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


def test_whoever_waits_too_long_for_a_place_at_a_server_is_told(tmp_path: Path) -> None:
    git = Git(tmp_path / "none", timeout=0.1)
    git._places["git.example.com"] = threading.Semaphore(0)
    with pytest.raises(GitError, match="too many wait for"):
        git.heads("https://git.example.com/demo/shop.git")


def test_a_missing_git_is_a_fault_of_the_surroundings(
    git: Git, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="git cannot be started"):
        git.heads("https://git.example.com/demo/shop.git")
