"""The mirror of the cluster: what it keeps of an object, and that it follows the API server.

The watch is driven by the real kubectl on the stand-in cluster, and where a moment must be held
still, by a small program in kubectl's place.
"""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import gitops_hook as hook
from gitops_hook import Informer
from tests.standin.cluster import Cluster
from tests.standin.faults import Fault
from tests.standin.kubectl import find_kubectl
from tests.waiting import eventually

Object = dict[str, Any]
DATA = Path(__file__).parent / "data" / "mirror"
LABELS = {"app.kubernetes.io/managed-by": "gitops-hook"}
SELECTOR = "app.kubernetes.io/managed-by=gitops-hook"


# === What is kept of an object ===


def recorded(name: str) -> list[Object]:
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("scenario", "states"),
    [
        ("job-succeeds", ["active", "succeeded"]),
        ("job-fails", ["active", "failed"]),
        ("job-fails-after-retries", ["active", "failed"]),
        ("job-suspended-then-released", ["suspended", "active", "succeeded"]),
        ("job-deadline", ["active", "failed"]),
        ("job-image-pull", ["active"]),
    ],
)
def test_a_recorded_job_goes_through_its_states(scenario: str, states: list[str]) -> None:
    first = recorded(f"{scenario}.jobs.jsonl")[0]["object"]["metadata"]["name"]
    events = [e["object"] for e in recorded(f"{scenario}.jobs.jsonl")]
    views = [hook.Job(o) for o in events if o["metadata"]["name"] == first]
    seen = [v.state for v in views]
    assert [s for s, before in zip(seen, ["", *seen], strict=False) if s != before] == states
    assert (views[-1].finished > 0) is (views[-1].state in ("succeeded", "failed"))
    assert not any(v.unsuspended for v in views if v.state == "suspended")


def test_why_a_job_failed_is_kept_from_its_first_condition() -> None:
    views = [hook.Job(e["object"]) for e in recorded("job-deadline.jobs.jsonl")]
    failed = [v for v in views if v.state == "failed"]
    assert {v.reason for v in failed} == {"DeadlineExceeded"}
    assert len(failed) > 1


def test_a_recorded_pod_names_the_very_job_that_made_it() -> None:
    job = hook.Job(recorded("job-succeeds.jobs.jsonl")[0]["object"])
    pods = [hook.Pod(e["object"]) for e in recorded("job-succeeds.pods.jsonl")]
    assert {p.job for p in pods} == {job.uid} == {"97b1d5d1-32c7-4aa7-81ad-215f6fec3233"}


def test_a_recorded_pod_with_a_side_car_is_told_apart_by_kind() -> None:
    events = recorded("job-fails-with-results-sidecar.pods.jsonl")
    last = hook.Pod(events[-1]["object"])
    assert {c.name: c.kind for c in last.containers} == {
        "clone": "init", "results": "sidecar", "test-runner": "app",
    }  # fmt: skip
    _, results, tests = last.containers
    assert (results.exit_code, results.words) == (0, '{"tests":3,"failures":1}')
    assert (tests.exit_code, tests.exit_reason, tests.exits) == (1, "Error", 1)


def test_exits_are_counted_as_recorded() -> None:
    events = [e["object"] for e in recorded("deploy-crash-loop.pods.jsonl")]
    pods = [hook.Pod(o) for o in events if "59f6f85c8b" in o["metadata"]["name"]]
    exits = [c.exits for p in pods for c in p.containers]
    assert sorted(exits) == exits
    assert (exits[0], exits[-1]) == (0, 3)
    assert not any(p.seen_ready for p in pods)


def test_a_pod_remembers_that_it_was_ready() -> None:
    events = [e["object"] for e in recorded("deploy-sick-later.pods.jsonl")]
    pods = [hook.Pod(o) for o in events if "dvdfr" in o["metadata"]["name"]]
    ready = [p.ready for p in pods]
    assert [p.seen_ready for p in pods] == [False] * ready.index(True) + [True] * (
        len(pods) - ready.index(True)
    )
    assert not pods[-1].ready


@pytest.mark.parametrize(("changed", "seen"), [(10, False), (11, False), (12, True)])
def test_a_pod_whose_readiness_changed_after_its_start_was_ready(changed: int, seen: bool) -> None:
    at = f"2026-01-01T00:00:{changed}Z"
    ready = {"type": "Ready", "status": "False", "lastTransitionTime": at}
    status = {"startTime": "2026-01-01T00:00:10Z", "conditions": [ready]}
    assert hook.Pod({**LEAST, "status": status}).seen_ready is seen


