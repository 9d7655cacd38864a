"""Conversations to token ids with the answers marked as targets: the data of SFT, LoRA and reasoning.

Purpose: `{"conversations": [...]}` rows in MiniMind's formats become documents in which only the answers are targets; rows
of other formats have been turned into these by `formats`. `read_chat` is the one reader of chats.

Principle: the mask comes from the rendering, never from a search for marker tokens. For each answer the tokenizer's
template renders two texts: the chat including the answer, and the prompt the model would be given for it. The prompt is a
prefix of the first text; the rest, including the end marker, is the answer. Prompts and answers are encoded separately,
as in generation, so no token spans both.

Properties: correct for any template whose answers begin with its own generation prompt (otherwise an error says so). An
empty thought from the prompt is not trained; a thought the model writes is. The newline after the end marker is not
trained either: generation stops before it. MiniMind trains both; `Variety` does as it does. If a template renders finished
turns differently from the current one (it drops old thoughts), the chat becomes several documents, each as the model would
see it. Ids equal those of the whole text encoded at once, except where a token would straddle the start of an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from minimind_fast.data import fields
from minimind_fast.data.cache import Document
from minimind_fast.data.complete import check_complete
from minimind_fast.data.minimind.variety import Draw, Variety, whole_turn
from minimind_fast.data.rows import HALF_A_PAIR, BadRow
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # usual names, the first that is there counts
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Generation prompts: the template's default, and the one that opens a thought.
PROMPTS: tuple[dict[str, Any], ...] = ({}, {"open_thinking": True, "enable_thinking": True})


@dataclass
class Chat:
    """A row, ready for the template.

    Attributes:
        messages: dicts with `role`, `content` and optionally `reasoning_content`, `tool_calls`.
        tools: JSON schemas of the functions, or None.
        unlearned: indices of the answers that are context only, by `weight: 0` or `loss: false`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    unlearned: frozenset[int] = frozenset()


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
    """Read a row of MiniMind's conversation files, old or new.

    Args:
        row: `conversations` is a list of messages with `role`, `content` and optionally `reasoning_content`, `tool_calls`,
            `weight` or `loss`, and (on the system message or the row) `tools`; tools and calls may be JSON in a string. A
            row's `system` comes first. Messages without roles alternate, user first, as in MiniMind2's older files.

    Returns:
        The chat, or what is wrong with the row.
    """
    if "conversations" not in row:
        return BadRow(f'has no field "conversations" (its fields: {", ".join(sorted(row)) or "none"})')
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        return BadRow('"conversations" must be a list of at least one message')
    try:
        fields.refuse(row, of_a_row=True)
        tools = fields.read_tools(row.get("tools"), "tools") or _functions(row)
        with_roles = any(isinstance(turn, dict) and "role" in turn for turn in turns)
        messages, unlearned = [], set()
        for number, turn in enumerate(turns, 1):
            where = f"message {number}"
            if not isinstance(turn, dict):
                return BadRow(f'{where} must be an object such as {{"role": "user", "content": "..."}}')
            role = turn.get("role") if with_roles else ("user", "assistant")[(number - 1) % 2]
            if role not in ROLES:
                return BadRow(f"{where}: role must be one of {', '.join(ROLES)}, not {json.dumps(role)}")
            tools = fields.read_tools(turn.get("tools"), f"{where}: tools") or tools
            messages.append(_message(turn, role, where))
            if fields.learned(turn, f"{where}: ") is False and role == "assistant":
                unlearned.add(number - 1)
        system = fields.row_system(row)
        if system is not None and (messages[0]["role"], messages[0]["content"]) != ("system", system):
            if messages[0]["role"] == "system":
                return BadRow('"system" and the system message say different things: keep one')
            messages.insert(0, {"role": "system", "content": system})
            unlearned = {index + 1 for index in unlearned}
    except UserError as error:
        return BadRow(str(error))
    return Chat(messages, tools, frozenset(unlearned))


