"""What kube-proxy does: connections to a Service go to one of its ready pods.

TCP only. Each connection is given to one ready endpoint, at random, and stays with it until one
side ends; nothing is retried or drained. A Service without ready endpoints refuses connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import struct
import threading
from typing import Any

from tests.standin.slices import SERVICE_LABEL
from tests.standin.store import Event, Store

log = logging.getLogger(__name__)

Object = dict[str, Any]
Address = tuple[str, int]
CHUNK = 1 << 16
BACKLOG = 512
RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Listens on the cluster IPs, in one thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._subscription = store.subscribe(("services", "endpointslices"))
        self._loop = asyncio.new_event_loop()
        self._targets: dict[Address, list[Address]] = {}
        self._listeners: dict[Address, socket.socket] = {}
        self._owned: dict[tuple[str, str], set[Address]] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._serving = threading.Thread(target=self._serve, name="proxy", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="proxy-watch", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._serving.start()
        self._watching.start()

    def stop(self) -> None:
        """Close all listeners and connections."""
        self._subscription.close()
        self._watching.join()
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._serving.join()
        self._loop.close()

    # Following the store

    def _watch(self) -> None:
        while not self._subscription.closed:
            event = self._subscription.next_event()
            if event is not None:
                service = _service_of(event)
                change = self._apply(service, self._read(*service))
                try:
                    asyncio.run_coroutine_threadsafe(change, self._loop).result()
                except OSError as error:
                    log.warning("cannot listen for service %s/%s: %s", *service, error)

    def _read(self, namespace: str, name: str) -> dict[Address, list[Address]]:
        """The Service's own addresses, and where connections to each should go."""
        found: dict[Address, list[Address]] = {}
        stored = self._store.find_stored("services", namespace, name)
        spec = {} if stored is None else stored.object["spec"]
        address = spec.get("clusterIP") or "None"
        if address == "None":
            return found
        for port in spec.get("ports") or []:
            ready = self._endpoints(namespace, name, port.get("name", ""))
            if ready:
                found[address, int(port["port"])] = ready
        return found

    def _endpoints(self, namespace: str, name: str, port: str) -> list[Address]:
        found: list[Address] = []
        for stored in self._store.snapshot("endpointslices", namespace)[0]:
            item = stored.object
            if (item["metadata"].get("labels") or {}).get(SERVICE_LABEL) != name:
                continue
            numbers = [each["port"] for each in item.get("ports") or [] if each["name"] == port]
            found += [
                (endpoint["addresses"][0], number)
                for endpoint in item.get("endpoints") or []
                if endpoint["conditions"].get("ready")
                for number in numbers
            ]
        return found

    # In the proxy's thread

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _apply(self, service: tuple[str, str], wanted: dict[Address, list[Address]]) -> None:
        for address in self._owned.pop(service, set()) - wanted.keys():
            self._targets.pop(address, None)
            if listener := self._listeners.pop(address, None):
                self._close_listener(listener)
        if wanted:
            self._owned[service] = set(wanted)
        for address, targets in wanted.items():
            self._targets[address] = targets
            if address not in self._listeners:
                self._listeners[address] = self._listen(address)

    def _listen(self, address: Address) -> socket.socket:
        listener = socket.socket()
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        self._loop.add_reader(listener, self._accept, address, listener)
        return listener

    def _close_listener(self, listener: socket.socket) -> None:
        self._loop.remove_reader(listener)
        listener.close()

    def _accept(self, address: Address, listener: socket.socket) -> None:
        try:
            near, _ = listener.accept()
        except OSError:
            # Whoever knocked is gone again.
            return
        task = self._loop.create_task(self._carry(address, near))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _carry(self, address: Address, near: socket.socket) -> None:
        """Serve one connection to its end."""
        reader, writer = await asyncio.open_connection(sock=near)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._choose(address))
        except OSError:
            _reset(writer)
            return
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except OSError:
            _reset(writer)
            _reset(far_writer)
        finally:
            writer.close()
            far_writer.close()

    def _choose(self, address: Address) -> Address:
        """A ready endpoint; ConnectionError when there is none any more."""
        targets = self._targets.get(address)
        if not targets:
            raise ConnectionRefusedError(address)
        return random.choice(targets)

    async def _close(self) -> None:
        for listener in self._listeners.values():
            self._close_listener(listener)
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Transports close in the loop's next round.
        await asyncio.sleep(0)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        with contextlib.suppress(OSError):
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side sees a reset, not an end."""
    opened = writer.get_extra_info("socket")
    if opened is not None:
        with contextlib.suppress(OSError):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


def _service_of(event: Event) -> tuple[str, str]:
    meta = event.stored.object["metadata"]
    if event.resource == "services":
        return meta["namespace"], meta["name"]
    return meta["namespace"], (meta.get("labels") or {}).get(SERVICE_LABEL, "")
