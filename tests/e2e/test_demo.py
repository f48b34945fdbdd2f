"""The demo as a user runs it: it succeeds, it can fail, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600
LAST_LINE = re.compile(r"(?m)^(\d+) requests, (\d+) failed$")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts demos, their files below the test's directory; ends those that still run."""
    started: list[subprocess.Popen[str]] = []

    def start_one(**environment: str) -> subprocess.Popen[str]:
        settings = {key: value for key, value in os.environ.items() if key not in ("BREAK", "KEEP")}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.demo"],
            cwd=ROOT,
            env={**settings, "TMPDIR": str(tmp_path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def processes_of(directory: Path) -> list[str]:
    """The command lines of living processes that work in or with a directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            surroundings = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if int(entry.name) != os.getpid() and str(directory) in command + surroundings:
            found.append(command)
    return found


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """What it prints up to a line that contains some text."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if wanted in line:
            return seen
    raise AssertionError(f"it ended before {wanted!r}:\n{seen}")


def check_story(output: str) -> None:
    """All was as expected, by what was printed."""
    introduction = "\n".join(output.splitlines()[:4])
    assert "stand-in" in introduction
    assert "shortened: bake" in introduction
    assert "\033" not in output, "there are no colours in a pipe"
    assert max(map(len, output.partition("\n\n")[2].partition("\n\n")[0].splitlines())) <= 100
    assert "ok      the worker is of version 2 as well" in output
    assert re.search(r"production +blue → green: version 2 is live", output)
    assert re.search(r"production +blue → green: .*switched back: UnhealthyAfterSwitch", output)
    assert "FAILED" not in output
    found = LAST_LINE.search(output)
    assert found is not None
    assert int(found[1]) > 1000
    assert int(found[2]) == 0


@pytest.mark.timeout(SECONDS)
def test_two_demos_side_by_side_see_everything_and_lose_no_request(
    start: Start, tmp_path: Path
) -> None:
    demo, kept = start(), start(KEEP="1")
    output, _ = demo.communicate(timeout=SECONDS)
    assert demo.returncode == 0, output
    check_story(output)
    assert LAST_LINE.fullmatch(output.splitlines()[-1])

    output = read_until(kept, "Ctrl-C")
    check_story(output)
    metrics = re.search(r"(?m)^metrics +(http://\S+)$", output)
    assert metrics is not None
    with urllib.request.urlopen(metrics[1], timeout=10) as answer:
        assert b"gitops_hook" in answer.read()
    kept.send_signal(signal.SIGINT)
    kept.communicate(timeout=30)
    assert kept.returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


@pytest.mark.timeout(SECONDS)
def test_a_daemon_that_cannot_switch_back_makes_the_demo_fail(start: Start, tmp_path: Path) -> None:
    demo = start(BREAK="no-switch-back")
    output, _ = demo.communicate(timeout=SECONDS)
    assert demo.returncode == 1, output
    assert "ok      version 3 went live after it" in output
    assert "FAILED  version 3 was switched back" in output
    assert "FAILED  then only version 2 answered" in output
    assert LAST_LINE.fullmatch(output.splitlines()[-1])
    # The logs stay, to be read.
    assert {path.suffix for path in tmp_path.glob("*/*")} == {".log"}
    assert processes_of(tmp_path) == []


@pytest.mark.timeout(60)
def test_interrupting_it_ends_all_it_started(start: Start, tmp_path: Path) -> None:
    demo = start()
    read_until(demo, "run as Job")
    assert processes_of(tmp_path)
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert processes_of(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
def test_what_it_started_ends_even_if_it_is_killed(start: Start, tmp_path: Path) -> None:
    demo = start()
    read_until(demo, "run as Job")
    demo.kill()
    demo.communicate(timeout=30)
    until = time.monotonic() + 30
    while left := processes_of(tmp_path):
        assert time.monotonic() < until, left
        time.sleep(0.2)


def test_an_unknown_way_to_break_it_is_refused(start: Start) -> None:
    demo = start(BREAK="everything")
    output, _ = demo.communicate(timeout=30)
    assert demo.returncode == 2
    assert "no-switch-back" in output
