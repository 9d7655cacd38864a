"""The sample files that ship with the package.

Purpose: a first run without a download: small corpora in MiniMind's formats, and a tokenizer.
Principle: the texts are written by `generate.py` from a seed, the tokenizer by `train/tokenizer.py` from them and from
    classical Chinese poems, web and encyclopedia paragraphs; both are committed, so that nothing has to be
    made before the first step.
Properties: Chinese and English about half and half; facts are true, sums are right; a test regenerates the texts and
    compares them byte for byte.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def path(name: str) -> Path:
    """Where a sample lies.

    Args:
        name: such as "pretrain.jsonl" or "tokenizer".

    Raises:
        ValueError: there is none of that name; the message lists those that are there.
    """
    found = FOLDER / name
    if not found.exists():
        there = sorted(p.name for p in FOLDER.iterdir() if p.suffix == ".jsonl" or p.is_dir())
        raise ValueError(f"no sample {name!r}; there are {', '.join(there)}")
    return found
