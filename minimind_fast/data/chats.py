"""Conversations to token ids with the answers marked as targets: the data of SFT, LoRA and reasoning.

Purpose: `{"conversations": [...]}` lines in MiniMind's formats become documents in which only the answers are targets.

Principle: the mask comes from the rendering, never from a search for marker tokens. For each answer the tokenizer's
template renders two texts: the chat including the answer, and the prompt the model would be given for it. The prompt is a
prefix of the first text; the rest, including the end marker, is the answer. Prompts and answers are encoded separately,
as in generation, so no token spans both.

Properties: correct for any template whose answers begin with its own generation prompt (otherwise an error says so). An
empty thought from the prompt is not trained; a thought the model writes is. The newline after the end marker is not
trained either: generation stops before it (MiniMind trains it). If a template renders finished turns differently from the
current one (it drops old thoughts), the chat becomes several documents, each as the model would see it. Ids equal those of
the whole text encoded at once, except where a token would straddle the start of an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from minimind_fast.data.cache import Document
from minimind_fast.data.rows import BadRow
from minimind_fast.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Generation prompts: the template's default, and the one that opens a thought.
PROMPTS: tuple[dict[str, Any], ...] = ({}, {"open_thinking": True, "enable_thinking": True})


@dataclass
class Chat:
    """A row, ready for the template.

    Attributes:
        messages: dicts with `role`, `content` and optionally `reasoning_content`, `tool_calls`.
        tools: JSON schemas of the functions, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass
class Layout:
    """A rendered text and the answers' spans in it.

    Attributes:
        text: ends with the last answer's end marker.
        answers: (start, end) character span of each answer, in order, including its end marker.
    """

    text: str
    answers: list[tuple[int, int]] = field(default_factory=list)

    def segments(self) -> Iterator[tuple[str, bool]]:
        """Yield the text in pieces: (piece, whether it is an answer)."""
        bounds = [0, *(bound for answer in self.answers for bound in answer)]
        for index, (start, end) in enumerate(pairwise(bounds)):
            yield self.text[start:end], index % 2 == 1
        if bounds[-1] < len(self.text):
            yield self.text[bounds[-1] :], False


def read_chat(row: dict[str, Any]) -> Chat | BadRow:
    """Read a line of MiniMind's conversation files, old or new.

    Args:
        row: `conversations` is a list of messages with `role`, `content` and optionally `reasoning_content`,
            `tool_calls` and (on the system message or the row) `tools`; the latter two may be JSON in a string. Messages
            without roles alternate, user first, as in MiniMind2's older files.

    Returns:
        The chat, or what is wrong with the row.
    """
    if "conversations" not in row:
        return BadRow(f'has no field "conversations" (its fields: {", ".join(sorted(row)) or "none"})')
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        return BadRow('"conversations" must be a list of at least one message')
    try:
        tools = _json_list(row.get("tools"), "tools")
        with_roles = any(isinstance(turn, dict) and "role" in turn for turn in turns)
        messages = []
        for number, turn in enumerate(turns, 1):
            where = f"message {number}"
            if not isinstance(turn, dict):
                return BadRow(f'{where} must be an object such as {{"role": "user", "content": "..."}}')
            role = turn.get("role") if with_roles else ("user", "assistant")[(number - 1) % 2]
            if role not in ROLES:
                return BadRow(f"{where}: role must be one of {', '.join(ROLES)}, not {json.dumps(role)}")
            tools = _json_list(turn.get("tools"), f"{where}: tools") or tools
            messages.append(_message(turn, role, where))
    except ValueError as error:
        return BadRow(str(error))
    return Chat(messages, tools)


