"""Visitors of the shop: who got which version when, and who got none. Nothing is tried again."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from dataclasses import dataclass

CLIENTS = 4  # of each kind
INTERVAL = 0.12  # seconds between two requests of one client: 66 requests a second in all
TIMEOUT = 5.0
VERSION = re.compile(rb"version (\d+): ")


@dataclass(frozen=True)
class Answer:
    """What one request got; a failure has no version but a reason."""

    at: float
    version: int
    kept: bool
    failure: str = ""


class Load:
    """Asks for the front page, half of the clients on connections that they keep."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._answers: list[Answer] = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._visit, args=(number, kept), daemon=True)
            for number in range(CLIENTS)
            for kept in (True, False)
        ]
        self.began = time.monotonic()

    def reachable(self) -> bool:
        """Whether there is an answer at all; this visit is not counted."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            return not self._ask(connection, kept=False).failure

    def start(self) -> None:
        """Begin to ask."""
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let every client end after the answer it waits for; twice does no harm."""
        self._ended.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(TIMEOUT + 1)

    # What happened

    def answers(self) -> list[Answer]:
        """Every answer so far, in the order they came."""
        return list(self._answers)

    def failures(self) -> list[Answer]:
        """Those that failed."""
        return [answer for answer in self.answers() if answer.failure]

    def of_version(self, version: int) -> list[Answer]:
        """Those that a version gave."""
        return [answer for answer in self.answers() if answer.version == version]

    def rate(self) -> float:
        """Requests a second, from the first to the last."""
        found = self.answers()
        return len(found) / (found[-1].at - self.began) if found else 0.0

    # Clients

    def _visit(self, number: int, kept: bool) -> None:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)
        due = time.monotonic() + number * INTERVAL / CLIENTS
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            # A late client catches up, so that the rate does not depend on the machine.
            due += INTERVAL
            answer = self._ask(connection, kept)
            self._answers.append(answer)
            if answer.failure or not kept:
                connection.close()
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, kept: bool) -> Answer:
        version, failure = 0, ""
        try:
            connection.request("GET", "/", headers={} if kept else {"Connection": "close"})
            response = connection.getresponse()
            found = VERSION.match(response.read())
            if response.status != 200 or found is None:
                failure = f"status {response.status}" if found else f"{response.status}, no version"
            else:
                version = int(found[1])
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
        return Answer(time.monotonic(), version, kept, failure)
