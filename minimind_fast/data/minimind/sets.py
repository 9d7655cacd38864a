"""MiniMind's published data sets: name, size, stage, and about how many tokens.

Purpose: a stage without data says which file it wants and where it is; `minimind-fast plan --corpus NAME` knows its tokens.
Principle: sizes are those that MiniMind's README tells. Tokens are the size divided by the bytes a token takes, counted with
    MiniMind3's tokenizer on instruction data in the same formats (3.8 in Chinese, 3.3 in English): an estimate.
Properties: one table; nothing is downloaded.

Source: README of jingyaogong/minimind, August 2026, and December 2025 for the sets of MiniMind2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minimind_fast.errors import UserError

WHERE = (
    "https://www.modelscope.cn/datasets/gongjy/minimind_dataset/files",
    "https://huggingface.co/datasets/jingyaogong/minimind_dataset/tree/main",
)
BYTES_PER_TOKEN = {"text": 3.6, "chats": 3.7}  # of a file, JSON around the text included


@dataclass(frozen=True)
class DataSet:
    """A published file.

    Attributes:
        file: its name.
        megabytes: its size.
        stages: scripts in train/ that read it, the first one its purpose.
        kind: of its rows, a key of BYTES_PER_TOKEN.
        edition: 2 or 3, of MiniMind.
        first: the one to begin with.
    """

    file: str
    megabytes: float
    stages: tuple[str, ...]
    kind: str = "chats"
    edition: int = 3
    first: bool = False

    @property
    def tokens(self) -> float:
        """About how many tokens."""
        return self.megabytes * 1e6 / BYTES_PER_TOKEN[self.kind]

    @property
    def about(self) -> str:
        """The tokens as a person reads them, in two digits."""
        count = float(f"{self.tokens:.2g}")
        return next(f"{count / unit:g}{name}" for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= unit)

    @property
    def size(self) -> str:
        """As a person reads it."""
        m = self.megabytes
        return f"{m / 1000:g} GB" if m >= 1000 else f"{m:g} MB" if m >= 1 else f"{m * 1000:g} KB"


SETS = {
    s.file: s
    for s in (
        DataSet("pretrain_t2t_mini.jsonl", 1200, ("pretrain", "tokenizer"), "text", first=True),
        DataSet("pretrain_t2t.jsonl", 10_000, ("pretrain",), "text"),
        DataSet("sft_t2t_mini.jsonl", 1600, ("sft", "distill", "tokenizer"), first=True),
        DataSet("sft_t2t.jsonl", 14_000, ("sft", "distill")),
        DataSet("dpo.jsonl", 53, ("dpo",), first=True),
        DataSet("rlaif.jsonl", 24, ("grpo",), first=True),
        DataSet("pretrain_hq.jsonl", 1600, ("pretrain",), "text", 2),
        DataSet("sft_mini_512.jsonl", 1200, ("sft",), edition=2),
        DataSet("sft_512.jsonl", 7500, ("sft",), edition=2),
        DataSet("sft_1024.jsonl", 5600, ("sft",), edition=2),
        DataSet("sft_2048.jsonl", 9000, ("sft",), edition=2),
        DataSet("r1_mix_1024.jsonl", 340, ("reason",), edition=2, first=True),
        DataSet("lora_identity.jsonl", 0.0228, ("lora",), edition=2),
        DataSet("lora_medical.jsonl", 34, ("lora",), edition=2, first=True),
        DataSet("rlaif-mini.jsonl", 1, ("grpo",), edition=2),
    )
}


def find(name: str) -> DataSet:
    """A data set by its name.

    Args:
        name: the file's, with or without `.jsonl`.

    Raises:
        UserError: none is called so; the message lists them.
    """
    found = SETS.get(name) or SETS.get(f"{name}.jsonl")
    if found is None:
        raise UserError(f"--corpus {name}: no such data set of MiniMind's; there are {', '.join(SETS)}")
    return found


def missing(path: Path) -> str:
    """What to say of a file that is not there: where to get it, if it is one of MiniMind's; else nothing."""
    found = SETS.get(path.name)
    return (
        ""
        if found is None
        else f". It is one of MiniMind's data sets ({found.size}): download it from {WHERE[0]} or {WHERE[1]}"
    )


def offer(stage: str) -> str:
    """Where to get data for a real run of a stage, in one sentence; "" if there is none.

    Args:
        stage: a script's name.
    """
    found = next((s for s in SETS.values() if stage in s.stages and s.first), None)
    if found is None:
        return ""
    return (
        f"For a real run: --data_path {found.file} ({found.size}, about {found.about} tokens), from "
        f"{WHERE[0]} (docs/en/data.md)."
    )
