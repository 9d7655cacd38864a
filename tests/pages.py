"""The pages that a user reads, and the commands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [ROOT / "README.md", ROOT / "README_zh.md", DOCS / "README.md", *sorted(DOCS.glob("*/*.md"))]


def fenced(text: str, *languages: str) -> list[str]:
    """The bodies of a page's blocks of code."""
    return [body for name, body in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S) if name in languages]


def commands(text: str) -> list[list[str]]:
    """Every command of a page's shell blocks, as words; those joined by && one by one."""
    found: list[list[str]] = []
    for block in fenced(text, "bash", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                found.append(words[:end])
                words = words[end + 1 :]
    return found
