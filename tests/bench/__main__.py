"""`make bench`: what it costs, beside the way of the article and beside what kubectl alone takes.

Everything is measured in one run on the stand-in cluster with the real kubectl: ratios say more
than seconds. Clients and the server of the baseline are processes of their own. `--short` measures
only a burst of pushes, red runs and rollbacks, and switches a few times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

from tests.bench.observing import Row
from tests.bench.pushes import measure_process, measure_pushes
from tests.bench.reports import measure_reports
from tests.bench.switches import measure_deployments, measure_refusals, measure_switches
from tests.fleet import fleet
from tests.world import BIN, ROOT, Object


def machine() -> str:
    """Describe what this ran on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    argv = [str(BIN / "kubectl"), "version", "--client", "-o", "json"]
    said = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    words = [f"{os.cpu_count()} cores", f"{memory:.0f} GiB", f"load {os.getloadavg()[0]:.1f}"]
    words += [
        f"Python {platform.python_version()}",
        f"kubectl {said['clientVersion']['gitVersion']}",
    ]
    return ", ".join([*words, platform.platform()])


def shown(value: float | None) -> str:
    """Return a number as the table has it."""
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def measure(directory: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Measure everything that is asked for, row by row."""
    pushes: Object = {"shop": {"environments": [], "test": "sleep 600"}}
    limits = {"max_running": 1, "spool_files": 60_000}
    names = ["ann", "bob"] if options.short else ["ann", "bob", "cal", "dan"]
    with get_context("spawn").Pool(1) as clients:
        with fleet(directory / "pushes", pushes, speed=1.0, limits=limits) as world:
            yield from measure_pushes(world, clients, 1 if options.short else 3)
            if not options.short:
                yield from measure_process(world, clients)
        long_tests: Object = {"test": "sleep 600", "environments": ["staging", "production"]}
        switches = {**{name: {} for name in names}, "red": long_tests}
        with fleet(directory / "switches", switches, speed=1.0) as world:
            apps = [world[name] for name in names]
            yield from measure_deployments(apps)
            yield from measure_switches(apps, clients, 4 if options.short else 50)
            # last, since programs before 0.2 do not refuse before they deploy
            yield from measure_refusals(world["red"])
        yield from measure_reports(directory / "reports", 2 if options.short else 5)


def interrupt(*_: object) -> NoReturn:
    """End as by Ctrl-C, which ends everything that was started."""
    raise KeyboardInterrupt


def main() -> None:
    """Measure, print the table as it grows, and write bench.json whatever happens."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="less of everything, in two minutes")
    options, rows = parser.parse_args(), list[Row]()
    signal.signal(signal.SIGTERM, interrupt)
    print(
        machine(), "\n| | ours | one kubectl a push | floor | target | |\n|---|---|---|---|---|---|"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="gitops-hook-bench-") as directory:
            for row in measure(Path(directory), options):
                rows.append(row)
                cells = map(shown, (row.ours, row.baseline, row.floor, row.target))
                print(f"| {row.name} | {' | '.join(cells)} | {row.unit} |", flush=True)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    finally:
        lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
        (ROOT / "bench.json").write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    main()
