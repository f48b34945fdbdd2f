"""Python programs in the stand-in's pods: what listens and connects stays in the pod.

A pod has a network namespace of its own, a process of the stand-in has not: two pods that listen
on 0.0.0.0:8080 would meet. So "all interfaces" means the pod's own address, and 127.0.0.1 means it
too where something of the pod listens there. This is on PYTHONPATH of containers that declare
ports, and of those in a pod with services.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _SocketLoader(Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _narrow(module)


class _Finder(MetaPathFinder):
    """Wraps the loading of `socket`, once; nothing else is touched or imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "socket":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _SocketLoader(spec.loader)
        return spec


def _narrow(socket: Any) -> None:
    own = os.environ.get("POD_IP", "")
    bind = socket.socket.bind
    connect = socket.socket.connect

    def bind_to_pod(self: Any, address: Any) -> None:
        if own and isinstance(address, tuple) and address[0] in ("", "0.0.0.0", "::"):
            host = own
            if self.family == socket.AF_INET6:
                self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                host = f"::ffff:{own}"
            address = (host, *address[1:])
        bind(self, address)

    def connect_in_pod(self: Any, address: Any) -> None:
        local = own and isinstance(address, tuple) and address[0] in ("127.0.0.1", "localhost")
        if local and self.type == socket.SOCK_STREAM and self.gettimeout() != 0:
            try:
                connect(self, (own, *address[1:]))
            except ConnectionRefusedError:
                # What a container serves on 127.0.0.1 alone, or a test on this machine. The first
                # call after a refusal may only say so once more.
                with suppress(ConnectionAbortedError):
                    connect(self, address)
                    return
                connect(self, address)
        else:
            connect(self, address)

    socket.socket.bind = bind_to_pod
    socket.socket.connect = connect_in_pod


if "socket" in sys.modules:
    _narrow(sys.modules["socket"])
else:
    sys.meta_path.insert(0, _Finder())
