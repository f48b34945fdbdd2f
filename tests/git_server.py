"""A git server on loopback: `git http-backend`, tokens for each project, and the API of git LFS."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

QUIET = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


@dataclass
class GitServer:
    """What a server has, whom it lets in, and what it was asked."""

    root: Path
    scheme: str = "http"
    port: int = 0
    # who may read which project; without an entry everybody may
    logins: dict[str, set[str]] = field(default_factory=dict)
    refusal: int = 404  # of a login that is good for another project, as GitLab answers
    moved: dict[str, str] = field(default_factory=dict)  # projects by where they are now
    broken: bool = False  # whether it answers 500 to who may read
    lfs_status: int = 200  # what the API of git LFS answers to who may read
    seen: list[tuple[str, str]] = field(default_factory=list)  # paths and logins

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}"

    def line(self, login: str, path: str = "") -> str:
        """A line of git-credentials."""
        return f"{self.scheme}://{login}@{self.host}{path}\n"

    def used(self) -> list[str]:
        """The logins in the order in which they came, without repetitions in a row."""
        logins = [login for _, login in self.seen if login]
        return [login for i, login in enumerate(logins) if i == 0 or logins[i - 1] != login]

    def status(self, project: str, login: str) -> int:
        """How a login is answered."""
        allowed = self.logins.get(project)
        if allowed is None or login in allowed:
            return 500 if self.broken else 200
        return self.refusal if any(login in names for names in self.logins.values()) else 401


def backend_environ(request: BaseHTTPRequestHandler, root: Path) -> dict[str, str]:
    """The environment in which `git http-backend` answers a request for a repository there."""
    path, _, query = request.path.partition("?")
    return {
        "PATH": os.environ["PATH"],
        "GIT_PROJECT_ROOT": str(root),
        **QUIET,
        "GIT_HTTP_EXPORT_ALL": "1",
        "REQUEST_METHOD": request.command,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "CONTENT_TYPE": request.headers.get("Content-Type", ""),
        "GIT_PROTOCOL": request.headers.get("Git-Protocol", ""),
        "REMOTE_USER": "hook",
        "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
    }


class Handler(BaseHTTPRequestHandler):
    """One request."""

    place: GitServer
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        basic = self.headers.get("Authorization", "").removeprefix("Basic ")
        login = base64.b64decode(basic).decode()
        self.place.seen.append((self.path, login))
        project = self.path.split("/")[1]
        if project in self.place.moved:
            self.send_response(302)
            location = self.path.replace(f"/{project}", self.place.moved[project], 1)
            self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status = self.place.status(project, login)
        if status == 200 and "/info/lfs/" in self.path:
            status = self.place.lfs_status
        if status != 200:
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif "/info/lfs/" in self.path:
            self.answer_lfs(project)
        else:
            self.answer_git()

    def do_POST(self) -> None:
        self.do_GET()

    def answer_lfs(self, project: str) -> None:
        """The batch of downloads, or one object."""
        if self.command == "GET":
            self.answer(self.object(project, self.path.rpartition("/")[2]).read_bytes())
            return
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        objects = []
        for one in wanted["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if self.object(project, one["oid"]).exists():
                href = f"{self.place.url}/{project}/info/lfs/{one['oid']}"
                entry["actions"] = {"download": {"href": href}}
            else:
                entry["error"] = {"code": 404, "message": "not here"}
            objects.append(entry)
        kind = "application/vnd.git-lfs+json"
        self.answer(json.dumps({"transfer": "basic", "objects": objects}).encode(), kind)

    def object(self, project: str, oid: str) -> Path:
        return self.place.root / f"{project}-objects" / oid

    def answer(self, content: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer_git(self) -> None:
        environ = backend_environ(self, self.place.root)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        done = subprocess.run(
            ["git", "http-backend"], input=body, capture_output=True, env=environ, check=True
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self.send_response(int(headers.pop("Status", "200")[:3]))
        headers["Content-Length"] = str(len(content))
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(
    root: Path, logins: Mapping[str, set[str]] | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[GitServer]:
    """Serve the repositories of a folder."""
    place = GitServer(root, scheme="https" if tls else "http", logins=dict(logins or {}))
    handler = type("PlacedHandler", (Handler,), {"place": place})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        if tls:
            running.socket = tls.wrap_socket(running.socket, server_side=True)
        place.port = running.server_port
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield place
        running.shutdown()
        thread.join(10)
