"""SECURITY.md says only what a test or a manifest holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text("utf-8")
REMARK = re.compile(r"<!-- (.*?) -->")


def statements() -> list[str]:
    """Every row of the table and every point of a list, remarks and all."""
    rows = re.findall(r"(?m)^\| (?!who |-).*\|$", TEXT)
    points = re.findall(r"(?ms)^- .*?(?=^- |^#|\Z)", TEXT)
    return [*rows, *points]


def known_tests() -> set[str]:
    """The names of all tests."""
    files = [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "tests" / "e2e").glob("test_*.py")]
    return {n for f in files for n in re.findall(r"(?m)^def (test_\w+)", f.read_text("utf-8"))}


def test_there_are_statements_of_all_kinds() -> None:
    assert len([s for s in statements() if s.startswith("|")]) == 7
    assert len([s for s in statements() if s.startswith("- ")]) >= 10


@pytest.mark.parametrize("statement", statements(), ids=lambda text: text[2:40])
def test_each_statement_names_what_holds_it(statement: str) -> None:
    (remark,) = REMARK.findall(statement)
    manifests = {path.name for path in (ROOT / "manifests" / "base").glob("*.yaml")}
    missing = set(remark.split()) - known_tests() - manifests
    assert not missing


def test_no_remark_stands_elsewhere() -> None:
    assert len(REMARK.findall(TEXT)) == len(statements())