def _functions(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """OpenAI's older name for tools."""
    functions = fields.read_tools(row.get("functions"), "functions")
    return functions and [{"type": "function", "function": function} for function in functions]


def _message(turn: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    """Drop empty fields: MiniMind's files fill unused ones with null or ""."""
    fields.refuse(turn, of_a_row=False, where=f"{where}: ")
    read = ("tools", "tool_calls", "function_call", *THOUGHTS, *fields.FLAGS)
    message = {key: value for key, value in turn.items() if value is not None and key not in read}
    message["role"] = role
    message["content"] = fields.text_of(turn.get("content"), where)
    for name in THOUGHTS:
        if turn.get(name) is not None:
            message["reasoning_content"] = fields.text_of(turn[name], where)
            break
    calls = fields.read_calls(turn.get("tool_calls"), f"{where}: tool_calls")
    if calls is None and turn.get("function_call"):  # OpenAI's older form of one call
        calls = fields.read_calls([turn["function_call"]], f"{where}: function_call")
    if calls:
        message["tool_calls"] = calls
        message["content"] = "" if message["content"] is None else message["content"]
    for key in ("content", "reasoning_content"):
        if not isinstance(message.get(key, "" if key == "reasoning_content" else None), str):
            raise UserError(f'{where}: "{key}" must be a string')
    return message


def lay_out(tokenizer: Tokenizer, chat: Chat, whole: bool = False) -> list[Layout]:
    """Render a chat and find its answers.

    Args:
        tokenizer: must have a chat template.
        chat: messages and tools. An assistant message that opens the chat is not an answer and is not trained; nor are
            the chat's `unlearned`.
        whole: an answer is the whole turn, as MiniMind counts it.

    Returns:
        One layout, or several if the template renders earlier answers differently from the current one.

    Raises:
        ValueError: the template refuses the chat, leaves part of it out, or cannot be followed.
    """
    messages, tools = chat.messages, chat.tools
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    check_complete(tokenizer, messages[: answers[-1] + 1] if answers else messages, tools)
    layouts: list[Layout] = []
    for index in reversed(answers):
        text = tokenizer.render_chat(messages[: index + 1], tools)
        if not layouts or not layouts[-1].text.startswith(text):
            layouts.append(Layout(text))
        span = _find_answer(tokenizer, messages, tools, index, text)
        if index not in chat.unlearned:
            layouts[-1].answers.append(whole_turn(text, *span) if whole else span)
    learned = [layout for layout in layouts if layout.answers]
    if not learned:  # nothing to learn; the row counts as one that was left out
        return layouts[:1] or [Layout(tokenizer.render_chat(messages, tools))]
    for layout in learned:
        layout.answers.reverse()
        layout.text = layout.text[: layout.answers[-1][1]]
    return learned[::-1]


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
        raise UserError(
            f"message {index + 1}: the chat template of {tokenizer.source} does not {wrong}, so that answers cannot be "
            "told from prompts; use a tokenizer folder whose template does, such as the shipped one"
        )
    return start, end


class ChatEncoder:
    """Conversation rows to documents whose answers are targets.

    Args:
        tokenizer: the model's; its template decides the documents, so it is part of the name.
        tag_weight: weight of the tokens that spell a tag in an answer; other answer tokens weigh 1.
        tags: texts to weigh more, such as `<think>`.
        variety: how the documents differ from the rows.

    Raises:
        ValueError: the weight does not fit in a byte, or the tokenizer is not byte-level.
    """

    masked = True
    kind = "chats"

    def __init__(
        self, tokenizer: Tokenizer, tag_weight: int = 1, tags: tuple[str, ...] = TAGS, variety: Variety | None = None
    ) -> None:
        if not 1 <= tag_weight <= 255:
            raise UserError(f"the weight of the tags must be a whole number from 1 to 255, not {tag_weight}")
        self.token_bytes = tokenizer.token_bytes()
        if tokenizer.decode(tokenizer.encode("a")) != "a":
            raise UserError(f"{tokenizer.source} puts a space before a text: chats cannot be encoded piece by piece")
        self.tag_weight, self.tags = tag_weight, tuple(tag.encode() for tag in tags)
        decides = [
            tokenizer.config.get("chat_template"),
            end_marker(tokenizer),
            tag_weight,
            tags if tag_weight > 1 else (),
        ]
        self.variety = variety or Variety()
        decides += [self.variety.identity] if self.variety.identity else []
        self.rows = self.with_system = self.without_thought = 0  # encoded so far; given a system prompt; shortened
        self.name = f"chat-2-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]}"

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
        if isinstance(chat, BadRow):
            return chat
        draw = self.variety.draw(row)
        system = draw.system_for(chat.messages, chat.tools)
        if system is not None:
            first = {"role": "system", "content": system}
            chat = Chat([first, *chat.messages], chat.tools, frozenset(index + 1 for index in chat.unlearned))
        layouts = self.vary(draw, lay_out(tokenizer, chat, self.variety.whole_turn))
        self.with_system += system is not None
        return layouts

    def vary(self, draw: Draw, layouts: list[Layout]) -> list[Layout]:
        """Apply a row's draw to its layouts, and count it."""
        out = [Layout(*draw.shorten(layout.text, layout.answers)) for layout in layouts]
        self.rows += 1
        self.without_thought += any(new.text != old.text for new, old in zip(out, layouts, strict=True))
        return out

    def notes(self) -> list[str]:
        """What the log says of the rows encoded so far."""
        if not self.variety.draws:
            return []
        return [
            f"of {self.rows:,} rows, {self.with_system:,} were given a system prompt and {self.without_thought:,} lost "
            f"their empty thoughts (by seed {self.variety.seed}; the same in every epoch)"
        ]

    def _lay_out(self, row: dict[str, Any], tokenizer: Tokenizer) -> list[Layout] | BadRow:
        try:
            layouts = self.layouts(row, tokenizer)
            for layout in layouts if isinstance(layouts, list) else ():
                layout.text.encode("utf-8")
        except UnicodeEncodeError:
            return BadRow(f"holds {HALF_A_PAIR}")
        except UserError as error:
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
