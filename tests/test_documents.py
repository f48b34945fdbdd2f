"""What is written for people: short sentences, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gitops_hook
from tests import prose

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # of Keep a Changelog


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_sentences_are_short(name: str) -> None:
    page = (ROOT / name).read_text("utf-8")
    assert len(list(prose.sentences(page))) > 40
    assert not prose.long_sentences(page)


def test_the_make_targets_for_contributors_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z0-9]+):.*## ", (ROOT / "Makefile").read_text("utf-8")))
    named = set(re.findall(r"`make ([a-z0-9]+)", CONTRIBUTING))
    suites = {"demo", "test", "cluster", "faults", "e2e", "bench", "fuzz", "lint", "types", "check"}
    assert suites <= named <= targets


def test_the_map_for_contributors_names_every_folder() -> None:
    named = re.findall(r"`((?:tests|manifests|\.ci)/[\w./-]*|[\w-]+\.(?:py|md|txt))`", CONTRIBUTING)
    assert not [path for path in named if not (ROOT / path).exists()]
    folders = [path for top in ("tests", "manifests") for path in (ROOT / top).iterdir()]
    folders = [f"{path.relative_to(ROOT)}/" for path in folders if path.is_dir()]
    assert {folder for folder in folders if "__" not in folder} <= {*named}


def test_the_changelog_tells_of_this_version_or_of_the_next_first() -> None:
    newest = re.findall(r"(?m)^## (.+)$", CHANGELOG)[0]
    assert "Unreleased" in newest or f"[{gitops_hook.__version__}]" in newest


def test_the_changelog_tells_of_every_version_from_the_first_on() -> None:
    versions = re.findall(r"(?m)^## \[([0-9.]+)\]", CHANGELOG)
    assert versions[-1] == "0.1.0"
    assert gitops_hook.__version__ in versions


def test_the_changelog_has_the_usual_kinds_of_changes() -> None:
    kinds = set(re.findall(r"(?m)^### (\w+)$", CHANGELOG))
    assert kinds
    assert kinds <= KINDS


# === The rules can be broken ===

LONG = " ".join(["word"] * (prose.LONGEST_SENTENCE + 1))


@pytest.mark.parametrize(
    "page",
    [
        f"Short. {LONG}.",
        f"- {LONG}.",
        f"1. **Short.** {LONG}; and more.",
        f"| short | {LONG} |",
        LONG.replace(" ", "\n"),
        f"Said *short.* {LONG}? Yes.",
        f"[{LONG}](https://example.com/a.b)",
    ],
    ids=["second", "item", "after bold", "cell", "lines", "italics", "link"],
)
def test_a_long_sentence_is_seen(page: str) -> None:
    assert len(prose.long_sentences(page)) == 1


@pytest.mark.parametrize(
    "page",
    [
        f"```\n{LONG}\n```",
        f"# {LONG}",
        f"Short <!-- {LONG} -->.",
        f"Run `{LONG}` now.",
        f"Version 3.11 and {LONG[:60]}.",
        f"{LONG[:60]}.\n\n{LONG[:60]}.",
        f"- {LONG[:60]}\n- {LONG[:60]}",
    ],
    ids=["code block", "heading", "remark", "code", "number", "paragraphs", "items"],
)
def test_what_is_no_long_sentence_is_left_alone(page: str) -> None:
    assert not prose.long_sentences(page)


def test_anchors_are_those_of_a_rendered_page() -> None:
    assert prose.anchor("How it works, and why?") == "how-it-works-and-why"
    assert prose.headings("# Title\n## One\n```\n## None\n```\n### Two\n") == ["One", "Two"]