def test_an_evicted_pod_is_leaving_from_the_first_sign_on() -> None:
    pods = [hook.Pod(e["object"]) for e in recorded("job-evicted-then-succeeds.pods.jsonl")]
    leaving = [p.leaving for p in pods if "evict" in p.name]
    assert leaving == sorted(leaving)
    assert leaving[-1]
    assert not leaving[0]


META = {"name": "x", "namespace": "n", "uid": "u", "resourceVersion": "1"}
LEAST = {"metadata": META, "spec": {}}


def test_an_object_without_any_status_is_understood() -> None:
    job, pod, service = hook.Job(LEAST), hook.Pod(LEAST), hook.Service(LEAST)
    assert (job.state, job.stage, job.outcome, job.run.id) == ("active", "", "", "")
    assert (pod.ready, pod.seen_ready, pod.containers, pod.run) == (False, False, [], "")
    assert (service.run, service.ours, service.history) == ("", False, [])
    assert not service.claim
    assert service.ports == []


@pytest.mark.parametrize("stamp", [None, "", "yesterday", "2026-13-01T00:00:00Z"])
def test_a_time_that_is_none_is_zero(stamp: str | None) -> None:
    assert hook.epoch(stamp) == 0.0


def test_a_time_is_read_with_and_without_fractions() -> None:
    assert hook.epoch("1970-01-01T00:01:00Z") == 60.0
    assert hook.epoch("1970-01-01T00:01:00.500000Z") == 60.5


OURS = {"gitops-hook/app": "shop", "version": "blue", "gitops-hook/run": "r2"}


def service(notes: Object, selector: Object | None = None) -> hook.Service:
    spec = {"selector": OURS if selector is None else selector, "ports": [{"port": 80}]}
    meta = {"name": "shop", "resourceVersion": "5", "annotations": notes}
    return hook.Service({"metadata": meta, "spec": spec})


@pytest.mark.parametrize(
    "history",
    ["", "{", "null", "{}", '"x"', "[1, null, []]", '[{"run": "r2"}]', '[{"selector": "blue"}]'],
)
def test_a_history_that_cannot_be_read_is_none(history: str) -> None:
    found = service({hook.ANNOTATION_HISTORY: history, hook.ANNOTATION_CLAIM: history})
    assert found.history == []
    assert not any([found.live, found.rollback_target(), found.entry("r2")])
    assert found.run == "r2"


WHOLE: Object = {
    "selector": OURS, "run": "r2", "commit": "a" * 40, "image": f"shop@sha256:{'0' * 64}",
    "colour": "blue", "ports": [{"port": 80}], "release": "shop-release-01234567", "replicas": 3,
    "at": 12.5, "by": "gitops-hook", "outcome": "deployed", "reason": "Ok", "detail": "a\nb",
    "was": {"app": "shop"}, "unjudged": True, "beside": True, "v": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "left"),
    [
        ("selector", {"a b": "c"}, None),
        ("selector", {"app": "shop,version!=blue"}, None),
        ("selector", {}, None),
        ("run", "--all", ""),
        ("run", ["r2"], ""),
        ("commit", "HEAD", ""),
        ("image", "a\nb", ""),
        ("colour", "purple", ""),
        ("ports", [5], []),
        ("ports", [{"port": "80"}], []),
        ("release", "a/b", ""),
        ("replicas", "many", 1),
        ("replicas", True, 1),
        ("replicas", -1, 1),
        ("at", 1e300, 0.0),
        ("at", float("nan"), 0.0),
        ("outcome", {"deployed": 1}, ""),
        ("beside", "yes", False),
        ("unknown", "x", None),
    ],
)
def test_a_field_of_a_history_entry_that_holds_something_else_is_left_out(
    field: str, value: Any, left: Any
) -> None:
    assert hook.HistoryEntry.from_json(WHOLE).to_json() == WHOLE
    read = hook.HistoryEntry.from_json({**WHOLE, field: value})
    if field == "selector":
        assert read == hook.HistoryEntry()
        assert not read
    else:
        assert read.to_json() == {**WHOLE, **({field: left} if field in WHOLE else {})}


def test_what_0_1_0_wrote_is_read_and_a_claim_without_a_phase_is_none() -> None:
    old = {"run": "r1", "colour": "green", "phase": "draining", "since": 5, "heal": ""}
    claim = hook.Claim(run="r1", colour="green", phase="draining", since=5)
    assert hook.Claim.from_json(old) == claim
    assert hook.Claim.from_json({**old, "heal": "shop-release-1"}).restore == "shop-release-1"
    assert hook.Claim.from_json(claim.to_json()) == claim
    assert claim.to_json() == {**old, "v": 1}
    for data in ({"run": "r1"}, [5]):
        assert hook.Claim.from_json(data) == hook.Claim()
        assert not hook.Claim.from_json(data)
    assert hook.seconds_of(10**400) == hook.seconds_of("inf") == 0.0


