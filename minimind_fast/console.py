"""What every program does with its output: no text may end it, and a fault says where it is.

Purpose: `any_text_may_be_printed` when a program begins, `part` when it fails; for stages and commands.
Principle: a terminal that cannot show a character is no reason to lose a run.
Properties: imports nothing of ours.
"""

from __future__ import annotations

import io
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def any_text_may_be_printed() -> None:
    """Let a terminal or a file that is not UTF-8 show `?` for what it cannot."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def part(error: BaseException) -> str:
    """Where in the package an error came from, in words.

    Args:
        error: as caught.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(ROOT) or path.is_relative_to(ROOT.parent / "train"):
            return f"in {path.relative_to(ROOT.parent)}, {frame.name}"
    return "outside of minimind_fast"
