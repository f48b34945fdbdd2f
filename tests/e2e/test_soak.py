"""Many pushes with passing trouble: every head is deployed or ended by a verdict, nothing is stuck.

`make soak` announces 1,000 pushes of five applications; `-m short` some 60. The trouble is of the
kinds that are nobody's fault: a git server that is behind or away, a registry that refuses once, a
full quota, a Job that somebody deletes, a daemon that is killed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fleet import IMAGE, Fleet, Member, fleet
from tests.hurried import hurried
from tests.world import Object, eventually

NAMES = [f"soak-{letter}" for letter in "abcde"]
SEED = 20
VERDICTS = {"TestsFailed", "SmokeFailed", "ManifestInvalid"}


class Owner:
    """Pushes versions of one application, some of which are bad."""

    def __init__(self, app: Member, draw: random.Random) -> None:
        self.app = app
        self.draw = draw
        self.pushed: list[str] = []  # the runs, oldest first
        self.version = ""
        self.head = ""
        self.expected = ""  # how the newest run must end

    def push(self, *, behind: bool) -> None:
        """Release the next version; the git server may show it only after it was announced."""
        self.version = f"{self.app.name}-{len(self.pushed)}"
        modes, self.expected = self.draw.choice([("", "Ok")] * 8 + [("smoke-fails", "SmokeFailed")])
        commit = self.app.commit(self.version, modes=modes)
        git = self.app.repository.git
        before = self.head or "0" * 40
        if not behind:
            git("push", "-q", "-f", "origin", "main")
        self.pushed.append(self.app.push(commit, before=before))
        self.head = commit
        if behind:
            git("push", "-q", "-f", "origin", "main")


class Trouble:
    """The kinds of passing trouble, each lasting for a block."""

    def __init__(self, made: Fleet, draw: random.Random) -> None:
        self.made = made
        self.draw = draw
        self.kinds: list[Callable[[], object]] = [
            self.full_quota, self.away, self.refused_pull, self.deleted_job, self.killed,
        ]  # fmt: skip

    @contextmanager
    def some(self) -> Iterator[str]:
        """Let one kind happen during the block; yield its name."""
        kind = self.draw.choice(self.kinds)
        with kind():  # type: ignore[attr-defined]
            yield kind.__name__

    @contextmanager
    def full_quota(self) -> Iterator[None]:
        """Let no pod be created in production."""
        body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}}
        text = json.dumps({**body, "spec": {"hard": {"pods": "0"}}})
        assert self.made.kubectl("apply", "-n", "production", "-f", "-", stdin=text).code == 0
        try:
            yield
        finally:
            args = ("delete", "resourcequota", "full", "-n", "production")
            assert self.made.kubectl(*args).code == 0

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let a git server be away."""
        bare = self.draw.choice([*self.made.apps.values()]).repository.bare
        moved = bare.with_name("away.git")
        bare.rename(moved)
        try:
            yield
        finally:
            moved.rename(bare)

    @contextmanager
    def refused_pull(self) -> Iterator[None]:
        """Let the registry refuse what is pulled."""
        text = f'failed to resolve reference "{IMAGE}": no basic auth credentials'
        self.made.cluster.images.break_pull(self.made.image, text)
        try:
            yield
        finally:
            self.made.cluster.images.break_pull(self.made.image, None)

    @contextmanager
    def deleted_job(self) -> Iterator[None]:
        """Let somebody delete a Job."""
        yield
        if jobs := [*self.made.jobs()]:
            args = ("delete", "job", self.draw.choice(jobs), "-n", "test", "--ignore-not-found")
            self.made.kubectl(*args)

    @contextmanager
    def killed(self) -> Iterator[None]:
        """Kill the daemon, and start it again."""
        yield
        self.made.kill()
        self.made.start()


def record(made: Fleet, app: str, run: str) -> Object:
    """Return what is recorded of a run."""
    held = made.cluster.store.find("configmaps", "orchestration", f"gitops-hook-{app}") or {}
    entry: Object = json.loads((held.get("data") or {}).get(f"run-{run}", "{}"))
    return entry


def settled(made: Fleet, owner: Owner) -> bool:
    """Whether an application's newest push has ended for good, as it must."""
    entry = record(made, owner.app.name, owner.pushed[-1])
    return bool(entry.get("outcome")) and not entry.get("next_try") and entry["reason"] != "NotHead"


def stuck(made: Fleet) -> list[str]:
    """Return what is left to do anywhere."""
    left = [f"claim of {app.name}" for app in made.apps.values() if app.note("deploying")]
    for namespace in ("test", "build"):
        for name, job in made.jobs(namespace).items():
            if "gitops-hook/outcome" not in job["metadata"]["annotations"]:
                left.append(f"Job {name}")
    return left + [f"stored push {path.name}" for path in made.spool.glob("*.json")]


def soak(made: Fleet, pushes: int) -> Counter[str]:
    """Announce so many pushes while trouble comes and goes; return how often each kind came."""
    draw = random.Random(SEED)
    owners = [Owner(made[name], draw) for name in NAMES]
    trouble = Trouble(made, draw)
    kinds: Counter[str] = Counter()
    done = 0
    while done < pushes:
        with trouble.some() as kind:
            kinds[kind] += 1
            for owner in draw.sample(owners, 4):
                if not owner.app.repository.bare.exists():
                    continue  # its server is away: nobody can push there
                owner.push(behind=draw.random() < 0.2)
                done += 1
        # some trouble finds a quiet moment, some a rollout under way
        if draw.random() < 0.3:
            eventually(lambda: settled(made, owners[0]) if owners[0].pushed else True, 120)
    for owner in owners:
        eventually(
            lambda owner=owner: settled(made, owner), 240,
            f"{owner.pushed[-1]} ends for good: {record(made, owner.app.name, owner.pushed[-1])}",
        )  # fmt: skip
    eventually(lambda: not stuck(made), 120, f"nothing is left: {stuck(made)}")
    for owner in owners:
        last = record(made, owner.app.name, owner.pushed[-1])
        assert last["reason"] == owner.expected, (owner.pushed[-1], last)
        if owner.expected == "Ok":
            assert owner.app.answer()["version"] == owner.version
    return kinds


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pushes", [pytest.param(60, marks=pytest.mark.short), pytest.param(1000)])
def test_every_head_is_deployed_or_ended_by_a_verdict_whatever_comes_and_goes(
    tmp_path: Path, pushes: int
) -> None:
    program = hurried(tmp_path, ROLLOUT_PER_REPLICA="5.0")
    names: dict[str, Object] = {
        name: {"rollout_timeout": "8s", "bake": "500ms", "drain": "0s"} for name in NAMES
    }
    with fleet(tmp_path, names, program=program) as made:
        kinds = soak(made, pushes)
        assert len(kinds) == 5
        # what broke on the way was contained: no thread ended by a bug
        assert not made.said("a thread failed")
