"""The sample files that ship with the package.

Purpose: a first run without a download: small corpora in MiniMind's formats, and a tokenizer.
Principle: `generate.py` writes the texts from a seed; `train/tokenizer.py` trained the tokenizer on them and on classical
    Chinese poems, web and encyclopedia paragraphs. Both are committed, so a first run needs no preparation.
Properties: about half Chinese, half English; facts are true and sums are right; a test regenerates the texts and compares
    them byte for byte.
"""

from __future__ import annotations

from pathlib import Path

from minimind_fast.errors import UserError

FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """Return the path of a sample.

    Args:
        name: such as "pretrain.jsonl" or "tokenizer".

    Raises:
        ValueError: no such sample; the message lists those that exist.
    """
    found = FOLDER / name
    if not found.exists():
        there = sorted(p.name for p in FOLDER.iterdir() if p.suffix == ".jsonl" or p.is_dir())
        raise UserError(f"no sample {name!r}; there are {', '.join(there)}")
    return found
