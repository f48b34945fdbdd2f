"""A process of its own that opens many connections to a port, until its stdin closes.

`python -m tests.e2e.flood PORT CONNECTIONS BYTES` announces a body of BYTES on each, with headers
as an authentic delivery has them, and sends all of it but the last byte; with 0 bytes it does not
even end its headers. It prints "there" when nothing more can be sent.
"""

from __future__ import annotations

import resource
import selectors
import socket
import sys
import time

QUIET = 2.0  # seconds in which nothing was taken any more
HEAD = """POST /webhook HTTP/1.1\r
Host: hooks\r
Content-Type: application/json\r
webhook-id: {number}\r
webhook-timestamp: {now}\r
webhook-signature: v1,AAAA\r
Content-Length: {size}\r
"""


def connections(port: int, many: int) -> list[socket.socket]:
    """Open connections; of those that are refused there are fewer."""
    made = []
    for _ in range(many):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
        made.append(one)
        time.sleep(0.0005)  # the queue of a listening socket is short
    return made


def send(made: list[socket.socket], size: int) -> None:
    """Send on each what it has to send, as long as anything is taken."""
    chooser, last = selectors.DefaultSelector(), time.monotonic()
    for number, one in enumerate(made):
        head = HEAD.format(number=number, now=int(time.time()), size=size).encode()
        body = b"\r\n" + b"x" * (size - 1) if size else b""
        chooser.register(one, selectors.EVENT_WRITE, memoryview(head + body))
    while chooser.get_map() and time.monotonic() - last < QUIET:
        for key, _ in chooser.select(0.2):
            one = key.fileobj
            assert isinstance(one, socket.socket)
            try:
                left = key.data[one.send(key.data[:65536]) :]
                last = time.monotonic()
            except BlockingIOError:
                continue
            except OSError:
                chooser.unregister(one)
                continue
            if left:
                chooser.modify(one, selectors.EVENT_WRITE, left)
            else:
                chooser.unregister(one)


def main(port: int, many: int, size: int) -> None:
    """Open, send, and stay."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    made = connections(port, many)
    send(made, size)
    print("there", flush=True)
    sys.stdin.read()
    for one in made:
        one.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
