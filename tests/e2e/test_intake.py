"""Every accepted push becomes one run, whatever is killed and whatever is away."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fleet import Fleet, fleet
from tests.world import Object, eventually

PUSHES = 500
COMMIT = "gitops-hook/commit"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Fleet]:
    """One application whose branches are only tested, and a place for one Job at a time."""
    apps: dict[str, Object] = {"shop": {"environments": [], "test": "sleep 600"}}
    with fleet(tmp_path, apps, limits={"max_running": 1}) as made:
        yield made


def push(world: Fleet, numbers: Sequence[int]) -> set[str]:
    """Announce a commit on a branch of its own for each number; return those that got a 202."""

    def one(number: int) -> tuple[str, int]:
        commit = hashlib.sha256(str(number).encode()).hexdigest()
        answer = world.deliver(world["shop"].repository.bare, f"refs/heads/b{number}", commit)
        return commit, answer.status_code

    with ThreadPoolExecutor(20) as senders:
        return {commit for commit, status in senders.map(one, numbers) if status == 202}


def spooled(world: Fleet) -> set[str]:
    """Return the commits in the spool."""
    commits = set()
    for file in world.spool.glob("*.json"):
        with suppress(FileNotFoundError):  # the daemon may be done with it by now
            commits.add(json.loads(file.read_bytes())["commit"])
    return commits


def commits(world: Fleet) -> Counter[str]:
    """Return how many Jobs each commit has."""
    return Counter(j["metadata"]["annotations"][COMMIT] for j in world.jobs().values())


@pytest.mark.timeout(400)
def test_each_of_500_accepted_pushes_is_one_run_after_kills_before_and_after_the_create(
    world: Fleet,
) -> None:
    world.cluster.down()
    accepted = push(world, range(PUSHES // 2))
    assert (len(accepted), spooled(world), commits(world)) == (PUSHES // 2, accepted, Counter())
    world.kill()  # between fsync and create

    world.start()
    accepted |= push(world, range(PUSHES // 2, PUSHES))
    assert (len(accepted), spooled(world), commits(world)) == (PUSHES, accepted, Counter())
    held = world.fault("hang-after", "create", "jobs", after=120)
    world.cluster.up()
    eventually(lambda: world.cluster.faults.holds(held), 60, "a Job is made, its answer held")
    made = commits(world)
    assert len(made) == 121
    assert spooled(world) == accepted
    world.kill()  # between create and unlink
    world.cluster.faults.lift(held)

    world.start()
    eventually(lambda: len(commits(world)) == PUSHES and not spooled(world), 200, "all are runs")
    assert commits(world) == Counter(accepted)
    assert all(world.created(name) == 1 for name in world.jobs())
