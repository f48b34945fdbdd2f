"""Loopback addresses of one cluster: a /16 of its own, pods in one half, services in the other."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress

# Whoever listens here owns 127.N.0.0/16; any port would do that is the same for all clusters.
LOCK_PORT = 47621
FIRST_SERVICE_BLOCK = 128


class NoAddresses(RuntimeError):
    """No loopback network is free, or all addresses of this one are taken."""


class Addresses:
    """Hands out 127.N.x.y; two clusters on one machine never share N."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: set[str] = set()
        self._next = {"pod": 0, "service": 0}
        self.network, self._claim = _claim()

    def pod(self) -> str:
        """A free address for a pod."""
        return self._take("pod", 0)

    def service(self) -> str:
        """A free address for a Service."""
        return self._take("service", FIRST_SERVICE_BLOCK)

    def host(self) -> str:
        """The node's own address."""
        return f"127.{self.network}.127.254"

    def reserve(self, address: str) -> bool:
        """Take this address; False when somebody has it or it is not of this network."""
        with self._lock:
            if address in self._used or not address.startswith(f"127.{self.network}."):
                return False
            self._used.add(address)
            return True

    def release(self, address: str) -> None:
        """Give an address back."""
        with self._lock:
            self._used.discard(address)

    def close(self) -> None:
        """Let others use the network."""
        self._claim.close()

    def _take(self, kind: str, first_block: int) -> str:
        size = 127 * 250
        with self._lock:
            for _ in range(size):
                number = self._next[kind]
                self._next[kind] = (number + 1) % size
                block, host = divmod(number, 250)
                address = f"127.{self.network}.{first_block + block}.{host + 2}"
                if address not in self._used:
                    self._used.add(address)
                    return address
        raise NoAddresses(f"all {kind} addresses of 127.{self.network}.0.0/16 are taken")


def _claim() -> tuple[int, socket.socket]:
    networks = random.sample(range(2, 254), 252)
    for network in networks:
        claim = socket.socket()
        with suppress(OSError):
            claim.bind((f"127.{network}.255.254", LOCK_PORT))
            claim.listen(1)
            return network, claim
        claim.close()
    raise NoAddresses("no 127.N.0.0/16 is free")
