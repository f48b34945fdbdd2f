"""A GitLab on loopback, as far as commit statuses go: what its documentation and its code say.

A status that is pending or running is updated by the same user, name and branch; after a final one
a new request makes a second status. A change that is none is refused with "Cannot transition".
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "glpat-a-token-of-the-project"
STATES = ("pending", "running", "success", "failed", "canceled", "skipped")
EVENTS = {"pending": "enqueue", "running": "run"}
Object = dict[str, Any]


@dataclass
class Trouble:
    """What becomes of one request instead of its answer, or before it."""

    status: int = 0  # 0: the connection is closed without an answer
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    done: bool = False  # whether the request has its effect all the same
    raw: bytes = b""  # what is sent instead of an answer of HTTP
    drips: bool = False  # whether the answer comes byte by byte and never ends
    methods: tuple[str, ...] = ("POST", "GET")


@dataclass
class GitLabServer:
    """What a server has, whom it lets in, and what it was asked."""

    projects: set[str]
    port: int = 0
    users: dict[str, str] = field(default_factory=lambda: {TOKEN: "bot"})  # by token
    barred: set[str] = field(default_factory=set)  # users that may not write
    protected: set[str] = field(default_factory=set)  # branches on which nobody may write
    unknown: set[str] = field(default_factory=set)  # commits that it does not have yet
    statuses: list[Object] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    requests: list[Object] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def shown(self, commit: str = "") -> dict[str, list[str]]:
        """The states of all statuses by name, oldest first."""
        names: dict[str, list[str]] = {}
        with self.lock:
            for entry in self.statuses:
                if entry["sha"] == commit or not commit:
                    names.setdefault(entry["name"], []).append(entry["status"])
        return names

    def description(self, name: str, commit: str = "") -> str:
        """What the newest status of a name says, of one commit or of any."""
        with self.lock:
            entries = [e for e in self.statuses if e["name"] == name]
            return str([e for e in entries if commit in ("", e["sha"])][-1]["description"])

    def link(self, name: str) -> str | None:
        """Where the newest status of a name leads."""
        with self.lock:
            target: str | None = [e for e in self.statuses if e["name"] == name][-1]["target_url"]
        return target

    def posts(self) -> list[tuple[str, str]]:
        """Names and states that were sent, in order."""
        with self.lock:
            sent = [r["fields"] for r in self.requests if r["method"] == "POST"]
        return [(fields["name"], fields["state"]) for fields in sent]

    def answer(self, method: str, target: str, token: str, fields: Object) -> tuple[int, Any]:
        """What the API answers."""
        path = urlsplit(target).path
        words = [unquote(word) for word in path.removeprefix("/api/v4/projects/").split("/")]
        user = self.users.get(token)
        if user is None:
            return 401, {"message": "401 Unauthorized"}
        if words[0] not in self.projects:
            return 404, {"message": "404 Project Not Found"}
        if words[1:2] == ["statuses"] and len(words) == 3:
            return self.create(user, words[2], fields)
        if words[1:3] == ["repository", "commits"] and words[4:] == ["statuses"]:
            query = {key: values[0] for key, values in parse_qs(urlsplit(target).query).items()}
            return self.list(words[3], query)
        return 404, {"error": "404 Not Found"}

    def create(self, user: str, commit: str, fields: Object) -> tuple[int, Any]:
        """Create a status, or change the state of one."""
        state = fields.get("state")
        ref = fields.get("ref", "main")
        if user in self.barred or ref in self.protected:
            return 403, {"message": "403 Forbidden"}
        if commit in self.unknown:
            return 404, {"message": "404 Commit Not Found"}
        if state not in STATES:
            return 400, {"error": "state does not have a valid value"}
        texts = (ref, *(fields.get(key, "") for key in ("description", "target_url")))
        if max(map(len, texts)) > 255:
            return 400, {"error": "a field is too long (maximum is 255)"}
        key = {"sha": commit, "ref": ref, "name": fields["name"], "user": user}
        open_ones = [
            entry
            for entry in self.statuses
            if key.items() <= entry.items() and entry["status"] in ("pending", "running")
        ]
        entry = open_ones[-1] if open_ones else {**key, "id": len(self.statuses), "status": ""}
        before = entry["status"]
        if before == state or (before == "running" and state == "pending"):
            via = f":{EVENTS[state]} from :{before}"
            why = f'(Reason(s): Status cannot transition via "{EVENTS[state]}")'
            return 400, {"message": f"Cannot transition status via {via} {why}"}
        entry |= {"status": state, "description": fields.get("description")}
        entry["target_url"] = fields.get("target_url")
        if not open_ones:
            self.statuses.append(entry)
        return 201, entry

    def list(self, commit: str, query: Object) -> tuple[int, Any]:
        """List the newest status of each name and branch."""
        wanted = [e for e in self.statuses if e["sha"] == commit]
        wanted = [e for e in wanted if query.get("ref") in (None, e["ref"])]
        wanted = [e for e in wanted if query.get("name") in (None, e["name"])]
        newest = {(e["ref"], e["name"]): e for e in wanted}
        return 200, [*newest.values()]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    gitlab: GitLabServer

    def do_GET(self) -> None:
        self.handle_request({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.handle_request(json.loads(body))

    def handle_request(self, fields: Object) -> None:
        gitlab = self.gitlab
        with gitlab.lock:
            headers = {key.lower(): value for key, value in self.headers.items()}
            asked = {"method": self.command, "target": self.path, "fields": fields}
            gitlab.requests.append({**asked, "headers": headers})
            trouble = next((t for t in gitlab.troubles if self.command in t.methods), None)
            if trouble:
                gitlab.troubles.remove(trouble)
            if not trouble or trouble.done:
                token = headers.get("private-token", "")
                status, answer = gitlab.answer(self.command, self.path, token, fields)
        if not trouble:
            return self.reply(status, {}, json.dumps(answer).encode())
        if trouble.drips:
            return self.drip()
        if trouble.raw:
            self.close_connection = True
            self.wfile.write(trouble.raw)
            return None
        if trouble.status:
            return self.reply(trouble.status, trouble.headers, trouble.body)
        self.close_connection = True
        return None

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self) -> None:
        """Send a header that never ends."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 201 Created\r\nX-Slow: ")
        try:
            while not self.gitlab.ended.wait(0.05):
                self.wfile.write(b"x")
        except OSError:
            return

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def gitlab_server(*projects: str, context: ssl.SSLContext | None = None) -> Iterator[GitLabServer]:
    """A server with these projects, ended with its threads; with a context it is encrypted."""
    gitlab = GitLabServer({*projects})
    handler = type("OneHandler", (Handler,), {"gitlab": gitlab})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    gitlab.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True)
    thread.start()
    try:
        yield gitlab
    finally:
        gitlab.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
