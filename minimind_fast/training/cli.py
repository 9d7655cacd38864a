"""A dataclass as a command line.

Purpose: `parse(TrainConfig)` reads a stage's options from the command line and from `--config FILE`.
Principle: each field made with `option` is an option of the same name, parsed according to its type.
Properties: imports no torch; mistakes are reported before anything is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any

from minimind_fast.data.rows import read_object
from minimind_fast.errors import UserError
from minimind_fast.training.config import Config


def _to_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected 1/0, true/false, yes/no or on/off, not {text!r}")


def parse(cls: type[Config], argv: list[str] | None = None, description: str = "") -> Config:
    """Build a config from the command line.

    A bool takes `--flag`, `--flag 1`, `--flag false` or `--no_flag`; a list takes one or more values. `--config FILE`
    reads defaults from JSON; options on the command line win. The launcher's `--local_rank` is accepted and unused.

    Args:
        cls: a dataclass whose fields are made with `option`.
        argv: arguments without the program's name; sys.argv's if None.
        description: text for --help.

    Returns:
        An instance of cls.
    """
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="JSON file with defaults for these options")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}  # type: ignore[arg-type]
    for name, f in fields.items():
        _add(parser, name, hints[name], f)
    typed = vars(parser.parse_args(argv))
    typed.pop("local_rank", None)
    file = typed.pop("config", None)
    values = {**_read_defaults(parser, file, set(fields)), **typed} if file else typed
    try:
        return cls(**values)
    except UserError as error:
        parser.error(str(error))


def _add(parser: argparse.ArgumentParser, name: str, hint: Any, f: dataclasses.Field) -> None:
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
    shown = "none" if default in (None, "", []) else default
    text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
    inner = [a for a in typing.get_args(hint) if a is not type(None)] if isinstance(hint, types.UnionType) else [hint]
    kind = inner[0]
    if kind is bool:
        parser.add_argument(f"--{name}", nargs="?", const=True, type=_to_bool, help=text)
        parser.add_argument(f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
    elif typing.get_origin(kind) is list:
        parser.add_argument(f"--{name}", nargs="+", type=typing.get_args(kind)[0], help=text)
    else:
        parser.add_argument(f"--{name}", type=kind, choices=f.metadata.get("choices"), help=text)


def _read_defaults(parser: argparse.ArgumentParser, file: str, known: set[str]) -> dict[str, Any]:
    try:
        raw = read_object(file)
    except UserError as error:
        parser.error(f"--config: {error}")
    if unknown := sorted(set(raw) - known):
        parser.error(f"--config {file}: unknown options {unknown}")
    return raw
