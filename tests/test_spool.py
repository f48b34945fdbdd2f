"""What is stored is there after a crash, whole, bounded, in order; what is foreign hurts nobody."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import gitops_hook as hook
from tests.fuzz import RUN, TARGETS, record


def run(number: int, app: str = "shop") -> hook.Run:
    ref, commit = f"refs/heads/b{number}", f"{number:040x}"
    return replace(RUN, id=hook.run_id(app, ref, commit), app=app, ref=ref, commit=commit)


@pytest.fixture
def spool(tmp_path: Path) -> hook.Spool:
    return opened(tmp_path)


def opened(folder: Path, max_files: int = 1000) -> hook.Spool:
    spool = hook.Spool(folder / "spool", max_files)
    spool.prepare()
    return spool


def names(spool: hook.Spool) -> list[str]:
    ours = ("accepted", "bad", "scratch")
    return sorted(p.name for p in spool.directory.iterdir() if p.name not in ours)


def aside(spool: hook.Spool) -> list[str]:
    return sorted(p.name for p in (spool.directory / "bad").iterdir())


# === Storing ===


def test_what_is_stored_is_read_again_oldest_first(spool: hook.Spool) -> None:
    runs = [run(n) for n in (3, 1, 2)]
    for one in runs:
        spool.store([one])
    assert [stored for _, stored in spool.read()] == runs
    assert len(spool) == 3


def test_it_is_read_again_after_a_restart(spool: hook.Spool, tmp_path: Path) -> None:
    spool.store([run(1)])
    again = opened(tmp_path)
    assert [stored for _, stored in again.read()] == [run(1)]
    assert len(again) == 1


def test_any_text_of_a_push_survives_to_the_letter(spool: hook.Spool) -> None:
    odd = replace(run(1), title="\ud800 \u2028 \x00 🚀 \"'\\", delivery="ä")
    spool.store([odd])
    assert [stored for _, stored in spool.read()] == [odd]


def test_the_longest_push_is_within_the_bound_of_a_file(spool: hook.Spool) -> None:
    ref = "refs/heads/" + "🚀" * (hook.REF_LENGTH - 11)
    app, commit = "a" * 30, "f" * 64
    longest = hook.Run(
        id=hook.run_id(app, ref, commit), app=app, ref=ref, commit=commit, before=commit,
        title="🚀" * 120, delivery="\xff" * 100, received=1760000000.123456,
    )  # fmt: skip
    assert hook.valid_ref(ref)
    spool.store([longest])
    ((path, stored),) = spool.read()
    assert stored == longest
    assert path.stat().st_size <= hook.SPOOL_RECORD


def test_the_same_push_twice_is_two_files_of_one_run(spool: hook.Spool) -> None:
    spool.store([run(1)])
    spool.store([run(1)])
    assert [stored.id for _, stored in spool.read()] == [run(1).id] * 2


def test_a_push_that_is_done_is_forgotten_and_doing_it_again_changes_nothing(
    spool: hook.Spool,
) -> None:
    spool.store([run(1)])
    spool.store([run(2)])
    ((first, _), _) = spool.read()
    spool.done(first)
    spool.done(first)
    assert [stored for _, stored in spool.read()] == [run(2)]
    assert len(spool) == 1


# === In this order, or a crash loses something ===


def test_a_push_is_synced_under_another_name_then_renamed_then_its_folder_is_synced(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        kind = "folder" if path.is_dir() else path.suffix
        size = path.stat().st_size if path.is_file() else 0
        seen.append(f"fsync {kind} {'with content' if size else ''}".strip())
        real_sync(handle)

    def rename(source: Any, target: Any, **more: Any) -> None:
        seen.append(f"rename {Path(source).suffix} {Path(target).suffix}")
        real_rename(source, target, **more)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    spool.store([run(1)])
    assert seen == ["fsync .tmp with content", "rename .tmp .json", "fsync folder"]


def test_the_pushes_of_one_delivery_share_one_sync_of_the_folder(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    spool.store([run(1), run(1, "other")])
    assert len(synced) == 3
    assert {stored.app for _, stored in spool.read()} == {"shop", "other"}


def test_nobody_sees_a_push_that_is_only_half_written(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        looks.append(spool.read())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    spool.store([run(1)])
    assert looks[0] == []


# === Bounds, and disks that refuse ===


def test_a_full_spool_refuses_and_says_how_many_pushes_wait(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_files=2)
    spool.store([run(1), run(2)])
    with pytest.raises(hook.DeliveryError, match="2 pushes are waiting already"):
        spool.store([run(3)])
    spool.done(spool.read()[0][0])
    spool.store([run(3)])
    assert len(names(spool)) == len(spool) == 2


def test_a_delivery_that_does_not_fit_as_a_whole_is_not_stored_at_all(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_files=2)
    spool.store([run(1)])
    with pytest.raises(hook.DeliveryError):
        spool.store([run(2), run(3)])
    assert [stored for _, stored in spool.read()] == [run(1)]
    assert len(spool) == 1


def test_what_waited_before_a_restart_counts(tmp_path: Path) -> None:
    opened(tmp_path).store([run(1), run(2)])
    with pytest.raises(hook.DeliveryError, match="2 pushes"):
        opened(tmp_path, max_files=2).store([run(3)])


def test_the_pushes_of_one_app_that_are_only_tested_take_half_of_the_room(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_files=20)
    for number in range(8):
        spool.store([run(number)], only_tested=True)
    with pytest.raises(hook.DeliveryError, match="8 pushes of shop are waiting already"):
        spool.store([run(8), run(9)], only_tested=True)
    spool.store([run(8)], only_tested=True)
    with pytest.raises(hook.DeliveryError, match="9 pushes of shop") as full:
        spool.store([run(1, "blog"), run(9)], only_tested=True)
    assert (full.value.status, full.value.code) == (503, "SpoolFull")
    for number in range(9):
        spool.store([run(number, "blog")], only_tested=True)
    spool.store([run(9)])
    assert len(names(spool)) == len(spool) == 19


def test_one_app_leaves_room_for_the_deployments_of_others(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_files=20)
    for number in range(18):
        spool.store([run(number)])
    with pytest.raises(hook.DeliveryError, match="18 pushes of shop are waiting already"):
        spool.store([run(18)])
    spool.store([run(1, "blog")])
    spool.store([run(2, "blog")])
    with pytest.raises(hook.DeliveryError, match="20 pushes are waiting already"):
        spool.store([run(3, "blog")])


@pytest.mark.parametrize("delivery", [hook.CATCH_UP, hook.NEXT_TRY])
def test_what_git_itself_says_is_stored_in_a_full_spool_too(tmp_path: Path, delivery: str) -> None:
    spool = opened(tmp_path, max_files=2)
    spool.store([run(1), run(2)])
    spool.store([replace(run(3), delivery=delivery)])
    assert len(names(spool)) == len(spool) == 3


def test_the_share_of_an_app_is_the_same_after_a_restart_and_free_when_pushes_are_done(
    tmp_path: Path,
) -> None:
    before = opened(tmp_path)
    before.store([run(number) for number in range(9)])
    before.store([run(1, "blog")])
    spool = opened(tmp_path, max_files=20)
    with pytest.raises(hook.DeliveryError, match="9 pushes of shop"):
        spool.store([run(9)], only_tested=True)
    ours = [path for path, stored in spool.read() if stored.app == "shop"]
    for _ in range(2):
        spool.done(ours[0])
    spool.store([run(9)], only_tested=True)
    with pytest.raises(hook.DeliveryError, match="9 pushes of shop"):
        spool.store([run(10)], only_tested=True)


def test_pushes_that_could_not_be_written_are_no_part_of_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = opened(tmp_path, max_files=2)
    with monkeypatch.context() as patched:

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr(os, "fsync", full)
        with pytest.raises(hook.DeliveryError, match="No space left"):
            spool.store([run(1)], only_tested=True)
    spool.store([run(1)], only_tested=True)


def test_a_push_that_the_disk_takes_in_pieces_is_stored_as_a_whole(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: real(handle, content[:10]))
    spool.store([run(1)])
    assert [stored for _, stored in spool.read()] == [run(1)]


def test_a_push_that_the_disk_gives_in_pieces_is_read_as_a_whole(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.store([run(1)])
    real = os.read
    monkeypatch.setattr(os, "read", lambda handle, size: real(handle, min(size, 10)))
    assert [stored for _, stored in spool.read()] == [run(1)]


def test_a_push_of_which_the_disk_gives_a_part_only_stays_until_it_can_be_read(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.store([run(1)])
    real, calls = os.read, iter([False, True])

    def failing(handle: int, size: int) -> bytes:
        if next(calls, False):
            raise OSError(errno.EIO, "Input/output error")
        return real(handle, min(size, 10))

    with monkeypatch.context() as patched:
        patched.setattr(os, "read", failing)
        assert spool.read() == []
    assert [stored for _, stored in spool.read()] == [run(1)]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_disk_that_refuses_leaves_nothing_behind_and_no_count(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    spool.store([run(1)])
    real, calls = getattr(os, call), iter([False, True])

    def refusing(*args: Any, **more: Any) -> Any:
        if next(calls, False):
            raise OSError(28, "No space left on device")
        return real(*args, **more)

    monkeypatch.setattr(os, call, refusing)
    with pytest.raises(hook.DeliveryError, match="No space left on device"):
        spool.store([run(2), run(3)])
    assert [stored for _, stored in spool.read()] == [run(1)]
    assert len(names(spool)) == len(spool) == 1
    spool.store([run(2)])
    assert len(spool) == 2


def test_a_spool_that_cannot_be_made_is_an_error_before_the_first_push(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(hook.ConfigError, match="Not a directory"):
        hook.Spool(tmp_path / "file" / "spool", 10).prepare()


def test_a_spool_that_went_away_is_seen_by_the_probe(spool: hook.Spool) -> None:
    spool.probe()
    spool.directory.rename(spool.directory.with_name("elsewhere"))
    with pytest.raises(OSError, match="No such file"):
        spool.probe()
    with pytest.raises(hook.DeliveryError):
        spool.store([run(1)])
    assert spool.read() == []


# === Which deliveries were accepted ===


def delivered(number: int, name: str, at: float = RUN.received) -> hook.Run:
    return replace(run(number), delivery=name, received=at)


def test_a_delivery_is_recognized_after_a_restart_even_when_its_push_is_in_the_cluster(
    spool: hook.Spool, tmp_path: Path
) -> None:
    spool.store([delivered(1, "one")])
    spool.done(spool.read()[0][0])
    again = opened(tmp_path).accepted
    assert again.has(delivered(1, "one"))
    assert not again.has(delivered(2, "one"))
    assert not again.has(delivered(1, "two"))


def test_a_stored_push_says_its_delivery_where_the_line_is_missing(
    spool: hook.Spool, tmp_path: Path
) -> None:
    spool.store([delivered(1, "one"), delivered(2, "one")])
    ((first, _), _) = spool.read()
    first.unlink()  # as if it had been killed between the two
    again = opened(tmp_path).accepted
    assert [again.has(delivered(n, "one")) for n in (1, 2)] == [False, True]


def test_a_delivery_that_was_written_down_twice_has_the_age_of_the_newer_line(
    tmp_path: Path,
) -> None:
    file = opened(tmp_path).directory / "accepted"
    one, other = "1" * 64, "2" * 64
    lines = (f"1.000 {one}", f"2.000 {other}", f"3.000 {one}")
    file.write_text("".join(f"\n{line}" for line in lines))
    assert [*opened(tmp_path).accepted.times.items()] == [(other, 2.0), (one, 3.0)]


def test_what_could_not_be_stored_was_not_accepted(tmp_path: Path) -> None:
    spool = opened(tmp_path, max_files=0)
    with pytest.raises(hook.DeliveryError):
        spool.store([delivered(1, "one")])
    assert not spool.accepted.has(delivered(1, "one"))
    assert not opened(tmp_path).accepted.has(delivered(1, "one"))


def test_a_delivery_without_an_id_is_never_recognized(spool: hook.Spool) -> None:
    spool.store([delivered(1, "")])
    spool.done(spool.read()[0][0])
    assert not spool.accepted.has(delivered(1, ""))
    assert (spool.directory / "accepted").read_bytes() == b""


@pytest.mark.parametrize("seconds", [-1300, -1200, 0, 1200, 1300])
def test_a_delivery_is_recognized_for_twenty_minutes(
    spool: hook.Spool, tmp_path: Path, seconds: float
) -> None:
    spool.store([delivered(1, "one")])
    later = delivered(1, "one", RUN.received + seconds)
    assert spool.accepted.has(later) is (abs(seconds) <= 1200)
    assert opened(tmp_path).accepted.has(later) is (abs(seconds) <= 1200)


@pytest.mark.parametrize("name", ["a\nb", "\ud800", "1.000 " + "0" * 64, "\xff" * 100], ids=ascii)
def test_whatever_a_sender_calls_his_delivery_is_one_line_of_one_length(
    spool: hook.Spool, tmp_path: Path, name: str
) -> None:
    spool.store([delivered(1, name)])
    spool.done(spool.read()[0][0])
    assert len((spool.directory / "accepted").read_bytes()) < 90
    assert opened(tmp_path).accepted.has(delivered(1, name))


def test_memory_and_file_are_bounded_and_the_newest_stay(
    spool: hook.Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "DEDUPE_ENTRIES", 10)
    for number in range(100):
        spool.store([delivered(number, "x")])
        spool.done(spool.read()[0][0])
        assert len(spool.accepted.times) <= 10
        assert (spool.directory / "accepted").stat().st_size < 30 * 90
    again = opened(tmp_path).accepted
    assert [n for n in range(100) if again.has(delivered(n, "x"))] == [*range(90, 100)]


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 500, b"\xff\n[]\n", b"1760000000.000 " + b"0" * 63, b"9" * 5000, b"\n" * 10**6],
    ids=lambda c: repr(c[:12]),
)
def test_lines_of_another_format_are_skipped(tmp_path: Path, content: bytes) -> None:
    spool = opened(tmp_path)
    spool.store([delivered(1, "one")])
    spool.done(spool.read()[0][0])
    whole = (spool.directory / "accepted").read_bytes()
    (spool.directory / "accepted").write_bytes(content + whole)
    assert opened(tmp_path).accepted.has(delivered(1, "one"))


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    spool = opened(tmp_path)
    (spool.directory / "accepted").unlink()
    os.mkfifo(spool.directory / "accepted")
    again = opened(tmp_path)
    again.store([delivered(1, "one")])
    assert opened(tmp_path).accepted.has(delivered(1, "one"))


def test_a_line_that_cannot_be_written_keeps_no_push(
    spool: hook.Spool, caplog: pytest.LogCaptureFixture
) -> None:
    spool.store([delivered(1, "one")])
    with Path("/dev/full").open("wb", buffering=0) as full:
        os.dup2(full.fileno(), spool.accepted.handle)
    ((path, _),) = spool.read()
    spool.done(path)
    assert spool.read() == []
    assert spool.accepted.has(delivered(1, "one"))
    assert caplog.messages == ["accepted delivery cannot be written down"]


@pytest.mark.parametrize("call", ["open", "replace"])
def test_where_the_file_cannot_be_replaced_lines_go_on_into_the_old_one(
    spool: hook.Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real_open = os.open
    files: list[int] = []
    others = [tmp_path / f"other-{number}" for number in range(9)]

    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        if "accepted" not in Path(path).name:
            return real_open(path, *_, **__)
        # what other threads open meanwhile gets every number that is free
        files.extend(real_open(other, os.O_WRONLY | os.O_CREAT) for other in others)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as failing:
        failing.setattr(hook, "DEDUPE_ENTRIES", 2)
        failing.setattr(*((os, "open") if call == "open" else (Path, "replace")), refuse)
        for number in range(6):
            spool.store([delivered(number, "one")])
            spool.done(spool.read()[0][0])
    assert files
    for handle in files:
        os.close(handle)
    assert [other.read_bytes() for other in others] == [b""] * len(others)
    assert opened(tmp_path).accepted.has(delivered(5, "one"))


# === What is not ours ===

GOOD = record(RUN)


def changed(**fields: Any) -> bytes:
    values = {**json.loads(GOOD), **fields}
    return json.dumps({k: v for k, v in values.items() if v != "gone"}).encode()


FOREIGN = {
    "empty": b"",
    "half-written": GOOD[:-20],
    "zeros after a power cut": b"\0" * len(GOOD),
    "no JSON": b"hello",
    "no object": b"[]",
    "no text": b"\xff\xfe\xfa",
    "nested too deeply": b"[" * 10_000,
    "a huge number": changed(received=0).replace(b": 0", b": " + b"9" * 5000),
    "another object": b'{"kind": "Pod"}',
    "another commit": changed(commit="b" * 40),
    "no commit": changed(commit="head", id=hook.run_id(RUN.app, RUN.ref, "head")),
    "no ref": changed(ref="a..b", id=hook.run_id(RUN.app, "a..b", RUN.commit)),
    "an id that climbs": changed(id="../../etc/passwd"),
    "an app that climbs": changed(app="../x", id=hook.run_id("../x", RUN.ref, RUN.commit)),
    "a field missing": changed(ref="gone"),
    "a field more": changed(more="x"),
    "a number for a text": changed(title=5),
    "a text for a number": changed(received="now"),
    "no time": changed(received=float("nan")),
    "a truth for a number": changed(received=True),
    "null": changed(delivery=None),
    "too long": changed(title="x" * 20_000),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_moved_aside_and_logged(
    spool: hook.Spool, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    spool.store([run(1)])
    (spool.directory / "00-foreign.json").write_bytes(content)
    assert [stored for _, stored in spool.read()] == [run(1)]
    assert aside(spool) == ["00-foreign.json"]
    assert (spool.directory / "bad" / "00-foreign.json").read_bytes() == content
    ((_, level, text),) = caplog.record_tuples
    assert (level, text) == (40, "spool file moved to folder bad")
    assert len(spool) == 1


def test_a_folder_in_the_place_of_a_file_is_moved_aside(spool: hook.Spool) -> None:
    (spool.directory / "x.json").mkdir()
    assert spool.read() == []
    assert aside(spool) == ["x.json"]


def make_link(path: Path) -> None:
    target = path.with_suffix(".target")
    target.write_bytes(GOOD)
    path.symlink_to(target)


def make_socket(path: Path) -> None:
    # its address may not be long
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "make", [os.mkfifo, make_link, make_socket], ids=["pipe", "link", "socket"]
)
def test_what_is_no_plain_file_is_moved_aside_and_never_waited_for(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    opened(tmp_path).store([run(1)])
    make(tmp_path / "spool" / "00-x.json")
    spool = opened(tmp_path)
    assert [stored for _, stored in spool.read()] == [run(1)]
    assert aside(spool) == ["00-x.json"]


def test_a_file_that_cannot_be_moved_aside_stands_in_nobody_s_way(spool: hook.Spool) -> None:
    for folder in ("x.json", "bad/x.json/y"):
        (spool.directory / folder).mkdir(parents=True)
    spool.store([run(1)])
    assert [stored for _, stored in spool.read()] == [run(1)]


def test_a_push_that_was_not_accepted_before_a_crash_is_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = opened(tmp_path)
    (spool.directory / "1-x.json.abc.tmp").write_bytes(GOOD[:30])
    again = opened(tmp_path)
    assert (again.read(), len(again)) == ([], 0)
    assert aside(again) == ["1-x.json.abc.tmp"]
    assert "spool file moved to folder bad" in caplog.messages


def test_what_a_killed_process_left_in_its_scratch_folder_is_gone(
    spool: hook.Spool, tmp_path: Path
) -> None:
    (spool.scratch / "checkout" / "src").mkdir(parents=True)
    spool.store([run(1)])
    again = opened(tmp_path)
    assert again.scratch == spool.scratch
    assert [*again.scratch.iterdir()] == []
    assert len(again) == 1


def test_what_a_file_system_keeps_for_itself_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "spool" / "lost+found").mkdir(parents=True)
    assert names(opened(tmp_path)) == ["lost+found"]


def test_a_push_stored_by_an_older_version_is_still_a_push() -> None:
    fields = {k: getattr(RUN, k) for k in ("id", "app", "ref", "commit")}
    assert hook.parse_run(json.dumps(fields).encode()) == hook.Run(**fields)


def test_a_file_that_cannot_be_read_now_stays_for_later(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool.store([run(1)])
    with monkeypatch.context() as broken:

        def too_many(*args: Any, **more: Any) -> Any:
            raise OSError(24, "Too many open files")

        broken.setattr(os, "open", too_many)
        assert spool.read() == []
    assert aside(spool) == []
    assert [stored for _, stored in spool.read()] == [run(1)]
    assert caplog.messages == ["spool files cannot be read"]


def test_files_that_cannot_be_read_are_one_line_however_many(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool.store([run(n) for n in range(20)])

    def too_many(*args: Any, **more: Any) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", too_many)
        assert spool.read() == []
    ((record),) = caplog.records
    assert record.__dict__["fields"]["count"] == 20


@pytest.mark.parametrize("stays", [True, False], ids=["stored", "never stored"])
def test_a_file_that_cannot_be_removed_counts_until_it_is_gone(
    spool: hook.Spool, monkeypatch: pytest.MonkeyPatch, *, stays: bool
) -> None:
    spool.store([run(1)])
    ((path, _),) = spool.read()
    if not stays:
        path.unlink()
    with monkeypatch.context() as patched:

        def read_only(*args: Any, **more: Any) -> None:
            raise OSError(30, "Read-only file system")

        patched.setattr(Path, "unlink", read_only)
        with pytest.raises(OSError, match="Read-only"):
            spool.done(path)
    assert len(spool) == stays
    spool.done(path)
    assert len(spool) == 0


# === Several at once ===


@pytest.fixture
def busy() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*bodies: Callable[[], None]) -> None:
    """Run all at once; what goes wrong in one of them goes wrong here."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        for done in [pool.submit(body) for body in bodies]:
            done.result(30)