def test_a_note_of_another_type_is_empty() -> None:
    found = service({hook.ANNOTATION_BAKE: "12.5", "gitops-hook/x": "[]", "gitops-hook/y": "7"})
    assert found.annotation(hook.ANNOTATION_BAKE, 0.0) == 12.5
    assert found.annotation("gitops-hook/x", {}) == {}
    assert found.annotation("gitops-hook/y", "") == ""
    assert found.annotation("gitops-hook/none", []) == []


@pytest.mark.parametrize(
    ("selector", "ours"),
    [(OURS, True), ({**OURS, "app": "shop"}, True), ({"app": "shop"}, False), ({}, False)],
)
def test_a_selector_that_names_a_run_is_ours_whatever_else_it_asks_for(
    selector: Object, ours: bool
) -> None:
    assert service({}, selector).ours is ours


def entry(run: str, outcome: str = "deployed", at: float = 1, version: str = "green") -> Object:
    selector = {**OURS, "version": version, "gitops-hook/run": run}
    return {"run": run, "selector": selector, "outcome": outcome, "at": at}


LIVE = {**entry("r2"), "selector": OURS}
FOREIGN = {"run": "", "selector": {"app": "shop"}, "outcome": "adopted"}


@pytest.mark.parametrize(
    ("history", "back", "run"),
    [
        ([LIVE, entry("r1")], 1, "r1"),
        ([LIVE, entry("r1"), entry("r0")], 2, "r0"),
        ([LIVE, entry("r1")], 2, None),
        ([LIVE, entry("r1")], 0, None),
        ([LIVE, entry("r1", "switched-back"), entry("r0")], 1, "r0"),
        ([entry("r3", "rolled-back"), LIVE, entry("r1")], 1, "r1"),
        ([LIVE, LIVE, entry("r1")], 1, "r1"),
        ([LIVE, FOREIGN], 1, ""),
        ([LIVE], 1, None),
        ([], 1, None),
        ([entry("r3"), entry("r1")], 1, "r3"),
        ([LIVE, entry("r1", at=3), entry("r1"), entry("r0")], 2, "r0"),
        ([LIVE, {**entry("r1"), "reason": "SelectorChanged"}, entry("r0")], 1, "r0"),
        ([{**LIVE, "selector": {**OURS, "version": "green"}}, entry("r1")], 1, "r1"),
    ],
    ids=[
        "the one before", "two back", "too far back", "no way back",
        "one that was taken back is none", "what is newer than the live one is none",
        "the live one twice", "what was there first", "only the live one", "no history",
        "live is someone else's", "one version twice", "one that someone has left",
        "the live one in the other colour",
    ],
)  # fmt: skip
def test_a_rollback_goes_to_the_proven_one_before(
    history: list[Object], back: int, run: str | None
) -> None:
    found = service({hook.ANNOTATION_HISTORY: json.dumps(history)}).rollback_target(back)
    assert (found.run if found else None) == run


@pytest.mark.parametrize(
    ("previous", "history", "run"),
    [
        ("r1", [LIVE, entry("r1"), entry("r0")], "r1"),
        ("r1", [LIVE, entry("r1", ""), entry("r0")], "r1"),
        ("r0", [LIVE, entry("r1", "switched-back"), entry("r0")], "r0"),
        ("r9", [LIVE, entry("r1")], "r1"),
        ("r2", [LIVE, LIVE, entry("r1")], "r1"),
        ("r1", [LIVE], None),
    ],
    ids=[
        "proven", "not proven yet", "further back", "unknown",
        "the live one itself", "nothing",
    ],
)  # fmt: skip
def test_a_sick_version_goes_back_to_what_it_replaced(
    previous: str, history: list[Object], run: str | None
) -> None:
    selector = OURS if previous == "r2" else entry(previous)["selector"]
    notes = {hook.ANNOTATION_PREVIOUS: selector, hook.ANNOTATION_HISTORY: history}
    found = service({key: json.dumps(value) for key, value in notes.items()})
    assert (found.switch_back_target.run if found.switch_back_target else None) == run


