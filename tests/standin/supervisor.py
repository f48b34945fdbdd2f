"""Starts the pods' processes and ends every one of them when the stand-in is gone.

A program of its own, run by processes.py as `python -I -S supervisor.py`: it has one thread, so
forking is safe and quick, it is the reaper of whatever a container leaves behind, and the end of
its standard input (the stand-in was stopped, or killed) is the end of all containers. It also
does what the kernel does for the first process of a container: a signal whose action is the
default one is not delivered, and when that process ends, everything it started ends.

Standard input and output carry one JSON object a line:
`{"op": "start", "id", "argv", "env", "cwd", "log", "memory"}` → `{"id", "pid"}` or
`{"id", "error"}`; `{"op": "signal", "id", "signal"}`; later `{"id", "exit", "out_of_memory"}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
MEMORY_POLL_SECONDS = 0.5
# What a process needs besides its own pages; a container's cgroup does not count all of it.
SHARED_ALLOWANCE = 24 << 20
# A container that was started a moment ago gets the chance to say that it handles a signal: on a
# real node its start alone takes longer than an interpreter needs to get there.
YOUNG_SECONDS = 1.5
SIGNAL_POLL_SECONDS = 0.02
BLOCKS_ALL = 40
# What an interpreter ignores is not for its children to inherit.
DEFAULT_SIGNALS = (
    signal.SIGCHLD,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGPIPE,
    signal.SIGTERM,
    signal.SIGXFSZ,
)
PAGE = os.sysconf("SC_PAGE_SIZE")


class Supervisor:
    """The loop over requests and ended children."""

    def __init__(self) -> None:
        self.running: dict[int, dict[str, Any]] = {}
        self.pids: dict[int, int] = {}
        self.unsent: list[tuple[int, int]] = []
        self.unread = b""
        self.next_poll = 0.0

    def run(self) -> None:
        """Serve until standard input ends, then kill all that is left."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        os.set_blocking(reading, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        while True:
            ready, _, _ = select.select([0, reading], [], [], self._patience())
            if reading in ready:
                os.read(reading, 4096)
            self._reap()
            if 0 in ready and not self._read():
                break
            self._watch_memory()
            unsent, self.unsent = self.unsent, []
            for container, sent in unsent:
                self._signal(container, sent)
        self._end()

    def _patience(self) -> float | None:
        if self.unsent:
            return SIGNAL_POLL_SECONDS
        limited = any(item["memory"] for item in self.running.values())
        return MEMORY_POLL_SECONDS if limited else None

    def _read(self) -> bool:
        data = os.read(0, 1 << 16)
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if request["op"] == "start":
                self._start(request)
            else:
                self._signal(request["id"], request["signal"])
        return bool(data)

    def _start(self, request: dict[str, Any]) -> None:
        number, argv, env = request["id"], request["argv"], request["env"]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, request["log"], flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        try:
            os.chdir(request["cwd"])
            pid = os.posix_spawn(
                argv[0],
                request["argv0"] + argv[1:],
                env,
                file_actions=actions,
                setsid=True,
                setsigmask=[],
                setsigdef=DEFAULT_SIGNALS,
            )
        except OSError as error:
            self._answer({"id": number, "error": error.strerror or str(error)})
            return
        finally:
            os.chdir("/")
        item = {"pid": pid, "memory": request["memory"], "killed": False}
        self.running[number] = {**item, "since": time.monotonic()}
        self.pids[pid] = number
        self._answer({"id": number, "pid": pid})

    def _signal(self, number: int, sent: int) -> None:
        item = self.running.get(number)
        if item is None:
            return
        if sent == signal.SIGKILL:
            _kill_group(item["pid"])
        elif _catches(item["pid"], sent):
            os.kill(item["pid"], sent)
        elif time.monotonic() - item["since"] < YOUNG_SECONDS:
            self.unsent.append((number, sent))

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self.pids.pop(pid, None)
            if number is None:
                continue
            item = self.running.pop(number)
            _end_group(pid)
            code = os.waitstatus_to_exitcode(status)
            limit = item["memory"]
            peak = usage.ru_maxrss * 1024
            over = item["killed"] or bool(limit and peak > limit + SHARED_ALLOWANCE)
            code = 137 if over else code if code >= 0 else 128 - code
            self._answer({"id": number, "exit": code, "out_of_memory": over})

    def _watch_memory(self) -> None:
        if time.monotonic() < self.next_poll:
            return
        self.next_poll = time.monotonic() + MEMORY_POLL_SECONDS * 0.9
        for item in self.running.values():
            if item["memory"] and _own_memory(item["pid"]) > item["memory"] + SHARED_ALLOWANCE:
                item["killed"] = True
                _kill_group(item["pid"])

    def _answer(self, answer: dict[str, Any]) -> None:
        # The stand-in may be gone already; the end of standard input then tells the rest.
        with contextlib.suppress(BrokenPipeError):
            os.write(1, json.dumps(answer).encode() + b"\n")

    def _end(self) -> None:
        for item in self.running.values():
            _kill_group(item["pid"])
        # Processes that left their container's session are re-parented to this one.
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and (left := _children(os.getpid())):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end_group(pid: int) -> None:
    """Kill what the container's first process left behind, and wait until its ports are free."""
    _kill_group(pid)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-pid, 0)


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for this signal, or blocks it to wait for it.

    A shell blocks everything for the moment of a fork; that is not waiting.
    """
    found = {"SigBlk": 0, "SigCgt": 0}
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            for line in status:
                name, _, value = line.partition(":")
                if name in found:
                    found[name] = int(value, 16)
    except OSError:
        return False
    blocked = found["SigBlk"] if found["SigBlk"].bit_count() < BLOCKS_ALL else 0
    return bool((blocked | found["SigCgt"]) >> (number - 1) & 1)


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as listing:
            return [int(item) for item in listing.read().split()]
    except OSError:
        return []


def _own_memory(pid: int) -> int:
    """Bytes of memory that the process and its children do not share with files."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            _, resident, shared, *_ = statm.read().split()
    except (OSError, ValueError):
        return 0
    own = (int(resident) - int(shared)) * PAGE
    return own + sum(_own_memory(child) for child in _children(pid))


if __name__ == "__main__":
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        sys.exit("cannot become the reaper of the pods' processes")
    Supervisor().run()
