"""A process of its own that weighs another one with all its children until its stdin closes.

`python -m tests.e2e.weigh PID` says "weighing", and at the end one line of JSON: the most memory
that the session of PID had at one time, pages that several share counted once (PSS), and the most
that it had in files that are open but have no name. What grows beyond LIMIT is killed, as a
container's is.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.world import session_members

PAUSE = 0.05
LIMIT = 1_200_000_000


def pss(pid: int) -> int:
    """Return the memory of a process in bytes: its own, and its share of what is shared."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n"):
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def nameless(pid: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield each file that a process holds open and that was deleted, with the bytes on disk."""
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found = os.stat(entry.path)
                if not found.st_nlink:
                    yield (found.st_dev, found.st_ino), found.st_blocks * 512


def main(leader: int) -> None:
    """Weigh until stdin is closed, then say what was seen."""
    memory = files = 0
    killed = False
    print("weighing", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        began = time.monotonic()
        members = session_members(leader)
        weights = {pid: pss(pid) for pid in members}
        memory = max(memory, sum(weights.values()))
        files = max(files, sum(dict(f for pid in members for f in nameless(pid)).values()))
        if sum(weights.values()) > LIMIT:
            killed = True
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(max(0.0, began + PAUSE - time.monotonic()))
    print(json.dumps({"memory": memory, "files": files, "killed": killed}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
