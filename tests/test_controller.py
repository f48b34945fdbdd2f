"""What becomes of pushes, whatever happens: the daemon on a stand-in cluster, its queue in Jobs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from tests.fleet import Fleet, Gate, fleet
from tests.hurried import hurried
from tests.world import Object, daemon_config, eventually, world

NOTHING = "0" * 40
PYTEST = "python -m pytest -q -p no:cacheprovider tests/ --junitxml=$JUNIT_XML"


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """What the tests of the applications named gated wait for."""
    return Gate(tmp_path_factory.mktemp("gate") / "gate")


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory, gate: Gate) -> Iterator[Fleet]:
    """Applications in a cluster where one Job may run at a time."""
    plain: Object = {"bake": "1s"}
    held = {**plain, "test": gate.command}
    named = {
        "queue": {**held, "environments": []},
        "twice": held,
        "older": held,
        "branchy": plain,
        "noimage": {**plain, "test_image": "registry.example.com/no/such:1"},
        "quota": {**plain, "environments": []},
        "noroom": {**plain, "environments": []},
        "gone": {**plain, "environments": []},
        "gated": {**held, "environments": []},
        "again": plain,
        "back": plain,
        "outage": plain,
        "git": plain,
        "spool": {**plain, "environments": []},
        "poll": plain,
    }
    directory = tmp_path_factory.mktemp("controller")
    # what one test has left, and lost its Job for that, must not come back into the only slot
    program = hurried(directory, TRY_DELAYS="(3600.0, 3600.0)")
    with fleet(directory, named, program=program, limits={"max_running": 1}) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a test that failed half-way not hold the only slot for the tests after it."""
    yield
    if "apps" in request.fixturenames:
        apps: Fleet = request.getfixturevalue("apps")
        for name, manifest in apps.jobs().items():
            if "gitops-hook/outcome" not in manifest["metadata"]["annotations"]:
                apps.cluster.store.delete("jobs", "test", name)
        # a shell that was stopped ends a little later, and would take the pass of the next test
        eventually(partial(no_pod_runs, apps), 30, "no pod of a test runs")


def no_pod_runs(apps: Fleet) -> bool:
    """Whether every pod of a test has ended."""
    pods = apps.cluster.store.list("pods", "test")
    return not [p for p in pods if p.get("status", {}).get("phase") in ("Pending", "Running")]


def job(apps: Fleet, run: str) -> Object:
    """Return the test Job of a run; an empty mapping when there is none."""
    return apps.jobs().get(f"test-{run}", {})


def unsuspended(apps: Fleet, run: str) -> bool:
    """Whether a run's test Job was unsuspended."""
    return bool(job(apps, run)) and not job(apps, run)["spec"].get("suspend")


# Deciding.


def test_waiting_runs_are_unsuspended_newest_first_and_one_at_a_time(
    apps: Fleet, gate: Gate
) -> None:
    queue = apps["queue"]
    first = queue.go("one", branch="one")
    eventually(lambda: unsuspended(apps, first), what="the first may run")
    second = queue.go("two", branch="two")
    third = queue.go("three", branch="three")
    eventually(lambda: job(apps, second) and job(apps, third), what="both are queued")
    assert not unsuspended(apps, second)
    assert not unsuspended(apps, third)
    gate.open()
    eventually(lambda: unsuspended(apps, third), what="the newest may run")
    assert not unsuspended(apps, second)
    gate.open()
    gate.open()
    assert {apps.ended(run)["outcome"] for run in (first, second, third)} == {"tested"}


def test_of_two_quick_pushes_the_older_never_reaches_production(apps: Fleet, gate: Gate) -> None:
    twice = apps["twice"]
    older = twice.go("v1")
    eventually(lambda: unsuspended(apps, older), what="its tests run")
    newer = twice.go("v2")
    eventually(lambda: job(apps, newer), what="the newer is queued")
    gate.open()
    ended = apps.ended(older)
    assert (ended["outcome"], ended["reason"]) == ("superseded", "NotHead")
    gate.open()
    assert apps.ended(newer)["outcome"] == "deployed"
    assert [e["run"] for e in twice.note("history")] == [newer]


