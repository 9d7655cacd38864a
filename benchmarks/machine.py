"""What this machine is, for the head of a table."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as the system tells it, its family, and its instructions for bf16."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    facts = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    if "model name" not in facts:
        return platform.processor()
    flags = facts.get("flags", "").split()
    found = [name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if flag in flags]
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, {found[0] if found else 'no bf16 instructions'})"
