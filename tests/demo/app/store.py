"""A store of numbers by name, which shops share: `python store.py` serves it at $PORT.

A client sends lines such as `add visits 1`, and gets the number that is stored then.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from socketserver import StreamRequestHandler, ThreadingTCPServer

PORT = 7379
LINE_BYTES = 200


class Store(ThreadingTCPServer):
    """The server, and the numbers; they last as long as it does."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Client)
        self.numbers: dict[str, int] = {}
        self.lock = threading.Lock()

    def add(self, name: str, number: int) -> int:
        """Add to a number, which is 0 at first; the number then."""
        with self.lock:
            self.numbers[name] = self.numbers.get(name, 0) + number
            return self.numbers[name]


class Client(StreamRequestHandler):
    """One connection, as long as the client keeps it."""

    server: Store

    def handle(self) -> None:
        """Answer each line with one line."""
        while line := self.rfile.readline(LINE_BYTES).decode("ascii", "replace").split():
            try:
                verb, name, number = line
                answer = self.server.add(name, int(number)) if verb == "add" else "what?"
            except ValueError:
                answer = "what?"
            self.wfile.write(f"{answer}\n".encode())


def add(host: str, port: int, name: str, number: int) -> int:
    """Add to a number in a store; the number then."""
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(f"add {name} {number}\n".encode())
        with connection.makefile() as answers:
            return int(answers.readline(LINE_BYTES))


def main() -> int:
    """Serve until SIGTERM."""
    store = Store(os.environ.get("POD_IP", "0.0.0.0"), int(os.environ.get("PORT", PORT)))
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=store.shutdown).start())
    print(f"the store listens on {store.server_address[0]}:{store.server_address[1]}", flush=True)
    store.serve_forever(poll_interval=0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
