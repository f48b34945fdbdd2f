"""Programs that the demo starts: each ends with it, and is told why it did not work."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ROOT / "gitops_hook.py"
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class Broken(Exception):
    """The demo itself cannot go on: something did not start, or did not happen in time."""


def environment(home: Path, **more: str) -> dict[str, str]:
    """What a program sees: no proxies, tokens or settings of whoever runs the demo."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    return {"HOME": str(home), "LANG": "C.UTF-8", "PATH": path, **more}


def run(argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> str:
    """What a program prints; Broken with what it said when it fails."""
    done = subprocess.run(
        argv, cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise Broken(f"{' '.join(argv[:3])} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Program:
    """A program in the background; what it prints and says goes to files.

    It has a session of its own, so that Ctrl-C in the terminal is for the demo alone; if the demo
    dies without stopping it, the kernel tells it to end.
    """

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.log, self.printed = log, log.with_suffix(".out")
        with log.open("ab") as said, self.printed.open("ab") as printed:
            self._process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=said,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - no other thread runs yet
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def stop(self, seconds: float) -> None:
        """End it politely, then by force, with whatever it has left behind."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def end_with_parent() -> None:
    """In the child: ask for a SIGTERM when the process that started it is gone."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
