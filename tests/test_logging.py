"""A log line is one line of JSON that holds no secret, whatever is in its texts."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gitops_hook as hook
from tests.deliveries import TOKEN

SECRETS = hook.Secrets(Path("/nonexistent"))


class Log:
    """The lines that the program wrote."""

    def __init__(self, secrets: hook.Secrets) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(hook.JsonFormatter(secrets.mask))

    def text(self) -> str:
        return self.stream.getvalue()

    def lines(self) -> list[dict[str, Any]]:
        assert self.text() == "" or self.text().endswith("\n")
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(hook.Secrets(tmp_path))
    level = hook.LOG.level
    hook.LOG.addHandler(log.handler)
    hook.LOG.setLevel(logging.INFO)
    yield log
    hook.LOG.removeHandler(log.handler)
    hook.LOG.setLevel(level)


def test_a_line_has_its_time_level_and_message_first_then_what_it_is_about(log: Log) -> None:
    hook.info("run ended", zebra=1, delivery="d", environment="staging", app="shop", run="shop-1")
    ((line),) = log.lines()
    first = ["ts", "level", "msg", "run", "app", "environment", "delivery", "zebra"]
    assert list(line) == first
    assert line["level"] == "info"
    assert len(line["ts"]) == len("1970-01-01T00:00:00.000Z")


def test_the_levels_are_info_warning_and_error(log: Log) -> None:
    hook.info("a")
    hook.warn("b")
    hook.error("c")
    assert [(x["level"], x["msg"]) for x in log.lines()] == [
        ("info", "a"), ("warning", "b"), ("error", "c"),
    ]  # fmt: skip


def test_fields_without_a_value_are_left_out(log: Log) -> None:
    hook.info("a", run="", app=None, other=None, empty="", zero=0, no=False)
    assert log.lines()[0].keys() == {"ts", "level", "msg", "zero", "no"}


def test_no_field_takes_the_place_of_time_level_or_message(log: Log) -> None:
    hook.warn("a", ts="never", level="fine")
    assert log.lines()[0]["level"] == "warning"


def test_an_error_has_its_traceback_only_when_asked(log: Log) -> None:
    try:
        raise RuntimeError("the cause")
    except RuntimeError:
        hook.error("without")
        hook.error("with", exc=True, where="here")
    without, with_it = log.lines()
    assert "exc" not in without
    assert "RuntimeError: the cause" in with_it["exc"]
    assert with_it["where"] == "here"


def test_a_long_traceback_keeps_its_end(log: Log) -> None:
    try:
        raise RuntimeError("x" * 10_000 + "the end")
    except RuntimeError:
        hook.error("a", exc=True)
    assert len(log.lines()[0]["exc"]) == 4000
    assert log.lines()[0]["exc"].endswith("the end\n")


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\r\nc", "\x00\x1b[31m\x07", "\u2028\u2029\x85\x0b\x0c\x1c", "🚀",
        '"}\n{"a":1',
        "%s %d %(x)s {0}", "\\", "token=abc", 'password: "x", "y": "z"', "https://u:p@h",
    ],
    ids=ascii,
)  # fmt: skip
def test_one_line_stays_one_line_of_json_whatever_the_text(log: Log, text: str) -> None:
    hook.warn(text, run=text, detail=text, many=[text, {text: text}])
    (line,) = log.lines()
    assert log.text().isascii()
    assert isinstance(line["msg"], str)


def test_half_a_character_is_written_as_an_escape() -> None:
    record = logging.LogRecord("any", logging.WARNING, "", 1, "\ud800", (), None)
    line = hook.JsonFormatter(lambda fields: fields).format(record)
    assert line.isascii()
    assert json.loads(line)["msg"] == "\ud800"


@settings(max_examples=100, deadline=None, database=None)
@given(st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False) | st.lists(st.text())))
def test_any_fields_make_one_line_of_json(fields: dict[str, Any]) -> None:
    record = logging.makeLogRecord({"msg": "m", "fields": fields})
    line = hook.JsonFormatter(SECRETS.mask).format(record)
    assert "\n" not in line
    assert json.loads(line)["msg"] == "m"


def test_values_of_any_type_are_written_as_text(log: Log) -> None:
    hook.info("a", path=Path("/x"), error=ValueError("token=abc"), outcome=hook.Outcome.FAILED)
    line = log.lines()[0]
    assert (line["path"], line["error"], line["outcome"]) == ("/x", "token=***", "failed")


def test_secrets_are_masked_in_message_fields_and_traceback(log: Log, tmp_path: Path) -> None:
    (tmp_path / "webhook-tokens").write_text('quoted"secret\\value\n', "utf-8")
    (tmp_path / "webhook-signing-tokens").write_text(TOKEN + "\n", "utf-8")
    secret = 'quoted"secret\\value'
    try:
        raise RuntimeError(f"{TOKEN} and {secret}")
    except RuntimeError:
        hook.error(f"a {secret}", exc=True, detail=f"b {secret}", more=[secret, {"c": TOKEN}])
    (line,) = log.lines()
    assert (line["msg"], line["detail"], line["more"]) == ("a ***", "b ***", ["***", {"c": "***"}])
    assert "RuntimeError: *** and ***" in line["exc"]
    assert "quoted" not in log.text()
    assert TOKEN[10:] not in log.text()


PROGRAM = """
import logging, pathlib, sys, warnings
import gitops_hook as hook
hook.setup_logging(hook.Secrets(pathlib.Path(sys.argv[1])).mask)
hook.info("ours")
logging.getLogger("waitress").warning("theirs: %s", "token=abc")
logging.getLogger("waitress").info("not worth a line")
logging.getLogger("waitress.queue").warning("Task queue depth is 5")
logging.getLogger("urllib3").debug("chatter")
"""


def test_the_daemon_logs_to_stderr_what_it_and_its_libraries_have_to_say(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(hook.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(x["level"], x["msg"]) for x in lines] == [
        ("info", "ours"), ("warning", "theirs: token=***"),
    ]  # fmt: skip
