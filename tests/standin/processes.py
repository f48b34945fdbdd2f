"""The containers' processes, started and ended through the supervisor."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SUPERVISOR = Path(__file__).with_name("supervisor.py")
START_SECONDS = 30.0


@dataclass(frozen=True)
class Exit:
    """How a process ended, in the numbers that a container's status uses."""

    code: int
    out_of_memory: bool = False


class StartError(Exception):
    """The program could not be executed."""


@dataclass(frozen=True)
class Command:
    """What to execute, and where."""

    argv: list[str]
    env: dict[str, str]
    cwd: Path
    log: Path
    memory: int | None = None


class Process:
    """One started process; `wait` returns its Exit."""

    def __init__(self, number: int, on_exit: Callable[[Exit], None] | None) -> None:
        self.number = number
        self.pid = 0
        self.error = ""
        self.exit: Exit | None = None
        self._on_exit = on_exit
        self.started = threading.Event()
        self._ended = threading.Event()

    def wait(self, timeout: float | None = None) -> Exit | None:
        """How it ended; None when it still runs after that time."""
        self._ended.wait(timeout)
        return self.exit

    def finish(self, how: Exit) -> None:
        """Note the end, and tell whoever asked to be told."""
        self.exit = how
        self._ended.set()
        if self._on_exit is not None:
            self._on_exit(how)


class Processes:
    """All processes of one cluster; `close` ends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: dict[int, Process] = {}
        self._next = 0
        self._closed = False
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SUPERVISOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="processes", daemon=True)
        self._reader.start()

    def start(self, command: Command, on_exit: Callable[[Exit], None] | None = None) -> Process:
        """Execute a command in a session of its own; StartError when that is not possible."""
        path = command.env.get("PATH", os.defpath)
        program = command.argv[0]
        found = shutil.which(program, path=path) if "/" not in program else program
        if found is None:
            raise StartError(f'exec: "{program}": executable file not found in $PATH')
        if not os.path.isabs(found):
            found = str(command.cwd / found)
        with self._lock:
            self._next += 1
            process = Process(self._next, on_exit)
            self._processes[process.number] = process
        self._send(
            {
                "op": "start",
                "id": process.number,
                "argv": [found, *command.argv[1:]],
                "argv0": [program],
                "env": command.env,
                "cwd": str(command.cwd),
                "log": str(command.log),
                "memory": command.memory,
            }
        )
        if not process.started.wait(START_SECONDS):
            raise StartError("the supervisor of the processes does not answer")
        if process.error:
            raise StartError(f'exec: "{program}": {process.error.lower()}')
        return process

    def signal(self, process: Process, number: int) -> None:
        """Send a signal to the first process; SIGKILL goes to all of the container."""
        self._send({"op": "signal", "id": process.number, "signal": int(number)})

    def close(self) -> None:
        """Kill everything and wait until it is gone."""
        with self._lock:
            self._closed = True
            if self._supervisor.stdin is not None:
                self._supervisor.stdin.close()
        self._supervisor.wait()
        self._reader.join()
        if self._supervisor.stdout is not None:
            self._supervisor.stdout.close()

    def _send(self, request: dict[str, Any]) -> None:
        data = memoryview(json.dumps(request).encode() + b"\n")
        with self._lock:
            if self._closed or self._supervisor.stdin is None:
                raise StartError("the cluster is stopping")
            while data:
                data = data[self._supervisor.stdin.write(data) :]

    def _read(self) -> None:
        assert self._supervisor.stdout is not None
        unread = b""
        while data := os.read(self._supervisor.stdout.fileno(), 1 << 16):
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                self._note(json.loads(line))
        self._abandon()

    def _note(self, answer: dict[str, Any]) -> None:
        number = answer["id"]
        with self._lock:
            process = self._processes.get(number)
            if "exit" in answer or "error" in answer:
                self._processes.pop(number, None)
        if process is None:
            return
        if "exit" in answer:
            process.finish(Exit(answer["exit"], answer["out_of_memory"]))
            return
        process.pid = answer.get("pid", 0)
        process.error = answer.get("error", "")
        process.started.set()

    def _abandon(self) -> None:
        """The supervisor has ended, and with it every process."""
        with self._lock:
            left, self._processes = list(self._processes.values()), {}
            stopping = self._closed
        if left and not stopping:
            log.error("the supervisor ended; %d processes are lost", len(left))
        for process in left:
            process.error = process.error or "the supervisor has ended"
            process.started.set()
            process.finish(Exit(137))
