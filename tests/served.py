"""A real server in front of an application, on a port that the system chooses."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
from waitress import wasyncore

import gitops_hook as hook
from tests.deliveries import Delivery


class Served:
    """A real server in front of a receiver, with short times."""

    def __init__(self, app: Any, max_body: int = 4096, **more: Any) -> None:
        self.server = hook.Server(app, "127.0.0.1:0", max_body, **more)
        self.port = int(self.server.effective_port)
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def hurry(self, **more: float) -> None:
        """Give a request less time than the daemon does."""
        self.server.arrival = {"headers": 0.5, "body": 0.5, "more": 0.5, **more}
        self.server.adj.asyncore_loop_timeout = 0.1

    def quiet(self) -> None:
        """Wait until no connection has done anything for a moment."""
        until = time.monotonic() + 10
        while any(
            c.requests or c.last_activity > time.time() - 0.05
            for c in [*self.server.active_channels.values()]
        ):
            assert time.monotonic() < until

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def post(self, delivery: Delivery, **more: Any) -> requests.Response:
        return requests.post(
            f"{self.url}/webhook", data=delivery.body, headers=delivery.headers, timeout=10, **more
        )

    def close(self) -> None:
        pulled = threading.Event()

        def end() -> None:
            pulled.wait(10)  # the loop may be awake already: the trigger is not yet done with
            self.server.task_dispatcher.shutdown()
            wasyncore.close_all(self.server._map)

        self.server.trigger.pull_trigger(end)
        pulled.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextmanager
def serving(app: Any, **more: Any) -> Iterator[Served]:
    served = Served(app, **more)
    try:
        yield served
    finally:
        served.close()