def test_an_entry_is_the_newest_of_its_run_since_a_time() -> None:
    history = [entry("r1", "failed", 30), LIVE, entry("r1", "deployed", 10)]
    found = service({hook.ANNOTATION_HISTORY: json.dumps(history)})
    assert found.entry("r1").at == 30
    assert found.entry("r1", 30).outcome == "failed"
    assert not found.entry("r1", 31)
    assert found.live == hook.HistoryEntry.from_json(LIVE)


# === Memory ===


def kept_bytes(view: Callable[[Object], Any], texts: list[str]) -> float:
    tracemalloc.start()
    try:
        views = [view(json.loads(text)) for text in texts]
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return kept / len(views)


CONFIG = hook.load_config(
    "apps: [{name: shop, repository: 'https://gitlab.example.com/demo/shop.git',"
    " build: {image: registry.example.com/demo/shop}}]\n"
    "images: {hook: 'registry.example.com/hook:1'}"
)


def job_text(number: int) -> str:
    commit = f"{number:040x}"
    run = hook.Run(
        id=f"shop-{number:08x}-abcd", app="shop", ref=f"refs/heads/b{number}", commit=commit
    )
    found = hook.test_job(CONFIG, CONFIG.apps[0], run)
    found["metadata"] |= {
        "uid": f"{number:08x}-0000-4000-8000-000000000000",
        "resourceVersion": str(number),
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    return json.dumps(found)


def test_a_thousand_jobs_are_kept_in_little_memory() -> None:
    assert kept_bytes(hook.Job, [job_text(n) for n in range(300)]) < 3500


def test_a_thousand_pods_are_kept_in_little_memory() -> None:
    events = recorded("job-fails-with-results-sidecar.pods.jsonl")
    last = events[-1]["object"]
    texts = []
    for number in range(300):
        last["metadata"] |= {"name": f"test-{number}", "resourceVersion": str(number)}
        texts.append(json.dumps(last))
    assert kept_bytes(hook.Pod, texts) < 4000


# === The watch, on the stand-in cluster ===


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(made.kubeconfig()))
        patch.setenv("HOME", str(made.directory))
        yield made


