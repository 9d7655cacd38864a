"""Write the sample files: `python -m minimind_fast.data.samples.generate`.

Purpose: small corpora in MiniMind's formats for each stage, without a download.
Principle: a seeded generator draws every document: stories from `prose.py`, questions from `questions.py`, rows for later
    stages from `chats.py`.
Properties: deterministic to the byte; no document twice; about half Chinese, half English; under 1.5 MB for pretraining.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

from minimind_fast.data.samples import FOLDER, chats
from minimind_fast.data.samples.prose import NAMES_EN, NAMES_ZH, remarks_en, remarks_zh, story_en, story_zh
from minimind_fast.data.samples.questions import fact_en, fact_zh, sum_en, sum_zh

SEED = 20261124
PRETRAIN_ROWS, VAL_ROWS, REMARKS = 5200, 120, 104


def lesson_en(rng: Random) -> str:
    """Several questions with answers, as a textbook page or a conversation."""
    pairs = dict(rng.choice((sum_en, fact_en))(rng) for _ in range(rng.randint(2, 4))).items()
    if rng.random() < 0.5:
        return "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)
    asked = " ".join(q for q, _ in pairs)
    first, second = rng.sample([name for name in NAMES_EN if name not in asked], 2)
    return "\n".join(f"{first}: {q}\n{second}: {a}" for q, a in pairs) + f"\n{first}: Thank you, {second}."


def lesson_zh(rng: Random) -> str:
    """The same in Chinese."""
    pairs = dict(rng.choice((sum_zh, fact_zh))(rng) for _ in range(rng.randint(2, 4))).items()
    if rng.random() < 0.5:
        return "\n".join(f"问：{q}\n答：{a}" for q, a in pairs)
    asked = "".join(q for q, _ in pairs)
    first, second = rng.sample([name for name in NAMES_ZH if name not in asked], 2)
    return "\n".join(f"{first}：{q}\n{second}：{a}" for q, a in pairs) + f"\n{first}：谢谢你，{second}。"


def notes_en(rng: Random) -> str:
    """Facts as running text, each reason with its question."""
    facts = [fact_en(rng) for _ in range(rng.randint(3, 5))]
    return " ".join(dict.fromkeys(a if not a.startswith("Because") else f"{q} {a}" for q, a in facts))


def notes_zh(rng: Random) -> str:
    """The same in Chinese."""
    facts = [fact_zh(rng) for _ in range(rng.randint(3, 5))]
    return "".join(dict.fromkeys(a if not a.startswith("因为") else q + a for q, a in facts))


def documents(rng: Random, count: int) -> list[str]:
    """Distinct documents in alternating languages; `count` excludes the remarks."""
    writers: tuple[list[Callable[[Random], str]], ...] = (
        [story_zh, story_zh, story_zh, lesson_zh, notes_zh],
        [story_en, story_en, story_en, lesson_en, notes_en],
    )
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[rng.choice(writers[len(seen) % 2])(rng)] = None
    return list(seen)


def remarks(rng: Random, count: int) -> list[str]:
    """Distinct short remarks in alternating languages."""
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[(remarks_zh, remarks_en)[len(seen) % 2](rng)] = None
    return list(seen)


def write(folder: Path) -> None:
    """Write every sample file into an existing folder."""
    rng = Random(SEED)
    texts = documents(rng, PRETRAIN_ROWS - REMARKS + VAL_ROWS)
    pretrain = texts[VAL_ROWS:] + remarks(rng, REMARKS)
    rng.shuffle(pretrain)
    sft_val = chats.conversations(rng, 60, set())
    dpo_val = chats.preferences(rng, 40, set())
    reason_val = chats.reasoning(rng, 30, set())
    kept = chats.questions([*sft_val, *dpo_val, *reason_val])
    sft = chats.conversations(rng, 720, kept) + chats.thoughtful(rng, 48, kept) + chats.tool_calls(rng, 36)
    rng.shuffle(sft)
    # Mix in other questions, or the model would answer everything with its name.
    identity = chats.identity() + chats.conversations(Random(SEED + 1), 60, kept)
    Random(SEED).shuffle(identity)
    files: dict[str, Iterable[dict[str, Any]]] = {
        "pretrain.jsonl": [{"text": text} for text in pretrain],
        "pretrain_val.jsonl": [{"text": text} for text in texts[:VAL_ROWS]],
        "sft.jsonl": sft,
        "sft_val.jsonl": sft_val,
        "lora_identity.jsonl": identity,
        "dpo.jsonl": chats.preferences(rng, 200, kept),
        "dpo_val.jsonl": dpo_val,
        "reason.jsonl": chats.reasoning(rng, 200, kept),
        "reason_val.jsonl": reason_val,
        "grpo.jsonl": chats.prompts(rng, back=False, avoid=kept),
        "grpo_val.jsonl": chats.prompts(rng, back=True, avoid=kept),
    }
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the sample files.")
    parser.add_argument("--save_dir", type=Path, default=FOLDER)
    write(parser.parse_args().save_dir)
