"""The sentences of a Markdown page, so that tests can hold them to plain English."""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST_SENTENCE = 25  # words
LONGEST_LINE = 110  # columns

CODE_BLOCK = re.compile(r"(?ms)^ *```.*?^ *```$")
REMARK = re.compile(r"(?s)<!--.*?-->")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
LIST_MARKER = re.compile(r"\s*(?:[-*]|\d+\.) ")
SENTENCE_END = re.compile(r"(?<=[.!?])[*_\")]*\s+")


def paragraphs(page: str) -> Iterator[str]:
    """Yield every paragraph, list item and table cell; no code block and no heading."""
    lines: list[str] = []
    for line in [*REMARK.sub("", CODE_BLOCK.sub("", page)).splitlines(), ""]:
        begins = LIST_MARKER.match(line)
        apart = not line.strip() or line.startswith(("#", "|"))
        if lines and (begins or apart):
            yield " ".join(lines)
            lines = []
        if line.startswith("|"):
            yield from (cell.strip() for cell in line.strip("|").split("|"))
        elif not apart:
            lines.append(line[begins.end() if begins else 0 :].strip())


def sentences(page: str) -> Iterator[str]:
    """Yield every sentence, code within it as one word and links as their text."""
    for paragraph in paragraphs(page):
        plain = LINK.sub(r"\1", re.sub(r"`[^`]*`", "`code`", paragraph))
        yield from filter(None, SENTENCE_END.split(plain))


def words(sentence: str) -> list[str]:
    """Return what has a letter or a digit between two blanks."""
    return re.findall(r"\S*\w\S*", sentence)


def long_sentences(page: str) -> list[str]:
    """Return the sentences that are longer than a reader should have to hold in mind."""
    return [s for s in sentences(page) if len(words(s)) > LONGEST_SENTENCE]


def headings(page: str) -> list[str]:
    """Return the titles of all sections, in order; the title of the page is none."""
    return re.findall(r"(?m)^##+ (.+)$", CODE_BLOCK.sub("", page))


def anchor(heading: str) -> str:
    """Return the anchor that GitHub and GitLab give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