@pytest.fixture
def space(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of a test's own; its faults end with it."""
    name = f"n{abs(hash(request.node.name))}"
    cluster.load({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    cluster.faults.clear()


@contextmanager
def outage(cluster: Cluster) -> Iterator[None]:
    """The API server refuses connections while the block runs."""
    cluster.down()
    try:
        yield
    finally:
        cluster.up()


@pytest.fixture
def kubectl() -> hook.Kubectl:
    return hook.Kubectl(hook.Metrics(), program=find_kubectl())


def put(cluster: Cluster, space: str, name: str, run: str = "r1", **labels: str) -> None:
    meta = {"name": name, "namespace": space, "labels": {**LABELS, **labels}}
    spec = {"selector": {"gitops-hook/run": run}, "ports": [{"port": 80}]}
    cluster.load({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})


def services(kubectl: hook.Kubectl, space: str) -> Informer[hook.Service]:
    return Informer(kubectl, "services", space, hook.Service, SELECTOR)


@contextmanager
def running(watch: Informer[Any], **more: Any) -> Iterator[threading.Thread]:
    """Run a watch in a thread of its own; it must end when it is told to."""
    thread = threading.Thread(target=watch.run, kwargs=more)
    thread.start()
    try:
        yield thread
    finally:
        watch.stop()
        thread.join(15)
        assert not thread.is_alive()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each watch ends after a second or two."""
    monkeypatch.setattr(hook, "WATCH_SECONDS", 1.0)


def runs(watch: Informer[hook.Service]) -> dict[str, str]:
    return {s.name: s.run for s in watch.items()}


def test_what_is_there_is_known_and_then_what_changes(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    put(cluster, space, "a")
    put(cluster, space, "b")
    watch = services(kubectl, space)
    with running(watch):
        eventually(lambda: not watch.trouble)
        assert runs(watch) == {"a": "r1", "b": "r1"}
        watch.changed.clear()
        put(cluster, space, "a", "r2")
        eventually(lambda: runs(watch) == {"a": "r2", "b": "r1"})
        assert watch.changed.is_set()
        put(cluster, space, "c")
        eventually(lambda: runs(watch) == {"a": "r2", "b": "r1", "c": "r1"})
        cluster.store.delete("services", space, "b")
        eventually(lambda: runs(watch) == {"a": "r2", "c": "r1"})
        assert watch.trouble == ""


def test_an_empty_namespace_is_known_to_be_empty(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    watch = services(kubectl, space)
    with running(watch):
        eventually(lambda: not watch.trouble)
        assert watch.items() == []
        put(cluster, space, "a")
        eventually(lambda: runs(watch) == {"a": "r1"})


def test_only_what_matches_is_mirrored(cluster: Cluster, space: str, kubectl: hook.Kubectl) -> None:
    put(cluster, space, "ours")
    put(cluster, space, "theirs", **{"app.kubernetes.io/managed-by": "someone"})
    watch = services(kubectl, space)
    with running(watch):
        eventually(lambda: not watch.trouble)
        assert runs(watch) == {"ours": "r1"}


def test_what_is_made_again_under_its_name_is_the_new_one(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    put(cluster, space, "a", "old")
    watch = services(kubectl, space)
    with running(watch):
        eventually(lambda: not watch.trouble)
        cluster.store.delete("services", space, "a")
        put(cluster, space, "a", "new")
        eventually(lambda: runs(watch) == {"a": "new"})


def test_whoever_waits_for_several_mirrors_is_woken_by_each(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    wake, beats = threading.Event(), []
    watch = services(kubectl, space)
    with running(watch, changed=wake, beat=lambda: beats.append(1)):
        eventually(lambda: not watch.trouble)
        wake.clear()
        before = len(beats)
        put(cluster, space, "a")
        assert wake.wait(10)
        assert len(beats) > before


@pytest.mark.usefixtures("short")
def test_a_watch_that_fell_silent_is_begun_anew(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    put(cluster, space, "a")
    put(cluster, space, "b")
    silent = Fault("drop-watch", verb="watch", resource="services", namespace=space, seconds=0)
    cluster.faults.add(silent)
    watch = services(kubectl, space)
    with running(watch):
        eventually(lambda: not watch.trouble)
        eventually(lambda: cluster.faults.log and watch.items())
        put(cluster, space, "a", "r2")
        cluster.store.delete("services", space, "b")
        eventually(lambda: runs(watch) == {"a": "r2"})


def test_an_outage_is_told_and_what_was_missed_is_caught_up(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    put(cluster, space, "a")
    put(cluster, space, "b")
    watch = services(kubectl, space)
    with running(watch):
        eventually(lambda: not watch.trouble)
        with outage(cluster):
            eventually(lambda: "refused" in watch.trouble)
            assert runs(watch) == {"a": "r1", "b": "r1"}
            put(cluster, space, "a", "r2")
            put(cluster, space, "c")
            cluster.store.delete("services", space, "b")
        eventually(lambda: runs(watch) == {"a": "r2", "c": "r1"})
        assert watch.trouble == ""


def test_a_cluster_that_is_not_there_yet_is_waited_for(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    put(cluster, space, "a")
    watch = services(kubectl, space)
    with ExitStack() as stack:
        with outage(cluster):
            stack.enter_context(running(watch))
            eventually(lambda: "refused" in watch.trouble)
            assert watch.trouble
        eventually(lambda: not watch.trouble)
        assert runs(watch) == {"a": "r1"}


def test_a_watch_that_is_forbidden_is_told_and_not_tried_all_the_time(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    put(cluster, space, "a")
    cluster.faults.add(Fault("forbid", verb="watch", namespace=space, times=None))
    watch = services(kubectl, space)

    def tried() -> int:
        return sum((r.verb, r.namespace) == ("watch", space) for r in cluster.faults.log)

    with running(watch):
        assert "orbidden" in eventually(lambda: watch.trouble.removeprefix("not listed yet"))
        first = time.monotonic()
        eventually(lambda: tried() >= 2)
        assert time.monotonic() - first > 0.5
        assert runs(watch) == {"a": "r1"}


@pytest.mark.usefixtures("short")
def test_a_stop_while_the_api_server_hangs_loses_nothing(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    put(cluster, space, "a")
    watch = services(kubectl, space)
    with running(watch) as thread:
        eventually(lambda: not watch.trouble)
        cluster.faults.add(Fault("hang", verb="list", namespace=space, times=None))
        eventually(lambda: cluster.faults._waiting)
        watch.stop()
        cluster.faults.clear()
        thread.join(10)
        assert not thread.is_alive()
    assert runs(watch) == {"a": "r1"}


def switches_of(thread: threading.Thread) -> int:
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(status.rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])


def unmoved(thread: threading.Thread, seconds: float) -> bool:
    """Whether a thread was not even woken for so long."""
    before = switches_of(thread)
    threading.Event().wait(seconds)
    return switches_of(thread) == before


def test_an_idle_watch_does_nothing_at_all(
    cluster: Cluster, space: str, kubectl: hook.Kubectl
) -> None:
    put(cluster, space, "a")
    watch = services(kubectl, space)
    with running(watch) as thread:
        eventually(lambda: not watch.trouble)
        eventually(lambda: unmoved(thread, 0.2))
        assert unmoved(thread, 0.5)


# === The watch, moment by moment ===

PROGRAM = """#!/bin/sh
cd {directory}
case "$*" in
  *watch=true*) echo "$*" >> watches; . ./watch ;;
  *) echo "$*" >> lists; . ./list ;;
esac
"""


class Puppet:
    """A program in kubectl's place that does what two small scripts say."""

    def __init__(self, directory: Path) -> None:
        self.directory, program = directory, directory / "kubectl"
        program.write_text(PROGRAM.format(directory=directory))
        program.chmod(0o755)
        self.kubectl = hook.Kubectl(hook.Metrics(), program=str(program))
        self.script(list=self.listing(), watch="exec sleep 60")

    def script(self, **parts: str) -> None:
        for name, text in parts.items():
            fresh = self.directory / f"{name}.new"
            fresh.write_text(text + "\n")
            fresh.rename(self.directory / name)

    def saying(self, *lines: Object | str) -> str:
        """A command that prints lines as kubectl does."""
        name = f"said-{len(list(self.directory.glob('said-*')))}"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.directory / name).write_text("".join(f"{text}\n" for text in texts))
        return f"cat {name}"

    def listing(self, *items: Object, version: int = 100, **meta: str) -> str:
        """A command that prints a list as kubectl does."""
        return self.saying({"metadata": {"resourceVersion": f"{version}", **meta}, "items": items})

    def calls(self, what: str) -> list[str]:
        path = self.directory / what
        return path.read_text().splitlines() if path.exists() else []

    def watch(self) -> Informer[hook.Service]:
        return services(self.kubectl, "any")


