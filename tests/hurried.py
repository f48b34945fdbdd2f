"""The program with shorter times, as a file of its own: what takes hours is seen in seconds."""

from __future__ import annotations

import re
from pathlib import Path

from tests.world import PROGRAM

TRIES = {"TRY_DELAYS": "(1.0, 2.0, 3.0)"}


def hurried(directory: Path, **constants: str) -> Path:
    """Write the program with other values of its constants; return the file."""
    text = PROGRAM.read_text("utf-8")
    for name, value in {**TRIES, **constants}.items():
        text, count = re.subn(rf"(?m)^{name} = \S.*?(?=  #|$)", f"{name} = {value}", text)
        assert count == 1, f"{name} is not one constant of the program"
    program = directory / "hurried.py"
    program.write_text(text, "utf-8")
    return program
