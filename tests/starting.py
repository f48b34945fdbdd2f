"""How tests start the program: as its image does, from what was compiled before."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.measuring import MEASURING

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(os.environ.get("HOOK_PROGRAM") or ROOT / "gitops_hook.py").resolve()


def argv_of(*args: str, program: Path = PROGRAM) -> list[str]:
    """Return the command line of the program; it needs the environment that `finding` returns.

    Python compiles a file that it is given anew each time, which takes longer than most commands.
    """
    return [sys.executable, "-P", "-m", program.stem, *args]


def finding(program: Path = PROGRAM) -> dict[str, str]:
    """Return the variables by which Python finds the program, and by which it is measured."""
    return {**MEASURING, "PYTHONPATH": str(program.parent)}