@pytest.fixture
def puppet(tmp_path: Path) -> Puppet:
    return Puppet(tmp_path)


def a_service(name: str, version: int, run: str = "r1") -> Object:
    meta = {"name": name, "resourceVersion": str(version)}
    return {"metadata": meta, "spec": {"selector": {"gitops-hook/run": run}}}


def event(kind: str, name: str, version: int, run: str = "r1") -> Object:
    return {"type": kind, "object": a_service(name, version, run)}


def test_nothing_is_known_before_all_of_it_is(puppet: Puppet) -> None:
    """The second page of a list is of the same moment as the first; the watch begins there."""
    first = puppet.listing(a_service("a", 1), **{"continue": "abc"})
    second = puppet.listing(a_service("b", 2))
    go = f"while [ ! -e go ]; do sleep 0.02; done; {second}"
    page = f'case "$*" in *"&continue=abc"*) {go};; *) {first};; esac'
    puppet.script(list=page)
    watch = puppet.watch()
    with running(watch):
        eventually(lambda: len(puppet.calls("lists")) == 2)
        assert watch.items() == []
        assert watch.trouble
        (puppet.directory / "go").touch()
        eventually(lambda: not watch.trouble)
        assert runs(watch) == {"a": "r1", "b": "r1"}
        [call] = eventually(lambda: puppet.calls("watches"))
        assert "&resourceVersion=100&" in call


@pytest.mark.parametrize(
    "odd",
    [
        {"type": "BOOKMARK", "object": {"metadata": {"name": "", "resourceVersion": "7"}}},
        {"type": "ADDED", "object": {"metadata": {"name": "odd"}, "spec": "odd"}},
        {"type": "MODIFIED", "object": {"metadata": {"name": "a"}}},
    ],
    ids=["bookmark", "another shape", "of a known one"],
)
def test_an_object_that_cannot_be_read_stays_as_it_was_seen_and_ends_nothing(
    puppet: Puppet, odd: Object, caplog: pytest.LogCaptureFixture
) -> None:
    told = puppet.saying(odd, event("ADDED", "b", 102))
    puppet.script(list=puppet.listing(a_service("a", 1)), watch=f"{told}; exec sleep 60")
    watch = puppet.watch()
    with running(watch):
        eventually(lambda: runs(watch) == {"a": "r1", "b": "r1"})
        assert [r.message for r in caplog.records] == ["object cannot be read"]
        assert puppet.kubectl.metrics.errors.labels("watch")._value.get() == 1
        assert len(puppet.calls("watches")) == 1


@pytest.mark.usefixtures("short")
def test_an_object_in_a_list_that_cannot_be_read_is_not_gone(puppet: Puppet) -> None:
    puppet.script(list=puppet.listing(a_service("a", 1), a_service("b", 1)))
    watch = puppet.watch()
    with running(watch):
        eventually(lambda: not watch.trouble)
        puppet.script(list=puppet.listing({"metadata": {"name": "a"}}, a_service("c", 1)))
        eventually(lambda: runs(watch) == {"a": "r1", "c": "r1"})


