"""Feed the parsers what nobody would send: `python -m tests.fuzz [--seconds N] [TARGET …]`.

Where atheris is installed it is guided by coverage, otherwise hypothesis makes as many inputs as
the time allows. A finding is printed with its input and ends it with exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import gitops_hook as hook

KEY = bytes(range(32))
DELIVERIES = Path(__file__).resolve().parent / "data" / "deliveries"
CONFIG = hook.load_config(
    "apps: [{name: shop, repository: https://gitlab.example.com/example-group/demo-app,"
    " deploy: {environments: []}}]"
)
LINE = 200
NAMES = [f.name for f in fields(hook.Run)]


def refusal(call: Callable[..., Any], *args: Any) -> hook.DeliveryError | None:
    """What a call is refused with, for a sender to read."""
    try:
        call(*args)
    except hook.DeliveryError as refused:
        assert len(str(refused)) < LINE  # noqa: PT017 - any refusal is as good
        json.dumps(str(refused)).encode()
        return refused
    return None


def signatures(data: bytes) -> None:
    """Headers and a body from anywhere are refused with a 401, in every mode."""
    parts = [*data.split(b"\n", 4), b"", b"", b"", b""]
    names = ("webhook-id", "webhook-timestamp", "webhook-signature", "x-gitlab-token")
    headers = {n: p.decode("latin-1") for n, p in zip(names, parts, strict=False)}
    for mode in ("signature", "token", "hmac"):
        refused = refusal(hook.verify_delivery, mode, [KEY], headers, parts[4], 1760000000.0)
        assert refused is not None
        assert refused.status == 401


def pushes(data: bytes) -> None:
    """A body is a push, ignored or a 400; a push can be stored, logged and answered with."""
    if refused := refusal(hook.parse_delivery, CONFIG, data):
        assert refused.status in (200, 400)
        return
    for run in hook.parse_delivery(CONFIG, data, delivery="id", received=1760000000.0):
        assert hook.SHA.fullmatch(run.commit)
        assert hook.valid_ref(run.ref)
        run.ref.encode()
        assert len(record(run)) <= hook.SPOOL_RECORD
        assert hook.parse_run(record(run)) == run


def urls(data: bytes) -> None:
    """Any text is an address or none; the address of an address is the same."""
    text = data.decode("utf-8", "surrogateescape")
    address = hook.normalise_url(text)
    host, _, path = address.partition("/")
    if host:
        assert path
        assert path == path.strip("/")


def spooled(data: bytes) -> None:
    """A file in the spool is a push that makes the same file again, or it is moved aside."""
    try:
        run = hook.parse_run(data)
    except ValueError:
        return
    assert hook.parse_run(record(run)) == run


def record(run: hook.Run) -> bytes:
    """What the spool's file of a run holds."""
    return json.dumps({name: getattr(run, name) for name in NAMES}).encode()


def reports(data: bytes) -> None:
    """A report of any content becomes one line that fits the kubelet, and is red unless it is read.

    What has entities is red in any encoding.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "junit.xml")
        path.write_bytes(data)
        report = hook.junit_summary(path)
    summary = report.sentence
    assert len(report.failures) < hook.LOG_BYTES
    assert summary.isprintable()
    assert 0 < len(summary.encode()) <= 4096
    assert hook.TestReport(summary).is_red or re.fullmatch("[0-9]+ passed, 0 failed", summary)
    assert hook.TestReport(summary).is_red or b"<!ENTITY" not in data.replace(b"\0", b"")


# === Inputs ===

SEEDS = [p.read_bytes() for p in sorted(DELIVERIES.glob("gitlab-*.json")) if ".h" not in p.name]
RUN = hook.Run(
    id=hook.run_id("shop", "refs/heads/main", "a" * 40),
    app="shop", ref="refs/heads/main", commit="a" * 40, title="t", delivery="d", received=1.5,
)  # fmt: skip
KEYS = ["object_kind", "event_name", "ref", "after", "before", "project", "commits", "repository"]
KEYS += ["id", "message", "title", "git_http_url", "web_url", "checkout_sha"]
WORDS = ["push", "tag_push", "refs/heads/main", "refs/heads/a/b", "refs/tags/v1", "0" * 40]
WORDS += ["a" * 40, "\ud800", "\x00", "https://gitlab.example.com/example-group/demo-app.git"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=6)
    ),
    max_leaves=12,
)
PUSH = {"object_kind": "push", "ref": "refs/heads/main", "after": "a" * 40, "project": {}}


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A real input with a piece of it replaced."""
    seed = draw(st.sampled_from(seeds))
    start = draw(st.integers(0, len(seed)))
    end = min(len(seed), start + draw(st.integers(0, 40)))
    return seed[:start] + draw(st.binary(max_size=10)) + seed[end:]


def bodies() -> st.SearchStrategy[bytes]:
    changed = VALUES.map(lambda v: json.dumps({**PUSH, **v} if isinstance(v, dict) else v).encode())
    nested = st.integers(1, 100_000).map(lambda n: b"[" * n)
    return st.binary(max_size=50) | changed | damaged(SEEDS) | nested


