"""Trouble on demand: how the API server can misbehave, and what it was asked."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from tests.standin.httpd import Closed, Connection

ACTIONS = frozenset({"refuse", "hang", "hang-after", "409", "429", "500", "drop-watch", "forbid"})


@dataclass(frozen=True)
class Request:
    """One request as the server understood and answered it; code 0: it never answered."""

    verb: str
    resource: str
    namespace: str
    name: str
    user: str
    code: int
    seconds: float
    path: str = ""
    manager: str = ""


@dataclass(frozen=True)
class Fault:
    """Which requests go wrong, and how.

    `resource` is the plural, with `/log`, `/status` and the like for subresources, and
    `discovery` for /api, /apis, /openapi and /version; `verb` as in RBAC. None matches all.
    `action`: refuse (the connection closes without an answer), hang (never answered), hang-after
    (done, then never answered), 409, 429, 500, forbid (answered so), drop-watch (open, but silent
    after `seconds`). A hang ends after `seconds`, at clear(), or when the client leaves.
    `path_contains` looks at path and query as they were sent, selectors among them.
    `times` None: always. `after`: so many matching requests pass first.
    """

    action: str
    verb: str | None = None
    resource: str | None = None
    namespace: str | None = None
    name: str | None = None
    times: int | None = 1
    seconds: float | None = None
    after: int = 0
    body_contains: str | None = None
    path_contains: str | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action!r}, not one of {sorted(ACTIONS)}")

    def matches(self, request: Request, body: bytes) -> bool:
        """Whether this request is meant."""
        wanted = (
            (self.verb, request.verb),
            (self.resource, request.resource),
            (self.namespace, request.namespace),
            (self.name, request.name),
            (self.user, request.user),
        )
        if any(want is not None and want != has for want, has in wanted):
            return False
        if self.action == "drop-watch" and request.verb != "watch":
            return False
        if self.path_contains is not None and self.path_contains not in request.path:
            return False
        return self.body_contains is None or self.body_contains.encode() in body


@dataclass
class _Armed:
    fault: Fault
    pass_first: int
    left: int | None


@dataclass
class Faults:
    """The faults that are armed, and the log of every request."""

    _armed: list[_Armed] = field(default_factory=list)
    _log: deque[Request] = field(default_factory=lambda: deque(maxlen=100_000))
    _waiting: dict[threading.Event, Fault] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fault: Fault) -> Fault:
        """Arm a fault; several are tried in the order they were added."""
        with self._lock:
            self._armed.append(_Armed(fault, fault.after, fault.times))
        return fault

    def clear(self) -> None:
        """Disarm everything and let hanging requests go on."""
        with self._lock:
            self._armed.clear()
            waiting = list(self._waiting)
        for event in waiting:
            event.set()

    def lift(self, fault: Fault) -> None:
        """Disarm one fault and let the requests that hang by it go on."""
        with self._lock:
            self._armed = [armed for armed in self._armed if armed.fault is not fault]
            waiting = [event for event, cause in self._waiting.items() if cause is fault]
        for event in waiting:
            event.set()

    def met(self, fault: Fault) -> bool:
        """Whether a request has met an armed fault."""
        with self._lock:
            return any(armed.fault is fault and armed.left != fault.times for armed in self._armed)

    def holds(self, fault: Fault) -> bool:
        """Whether a request hangs by this fault now."""
        with self._lock:
            return any(cause is fault for cause in self._waiting.values())

    @property
    def log(self) -> list[Request]:
        """Every request so far, in the order of the answers."""
        with self._lock:
            return list(self._log)

    def forget(self) -> None:
        """Empty the log."""
        with self._lock:
            self._log.clear()

    def note(self, request: Request) -> None:
        """Add a request to the log."""
        with self._lock:
            self._log.append(request)

    def take(self, request: Request, body: bytes) -> Fault | None:
        """The fault that this request meets, used up by one."""
        if not self._armed:
            return None
        with self._lock:
            for armed in self._armed:
                if armed.left == 0 or not armed.fault.matches(request, body):
                    continue
                if armed.pass_first:
                    armed.pass_first -= 1
                    continue
                if armed.left is not None:
                    armed.left -= 1
                return armed.fault
        return None

    def hang(self, connection: Connection, fault: Fault, seconds: float | None) -> None:
        """Wait until lift(), clear() or the time is over; Closed when the client leaves before."""
        release = threading.Event()
        with self._lock:
            if not any(armed.fault is fault for armed in self._armed):
                return  # lifted since the request met it
            self._waiting[release] = fault
        connection.on_gone(release.set)
        connection.watch_leaving()
        release.wait(seconds)
        with self._lock:
            self._waiting.pop(release, None)
        if connection.gone.is_set():
            raise Closed
        connection.stop_watching()
