"""User functions named on the command line.

Purpose: `load("--loss", "mine.py:focal")`; also for rewards. `call` runs one, and names it and its line if it fails.
Principle: MODULE:FUNCTION (an importable module, also from the current folder) or FILE.py:FUNCTION.
Properties: every mistake is a UserError that names the option and what was looked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from minimind_fast.errors import UserError


def load(option: str, name: str) -> Callable:
    """Import a function by name.

    Args:
        option: the command-line option, for errors.
        name: MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises:
        UserError: no such function, or its file cannot be imported.
    """
    where, colon, function = name.rpartition(":")
    if not colon:
        raise UserError(f"{option} {name}: give MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        found = getattr(_module(where), function)
    except AttributeError:
        raise UserError(f"{option} {name}: {where} has no {function}") from None
    except Exception as error:  # anything the user's file may raise while it is imported
        raise UserError(f"{option} {name}: {where} cannot be imported: {error!r}") from error
    if not callable(found):
        raise UserError(f"{option} {name}: {function} is no function")
    return found


def call(what: str, function: Callable, *arguments: Any) -> Any:
    """Call a user's function.

    Args:
        what: names it in errors, such as "--reward mine.py:score".
        function: from `load`, or one of ours.
        arguments: the function's.

    Raises:
        UserError: whatever the function raised, with the line of the function's own file where it happened.
    """
    try:
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        own = [frame for frame in frames if frame.filename == file] or frames
        place = f'in {own[-1].filename}, line {own[-1].lineno}: "{own[-1].line}"' if own else "before its first line"
        raise UserError(f"{what} failed {place}: {type(error).__name__}: {error}") from error


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # last: a user's file never shadows an installed module
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(f"plugin_{Path(where).stem}", where)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
