"""Does a chat template show everything? A part that it leaves out would vanish in silence.

Purpose: `check_complete` for every caller that renders a chat: training, prompts of rewards, `chat`, the server.
Principle: the chat is rendered once more with a mark in each of its parts; every mark must come out. Searching for the texts
    themselves would be fooled by a short one, such as the result 3, that also stands elsewhere.
Properties: one more rendering a chat. An old thought may be missing from the whole, since templates drop them on purpose; it
    must then be there where its message is the last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import DataError

_MARK = "\ufdd1"  # a noncharacter: in no valid text
_LAST_TAGS = re.compile(r"(?:\s*</?[^<>]*>)*\s*\Z")


class _Marks:
    """Numbers the parts of a chat."""

    def __init__(self) -> None:
        self.names: list[tuple[str, int, bool]] = []  # what it is, its message, whether it is a thought

    def into(self, text: str, what: str, message: int, thought: bool = False) -> str:
        """The text with a mark before its end: tags at its ends steer some templates and stay where they are."""
        if not text.strip():
            return text
        self.names.append((what, message, thought))
        found = _LAST_TAGS.search(text)
        at = found.start() if found is not None and text[: found.start()].strip() else len(text.rstrip())
        return f"{text[:at]}{_MARK}{len(self.names) - 1}{_MARK}{text[at:]}"

    def missing(self, text: str) -> list[int]:
        """Numbers of the marks that a text lacks."""
        seen = {int(n) for n in re.findall(f"{_MARK}([0-9]+){_MARK}", text)}
        return [n for n in range(len(self.names)) if n not in seen]


def check_complete(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **how: Any,
) -> None:
    """Refuse a chat that the tokenizer's template does not show whole.

    Args:
        tokenizer: its template is checked.
        messages: as for `Tokenizer.render_chat`.
        tools: as for `Tokenizer.render_chat`.
        how: further arguments of `Tokenizer.render_chat`.

    Raises:
        DataError: names the message, the thought, the call or the tools that the template leaves out.
    """
    marks = _Marks()
    marked = [_marked(marks, dict(message), n) for n, message in enumerate(messages, 1)]
    marked_tools = None if tools is None else [_marked_tool(marks, dict(tool)) for tool in tools]
    absent = marks.missing(tokenizer.render_chat(marked, marked_tools, **how))
    for number in absent:
        what, message, thought = marks.names[number]
        if thought and number not in marks.missing(tokenizer.render_chat(marked[:message], marked_tools)):
            continue  # shown while it is the newest
        raise DataError(
            f"the chat template of {tokenizer.source} leaves out {what}; use a tokenizer whose template knows it"
        )


def _marked(marks: _Marks, message: dict[str, Any], number: int) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = marks.into(content, f"message {number} ({message.get('role')})", number)
    for name in ("reasoning_content", "thinking", "reasoning"):
        if isinstance(message.get(name), str):
            thought = marks.into(message[name], f"the thought of message {number} ({name})", number, True)
            message[name] = thought
            break  # `with_reasoning` takes the first
    if message.get("tool_calls"):
        message["tool_calls"] = [_marked_call(marks, dict(call), number) for call in message["tool_calls"]]
    return message


def _marked_call(marks: _Marks, call: dict[str, Any], number: int) -> dict[str, Any]:
    function, what = dict(call.get("function") or call), f"the tool call of message {number}"
    if isinstance(function.get("name"), str):
        function["name"] = marks.into(function["name"], what, number)
    arguments = function.get("arguments")
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        found = None
    if found and isinstance(found, dict):
        found = {**found, marks.into("x", what, number): 0}
        function["arguments"] = json.dumps(found, ensure_ascii=False) if isinstance(arguments, str) else found
    return {**call, "function": function} if call.get("function") else function


def _marked_tool(marks: _Marks, tool: dict[str, Any]) -> dict[str, Any]:
    function = dict(tool.get("function") or tool)
    if isinstance(function.get("name"), str):
        function["name"] = marks.into(function["name"], "the tools", 0)
    return {**tool, "function": function} if tool.get("function") else function
