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
    chooser, body = selectors.DefaultSelector(), memoryview(b"x" * max(0, size - 1))
    for number, one in enumerate(made):
        head = HEAD.format(number=number, now=int(time.time()), size=size) + "\r\n" * bool(size)
        chooser.register(one, selectors.EVENT_WRITE, [memoryview(head.encode()), body])
    last = time.monotonic()
    while chooser.get_map() and time.monotonic() - last < QUIET:
        for key, _ in chooser.select(0.2):
            one, left = key.fileobj, key.data
            assert isinstance(one, socket.socket)
            try:
                left[0] = left[0][one.send(left[0][:65536]) :]
                last = time.monotonic()
            except BlockingIOError:
                continue
            except OSError:
                chooser.unregister(one)
                continue
            if not left[0]:
                del left[0]
            if not left or not left[0]:
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