@pytest.mark.usefixtures("busy")
def test_writers_and_readers_at_once_lose_nothing_and_the_count_never_drifts(
    spool: hook.Spool,
) -> None:
    taken: list[hook.Run] = []
    writing = [40] * 4

    def write(writer: int) -> None:
        for number in range(40):
            spool.store([run(writer * 40 + number)])
            writing[writer] -= 1

    def take() -> None:
        while any(writing) or spool.read():
            for path, stored in spool.read():
                spool.done(path)
                taken.append(stored)

    def look() -> None:
        while any(writing):
            spool.read()
            assert 0 <= len(spool) <= 160
            (spool.directory / "foreign.json").write_bytes(b"{")

    together(*(partial(write, n) for n in range(4)), take, look)
    assert sorted(r.commit for r in taken) == [f"{n:040x}" for n in range(160)]
    assert len(spool) == 0


def test_the_bound_holds_for_many_writers_at_once(tmp_path: Path) -> None:
    spool, refused = opened(tmp_path, max_files=10), []

    def write(number: int) -> None:
        try:
            spool.store([run(number, "blog" if number % 2 else "shop")])
        except hook.DeliveryError:
            refused.append(number)

    together(*(partial(write, n) for n in range(25)))
    assert len(names(spool)) == len(spool) == 10
    assert len(refused) == 15


def test_the_share_of_an_app_holds_for_many_writers_at_once(tmp_path: Path) -> None:
    spool, refused = opened(tmp_path, max_files=20), []

    def write(number: int) -> None:
        try:
            spool.store([run(number)], only_tested=True)
        except hook.DeliveryError:
            refused.append(number)

    together(*(partial(write, n) for n in range(25)))
    assert (len(names(spool)), len(refused)) == (9, 16)


# === Anything else ===


@settings(max_examples=250, deadline=None, database=None)
@given(TARGETS["spool"].inputs)
def test_no_content_of_a_file_is_more_than_a_push_or_foreign(content: bytes) -> None:
    TARGETS["spool"].run(content)
