"""How much memory a piece of the program needs, with everything that it starts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.world import session_members

ROOT = Path(__file__).resolve().parent.parent


def peak_of(script: str, *args: str) -> tuple[str, float]:
    """Run a script beside the program; return what it printed, and the peak of all in MB."""
    argv = [sys.executable, "-c", f"from pathlib import Path\nimport gitops_hook\n{script}", *args]
    peak = 0.0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=output, start_new_session=True)
        while process.poll() is None:
            peak = max(peak, sum(map(shared_out, session_members(process.pid))))
            time.sleep(0.005)  # so that looking does not take the processor from what is looked at
        output.seek(0)
        said = output.read()
    assert process.returncode == 0, said
    return said, peak


def shared_out(process: int) -> float:
    """Return the MB of a process, pages that it shares counted in parts; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().split("\n"):
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
