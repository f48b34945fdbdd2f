"""The fault table as it came out, below what pytest says of its cells."""

from __future__ import annotations

from _pytest.terminal import TerminalReporter

from tests.e2e.pairs import SICKNESSES, TROUBLES
from tests.e2e.table import ENDS, LEFT_OUT, STEPS, cells


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Print how each cell that was gone through ended, and why others are left out."""
    stats = terminalreporter.stats
    pairs_summary(terminalreporter)
    ended = {r.nodeid: kind for kind in ("passed", "failed") for r in stats.get(kind, ())}
    went = {node.partition("[")[2].rstrip("]"): kind for node, kind in ended.items()}
    if not any(str(cell) in went for cell in cells()):
        return
    terminalreporter.section("how a deployment ends, by the trouble in its steps")
    rows: dict[str, list[str]] = {"": list(STEPS)}
    for cell in cells():
        shown = {"passed": cell.end, "failed": "FAILED"}.get(went.get(str(cell), ""), "-")
        rows.setdefault(cell.trouble, []).append(cell.end if cell.end in LEFT_OUT else shown)
    for name, row in rows.items():
        terminalreporter.write_line(f"{name:12}" + "".join(f"{word:11}" for word in row).rstrip())
    for mark, why in LEFT_OUT.items():
        terminalreporter.write_line(f"{mark} left out: {why}")
    for word, end in ENDS.items():
        text = f"run {end.outcome} ({end.reason}), served: {end.way}, beside: {end.beside}"
        terminalreporter.write_line(f"{word:12} {text}")


def pairs_summary(reporter: TerminalReporter) -> None:
    """Print after how many seconds traffic was back in each pair that was gone through."""
    came = [r for kind in ("passed", "failed") for r in reporter.stats.get(kind, ())]
    named = {r.nodeid.partition("[")[2].rstrip("]"): r for r in came if r.when == "call"}
    shown = {
        name: "".join(f"{value:.1f} s" for key, value in report.user_properties if key == "seconds")
        + " FAILED" * report.failed
        for name, report in named.items()
    }
    rows = {t: [shown.get(f"{t}-{s}", "-") for s in SICKNESSES] for t in TROUBLES}
    if not any(cell != "-" for row in rows.values() for cell in row):
        return
    reporter.section("seconds until traffic was back, from when a patch was possible")
    for name, row in {"": list(SICKNESSES), **rows}.items():
        reporter.write_line(f"{name:20}" + "".join(f"{cell:16}" for cell in row).rstrip())