def _message(turn: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    """Drop empty fields: MiniMind's files fill unused ones with null or ""."""
    message = {key: value for key, value in turn.items() if value is not None and key not in ("tools", "tool_calls")}
    message["role"] = role
    calls = _json_list(turn.get("tool_calls"), f"{where}: tool_calls")
    if calls:
        if not all(isinstance((call.get("function") or call).get("name"), str) for call in calls):
            raise ValueError(f"{where}: each of tool_calls needs a name")
        message["tool_calls"] = calls
        message.setdefault("content", "")
    for key in ("content", "reasoning_content"):
        if not isinstance(message.get(key, "" if key == "reasoning_content" else None), str):
            raise ValueError(f'{where}: "{key}" must be a string')
    return message


def _json_list(value: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{where}: must be a list of objects, or that as JSON in a string")
    return value


def lay_out(tokenizer: Tokenizer, chat: Chat) -> list[Layout]:
    """Render a chat and find its answers.

    Args:
        tokenizer: must have a chat template.
        chat: messages and tools. An assistant message that opens the chat is not an answer and is not trained.

    Returns:
        One layout, or several if the template renders earlier answers differently from the current one.

    Raises:
        ValueError: the template refuses the chat, leaves part of it out, or cannot be followed.
    """
    messages, tools = chat.messages, chat.tools
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    layouts: list[Layout] = []
    for index in reversed(answers):
        text = tokenizer.render_chat(messages[: index + 1], tools)
        if not layouts:
            _check_complete(tokenizer, chat, messages[: index + 1], text)
        if not layouts or not layouts[-1].text.startswith(text):
            layouts.append(Layout(text))
        layouts[-1].answers.append(_find_answer(tokenizer, messages, tools, index, text))
    if not answers:
        layouts.append(Layout(tokenizer.render_chat(messages, tools)))
    for layout in layouts:
        layout.answers.reverse()
        layout.text = layout.text[: layout.answers[-1][1]] if layout.answers else layout.text
    return layouts[::-1]


def end_marker(tokenizer: Tokenizer) -> str:
    """The text that ends a turn, such as `<|im_end|>`; generation stops there."""
    marker = tokenizer.backend.id_to_token(tokenizer.eos_id)
    assert marker is not None
    return marker


def _find_answer(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any, index: int, text: str
) -> tuple[int, int]:
    """Character span of the answer `messages[index]` in `text`, which ends with it."""
    start = -1
    for variables in PROMPTS:  # keep the longest prompt that the text starts with
        prompt = tokenizer.render_chat(messages[:index], tools, add_generation_prompt=True, **variables)
        if text.startswith(prompt):
            start = max(start, len(prompt))
    marker = end_marker(tokenizer)
    end = text.rfind(marker) + len(marker)
    if start < 0 or end - len(marker) < start or text[end:].strip():
        wrong = "begin an answer with its generation prompt" if start < 0 else f"end an answer with {marker}"
        raise ValueError(
            f"message {index + 1}: the chat template of {tokenizer.source} does not {wrong}, so that answers cannot be "
            "told from prompts; use a tokenizer folder whose template does, such as the shipped one"
        )
    return start, end


def _check_complete(tokenizer: Tokenizer, chat: Chat, messages: list[dict[str, Any]], text: str) -> None:
    """Refuse a chat that the template renders incompletely: the model would learn to answer what it cannot see."""
    expected = [
        (f"message {n} ({m['role']})", m["content"]) for n, m in enumerate(messages, 1) if m["role"] != "assistant"
    ]
    for n, message in enumerate(messages, 1):
        for call in message.get("tool_calls") or []:
            expected.append((f"the tool call of message {n}", (call.get("function") or call)["name"]))
    for tool in chat.tools or []:
        name = (tool.get("function") or tool).get("name")
        expected.append(("the tools", name if isinstance(name, str) else ""))
    for what, words in expected:
        if words.strip() not in text:
            raise ValueError(
                f"the chat template of {tokenizer.source} leaves out {what}; use a tokenizer whose template knows it"
            )


class ChatEncoder:
    """Conversation rows to documents whose answers are targets.

    Args:
        tokenizer: the model's; its template decides the documents, so it is part of the name.
        tag_weight: weight of the tokens that spell a tag in an answer; other answer tokens weigh 1.
        tags: texts to weigh more, such as `<think>`.

    Raises:
        ValueError: the weight does not fit in a byte, or the tokenizer is not byte-level.
    """

    masked = True

    def __init__(self, tokenizer: Tokenizer, tag_weight: int = 1, tags: tuple[str, ...] = TAGS) -> None:
        if not 1 <= tag_weight <= 255:
            raise ValueError(f"the weight of the tags must be a whole number from 1 to 255, not {tag_weight}")
        self.token_bytes = tokenizer.token_bytes()
        if tokenizer.decode(tokenizer.encode("a")) != "a":
            raise ValueError(f"{tokenizer.source} puts a space before a text: chats cannot be encoded piece by piece")
        self.tag_weight, self.tags = tag_weight, tuple(tag.encode() for tag in tags)
        decides = [
            tokenizer.config.get("chat_template"),
            end_marker(tokenizer),
            tag_weight,
            tags if tag_weight > 1 else (),
        ]
        self.name = f"chat-1-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]}"

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[list[Document] | BadRow]:
        """Return the documents of each chat, usually one, or what is wrong with the row."""
        laid_out = [self._lay_out(row, tokenizer) for row in rows]
        layouts = [layout for result in laid_out if not isinstance(result, BadRow) for layout in result]
        pieces = [list(layout.segments()) for layout in layouts]
        encoded = iter(tokenizer.encode_batch([text for segments in pieces for text, _ in segments]))
        documents = iter([self._document([(next(encoded), is_answer) for _, is_answer in parts]) for parts in pieces])
        return [result if isinstance(result, BadRow) else [next(documents) for _ in result] for result in laid_out]

    def layouts(self, row: dict[str, Any], tokenizer: Tokenizer) -> list[Layout] | BadRow:
        """Return the layouts of a row, or what is wrong with it; subclasses read other rows."""
        chat = read_chat(row)
        return chat if isinstance(chat, BadRow) else lay_out(tokenizer, chat)

    def _lay_out(self, row: dict[str, Any], tokenizer: Tokenizer) -> list[Layout] | BadRow:
        try:
            layouts = self.layouts(row, tokenizer)
            for layout in layouts if isinstance(layouts, list) else ():
                layout.text.encode("utf-8")
        except UnicodeEncodeError:
            return BadRow("holds half of a surrogate pair, such as \\ud83d alone, which is no character")
        except ValueError as error:
            return BadRow(str(error))
        return layouts

    def _document(self, segments: list[tuple[list[int], bool]]) -> Document:
        ids: list[int] = []
        weights: list[int] = []
        for part, is_answer in segments:
            ids += part
            weights += self._weights(part) if is_answer else [0] * len(part)
        return ids, weights

    def _weights(self, answer: list[int]) -> list[int]:
        """Weight 1 for each token, more for those that spell part of a tag."""
        weights = [1] * len(answer)
        if self.tag_weight == 1:
            return weights
        parts = [self.token_bytes[index] for index in answer]
        text = b"".join(parts)
        spans = sorted((at, at + len(tag)) for tag in self.tags for at in _places(text, tag))
        begin = 0
        for token, part in enumerate(parts):
            end = begin + len(part)
            if any(first < end and begin < last for first, last in spans):
                weights[token] = self.tag_weight
            begin = end
        return weights


def _places(text: bytes, tag: bytes) -> Iterator[int]:
    at = text.find(tag)
    while at >= 0:
        yield at
        at = text.find(tag, at + len(tag))
