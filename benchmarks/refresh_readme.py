"""Put committed results into the marked sections of the READMEs: `python benchmarks/refresh_readme.py`.

Purpose: no number in a README is typed by hand.
Principle: between `<!-- results:NAME -->` and `<!-- /results -->` stands benchmarks/results/NAME.md, word for word.
Properties: a test fails when a section and its file differ.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README_zh.md")
SECTION = re.compile(r"<!-- results:(\w+) -->\n(.*?)<!-- /results -->", re.DOTALL)


def refreshed(text: str) -> str:
    """The text with every marked section taken from its file.

    Args:
        text: of a README.
    """

    def section(found: re.Match[str]) -> str:
        body = (ROOT / "benchmarks" / "results" / f"{found[1]}.md").read_text(encoding="utf-8")
        return f"<!-- results:{found[1]} -->\n{body}<!-- /results -->"

    return SECTION.sub(section, text)


if __name__ == "__main__":
    for name in READMES:
        file = ROOT / name
        file.write_text(refreshed(file.read_text(encoding="utf-8")), encoding="utf-8")
