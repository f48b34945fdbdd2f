"""What the bench runs in processes of their own: senders, visitors, the server of the baseline."""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gitops_hook as hook
from tests.world import TOKEN, Object

SENDERS = 50
INTERVAL = 0.1  # seconds between two requests of one visitor


def send(
    port: int, requests: Sequence[bytes], seconds: float = 60.0
) -> list[tuple[float, float, int]]:
    """Send deliveries from 50 senders, each its next when the last was answered, for a time.

    Each goes over a connection of its own, as GitLab's do. Returns of each when it began, the
    seconds from the connect to the answer, and the status. It shares the processors with what it
    measures, so it does no more than it must.
    """
    left, until, answers = iter(requests), time.monotonic() + seconds, list[Any]()
    with selectors.DefaultSelector() as waiting:

        def begin() -> None:
            began = time.monotonic()
            if began < until and (request := next(left, None)):
                raw = socket.create_connection(("127.0.0.1", port))
                raw.sendall(request)
                waiting.register(raw, selectors.EVENT_READ, (raw, began))

        for _ in range(SENDERS):
            begin()
        while waiting.get_map():
            for key, _ in waiting.select():
                raw, began = key.data
                status = int(raw.recv(4096)[9:12])
                answers.append((began, time.monotonic() - began, status))
                waiting.unregister(raw)
                raw.close()
                begin()
    return answers


@dataclass(frozen=True)
class Visit:
    """What one visitor saw: whether it kept its connection, the last version, what failed."""

    app: str
    keep: bool
    version: str
    answered: int
    failures: list[str]


class Visitor:
    """A client of a live Service that tries nothing again; half of them keep their connection."""

    def __init__(self, app: str, host: str, keep: bool) -> None:
        self.app, self.host, self.keep = app, host, keep
        self.answered, self.version, self.failures = 0, "", list[str]()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> None:
        """Send one request, and note what became of it."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self.host, 80)
        reader, writer = self._streams
        close = b"" if self.keep else b"Connection: close\r\n"
        writer.write(b"GET / HTTP/1.1\r\nHost: shop\r\n" + close + b"\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
        self.version = json.loads(await reader.readexactly(length))["version"]
        if int(head[9:12]) != 200:
            self.failures.append(f"status {int(head[9:12])}")
        self.answered += 1
        if not self.keep or b"connection: close" in head:
            self.leave()

    def leave(self) -> None:
        """Close its connection."""
        if self._streams:
            self._streams[1].close()
            self._streams = None

    async def live(self, stop: Path) -> None:
        """Ask again and again until a file exists."""
        while not stop.exists():
            began = time.monotonic()
            try:
                await asyncio.wait_for(self.ask(), 5)
            except (OSError, EOFError, TimeoutError) as failed:
                self.failures.append(f"{type(failed).__name__} {failed}")
                self.leave()
            await asyncio.sleep(max(0.0, INTERVAL - (time.monotonic() - began)))
        self.leave()


def visit(hosts: dict[str, str], stop: Path) -> list[Visit]:
    """Visit Services until a file exists; return what each visitor saw."""
    visitors = [Visitor(a, h, k) for a, h in hosts.items() for k in (True, True, False, False)]

    async def all_visitors() -> None:
        await asyncio.gather(*(visitor.live(stop) for visitor in visitors))

    asyncio.run(all_visitors())
    return [Visit(v.app, v.keep, v.version, v.answered, v.failures) for v in visitors]


# The baseline: the server of the article, with its mistakes corrected but for its way of working.


def serve_like_the_article(ready: Connection, config: str, command: list[str], env: Object) -> None:
    """Serve until killed: one kubectl a push, and the answer when that has ended."""
    known, key = hook.load_config(config), hook.decode_signing_token(TOKEN, 1)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            given = {name.lower(): value for name, value in self.headers.items()}
            hook.verify_delivery("signature", [key], given, body, time.time())
            push = json.loads(body)
            fields = {"ref": push["ref"], "commit": push["after"], "received": time.time()}
            name = hook.run_id("shop", push["ref"], push["after"])
            run = hook.Run(id=name, app="shop", **fields)
            job = json.dumps(hook.test_job(known, known.apps[0], run))
            argv = [*command, "create", "-n", "test", "-f", "-"]
            done = subprocess.run(
                argv, input=job.encode(), capture_output=True, env=env, check=False
            )
            self.send_response(202 if done.returncode == 0 else 500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    ready.send(server.server_port)
    server.serve_forever()