def test_a_superseded_run_that_waits_is_never_unsuspended(apps: Fleet, gate: Gate) -> None:
    blocker = apps["queue"].go("blocks", branch="blocks")
    eventually(lambda: unsuspended(apps, blocker), what="the only slot is taken")
    older = apps["older"].go("v1")
    eventually(lambda: job(apps, older), what="it is queued")
    newer = apps["older"].go("v2")
    eventually(lambda: job(apps, newer), what="so is the newer one")
    gate.open()
    eventually(lambda: unsuspended(apps, newer), what="the newer one has its slot")
    gate.open()
    assert apps.ended(newer)["outcome"] == "deployed"
    assert apps.ended(older)["outcome"] == "superseded"
    assert "startTime" not in job(apps, older).get("status", {})


def test_a_test_only_branch_is_tested_and_never_deployed(apps: Fleet) -> None:
    branchy = apps["branchy"]
    ended = branchy.deployed("v1", branch="feature/x")
    assert (ended["outcome"], ended["ref"]) == ("tested", "refs/heads/feature/x")
    assert not branchy.leftovers()


def test_a_test_image_that_does_not_exist_is_red_on_the_proof_of_two_refusals(
    apps: Fleet,
) -> None:
    ended = apps["noimage"].deployed("v1", seconds=40)
    assert (ended["outcome"], ended["reason"], ended["stage"]) == (
        "failed",
        "ImageNotFound",
        "test",
    )
    assert "registry.example.com/no/such:1" in ended["detail"]


