"""The formats that rows come in, each with the function that turns its rows into ours: one table.

Purpose: `Formats` recognises a row and adapts it, so that every reader after it knows one format only: `text`, or
    `conversations` of role and content, or `chosen` and `rejected` conversations.
Principle: a format is recognised by its fields, row by row, and told once a file; `--data_format` forces one. To add one:
    a function and a line in FORMATS.
Properties: nothing is dropped: fields that a format does not use stay in the row, where `fields` judges them.

Source: the datasets pages of LLaMA-Factory (ShareGPT, Alpaca), TRL and OpenAI's fine-tuning guide, for names of fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minimind_fast.data.fields import is_neutral
from minimind_fast.errors import DataError

Row = dict[str, Any]
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        name: for --data_format.
        kind: what its rows hold: "text", "chats", "pairs" or "questions".
        shown: what the log calls it.
        fits: whether a row has its fields.
        adapt: a row to ours; raises DataError for one that it cannot read.
    """

    name: str
    kind: str
    shown: str
    fits: Callable[[Row], bool]
    adapt: Callable[[Row], Row]


def _without(row: Row, *names: str, **new: Any) -> Row:
    return {**{name: value for name, value in row.items() if name not in names}, **new}


def _as_it_is(row: Row) -> Row:
    return row


# ------------------------------------------------------------------------------------------------------------- ShareGPT


def _turns(row: Row) -> Any:
    return row.get("conversations", row.get("conversation"))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and "from" in turn and "value" in turn


def _is_sharegpt(row: Row) -> bool:
    turns = _turns(row)
    return isinstance(turns, list) and any(map(_is_turn, turns)) and not set(SIDES) & set(row)


def _sharegpt_message(turn: Any, number: int) -> Any:
    if not _is_turn(turn):
        return turn  # the reader of chats says what is wrong with it
    if turn["from"] == "function_call":
        try:
            calls = json.loads(turn["value"])
        except (ValueError, TypeError) as error:
            raise DataError(f"message {number}: the function call is not JSON: {error}") from None
        calls = calls if isinstance(calls, list) else [calls]
        return _without(turn, "from", "value", role="assistant", content="", tool_calls=calls)
    role = SHAREGPT_ROLES.get(turn["from"], turn["from"]) if isinstance(turn["from"], str) else turn["from"]
    return _without(turn, "from", "value", role=role, content=turn["value"])


def _sharegpt_messages(turns: list[Any]) -> list[Any]:
    return [_sharegpt_message(turn, number) for number, turn in enumerate(turns, 1)]


def _sharegpt(row: Row) -> Row:
    return _without(row, "conversation", conversations=_sharegpt_messages(_turns(row)))


def _is_sharegpt_pair(row: Row) -> bool:
    return isinstance(_turns(row), list) and all(_is_turn(row.get(side)) for side in SIDES)


def _sharegpt_pair(row: Row) -> Row:
    before = _turns(row)
    sides = {side: _sharegpt_messages([*before, row[side]]) for side in SIDES}
    return _without(row, "conversation", "conversations", **sides)


# --------------------------------------------------------------------------------------------------------------- Alpaca


def _alpaca_question(row: Row) -> list[Any]:
    messages: list[Any] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise DataError('"history" must be a list of [question, answer]')
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question, more = row["instruction"], row.get("input")
    if not isinstance(question, str) or not isinstance(more, (str, type(None))):
        raise DataError('"instruction" and "input" must be strings')
    return [*messages, {"role": "user", "content": "\n".join(filter(None, (question, more)))}]


def _alpaca(row: Row) -> Row:
    messages = [*_alpaca_question(row), {"role": "assistant", "content": row["output"]}]
    return _without(row, "instruction", "input", "output", "history", conversations=messages)


def _alpaca_pair(row: Row) -> Row:
    before = _alpaca_question(row)
    sides = {side: [*before, {"role": "assistant", "content": row[side]}] for side in SIDES}
    return _without(row, "instruction", "input", "history", **sides)


# --------------------------------------------------------------------------------------------------------------- OpenAI


def _openai(row: Row) -> Row:
    return _without(row, "messages", "parallel_tool_calls", conversations=row["messages"])


def _is_openai_pair(row: Row) -> bool:
    asked = row.get("input")
    return isinstance(asked, dict) and "messages" in asked and "preferred_output" in row


def _openai_pair(row: Row) -> Row:
    asked, sides = row["input"], [row["preferred_output"], row.get("non_preferred_output") or ()]
    if not all(isinstance(part, list) for part in (asked["messages"], *sides)):
        raise DataError('"messages", "preferred_output" and "non_preferred_output" must be lists of messages')
    chosen, rejected = ([*asked["messages"], *side] for side in sides)
    rest = _without(row, "input", "preferred_output", "non_preferred_output")
    return {**_without(asked, "messages", "parallel_tool_calls"), **rest, "chosen": chosen, "rejected": rejected}


