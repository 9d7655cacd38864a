"""User functions named on the command line.

Purpose: `load("--loss", "mine.py:focal")`; also for rewards.
Principle: MODULE:FUNCTION (an importable module, also from the current folder) or FILE.py:FUNCTION.
Properties: every mistake is a ValueError that names the option and what was looked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def load(option: str, name: str) -> Callable:
    """Import a function by name.

    Args:
        option: the command-line option, for errors.
        name: MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises:
        ValueError: no such function, or its file cannot be imported.
    """
    where, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"{option} {name}: give MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        found = getattr(_module(where), function)
    except AttributeError:
        raise ValueError(f"{option} {name}: {where} has no {function}") from None
    except Exception as error:  # anything the user's file may raise while it is imported
        raise ValueError(f"{option} {name}: {where} cannot be imported: {error!r}") from error
    if not callable(found):
        raise ValueError(f"{option} {name}: {function} is no function")
    return found


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
