"""The shop: a front page, and whether it is well. Python's standard library is all it needs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERSION = 1
HEADLINE = "open for business"
PORT = 8080
# After SIGTERM: long enough that every client that keeps its connection has asked once more.
FAREWELL_SECONDS = 2.0


def price_with_tax(net_cents: int) -> int:
    """The price a customer pays, in cents, at 19 % tax."""
    return (net_cents * 119 + 50) // 100


def front_page() -> str:
    """What a visitor sees."""
    greeting = os.environ.get("GREETING", "Hello")
    return f"version {VERSION}: {greeting}, {HEADLINE}. Tea {price_with_tax(500)} cents\n"


class Shop(ThreadingHTTPServer):
    """The server, and what it knows of itself."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Visit)
        self.leaving = threading.Event()

    def well(self) -> bool:
        """Whether visitors should be sent here."""
        return True

    def visited(self) -> None:
        """Somebody has asked for the front page."""

    def leave(self) -> None:
        """Ask clients to connect elsewhere, give them a moment to do so, and end."""
        self.leaving.set()
        threading.Timer(FAREWELL_SECONDS, self.shutdown).start()


class Visit(BaseHTTPRequestHandler):
    """One connection, as long as the client keeps it."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    server: Shop

    def do_GET(self) -> None:
        """The front page, or whether the shop is well."""
        if self.path == "/":
            self.server.visited()
            self.answer(200, front_page())
        elif self.path == "/ready":
            self.answer(*((200, "well\n") if self.server.well() else (503, "not well\n")))
        else:
            self.answer(404, "no such page\n")

    def answer(self, status: int, text: str) -> None:
        """Send one answer; a shop that leaves also says that it was the last one here."""
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.server.leaving.is_set():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing about every request."""


def main() -> int:
    """Serve until SIGTERM."""
    shop = Shop(os.environ.get("POD_IP", "0.0.0.0"), PORT)
    signal.signal(signal.SIGTERM, lambda *_: shop.leave())
    print(f"version {VERSION} listens on {shop.server_address[0]}:{PORT}", flush=True)
    shop.serve_forever(poll_interval=0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