# ------------------------------------------------------------------------------------------------------------------ TRL


def _messages(value: Any, role: str, name: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise DataError(f'"{name}" must be a string or a list of messages')
    return value


def _completion(row: Row) -> Row:
    messages = _messages(row["prompt"], "user", "prompt") + _messages(row["completion"], "assistant", "completion")
    return _without(row, "prompt", "completion", conversations=messages)


def _prompt(row: Row) -> Row:
    return _without(row, "prompt", conversations=_messages(row["prompt"], "user", "prompt"))


def _explicit_prompt(row: Row) -> Row:
    """The prompt goes before both answers, unless they hold it already (a whole chat, as in UltraFeedback)."""
    prompt = _messages(row["prompt"], "user", "prompt")
    sides = {}
    for side in SIDES:
        answer = _messages(row[side], "assistant", side)
        whole = not answer or not isinstance(answer[0], dict) or answer[0].get("role") != "assistant"
        if whole and not _holds(answer, prompt):
            raise DataError(f'"prompt" is not part of "{side}", which begins with another message than an answer')
        sides[side] = answer if whole else [*prompt, *answer]
    return _without(row, "prompt", **sides)


def _holds(messages: list[Any], prompt: list[Any]) -> bool:
    said = [(m.get("role"), m.get("content")) for m in messages if isinstance(m, dict)]
    return all(isinstance(m, dict) and (m.get("role"), m.get("content")) in said for m in prompt)


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names)


def _has_and_no(names: tuple[str, ...], *others: str) -> Callable[[Row], bool]:
    return lambda row: all(name in row for name in names) and not any(not is_neutral(row.get(name)) for name in others)


# The first that fits is taken.
FORMATS = (
    Format("minimind", "text", "MiniMind's texts", _has("text"), _as_it_is),
    Format("sharegpt", "chats", "ShareGPT's chats (from, value)", _is_sharegpt, _sharegpt),
    Format("minimind", "chats", "MiniMind's chats (role, content)", _has("conversations"), _as_it_is),
    Format("openai", "chats", "OpenAI's chats (messages)", _has_and_no(("messages",), *SIDES), _openai),
    Format("alpaca", "chats", "Alpaca's rows (instruction, input, output)", _has("instruction", "output"), _alpaca),
    Format("trl", "chats", "TRL's rows (prompt, completion)", _has("prompt", "completion"), _completion),
    Format("trl", "chats", "TRL's prompts", _has_and_no(("prompt",), *SIDES, "response", "output"), _prompt),
    Format(
        "sharegpt", "pairs", "ShareGPT's pairs (conversations, chosen, rejected)", _is_sharegpt_pair, _sharegpt_pair
    ),
    Format("alpaca", "pairs", "Alpaca's pairs (instruction, chosen)", _has("instruction", *SIDES), _alpaca_pair),
    Format("openai", "pairs", "OpenAI's pairs (input, preferred_output)", _is_openai_pair, _openai_pair),
    Format("trl", "pairs", "TRL's pairs (prompt, chosen, rejected)", _has("prompt", *SIDES), _explicit_prompt),
    Format("minimind", "pairs", "MiniMind's pairs (chosen, rejected)", _has(*SIDES), _as_it_is),
    Format("minimind", "questions", "questions with choices (of `eval`)", lambda row: True, _as_it_is),
)
NAMES = tuple(dict.fromkeys(f.name for f in FORMATS))


class Formats:
    """Adapts rows, and remembers what they were taken for.

    Args:
        kind: what is wanted, as of a `Format`.
        name: one of NAMES, or "auto" to recognise each row.

    Attributes:
        seen: what the log calls each format that occurred in the current file, in order.
        said: what the log was told, over all files.

    Raises:
        DataError: the format has no rows of that kind.
    """

    def __init__(self, kind: str, name: str = "auto") -> None:
        self.kind, self.name = kind, name
        self.seen: dict[str, None] = {}
        self.said: list[str] = []
        self._candidates = [f for f in FORMATS if f.kind == kind and name in ("auto", f.name)]
        if not self._candidates:
            others = ", ".join(dict.fromkeys(f.name for f in FORMATS if f.kind == kind))
            raise DataError(f"--data_format {name} has no {kind}; choose auto, or of {others}")

    def adapt(self, row: Row) -> Row:
        """A row of any format as one of ours; one that fits none comes back as it is.

        Raises:
            DataError: the row is unusable, or not of the format that was forced.
        """
        for candidate in self._candidates:
            if candidate.fits(row):
                self.seen[candidate.shown] = None
                return candidate.adapt(row)
        if self.name != "auto":
            wanted = " or ".join(f.shown for f in self._candidates)
            raise DataError(
                f"not of --data_format {self.name}: {wanted} (its fields: {', '.join(sorted(row)) or 'none'})"
            )
        return row
