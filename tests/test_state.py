"""What is recorded of the apps: bounded, readable whatever is in it, and taken over from 0.1."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import gitops_hook as hook
from tests.world import Object

APP, OTHER = hook.load_config("""
apps:
  - {name: shop, repository: https://git.example.com/demo/shop.git, build: {builder: none}}
  - {name: blog, repository: https://git.example.com/demo/blog.git, build: {builder: none}}
""").apps
MAIN, SIDE = "refs/heads/main", "refs/heads/side"
BRACKETS = "[" * 100_000


class Shelf(hook.Kubectl):
    """ConfigMaps behind an API server that compares and sets."""

    def __init__(self) -> None:
        super().__init__(hook.Metrics())
        self.objects: dict[str, Object] = {}
        self.calls: list[str] = []
        self.meanwhile: list[Any] = []

    def get(self, resource: str, name: str, namespace: str) -> Object | None:
        self.calls.append("get")
        return json.loads(json.dumps(self.objects.get(name)))  # type: ignore[no-any-return]

    def create_each(
        self, objects: Sequence[Object], namespace: str
    ) -> dict[str, hook.KubectlError]:
        self.calls.append("create")
        if self.meanwhile:
            self.meanwhile.pop()()
        refusals = {}
        for item in json.loads(json.dumps(objects)):
            name = item["metadata"]["name"]
            if name in self.objects:
                exists = f'Error from server (AlreadyExists): configmaps "{name}" already exists'
                refusals[name] = hook.KubectlError(["kubectl"], 1, exists)
            else:
                item["metadata"]["resourceVersion"] = "1"
                self.objects[name] = item
        return refusals

    def patch(self, resource: str, name: str, namespace: str, change: Object) -> Object:
        self.calls.append("patch")
        if self.meanwhile:
            self.meanwhile.pop()()
        found = self.objects.get(name)
        if found is None:
            raise hook.KubectlError(["kubectl"], 1, "Error from server (NotFound): no such map")
        version = found["metadata"]["resourceVersion"]
        if change["metadata"].get("resourceVersion", version) != version:
            raise hook.KubectlError(["kubectl"], 1, "Error from server (Conflict): it was changed")
        data = {**found.get("data", {}), **change["data"]}
        found["data"] = {k: v for k, v in data.items() if v is not None}
        found["metadata"]["resourceVersion"] = str(int(version) + 1)
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]

    def put(self, app: str, **data: str) -> None:  # type: ignore[override]
        meta = {"name": f"gitops-hook-{app}", "resourceVersion": "7"}
        self.objects[f"gitops-hook-{app}"] = {"metadata": meta, "data": data}

    def data(self, app: str = "shop") -> dict[str, str]:
        """The entries of an app's ConfigMap."""
        return dict(self.objects[f"gitops-hook-{app}"].get("data", {}))


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def store(shelf: Shelf) -> hook.StateStore:
    return hook.StateStore(shelf, hook.Clock())


def a_record(number: int, ref: str = MAIN, **more: Any) -> hook.RunRecord:
    commit = f"{number:040x}"
    ended: Object = {"outcome": "tested", "reason": "Ok", "stage": "test", "ended": float(number)}
    fields: Object = {"ref": ref, "commit": commit, "received": float(number), **ended, **more}
    return hook.RunRecord(id=hook.run_id("shop", ref, commit), **fields)


# Reading and writing


def test_what_is_written_is_read_again(shelf: Shelf, store: hook.StateStore) -> None:
    record = a_record(5, delivery="d", before="b" * 40, detail="3 passed, 1 failed: tests.x")
    rejection = hook.Rejection(commit="c" * 40, reason="CrashLoop", at=3.5)
    store.write(APP, record, rejection)
    state = hook.StateStore(shelf, hook.Clock()).read(APP)
    assert state.runs == {record.id: record}
    assert state.rejected == {"c" * 40: rejection}
    assert {json.loads(text)["v"] for text in shelf.data().values()} == {1}
    labels = shelf.objects["gitops-hook-shop"]["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/managed-by": "gitops-hook", "gitops-hook/app": "shop"}


def test_the_first_write_creates_the_record_and_a_later_one_takes_one_call(
    shelf: Shelf, store: hook.StateStore
) -> None:
    store.write(APP, a_record(1))
    assert shelf.calls == ["get", "create"]
    store.write(APP, a_record(2))
    shelf.calls.clear()
    store.write(APP, a_record(3))
    assert shelf.calls == ["patch"]
    assert [*store.read(APP).runs] == [a_record(n).id for n in (1, 2, 3)]


def test_a_record_that_another_process_creates_meanwhile_is_added_to(
    shelf: Shelf, store: hook.StateStore
) -> None:
    shelf.meanwhile = [lambda: hook.StateStore(shelf, hook.Clock()).write(APP, a_record(1))]
    store.write(APP, a_record(2))
    assert [*store.read(APP).runs] == [a_record(n).id for n in (1, 2)]


def test_fields_that_a_later_version_may_add_are_ignored(shelf: Shelf) -> None:
    text = json.dumps({"v": 9, "ref": MAIN, "commit": "a" * 40, "stars": 3, "moon": [1]})
    shelf.put("shop", **{"run-shop-1": text})
    state = hook.StateStore(shelf, hook.Clock()).read(APP)
    assert state.runs == {"shop-1": hook.RunRecord(id="shop-1", ref=MAIN, commit="a" * 40)}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "5", "null", "[]", BRACKETS, '{"commit": 1, "ref": "r", "outcome": ""}',
        '{"ref": "r", "commit": "c", "received": "many", "outcome": ""}',
        '{"ref": "r", "commit": "c", "received": Infinity, "at": Infinity, "outcome": ""}',
        '{"ref": "r", "commit": "c", "received": NaN, "at": NaN, "outcome": ""}',
        '{"ref": "r", "commit": "c", "reason": null, "outcome": ""}',
        '{"ref": "r", "commit": "c", "received": true, "at": true, "outcome": ""}',
        '{"ref": "r", "commit": "c", "outcome": "' + "x" * 9000 + '"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["run-x", "rejected-x", "ref-x"])
def test_an_entry_that_cannot_be_read_is_dropped_with_an_error_and_the_others_stay(
    shelf: Shelf, kind: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = a_record(1)
    text = text.replace('"received"', '"at"') if kind == "rejected-x" else text
    text = text.replace('"commit": 1', '"reason": 1') if kind == "rejected-x" else text
    shelf.put("shop", **{kind: text, good.key: hook.record_text(good)})
    store = hook.StateStore(shelf, hook.Clock())
    for _ in range(2):
        state = store.read(APP)
        assert (state.runs, state.rejected) == ({good.id: good}, {})
        assert caplog.messages == ["records dropped"]
        store.write(APP)
        assert [*shelf.data()] == [good.key]


@pytest.mark.parametrize("tries", ["1" + 400 * "0", 4300 * "9", 4400 * "9", "-9007199254740992"])
def test_a_number_that_cannot_be_counted_on_from_is_dropped_with_its_entry(
    shelf: Shelf, store: hook.StateStore, tries: str
) -> None:
    shelf.put("shop", **{"run-x": f'{{"ref": "r", "commit": "c", "tries": {tries}}}'})
    assert store.read(APP).runs == {}
    store.write(APP, a_record(1))
    assert [*shelf.data()] == [a_record(1).key]


def test_one_apps_broken_state_is_not_another_apps(shelf: Shelf, store: hook.StateStore) -> None:
    shelf.put("shop", **{f"run-{n}": BRACKETS for n in range(5)})
    record = replace(a_record(1), id="blog-1")
    store.write(OTHER, record)
    assert store.read(OTHER).runs == {"blog-1": record}
    assert store.read(APP).runs == {}


def test_two_processes_that_write_at_once_lose_nothing(
    shelf: Shelf, store: hook.StateStore
) -> None:
    store.write(APP, a_record(1))
    other = hook.StateStore(shelf, hook.Clock())
    shelf.meanwhile = [lambda: other.write(APP, a_record(2))]
    store.write(APP, a_record(3))
    assert len(shelf.data()) == 3


def test_many_threads_that_write_at_once_lose_nothing(shelf: Shelf, store: hook.StateStore) -> None:
    threads = [threading.Thread(target=store.write, args=(APP, a_record(n))) for n in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shelf.data()) == 20


def test_a_write_that_always_meets_another_gives_up(shelf: Shelf, store: hook.StateStore) -> None:
    store.write(APP, a_record(1))

    def change() -> None:
        shelf.objects["gitops-hook-shop"]["metadata"]["resourceVersion"] += "0"

    shelf.meanwhile = [change] * 50
    with pytest.raises(hook.KubectlError) as failed:
        store.write(APP, a_record(2))
    assert failed.value.kind == "Conflict"


def test_what_is_live_is_kept_for_each_environment(shelf: Shelf, store: hook.StateStore) -> None:
    entry = hook.HistoryEntry(selector={"a": "b"}, run="shop-1", at=3)
    store.write(APP, live={"production": entry, "staging": replace(entry, run="shop-2")})
    store.write(APP, a_record(1), forget=["live-staging"])
    assert store.read(APP).live == {"production": entry}


def test_an_entry_of_what_is_live_that_is_too_large_is_not_kept(
    shelf: Shelf, store: hook.StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    ports = [{"port": n, "name": "x" * 50} for n in range(1, 300)]
    entry = hook.HistoryEntry(selector={"a": "b"}, ports=ports)
    store.write(APP, a_record(1), live={"production": entry})
    assert [*shelf.data()] == [a_record(1).key]
    shelf.put("shop", **{"live-production": json.dumps(entry.to_json())})
    assert store.read(APP).live == {}
    assert caplog.messages == ["records dropped"]


# Bounds


def size(data: dict[str, str]) -> int:
    """Bytes of the entries of a ConfigMap."""
    return sum(len(key) + len(text.encode()) for key, text in data.items())


def test_200_branches_with_the_longest_names_stay_far_below_what_a_configmap_holds(
    shelf: Shelf, store: hook.StateStore
) -> None:
    records = [a_record(n, f"refs/heads/{n:04}" + "é" * 240, detail="x" * 300) for n in range(900)]
    for start in range(0, len(records), 300):
        batch = records[start : start + 300]
        store.write(APP, *batch, with_job={r.id for r in records})
    assert size(shelf.data()) <= hook.STATE_BYTES + hook.RECORD_BYTES
    assert records[-1].key in shelf.data()
    assert records[0].key not in shelf.data()


def test_thousands_of_ordinary_branches_leave_the_newest_runs_and_all_of_the_deploy_branch(
    shelf: Shelf, store: hook.StateStore
) -> None:
    deployed = [a_record(n) for n in range(1, 31)]
    store.write(APP, *deployed, with_job=set())
    for start in range(100, 4400, 200):
        tests = [a_record(n, f"refs/heads/b{n}") for n in range(start, start + 200)]
        store.write(APP, *tests, with_job=set())
    state = store.read(APP)
    assert len(state.runs) == hook.RUNS_LENGTH
    assert {r.id for r in deployed} <= state.runs.keys()
    assert max(r.received for r in state.runs.values()) == 4499


def test_runs_that_have_a_job_or_are_under_way_are_kept_beyond_the_newest(
    shelf: Shelf, store: hook.StateStore
) -> None:
    with_job, under_way = a_record(1, SIDE), a_record(2, SIDE, outcome="", ended=0.0)
    others = [a_record(n, f"refs/heads/b{n}") for n in range(10, 210)]
    store.write(APP, with_job, under_way, a_record(3, SIDE), *others, with_job={with_job.id})
    assert {with_job.id, under_way.id} <= store.read(APP).runs.keys()
    assert len(store.read(APP).runs) == hook.RUNS_LENGTH + 2


def test_a_command_that_cannot_see_the_jobs_forgets_nothing(store: hook.StateStore) -> None:
    store.write(APP, *(a_record(n, f"refs/heads/b{n}") for n in range(300)))
    assert len(store.read(APP).runs) == 300


@pytest.mark.parametrize("letter", ["x", "é", '"', "\U0001f600"])
def test_a_run_of_a_branch_with_a_long_name_is_recorded_shortly_and_found(
    store: hook.StateStore, letter: str
) -> None:
    refs = [f"refs/heads/{letter * 485}{end}" for end in "ab"]
    runs = [
        hook.Run(id=f"shop-{i}", app="shop", ref=ref, commit="a" * 40) for i, ref in enumerate(refs)
    ]
    store.write(APP, *(hook.RunRecord.of(run) for run in runs))
    state = store.read(APP)
    assert [state.find(ref, "a" * 40) for ref in refs] == [state.runs[run.id] for run in runs]
    assert all(len(hook.record_text(r).encode()) < hook.RECORD_BYTES for r in state.runs.values())


@pytest.mark.parametrize("text", ["x" * 5000, "é" * 5000, '"\\' * 3000, "\U0001f600" * 3000])
def test_a_record_has_a_bounded_size_and_loses_only_of_its_detail(text: str) -> None:
    record = a_record(1, "refs/heads/" + '"' * 480, detail=text, delivery="d" * 100)
    kept = hook.record_text(record)
    assert len(kept.encode()) <= hook.RECORD_BYTES
    again = hook.parse_record(hook.RunRecord, kept, id=record.id)
    assert replace(again, detail="") == replace(record, detail="")
    assert text.startswith(again.detail)


@pytest.mark.parametrize("count", [1, 10, 40, 50])
def test_of_many_lines_of_a_detail_a_record_keeps_whole_ones_and_counts_the_others(
    count: int,
) -> None:
    lines = [f"deploy/app.yaml: Service shop: field {n} is refused. Remove it." for n in range(50)]
    detail = "\n".join([*lines[:count], *["7 more are not listed."] * (count == 50)])
    kept = hook.record_text(a_record(1, detail=detail))
    assert len(kept.encode()) <= hook.RECORD_BYTES
    *first, last = hook.parse_record(hook.RunRecord, kept, id="x").detail.split("\n")
    if count <= 10:
        assert [*first, last] == lines[:count]
    else:
        assert first == lines[: len(first)]
        left = count - len(first) + 7 * (count == 50)
        assert last == f"{left} more are not listed. `plan` shows them."
        assert len(kept.encode()) > hook.RECORD_BYTES - 100


@pytest.mark.parametrize(("number", "oldest"), [(49, 0), (50, 1), (60, 11)])
def test_of_too_many_rejected_commits_the_oldest_are_forgotten(
    store: hook.StateStore, number: int, oldest: int
) -> None:
    ages = {f"{n:040x}": (11 * n + 3) % number for n in range(number)}
    store.write(APP, *(hook.Rejection(commit=c, at=float(at)) for c, at in ages.items()))
    store.reject(APP, "b" * 40, "CrashLoop")
    kept = store.read(APP).rejected
    assert len(kept) == min(number + 1, hook.REJECTED_LENGTH)
    assert min(r.at for r in kept.values()) == oldest
    assert kept["b" * 40].reason == "CrashLoop"


# From version 0.1


def old_entry(ref: str, commit: str, outcome: str | None, **more: Any) -> str:
    """An entry as version 0.1 wrote it."""
    fields = {"ref": ref, "commit": commit, "before": "", "received": 5.0, "outcome": outcome}
    return json.dumps({**fields, "reason": "Ok" if outcome else "", **more})


def test_entries_of_version_0_1_become_records_in_one_compared_patch(shelf: Shelf) -> None:
    commits = [letter * 40 for letter in "abcd"]
    shelf.put(
        "shop",
        **{
            "ref-1": old_entry(MAIN, commits[0], "deployed"),
            "ref-2": old_entry(SIDE, commits[1], None),
            "ref-3": old_entry("refs/heads/seen", commits[2], "baseline"),
            f"rejected-{commits[3]}": json.dumps({"commit": commits[3], "reason": "x", "at": 4}),
        },
    )
    store = hook.StateStore(shelf, hook.Clock())
    state = store.read(APP)
    live, under_way = state.find(MAIN, commits[0]), state.find(SIDE, commits[1])
    assert live
    assert under_way
    assert live.id == hook.run_id("shop", MAIN, commits[0], 4)
    assert (live.outcome, live.ended, under_way.outcome, under_way.ended) == ("deployed", 5, "", 0)
    shelf.calls.clear()
    store.write(APP)
    assert shelf.calls == ["patch"]
    assert {*shelf.data()} == {live.key, under_way.key, f"rejected-{commits[3]}"}
    again = store.read(APP)
    assert (again.runs, again.rejected, again.repairs) == (state.runs, state.rejected, {})


def test_the_migration_conflicts_with_what_someone_wrote_meanwhile(shelf: Shelf) -> None:
    shelf.put("shop", **{"ref-1": old_entry(MAIN, "a" * 40, "deployed")})
    store = hook.StateStore(shelf, hook.Clock())
    store.read(APP)
    shelf.meanwhile = [lambda: hook.StateStore(shelf, hook.Clock()).reject(APP, "c" * 40, "x")]
    store.write(APP)
    assert {key.partition("-")[0] for key in shelf.data()} == {"run", "rejected"}


def test_a_ledger_of_version_0_1_that_fills_its_configmap_is_taken_over(shelf: Shelf) -> None:
    names = {f"ref-{n:016x}": f"refs/heads/{'x' * 480}{n:06}" for n in range(1200)}
    entries = enumerate(names.items())
    shelf.put("shop", **{k: old_entry(ref, f"{n:040x}", "tested") for n, (k, ref) in entries})
    store = hook.StateStore(shelf, hook.Clock())
    store.read(APP)
    store.write(APP, with_job=set())
    assert len(shelf.data()) == hook.RUNS_LENGTH


def test_an_entry_of_version_0_1_that_becomes_too_large_holds_up_no_write(shelf: Shelf) -> None:
    room = 4 * hook.RECORD_BYTES - len(old_entry(MAIN, "a" * 40, "deployed", by=""))
    shelf.put("shop", **{"ref-1": old_entry(MAIN, "a" * 40, "deployed", by="x" * room)})
    store = hook.StateStore(shelf, hook.Clock())
    [old] = store.read(APP).runs.values()
    with pytest.raises(ValueError, match="not a text of a record's size"):
        hook.parse_record(hook.RunRecord, hook.record_text(old), id=old.id)
    store.reject(APP, "c" * 40, "x")
    assert [*store.read(APP).rejected] == ["c" * 40]


# Finding


def test_the_last_push_of_a_ref_is_the_newest_that_was_its_head(store: hook.StateStore) -> None:
    store.write(APP, a_record(1), a_record(2), a_record(3, reason="NotHead"), a_record(4, SIDE))
    state = store.read(APP)
    last = state.last(MAIN)
    assert last
    assert last.received == 2
    assert state.last("refs/heads/none") is None
    assert state.find(MAIN, f"{1:040x}") == a_record(1)
    assert state.find(SIDE, f"{1:040x}") is None
