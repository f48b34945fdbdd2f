"""The HTTP/1.1 side of the API server: TLS, kept-alive connections, streams, going away.

One thread for each connection; nothing polls. A client that leaves during a watch is noticed by
one thread that waits on all such sockets together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from urllib.parse import parse_qsl, unquote, urlsplit

LOG = logging.getLogger(__name__)
MAX_BODY = 3 * 1024 * 1024
_PHRASES = {200: "OK", 201: "Created", 202: "Accepted"}


@dataclass(frozen=True)
class HttpRequest:
    """One request as it came in; header names are in lower case."""

    method: str
    target: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    connection: Connection


@dataclass(frozen=True)
class Response:
    """A whole answer."""

    code: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Closed(Exception):
    """The conversation ends here, without (more of) an answer."""


class Connection:
    """One client's connection."""

    def __init__(self, sock: ssl.SSLSocket, leavers: Leavers, going: threading.Event) -> None:
        self.socket = sock
        self.going = going
        self.gone = threading.Event()
        self._leavers = leavers
        self._reader: BufferedReader | None = None
        self._on_gone: list[Callable[[], None]] = []

    def handshake(self) -> None:
        """Do the TLS handshake; OSError when the client does not want to."""
        self.socket.settimeout(10)
        self.socket.do_handshake()
        self.socket.settimeout(None)
        self._reader = self.socket.makefile("rb")

    def read_request(self) -> HttpRequest | None:
        """The next request; None when the client has closed."""
        if self._reader is None:
            return None
        line = self._reader.readline(65_537)
        if not line:
            return None
        method, target, _ = line.decode("latin-1").split(" ", 2)
        headers: dict[str, str] = {}
        while (line := self._reader.readline(65_537)) not in (b"\r\n", b"\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        body = self._read_body(headers)
        return HttpRequest(method, target, unquote(parts.path), query, headers, body, self)

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if self._reader is None:
            raise Closed
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self._reader.read(int(headers.get("content-length", 0)))
        parts = []
        while size := int(self._reader.readline().split(b";")[0], 16):
            parts.append(self._reader.read(size))
            self._reader.readline()
        self._reader.readline()
        return b"".join(parts)

    def send(self, response: Response) -> None:
        """Send a whole answer."""
        self.going.wait()
        lines = [
            f"HTTP/1.1 {response.code} {_PHRASES.get(response.code, 'Status')}",
            f"Content-Type: {response.content_type}",
            f"Content-Length: {len(response.body)}",
            *(f"{name}: {value}" for name, value in response.headers),
            "",
            "",
        ]
        self.socket.sendall("\r\n".join(lines).encode("latin-1") + response.body)

    def begin_stream(self, content_type: str = "application/json") -> None:
        """Start an answer without an end; the client's leaving is noticed from now on."""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked"
        self.socket.sendall(head.encode() + b"\r\n\r\n")
        self.watch_leaving()

    def write_chunk(self, data: bytes) -> None:
        """Send a part of a stream; Closed when nobody listens any more."""
        self.going.wait()
        try:
            self.socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        except OSError as error:
            raise Closed from error

    def end_stream(self) -> None:
        """Finish a stream properly."""
        with contextlib.suppress(OSError):
            self.socket.sendall(b"0\r\n\r\n")

    def watch_leaving(self) -> None:
        """Set `gone` as soon as the client closes its end."""
        self._leavers.watch(self)

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Have something called when the client leaves or the server goes down."""
        self._on_gone.append(callback)
        if self.gone.is_set():
            callback()

    def hang_up(self) -> None:
        """Tell everyone who serves this connection that it is over."""
        self.gone.set()
        for callback in list(self._on_gone):
            callback()

    def stop_watching(self) -> None:
        """The stream or the wait is over: forget what on_gone() was given."""
        self._on_gone.clear()
        self._leavers.forget(self)

    def close(self) -> None:
        """Close the socket and free whoever waits on it."""
        self._leavers.forget(self)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.hang_up()

    def release(self) -> None:
        """Give the file descriptor back; only for the thread that served the connection."""
        self.close()
        if self._reader is not None:
            with contextlib.suppress(OSError):
                self._reader.close()
        self.socket.close()


class Leavers:
    """Waits, in one thread, for clients that close their end during a stream."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._connections: dict[int, Connection] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="standin-leavers", daemon=True)
        self._thread.start()

    def watch(self, connection: Connection) -> None:
        number = connection.socket.fileno()
        if number < 0:
            connection.hang_up()
            return
        with self._lock:
            if number not in self._connections:
                self._connections[number] = connection
                self._epoll.register(number, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget(self, connection: Connection) -> None:
        number = connection.socket.fileno()
        with self._lock:
            if self._connections.get(number) is connection:
                del self._connections[number]
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(number)

    def _run(self) -> None:
        while True:
            for number, _ in self._epoll.poll():
                if number == self._wake:
                    self._epoll.close()
                    os.close(self._wake)
                    return
                with self._lock:
                    connection = self._connections.get(number)
                if connection is not None:
                    connection.hang_up()

    def stop(self) -> None:
        os.eventfd_write(self._wake, 1)
        self._thread.join(5)


@dataclass
class HttpServer:
    """Listens on a loopback port and hands each request to `handler`.

    The handler returns the answer, or None when it has streamed one, or raises Closed.
    """

    context: ssl.SSLContext
    handler: Callable[[HttpRequest], Response | None]
    host: str = "127.0.0.1"
    port: int = 0
    _listener: socket.socket | None = None
    _reserved: socket.socket | None = None
    _connections: set[Connection] = field(default_factory=set)
    _threads: set[threading.Thread] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _leavers: Leavers | None = None
    # while it is not set, connections are made and nothing is answered: a stopped process
    going: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Listen; the port is chosen by the system at the first start."""
        self._leavers = Leavers()
        self.going.set()
        self.up()

    def up(self) -> None:
        """Listen again on the same port."""
        listener = self._reserved or self._bound()
        self._reserved = None
        listener.listen(128)
        self._listener = listener
        self.port = listener.getsockname()[1]
        self._spawn(self._accept, listener)

    def down(self) -> None:
        """Stop listening and cut every connection; the port stays ours."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        self._reserved = self._bound()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()

    def stop(self) -> None:
        """Go down for good and wait for every thread."""
        self.going.set()
        self.down()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(5)
        if self._leavers is not None:
            self._leavers.stop()
            self._leavers = None

    def _bound(self) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.host, self.port))
        return sock

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        def run() -> None:
            try:
                target(*args)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="standin-api", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._spawn(self._serve, sock, listener)

    def _serve(self, raw: socket.socket, listener: socket.socket) -> None:
        leavers = self._leavers
        if leavers is None:
            raw.close()
            return
        sock = self.context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        connection = Connection(sock, leavers, self.going)
        with self._lock:
            self._connections.add(connection)
        try:
            self.going.wait()
            if self._listener is listener:
                connection.handshake()
                for request in self._requests(connection):
                    response = self.handler(request)
                    if response is not None:
                        connection.send(response)
        except (OSError, ValueError, Closed) as error:
            LOG.debug("connection ended: %r", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.release()

    @staticmethod
    def _requests(connection: Connection) -> Iterator[HttpRequest]:
        while not connection.gone.is_set():
            request = connection.read_request()
            if request is None:
                return
            connection.going.wait()
            yield request