def test_a_forgotten_version_is_listed_anew(puppet: Puppet) -> None:
    gone = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}
    once = f"if [ $(wc -l < watches) -lt 2 ]; then {puppet.saying(gone)}; fi; exec sleep 60"
    second = puppet.listing(a_service("b", 2), version=200)
    listing = puppet.listing(a_service("a", 1))
    page = f"if [ $(wc -l < lists) -lt 2 ]; then {listing}; else {second}; fi"
    puppet.script(list=page, watch=once)
    watch = puppet.watch()
    with running(watch):
        eventually(lambda: runs(watch) == {"b": "r1"})
        calls = eventually(lambda: puppet.calls("watches")[1:])
        assert "&resourceVersion=200&" in calls[0]


@pytest.mark.parametrize(
    ("script", "trouble"),
    [
        ("echo 'error: oh no' >&2; exit 1", "error: oh no"),
        ("exit 0", "ended at once"),
        ("echo 'not json'; exec sleep 60", "not an API server's answer: JSONDecodeError"),
        ("echo '{{}}'; exec sleep 60", "not an API server's answer: "),
        ("echo '[]'; exec sleep 60", "not an API server's answer: TypeError"),
        (r"printf '\377\n'; exec sleep 60", "not an API server's answer: JSONDecodeError"),
        (
            "head -c 40000000 /dev/zero; exec sleep 60",
            "not an API server's answer: JSONDecodeError",
        ),
    ],
    ids=["fails", "ends", "talks", "another object", "another type", "no text", "endless line"],
)
@pytest.mark.parametrize("part", ["list", "watch"])
def test_a_watch_that_does_not_work_is_told(
    puppet: Puppet, part: str, script: str, trouble: str
) -> None:
    puppet.script(**{part: script.replace("exec sleep 60", "exit 0") if part == "list" else script})
    watch = puppet.watch()
    with running(watch):
        said = eventually(lambda: watch.trouble.removeprefix("not listed yet"))
        if part == "watch" or "error:" in trouble:
            assert trouble in said


def test_a_watch_that_does_not_work_is_tried_again_after_a_pause(puppet: Puppet) -> None:
    puppet.script(watch="exit 1")
    watch = puppet.watch()
    with running(watch):
        began = time.monotonic()
        eventually(lambda: len(puppet.calls("watches")) == 2)
        assert time.monotonic() - began > 0.6
        puppet.script(list=puppet.listing(a_service("a", 1)), watch="exec sleep 60")
        eventually(lambda: runs(watch) == {"a": "r1"})
        assert watch.trouble == ""


@pytest.mark.usefixtures("short")
def test_a_watch_stuck_on_its_own_complaints_is_ended(puppet: Puppet) -> None:
    once = "if [ $(wc -l < watches) -lt 2 ]; then exec head -c 1000000 /dev/zero >&2; fi"
    told = puppet.saying(event("ADDED", "a", 101))
    puppet.script(watch=f"{once}; {told}; exec sleep 60")
    watch = puppet.watch()
    with running(watch):
        eventually(lambda: runs(watch) == {"a": "r1"})


def test_a_missing_kubectl_is_told_and_waited_for(tmp_path: Path) -> None:
    watch = services(hook.Kubectl(hook.Metrics(), program=str(tmp_path / "kubectl")), "any")
    with running(watch):
        assert "cannot be started" in eventually(
            lambda: watch.trouble.removeprefix("not listed yet")
        )
        assert watch.trouble
        Puppet(tmp_path)
        eventually(lambda: not watch.trouble)


def test_a_stop_during_the_list_begins_no_watch_that_lasts(puppet: Puppet) -> None:
    listing = puppet.listing(a_service("a", 1))
    puppet.script(list=f"touch listing; while [ ! -e go ]; do sleep 0.02; done; {listing}")
    watch = puppet.watch()
    with running(watch) as thread:
        eventually((puppet.directory / "listing").exists)
        watch.stop()
        (puppet.directory / "go").touch()
        thread.join(10)
        assert not thread.is_alive()
    assert runs(watch) == {"a": "r1"}


def test_a_watch_stopped_before_it_runs_starts_nothing(puppet: Puppet) -> None:
    watch = puppet.watch()
    watch.stop()
    watch.run()
    assert puppet.calls("watches") == puppet.calls("lists") == []


