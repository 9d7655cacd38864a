"""`minimind-fast train STAGE [options]`: run a training stage, installed or from a clone.

Purpose: trains without a clone: `minimind-fast train sft` is `python train/sft.py`.
Principle: the stages are the modules of `minimind_fast.stages`, listed with the first line of their docstrings.
Properties: one process. For several use `deepspeed --module minimind_fast.stages.sft`, or torchrun with `-m`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from minimind_fast import stages
from minimind_fast.errors import UserError


def found() -> dict[str, str]:
    """stage -> what it does, in one line. Parsed from the files: importing them all would take seconds."""
    files = sorted(path for path in Path(stages.__path__[0]).glob("*.py") if path.stem != "__init__")
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    return {name: (ast.get_docstring(tree) or name).splitlines()[0] for name, tree in trees.items()}


def main(argv: list[str]) -> int:
    """`minimind-fast train`: run a stage, or list the stages.

    Args:
        argv: the stage and its options.

    Returns:
        The exit code; a stage that fails exits by itself.

    Raises:
        ValueError: there is no such stage.
    """
    there = found()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: minimind-fast train STAGE [options]\n")
        for name, text in there.items():
            print(f"  {name:10} {text}")
        print("\nminimind-fast train STAGE --help shows a stage's options. Several ranks:")
        print("  deepspeed --module minimind_fast.stages.STAGE [options]")
        return 0
    name, *options = argv
    if name not in there:
        raise UserError(f"no stage {name!r}; choose one of {', '.join(there)}")
    from minimind_fast.training.setup import start  # imports torch, which the list above does without

    sys.argv = [f"minimind-fast train {name}", *options]
    start(importlib.import_module(f"minimind_fast.stages.{name}").main)
    return 0