def test_a_run_that_waits_for_quota_says_so_and_goes_on_when_there_is_some(apps: Fleet) -> None:
    own = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    spec: Object = {
        "nodeSelector": {"no": "where"},
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "x", "image": "x", "securityContext": own}],
    }
    meta = {"name": "guest", "namespace": "test"}
    apps.cluster.load({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    set_pods(apps, "1")
    run = apps["quota"].go("v1")

    try:
        eventually(lambda: run_of(apps, run).get("reason") == "QuotaExceeded", 30, "it says why")
        assert "used: pods=1, limited: pods=1" in run_of(apps, run)["waits_for"]
    finally:
        set_pods(apps, "10")
        apps.cluster.store.delete("pods", "test", "guest", grace=0)
    assert apps.ended(run, 60)["outcome"] == "tested"
    assert run_of(apps, run)["waits_for"] == ""


def test_a_run_that_requests_more_than_its_quota_ever_allows_ends_at_once(apps: Fleet) -> None:
    set_pods(apps, "0")
    try:
        ended = apps["quota"].deployed("v2", seconds=30)
    finally:
        set_pods(apps, "10")
    assert (ended["outcome"], ended["reason"]) == ("failed", "QuotaExceeded")
    assert "requested: pods=1, used: pods=0, limited: pods=0" in ended["detail"]


def test_a_run_whose_pod_no_node_takes_says_so_and_goes_on_when_one_does(apps: Fleet) -> None:
    waiting = apps["quota"]
    apps.cluster.cordon()
    try:
        run = apps["noroom"].go("v1")
        said = "node(s) were unschedulable"
        eventually(lambda: said in run_of(apps, run).get("waits_for", ""), 30, "it says why")
        queued = waiting.go("v3")
        said = f"a free slot: 1 of 1 is taken by {run}"
        eventually(lambda: run_of(apps, queued).get("waits_for") == said, 30, "it says for whom")
        eventually(lambda: said in apps.command("status").stdout, 30, "it says so to people, too")
    finally:
        apps.cluster.cordon(False)
    assert {apps.ended(each, 60)["outcome"] for each in (run, queued)} == {"tested"}


def run_of(apps: Fleet, run: str) -> Object:
    """Return what `status` says of a run; an empty mapping where it does not know it."""
    return next((dict(r) for r in apps.status()["runs"] if r["run"] == run), {})


def set_pods(apps: Fleet, number: str) -> None:
    """Set how many pods the test namespace may have."""
    patch = json.dumps({"spec": {"hard": {"pods": number}}})
    done = apps.kubectl("patch", "resourcequota", "test-quota", "-n", "test", "-p", patch)
    assert done.code == 0, done


def test_a_job_deleted_by_hand_ends_its_run_as_vanished(apps: Fleet, gate: Gate) -> None:
    run = apps["gated"].go("v0")
    eventually(lambda: unsuspended(apps, run), what="its tests run")
    assert apps.kubectl("delete", "job", f"test-{run}", "-n", "test").code == 0
    ended = apps.ended(run)
    assert (ended["outcome"], ended["reason"]) == ("failed", "Vanished")


def test_a_job_deleted_while_nobody_looks_ends_its_run_as_vanished(apps: Fleet) -> None:
    gone = apps["gone"]
    # the Jobs of what has ended are missed by nobody
    ended = gone.deployed("v2", branch="a-side")["run"]
    run = apps["gated"].go("v1")
    eventually(lambda: unsuspended(apps, run), what="its tests run")
    assert apps.stop() == 0
    for name in (run, ended):
        apps.cluster.store.delete("jobs", "test", f"test-{name}")
    apps.start()
    line = apps.ended(run)
    assert (line["outcome"], line["reason"]) == ("failed", "Vanished")
    assert recorded(apps, "gated")["refs/heads/main"]["outcome"] == "failed"
    assert recorded(apps, "gone")["refs/heads/a-side"]["outcome"] == "tested"
    assert len(apps.said("run ended", run=ended)) == 1


def test_a_step_that_failed_is_taken_again_after_a_second_and_not_ten(apps: Fleet) -> None:
    again = apps["again"]
    fault = apps.fault("500", "get", "deployments", namespace="production", name="again-blue")
    run = again.go("v0")
    assert apps.ended(run)["outcome"] == "deployed"
    assert apps.cluster.faults.met(fault)
    (failed,) = apps.said("deployment step failed, will be tried again", run=run)
    claimed = apps.said("claimed", run=run)[0]
    assert stamp(claimed) - stamp(failed) < 7


def stamp(line: Object) -> float:
    """Return when a log line was written."""
    return datetime.fromisoformat(line["ts"]).timestamp()


# The same commit again.


def test_a_redelivery_makes_no_second_job(apps: Fleet) -> None:
    again = apps["again"]
    commit = again.release("v1")
    run = again.push(commit)
    assert again.push(commit) == run
    assert apps.ended(run)["outcome"] == "deployed"
    assert apps.created(f"test-{run}") == 1
    # which was kept while the run went on
    annotations = apps.jobs()[f"test-{run}"]["metadata"]["annotations"]
    assert annotations["gitops-hook/summary"] == "no test report"


def test_a_delivery_that_is_replayed_after_a_kill_runs_no_tests_again(apps: Fleet) -> None:
    branchy = apps["branchy"]
    commit = branchy.release("v1", branch="again")
    replay = partial(apps.deliver, branchy.repository.bare, "refs/heads/again", commit, ident="one")
    answer = replay().json()
    assert answer["status"] == "accepted"
    (run,) = answer["runs"]
    assert apps.ended(run)["outcome"] == "tested"
    eventually(lambda: not [*apps.spool.glob("*.json")], what="the cluster has the push")
    apps.kill()
    apps.start()
    assert replay().json() == {"status": "duplicate", "runs": [run]}
    assert not [*apps.spool.glob("*.json")]
    assert apps.created(f"test-{run}") == 1


def test_a_push_of_what_is_live_changes_nothing(apps: Fleet) -> None:
    again = apps["again"]
    again.quiet()
    before = again.service()
    run = again.push(again.repository.git("rev-parse", "HEAD"))
    expected = {"reason": "AlreadyLive", "run": run}
    eventually(lambda: apps.said("push needs nothing", **expected), what="it asks for nothing")
    assert (apps.created(f"test-{run}"), again.service()) == (1, before)


def test_a_branch_forced_back_to_an_earlier_commit_deploys_that_again(apps: Fleet) -> None:
    back = apps["back"]
    first = back.release("v1")
    run = back.push(first)
    assert apps.ended(run)["outcome"] == "deployed"
    assert back.deployed("v2")["outcome"] == "deployed"
    back.repository.git("push", "-q", "-f", "origin", f"{first}:main")
    assert back.push(first) == run
    eventually(lambda: len(apps.said("run ended", run=run, outcome="deployed")) == 2, 60)
    assert back.answer()["version"] == "v1"
    assert apps.created(f"test-{run}") == 1


def quick_tests(repository: Path) -> Object:
    """Return a configuration that builds images and whose tests are always green."""
    config = daemon_config(repository)
    config["apps"][0]["test"] = {"command": "true"}
    return config


def test_a_rerun_beside_an_old_build_job_makes_that_anew(tmp_path: Path) -> None:
    with world(tmp_path, quick_tests, speed=2.0) as one:
        one.start()
        run = one.push(one.repository.release("v1", Dockerfile="NONSENSE\n"))
        assert one.ended(run)["reason"] == "BuildFailed"
        old = one.cluster.store.get("jobs", "build", f"build-{run}")["metadata"]["uid"]
        # as after its time to live, which is over before that of the build
        one.cluster.store.delete("jobs", "test", f"test-{run}")
        assert one.command("rerun", run).returncode == 0

        def ends() -> list[Object]:
            return [e for e in one.logged() if e["msg"] == "run ended" and e["run"] == run]

        eventually(lambda: len(ends()) == 2, 30, "it ends again")
        assert [e["reason"] for e in ends()] == ["BuildFailed"] * 2
        assert one.cluster.store.get("jobs", "build", f"build-{run}")["metadata"]["uid"] != old


# Outages.


def test_a_push_during_an_outage_of_the_cluster_is_kept_and_deployed_after_it(apps: Fleet) -> None:
    apps.cluster.down()
    try:
        run = apps["outage"].go("v1")
        eventually(lambda: len(apps.said("intake waits for the cluster")) > 1, what="it waits")
    finally:
        apps.cluster.up()
    assert apps.ended(run, 90)["outcome"] == "deployed"
    assert apps.created(f"test-{run}") == 1


def test_a_git_server_that_is_away_before_the_switch_is_waited_for(apps: Fleet) -> None:
    git = apps["git"]
    assert git.deployed("v1")["outcome"] == "deployed"
    away = git.repository.bare.with_suffix(".away")
    run = git.go("v2")
    with apps.held("patch", "services", name="git-preview"):
        git.repository.bare.rename(away)
    eventually(
        lambda: apps.said("deployment step failed, will be tried again", run=run),
        what="it waits for git",
    )
    assert (git.answer()["version"], apps.said("switched", run=run)) == ("v1", [])
    away.rename(git.repository.bare)
    assert apps.ended(run)["outcome"] == "deployed"


def test_what_is_spooled_when_the_daemon_is_told_to_stop_is_in_the_cluster_after_it(
    apps: Fleet,
) -> None:
    before = len(apps.said("intake waits for the cluster"))
    apps.cluster.down()
    run = apps["spool"].go("v1")
    eventually(lambda: len(apps.said("intake waits for the cluster")) > before + 1, what="it waits")
    apps.cluster.up()
    assert apps.stop() == 0
    assert job(apps, run)
    assert not [*apps.spool.glob("*.json")]
    apps.start()
    assert apps.ended(run, 60)["outcome"] == "tested"


# Catch-up.


def test_a_head_that_nobody_announced_is_found_but_of_a_deploy_branch_only(apps: Fleet) -> None:
    poll = apps["poll"]
    assert poll.deployed("v1")["outcome"] == "deployed"
    assert apps.stop() == 0
    commit = poll.release("v2")
    poll.release("side", branch="side")
    apps.start()
    message = "head moved unannounced"
    lines = eventually(lambda: apps.said(message, app="poll", commit=commit), 20)
    assert apps.ended(lines[0]["run"])["outcome"] == "deployed"
    assert poll.answer()["version"] == "v2"
    assert not apps.said(message, app="poll", ref="refs/heads/side")


def test_a_deleted_branch_asks_for_nothing(apps: Fleet) -> None:
    poll = apps["poll"]
    poll.repository.git("push", "-q", "origin", ":side")
    answer = apps.deliver(poll.repository.bare, "refs/heads/side", NOTHING)
    assert (answer.status_code, answer.json()["reason"]) == (200, "RefDeleted")


def recorded(apps: Fleet, app: str) -> dict[str, Object]:
    """Return what is recorded of an app's runs, by ref."""
    state = apps.cluster.store.find("configmaps", "orchestration", f"gitops-hook-{app}") or {}
    entries = [json.loads(v) for k, v in (state.get("data") or {}).items() if k.startswith("run-")]
    return {entry["ref"]: entry for entry in entries}


# Crowds: what one app's branches do to another app.

LONG = "\U0001f600"  # a character of those that take the most room


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """An application whose branches are many, and one that is to be deployed all the same."""
    directory = tmp_path_factory.mktemp("crowd")
    apps: dict[str, Object] = {"flood": {"test": "sleep 1"}, "calm": {"bake": "1s"}}
    limits = {"max_running": 2, "queue_timeout": "90s"}
    with fleet(directory, apps, limits=limits) as running:
        yield running


def announce(apps: Fleet, app: str, ref: str, commit: str) -> None:
    """Announce a commit that need not be there: the tests of these applications clone nothing."""
    answer = apps.deliver(apps[app].repository.bare, ref, commit)
    assert answer.status_code == 202, answer.text


def test_an_app_is_deployed_while_another_ones_test_branches_are_pushed_all_the_time(
    crowd: Fleet,
) -> None:
    done = threading.Event()

    def flood() -> None:
        for number in range(400):
            announce(crowd, "flood", f"refs/heads/f{number}", f"{number + 1:040x}")
            if done.wait(0.25):
                return

    with ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(flood)
        try:
            eventually(lambda: len(crowd.jobs()) > 8, what="more is pushed than can run")
            assert crowd["calm"].deployed("v1", 80)["outcome"] == "deployed"
        finally:
            done.set()
        flooding.result(30)


def test_the_only_slot_goes_to_a_deploy_branch_before_another_apps_newer_test_branches(
    tmp_path: Path,
) -> None:
    gate = Gate(tmp_path / "gate")
    named: dict[str, Object] = {"flood": {"test": gate.command}, "calm": {"bake": "1s"}}
    with fleet(tmp_path / "fleet", named, limits={"max_running": 1}) as apps:
        announce(apps, "flood", "refs/heads/f0", f"{1:040x}")
        eventually(lambda: apps.cluster.store.list("pods", "test"), what="the only slot is taken")
        run = apps["calm"].go("v1")
        for number in range(1, 21):
            announce(apps, "flood", f"refs/heads/f{number}", f"{number + 1:040x}")
        eventually(lambda: len(apps.jobs()) == 22, what="all are queued")
        assert not unsuspended(apps, run)
        gate.open()
        assert apps.ended(run)["outcome"] == "deployed"
        waiting = [name for name, one in apps.jobs().items() if one["spec"].get("suspend")]
        assert len(waiting) >= 19
        assert not [name for name in waiting if "flood" not in name]


def test_200_branches_with_long_names_stop_no_other_app_also_after_a_restart(crowd: Fleet) -> None:
    for number in range(200):
        announce(crowd, "flood", f"refs/heads/{LONG * 480}{number:06}", "a" * 40)
    crowd["calm"].quiet()
    assert crowd["calm"].deployed("v2", 80)["outcome"] == "deployed"
    crowd.kill()
    crowd.start()
    crowd["calm"].quiet()
    assert crowd["calm"].deployed("v3", 80)["outcome"] == "deployed"
    eventually(lambda: not list(crowd.spool.glob("*.json")), what="every push is in the cluster")
    state = crowd.cluster.store.get("configmaps", "orchestration", "gitops-hook-flood")
    assert len(json.dumps(state["data"], ensure_ascii=False).encode()) < 2**20


def test_a_record_that_cannot_be_read_stops_neither_its_app_nor_another(crowd: Fleet) -> None:
    entries = {"run-x": "[" * 100_000, "rejected-y": "{", "run-z": '{"replicas": "many"}'}
    where = ("configmap", "gitops-hook-calm", "-n", "orchestration")
    crowd.kubectl("create", *where)  # if nothing was recorded so far
    options = ("--type=merge", "--patch-file=/dev/stdin")
    done = crowd.kubectl("patch", *where, *options, stdin=json.dumps({"data": entries}))
    assert done.code == 0, done
    crowd.kill()
    crowd.start()
    status = crowd.command("status")
    assert status.returncode == 0, status.stderr
    assert "Traceback" not in status.stderr
    crowd["calm"].quiet()
    assert crowd["calm"].deployed("v4", 80)["outcome"] == "deployed"
    state = crowd.cluster.store.get("configmaps", "orchestration", "gitops-hook-calm")
    assert not entries.keys() & state["data"].keys()


def test_two_branches_whose_short_ids_are_equal_are_both_tested(crowd: Fleet) -> None:
    first: dict[str, str] = {}
    for number in range(100_000):
        ref = f"refs/heads/twin-{number}"
        name = hashlib.sha256(f"{ref} {'c' * 40}".encode()).hexdigest()[:4]
        if name in first:
            break
        first[name] = ref
    for twin in (first[name], ref):
        announce(crowd, "calm", twin, "c" * 40)

    def tested() -> bool:
        lines = crowd.said("run ended", app="calm", commit="c" * 40, outcome="tested")
        return {line["ref"] for line in lines} == {first[name], ref}

    eventually(tested, 60, "both are tested")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_a_branch_that_only_looks_like_the_deployed_one_is_never_deployed(
    crowd: Fleet, mark: str
) -> None:
    calm = crowd["calm"]
    name = f"main{mark}x"
    good = calm.release("good")
    evil = calm.release("evil", branch=name)
    answer = crowd.deliver(calm.repository.bare, f"refs/heads/{name}", evil)
    run = calm.push(good)
    assert crowd.ended(run)["outcome"] == "deployed"
    assert (answer.status_code, answer.json()["reason"]) == (200, "OtherRef")
    assert crowd.stop() == 0
    crowd.start()
    eventually(lambda: crowd.said("ignored branches with unsupported names"), 20)
    calm.repository.git("checkout", "-q", "main")
    assert calm.deployed("better")["outcome"] == "deployed"
    commits = {j["metadata"]["annotations"]["gitops-hook/commit"] for j in crowd.jobs().values()}
    assert good in commits
    assert evil not in commits
    calm.repository.git("push", "-q", "origin", f":{name}")


# Killed.


def test_a_push_that_was_stored_survives_a_kill_before_it_is_in_the_cluster(apps: Fleet) -> None:
    apps.cluster.down()
    try:
        run = apps["outage"].go("v2")
        apps.kill()
    finally:
        apps.cluster.up()
    apps.start()
    assert apps.ended(run, 60)["outcome"] == "deployed"
    assert apps.created(f"test-{run}") == 1


# Real tests.


def is_report(key: str) -> bool:
    """Whether a kept log is of the side-car that reads the report."""
    return key.endswith("results")


def test_a_failing_test_is_red_with_the_numbers_of_its_report(tmp_path: Path) -> None:
    app = {"real": {"test": PYTEST}}
    tests = "def test_good():\n    pass\ndef test_bad():\n    assert 0, 'password=hunter2'\n"
    with fleet(tmp_path, app, images={"hook": "gitops-hook:dev"}) as apps:
        ended = apps["real"].deployed("v1", files={"tests/test_it.py": tests})
        assert (ended["outcome"], ended["reason"]) == ("failed", "TestsFailed")
        assert "1 passed, 1 failed" in ended["detail"]
        assert "test_bad" in ended["detail"]
        assert "hunter2" not in apps.log.read_text()
        name = f"log-{ended['run']}"
        log = eventually(lambda: apps.cluster.store.find("configmaps", "test", name))
        printed, reported = (log["data"][key] for key in sorted(log["data"], key=is_report))
        assert "assert 0, 'password=***" in printed
        assert "test_bad" in reported
        assert "hunter2" not in printed + reported
        assert not apps["real"].leftovers()