@pytest.mark.parametrize(
    ("resource", "view", "scenario"),
    [
        ("jobs", hook.Job, "job-deleted-while-running.jobs.jsonl"),
        ("pods", hook.Pod, "job-evicted-then-succeeds.pods.jsonl"),
        ("pods", hook.Pod, "deploy-crash-loop.pods.jsonl"),
    ],
)
def test_a_recorded_watch_leaves_what_was_there_at_its_end(
    puppet: Puppet, resource: str, view: Callable[[Object], Any], scenario: str
) -> None:
    def plain(views: Iterable[Any]) -> list[str]:
        return sorted(
            json.dumps(v, default=lambda o: getattr(o, "__dict__", str(o))) for v in views
        )

    events = recorded(scenario)
    told = [(e["type"] == "DELETED", view(e["object"])) for e in events]
    lasts = {seen.name: (gone, seen) for gone, seen in told}.values()
    last = events[0]["object"]
    end = {"type": "ADDED", "object": {**last, "metadata": {**last["metadata"], "name": "end"}}}
    puppet.script(watch=f"{puppet.saying(*events, end)}; exec sleep 60")
    watch: Informer[Any] = Informer(puppet.kubectl, resource, "test", view, SELECTOR)
    with running(watch):
        eventually(lambda: watch.find("end"))
        there = plain(seen for seen in watch.items() if seen.name != "end")
        assert there == plain(seen for gone, seen in lasts if not gone)


@pytest.mark.cluster
def test_the_first_list_of_a_thousand_jobs_needs_little_memory_at_any_time(puppet: Puppet) -> None:
    cases = ""
    for first in range(0, 1000, hook.PAGE_SIZE):
        jobs = [json.loads(job_text(n)) for n in range(first, first + hook.PAGE_SIZE)]
        more = {"continue": f"t{first + hook.PAGE_SIZE}"} if first + hook.PAGE_SIZE < 1000 else {}
        cases = f'*"&continue=t{first}"*) {puppet.listing(*jobs, **more)};; {cases}'
        cases = cases.replace("&continue=t0", "&continue=")
    puppet.script(list=f'case "$*" in {cases} esac')
    del jobs
    watch = Informer(puppet.kubectl, "jobs", "test", hook.Job, SELECTOR)
    tracemalloc.start()
    try:
        with running(watch):
            eventually(lambda: not watch.trouble, 60)
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(watch.items()) == 1000
    print("PEAK", peak)
    assert peak < 8_000_000


# === Around it ===


def test_what_a_patch_returned_is_known_at_once_unless_it_is_older_or_gone() -> None:
    kubectl = hook.Kubectl(hook.Metrics())
    watch = Informer(kubectl, "jobs", "test", hook.Job, SELECTOR)
    found = recorded("job-succeeds.jobs.jsonl")[0]["object"]
    version, name = int(found["metadata"]["resourceVersion"]), found["metadata"]["name"]

    def patched(change: int) -> Object:
        meta = {**found["metadata"], "resourceVersion": str(version + change)}
        return {**found, "metadata": meta}

    watch.learn(patched(0))
    assert not watch.items(), "it was not there, or has gone"
    watch._take("ADDED", found)
    watch.learn(patched(2))
    watch.learn(patched(1))
    assert {j.name: j.version for j in watch.items()} == {name: version + 2}


def test_neither_a_late_event_nor_a_late_list_takes_back_what_a_patch_returned(
    puppet: Puppet,
) -> None:
    late = puppet.saying(event("MODIFIED", "a", 105, "late"), event("ADDED", "b", 106))
    again = puppet.listing(a_service("a", 107, "late"), a_service("c", 107), version=107)
    first, wait = puppet.listing(a_service("a", 100)), "while [ ! -e go ]; do sleep 0.02; done"
    puppet.script(
        list=f"if [ $(wc -l < lists) -lt 2 ]; then {first}; else {again}; fi",
        watch=f"[ $(wc -l < watches) -lt 2 ] || exec sleep 60; {wait}; {late}; sleep 0.2",
    )
    watch = puppet.watch()
    with running(watch):
        eventually(lambda: not watch.trouble)
        watch.learn(a_service("a", 109, "patched"))
        (puppet.directory / "go").touch()
        eventually(lambda: runs(watch) == {"a": "patched", "b": "r1"})
        eventually(lambda: runs(watch) == {"a": "patched", "c": "r1"})


def test_a_service_that_says_nothing_of_itself_is_not_in_order() -> None:
    assert service({hook.ANNOTATION_HISTORY: json.dumps([LIVE])}).in_order
    assert not service({}, {}).in_order
