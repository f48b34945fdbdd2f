"""The owner of the sample application: commits and pushes with git, as anybody would."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.demo.processes import environment, run

HERE = Path(__file__).parent
SAMPLE = HERE / "app"
CHANGES = HERE / "changes"
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", ".pytest_cache")


@dataclass(frozen=True)
class Commit:
    """A commit that was pushed."""

    sha: str
    title: str
    version: int


class Owner:
    """A bare repository, and a clone of it that one person works in."""

    def __init__(self, directory: Path) -> None:
        self.repository = directory / "shop.git"
        self._clone = directory / "owner"
        person = {"NAME": "Olive Owner", "EMAIL": "olive@example.com"}
        who = {f"GIT_{role}_{k}": v for role in ("AUTHOR", "COMMITTER") for k, v in person.items()}
        self._env = environment(
            directory, GIT_CONFIG_NOSYSTEM="1", GIT_CONFIG_GLOBAL="/dev/null", **who
        )
        self._git("init", "--quiet", "--bare", "--initial-branch=main", str(self.repository))
        self._git("init", "--quiet", "--initial-branch=main", str(self._clone))
        self._git("remote", "add", "origin", str(self.repository), cwd=self._clone)

    def push_first(self) -> Commit:
        """Commit the sample application as it is."""
        shutil.copytree(SAMPLE, self._clone, dirs_exist_ok=True, ignore=LEFT_BEHIND)
        return self._push("open the shop", 1)

    def push_change(self, version: int) -> Commit:
        """Commit the change that makes this version."""
        (change,) = CHANGES.glob(f"{version}-*.patch")
        self._git("apply", str(change), cwd=self._clone)
        return self._push(change.stem.partition("-")[2].replace("-", " "), version)

    def _push(self, title: str, version: int) -> Commit:
        self._git("add", "--all", cwd=self._clone)
        self._git("commit", "--quiet", "--message", title, cwd=self._clone)
        self._git("push", "--quiet", "origin", "main", cwd=self._clone)
        return Commit(self._git("rev-parse", "HEAD", cwd=self._clone).strip(), title, version)

    def _git(self, *args: str, cwd: Path | None = None) -> str:
        return run(["git", *args], cwd or self.repository.parent, self._env)