def headers() -> st.SearchStrategy[bytes]:
    entry = st.binary(max_size=30) | st.sampled_from([b"v1,", b"v1,AAAA v1,", b"1760000000", b"id"])
    return st.lists(entry, max_size=6).map(b"\n".join)


def addresses() -> st.SearchStrategy[bytes]:
    pieces = ["https://", "ssh://", "git@", "[::1]", ":22", "/", ".git", "host", "%", "@", "[", "]"]
    piece = st.sampled_from(pieces) | st.text(max_size=5)
    text = st.lists(piece, max_size=8).map("".join)
    return text.map(str.encode) | st.binary(max_size=20)


def records() -> st.SearchStrategy[bytes]:
    values = json.loads(record(RUN))
    changes = st.dictionaries(st.sampled_from([*NAMES, "more"]), SCALARS, max_size=3)
    changed = changes.map(lambda more: json.dumps(values | more).encode())
    nested = st.integers(1, 100_000).map(lambda n: b"[" * n)
    return changed | damaged([record(RUN)]) | nested | st.binary(max_size=30)


TAGS = ["testsuites", "testsuite", "testcase", "failure", "error", "skipped", "x:testcase", "a"]
ATTRIBUTES = [
    "",
    ' failures="1"',
    ' errors="x"',
    ' name="a&#10;b"',
    " name='ü'",
    ' xmlns="u"',
    " x",
]
OTHERS = ["text", "<!-- c -->", "<![CDATA[<!DOCTYPE a>]]>", "&amp;", "&b;", "<?pi ?>", "<", "\0"]
PROLOGS = ["", '<?xml version="1.0"?>', '<?xml version="1.0" encoding="{}"?>', " ", "\ufeff"]
PROLOGS += ['<!DOCTYPE a [<!ENTITY b "c">]>', "<!DOCTYPE a>"]


def junit_reports() -> st.SearchStrategy[bytes]:
    prologs, tags, attributes, others = map(st.sampled_from, (PROLOGS, TAGS, ATTRIBUTES, OTHERS))
    elements = st.builds("<{0}{1}>{2}</{0}>".format, tags, attributes, others)
    inner = st.lists(elements | others, max_size=5).map("".join)
    roots = st.sampled_from(["testsuites", "a"])
    whole = st.builds("{0}<{1}{2}>{3}</{1}>".format, prologs, roots, attributes, inner)
    encodings = ["utf-8", "utf-16", "utf-16-be", "latin-1", "cp1252"]

    def encoded(text: str, encoding: str) -> bytes:
        return text.replace("{}", encoding).encode(encoding, "replace")

    texts = st.builds(encoded, whole, st.sampled_from(encodings))
    return texts | st.binary(max_size=50) | damaged([b"<testsuites><testcase/></testsuites>"])


class Target(NamedTuple):
    run: Callable[[bytes], None]
    inputs: st.SearchStrategy[bytes]


TARGETS = {
    "signatures": Target(signatures, headers()),
    "pushes": Target(pushes, bodies()),
    "urls": Target(urls, addresses()),
    "spool": Target(spooled, records()),
    "reports": Target(reports, junit_reports()),
}


# === Running ===


def with_hypothesis(target: Target, seconds: float) -> int:
    """Make inputs until the time is over; return how many."""
    until = time.monotonic() + seconds
    inputs = 0

    @settings(
        max_examples=500,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def once(data: bytes) -> None:
        nonlocal inputs
        inputs += 1
        target.run(data)

    while time.monotonic() < until:
        once()
    return inputs


def with_atheris(name: str, seconds: float) -> int:
    """Let libFuzzer run one target in a process of its own; return its exit status."""
    script = (
        "import sys, atheris\n"
        "with atheris.instrument_imports(include=['gitops_hook', 'json', 'urllib']):\n"
        "    from tests import fuzz\n"
        f"atheris.Setup(sys.argv, fuzz.TARGETS[{name!r}].run)\n"
        "atheris.Fuzz()\n"
    )
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate([*SEEDS, record(RUN)]):
            Path(corpus, str(number)).write_bytes(seed)
        limits = [f"-max_total_time={int(seconds)}", "-verbosity=0", "-rss_limit_mb=1024"]
        argv = [sys.executable, "-c", script, corpus, *limits, f"-artifact_prefix={corpus}/found-"]
        status = subprocess.run(argv, check=False, timeout=seconds + 60).returncode
        for finding in Path(corpus).glob("found-*"):
            print(f"{name}: {finding.read_bytes()!r}")
    return status


def has_atheris() -> bool:
    probe = [sys.executable, "-c", "import atheris"]
    return subprocess.run(probe, check=False, stderr=subprocess.DEVNULL).returncode == 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of them together")
    args = parser.parse_args(argv)
    names = args.targets or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    guided, share = has_atheris(), args.seconds / len(names)
    for name in names:
        if guided:
            if status := with_atheris(name, share):
                return 1 if status > 0 else 2
            print(f"{name}: nothing found in {share:.0f} s by atheris")
        else:
            inputs = with_hypothesis(TARGETS[name], share)
            print(f"{name}: nothing found in {inputs} inputs by hypothesis")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    sys.exit(main(sys.argv[1:]))
