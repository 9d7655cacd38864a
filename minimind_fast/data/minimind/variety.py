"""What MiniMind changes in a training chat: a system prompt for some, no empty thought for most, whole turns as targets.

Purpose: `Variety` says how a stage's training rows differ from the file's; `draw` decides it for one row.
Principle: a draw is a function of the seed and of the row's content, so it depends on neither order, ranks nor a resume.
    A row is drawn once and keeps its form in every epoch (MiniMind draws anew each time a row is read).
Properties: rows with tools get no system prompt. Both sides of a preference pair share one draw, so they keep one prompt.

Source: the ratios, the ten prompts and the rule for tools are those of MiniMind's dataset/lm_dataset.py (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

SYSTEM_PROMPTS = (
    "你是一个知识丰富的AI，尽力为用户提供准确的信息。",
    "你是minimind，一个小巧但有用的语言模型。",
    "你是一个专业的AI助手，请提供有价值的回答。",
    "你是minimind，请尽力帮助用户解决问题。",
    "你是一个可靠的AI，请给出准确的回答。",
    "You are a helpful AI assistant.",
    "You are minimind, a lightweight intelligent assistant.",
    "You are a friendly chatbot. Please answer the user's questions carefully.",
    "You are a knowledgeable AI. Try your best to provide accurate information.",
    "You are minimind, a small but useful language model.",
)
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
_THOUGHT_BY_PROMPT = re.compile(r"<think>\n(?:\n</think>\n\n)?\Z")


@dataclass(frozen=True)
class Variety:
    """How training rows differ from the file's; the defaults change nothing.

    Attributes:
        system_ratio: share of the chats without a system prompt that get one of SYSTEM_PROMPTS.
        empty_think_ratio: share of the rows that keep their empty thoughts.
        whole_turn: what follows "assistant" in a turn is learned to its end: the thought's opening, even an empty thought,
            and the newline after the end marker.
        seed: of the draws.
    """

    system_ratio: float = 0.0
    empty_think_ratio: float = 1.0
    whole_turn: bool = False
    seed: int = 42

    @property
    def draws(self) -> bool:
        """Whether any row may change by chance."""
        return self.system_ratio > 0 or self.empty_think_ratio < 1

    @property
    def identity(self) -> list[Any]:
        """What decides the documents, for a cache's name; empty if nothing changes."""
        if not self.draws and not self.whole_turn:
            return []
        prompts = SYSTEM_PROMPTS if self.system_ratio else ()
        ratios = [self.system_ratio, self.empty_think_ratio, self.seed] if self.draws else []
        return [*ratios, prompts, self.whole_turn]

    def draw(self, row: dict[str, Any]) -> Draw:
        """What happens to a row.

        Args:
            row: as read; equal rows are drawn alike.
        """
        if not self.draws:
            return Draw(None, False)
        content = json.dumps(row, sort_keys=True, default=str)
        digest = hashlib.blake2b(f"{self.seed} {content}".encode(), digest_size=24).digest()
        chance, which, keep = (int.from_bytes(digest[i : i + 8]) / 2**64 for i in (0, 8, 16))
        prompt = SYSTEM_PROMPTS[int(which * len(SYSTEM_PROMPTS))] if chance < self.system_ratio else None
        return Draw(prompt, keep >= self.empty_think_ratio)


@dataclass(frozen=True)
class Draw:
    """What happens to one row.

    Attributes:
        system: a system prompt to begin with, or None.
        drops: whether empty thoughts go.
    """

    system: str | None
    drops: bool

    def system_for(self, messages: list[dict[str, Any]], tools: Any) -> str | None:
        """The system prompt to put before these messages, if any.

        Args:
            messages: of the chat.
            tools: its tools, or None.
        """
        return None if tools or messages[0]["role"] == "system" else self.system

    def shorten(self, text: str, answers: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """A rendered chat without its empty thoughts.

        Args:
            text: the chat.
            answers: (start, end) character span of each answer, in order.

        Returns:
            (the text, the spans in it); unchanged if there is nothing to drop.
        """
        if not self.drops or EMPTY_THOUGHT not in text:
            return text, answers
        pieces, spans, at, length = [], [], 0, 0
        for bound in (*(bound for answer in answers for bound in answer), len(text)):
            pieces.append(text[at:bound].replace(EMPTY_THOUGHT, ""))
            at, length = bound, length + len(pieces[-1])
            spans.append(length)
        return "".join(pieces), list(zip(spans[0:-1:2], spans[1:-1:2], strict=True))


def whole_turn(text: str, start: int, end: int) -> tuple[int, int]:
    """The span of an answer as MiniMind counts it.

    Args:
        text: a rendered chat.
        start: where the answer begins, after its generation prompt.
        end: after its end marker.

    Returns:
        (start before the thought that the prompt opened or left empty, end after the newline).
    """
    opened = _THOUGHT_BY_PROMPT.search(text, 0, start)
    return (opened.start() if opened else start), end + (text[end : end + 1] == "\n")
