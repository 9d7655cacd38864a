"""The head of a result: date, commit, processor and command.

Purpose: makes numbers reproducible. Every benchmark writes its files with `write`.
Principle: `made` is the first key of the JSON and the first line of the Markdown; READMEs and docs show the rest (`body`).
Properties: absolute paths in the command are cut to their last part, so a result names no machine's folders.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEAD = re.compile(r"\*Made .*\*\n\n")


def processor() -> str:
    """The processor's name as reported by the system, its family, and its bf16 instructions."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    facts = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    if "model name" not in facts:
        return platform.processor()
    flags = facts.get("flags", "").split()
    found = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, {found[0] if found else 'no bf16 instructions'})"


def commit() -> str:
    """The checkout's commit, marked where tracked files differ from it; "unknown" without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=7", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command(argv: list[str]) -> str:
    """A command line as another machine could type it.

    Args:
        argv: the interpreter and its arguments, such as `sys.orig_argv`.
    """
    words = [re.sub(r"(^|=)/\S*?([^/]+)/?$", r"\1\2", word) for word in argv[1:]]
    return shlex.join(words if argv[1:] and os.path.isabs(argv[1]) else ["python", *words])


def made() -> dict[str, Any]:
    """The head of a result that is being made now: date, commit, processor, command."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "command": command(sys.orig_argv),
    }


def line(head: dict[str, Any]) -> str:
    """A head from `made` as the first lines of a Markdown file."""
    return f"*Made {head['date']}, commit {head['commit']}, {head['processor']}: `{head['command']}`*\n\n"


def body(text: str) -> str:
    """A result's Markdown without its head."""
    return HEAD.sub("", text, count=1) if HEAD.match(text) else text


def environment(**more: str) -> dict[str, str]:
    """Environment for a child process, which finds this checkout's modules from any folder.

    Args:
        more: more variables to set.
    """
    found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(found)} | more


def write(stem: Path, result: dict[str, Any], text: str, head: dict[str, Any] | None = None) -> None:
    """Write STEM.json and STEM.md, both with their head.

    Args:
        stem: path without a suffix; its folder is created.
        result: content of the JSON.
        text: content of the Markdown.
        head: from `made`; created now if None.
    """
    head = head or made()
    stem.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"made": head, **result}, indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(data + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(line(head) + text, encoding="utf-8")
